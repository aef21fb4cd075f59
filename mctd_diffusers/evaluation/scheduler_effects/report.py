"""``results.csv``, a row for each run, ``branching.csv``, and ``report.md``, what they say."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from mctd_diffusers.evaluation.benchmark.cells import Cell, Run
from mctd_diffusers.evaluation.benchmark.comparison import Group, interval
from mctd_diffusers.evaluation.benchmark.report import COLUMNS as RUN_COLUMNS
from mctd_diffusers.evaluation.benchmark.report import aligned, csv_rows
from mctd_diffusers.evaluation.metrics import Interval
from mctd_diffusers.evaluation.scheduler_effects.branching import Branching, telling_of
from mctd_diffusers.evaluation.scheduler_effects.comparison import (
    BRANCH_ETA,
    Comparison,
    Condition,
    arm_of,
    stepper_of,
)
from mctd_diffusers.evaluation.scheduler_effects.effects import (
    RULE,
    Design,
    Factor,
    SchedulerResults,
    default_arm,
    designs,
    interactions,
    marginal_effects,
    recommend,
)
from mctd_diffusers.files import write_text

COLUMNS: Final = (
    "scheduler", "class", "calls_per_step", "arm", "stride_policy", "plain_noise",
    "branching_noise", "steps", *RUN_COLUMNS,
)  # fmt: skip
"""Of ``results.csv``: what tells the conditions apart, and the columns of ``mctd bench``."""

SHARES: Final = (0.0, 0.25, 0.5, 0.75)
"""Shares of the schedule at which siblings are reported."""
TOLD: Final = 0.8
"""Correlation with the final reward at which values tell samples apart."""


def write_effects(
    comparison: Comparison,
    cells: Mapping[str, Sequence[Cell]],
    branching: Sequence[Branching],
    output: Path,
) -> list[Path]:
    """Write ``results.csv``, ``branching.csv``, ``report.md``, ``gold.png`` and ``branching.png``.

    Args:
        comparison: what is compared.
        cells: those that are there, by the name of the scheduler.
        branching: what was measured aside; may be empty, and has then neither table nor picture.
        output: the folder, which exists.

    Returns:
        The files.

    Raises:
        ConfigError: no cell is of the reference.
    """
    from mctd_diffusers.evaluation.scheduler_effects.figures import branching_figure, gold_figure

    results = SchedulerResults.of(comparison, cells)
    paths = [output / "results.csv", output / "report.md", output / "gold.png"]
    write_text(paths[0], as_csv(comparison, cells), has_rivals=True)
    write_text(paths[1], markdown(comparison, results, branching), has_rivals=True)
    figures = [gold_figure(results)]
    if branching:
        paths += [output / "branching.png", output / "branching.csv"]
        figures.append(branching_figure(branching, results.reference))
        write_text(paths[-1], branching_csv(branching), has_rivals=True)
    for figure, path in zip(figures, paths[2:4], strict=False):
        draft = path.with_suffix(".part.png")
        figure.savefig(draft)
        draft.replace(path)
    return paths


def as_csv(comparison: Comparison, cells: Mapping[str, Sequence[Cell]]) -> str:
    """All runs, one a row, under `COLUMNS`."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for named in comparison.schedulers:
        noise = comparison.noise_of(named)
        plan = comparison.plan_of(named)
        arms = {method.label: arm_of(method) for method in plan.methods}
        for cell in cells.get(named.name, ()):
            arm = arms[cell.method]
            where = [
                named.name, type(named.scheduler).__name__, plan.calls_per_step, arm.strategy,
                arm.policy, noise.plain, noise.branching, cell.num_steps,
            ]  # fmt: skip
            table.writerows([*where, *row] for row in csv_rows(cell))
    return text.getvalue()


def branching_csv(branching: Sequence[Branching]) -> str:
    """What was measured aside, a row for each scheduler, prompt and step index."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["scheduler", "prompt", "step_index", "value_spread", "estimate_spread", "values"]
    )
    for row in branching:
        steps = len(row.values[0])
        for step_index in range(steps):
            is_last = step_index == steps - 1
            spreads = ["", ""] if is_last else [
                f"{row.value_spread[step_index]:.6g}", f"{row.estimate_spread[step_index]:.6g}"
            ]  # fmt: skip
            values = " ".join(f"{sample[step_index]:.6g}" for sample in row.values)
            table.writerow([row.scheduler, row.prompt, step_index, *spreads, values])
        rewards = " ".join(f"{reward:.6g}" for reward in row.rewards)
        table.writerow([row.scheduler, row.prompt, steps, "", "", rewards])
    return text.getvalue()


def markdown(
    comparison: Comparison, results: SchedulerResults, branching: Sequence[Branching]
) -> str:
    """The report: the recommendation first, then the tables."""
    reference = results.reference
    sections: list[tuple[str, list[str]]] = [
        ("Recommendation", _recommendations(results)),
        ("The schedulers", _schedulers(comparison)),
        ("Gold", _by_arm(results, lambda _, group: _mean(interval(group.gold)))),
        (f"Gold above {reference} at equal NFE", _above(results)),
        *itertools.chain.from_iterable(map(_effects, designs(results))),
        ("Reward", _by_arm(results, lambda _, group: _mean(interval(group.proxy)))),
        ("Every fact right, %", _by_arm(results, lambda _, group: _all_right(group))),
        *_siblings(branching),
        ("What it cost", _costs(results)),
    ]
    lines = ["# What schedulers do", "", *_about(comparison, results)]
    for title, table in sections:
        if table:
            lines += ["", f"## {title}", "", *table]
    return "\n".join(lines) + "\n"


def _about(comparison: Comparison, results: SchedulerResults) -> Iterator[str]:
    """What was compared, and how to read it."""
    bench = comparison.bench
    cells = [cell for group in results.groups.values() for cell in group.cells]
    asked = sum(len(comparison.plan_of(named).tasks()) for named in comparison.schedulers)
    prompts = len({prompt for group in results.groups.values() for prompt, _ in group.runs})
    yield (
        f"Model {bench.suite}: {prompts} prompts, schedules of {bench.num_steps} steps, guidance "
        f"{bench.guidance_scale:g}, seeds {', '.join(map(str, bench.seeds))}; {len(cells)} of "
        f"{asked} cells. All schedulers start from the same noise (in units of its deviation) and "
        f"draw edges by the same seeds. A budget of 8x is {8 * bench.num_steps} NFE whatever the "
        "scheduler: what takes two calls a step gets half the samples, and *plain* is one sample "
        "of as many steps as the budget pays. *Gold* is a judge that no search sees. Means over "
        "prompts of means over seeds, with 95 % bootstrap intervals over prompts, not adjusted "
        f"for their number; differences are paired by prompt and seed. {results.reference} is what "
        "the others are compared with."
    )
    yield ""
    machines = sorted({", ".join(cell.drawn.machine.values()) for cell in cells})
    yield f"Machine (device, Python, torch): {'; '.join(machines)}."
    if len(cells) < asked:
        yield ""
        yield (
            "**Not all cells are there**; conditions are compared on the prompts that they share "
            "(the last table has the runs of each)."
        )
    for sentence in comparison.left_out():
        yield ""
        yield f"Left out is {sentence}."


# --- cells of tables ----------------------------------------------------------------------------


def _mean(found: Interval | None, times: float = 1.0, digits: int = 3, sign: str = "") -> str:
    if found is None:
        return ""
    mean, low, high = (f"{times * part:{sign}.{digits}f}" for part in found)
    return f"{mean} [{low}, {high}]"


def _all_right(group: Group) -> str:
    right = group.values(lambda run: run.all_right)
    return _mean(interval(right), 100, 1) if right else ""


# --- tables -------------------------------------------------------------------------------------


def _recommendations(results: SchedulerResults) -> list[str]:
    """What to take with each arm, that of the default search first."""
    first = default_arm(results)
    lines = [RULE, ""]
    for arm in (first, *(arm for arm in results.arms if arm != first)):
        found = recommend(results, arm)
        if found is None:
            continue
        best = found.contenders[0]
        named = ", ".join(
            f"{each.scheduler} {each.gold:.3f}"
            + ("" if each == best else f" ({_mean(each.below_best, sign='+')})")
            for each in found.contenders
        )
        why = "it has the most gold" if found.chosen == best.scheduler else "a tie with the best"
        lines.append(
            f"- With {arm.label}, over {', '.join(found.budgets)}: **{found.chosen}** ({why}). "
            f"{named}."
        )
    return lines if len(lines) > 2 else []


def _schedulers(comparison: Comparison) -> list[str]:
    """Where the noise of each scheduler comes from, and how it steps."""
    rows = []
    for named in comparison.schedulers:
        noise, stepper = comparison.noise_of(named), stepper_of(named, comparison.bench.num_steps)
        longest = stepper.longest_stride
        rows.append(
            [
                named.name,
                type(named.scheduler).__name__,
                noise.plain,
                "" if named.eta is None else f"{named.eta:g}",
                noise.branching,
                str(stepper.calls_per_step),
                "any" if longest is None else str(longest),
            ]
        )
    heads = [
        "scheduler", "class", "noise of plain edges", "eta", "noise of branching edges",
        "calls a step", "longest stride",
    ]  # fmt: skip
    note = (
        "*own* noise is drawn by the scheduler's own step, *injected* noise is added to one that "
        "draws none; with *none*, samples differ by their initial noise alone."
    )
    return [*aligned(heads, rows), "", note]


def _above(results: SchedulerResults) -> list[str]:
    """Gold above the reference, by what both really spent."""
    table = _by_arm(
        results, lambda condition, _: _mean(results.above_reference(condition), sign="+")
    )
    note = (
        f"At the NFE that each condition spent: where {results.reference} spent another number at "
        "that budget, its gold is interpolated between budgets, linearly in the logarithm of NFE."
    )
    return [*table, "", note] if table else []


def _by_arm(results: SchedulerResults, entry: Callable[[Condition, Group], str]) -> list[str]:
    """A row for each arm and scheduler, a column for each budget; nothing where all is empty."""
    budgets = list(dict.fromkeys(condition.budget for condition in results.groups))
    rows = []
    for arm, scheduler in itertools.product(results.arms, results.schedulers):
        conditions = [Condition(scheduler, arm, budget) for budget in budgets]
        entries = [
            entry(condition, results.groups[condition]) if condition in results.groups else ""
            for condition in conditions
        ]
        if any(entries):
            rows.append([arm.label, scheduler, *entries])
    return aligned(["arm", "scheduler", *budgets], rows) if rows else []


def _effects(design: Design) -> Iterator[tuple[str, list[str]]]:
    """Marginal effects of all factors, and interactions of all pairs."""
    _, arms, _ = design.factors
    heads = ["factor", "level", "gold", "above the reference", "reward", "above it"]
    rows = [
        [
            factor.name,
            effect.level,
            _mean(effect.gold),
            _mean(effect.more_gold, sign="+"),
            _mean(effect.proxy),
            _mean(effect.more_proxy, sign="+"),
        ]
        for factor in design.factors
        for effect in marginal_effects(design, factor)
        if factor.others
    ]
    note = f"Each level with all else averaged, over {_in_words(design.factors)}."
    if rows:
        title = f"Marginal effects of scheduler, {arms.name} and budget"
        yield title, [*aligned(heads, rows), "", note]
    for first, second in itertools.combinations(design.factors, 2):
        if first.others and second.others:
            of = f"{first.name} and {second.name}"
            by = "" if arms in (first, second) else f" (over every {arms.name})"
            yield f"Interaction of {of}{by}", _interaction(design, first, second)


def _in_words(factors: Sequence[Factor]) -> str:
    return "; ".join(f"{factor.name}: {', '.join(factor.levels)}" for factor in factors)


def _interaction(design: Design, first: Factor, second: Factor) -> list[str]:
    found = interactions(design, first, second)
    rows = [[a, *(_mean(found[a, b], sign="+") for b in second.others)] for a in first.others]
    note = (
        f"Gold that a {first.name} brings above {first.reference}, more with each {second.name} "
        f"than with {second.reference}."
    )
    return [*aligned([first.name, *second.others], rows), "", note]


def _siblings(branching: Sequence[Branching]) -> Iterator[tuple[str, list[str]]]:
    """Spread of siblings and the correlation of values with rewards, by share of the schedule."""
    if not branching:
        return
    told = {row.scheduler: None for row in branching}
    telling = {scheduler: telling_of(branching, scheduler) for scheduler in told}
    first = branching[0]
    prompts, steps = len({row.prompt for row in branching}), len(first.values[0])
    heads = ["scheduler", *(f"at {share:g}" for share in SHARES)]

    def table(name: str, digits: int) -> list[list[str]]:
        rows = []
        for scheduler in told:
            column = getattr(telling[scheduler], name)
            places = [min(round(share * steps), len(column) - 1) for share in SHARES]
            rows.append([scheduler, *(_mean(column[place], digits=digits) for place in places)])
        return rows

    yield (
        "Siblings: spread of their values, by share of the schedule",
        [
            *aligned(heads, table("value_spread", 3)),
            "",
            f"Standard deviation, reward units, over {prompts} prompts. Siblings are drawn one "
            "step on from one state of a plain sample, with a share of "
            f"{BRANCH_ETA:g} of fresh noise.",
        ],
    )
    yield (
        "Siblings: spread of their denoised estimates, by share of the schedule",
        [
            *aligned(heads, table("estimate_spread", 3)),
            "",
            "Root mean square distance from their mean, latent units.",
        ],
    )
    rows = [[*row, _told_from(telling[row[0]].correlation)] for row in table("correlation", 2)]
    yield (
        "How early the value tells samples apart",
        [
            *aligned([*heads, f"{TOLD:g} from"], rows),
            "",
            f"Correlation of the value at that share with the final reward, over "
            f"{len(first.rewards)} plain samples of a prompt, mean over prompts; and the share "
            f"from which it is {TOLD:g} at least.",
        ],
    )


def _told_from(correlations: Sequence[Interval | None]) -> str:
    """Share of the schedule from which on values tell samples apart."""
    share = ""
    for place, found in reversed(list(enumerate(correlations))):
        if found is None or found.mean < TOLD:
            break
        share = f"{place / len(correlations):.2f}"
    return share or "never"


def _costs(results: SchedulerResults) -> list[str]:
    """What was spent on an image, by what was metered."""
    heads = [
        "scheduler", "arm", "budget", "runs", "steps", "NFE", "of budget, %", "finished",
        "scores", "seconds", "wall ms/NFE",
    ]  # fmt: skip
    rows = []
    for condition, group in results.groups.items():
        share = group.budget_share
        seconds = sum(cell.drawn.seconds["call"] for cell in group.cells) / len(group.runs)
        rows.append(
            [
                condition.scheduler,
                condition.arm.label,
                condition.budget,
                str(len(group.runs)),
                str(group.cells[0].num_steps),
                f"{group.nfe:.1f}",
                "" if share is None else f"{100 * share:.1f}",
                f"{group.mean(_finished):.1f}",
                f"{group.mean(_scores):.1f}",
                f"{seconds:.2f}",
                f"{1000 * group.wall_per_nfe:.2f}",
            ]
        )
    note = "Seconds are those of calls that several prompts share, for each image."
    return [*aligned(heads, rows), "", note]


def _finished(run: Run) -> float:
    return run.finished


def _scores(run: Run) -> float:
    return run.reward_calls
