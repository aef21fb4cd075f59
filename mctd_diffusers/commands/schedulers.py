"""``mctd schedulers``: what schedulers do to samples and searches, compared at equal NFE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from mctd_diffusers.commands.bench import load_judged, moving_on, names_in, nfe_of, read_methods
from mctd_diffusers.commands.common import (
    SEARCH_HELP,
    Device,
    Guidance,
    Ige,
    Model,
    RowsPerCall,
    Steps,
    check_call,
    check_judge_reads,
    progress_bar,
    saving,
    say,
    whole_numbers,
)
from mctd_diffusers.errors import ConfigError

if TYPE_CHECKING:
    from mctd_diffusers.evaluation.benchmark.cells import Cell, Run
    from mctd_diffusers.evaluation.benchmark.comparison import Group
    from mctd_diffusers.evaluation.benchmark.pipeline_suite import Gold
    from mctd_diffusers.evaluation.benchmark.plan import BenchPlan
    from mctd_diffusers.evaluation.scheduler_effects.branching import Branching, BranchingPlan
    from mctd_diffusers.evaluation.scheduler_effects.comparison import Arm, Comparison
    from mctd_diffusers.evaluation.scheduler_effects.cost import Estimate
    from mctd_diffusers.evaluation.scheduler_effects.effects import SchedulerResults
    from mctd_diffusers.pipeline import MCTDPipeline
    from mctd_diffusers.viewing.sheets import Cell as Picture

DEFAULT_SCHEDULERS = "DDIM,DDIM:eta=1,Euler,EulerAncestral,DPM++2M:karras"
NO_SEARCH = "none"


def schedulers(
    schedulers: Annotated[
        str,
        typer.Option(help="With commas between them, settings after colons: DPM++2M:karras."),
    ] = DEFAULT_SCHEDULERS,
    strategies: Annotated[
        str,
        typer.Option(
            help=f"With commas between them, each {SEARCH_HELP}. Plain samples and best_of_n are "
            "always among them."
        ),
    ] = "none,best_of_n,mctd",
    stride_policies: Annotated[
        str | None,
        typer.Option(
            help="With commas between them: each strategy with strides, by each of these "
            "(budget,fixed:1,ige)."
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="8x (times the NFE of so many steps of one call), or 200 (NFE).")
    ] = "2x,4x,8x",
    model: Model = "embedded",
    prompts: Annotated[
        str, typer.Option(help="'report', 'tune', or a file (.txt, .csv, .tsv, .jsonl).")
    ] = "report",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use so many prompts only; the kinds take turns.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds; means are taken over them.")] = "0",
    reward: Annotated[
        str | None,
        typer.Option(help="Reward to search for: a name, a CLIPModel, or module:function."),
    ] = None,
    gold: Annotated[
        str, typer.Option(help="What judges: 'judge', a reward's name, or module:function.")
    ] = "judge",
    ige: Ige = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Scheduler that the others are compared with [the model's own]."),
    ] = None,
    sibling_prompts: Annotated[
        int,
        typer.Option(min=0, help="Prompts of which siblings are measured at every step; 0: none."),
    ] = 12,
    siblings: Annotated[int, typer.Option(min=3, help="Siblings, and plain samples of these.")] = 8,
    steps: Steps = 16,
    guidance: Guidance = 4.0,
    rows_per_call: RowsPerCall = None,
    prompts_per_call: Annotated[
        int, typer.Option(min=1, help="Prompts searched at once: what a stop loses at most.")
    ] = 24,
    device: Device = None,
    out: Annotated[
        Path, typer.Option(help="Folder for cells and results; cells that are there are kept.")
    ] = Path("outputs/schedulers"),
    list_them: Annotated[
        bool, typer.Option("--list", help="Say which schedulers can be searched, and do no more.")
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEDULER",
            help="Say what of a scheduler works in a tree, such as module:Class of your own, and "
            "do no more.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it is going to cost, and make nothing.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Make no cell; report on those that are there.")
    ] = False,
) -> None:
    """Compare schedulers at equal NFE, plain and under each search, by a gold that no search sees.

    Writes results.csv, report.md, gold.png, branching.png, and pictures side by side as sheet.png.
    Stopped, it goes on from the finished cells.
    """
    if list_them:
        _list()
        return
    if check is not None:
        _check(check)
        return
    with saving() as saved:
        from mctd_diffusers.denoising.scheduler_names import read_schedulers

        bench = _read_bench(
            prompts,
            limit,
            strategies,
            stride_policies,
            budgets,
            suite=model,
            seeds=whole_numbers(seeds, "--seeds", least=0),
            num_steps=steps,
            guidance_scale=guidance,
            rows_per_call=rows_per_call,
            prompts_per_call=prompts_per_call,
            searched=f"reward {reward}, gold {gold}",
        )
        if gold == "judge":
            check_judge_reads(bench.prompts)
        read_schedulers(schedulers)
        call = check_call(
            [method.strategy for method in bench.methods],
            steps=steps,
            guidance=guidance,
            device=device,
            rows_per_call=rows_per_call,
            nfe_budget=bench.budgets[-1].nfe(steps),
        )
        pipe, judge = load_judged(model, call, reward, gold, ige)
        pipe.set_progress_bar_config(disable=True)
        comparison = _comparison(pipe, bench, schedulers, reference)
        branching = _branching_plan(bench, sibling_prompts, siblings)
        for sentence in comparison.left_out():
            say(f"left out is {sentence}")
        if dry_run:
            _say_cost(pipe, comparison, branching, out)
            return
        if report_only:
            cells, measured = _found(comparison, branching, out)
        else:
            cells, measured = _made(pipe, judge, comparison, branching, out, saved)
        _report(comparison, cells, measured, out)


def _list() -> None:
    """Say which schedulers can be stepped in a tree, and why others cannot."""
    import diffusers

    from mctd_diffusers.denoising.schedulers import REFUSED
    from mctd_diffusers.evaluation.benchmark.report import aligned
    from mctd_diffusers.evaluation.scheduler_effects.supported import supported

    diffusers.utils.logging.set_verbosity_error()
    heads = ["name", "class", "calls a step", "longest stride", "noise", "branching", "note"]
    rows = [
        [
            each.name,
            each.kind,
            str(each.calls_per_step or ""),
            each.longest_stride,
            each.plain_noise,
            each.branching_noise,
            each.note,
        ]
        for each in supported()
    ]
    for line in aligned(heads, rows):
        typer.echo(line)
    typer.echo("")
    typer.echo("Refused:")
    for kind, why in REFUSED.items():
        typer.echo(f"- {kind}: {why}")


def _check(text: str) -> None:
    """Say what of a scheduler works in a tree.

    Raises:
        UnsupportedSchedulerError: it cannot be stepped in one.
    """
    from mctd_diffusers.denoising.scheduler_names import named_scheduler
    from mctd_diffusers.denoising.schedulers import check_scheduler, inspection_of, is_listed
    from mctd_diffusers.evaluation.scheduler_effects.supported import looked_at

    named = named_scheduler(text, {})
    if not is_listed(named.scheduler):
        for finding in inspection_of(named.scheduler).findings:
            typer.echo(f"{'yes' if finding.holds else 'no':<5}{finding.name}: {finding.detail}")
    check_scheduler(named.scheduler)
    found = looked_at(text)
    typer.echo(
        f"{found.name} can be stepped in a tree: calls a step {found.calls_per_step}, longest "
        f"stride {found.longest_stride}, noise of plain edges {found.plain_noise}, of branching "
        f"ones {found.branching_noise}"
    )


def _read_bench(
    prompts: str,
    limit: int | None,
    strategies: str,
    policies: str | None,
    budgets: str,
    **settings: object,
) -> BenchPlan:
    """The benchmark that every scheduler is given, from the options."""
    from mctd_diffusers.evaluation.benchmark.plan import (
        MORE_STEPS,
        BenchPlan,
        Method,
        parse_budgets,
    )
    from mctd_diffusers.evaluation.benchmark.prompts import read_prompts
    from mctd_diffusers.evaluation.scheduler_effects.comparison import check_budgets
    from mctd_diffusers.search.strategies import BestOfN

    spent = parse_budgets(budgets)
    check_budgets(spent)
    texts, kinds = read_prompts(prompts, limit)
    names = ",".join(name for name in strategies.split(",") if name.strip() != NO_SEARCH)
    searches = list(read_methods(names, names_in(policies))) if names.strip() else []
    return BenchPlan(
        prompts=texts,
        kinds=kinds,
        methods=(Method(MORE_STEPS, BestOfN(n=1)), *searches),
        budgets=spent,
        **settings,  # type: ignore[arg-type]  # those of the plan
    )


def _comparison(
    pipe: MCTDPipeline, bench: BenchPlan, names: str, reference: str | None
) -> Comparison:
    """What is compared, with the schedulers made from the model's config."""
    from mctd_diffusers.denoising.scheduler_names import parse_schedulers, read_scheduler
    from mctd_diffusers.denoising.schedulers import check_scheduler
    from mctd_diffusers.evaluation.scheduler_effects.comparison import Comparison, reference_among
    from mctd_diffusers.evaluation.scheduler_effects.suite import check_head

    named = parse_schedulers(names, pipe.scheduler.config)
    for each in named:
        check_scheduler(each.scheduler)
    check_head(pipe, bench.methods)
    own = reference_among(named, pipe.scheduler)
    chosen = own if reference is None else read_scheduler(reference).name
    return Comparison(tuple(named), bench, chosen)


def _branching_plan(bench: BenchPlan, prompts: int, siblings: int) -> BranchingPlan | None:
    """What is measured aside, on the first prompts."""
    from mctd_diffusers.evaluation.scheduler_effects.branching import BranchingPlan

    if prompts == 0:
        return None
    return BranchingPlan(
        prompts=bench.prompts[:prompts],
        samples=siblings,
        siblings=siblings,
        num_steps=bench.num_steps,
        guidance_scale=bench.guidance_scale,
        rows_per_call=bench.rows_per_call,
        searched=bench.searched,
    )


def _say_cost(
    pipe: MCTDPipeline, comparison: Comparison, branching: BranchingPlan | None, out: Path
) -> None:
    """Say what is going to be spent."""
    from mctd_diffusers.evaluation.scheduler_effects.cost import estimate

    found: Estimate = estimate(pipe, comparison, branching, out)
    works = {**found.schedulers, "siblings": found.branching, "in all": found.total}
    typer.echo(f"{'':<24}{'NFE':>10}{'minutes':>10}")
    for name, work in works.items():
        typer.echo(f"{name:<24}{work.nfe:>10}{work.seconds / 60:>10.1f}")
    typer.echo(f"{found.cells} cells to make, {found.found} found in {out / 'cells'}")


def _found(
    comparison: Comparison, branching: BranchingPlan | None, out: Path
) -> tuple[dict[str, list[Cell]], list[Branching]]:
    """The cells that are there, and what was measured aside.

    Raises:
        ConfigError: there are none.
    """
    from mctd_diffusers.evaluation.benchmark.cells import read_cells
    from mctd_diffusers.evaluation.scheduler_effects.branching import read_branching
    from mctd_diffusers.evaluation.scheduler_effects.comparison import cells_folder

    cells = {
        named.name: read_cells(comparison.plan_of(named), cells_folder(out, named.name))
        for named in comparison.schedulers
    }
    if not any(cells.values()):
        raise ConfigError(
            f"there are no cells of this comparison in {out / 'cells'}: name the folder and the "
            "options that they were made with, or leave --report-only out"
        )
    if branching is None:
        return cells, []
    return cells, read_branching(comparison.schedulers, branching, out / "branching")


def _made(
    pipe: MCTDPipeline,
    judge: Gold,
    comparison: Comparison,
    branching: BranchingPlan | None,
    out: Path,
    saved: list[Path],
) -> tuple[dict[str, list[Cell]], list[Branching]]:
    """All cells, and what is measured aside, made where they are not there yet."""
    from mctd_diffusers.evaluation.benchmark.cells import make_cells
    from mctd_diffusers.evaluation.scheduler_effects.branching import measure_branching
    from mctd_diffusers.evaluation.scheduler_effects.comparison import (
        cells_folder,
        pictures_folder,
        stepper_of,
    )
    from mctd_diffusers.evaluation.scheduler_effects.suite import SchedulerSuite
    from mctd_diffusers.files import make_folder

    make_folder(out / "cells")
    plans = {named.name: comparison.plan_of(named) for named in comparison.schedulers}
    nfe = sum(nfe_of(task) for plan in plans.values() for task in plan.tasks())
    if branching is not None:
        for named in comparison.schedulers:
            nfe += branching.nfe(stepper_of(named, branching.num_steps).calls_per_step)
    cells: dict[str, list[Cell]] = {}
    measured: list[Branching] = []
    with progress_bar(nfe, "NFE", unit_scale=True) as bar:
        if branching is not None:
            bar.set_postfix_str("siblings", refresh=False)
            measured = measure_branching(
                pipe, comparison.schedulers, branching, out / "branching", bar.update
            )
        for named in comparison.schedulers:
            plan = plans[named.name]
            pictures = pictures_folder(out, named.name)
            suite = SchedulerSuite(pipe, judge, plan, named, pictures)
            on_cell = moving_on(bar, saved, where=f"{named.name}, ")
            cells[named.name] = make_cells(plan, suite, cells_folder(out, named.name), on_cell)
    return cells, measured


# --- the report ---------------------------------------------------------------------------------


def _report(
    comparison: Comparison,
    cells: Mapping[str, Sequence[Cell]],
    measured: Sequence[Branching],
    out: Path,
) -> None:
    """Write what the cells say, and say it."""
    from mctd_diffusers.evaluation.scheduler_effects.effects import (
        SchedulerResults,
        default_arm,
        recommend,
    )
    from mctd_diffusers.evaluation.scheduler_effects.report import write_effects

    paths = write_effects(comparison, cells, measured, out)
    results = SchedulerResults.of(comparison, cells)
    for path, arm in _sheets(results, out):
        if _write_sheet(comparison, results, arm, out, path):
            paths.append(path)
    first = default_arm(results)
    for arm in (first, *(arm for arm in results.arms if arm != first)):
        found = recommend(results, arm)
        if found is not None:
            typer.echo(f"with {arm.label}: {found.chosen}")
    typer.echo("")
    for path in paths:
        typer.echo(str(path))


def _sheets(results: SchedulerResults, out: Path) -> Iterator[tuple[Path, Arm]]:
    """The sheets to write: of plain samples, and of the default search."""
    from mctd_diffusers.evaluation.scheduler_effects.effects import default_arm

    plain, search = results.arms[0], default_arm(results)
    yield out / "sheet.png", plain
    if search != plain:
        yield out / f"sheet-{search.strategy.split(':')[0]}.png", search


class _Shown(NamedTuple):
    """A winner on a sheet.

    Attributes:
        picture: its file.
        run: what it is worth.
    """

    picture: Path
    run: Run


def _write_sheet(
    comparison: Comparison, results: SchedulerResults, arm: Arm, out: Path, path: Path
) -> bool:
    """Write the pictures of an arm side by side, schedulers as columns; whether there are any."""
    from mctd_diffusers.evaluation.scheduler_effects.comparison import pictures_folder
    from mctd_diffusers.viewing.sheets import comparison_sheet

    budget = results.budgets(arm)[0 if arm == results.arms[0] else -1]
    heads: list[tuple[str, str]] = []
    columns: list[dict[str, _Shown]] = []
    for named in comparison.schedulers:
        group = results.at(named.name, arm, budget)
        if group is not None:
            steps = group.cells[0].num_steps
            heads.append((named.name, f"{steps} steps, {group.nfe:.4g} NFE an image"))
            plan = comparison.plan_of(named)
            columns.append(_column(plan, group, arm, pictures_folder(out, named.name)))
    prompts = list(dict.fromkeys(prompt for column in columns for prompt in column))
    rows = [(prompt, _row([column.get(prompt) for column in columns])) for prompt in prompts]
    if rows:
        comparison_sheet(
            heads,
            rows,
            title=f"{arm.label} at {budget}, from the same noise",
            footer="Framed: the highest gold of its row. Gold: a judge that no search sees; "
            "✓ every fact of the prompt is right.",
        ).save(path)
    return bool(rows)


def _column(plan: BenchPlan, group: Group, arm: Arm, folder: Path) -> dict[str, _Shown]:
    """The pictures of a scheduler that are there, by prompt."""
    from mctd_diffusers.evaluation.scheduler_effects.suite import pictures_of

    files = pictures_of(folder, plan, arm, group.budget)
    runs = {prompt: group.runs.get((prompt, plan.seeds[0])) for prompt in files}
    return {
        prompt: _Shown(files[prompt], run)
        for prompt, run in runs.items()
        if run is not None and files[prompt].exists()
    }


def _row(shown: Sequence[_Shown | None]) -> list[Picture]:
    """The cells of a prompt, with the highest gold framed."""
    from PIL import Image

    from mctd_diffusers.viewing.sheets import Cell as Picture

    best = max(each.run.gold for each in shown if each is not None)
    row = []
    for each in shown:
        if each is None:
            row.append(Picture(Image.new("RGB", (64, 64), "#f2f2f2"), ("not drawn",)))
            continue
        with Image.open(each.picture) as picture:
            picture.load()
        right = {True: " ✓", False: " ✗", None: ""}[each.run.all_right]
        notes = (f"gold {each.run.gold:.2f}{right}", f"reward {each.run.proxy:.4g}")
        row.append(Picture(picture, notes, is_best=each.run.gold == best))
    return row
