"""The command line: ``mctd generate | compare | demo | bench | evaluate-model``.

A command reads its arguments, checks what can be checked at once, and only then loads torch.
Whatever is wrong ends in one message on standard error and a non-zero exit: 2 for an argument that
cannot be read, 130 for Ctrl-C (what was saved by then is named), 1 for everything else.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import logging
import math
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mctd_diffusers import EMBEDDED_MODEL
from mctd_diffusers.errors import ConfigError, MCTDError, SearchError

if TYPE_CHECKING:
    from mctd_diffusers.pipeline import MCTDPipeline
    from mctd_diffusers.viewing.comparison import Column, GoldFn

app = typer.Typer(
    name="mctd",
    help="Search over the denoising process of diffusers pipelines, guided by any reward.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# typer carries click inside or beside it, depending on its version.
_ClickException: type[Any] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}
"""Short names of schedulers; diffusers' own class names do as well."""

Model = Annotated[
    str, typer.Option(help="Folder or Hub repository of a diffusers pipeline, or 'embedded'.")
]
Reward = Annotated[
    str | None,
    typer.Option(
        help="Name of a reward, or folder or repository of a CLIPModel [the model's own]."
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help=f"One of {', '.join(SCHEDULERS)}, or a class of diffusers [the model's own]."
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = app(args=arguments, prog_name="mctd", standalone_mode=False)
        except typer.Exit as stop:
            status = stop.exit_code
        except (typer.Abort, KeyboardInterrupt):
            _say("stopped; nothing was saved")
            status = 130
        except _ClickException as error:
            _say(error.format_message())
            status = 2
        except MCTDError as error:
            _say(str(error))
            status = 1
        except OSError as error:
            _say(_os_error_in_words(error))
            status = 1
    return int(status or 0)


def _say(message: str) -> None:
    """Say on standard error what the user has to know."""
    typer.echo(f"mctd: {message}", err=True)


def _os_error_in_words(error: OSError) -> str:
    """Say which file the system refused, and what can be done."""
    if error.filename is None:
        return str(error)
    return (
        f"{str(error.filename)!r} cannot be used ({error.strerror}): clear the way, or name "
        "another folder with --output"
    )


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Show warnings that are meant for users; those for developers are left out."""
    if not issubclass(category, DeprecationWarning | FutureWarning | ResourceWarning):
        _say(f"warning: {message}")


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
    name, *settings = text.split(":")
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
    if typing.get_origin(kind) is tuple:
        fits = isinstance(value, tuple) and all(type(part) is int for part in value)
        wanted = "whole numbers in brackets, such as (1,2)"
    elif typing.get_origin(kind) is typing.Literal:
        fits, wanted = value in choices, f"one of {', '.join(map(str, choices))}"
    elif float in choices:
        with contextlib.suppress(ValueError):
            value = float(text)
        fits, wanted = isinstance(value, float) and math.isfinite(value), "a finite number"
    else:
        fits, wanted = type(value) is int, "a whole number"
    if type(None) in choices:
        fits, wanted = fits or value is None, f"{wanted} or None"
    if not fits:
        raise ValueError(f"{value!r}; give {wanted}")
    return value


def parse_searches(text: str) -> list[tuple[str, Any]]:
    """Reads searches with commas between them.

    Raises:
        ConfigError: one of them cannot be read, or is named twice.
    """
    parts = re.split(r",(?![^(]*\))", text)  # not at commas inside parentheses
    searches = [parse_search(part) for part in parts if part.strip()]
    labels = [label for label, _ in searches]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"search {label!r} is named twice in {text!r}: name it once")
    if not searches:
        raise ConfigError(f"no search in {text!r}: name at least one")
    return searches


def _whole_numbers(text: str, name: str, *, least: int) -> tuple[int, ...]:
    """Read whole numbers with commas between them."""
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


def _scheduler_class(name: str, searches: Sequence[Any]) -> Any:
    """Find the scheduler of a short name or a class name.

    Raises:
        ConfigError: no scheduler has that name, or it cannot be searched.
    """
    import diffusers

    class_name = SCHEDULERS.get(name, name)
    found: Any = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if not isinstance(found, type) or not issubclass(found, diffusers.SchedulerMixin):
        names = {each.lower(): each for each in (*SCHEDULERS, *SCHEDULERS.values())}
        near = difflib.get_close_matches(name.lower(), names, 1, 0.6)
        hint = f"did you mean {names[near[0]]!r}? " if near else ""
        raise ConfigError(
            f"no scheduler is named {name!r}; {hint}the names are {', '.join(SCHEDULERS)}, or a "
            "class of diffusers such as EulerDiscreteScheduler"
        )
    if class_name not in SCHEDULERS.values() and any(search is not None for search in searches):
        raise ConfigError(
            f"scheduler {name!r} cannot be searched: name one of {', '.join(SCHEDULERS)}, or draw "
            "with --search none"
        )
    return found


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
            f"device {where!r} cannot be used ({_first_line(error)}): name another, such as cpu"
        ) from error
    return where


@dataclass(frozen=True)
class _Call:
    """What a command asks of the pipeline, checked before the model is loaded.

    Attributes:
        searches: as the pipeline takes them, ``None`` for the stock pipeline.
        arguments: of the pipeline's call; a scheduler is added when there is a pipeline.
        scheduler: class to step with, ``None`` for the model's own.
        device: to draw on.
    """

    searches: tuple[Any, ...]
    arguments: dict[str, Any]
    scheduler: Any
    device: str


def _check_call(
    searches: Sequence[Any],
    *,
    steps: int,
    guidance: float,
    scheduler: str | None = None,
    device: str | None = None,
    rows_per_call: int | None = None,
    **budgets: float | None,
) -> _Call:
    """Check everything that can be checked without a model.

    Args:
        searches: as the pipeline takes them.
        steps: of one sample.
        guidance: weight of guidance.
        scheduler: short name or class name.
        device: to draw on; ``None`` for the best there is.
        rows_per_call: as the pipeline takes it.
        budgets: as the pipeline takes them.

    Raises:
        ConfigError: something cannot work; names the value and the cure.
    """
    from mctd_diffusers.calls import SearchOptions, check_options, nfe_allowed
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
    return _Call(
        searches=tuple(searches),
        arguments={
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            **budgets,
            "rows_per_call": rows_per_call,
            "search_scheduler": None,
        },
        scheduler=None if scheduler is None else _scheduler_class(scheduler, searches),
        device=_check_device(device),
    )


def _load_pipeline(model: str, reward: str | None, call: _Call) -> MCTDPipeline:
    """Load a pipeline, quietly, and put it on its device.

    Raises:
        ConfigError: the model or the reward cannot be had.
    """
    import diffusers
    import huggingface_hub
    import torch
    import transformers
    from safetensors import SafetensorError

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
    try:
        pipe = MCTDPipeline.from_pretrained(folder, **chosen)
    except MCTDError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"model {model!r} cannot be loaded ({_first_line(error)}): copy or download it again, "
            "whole"
        ) from error
    if pipe.reward_model is None and any(search is not None for search in call.searches):
        from mctd_diffusers.rewards.resolving import REWARD_NAMES

        raise ConfigError(
            f"a search needs a reward and model {model!r} has none: add `--reward clip`, another "
            f"of {', '.join(REWARD_NAMES)}, or the folder or repository of a CLIPModel"
        )
    if call.scheduler is not None:
        pipe.scheduler = call.scheduler.from_config(pipe.scheduler.config)
        call.arguments["search_scheduler"] = pipe.scheduler
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    # Weights are often saved in half precision, which a CPU is slow at.
    return pipe.to(device=call.device, dtype=torch.float32)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _budget_in_words(call: dict[str, Any]) -> str:
    """Say the budget of a call."""
    named = {
        "compute": "compute {:g}",
        "nfe_budget": "{} NFE an image",
        "cost_budget": "{:g} row-equivalents an image",
        "time_budget_s": "{:g} s",
    }
    given = {name: call[name] for name in named if call.get(name) is not None}
    words = [named[name].format(bound) for name, bound in given.items()]
    return ", ".join(words) or "compute 8"


def _about(command: str, model: str, call: dict[str, Any], seed: int) -> dict[str, Any]:
    """Say in ``result.json`` what was run; no path of this machine but the one that was typed."""
    import diffusers
    import torch

    import mctd_diffusers

    kept = {name: given for name, given in call.items() if name != "search_scheduler"}
    return {
        "command": command,
        "model": "embedded" if model == EMBEDDED_MODEL else model,
        "seed": seed,
        "budget": _budget_in_words(call),
        **{name: given for name, given in kept.items() if given is not None},
        "versions": {
            "mctd_diffusers": mctd_diffusers.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
        },
    }


# --- the judge ----------------------------------------------------------------------------------


def _gold_function(prompts: Sequence[str], demanded: bool | None) -> GoldFn | None:
    """The judge in the box, for prompts that it can read.

    Args:
        prompts: of the whole command.
        demanded: ``True`` refuses what the judge cannot read, ``None`` passes over it, ``False``
            asks for no judge.

    Raises:
        ConfigError: gold is demanded, and a prompt is outside the grammar or there is no judge.
    """
    from mctd_diffusers.evaluation.scenes import parse_prompt

    if demanded is False:
        return None
    readable = set()
    for prompt in prompts:
        try:
            parse_prompt(prompt)
            readable.add(prompt)
        except ConfigError as error:
            if demanded:
                raise ConfigError(
                    f"gold is asked for, but the judge cannot read it: {error}"
                ) from error
    from mctd_diffusers.evaluation.judge import EMBEDDED_JUDGE

    if not readable or not (demanded or EMBEDDED_JUDGE.is_dir()):
        return None
    judge = _load_judge()
    from mctd_diffusers.viewing.comparison import Gold

    def gold(images: Any, prompts: Sequence[str]) -> list[Gold | None]:
        found: list[Gold | None] = [None] * len(prompts)
        rows = [i for i, prompt in enumerate(prompts) if prompt in readable]
        if rows:
            report = judge.score(images[rows], [prompts[i] for i in rows])
            for i, value, right in zip(rows, report.gold, report.all_right, strict=True):
                found[i] = Gold(float(value), bool(right))
        return found

    return gold


def _load_judge() -> Any:
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
            f"the gold judge cannot be loaded from {EMBEDDED_JUDGE}: {_first_line(error)}"
        ) from error


# --- commands -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _saving() -> Iterator[list[Path]]:
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
    _say(f"stopped by Ctrl-C; {kept if count != 1 else f'saved is {saved[0]}'}")


@app.command()
def generate(
    prompts: Prompts,
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("outputs/generate"),
    model: Model = "embedded",
    reward: Reward = None,
    search: Annotated[str, typer.Option(help=f"Name of {SEARCH_HELP}.")] = "mctd",
    compute: Compute = None,
    nfe_budget: NfeBudget = None,
    cost_budget: CostBudget = None,
    time_budget: TimeBudget = None,
    steps: Steps = 32,
    guidance: Guidance = 4.0,
    seed: Seed = 0,
    images_per_prompt: ImagesPerPrompt = 1,
    scheduler: Scheduler = None,
    rows_per_call: RowsPerCall = None,
    device: Device = None,
    trees: Annotated[bool, typer.Option("--trees", help="Draw the search trees too.")] = False,
) -> None:
    """Draw pictures, each the best that a search finds within its budget.

    Writes PNG files with the recipe inside, and result.json with rewards and the ledger.
    """
    label, chosen = parse_search(search)
    texts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    with _saving() as saved:
        from mctd_diffusers.evaluation.benchmark import make_folder

        call = _check_call(
            [chosen],
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            device=device,
            compute=compute,
            nfe_budget=nfe_budget,
            cost_budget=cost_budget,
            time_budget_s=time_budget,
            rows_per_call=rows_per_call,
        )
        make_folder(output)
        pipe = _load_pipeline(model, reward, call)
        column, error = _draw(pipe, texts, label, chosen, seed=seed, call=call.arguments)
        if column is not None:
            about = _about("generate", model, call.arguments, seed)
            _write_generated(
                pipe,
                column,
                texts,
                output,
                call=call.arguments,
                about=about,
                trees=trees and error is None,
                saved=saved,
            )
            for line in _generated_lines(column, saved):
                typer.echo(line)
        if error is not None:
            raise error
        if column is not None and column.was_interrupted:
            raise KeyboardInterrupt


def _draw(
    pipe: MCTDPipeline,
    prompts: Sequence[str],
    label: str,
    search: Any,
    *,
    seed: int,
    call: dict[str, Any],
    judge: GoldFn | None = None,
) -> tuple[Column | None, SearchError | None]:
    """Search by one method; where that fails, what was finished before and the error."""
    import time

    from mctd_diffusers.viewing.comparison import column_of, make_column

    started = time.monotonic()
    try:
        column = make_column(pipe, prompts, label, search, seed=seed, call=call, judge=judge)
    except SearchError as error:
        if error.partial is None or all(image is None for image in error.partial.images):
            return None, error
        seconds = time.monotonic() - started
        return column_of(error.partial, prompts, label, seconds=seconds, judge=judge), error
    return column, None


def _generated_lines(column: Column, saved: Sequence[Path]) -> list[str]:
    """Lines that name the files of one search, pictures first, with what they are worth."""
    drawn = [i for i, image in enumerate(column.images) if image is not None]
    lines = []
    for i, path in zip(drawn, saved, strict=False):
        found = column.rewards[i]
        scored = "" if found is None else f"  reward {found:.4g}"
        lines.append(f"{path}{scored}  {column.nfe[i]} NFE")
    return [*lines, *map(str, saved[len(drawn) :])]


def _write_generated(
    pipe: MCTDPipeline,
    column: Column,
    prompts: Sequence[str],
    output: Path,
    *,
    call: dict[str, Any],
    about: dict[str, Any],
    trees: bool,
    saved: list[Path],
) -> None:
    """Write pictures, ``result.json`` and trees of one search."""
    import json

    from mctd_diffusers.viewing.comparison import (
        comparison_report,
        file_names,
        save_picture,
        tree_figure,
    )

    names = file_names(prompts)
    for i, name in enumerate(names):
        if column.images[i] is not None:
            saved.append(output / f"{name}.png")
            save_picture(column, i, saved[-1])
    report = comparison_report([column], prompts, about, _prices(pipe, column, call))
    saved.append(output / "result.json")
    saved[-1].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for i, name in enumerate(names):
        if trees and column.search is not None and column.images[i] is not None:
            saved.append(output / f"{name}-tree.png")
            tree_figure(pipe, column.search[i], prompts[i]).savefig(saved[-1])


def _prices(pipe: MCTDPipeline, column: Column, call: dict[str, Any]) -> Any:
    """The price list of a search: as it was measured for it, else measured now."""
    from mctd_diffusers.search.environment import Prices

    if column.ledger is None or column.ledger.prices != Prices():
        return Prices() if column.ledger is None else column.ledger.prices
    kept = ("num_inference_steps", "guidance_scale", "rows_per_call", "search_scheduler")
    arguments = {name: call[name] for name in kept}
    return pipe.estimate("a picture", search="best_of_n", compute=1.0, **arguments).prices


def _compare(
    pipe: MCTDPipeline,
    prompts: Sequence[str],
    searches: Sequence[tuple[str, Any]],
    output: Path,
    *,
    call: dict[str, Any],
    seed: int,
    judge: GoldFn | None,
    about: dict[str, Any],
    trees: bool,
    saved: list[Path],
) -> None:
    """Search by every method, write what came of it, and say where it is."""
    from mctd_diffusers.search.environment import Prices
    from mctd_diffusers.viewing.comparison import write_comparison

    columns: list[Column] = []
    ended: BaseException | None = None
    for label, search in searches:
        _say_progress(f"{label}: {len(prompts)} image{'s' * (len(prompts) != 1)}")
        try:
            column, ended = _draw(pipe, prompts, label, search, seed=seed, call=call, judge=judge)
        except KeyboardInterrupt as stop:
            column, ended = None, stop
        if column is not None:
            columns.append(column)
            if column.was_interrupted:
                ended = KeyboardInterrupt()
        if ended is not None:
            break
    if ended is not None and not columns:
        raise ended
    trees = trees and not isinstance(ended, SearchError)  # the reward that failed would be asked
    _say_progress("writing")
    searched = [column for column in columns if column.search is not None]
    write_comparison(
        columns,
        prompts,
        output,
        pipe=pipe,
        title=f"{call['num_inference_steps']} steps, guidance {call['guidance_scale']:g}, "
        f"{_budget_in_words(call)}, seed {seed}",
        about=about,
        prices=_prices(pipe, searched[0], call) if searched else Prices(),
        trees=trees,
        on_file=saved.append,
    )
    for line in _column_table(columns):
        typer.echo(line)
    typer.echo("")
    typer.echo(f"side by side: {output / 'sheet.png'}")
    typer.echo(f"numbers:      {output / 'result.json'}")
    typer.echo(f"pictures:     {output / 'images'}")
    if trees and searched:
        typer.echo(f"trees:        {output / 'trees'}")
    if ended is not None:
        raise ended


def _say_progress(text: str) -> None:
    typer.echo(f"... {text}", err=True)


def _column_table(columns: Sequence[Column]) -> list[str]:
    """Lines of a table: what each search found and spent, in the mean."""

    def mean(numbers: Sequence[float | None], form: str) -> str:
        known = [number for number in numbers if number is not None]
        return form.format(sum(known) / len(known)) if known else "-"

    lines = [f"{'search':<24}{'NFE':>8}{'reward':>10}{'gold':>8}{'all right':>12}{'seconds':>9}"]
    for column in columns:
        right = [None if gold is None else gold.all_right for gold in column.gold]
        known = [one for one in right if one is not None]
        lines.append(
            f"{column.label:<24}{mean(column.nfe, '{:.1f}'):>8}{mean(column.rewards, '{:.4g}'):>10}"
            f"{mean([gold and gold.gold for gold in column.gold], '{:.3f}'):>8}"
            + (f"{sum(known)} of {len(known)}" if known else "-").rjust(12)
            + f"{column.seconds:>9.1f}"
        )
    return lines


@app.command()
def compare(
    prompts: Prompts,
    search: Annotated[
        str, typer.Option(help=f"With commas between them, each {SEARCH_HELP}.")
    ] = "none,best_of_n,mctd",
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("outputs/compare"),
    model: Model = "embedded",
    reward: Reward = None,
    compute: Compute = None,
    nfe_budget: NfeBudget = None,
    cost_budget: CostBudget = None,
    time_budget: TimeBudget = None,
    steps: Steps = 32,
    guidance: Guidance = 4.0,
    seed: Seed = 0,
    images_per_prompt: ImagesPerPrompt = 1,
    scheduler: Scheduler = None,
    rows_per_call: RowsPerCall = None,
    device: Device = None,
    trees: Annotated[bool, typer.Option(help="Draw the search trees.")] = True,
    gold: Annotated[
        bool | None,
        typer.Option(
            "--gold/--no-gold",
            help="Score by the judge in the box [where it can read the prompt]; --gold refuses "
            "prompts that it cannot read.",
        ),
    ] = None,
) -> None:
    """Draw the same prompts by several searches from the same noise, side by side.

    Writes sheet.png, the pictures, the trees, and result.json with the ledgers.
    """
    searches = parse_searches(search)
    texts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    with _saving() as saved:
        from mctd_diffusers.evaluation.benchmark import make_folder

        call = _check_call(
            [chosen for _, chosen in searches],
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            device=device,
            compute=compute,
            nfe_budget=nfe_budget,
            cost_budget=cost_budget,
            time_budget_s=time_budget,
            rows_per_call=rows_per_call,
        )
        judge = _gold_function(texts, gold)
        make_folder(output)
        pipe = _load_pipeline(model, reward, call)
        _compare(
            pipe,
            texts,
            searches,
            output,
            call=call.arguments,
            seed=seed,
            judge=judge,
            about=_about("compare", model, call.arguments, seed),
            trees=trees,
            saved=saved,
        )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("outputs/demo"),
    compute: Annotated[float, typer.Option(help="Budget for each image, in plain samples.")] = 8.0,
    steps: Steps = 16,
    seed: Seed = 0,
) -> None:
    """Draw six prompts with the model in the box, plain and searched.

    The prompts are the first of each kind in the held-out list `report`.
    """
    with _saving() as saved:
        from mctd_diffusers.evaluation.benchmark import make_folder
        from mctd_diffusers.evaluation.scenes import KINDS, load_prompts

        searches = [parse_search("none"), parse_search("mctd")]
        call = _check_call(
            [chosen for _, chosen in searches], steps=steps, guidance=4.0, compute=compute
        )
        make_folder(output)
        report = load_prompts("report")
        firsts = [next(p for p in report if p.kind == kind).caption() for kind in KINDS]
        judge = _gold_function(firsts, True)
        pipe = _load_pipeline("embedded", None, call)
        _compare(
            pipe,
            firsts,
            searches,
            output,
            call=call.arguments,
            seed=seed,
            judge=judge,
            about=_about("demo", "embedded", call.arguments, seed),
            trees=True,
            saved=saved,
        )


def read_prompts(source: str, limit: int | None) -> tuple[str, ...]:
    """Reads prompts: ``"tune"``, ``"report"``, or a file with one in each line.

    Args:
        source: name of a list, or path of a file.
        limit: use so many; of a list, the kinds take turns.

    Raises:
        ConfigError: no such list or file, or it is empty.
    """
    if source in ("tune", "report"):
        from mctd_diffusers.evaluation.model_report import by_turns
        from mctd_diffusers.evaluation.scenes import load_prompts

        scenes = load_prompts(source)
        return tuple(s.caption() for s in (by_turns(scenes)[:limit] if limit else scenes))
    try:
        lines = Path(source).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"prompts {source!r} is neither 'tune' nor 'report' nor a readable file: {error}"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"file {source!r} holds no prompts: write one in each line")
    return tuple(prompts[:limit])


@app.command()
def bench(
    output: Annotated[
        Path, typer.Option(help="Folder for cells and results; cells that are there are kept.")
    ] = Path("outputs/bench"),
    prompts: Annotated[str, typer.Option(help="'report', 'tune', or a file.")] = "report",
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many prompts only.")] = None,
    search: Annotated[
        str, typer.Option(help=f"With commas between them, each {SEARCH_HELP}.")
    ] = "best_of_n,beam,mctd",
    compute: Annotated[str, typer.Option(help="Budgets, in plain samples.")] = "4,8",
    seeds: Annotated[str, typer.Option(help="Seeds; means are taken over them.")] = "0",
    scale: Annotated[
        int, typer.Option(min=0, help="Budget of one large best-of-n for scale; 0 for none.")
    ] = 16,
    model: Model = "embedded",
    reward: Reward = None,
    steps: Steps = 16,
    guidance: Guidance = 4.0,
    scheduler: Scheduler = None,
    rows_per_call: RowsPerCall = None,
    device: Device = None,
) -> None:
    """Compare searches at equal NFE by the gold judge: does the search pay?

    Writes results.md and results.json. Stopped, it goes on from the finished cells.
    """
    searches = parse_searches(search)
    if any(chosen is None for _, chosen in searches):
        raise ConfigError(
            f"search {search!r}: a bench draws plain samples anyway, leave 'none' out"
        )
    computes = _whole_numbers(compute, "--compute", least=1)
    seed_numbers = _whole_numbers(seeds, "--seeds", least=0)
    with _saving() as saved:
        from mctd_diffusers.evaluation.benchmark import (
            identity_of,
            make_folder,
            pipeline_draw,
            run_benchmark,
        )
        from mctd_diffusers.evaluation.benchmark_report import (
            BenchSettings,
            SearchSpec,
            summary_tables,
        )

        settings = BenchSettings(
            prompts=read_prompts(prompts, limit),
            searches=tuple(SearchSpec(label, chosen) for label, chosen in searches),
            computes=computes,
            seeds=seed_numbers,
            num_steps=steps,
            guidance_scale=guidance,
            rows_per_call=rows_per_call,
            scale_compute=scale,
        )
        call = _check_call(
            [chosen for _, chosen in searches],
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            device=device,
            rows_per_call=rows_per_call,
            compute=min(computes),
        )
        make_folder(output)
        judge = _load_judge()
        pipe = _load_pipeline(model, reward, call)
        report = run_benchmark(
            pipeline_draw(pipe, settings),
            judge.score,
            settings,
            output,
            identity=identity_of(pipe, judge),
            on_cell=_say_cell(output, saved),
        )
        for line in summary_tables(report):
            typer.echo(line)
        typer.echo("")
        typer.echo(f"tables:  {output / 'results.md'}")
        typer.echo(f"numbers: {output / 'results.json'}")


def _say_cell(output: Path, saved: list[Path]) -> Callable[[str, int, int, float | None], None]:
    def say(name: str, number: int, total: int, seconds: float | None) -> None:
        saved.append(output / "cells" / f"{name}.json")
        took = "was there" if seconds is None else f"{seconds:.0f} s"
        _say_progress(f"[{number}/{total}] {name}: {took}")

    return say


@app.command("evaluate-model")
def evaluate_model(
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path(
        "outputs/evaluate-model"
    ),
    model: Model = "embedded",
    reward: Reward = None,
    steps: Steps = 32,
    guidance: Guidance = 4.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 20,
    device: Device = None,
) -> None:
    """Measure what a model draws by itself, nothing selected, on the 120 `report` prompts.

    Writes report.json, report.txt and sheet.png.
    """
    with _saving():
        from mctd_diffusers.evaluation.benchmark import make_folder
        from mctd_diffusers.evaluation.model_report import evaluate_model, format_report

        call = _check_call([], steps=steps, guidance=guidance, device=device)
        make_folder(output)
        judge = _load_judge()
        pipe = _load_pipeline(model, reward, call)
        pipe.set_progress_bar_config(disable=True)
        report = evaluate_model(
            pipe,
            output,
            judge=judge,
            reward=pipe.reward_model,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            batch_size=batch_size,
            progress=sys.stderr.isatty(),
        )
        typer.echo(format_report(report))
        typer.echo("")
        typer.echo(f"pictures: {output / 'sheet.png'}")
        typer.echo(f"numbers:  {output / 'report.json'}")
