"""What the commands share: their options, and what is checked and loaded before a search runs."""

from __future__ import annotations

import ast
import contextlib
import logging
import math
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mctd_diffusers import EMBEDDED_MODEL
from mctd_diffusers.denoising.scheduler_names import SCHEDULERS
from mctd_diffusers.errors import ConfigError, MCTDError
from mctd_diffusers.imports import imported

if TYPE_CHECKING:
    from tqdm import tqdm

    from mctd_diffusers.denoising.scheduler_names import SchedulerName
    from mctd_diffusers.pipeline import MCTDPipeline

Model = Annotated[
    str, typer.Option(help="Folder or Hub repository of a diffusers pipeline, or 'embedded'.")
]
Reward = Annotated[
    str | None,
    typer.Option(
        help="Name of a reward, or folder or repository of a CLIPModel [the model's own]."
    ),
]
Ige = Annotated[
    str | None,
    typer.Option(help="Folder or repository of an information gain evaluator [the model's own]."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help=f"One of {', '.join(SCHEDULERS)}, a class of diffusers or module:Class; settings "
        "follow after colons, as in DDIM:eta=1 or DPM++2M:karras:trailing [the model's own]."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps of one sample.")]
Guidance = Annotated[float, typer.Option(help="Weight of classifier-free guidance.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Image i starts from noise of seed + i.")
]
Compute = Annotated[float | None, typer.Option(help="Budget for each image, in plain samples [8].")]
NfeBudget = Annotated[int | None, typer.Option(help="The same in NFE (evaluations of one latent).")]
CostBudget = Annotated[
    float | None,
    typer.Option(help="Budget for each image in row-equivalents: decodes and rewards included."),
]
TimeBudget = Annotated[
    float | None, typer.Option(help="Budget in seconds for all images of a call together.")
]
ImagesPerPrompt = Annotated[int, typer.Option(min=1, help="Images for each prompt.")]
RowsPerCall = Annotated[
    int | None, typer.Option(min=1, help="Latents in a call of the network [by the device].")
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda [cuda where there is one].")]
Prompts = Annotated[list[str], typer.Argument(help="What to draw; several for several images.")]

SEARCH_HELP = (
    "a search (mctd, beam, best_of_n), 'none' for the stock pipeline, or a search with settings of "
    "its own, such as beam:width=2:stride=4"
)


def say(message: str) -> None:
    """Say on standard error what the user has to know."""
    typer.echo(f"mctd: {message}", err=True)


def say_progress(text: str) -> None:
    """Say on standard error what is under way."""
    typer.echo(f"... {text}", err=True)


@contextlib.contextmanager
def saving() -> Iterator[list[Path]]:
    """Collects the files that are written, and names them where Ctrl-C comes."""
    saved: list[Path] = []
    try:
        yield saved
    except KeyboardInterrupt:
        _say_stopped(saved)
        raise typer.Exit(130) from None


def _say_stopped(saved: Sequence[Path]) -> None:
    count = len(saved)
    kept = f"{count} files are saved, such as {saved[-1]}" if count else "nothing was saved"
    say(f"stopped by Ctrl-C; {kept if count != 1 else f'saved is {saved[0]}'}")


# --- reading arguments --------------------------------------------------------------------------


def parse_search(text: str) -> tuple[str, Any]:
    """Reads a search: ``"beam"``, ``"none"`` or ``"beam:width=2:stride=4"``.

    Returns:
        Its label, and what a pipeline takes for it.

    Raises:
        ConfigError: no such search, or a setting that it does not have or accept.
    """
    from mctd_diffusers.search.strategies import resolve_strategy

    text = text.strip()
    name, *parts = text.split(":")
    settings: list[str] = []
    for part in parts:
        if settings and "=" not in part:  # of a value with a colon in it, such as fixed:4
            settings[-1] += f":{part}"
        else:
            settings.append(part)
    if name == "none":
        if settings:
            raise ConfigError(f"search {text!r}: the stock pipeline ('none') has no settings")
        return text, None
    strategy = resolve_strategy(name)
    if not settings:
        return name, name
    kinds = typing.get_type_hints(type(strategy))
    known = list(getattr(strategy, "__dataclass_fields__", {}))
    chosen: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f"search {text!r}: {setting!r} is no setting of {name}; write NAME=VALUE with one "
                f"of {', '.join(known)}"
            )
        if key in chosen:
            raise ConfigError(f"search {text!r}: {key} is set twice; set it once")
        try:
            chosen[key] = _read_setting(value, kinds[key])
        except ValueError as error:
            raise ConfigError(f"search {text!r}: {key} is {error}") from None
    base: Any = strategy  # a dataclass, as the settings found in it say
    return text, replace(base, **chosen)


def _read_setting(text: str, kind: Any) -> Any:
    """Read the value of a setting whose annotation is ``kind``.

    Raises:
        ValueError: it is of another kind; says the value and what to give.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    choices = typing.get_args(kind) or (kind,)
    if typing.get_origin(kind) is tuple and str in choices:
        fits, wanted = text[:1] == "(" and text[-1:] == ")", "names in brackets, such as (one,two)"
        if fits:
            value = tuple(name.strip() for name in text[1:-1].split(",") if name.strip())
    elif typing.get_origin(kind) is tuple:
        part_kinds = {*(typing.get_args(choices[0]) or choices[:1]), int}
        fits = isinstance(value, tuple) and all(type(part) in part_kinds for part in value)
        wanted = "whole numbers in brackets, such as (1,2)"
        if float in part_kinds:
            wanted = "numbers in brackets, such as (1,2.5)"
    elif bool in choices:
        fits, wanted = isinstance(value, bool), "True or False"
    elif typing.get_origin(kind) is typing.Literal:
        fits, wanted = value in choices, f"one of {', '.join(map(str, choices))}"
    elif float in choices:
        with contextlib.suppress(ValueError):
            value = float(text)
        fits, wanted = isinstance(value, float) and math.isfinite(value), "a finite number"
    elif str in choices:
        value, fits, wanted = text, bool(text), "a name"
    else:
        fits, wanted = type(value) is int, "a whole number"
    if type(None) in choices:
        fits, wanted = fits or value is None, f"{wanted} or None"
    if not fits:
        raise ValueError(f"{value!r}; give {wanted}")
    return value


def parse_searches(text: str, *, besides: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """Reads searches with commas between them.

    Args:
        text: such as ``"best_of_n,beam:width=2"``.
        besides: names that are no searches and mean something to the command alone.

    Raises:
        ConfigError: one of them cannot be read, or is named twice.
    """
    parts = re.split(r",(?![^(]*\))", text)  # not at commas inside parentheses
    names = [part.strip() for part in parts if part.strip()]
    searches = [(name, name) if name in besides else parse_search(name) for name in names]
    labels = [label for label, _ in searches]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"search {label!r} is named twice in {text!r}: name it once")
    if not searches:
        raise ConfigError(f"no search in {text!r}: name at least one")
    return searches


def whole_numbers(text: str, name: str, *, least: int) -> tuple[int, ...]:
    """Reads whole numbers with commas between them.

    Raises:
        ConfigError: they cannot be read, are below ``least``, or named twice.
    """
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            f"{name} is {text!r}: give whole numbers with commas between them"
        ) from error
    if not numbers:
        raise ConfigError(f"{name} is {text!r}: give at least one whole number")
    for number in numbers:
        if number < least:
            raise ConfigError(f"{name} is {text!r}: {number} is too small, give at least {least}")
        if numbers.count(number) > 1:
            raise ConfigError(f"{name} is {text!r}: {number} is named twice, name it once")
    return numbers


def _check_device(device: str | None) -> str:
    """The device to draw on, which must be able to hold numbers and give them back.

    Raises:
        ConfigError: it cannot.
    """
    import torch

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=where).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {where!r} cannot be used ({first_line(error)}): name another, such as cpu"
        ) from error
    return where


@dataclass(frozen=True)
class Call:
    """What a command asks of the pipeline, checked before the model is loaded.

    Attributes:
        searches: as the pipeline takes them, ``None`` for the stock pipeline.
        arguments: of the pipeline's call; a scheduler is added when there is a pipeline.
        scheduler: to step with, ``None`` for the model's own.
        device: to draw on.
    """

    searches: tuple[Any, ...]
    arguments: dict[str, Any]
    scheduler: SchedulerName | None
    device: str


def check_call(
    searches: Sequence[Any],
    *,
    steps: int,
    guidance: float,
    scheduler: str | None = None,
    device: str | None = None,
    rows_per_call: int | None = None,
    **budgets: float | None,
) -> Call:
    """Check everything that can be checked without a model.

    Args:
        searches: as the pipeline takes them.
        steps: of one sample.
        guidance: weight of guidance.
        scheduler: its name and settings.
        device: to draw on; ``None`` for the best there is.
        rows_per_call: as the pipeline takes it.
        budgets: as the pipeline takes them.

    Raises:
        ConfigError: something cannot work; names the value and the cure.
    """
    from mctd_diffusers.calls import SearchOptions, check_options, nfe_allowed
    from mctd_diffusers.denoising.scheduler_names import read_scheduler
    from mctd_diffusers.search.budget import Budget
    from mctd_diffusers.search.problem import Problem
    from mctd_diffusers.search.runner import check_budget
    from mctd_diffusers.search.strategies import resolve_strategy

    if not math.isfinite(guidance):
        raise ConfigError(f"guidance={guidance}: give a finite number")
    given = {name: budget for name, budget in budgets.items() if budget is not None}
    if given and all(search is None for search in searches):
        names = [f"--{name.removesuffix('_s').replace('_', '-')}" for name in given]
        raise ConfigError(
            f"search 'none' is the stock pipeline, which has no budget: leave {', '.join(names)} "
            "out, or name a search"
        )
    options = SearchOptions(rows_per_call=rows_per_call, **budgets)  # type: ignore[arg-type]  # see the pipeline
    check_options(options)
    for search in searches:
        nfe = nfe_allowed(options, steps)
        if search is not None and nfe is not None:
            problem = Problem(index=0, num_steps=steps, root_seed=0, budget=Budget(nfe))
            check_budget(resolve_strategy(search), problem)
    return Call(
        searches=tuple(searches),
        arguments={
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            **budgets,
            "rows_per_call": rows_per_call,
            "search_scheduler": None,
        },
        scheduler=None if scheduler is None else read_scheduler(scheduler),
        device=_check_device(device),
    )


def load_pipeline(model: str, reward: Any, call: Call, *, ige: str | None = None) -> MCTDPipeline:
    """Load a pipeline, quietly, and put it on its device.

    Args:
        model: "embedded", a folder or a repository.
        reward: as `MCTDPipeline.from_pretrained` takes it; ``None`` for the model's own.
        call: checked; gets the scheduler.
        ige: folder or repository of an information gain evaluator; ``None`` for the model's own.

    Raises:
        ConfigError: the model or the reward cannot be had, or the model's config does not make the
            scheduler.
        UnsupportedSchedulerError: a search cannot branch the scheduler.
    """
    import diffusers
    import huggingface_hub
    import torch
    import transformers
    from safetensors import SafetensorError

    from mctd_diffusers.denoising.scheduler_names import named_scheduler
    from mctd_diffusers.pipeline import MCTDPipeline

    # What they log of an error is said once, by the error itself.
    for library in (diffusers, transformers, huggingface_hub):
        library.utils.logging.set_verbosity(logging.CRITICAL)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    folder = EMBEDDED_MODEL if model == "embedded" else model
    if model == "embedded" and reward is None:
        reward = "embedded"
    chosen = {} if reward is None else {"reward_model": reward}
    if ige is not None:
        chosen["ige"] = ige
    try:
        _check_scheduler(folder, call)
        pipe = MCTDPipeline.from_pretrained(folder, **chosen)
    except MCTDError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"model {model!r} cannot be loaded ({first_line(error)}): copy or download it again, "
            "whole"
        ) from error
    if pipe.reward_model is None and any(search is not None for search in call.searches):
        from mctd_diffusers.rewards.resolving import REWARD_NAMES

        raise ConfigError(
            f"a search needs a reward and model {model!r} has none: add `--reward clip`, another "
            f"of {', '.join(REWARD_NAMES)}, or the folder or repository of a CLIPModel"
        )
    if call.scheduler is not None:
        named = named_scheduler(call.scheduler, pipe.scheduler.config)
        pipe.scheduler = call.arguments["search_scheduler"] = named.scheduler
        if named.eta is not None:
            call.arguments["eta"] = named.eta
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    # Weights are often saved in half precision, which a CPU is slow at.
    return pipe.to(device=call.device, dtype=torch.float32)


def _check_scheduler(folder: str, call: Call) -> None:
    """Make the scheduler from the model's config alone, before its weights are read.

    Raises:
        ConfigError: the config does not make it.
        UnsupportedSchedulerError: a search cannot branch it.
        OSError: there is no such model.
    """
    if call.scheduler is None:
        return
    from mctd_diffusers.denoising.scheduler_names import named_scheduler
    from mctd_diffusers.denoising.schedulers import check_scheduler

    config = call.scheduler.kind.load_config(folder, subfolder="scheduler")
    named = named_scheduler(call.scheduler, config)
    if any(search is not None for search in call.searches):
        check_scheduler(named.scheduler)


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named_reward(text: str) -> Any:
    """A reward by its name, or a function by ``module:function``.

    Raises:
        ConfigError: there is none.
    """
    from mctd_diffusers.rewards.resolving import resolve_reward

    return resolve_reward(imported(text, "module:function") if ":" in text else text)


# --- the judge ----------------------------------------------------------------------------------


def load_gold_judge() -> Any:
    """Load the judge in the box.

    Raises:
        ConfigError: it is not there.
    """
    from mctd_diffusers.evaluation.judge import EMBEDDED_JUDGE, load_judge

    try:
        return load_judge()
    except MCTDError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the gold judge cannot be loaded from {EMBEDDED_JUDGE}: {first_line(error)}"
        ) from error


def check_judge_reads(prompts: Sequence[str]) -> None:
    """Refuse prompts that the judge cannot read.

    Raises:
        ConfigError: names the first of them and what to give.
    """
    from mctd_diffusers.evaluation.scenes import parse_prompt

    for prompt in prompts:
        try:
            parse_prompt(prompt)
        except ConfigError as error:
            raise ConfigError(
                f"the judge in the box cannot read every prompt ({error}): name another gold with "
                "--gold, such as clip or module:function"
            ) from error


def progress_bar(total: float, unit: str, **settings: Any) -> tqdm[Any]:
    """A progress bar on standard error, which a log file gets a line of now and then.

    Args:
        total: in units.
        unit: what is counted.
        settings: further ones of tqdm.
    """
    from tqdm import tqdm

    is_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        unit=unit,
        file=sys.stderr,
        mininterval=0.5 if is_terminal else 30,
        dynamic_ncols=is_terminal,
        **settings,
    )
