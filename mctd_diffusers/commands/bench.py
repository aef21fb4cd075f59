"""``mctd bench``: searches and their rivals on the same prompts, resumable, with a report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mctd_diffusers.commands.common import (
    SEARCH_HELP,
    Device,
    Guidance,
    Ige,
    RowsPerCall,
    Scheduler,
    Steps,
    check_call,
    check_judge_reads,
    load_gold_judge,
    load_pipeline,
    named_reward,
    parse_searches,
    progress_bar,
    saving,
    say,
    whole_numbers,
)
from mctd_diffusers.errors import ConfigError

if TYPE_CHECKING:
    from tqdm import tqdm

    from mctd_diffusers.commands.common import Call
    from mctd_diffusers.evaluation.benchmark.cells import Cell, OnCell, Suite
    from mctd_diffusers.evaluation.benchmark.pipeline_suite import Gold
    from mctd_diffusers.evaluation.benchmark.plan import BenchPlan, Method, Task
    from mctd_diffusers.pipeline import MCTDPipeline

DEFAULT_STRATEGIES = "best_of_n,more_steps,beam,mctd"
_EMBEDDED, _MIXTURE = "embedded", "mixture"


def bench(
    suite: Annotated[
        str | None,
        typer.Option(help=f"'{_EMBEDDED}' or '{_MIXTURE}' [{_EMBEDDED} if there is no --model]."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or repository of a pipeline, in place of a suite.")
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="'report', 'tune', or a file (.txt, .csv, .tsv, .jsonl).")
    ] = "report",
    reward: Annotated[
        str | None,
        typer.Option(help="Reward to search for: a name, a CLIPModel, or module:function."),
    ] = None,
    gold: Annotated[
        str,
        typer.Option(help="What judges: 'judge', a reward's name, or module:function."),
    ] = "judge",
    strategies: Annotated[
        str,
        typer.Option(help=f"With commas between them, each more_steps or {SEARCH_HELP}."),
    ] = DEFAULT_STRATEGIES,
    budgets: Annotated[
        str,
        typer.Option(help="8x (times the NFE of a plain sample), 200 (NFE), 60s (an image)."),
    ] = "4x,8x",
    stride_policies: Annotated[
        str | None,
        typer.Option(
            help="With commas between them: each strategy with strides, by each of these."
        ),
    ] = None,
    fusions: Annotated[
        str | None,
        typer.Option(
            help="With commas between them: each strategy with third moves, by each of these: "
            "'none', a method of fusion, 'go_back', 'resample', or 'bandit' for all three."
        ),
    ] = None,
    prunings: Annotated[
        str | None,
        typer.Option(
            help="With commas between them: each strategy that prunes, by each of these: 'none', "
            "'all', or rules joined by '+'."
        ),
    ] = None,
    evaluations: Annotated[
        str | None,
        typer.Option(
            help="Compare --stride-policies in plain samples of so many evaluations (6,8,12,16), "
            "and no search."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Strategies of the comparison that all others are tested against."),
    ] = None,
    ige: Ige = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use so many prompts only; the kinds take turns.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds; means are taken over them.")] = "0",
    out: Annotated[
        Path, typer.Option(help="Folder for cells and results; cells that are there are kept.")
    ] = Path("outputs/bench"),
    steps: Steps = 16,
    guidance: Guidance = 4.0,
    scheduler: Scheduler = None,
    rows_per_call: RowsPerCall = None,
    prompts_per_call: Annotated[
        int, typer.Option(min=1, help="Prompts searched at once: what a stop loses at most.")
    ] = 24,
    device: Device = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Make no cell; report on those that are there.")
    ] = False,
) -> None:
    """Compare searches at equal NFE and at equal cost, by a gold that no search sees.

    Writes results.csv, report.md and curves.png. Stopped, it goes on from the finished cells.
    """
    if suite == _MIXTURE and scheduler is not None:
        raise ConfigError("--suite mixture has no pipeline to step: leave --scheduler out")
    stepping = _read_scheduler(scheduler, is_plain=evaluations is not None)
    if evaluations is not None:
        _compare_plainly(
            model or suite or _EMBEDDED,
            prompts,
            limit,
            stride_policies,
            reward=reward,
            gold=gold,
            ige=ige,
            out=out,
            call=check_call(
                [],
                steps=steps,
                guidance=guidance,
                scheduler=scheduler,
                device=device,
                rows_per_call=rows_per_call,
            ),
            evaluations=whole_numbers(evaluations, "--evaluations", least=1),
            seeds=whole_numbers(seeds, "--seeds", least=0),
            num_steps=steps,
            guidance_scale=guidance,
            prompts_per_call=prompts_per_call,
            rows_per_call=rows_per_call,
        )
        return
    with saving() as saved:
        plan = _read_plan(
            suite=suite,
            model=model,
            prompts=prompts,
            limit=limit,
            strategies=strategies,
            stride_policies=stride_policies,
            fusions=fusions,
            prunings=prunings,
            budgets=budgets,
            seeds=seeds,
            num_steps=steps,
            guidance_scale=guidance,
            rows_per_call=rows_per_call,
            prompts_per_call=prompts_per_call,
            searched=f"reward {reward}, gold {gold}, scheduler {stepping.name}",
            calls_per_step=stepping.calls_per_step,
        )
        if gold == "judge" and plan.suite != _MIXTURE:
            check_judge_reads(plan.prompts)
        rivals = _rivals(plan, against)
        for sentence in plan.left_out():
            say(f"left out is {sentence}")
        if report_only:
            cells = _found_cells(plan, out)
        else:
            cells = _made_cells(
                plan,
                out,
                saved,
                reward=reward,
                gold=gold,
                ige=ige,
                scheduler=scheduler,
                device=device,
            )
        _report(plan, cells, out, rivals)


class _Stepping(NamedTuple):
    """What a plan must know of its scheduler.

    Attributes:
        name: the one way to write it, so that cells are found however it was written; ``None`` for
            the model's own.
        calls_per_step: NFE of its steps, 1 or 2.
    """

    name: str | None
    calls_per_step: int


def _read_scheduler(text: str | None, *, is_plain: bool) -> _Stepping:
    """What the option says.

    Args:
        text: name and settings.
        is_plain: whether stride policies are compared in plain samples.

    Raises:
        ConfigError: it cannot be read; or plain samples are to have an ``eta``.
        UnsupportedSchedulerError: its class cannot be branched.
    """
    if text is None:
        return _Stepping(None, 1)
    from mctd_diffusers.denoising.scheduler_names import named_scheduler
    from mctd_diffusers.denoising.schedulers import traits_of

    named = named_scheduler(text, {})
    if is_plain and named.eta is not None:
        raise ConfigError(
            f"scheduler {text!r} has an eta, and --evaluations measures how far samples are from "
            "that of all steps, which fresh noise would hide: leave it out"
        )
    takes_two = traits_of(named.scheduler).grid == "two calls"
    return _Stepping(named.name, 2 if takes_two else 1)


def _read_plan(
    *,
    suite: str | None,
    model: str | None,
    prompts: str,
    limit: int | None,
    strategies: str,
    stride_policies: str | None,
    fusions: str | None,
    prunings: str | None,
    budgets: str,
    seeds: str,
    **settings: Any,
) -> BenchPlan:
    """What is compared, from the options.

    Raises:
        ConfigError: an option cannot be read, or they contradict each other.
    """
    from mctd_diffusers.evaluation.benchmark.plan import BenchPlan, parse_budgets

    if suite is not None and model is not None:
        raise ConfigError(f"--suite {suite} and --model {model} both say what to search: give one")
    if suite not in (None, _EMBEDDED, _MIXTURE):
        raise ConfigError(f"--suite is {suite!r}: give {_EMBEDDED!r}, {_MIXTURE!r}, or --model")
    name = model or suite or _EMBEDDED
    texts, kinds = _read_problems(name, prompts, limit)
    return BenchPlan(
        suite=name,
        prompts=texts,
        kinds=kinds,
        methods=tuple(
            pruned
            for method in read_methods(strategies, names_in(stride_policies))
            for arm in _by_fusion(method, names_in(fusions), on_mixtures=name == _MIXTURE)
            for pruned in _by_pruning(arm, names_in(prunings))
        ),
        budgets=parse_budgets(budgets),
        seeds=whole_numbers(seeds, "--seeds", least=0),
        **settings,
    )


def _read_problems(
    suite: str, prompts: str, limit: int | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if suite == _MIXTURE:
        from mctd_diffusers.evaluation.benchmark.mixture_suite import mixture_prompts

        return mixture_prompts(limit or 120)
    from mctd_diffusers.evaluation.benchmark.prompts import read_prompts

    return read_prompts(prompts, limit)


def read_methods(text: str, policies: Sequence[str]) -> Iterator[Method]:
    """Methods of names and settings with commas between them, each by each stride policy."""
    from mctd_diffusers.evaluation.benchmark.plan import MORE_STEPS, PLAIN, Method
    from mctd_diffusers.search.strategies import BestOfN, resolve_strategy
    from mctd_diffusers.search.stride_policies import HasStridePolicy

    def own(label: str) -> Method | None:
        return Method(label, BestOfN(n=1)) if label in (MORE_STEPS, PLAIN) else None

    for label, chosen in parse_searches(text, besides=(MORE_STEPS, PLAIN)):
        if label == "none":
            raise ConfigError(
                f"strategies {text!r}: a bench draws plain samples anyway, leave 'none' out"
            )
        method = own(label) or Method(label, resolve_strategy(chosen))
        strategy: Any = method.strategy
        takes_them = isinstance(strategy, HasStridePolicy) and not isinstance(strategy, BestOfN)
        if not policies or not takes_them:
            yield method
            continue
        for policy in policies:
            by_policy = replace(strategy, stride_policy=policy)
            is_same = by_policy == strategy
            yield method if is_same else Method(f"{label}:stride_policy={policy}", by_policy)


def _by_fusion(method: Method, fusions: Sequence[str], *, on_mixtures: bool) -> Iterator[Method]:
    """A method by each fusion, or other third move, if it has third moves.

    Raises:
        ConfigError: one is not known, or not on mixtures.
    """
    strategy: Any = method.strategy
    if not fusions or not hasattr(strategy, "third_moves"):
        yield method
        return
    for name in fusions:
        by_fusion = replace(strategy, **_third_moves_of(name, on_mixtures=on_mixtures))
        is_same = by_fusion == strategy
        yield (
            method
            if is_same
            else method._replace(label=f"{method.label}:fusion={name}", strategy=by_fusion)
        )


def _by_pruning(method: Method, prunings: Sequence[str]) -> Iterator[Method]:
    """A method by each way of pruning, if it can prune.

    Raises:
        ConfigError: one is not known.
    """
    strategy: Any = method.strategy
    if not prunings or not hasattr(strategy, "pruning"):
        yield method
        return
    for pruning in prunings:
        by_pruning = replace(strategy, pruning=pruning)
        is_same = by_pruning == strategy
        label = method.label if is_same else f"{method.label}:pruning={pruning}"
        yield method._replace(label=label, strategy=by_pruning)


def _third_moves_of(name: str, *, on_mixtures: bool) -> dict[str, Any]:
    """The settings of a strategy that an entry of ``--fusions`` stands for."""
    from mctd_diffusers.denoising.fusion import DEFAULT_FUSION, FUSIONS, SPATIAL_FUSIONS
    from mctd_diffusers.search.strategies.third_moves import THIRD_MOVES

    others = {"none": (), "bandit": THIRD_MOVES, "go_back": ("go_back",), "resample": ("resample",)}
    if name in others:
        return {"third_moves": others[name], "fusion": DEFAULT_FUSION}
    if name not in FUSIONS:
        known = dict.fromkeys((*others, *FUSIONS))
        raise ConfigError(f"--fusions names {name!r}; give some of {', '.join(known)}")
    if on_mixtures and name in SPATIAL_FUSIONS:
        raise ConfigError(
            f"--fusions names {name!r}, which works on pictures, and points of mixtures are none: "
            "leave it out with --suite mixture"
        )
    return {"third_moves": ("fuse",), "fusion": name}


def names_in(text: str | None) -> list[str]:
    """Names with commas between them, each once."""
    return list(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def _compare_plainly(
    model: str,
    prompts: str,
    limit: int | None,
    policies: str | None,
    *,
    reward: str | None,
    gold: str,
    ige: str | None,
    out: Path,
    call: Call,
    **settings: Any,
) -> None:
    """Compare stride policies in plain sampling."""
    from mctd_diffusers.evaluation.plain_strides import (
        PlainPlan,
        compare_plainly,
        plain_table,
        sample_plainly,
        write_plain_report,
    )

    if not (names := names_in(policies)):
        raise ConfigError(
            "--evaluations compares stride policies in plain samples: name them, such as "
            "--stride-policies uniform,ays,gits,ige"
        )
    if model == _MIXTURE:
        raise ConfigError("--evaluations are of a pipeline's samples: leave --suite mixture out")
    texts = _read_problems(model, prompts, limit)[0]
    plan = PlainPlan(prompts=texts, policies=tuple(names), **settings)
    if gold == "judge":
        check_judge_reads(plan.prompts)
    pipe, judge = load_judged(model, call, reward, gold, ige)
    pipe.set_progress_bar_config(disable=True)
    nfe = sum(count for _, count in plan.samplers()) * len(texts) * len(plan.seeds)
    with progress_bar(nfe, "NFE", unit_scale=True) as bar:
        samples = sample_plainly(pipe, judge, plan, out / "samples", bar.update)
    table, report = write_plain_report(plan, samples, out)
    typer.echo(plain_table(plan, compare_plainly(samples, plan)))
    typer.echo("")
    typer.echo(f"samples: {table}")
    typer.echo(f"report:  {report}")


def _found_cells(plan: BenchPlan, out: Path) -> list[Cell]:
    """The cells that are there.

    Raises:
        ConfigError: there are none.
    """
    from mctd_diffusers.evaluation.benchmark.cells import read_cells

    cells = read_cells(plan, out / "cells")
    if not cells:
        raise ConfigError(
            f"there are no cells of this plan in {out / 'cells'}: name the folder and the options "
            "that they were made with, or leave --report-only out"
        )
    return cells


def _made_cells(
    plan: BenchPlan,
    out: Path,
    saved: list[Path],
    *,
    reward: str | None,
    gold: str,
    ige: str | None,
    scheduler: str | None,
    device: str | None,
) -> list[Cell]:
    """All cells of the plan, made where they are not there yet."""
    from mctd_diffusers.evaluation.benchmark.cells import make_cells
    from mctd_diffusers.files import make_folder

    largest = plan.budgets[-1]
    call = check_call(
        [method.strategy for method in plan.methods],
        steps=plan.num_steps,
        guidance=plan.guidance_scale,
        scheduler=scheduler,
        device=device,
        rows_per_call=plan.rows_per_call,
        nfe_budget=largest.nfe(plan.num_steps),
        time_budget_s=largest.seconds(1),
    )
    make_folder(out / "cells")
    is_mixture = plan.suite == _MIXTURE
    suite = _mixtures() if is_mixture else _pipeline(plan, call, reward, gold, ige)
    with _progress(plan, saved) as on_cell:
        return make_cells(plan, suite, out / "cells", on_cell)


def _mixtures() -> Suite:
    """Problems with exact answers."""
    from mctd_diffusers.evaluation.benchmark.mixture_suite import MixtureSuite

    return MixtureSuite()


def _pipeline(plan: BenchPlan, call: Call, reward: str | None, gold: str, ige: str | None) -> Suite:
    """The pipeline of the plan with what judges it, loaded."""
    from mctd_diffusers.evaluation.benchmark.pipeline_suite import PipelineSuite

    pipe, judge = load_judged(plan.suite, call, reward, gold, ige)
    return PipelineSuite(pipe, judge, plan, eta=call.arguments.get("eta", 0.0))


def load_judged(
    model: str, call: Call, reward: str | None, gold: str, ige: str | None
) -> tuple[MCTDPipeline, Gold]:
    """A pipeline with its reward, and what judges it."""
    import torch

    from mctd_diffusers.evaluation.benchmark.pipeline_suite import JudgeGold, RewardGold

    judge = JudgeGold(load_gold_judge()) if gold == "judge" else RewardGold(named_reward(gold))
    searched = named_reward(reward) if reward is not None and ":" in reward else reward
    pipe = load_pipeline(model, searched, call, ige=ige)
    if pipe.device.type == "cpu" and isinstance(getattr(pipe, "unet", None), torch.nn.Module):
        pipe.unet.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    return pipe, judge


def _rivals(plan: BenchPlan, text: str | None) -> list[str]:
    """Labels of methods of the plan.

    Raises:
        ConfigError: the plan has no method of that label.
    """
    labels = [method.label for method in plan.methods]
    named = names_in(text)
    for label in named:
        if label not in labels:
            raise ConfigError(
                f"--against {label!r} is not compared; the strategies are {', '.join(labels)}"
            )
    return named


def _report(plan: BenchPlan, cells: Sequence[Cell], out: Path, rivals: Sequence[str]) -> None:
    """Write what the cells say, and say it."""
    from mctd_diffusers.evaluation.benchmark.claims import claims
    from mctd_diffusers.evaluation.benchmark.report import results_of, write_report

    table, report, curves = write_report(plan, cells, out, rivals=rivals)
    for claim in claims(results_of(plan, cells)):
        said = {True: "holds", False: "does not hold", None: "open"}[claim.holds]
        typer.echo(f"{said}: {claim.sentence}")
    typer.echo("")
    typer.echo(f"runs:   {table}")
    typer.echo(f"report: {report}")
    typer.echo(f"curves: {curves}")


@contextlib.contextmanager
def _progress(plan: BenchPlan, saved: list[Path]) -> Iterator[OnCell]:
    """A progress bar over the NFE of all cells; collects the files."""
    tasks = plan.tasks()
    with progress_bar(sum(map(nfe_of, tasks)), "NFE", unit_scale=True) as bar:
        yield moving_on(bar, saved, of=f"/{len(tasks)}")


def nfe_of(task: Task) -> int:
    """What a cell may spend; of a budget of seconds, that of a plain sample for each image."""
    return len(task.prompts) * (task.nfe or task.num_steps)


def moving_on(bar: tqdm[Any], saved: list[Path], *, of: str = "", where: str = "") -> OnCell:
    """Moves a bar on by the NFE of cells, and collects their files.

    Args:
        bar: counts NFE.
        saved: the files, so far and from now on.
        of: follows the number of cells.
        where: precedes the name of a cell.
    """

    def on_cell(task: Task, path: Path, is_new: bool) -> None:
        saved.append(path)
        last = f"{where}{task.method.label} {task.budget.label} seed {task.seed}"
        bar.set_postfix_str(f"{len(saved)}{of} cells, last {last}", refresh=False)
        if is_new:
            bar.update(nfe_of(task))
        else:  # found, so its size says nothing of the speed
            bar.initial += nfe_of(task)
            bar.n += nfe_of(task)
            bar.refresh()

    return on_cell
