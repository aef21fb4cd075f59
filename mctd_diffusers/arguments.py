"""What the arguments of a call name: told apart, checked by the pipeline's parts, and looked up."""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)

from mctd_diffusers.calls import SearchOptions, decoder_channels
from mctd_diffusers.denoising.protocols import RewardFn
from mctd_diffusers.denoising.scheduler_names import check_fits, levels_of_model, scheduler_from
from mctd_diffusers.denoising.schedulers import check_scheduler
from mctd_diffusers.errors import ConfigError, UnsupportedSchedulerError
from mctd_diffusers.rewards.resolving import resolve_reward
from mctd_diffusers.search.strategies import STRATEGIES


def bound_arguments(
    pipe: DiffusionPipeline, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], SearchOptions]:
    """The stock arguments of a call, defaults filled in, and ours.

    Raises:
        ConfigError: the call knows no argument of that name.
    """
    signature = inspect.signature(type(pipe).__call__)
    _check_names(kwargs, list(signature.parameters), type(pipe).__name__)
    bound = signature.bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    stock = {name: given for name, given in bound.arguments.items() if name != "self"}
    ours = {field.name: stock.pop(field.name) for field in fields(SearchOptions)}
    return stock | stock.pop("kwargs", {}), SearchOptions(**ours)


def _check_names(given: Iterable[str], known: Sequence[str], pipeline: str) -> None:
    """Refuse arguments that the call does not know; stock pipelines drop them silently."""
    deprecated = ("callback", "callback_steps") if "kwargs" in known else ()
    for name in set(given) - set(known) - set(deprecated):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        raise ConfigError(f"{name!r} is no argument of {pipeline}: {hint}")


def stock_defaults(pipeline_class: type[DiffusionPipeline]) -> dict[str, Any]:
    """Defaults of the arguments of the stock call."""
    ours = {"self", "kwargs", *(option.name for option in fields(SearchOptions))}
    parameters = inspect.signature(pipeline_class.__call__).parameters
    return {name: each.default for name, each in parameters.items() if name not in ours}


def check_no_options(options: SearchOptions) -> None:
    """Refuse arguments of ours where nothing is searched.

    Raises:
        ConfigError: one beside ``search`` is not its default.
    """
    named = [
        option.name
        for option in fields(options)
        if option.name != "search" and getattr(options, option.name) != option.default
    ]
    if named:
        raise ConfigError(
            f"search=None is the stock pipeline, which knows no {', '.join(named)}: leave "
            f"{'it' if len(named) == 1 else 'them'} out, or name a search "
            f"({', '.join(sorted(STRATEGIES))})"
        )


def check_denoiser(
    denoiser: Any,
    decoders: Mapping[str, Any],
    latent_channels: int | None,
    device: torch.device,
) -> None:
    """Refuse a denoiser that the decoders do not fit, or that is in half precision on a CPU.

    Args:
        denoiser: the component.
        decoders: components by name; ``None`` for one that is not there.
        latent_channels: of the latents that are decoded; ``None`` where that is not checked.
        device: that it runs on.

    Raises:
        ConfigError: it does not fit.
    """
    for name, decoder in decoders.items():
        given = decoder_channels(getattr(decoder, "config", {}))
        if None not in (given, latent_channels) and given != latent_channels:
            raise ConfigError(
                f"the {name} decodes latents of {given} channels, and the "
                f"{type(denoiser).__name__} denoises latents of {latent_channels}: load the {name} "
                "of the same model"
            )
    if device.type == "cpu" and getattr(denoiser, "dtype", None) == torch.float16:
        raise ConfigError(
            f"the {type(denoiser).__name__} is in float16 on the CPU, which diffusers supports "
            "on accelerators alone: pipe.to(dtype=torch.float32), or bfloat16, or move the "
            "pipeline to an accelerator"
        )


def search_reward(given: Any) -> RewardFn:
    """The reward to search by.

    Raises:
        ConfigError: there is none, or it cannot be resolved.
    """
    if given is None:
        raise ConfigError(
            "a search needs a reward and this pipeline has none; paste one of:\n"
            '    pipe.reward_model = "clip"  # or "pickscore", "embedded", a CLIPModel folder\n'
            "    pipe.reward_model = lambda images, prompts: images.mean(dim=(1, 2, 3))\n"
            "or call with reward_model=..., or with search=None for a plain sample"
        )
    return resolve_reward(given)


def scheduler_of(given: Any, own: SchedulerMixin) -> SchedulerMixin:
    """A copy of the scheduler to search with.

    Args:
        given: named by the call; ``None`` takes the pipeline's own, or one made from its config.
        own: of the pipeline.

    Raises:
        UnsupportedSchedulerError: the one named explicitly cannot be branched, or is for models of
            another kind.
        ConfigError: what is named is no scheduler.
    """
    if given is not None:
        if not isinstance(given, SchedulerMixin):
            raise ConfigError(
                f"search_scheduler={given!r} is a {type(given).__name__}: pass a scheduler, "
                "such as DDIMScheduler.from_config(pipe.scheduler.config)"
            )
        check_fits(given, own.config)
        check_scheduler(given)
        return copy.deepcopy(given)
    try:
        check_scheduler(own)
    except UnsupportedSchedulerError as error:
        is_flow = levels_of_model(own.config) == "flow"
        kind = FlowMatchEulerDiscreteScheduler if is_flow else DDIMScheduler
        scheduler: SchedulerMixin = scheduler_from(kind, own.config)
        check_scheduler(scheduler)
        warnings.warn(
            f"{type(own).__name__} cannot be branched, so the search steps a "
            f"{kind.__name__} made from its config ({str(error).splitlines()[0]}); name one "
            "with search_scheduler=... to choose it yourself",
            stacklevel=7,
        )
        return scheduler
    return copy.deepcopy(own)
