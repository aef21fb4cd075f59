"""What a benchmark compares and what comes of it: settings, cells, rows, verdicts, tables.

Pure data and arithmetic; `benchmark` makes the cells. Every method starts from the same initial
noise of an image, so differences are paired by prompt. Intervals are bootstrap intervals over
prompts, of means over seeds.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.metrics import Interval, bootstrap_mean, paired_difference
from mctd_diffusers.evaluation.scenes import KINDS, parse_prompt

REFERENCE = "best_of_n"
"""The method that the others have to beat at equal NFE."""
PLAIN = "plain"
"""Label of one sample without selection: best-of-1, which is the stock pipeline's picture."""
RULE = (
    "A method passes if its gold is above that of best_of_n at equal NFE at one budget at least "
    "(the 95 % interval of the paired difference lies above zero), and at no budget below it by "
    "more than a tenth of what the largest best_of_n gains over plain (mean of the paired "
    "differences)."
)


class SearchSpec(NamedTuple):
    """A search to compare.

    Attributes:
        label: its name in tables and files.
        search: what the pipeline takes: the name of a search, or a strategy with its settings.
    """

    label: str
    search: Any


@dataclass(frozen=True)
class BenchSettings:
    """What is compared, and on what.

    Args:
        prompts: of the judge's grammar, at least one.
        searches: methods to compare; the reference is added if it is missing.
        computes: budgets, in multiples of the cost of one sample; each at least 1.
        seeds: of the initial noise; means over seeds are taken before anything else.
        num_steps: of the schedule.
        guidance_scale: of classifier-free guidance.
        rows_per_call: latents in a call of the network; ``None`` for the pipeline's default.
        scale_compute: budget of one large best-of-n, to show what there is to gain; 0 for none.

    Raises:
        ConfigError: nothing to compare, a repeated label, or a prompt outside the grammar.
    """

    prompts: tuple[str, ...]
    searches: tuple[SearchSpec, ...]
    computes: tuple[int, ...] = (4, 8)
    seeds: tuple[int, ...] = (0,)
    num_steps: int = 16
    guidance_scale: float = 4.0
    rows_per_call: int | None = None
    scale_compute: int = 16

    def __post_init__(self) -> None:
        for name in ("prompts", "computes", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: name at least one")
        if min(self.computes) < 1 or self.scale_compute < 0:
            raise ConfigError(
                f"computes={self.computes} and scale_compute={self.scale_compute}: a budget is at "
                "least the cost of one sample, 1"
            )
        labels = Counter(spec.label for spec in self.searches)
        if repeated := [label for label, count in labels.items() if count > 1 or label == PLAIN]:
            raise ConfigError(f"searches named {repeated[0]!r} are ambiguous: name each once")
        if REFERENCE not in labels:
            reference = SearchSpec(REFERENCE, REFERENCE)
            object.__setattr__(self, "searches", (reference, *self.searches))
        for prompt in self.prompts:
            parse_prompt(prompt)

    def cells(self) -> list[tuple[SearchSpec, int, int]]:
        """Lists (method, compute, seed), the seeds outermost, so that a part is worth reading."""
        once = [(SearchSpec(PLAIN, REFERENCE), 1)]
        once += [(spec, compute) for compute in self.computes for spec in self.searches]
        reference = next(spec for spec in self.searches if spec.label == REFERENCE)
        if self.scale_compute and self.scale_compute not in self.computes:
            once.append((reference, self.scale_compute))
        return [(spec, compute, seed) for seed in self.seeds for spec, compute in once]


@dataclass(frozen=True)
class Cell:
    """One finished cell; the lists hold an entry for each prompt.

    Args:
        method: label of the search.
        compute: budget in multiples of the cost of one sample.
        seed: of the initial noise.
        identity: what the cell was made from.
        gold: mean probability of the prompt's facts.
        all_right: every fact is more probable than not.
        reward: by the reward that was searched.
        nfe: evaluations spent.
        cost: row-equivalents spent.
        counts: useful work and padding of the call.
        prices: of a decode, a preview and a reward call, in row-equivalents, as measured.
        seconds: wall-clock seconds by phase, and "call" for all of it.
        cpu: CPU seconds by phase, and "total".
        stop_reasons: how many searches ended for which reason.
    """

    method: str
    compute: int
    seed: int
    identity: dict[str, str]
    gold: list[float]
    all_right: list[bool]
    reward: list[float]
    nfe: list[int]
    cost: list[float]
    counts: dict[str, int]
    prices: dict[str, float]
    seconds: dict[str, float]
    cpu: dict[str, float]
    stop_reasons: dict[str, int]

    @property
    def padded_share(self) -> float:
        """Padded rows among all rows."""
        rows = self.counts["rows"] + self.counts["padded_rows"]
        return self.counts["padded_rows"] / rows

    @property
    def overhead_share(self) -> float:
        """CPU seconds outside network, decode, preview and reward, among all on useful rows.

        Text encoding, which every method needs once, counts on neither side; the network's share of
        padded rows is left out of the whole, so padding does not make the overhead look smaller.
        """
        network = self.cpu["network"] * (1 - self.padded_share)
        measured = network + self.cpu["decode"] + self.cpu["preview"] + self.cpu["reward"]
        outside = self.cpu["total"] - sum(
            seconds for phase, seconds in self.cpu.items() if phase != "total"
        )
        return outside / (outside + measured)


@dataclass(frozen=True)
class Row:
    """One method at one budget, over all prompts and seeds.

    Args:
        method: label of the search.
        compute: budget in multiples of the cost of one sample.
        nfe: mean evaluations of an image.
        cost: mean row-equivalents of an image.
        gold: mean with its interval.
        all_right: share of images with every fact right, with its interval.
        reward: mean with its interval.
        gains: of "gold", "all_right" and "reward" over the reference at the same budget; empty
            for the reference itself and for plain.
        by_kind: (gold, all right) of each kind of prompt.
        overhead_share: see `Cell.overhead_share`.
        padded_share: see `Cell.padded_share`.
        seconds: wall-clock seconds of the calls.
        cpu_seconds: CPU seconds of the calls.
    """

    method: str
    compute: int
    nfe: float
    cost: float
    gold: Interval
    all_right: Interval
    reward: Interval
    gains: dict[str, Interval]
    by_kind: dict[str, tuple[float, float]]
    overhead_share: float
    padded_share: float
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Verdict:
    """Whether a method passes `RULE`.

    Args:
        method: label of the search.
        passes: both parts of the rule hold.
        above_at: budgets at which the interval of its gain lies above zero.
        below_at: budgets at which its mean gain is below minus the tolerance.
        surely_not_below_at: budgets at which even the low end of the interval is not.
        tolerance: a tenth of what the largest reference gains over plain; 0 if it gains nothing.
        sentence: the same in words.
    """

    method: str
    passes: bool
    above_at: tuple[int, ...]
    below_at: tuple[int, ...]
    surely_not_below_at: tuple[int, ...]
    tolerance: float
    sentence: str


@dataclass(frozen=True)
class BenchReport:
    """What a benchmark found.

    Args:
        settings: what was compared, as plain data.
        rows: plain first, then by budget.
        verdicts: one for each method but the reference.
        machine: where it ran.
        prices: of a decode, a preview and a reward call, in row-equivalents, as measured.
        rule: in words, what the verdicts mean.
    """

    settings: dict[str, Any]
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    machine: dict[str, str]
    prices: dict[str, float]
    rule: str = field(default=RULE)


def compare_cells(cells: Sequence[Cell], settings: BenchSettings) -> BenchReport:
    """Compare finished cells: pure arithmetic on what they hold."""
    kinds = [parse_prompt(prompt).kind for prompt in settings.prompts]
    grouped: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.method, cell.compute), []).append(cell)
    rows = tuple(
        _row(group, grouped.get((REFERENCE, compute)), kinds)
        for (_, compute), group in grouped.items()
    )
    plain = grouped[PLAIN, 1]
    largest = max(compute for method, compute in grouped if method == REFERENCE)
    to_gain = float(
        np.mean(_by_prompt(grouped[REFERENCE, largest], "gold") - _by_prompt(plain, "gold"))
    )
    verdicts = tuple(
        judge_method(
            spec.label,
            {row.compute: row.gains["gold"] for row in rows if row.method == spec.label},
            tolerance=max(0.0, to_gain / 10),
        )
        for spec in settings.searches
        if spec.label != REFERENCE
    )
    described = {
        "num_prompts": len(settings.prompts),
        "searches": {spec.label: repr(spec.search) for spec in settings.searches},
        "computes": list(settings.computes),
        "seeds": list(settings.seeds),
        "num_steps": settings.num_steps,
        "guidance_scale": settings.guidance_scale,
        "rows_per_call": settings.rows_per_call,
        "largest_reference": largest,
        "prompts": list(settings.prompts),
    }
    machine = {
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return BenchReport(described, rows, verdicts, machine, dict(cells[-1].prices))


def _by_prompt(group: Sequence[Cell], name: str) -> Float[np.ndarray, " prompts"]:
    """Mean over seeds of a number, for each prompt."""
    return np.mean([np.array(getattr(cell, name), dtype=np.float64) for cell in group], axis=0)


def _row(group: Sequence[Cell], reference: Sequence[Cell] | None, kinds: Sequence[str]) -> Row:
    numbers = {name: _by_prompt(group, name) for name in ("gold", "all_right", "reward")}
    gains = {}
    if reference is not None and group[0].method not in (REFERENCE, PLAIN):
        gains = {
            name: paired_difference(values, _by_prompt(reference, name))
            for name, values in numbers.items()
        }
    where = {kind: np.array([k == kind for k in kinds]) for kind in KINDS if kind in kinds}
    return Row(
        method=group[0].method,
        compute=group[0].compute,
        nfe=float(_by_prompt(group, "nfe").mean()),
        cost=float(_by_prompt(group, "cost").mean()),
        gold=bootstrap_mean(numbers["gold"]),
        all_right=bootstrap_mean(numbers["all_right"]),
        reward=bootstrap_mean(numbers["reward"]),
        gains=gains,
        by_kind={
            kind: (float(numbers["gold"][at].mean()), float(numbers["all_right"][at].mean()))
            for kind, at in where.items()
        },
        overhead_share=float(np.mean([cell.overhead_share for cell in group])),
        padded_share=float(np.mean([cell.padded_share for cell in group])),
        seconds=sum(cell.seconds["call"] for cell in group),
        cpu_seconds=sum(cell.cpu["total"] for cell in group),
    )


def judge_method(label: str, gains: Mapping[int, Interval], *, tolerance: float) -> Verdict:
    """Applies `RULE` to the gains in gold of one method.

    Args:
        label: of the method.
        gains: over the reference at equal NFE, by budget.
        tolerance: how much below still passes.
    """
    above = tuple(compute for compute, gain in gains.items() if gain.low > 0)
    below = tuple(compute for compute, gain in gains.items() if gain.mean < -tolerance)
    surely = tuple(compute for compute, gain in gains.items() if gain.low >= -tolerance)
    passes = bool(above) and not below

    def at(computes: tuple[int, ...]) -> str:
        return "compute " + " and ".join(map(str, computes)) if computes else "no budget"

    sentence = (
        f"{label} {'passes' if passes else 'does not pass'}: above best_of_n at {at(above)}, below "
        f"it by more than the tolerance of {tolerance:.4f} at {at(below)} (its whole interval is "
        f"within the tolerance or above at {at(surely)})."
    )
    return Verdict(label, passes, above, below, surely, tolerance, sentence)


def markdown(report: BenchReport) -> str:
    """Writes the report as aligned Markdown tables, readable as plain text too."""
    about = report.settings
    lines = [
        "# Does the search pay?",
        "",
        f"{about['num_prompts']} prompts, {about['num_steps']} steps, guidance "
        f"{about['guidance_scale']:g}, seeds {', '.join(map(str, about['seeds']))}; compute k is k "
        f"times the NFE of one sample. Means with 95 % bootstrap intervals over prompts; gains are "
        "paired by prompt, over best_of_n at the same compute. Gold is a judge that no search "
        "sees; reward is what was searched.",
        "",
        *summary_tables(report),
        "",
        "## By kind of prompt: gold (all right, %)",
        "",
        *_table(
            ["method", "compute", *report.rows[0].by_kind],
            [
                [
                    row.method,
                    str(row.compute),
                    *(f"{gold:.3f} ({100 * right:.0f})" for gold, right in row.by_kind.values()),
                ]
                for row in report.rows
            ],
        ),
        "",
        f"Machine: {', '.join(f'{name} {what}' for name, what in report.machine.items())}. "
        "Prices in rows: "
        + ", ".join(f"{what} {price:.2f}" for what, price in report.prices.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def summary_tables(report: BenchReport) -> list[str]:
    """Lines of the main table, the gains, the costs and the verdict."""
    quality = [
        [
            row.method,
            str(row.compute),
            f"{row.nfe:.1f}",
            _interval(row.gold),
            _interval(row.all_right, 100, 1),
            _interval(row.reward),
        ]
        for row in report.rows
    ]
    gains = [
        [
            row.method,
            str(row.compute),
            _interval(row.gains["gold"], sign=True),
            _interval(row.gains["all_right"], 100, 1, sign=True),
            _interval(row.gains["reward"], sign=True),
        ]
        for row in report.rows
        if row.gains
    ]
    costs = [
        [
            row.method,
            str(row.compute),
            f"{row.nfe:.1f}",
            f"{row.cost:.1f}",
            f"{row.seconds:.0f}",
            f"{row.cpu_seconds:.0f}",
            f"{100 * row.overhead_share:.1f}",
            f"{100 * row.padded_share:.1f}",
        ]
        for row in report.rows
    ]
    lines = _table(["method", "compute", "NFE", "gold", "all right, %", "reward"], quality)
    if gains:
        heads = ["method", "compute", "gold gain", "all right gain, %", "reward gain"]
        lines += ["", "## Gain over best_of_n at equal NFE", "", *_table(heads, gains)]
        lines += ["", f"**Rule.** {report.rule}", ""]
        lines += [f"- {verdict.sentence}" for verdict in report.verdicts]
    heads = [
        "method",
        "compute",
        "NFE",
        "cost, rows",
        "seconds",
        "CPU s",
        "overhead, %",
        "padded, %",
    ]
    return [*lines, "", "## What it cost", "", *_table(heads, costs)]


def _interval(interval: Interval, times: float = 1.0, digits: int = 3, sign: bool = False) -> str:
    plus = "+" if sign else ""
    mean, low, high = (f"{times * part:{plus}.{digits}f}" for part in interval)
    return f"{mean} [{low}, {high}]"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """An aligned Markdown table: words to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(heads), f"| {' | '.join(rule)} |", *map(line, rows)]
