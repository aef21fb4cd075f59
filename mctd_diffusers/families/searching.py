"""What makes the ``__init__`` and ``__call__`` of a family from those of its stock pipeline.

`@searches(StockPipeline)` above the class of a family gives it both, with real signatures: the
arguments of the stock pipeline, in its order, and then ours. So a family repeats none of them, and
diffusers, which reads signatures to load, wrap and save pipelines, finds what it looks for.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import Parameter
from typing import Any, Final, TypeVar, get_type_hints

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline

from mctd_diffusers.calls import SearchOptions
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import MCTDPipelineOutput

Family = TypeVar("Family", bound=type[MCTDPipeline])

_PARTS: Final[dict[str, Any]] = {
    "preview_vae": AutoencoderTiny | None,
    "reward_model": Any,
    "ige": InformationGainEvaluator | None,
}
"""Our arguments of ``__init__``, which `MCTDPipeline` documents."""


def searches(stock: type[DiffusionPipeline]) -> Callable[[Family], Family]:
    """Let a class search ``stock``: make what follows from that, unless the class has its own.

    Args:
        stock: class of the stock pipeline. The family inherits from it, after `MCTDPipeline`.

    Returns:
        The decorator. It sets ``stock_class``, and

        - ``__init__``: the arguments of the stock pipeline, then ``preview_vae``, ``reward_model``
          and ``ige``, by name;
        - ``__call__``: the arguments of the stock pipeline, then those of `SearchOptions`, by name;
          its body is `MCTDPipeline._call`;
        - ``_optional_components``, ``_exclude_from_cpu_offload`` and ``model_cpu_offload_seq``:
          those of the stock pipeline with the preview decoder, which is offloaded before the full
          one, and the information gain evaluator, which is small and called between calls of the
          network, and so stays on the accelerator.

    Raises:
        ConfigError: the class that is decorated does not inherit from ``stock``.
    """

    def decorate(family: Family) -> Family:
        if not issubclass(family, stock):
            raise ConfigError(
                f"{family.__name__} searches {stock.__name__} and does not inherit from it: write "
                f"class {family.__name__}(MCTDPipeline, {stock.__name__})"
            )
        made = {
            "stock_class": stock,
            "__init__": _named(_make_init(stock), family, _init_signature(stock), _init_doc(stock)),
            "__call__": _named(_make_call(), family, _call_signature(stock), _call_doc(stock)),
            "_optional_components": [*stock._optional_components, "preview_vae", "ige"],
            "_exclude_from_cpu_offload": [*stock._exclude_from_cpu_offload, "ige"],
            "model_cpu_offload_seq": re.sub(
                r"(^|->)vae$", r"\1preview_vae->vae", stock.model_cpu_offload_seq
            ),
        }
        for name, part in made.items():
            if name not in vars(family):
                setattr(family, name, part)
        return family

    return decorate


def _make_init(stock: type[DiffusionPipeline]) -> Callable[..., None]:
    def __init__(  # noqa: N807  # it becomes that of the family
        self: Any,
        *args: Any,
        preview_vae: Any = None,
        reward_model: Any = None,
        ige: Any = None,
        **kwargs: Any,
    ) -> None:
        stock.__init__(self, *args, **kwargs)
        self._set_up_search(preview_vae, reward_model, ige)

    return __init__


def _make_call() -> Callable[..., Any]:
    @torch.no_grad()
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807  # likewise
        return self._call(*args, **kwargs)

    return __call__


def _named(
    function: Any, family: type[MCTDPipeline], signature: inspect.Signature, doc: str
) -> Callable[..., Any]:
    """The function as if it had been written in the class of the family."""
    function.__module__ = family.__module__
    function.__qualname__ = f"{family.__qualname__}.{function.__name__}"
    function.__doc__ = doc
    function.__signature__ = signature
    function.__annotations__ = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.annotation is not Parameter.empty
    } | {"return": signature.return_annotation}
    return function


# Signatures


def _init_signature(stock: type[DiffusionPipeline]) -> inspect.Signature:
    ours = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in _PARTS.items()
    ]
    return _with_ours(stock.__init__, ours, None)


def _call_signature(stock: type[DiffusionPipeline]) -> inspect.Signature:
    kinds = get_type_hints(SearchOptions)
    ours = [
        Parameter(
            option.name,
            Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=kinds[option.name],
        )
        for option in fields(SearchOptions)
    ]
    return _with_ours(stock.__call__, ours, MCTDPipelineOutput | tuple[Any, ...])


def _with_ours(function: Any, ours: Sequence[Parameter], returns: Any) -> inspect.Signature:
    """The signature of a stock function with our arguments at its end."""
    stock = list(inspect.signature(function, eval_str=True).parameters.values())
    rest = [stock.pop()] if stock[-1].kind is Parameter.VAR_KEYWORD else []
    return inspect.Signature([*stock, *ours, *rest], return_annotation=returns)


# Docstrings


_INIT_DOC: Final = """Args:
{stock}
{ours}"""

_CALL_DOC: Final = """The call function to the pipeline for generation.

The arguments before `search` are those of [`{name}`], in its order and with its meaning. In a
search a step is a wave: a callback sees the samples that a wave evaluated, `latents` and
`prompt_embeds`, and may set `pipe._interrupt = True`, but changes nothing. With one generator an
image, an image does not depend on the others.

Args:
{stock}
{ours}

Examples:
    ```py
    >>> import torch
    >>> from mctd_diffusers import MCTDPipeline

    >>> pipe = MCTDPipeline.from_pretrained("folder or repository", reward_model="clip")
    >>> out = pipe(
    ...     prompt="a red octopus above two blue cars",
    ...     search="mctd",
    ...     compute=8,
    ...     generator=torch.Generator().manual_seed(0),
    ... )
    >>> out.images[0], out.rewards[0], out.nfe[0]
    ```

Returns:
    [`MCTDPipelineOutput`] or `tuple`:
        If `return_dict` is `True` an [`MCTDPipelineOutput`] is returned, otherwise a `tuple` of its
        fields that begins with the images and what the safety checker says of them. Without a
        search the tuple is that of [`{name}`].

Raises:
    ConfigError: an argument cannot work; before the first call of the network.
    BudgetError: a budget is too small to finish one sample.
    UnsupportedSchedulerError: `search_scheduler` cannot be branched.
    SearchError: a callback changed a tensor or a setting; `partial` holds the output so far.
    RewardError: the reward raised or answered in the wrong form; `partial` holds the output so far.
    NonFiniteRewardError: a reward is NaN or infinite; `partial` likewise.
"""


def _init_doc(stock: type[DiffusionPipeline]) -> str:
    return _INIT_DOC.format(stock=_arguments(stock), ours=_arguments(MCTDPipeline))


def _call_doc(stock: type[DiffusionPipeline]) -> str:
    return _CALL_DOC.format(
        name=stock.__name__, stock=_arguments(stock.__call__), ours=_arguments(SearchOptions)
    )


def _arguments(documented: Any) -> str:
    """The section ``Args:`` of a docstring, indented by 4; empty without one."""
    text = f"{inspect.getdoc(documented)}\n"
    section = re.search(r"^( *)Args:\n((?:\1 +\S.*\n|\s*\n)*)", text, re.MULTILINE)
    return "" if section is None else textwrap.indent(textwrap.dedent(section[2]).rstrip(), "    ")
