"""The command line: ``mctd generate | compare | demo | bench | schedulers | diagnose | ...``.

A command reads its arguments, checks what can be checked at once, and only then loads torch.
Whatever is wrong ends in one message on standard error and a non-zero exit: 2 for an argument that
cannot be read, 130 for Ctrl-C (what was saved by then is named), 1 for everything else.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mctd_diffusers.commands.bench import bench
from mctd_diffusers.commands.common import (
    SEARCH_HELP,
    Compute,
    CostBudget,
    Device,
    Guidance,
    ImagesPerPrompt,
    Model,
    NfeBudget,
    Prompts,
    Reward,
    RowsPerCall,
    Scheduler,
    Seed,
    Steps,
    TimeBudget,
    check_call,
    load_gold_judge,
    load_pipeline,
    parse_search,
    parse_searches,
    saving,
    say,
    say_progress,
)
from mctd_diffusers.commands.diagnose import diagnose
from mctd_diffusers.commands.drawing import about, budget_in_words, draw, prices_of
from mctd_diffusers.commands.generate import generate
from mctd_diffusers.commands.log_searches import log_searches
from mctd_diffusers.commands.log_trajectories import log_trajectories, relabel
from mctd_diffusers.commands.prune_report import prune_report
from mctd_diffusers.commands.schedulers import schedulers
from mctd_diffusers.commands.train_ige import train_ige
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
            say("stopped; nothing was saved")
            status = 130
        except _ClickException as error:
            say(error.format_message())
            status = 2
        except MCTDError as error:
            say(str(error))
            status = 1
        except OSError as error:
            say(_os_error_in_words(error))
            status = 1
    return int(status or 0)


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
        say(f"warning: {message}")


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
    judge = load_gold_judge()
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


# --- commands -----------------------------------------------------------------------------------

app.command()(generate)


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
        say_progress(f"{label}: {len(prompts)} image{'s' * (len(prompts) != 1)}")
        try:
            column, ended = draw(pipe, prompts, label, search, seed=seed, call=call, judge=judge)
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
    say_progress("writing")
    searched = [column for column in columns if column.search is not None]
    write_comparison(
        columns,
        prompts,
        output,
        pipe=pipe,
        title=f"{call['num_inference_steps']} steps, guidance {call['guidance_scale']:g}, "
        f"{budget_in_words(call)}, seed {seed}",
        about=about,
        prices=prices_of(pipe, searched[0], call) if searched else Prices(),
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
    with saving() as saved:
        from mctd_diffusers.files import make_folder

        call = check_call(
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
        pipe = load_pipeline(model, reward, call)
        _compare(
            pipe,
            texts,
            searches,
            output,
            call=call.arguments,
            seed=seed,
            judge=judge,
            about=about("compare", model, call.arguments, seed, call.scheduler),
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
    with saving() as saved:
        from mctd_diffusers.evaluation.scenes import KINDS, load_prompts
        from mctd_diffusers.files import make_folder

        searches = [parse_search("none"), parse_search("mctd")]
        call = check_call(
            [chosen for _, chosen in searches], steps=steps, guidance=4.0, compute=compute
        )
        make_folder(output)
        report = load_prompts("report")
        firsts = [next(p for p in report if p.kind == kind).caption() for kind in KINDS]
        judge = _gold_function(firsts, True)
        pipe = load_pipeline("embedded", None, call)
        _compare(
            pipe,
            firsts,
            searches,
            output,
            call=call.arguments,
            seed=seed,
            judge=judge,
            about=about("demo", "embedded", call.arguments, seed),
            trees=True,
            saved=saved,
        )


app.command()(bench)
app.command()(schedulers)
app.command()(diagnose)
app.command("prune-report")(prune_report)
app.command("log-trajectories")(log_trajectories)
app.command("log-searches")(log_searches)
app.command("train-ige", context_settings={"ignore_unknown_options": True})(train_ige)
app.command()(relabel)


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
    with saving():
        from mctd_diffusers.evaluation.model_report import evaluate_model, format_report
        from mctd_diffusers.files import make_folder

        call = check_call([], steps=steps, guidance=guidance, device=device)
        make_folder(output)
        judge = load_gold_judge()
        pipe = load_pipeline(model, reward, call)
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
