"""``results.csv``, a row for each run, and ``report.md``, what they say."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mctd_diffusers.evaluation.benchmark.cells import (
    Cell,
    Run,
    code_versions,
)
from mctd_diffusers.evaluation.benchmark.claims import claims
from mctd_diffusers.evaluation.benchmark.comparison import (
    CANDIDATE,
    Group,
    Results,
    against,
    against_best_rival,
    against_best_rival_at_cost,
    difference,
    gold_per_proxy,
    interval,
    over_seeds,
    share_to_match,
)
from mctd_diffusers.evaluation.benchmark.plan import PLAIN, REFERENCE, BenchPlan
from mctd_diffusers.evaluation.benchmark.pricing import PRICES, ROWS_OF_NFE, cost_of
from mctd_diffusers.evaluation.metrics import Interval
from mctd_diffusers.files import write_text
from mctd_diffusers.search.environment import Counts, Prices

COLUMNS: Final = (
    "suite", "strategy", "settings", "budget", "prompt", "kind", "seed", "proxy", "gold",
    "all_right", "log_likelihood_z", "diversity", "finished", "nfe", "rows", "calls",
    "padded_rows", "decodes", "previews", "reward_calls", "cost", "measured_cost", "seconds",
    "peak_memory", "stop_reason",
)  # fmt: skip
"""Of ``results.csv``.

``calls``, ``padded_rows`` and ``seconds`` are those of the call that the run shared, divided evenly
among its prompts; ``peak_memory`` (bytes) is that of the whole call. ``cost`` is by the price list
of Stable Diffusion 1.5, ``measured_cost`` by the prices measured in the run.
"""


def write_report(
    plan: BenchPlan, cells: Sequence[Cell], output: Path, *, rivals: Sequence[str] = ()
) -> list[Path]:
    """Write ``results.csv``, ``report.md`` and ``curves.png``.

    Args:
        plan: what is compared.
        cells: those of the plan that are there.
        output: the folder, which exists.
        rivals: labels of methods that all others are tested against, one by one.

    Returns:
        The files.

    Raises:
        ConfigError: no cell is of the plain sample.
    """
    from mctd_diffusers.evaluation.benchmark.curves import curves_figure

    results = results_of(plan, cells)
    paths = [output / name for name in ("results.csv", "report.md", "curves.png")]
    write_text(paths[0], as_csv(cells), has_rivals=True)
    write_text(paths[1], markdown(plan, cells, results, rivals), has_rivals=True)
    figure = curves_figure(results)
    draft = paths[2].with_suffix(".part.png")
    figure.savefig(draft)
    draft.replace(paths[2])
    return paths


def results_of(plan: BenchPlan, cells: Sequence[Cell]) -> Results:
    """Cells in groups, in the order of the plan.

    Raises:
        ConfigError: no cell is of the plain sample.
    """
    return Results.of(
        cells,
        [budget.label for budget in plan.budgets],
        [method.label for method in plan.methods],
    )


def as_csv(cells: Sequence[Cell]) -> str:
    """All runs, one a row, under `COLUMNS`."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(row for cell in cells for row in csv_rows(cell))
    return text.getvalue()


def csv_rows(cell: Cell) -> Iterator[list[Any]]:
    """The runs of a cell, each under `COLUMNS`."""
    drawn, number = cell.drawn, len(cell.drawn.runs)
    for run in drawn.runs:
        measured = None
        if drawn.prices:
            spent = Counts(
                rows=run.rows,
                decodes=run.decodes,
                previews=run.previews,
                reward_calls=run.reward_calls,
            )
            measured = f"{Prices(**drawn.prices).cost(spent):.2f}"
        right = None if run.all_right is None else int(run.all_right)
        z = None if run.log_likelihood_z is None else f"{run.log_likelihood_z:.4f}"
        yield [
            cell.suite, cell.method, cell.settings, cell.budget, run.prompt, run.kind, cell.seed,
            f"{run.proxy:.8g}", f"{run.gold:.8g}", right, z, f"{run.diversity:.4f}", run.finished,
            run.nfe, run.rows, f"{drawn.calls / number:.4g}", f"{drawn.padded_rows / number:.4g}",
            run.decodes, run.previews, run.reward_calls, f"{cost_of(run):.2f}", measured,
            f"{drawn.seconds['call'] / number:.4g}", drawn.peak_memory, run.stop_reason,
        ]  # fmt: skip


def markdown(
    plan: BenchPlan, cells: Sequence[Cell], results: Results, rivals: Sequence[str] = ()
) -> str:
    """The report: claims first, then the tables."""
    sections: list[tuple[str, list[str]]] = [
        ("What the search shows", _claims(results)),
        (f"{CANDIDATE} against the best rival", _contests(results)),
        ("Gold", _by_budget(results, lambda group: _mean(interval(group.gold)))),
        (f"Gold above {REFERENCE} at equal NFE", _gains(results, REFERENCE)),
        (f"Gold of {CANDIDATE} above each rival at equal NFE", _candidate_gains(results)),
        (
            f"Gold of {CANDIDATE} above each rival at the cost of {CANDIDATE}",
            _candidate_gains_at_cost(results),
        ),
        *((f"All others against {rival} at equal NFE", _duels(results, rival)) for rival in rivals),
        ("Every fact right, %", _by_budget(results, _all_right)),
        ("Proxy, the reward that was searched", _proxies(results)),
        (
            f"Gold gained over {PLAIN} for each unit of proxy gained, as a share of {REFERENCE}'s",
            _transfers(results),
        ),
        ("Log-likelihood z of the winners (below -3: not typical)", _by_budget(results, _z)),
        ("Diversity of the best 8 (Vendi score)", _by_budget(results, _diversity)),
        ("Gold by kind of prompt", _by_kind(results)),
        ("What it cost", _costs(results)),
        ("Settings", _settings(results)),
    ]
    lines = ["# Does the search pay?", "", *_about(plan, cells, results)]
    for title, table in sections:
        if table:
            lines += ["", f"## {title}", "", *table]
    return "\n".join(lines) + "\n"


def _about(plan: BenchPlan, cells: Sequence[Cell], results: Results) -> Iterator[str]:
    """What was compared, and how to read it."""
    made, asked = len(cells), len(plan.tasks())
    prompts = len({prompt for group in results.groups.values() for prompt, _ in group.runs})
    seeds = ", ".join(map(str, sorted({cell.seed for cell in cells})))
    yield (
        f"Suite {plan.suite}: {prompts} prompts, {plan.num_steps} steps, seeds {seeds}; {made} of "
        f"{asked} cells. A budget of 8x is eight times the NFE of a plain sample. *Gold* is a "
        "judge that no search sees (on mixtures the exact reward), *proxy* is what was searched. "
        "Means over prompts of means over seeds, with 95 % bootstrap intervals over prompts; "
        "gains are paired by prompt and seed, p-values are Holm-adjusted over budgets. *Cost* is "
        "in rows of the network, priced as at Stable Diffusion 1.5: an NFE "
        f"{ROWS_OF_NFE:g}, a decode {PRICES.decode:.2f}, a preview {PRICES.preview:.3f}, a score "
        f"{PRICES.reward_call:.2f}."
    )
    yield ""
    machines = sorted({", ".join(cell.drawn.machine.values()) for cell in cells})
    yield f"Machine (device, Python, torch): {'; '.join(machines)}."
    if made < asked:
        yield ""
        yield "**Not all cells are there yet**; methods are compared on the prompts they share."
    for method, count in code_versions(cells).items():
        yield ""
        yield f"**Cells of {method} were made by {count} versions of its code or the weights.**"
    for sentence in plan.left_out():
        yield ""
        yield f"Left out is {sentence}."


def _claims(results: Results) -> list[str]:
    said = {True: "**Holds.**", False: "**Does not hold.**", None: "**Open.**"}
    return [f"- {said[claim.holds]} {claim.sentence}" for claim in claims(results)]


# --- cells of tables ----------------------------------------------------------------------------


def _mean(found: Interval, times: float = 1.0, digits: int = 3, sign: str = "") -> str:
    mean, low, high = (f"{times * part:{sign}.{digits}f}" for part in found)
    return f"{mean} [{low}, {high}]"


def _all_right(group: Group) -> str:
    right = group.values(lambda run: run.all_right)
    return _mean(interval(right), 100, 1) if right else ""


def _z(group: Group) -> str:
    z = group.values(lambda run: run.log_likelihood_z)
    if not z:
        return ""
    low = 100 * np.mean(np.array(list(z.values())) < -3)
    return f"{np.mean(list(z.values())):+.2f} ({low:.0f} % below -3)"


def _diversity(group: Group) -> str:
    return f"{group.mean(lambda run: run.diversity):.2f}"


# --- tables -------------------------------------------------------------------------------------


def _by_budget(results: Results, entry: Callable[[Group], str]) -> list[str]:
    """A row for each method, a column for each budget; nothing where all is empty."""
    heads = ["method", results.plain.budget, *_other_budgets(results)]
    rows = [[PLAIN, entry(results.plain), *[""] * (len(heads) - 2)]]
    for method in results.methods:
        groups = [results.at(method, budget) for budget in _other_budgets(results)]
        rows.append(
            [results.name(method), "", *("" if group is None else entry(group) for group in groups)]
        )
    if not any(any(row[1:]) for row in rows):
        return []
    if not rows[0][1]:
        heads, rows = [heads[0], *heads[2:]], [[row[0], *row[2:]] for row in rows[1:]]
    return aligned(heads, rows)


def _other_budgets(results: Results) -> list[str]:
    return [budget for budget in results.budgets if budget != results.plain.budget]


def _gains(results: Results, reference: str) -> list[str]:
    """Gold of every method above a reference at the same budget."""

    def entry(group: Group) -> str:
        base = results.at(reference, group.budget)
        if base is None or group.method == reference:
            return ""
        shared = difference(group.gold, base.gold)
        return _mean(interval(shared), sign="+") if shared else ""

    return _by_budget(results, entry)


def _proxies(results: Results) -> list[str]:
    """Proxies, where they differ from gold."""
    if results.plain.proxy == results.plain.gold:
        return []
    return _by_budget(results, lambda group: _mean(interval(group.proxy)))


def _transfers(results: Results) -> list[str]:
    """How much of a gain in proxy is a gain in gold, where they differ."""

    def entry(group: Group) -> str:
        share = gold_per_proxy(results, group.method, group.budget)
        return "" if share is None else f"{share:.2f}"

    return [] if results.plain.proxy == results.plain.gold else _by_budget(results, entry)


def _contests(results: Results) -> list[str]:
    """The candidate against the best rival at each budget, at equal NFE and at equal cost."""
    heads = ["at equal", "budget", "best rival", "gold above it", "p (margin)", "p (above)"]
    rows = [
        [
            where,
            contest.budget,
            results.name(contest.rival),
            _mean(contest.gain, sign="+"),
            f"{contest.p_margin:.4f}",
            f"{contest.p_above:.4f}",
        ]
        for where, found in (
            ("NFE", against_best_rival(results)),
            ("cost", against_best_rival_at_cost(results)),
        )
        for contest in found
    ]
    note = (
        "The best rival is the one with the highest mean gold on these prompts. *p (margin)* is "
        f"against being below it by {results.margin:.4f} or more, *p (above)* against not being "
        "above it; both are one-sided, from the bootstrap, and Holm-adjusted over the budgets."
    )
    return [*aligned(heads, rows), "", note] if rows else []


def _duels(results: Results, rival: str) -> list[str]:
    """Every other method against one, budget by budget, and the NFE to match its gold."""
    rows = []
    for method in results.methods:
        if method == rival:
            continue
        for contest in against(results, rival, method):
            matched = share_to_match(results, method, rival, contest.budget)
            rows.append(
                [
                    results.name(method),
                    contest.budget,
                    _mean(contest.gain, sign="+"),
                    f"{contest.p_margin:.4f}",
                    f"{contest.p_above:.4f}",
                    "out of reach" if matched is None else f"{matched:.2f}",
                ]
            )
    heads = ["method", "budget", "gold above it", "p (margin)", "p (above)", "NFE to match"]
    note = (
        f"*p (margin)* is against being below by {results.margin:.4f} or more, *p (above)* against "
        "not being above; both are Holm-adjusted over the budgets of a method. *NFE to match* is "
        f"the share of the NFE of {rival} at which the method's curve first has its mean gold."
    )
    return [*aligned(heads, rows), "", note] if rows else []


def _candidate_gains(results: Results) -> list[str]:
    """Gold of the candidate above every other method at the same budget."""

    def entry(group: Group) -> str:
        ours = results.at(CANDIDATE, group.budget)
        if ours is None or group.method == CANDIDATE:
            return ""
        shared = difference(ours.gold, group.gold)
        return _mean(interval(shared), sign="+") if shared else ""

    return _by_budget(results, entry)


def _candidate_gains_at_cost(results: Results) -> list[str]:
    """Gold of the candidate above every rival at the candidate's cost, by interpolation."""
    budgets = [budget for budget in results.budgets if results.at(CANDIDATE, budget)]
    rows = []
    for rival in results.rivals:
        row = [results.name(rival)]
        for budget in budgets:
            ours = results.groups[CANDIDATE, budget]
            theirs = results.gold_at_cost(rival, ours.cost)
            shared = difference(ours.gold, theirs) if theirs else {}
            row.append(_mean(interval(shared), sign="+") if shared else "out of reach")
        rows.append(row)
    heads = [
        "rival",
        *(f"{budget} ({results.groups[CANDIDATE, budget].cost:.0f} rows)" for budget in budgets),
    ]
    return aligned(heads, rows) if budgets and rows else []


def _by_kind(results: Results) -> list[str]:
    """Gold by kind at the largest budget that every method has, or at the largest of all."""
    kinds = list(dict.fromkeys(run.kind for run in results.plain.runs.values()))
    budgets = _other_budgets(results)
    if len(kinds) < 2 or not budgets:
        return []
    whole = [b for b in budgets if all(results.at(method, b) for method in results.methods)]
    budget = (whole or budgets)[-1]
    groups = [results.plain, *(results.at(method, budget) for method in results.methods)]
    rows = [
        [results.name(group.method), group.budget, *(_kind_mean(group, kind) for kind in kinds)]
        for group in groups
        if group is not None
    ]
    return aligned(["method", "budget", *kinds], rows)


def _kind_mean(group: Group, kind: str) -> str:
    gold = group.values(lambda run: run.gold if run.kind == kind else None)
    return f"{over_seeds(gold).mean():.3f}" if gold else ""


def _costs(results: Results) -> list[str]:
    """What a method spends on an image, and how well it fills its calls."""
    heads = [
        "method", "budget", "NFE", "of budget, %", "decodes", "previews", "scores", "cost, rows",
        "useful rows, %", "CPU ms/NFE", "wall ms/NFE",
    ]  # fmt: skip
    rows = []
    for group in results.groups.values():
        share = group.budget_share
        rows.append(
            [
                results.name(group.method),
                group.budget,
                f"{group.nfe:.1f}",
                "" if share is None else f"{100 * share:.1f}",
                *(
                    f"{group.mean(number):.1f}"
                    for number in (_decodes, _previews, _reward_calls, cost_of)
                ),
                f"{100 * group.useful_share:.1f}",
                f"{1000 * group.cpu_per_nfe:.2f}",
                f"{1000 * group.wall_per_nfe:.2f}",
            ]
        )
    note = (
        "*CPU* is without decodes, previews and scores; *wall* is all of a call. Both are those of "
        "calls that several prompts share, padded rows included."
    )
    return [*aligned(heads, rows), "", note]


def _decodes(run: Run) -> float:
    return run.decodes


def _previews(run: Run) -> float:
    return run.previews


def _reward_calls(run: Run) -> float:
    return run.reward_calls


def _settings(results: Results) -> list[str]:
    """The settings of every method."""
    found = {group.method: group.cells[0].settings for group in results.groups.values()}
    return [f"- {results.name(method)}: `{settings}`" for method, settings in found.items()]


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table: words to the left, numbers to the right."""
    widths = [max(3, *(len(line[i]) for line in (heads, *rows))) for i in range(len(heads))]

    def line(entries: Sequence[str]) -> str:
        first, *others = zip(entries, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(entry.rjust(width) for entry, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(heads), f"| {' | '.join(rule)} |", *map(line, rows)]
