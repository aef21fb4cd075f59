"""``mctd generate``: draws pictures by a search, which may be saved, resumed, or in processes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mctd_diffusers.commands.common import (
    SEARCH_HELP,
    Compute,
    CostBudget,
    Device,
    Guidance,
    ImagesPerPrompt,
    Model,
    NfeBudget,
    Reward,
    RowsPerCall,
    Scheduler,
    Seed,
    Steps,
    TimeBudget,
    check_call,
    load_pipeline,
    parse_search,
    saving,
    say,
)
from mctd_diffusers.commands.drawing import about, draw, finished_before, prices_of
from mctd_diffusers.errors import ConfigError, SearchError

if TYPE_CHECKING:
    from mctd_diffusers.pipeline import MCTDPipeline
    from mctd_diffusers.results import ImageSearch
    from mctd_diffusers.viewing.comparison import Column

_GO_ON_WITH = ("output", "model", "reward", "device", "trees", "resume", "save_every")
"""Options that a search takes which goes on; all others it has from its folder."""


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to draw; several for several images.")
    ] = None,
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
    offload_latents: Annotated[
        bool,
        typer.Option("--offload-latents", help="Keep samples on the host; changes no bit."),
    ] = False,
    half_latents: Annotated[
        bool,
        typer.Option("--half-latents", help="Keep samples in half precision, which rounds them."),
    ] = False,
    include_plain: Annotated[
        bool,
        typer.Option(
            "--include-plain",
            help="Score the plain sample too, out of the same budget; the answer is never worse.",
        ),
    ] = False,
    fusion: Annotated[
        str | None,
        typer.Option(help="Let rollouts begin at fused samples too: a method's name, or 'auto'."),
    ] = None,
    reward_prompt: Annotated[
        str | None, typer.Option(help="What the reward reads in place of the prompts.")
    ] = None,
    device: Device = None,
    trees: Annotated[bool, typer.Option("--trees", help="Draw the search trees too.")] = False,
    save_to: Annotated[
        Path | None,
        typer.Option(help="Save the search there now and then, at its end, at Ctrl-C."),
    ] = None,
    save_every: Annotated[
        float, typer.Option(min=0, help="Seconds between two saves, at least; 0 is every wave.")
    ] = 60.0,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with a search that --save-to saved; name no prompts and settings."
        ),
    ] = None,
) -> None:
    """Draw pictures, each the best that a search finds within its budget.

    Writes PNG files with the recipe inside, and result.json with rewards and the ledger. Under
    `accelerate launch -m mctd_diffusers generate ...` the processes share the prompts.
    """
    given = dict(locals())
    if resume is not None:
        _check_only(given, _GO_ON_WITH)
    elif not prompts:
        raise typer.BadParameter("Missing argument 'PROMPTS...'.")
    label, chosen = parse_search(search)
    extras = _extras(given, chosen)
    with saving() as saved:
        from mctd_diffusers.files import make_folder
        from mctd_diffusers.processes import my_device

        call = check_call(
            [chosen],
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            device=device or my_device(),
            compute=compute,
            nfe_budget=nfe_budget,
            cost_budget=cost_budget,
            time_budget_s=time_budget,
            rows_per_call=rows_per_call,
        )
        make_folder(output)
        if resume is not None:
            work = _saved_work(resume)
        else:
            texts = [prompt for prompt in prompts or [] for _ in range(images_per_prompt)]
            work = _new_work(texts, label, chosen, seed, save_to)
        pipe = load_pipeline(model, reward, call)
        own = call.arguments | extras
        column, error = work.draw(pipe, own, save_every)
        arguments = work.arguments or own
        ending = _write(
            pipe,
            column,
            error,
            work.texts,
            output,
            about=about("generate", model, arguments, work.seed, call.scheduler),
            call=arguments,
            trees=trees,
            saved=saved,
        )
        _end(ending, error, column, work.folder)


def _check_only(given: dict[str, Any], allowed: Sequence[str]) -> None:
    """Refuse options beside ``allowed`` that differ from their defaults.

    Raises:
        ConfigError: names them.
    """
    for name, option in inspect.signature(generate).parameters.items():
        if name not in allowed and given[name] != option.default:
            written = "prompts" if name == "prompts" else f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{written} cannot be given with --resume: a search goes on as it began; leave it "
                "out, or begin another search"
            )


def _extras(given: dict[str, Any], search: Any) -> dict[str, Any]:
    """Arguments of a search that are given, and that no other command has.

    Raises:
        ConfigError: there are some, and no search.
    """
    names = ("offload_latents", "half_latents", "include_plain", "fusion", "reward_prompt")
    extras = {name: given[name] for name in names if given[name] not in (None, False)}
    if extras and search is None:
        written = [f"--{name.replace('_', '-')}" for name in extras]
        raise ConfigError(
            f"search 'none' is the stock pipeline, which has none of these: leave "
            f"{', '.join(written)} out, or name a search"
        )
    return extras


@dataclass(frozen=True)
class _Work:
    """What this process has to draw.

    Attributes:
        texts: its prompts, one an image.
        label: name of the search.
        seed: of its first image.
        search: as the pipeline takes it.
        folder: where the search is saved; ``None`` if it is not.
        is_saved: whether to go on with what is there.
        arguments: of the saved call, to report; empty for a new one.
    """

    texts: list[str]
    label: str
    seed: int
    search: Any
    folder: Path | None
    is_saved: bool
    arguments: dict[str, Any]

    def draw(
        self, pipe: MCTDPipeline, call: dict[str, Any], save_every: float
    ) -> tuple[Column | None, SearchError | None]:
        """Search; where that fails, what was finished before and the error."""
        if not self.texts:  # more processes than prompts
            return None, None
        if not self.is_saved:
            save = {"save_to": self.folder, "save_every_s": save_every}
            call = call if self.folder is None else call | save
            return draw(pipe, self.texts, self.label, self.search, seed=self.seed, call=call)
        from mctd_diffusers.viewing.comparison import column_of

        assert self.folder is not None
        started = time.monotonic()
        try:
            found = pipe.resume(
                self.folder, output_type="pt", return_dict=True, save_every_s=save_every
            )
        except SearchError as error:
            return finished_before(error, self.texts, self.label, started), error
        seconds = time.monotonic() - started
        return column_of(found, self.texts, self.label, seconds=seconds), None


def _new_work(
    texts: Sequence[str], label: str, search: Any, seed: int, save_to: Path | None
) -> _Work:
    """This process's share of a new command."""
    from mctd_diffusers.processes import my_share
    from mctd_diffusers.saved_calls import check_unsaved

    folder = None
    if save_to is not None:
        if search is None:
            raise ConfigError("search 'none' is the stock pipeline, which saves no search")
        folder = _my_folder(save_to)
        check_unsaved(folder)
    with my_share(len(texts)) as share:
        mine = [texts[i] for i in share]
        return _Work(mine, label, seed + share.start, search, folder, is_saved=False, arguments={})


def _saved_work(resume: Path) -> _Work:
    """This process's share of a command that was saved."""
    from mctd_diffusers.search.saving import has_saved_search, load_search

    folder = _my_folder(resume)
    if folder != resume and has_saved_search(resume):
        raise ConfigError(
            f"{str(resume)!r} was saved by one process: go on with it in one, without "
            "accelerate launch"
        )
    saved = load_search(folder)
    settings = saved.call["settings"][0]
    arguments = {
        "num_inference_steps": settings["call"]["num_inference_steps"],
        "guidance_scale": settings["call"]["guidance_scale"],
        "rows_per_call": settings["rows_per_call"],
        "search_scheduler": None,
        **{name: saved.call["options"][name] for name in ("compute", "nfe_budget", "cost_budget")},
        "time_budget_s": saved.call["options"]["time_budget_s"],
    }
    return _Work(
        texts=[each["prompt"] for each in saved.call["settings"]],
        label=saved.strategy.name,
        seed=(settings["first_draw"] or {}).get("seed", 0),
        search=saved.strategy,
        folder=folder,
        is_saved=True,
        arguments=arguments,
    )


def _my_folder(folder: Path) -> Path:
    """Where this process saves: the folder itself, or one for each of several processes."""
    from mctd_diffusers.processes import process_state

    state = process_state()
    if state.num_processes == 1:
        return folder
    return folder / f"process-{state.process_index}-of-{state.num_processes}"


@dataclass(frozen=True)
class _Ending:
    """What all processes came to.

    Attributes:
        num_images: that were asked for.
        failed: prompts and what went wrong with them.
    """

    num_images: int
    failed: list[tuple[str, str]]


def _write(
    pipe: MCTDPipeline,
    column: Column | None,
    error: SearchError | None,
    texts: Sequence[str],
    output: Path,
    *,
    about: dict[str, Any],
    call: dict[str, Any],
    trees: bool,
    saved: list[Path],
) -> _Ending:
    """Write this process's pictures and trees, and in the first process ``result.json`` of all."""
    import json

    from mctd_diffusers.processes import gather, is_first_process
    from mctd_diffusers.viewing.comparison import comparison_report, join_columns

    parts = gather([list(texts)])
    everyone = [text for part in parts for text in part]
    names = _my_names(parts)
    lines = []
    if column is not None:
        lines = _write_pictures(column, names, output, saved)
    told = None if column is None else column.without_pictures()
    prices = None if column is None else prices_of(pipe, column, call)
    shares = gather([(told, prices, lines, _failed(column, error, texts))])
    if is_first_process() and any(share[0] is not None for share in shares):
        joined = join_columns([share[0] for share in shares], parts)
        price_list = next(share[1] for share in shares if share[1] is not None)
        saved.append(output / "result.json")
        report = comparison_report([joined], everyone, about, price_list)
        saved[-1].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        lines = [line for share in shares for line in share[2]] + [str(saved[-1])]
    if trees and column is not None:
        lines += _write_trees(pipe, column, texts, names, output, saved)
    if is_first_process():
        for line in lines:
            typer.echo(line)
    return _Ending(len(everyone), [one for share in shares for one in share[3]])


def _my_names(parts: Sequence[Sequence[str]]) -> list[str]:
    """File names of this process's images, different from those of all others."""
    from mctd_diffusers.processes import process_state
    from mctd_diffusers.viewing.comparison import file_names

    names = file_names([text for part in parts for text in part])
    mine = process_state().process_index
    start = sum(len(part) for part in parts[:mine])
    return names[start : start + len(parts[mine])]


def _write_pictures(
    column: Column, names: Sequence[str], output: Path, saved: list[Path]
) -> list[str]:
    """Write the pictures; returns a line for each, with what it is worth."""
    from mctd_diffusers.viewing.comparison import save_picture

    lines = []
    for i, name in enumerate(names):
        if column.images[i] is None:
            continue
        saved.append(output / f"{name}.png")
        save_picture(column, i, saved[-1])
        found = column.rewards[i]
        scored = "" if found is None else f"  reward {found:.4g}"
        lines.append(f"{saved[-1]}{scored}  {column.nfe[i]} NFE")
        if column.search is not None:
            lines += _moves_in_words(column.search[i])
    return lines


def _moves_in_words(found: ImageSearch) -> list[str]:
    """Lines on the moves that a search chose among, and on what became of fusions."""
    parts: dict[str, dict[str, Any]] = {
        "moves": {move: sums["times"] for move, sums in found.moves_made.items()},
        "fusions": found.fusions,
    }
    return [
        f"  {name}: {', '.join(f'{count} {what}' for what, count in counts.items())}"
        for name, counts in parts.items()
        if counts
    ]


def _write_trees(
    pipe: MCTDPipeline,
    column: Column,
    texts: Sequence[str],
    names: Sequence[str],
    output: Path,
    saved: list[Path],
) -> list[str]:
    """Write the trees; returns a line for each."""
    from mctd_diffusers.viewing.comparison import tree_figure

    lines = []
    for i, name in enumerate(names):
        found = None if column.search is None else column.search[i]
        # Where the reward failed it is not asked again.
        if found is not None and found.winner is not None and found.error is None:
            saved.append(output / f"{name}-tree.png")
            tree_figure(pipe, found, texts[i]).savefig(saved[-1])
            lines.append(str(saved[-1]))
    return lines


def _failed(
    column: Column | None, error: SearchError | None, texts: Sequence[str]
) -> list[tuple[str, str]]:
    """Prompts of this process's images that failed, and what went wrong."""
    if column is None:
        return [] if error is None else [(text, str(error)) for text in texts]
    return [
        (text, str(search.error))
        for text, search in zip(texts, column.search or [], strict=False)
        if search.error is not None
    ]


def _end(
    ending: _Ending, error: SearchError | None, column: Column | None, folder: Path | None
) -> None:
    """End the command as it went; the first process says what failed in any."""
    from mctd_diffusers.processes import is_first_process

    if error is not None and len(ending.failed) in (0, ending.num_images):
        raise error
    if ending.failed:
        for prompt, message in ending.failed:
            if is_first_process():
                say(f"{prompt!r} failed: {message}")
        raise typer.Exit(1)
    if column is not None and column.was_interrupted:
        if folder is not None:
            say(f"go on with: mctd generate --resume {folder}")
        raise KeyboardInterrupt
