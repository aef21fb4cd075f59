"""What the cells of a benchmark say: means, paired differences, and tests.

Pure arithmetic. Every method starts from the same initial noise of an image, so differences are
paired by prompt and seed. The units are prompts: means over seeds are taken first, and intervals
and p-values are those of the percentile bootstrap over prompts (`metrics.bootstrap_mean`,
`metrics.bootstrap_p_value`).
*Cost* is that of `pricing.cost_of`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.cells import Cell, Run
from mctd_diffusers.evaluation.benchmark.plan import PLAIN, REFERENCE
from mctd_diffusers.evaluation.benchmark.pricing import cost_of
from mctd_diffusers.evaluation.metrics import (
    Interval,
    bootstrap_mean,
    bootstrap_p_value,
    holm,
    resampled_means,
)

Values: TypeAlias = Mapping[tuple[str, int], float]
"""A number for each (prompt, seed)."""

CANDIDATE: Final = "mctd"
"""The method whose claims are judged."""
CONFIDENCE: Final = 0.95

MARGIN_SHARE: Final = 0.1


class Group(NamedTuple):
    """All runs of one method at one budget.

    Attributes:
        method: label of the method.
        budget: label of the budget.
        cells: what they come from.
        runs: by (prompt, seed).
    """

    method: str
    budget: str
    cells: tuple[Cell, ...]
    runs: dict[tuple[str, int], Run]

    def values(self, number: Callable[[Run], float | None]) -> dict[tuple[str, int], float]:
        """A number of every run that has it."""
        found = ((key, number(run)) for key, run in self.runs.items())
        return {key: float(value) for key, value in found if value is not None}

    @property
    def gold(self) -> dict[tuple[str, int], float]:
        """Gold of every run."""
        return self.values(lambda run: run.gold)

    @property
    def proxy(self) -> dict[tuple[str, int], float]:
        """Proxy of every run."""
        return self.values(lambda run: run.proxy)

    def mean(self, number: Callable[[Run], float]) -> float:
        """Mean of a number over all runs."""
        return float(np.mean(list(self.values(number).values())))

    @property
    def nfe(self) -> float:
        """Mean evaluations of an image."""
        return self.mean(lambda run: run.nfe)

    @property
    def cost(self) -> float:
        """Mean cost of an image."""
        return self.mean(cost_of)

    @property
    def budget_share(self) -> float | None:
        """Share of the budget's NFE that is spent; ``None`` for a budget of seconds."""
        allowed = self.cells[0].budget_nfe
        return None if allowed is None else self.nfe / allowed

    @property
    def useful_share(self) -> float:
        """Useful rows among all rows through the network."""
        rows = sum(run.rows for run in self.runs.values())
        return rows / (rows + sum(cell.drawn.padded_rows for cell in self.cells))

    @property
    def cpu_per_nfe(self) -> float:
        """CPU seconds of an NFE, decodes, previews and rewards left out."""
        cpu = [cell.drawn.cpu for cell in self.cells]
        outside = ("decode", "preview", "reward")
        seconds = sum(c["total"] - sum(c.get(phase, 0.0) for phase in outside) for c in cpu)
        return seconds / sum(run.nfe for cell in self.cells for run in cell.drawn.runs)

    @property
    def wall_per_nfe(self) -> float:
        """Wall-clock seconds of an NFE, all included."""
        seconds = sum(cell.drawn.seconds["call"] for cell in self.cells)
        return seconds / sum(run.nfe for cell in self.cells for run in cell.drawn.runs)


def over_seeds(values: Values) -> Float[np.ndarray, " prompts"]:
    """Means over the seeds, one for each prompt, in the order of the prompts' names."""
    found: dict[str, list[float]] = {}
    for (prompt, _), value in sorted(values.items()):
        found.setdefault(prompt, []).append(value)
    return np.array([np.mean(each) for each in found.values()], dtype=np.float64)


def difference(first: Values, second: Values) -> dict[tuple[str, int], float]:
    """``first - second`` where both are."""
    return {key: first[key] - second[key] for key in first if key in second}


def mixed(first: Values, second: Values, share: float) -> dict[tuple[str, int], float]:
    """``(1 - share) first + share second`` where both are."""
    return {key: (1 - share) * first[key] + share * second[key] for key in first if key in second}


def interval(values: Values) -> Interval:
    """Mean over prompts with its 95 % interval."""
    return bootstrap_mean(over_seeds(values), confidence=CONFIDENCE)


@dataclass(frozen=True)
class Results:
    """All groups of a benchmark.

    Attributes:
        groups: by (method, budget), plain first, then by budget and in the order of the plan.
    """

    groups: dict[tuple[str, str], Group]

    @classmethod
    def of(cls, cells: Sequence[Cell], budgets: Sequence[str], methods: Sequence[str]) -> Results:
        """Group cells.

        Args:
            cells: finished ones.
            budgets: labels, in the order in which they are to stand.
            methods: labels, likewise.

        Raises:
            ConfigError: there is no plain sample among the cells.
        """
        found: dict[tuple[str, str], list[Cell]] = {}
        for cell in cells:
            found.setdefault((cell.method, cell.budget), []).append(cell)
        order = sorted(
            found,
            key=lambda key: (
                key[0] != PLAIN,
                budgets.index(key[1]) if key[1] in budgets else -1,
                methods.index(key[0]),
            ),
        )
        if not order or order[0][0] != PLAIN:
            raise ConfigError(
                "there are no cells of the plain sample, by which gains are measured: run the "
                "bench a little longer"
            )
        groups = {}
        for key in order:
            some = tuple(found[key])
            runs = {(run.prompt, cell.seed): run for cell in some for run in cell.drawn.runs}
            groups[key] = Group(*key, some, runs)
        return cls(groups)

    @property
    def plain(self) -> Group:
        """The plain sample."""
        return next(iter(self.groups.values()))

    @property
    def methods(self) -> list[str]:
        """Labels of the methods besides the plain sample."""
        return list(dict.fromkeys(method for method, _ in self.groups if method != PLAIN))

    def name(self, method: str) -> str:
        """What tables and curves call a method: its settings are left out where nothing is lost.

        The report lists the settings of each. The candidate and the reference with settings of
        their own are never named like those without.
        """
        short = head(method)
        alike = [other for other in self.methods if head(other) == short]
        return method if len(alike) > 1 or short in (CANDIDATE, REFERENCE) else short

    @property
    def rivals(self) -> list[str]:
        """Methods that are not the candidate, in whatever settings."""
        return [method for method in self.methods if head(method) != CANDIDATE]

    @property
    def budgets(self) -> list[str]:
        """Labels of the budgets besides that of the plain sample."""
        return list(dict.fromkeys(budget for method, budget in self.groups if method != PLAIN))

    def at(self, method: str, budget: str) -> Group | None:
        """The group of a method at a budget, if there is one."""
        return self.groups.get((method, budget))

    def curve(self, method: str) -> list[Group]:
        """Groups of a method from the plain sample upwards, budgets of NFE only."""
        groups = [group for (label, _), group in self.groups.items() if label == method]
        with_nfe = [group for group in groups if group.cells[0].budget_nfe is not None]
        return [self.plain, *sorted(with_nfe, key=lambda group: group.cells[0].budget_nfe or 0)]

    @property
    def largest_reference(self) -> Group | None:
        """The reference at its largest budget of NFE."""
        curve = self.curve(REFERENCE)
        return curve[-1] if len(curve) > 1 else None

    @property
    def margin(self) -> float:
        """A tenth of what the largest reference gains over plain; 0 where it gains nothing."""
        largest = self.largest_reference
        if largest is None:
            return 0.0
        gain = over_seeds(difference(largest.gold, self.plain.gold)).mean()
        return max(0.0, MARGIN_SHARE * float(gain))

    def best_rival(self, budget: str) -> Group | None:
        """The rival with the highest mean gold at a budget, on the prompts of the report."""
        there = [self.groups[rival, budget] for rival in self.rivals if self.at(rival, budget)]
        return max(there, key=lambda group: over_seeds(group.gold).mean(), default=None)

    def gold_at_cost(self, method: str, cost: float) -> dict[tuple[str, int], float] | None:
        """Gold of a method at a cost, each run's interpolated linearly in the logarithm of cost.

        Args:
            method: label; its curve begins with the plain sample.
            cost: in row-equivalents.

        Returns:
            Gold by (prompt, seed); ``None`` outside the costs that were measured.
        """
        curve = sorted(self.curve(method), key=lambda group: group.cost)
        for low, high in itertools.pairwise(curve):
            if low.cost <= cost <= high.cost:
                share = np.log(cost / low.cost) / np.log(high.cost / low.cost)
                return mixed(low.gold, high.gold, float(share))
        return None


def head(label: str) -> str:
    """The name of a method without its settings."""
    return label.split(":", maxsplit=1)[0]


class Contest(NamedTuple):
    """The candidate against one rival at one budget.

    Attributes:
        budget: label.
        rival: label of the rival.
        gain: gold of the candidate above the rival's, with its interval.
        p_margin: p-value, Holm-adjusted over budgets, against "below by the margin or more".
        p_above: the same against "not above".
    """

    budget: str
    rival: str
    gain: Interval
    p_margin: float
    p_above: float


def contests(pairs: Iterable[tuple[str, str, Values]], margin: float) -> list[Contest]:
    """Test the candidate's gains at several budgets together.

    Args:
        pairs: budget, rival, and gold of the candidate minus the rival's.
        margin: how much below still counts as not inferior, at least 0.

    Returns:
        One contest for each pair; p-values are Holm-adjusted over all of them.
    """
    listed = list(pairs)
    units = [over_seeds(values) for _, _, values in listed]
    p_margin = holm(np.array([bootstrap_p_value(unit, bound=-margin) for unit in units]))
    p_above = holm(np.array([bootstrap_p_value(unit) for unit in units]))
    return [
        Contest(budget, rival, bootstrap_mean(unit), float(below), float(above))
        for (budget, rival, _), unit, below, above in zip(
            listed, units, p_margin, p_above, strict=True
        )
    ]


def against_best_rival(results: Results) -> list[Contest]:
    """The candidate against the best rival at each budget, at equal NFE."""
    pairs = []
    for budget in results.budgets:
        ours, rival = results.at(CANDIDATE, budget), results.best_rival(budget)
        if ours is not None and rival is not None:
            pairs.append((budget, rival.method, difference(ours.gold, rival.gold)))
    return contests(pairs, results.margin)


def against_best_rival_at_cost(results: Results) -> list[Contest]:
    """The same at the candidate's cost; budgets whose cost no rival's curve reaches are missing."""
    pairs = []
    for budget in results.budgets:
        ours = results.at(CANDIDATE, budget)
        if ours is None:
            continue
        theirs = {rival: results.gold_at_cost(rival, ours.cost) for rival in results.rivals}
        known = {rival: gold for rival, gold in theirs.items() if gold}
        if known:
            best = max(known, key=lambda rival: over_seeds(known[rival]).mean())
            pairs.append((budget, best, difference(ours.gold, known[best])))
    return contests(pairs, results.margin)


def against(results: Results, rival: str, candidate: str = CANDIDATE) -> list[Contest]:
    """The candidate, or another method, against one rival at each budget, at equal NFE."""
    pairs = []
    for budget in results.budgets:
        ours, theirs = results.at(candidate, budget), results.at(rival, budget)
        if ours is not None and theirs is not None:
            pairs.append((budget, rival, difference(ours.gold, theirs.gold)))
    return contests(pairs, results.margin)


def to_reach(sizes: Sequence[float], levels: Sequence[float], target: float) -> float | None:
    """The size at which a curve first reaches a level, interpolated in the logarithm of size.

    Args:
        sizes: ascending, above 0, such as NFE.
        levels: at each size, such as mean gold.
        target: the level to reach.

    Returns:
        The size; the first one where that is enough, ``None`` where none is.

    >>> to_reach([1, 4, 16], [0.0, 1.0, 2.0], 1.5)
    8.0
    """
    if levels[0] >= target:
        return float(sizes[0])
    for i in range(1, len(sizes)):
        if levels[i] >= target:
            share = (target - levels[i - 1]) / (levels[i] - levels[i - 1])
            low, high = np.log2(sizes[i - 1]), np.log2(sizes[i])
            return float(2 ** (low + share * (high - low)))
    return None


def _shared_gold(groups: Sequence[Group]) -> list[Float[np.ndarray, " prompts"]]:
    """Gold of groups by prompt, on the prompts and seeds that all of them have."""
    common = set.intersection(*(set(group.runs) for group in groups))
    return [over_seeds({key: group.runs[key].gold for key in common}) for group in groups]


class Match(NamedTuple):
    """NFE at which the candidate's mean gold reaches the largest reference's.

    Attributes:
        nfe: ``None`` where it is not reached.
        low: lower end of the 95 % interval over prompts; ``None`` likewise.
        high: upper end.
        reference: NFE of the reference.
    """

    nfe: float | None
    low: float | None
    high: float | None
    reference: float


def nfe_to_match(results: Results) -> Match | None:
    """What the candidate needs for the gold of the largest reference; ``None`` without curves."""
    curve, largest = results.curve(CANDIDATE), results.largest_reference
    if len(curve) < 2 or largest is None:
        return None
    sizes = [group.nfe for group in curve]
    gold = _shared_gold([*curve, largest])
    *levels, target = (float(each.mean()) for each in gold)
    # The same resamples for every group, so that they stay paired by prompt.
    resampled = np.stack([resampled_means(each) for each in gold])
    found = [to_reach(sizes, means[:-1], means[-1]) for means in resampled.T.tolist()]
    ends = np.quantile(
        [np.inf if nfe is None else nfe for nfe in found],
        [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2],
        method="nearest",
    )
    low, high = (None if end == np.inf else float(end) for end in ends)
    return Match(to_reach(sizes, levels, target), low, high, largest.nfe)


def share_to_match(results: Results, method: str, rival: str, budget: str) -> float | None:
    """Share of a rival's NFE at which a method's curve first has the rival's mean gold.

    Returns:
        ``None`` where it is not reached, or one of the two has no curve.
    """
    curve, theirs = results.curve(method), results.at(rival, budget)
    if len(curve) < 2 or theirs is None:
        return None
    *levels, target = (float(each.mean()) for each in _shared_gold([*curve, theirs]))
    nfe = to_reach([group.nfe for group in curve], levels, target)
    return None if nfe is None else nfe / theirs.nfe


def cost_to_match(results: Results) -> dict[str, tuple[str, float | None]]:
    """The share of the best rival's cost at which the candidate's gold reaches that rival's.

    Returns:
        By budget: the rival and the share; ``None`` where it is not reached.
    """
    curve = sorted(results.curve(CANDIDATE), key=lambda group: group.cost)
    found: dict[str, tuple[str, float | None]] = {}
    for budget in results.budgets:
        rival = results.best_rival(budget)
        if len(curve) < 2 or rival is None:
            continue
        *levels, target = (float(each.mean()) for each in _shared_gold([*curve, rival]))
        cost = to_reach([group.cost for group in curve], levels, target)
        found[budget] = rival.method, None if cost is None else cost / rival.cost
    return found


def gold_per_proxy(results: Results, method: str, budget: str) -> float | None:
    """Gold gained over plain for each unit of proxy gained, as a share of the reference's.

    Returns:
        ``None`` where one of the two, or a gain, is missing.
    """
    ratios = []
    for label in (method, REFERENCE):
        group = results.at(label, budget)
        if group is None:
            return None
        gold = over_seeds(difference(group.gold, results.plain.gold)).mean()
        proxy = over_seeds(difference(group.proxy, results.plain.proxy)).mean()
        if proxy <= 0:
            return None
        ratios.append(float(gold / proxy))
    return ratios[0] / ratios[1] if ratios[1] > 0 else None
