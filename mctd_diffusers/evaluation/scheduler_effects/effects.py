"""What the cells of a comparison of schedulers say: effects, interactions and a recommendation.

Pure arithmetic. All samples start from the same noise, so every difference is paired by prompt and
seed; prompts are the units, and intervals are those of the percentile bootstrap over them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Float

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.cells import Cell, Run
from mctd_diffusers.evaluation.benchmark.comparison import (
    Group,
    difference,
    interval,
    mixed,
    over_seeds,
)
from mctd_diffusers.evaluation.benchmark.plan import PLAIN
from mctd_diffusers.evaluation.metrics import Interval, bootstrap_mean
from mctd_diffusers.evaluation.scheduler_effects.comparison import (
    Arm,
    Comparison,
    Condition,
    arm_of,
)

NFE_APART: Final = 0.02
"""Share by which two conditions may differ in measured NFE, and still count as equal."""


@dataclass(frozen=True)
class SchedulerResults:
    """All runs of a comparison.

    Attributes:
        groups: by condition, in the order of the design.
        reference: name of the scheduler that the others are compared with.
    """

    groups: dict[Condition, Group]
    reference: str

    @classmethod
    def of(cls, comparison: Comparison, cells: Mapping[str, Sequence[Cell]]) -> SchedulerResults:
        """Group cells.

        Args:
            comparison: what is compared.
            cells: those that are there, by the name of the scheduler.

        Raises:
            ConfigError: none is of the reference.
        """
        found: dict[Condition, list[Cell]] = {}
        for named in comparison.schedulers:
            arms = {method.label: arm_of(method) for method in comparison.plan_of(named).methods}
            for cell in cells.get(named.name, ()):
                condition = Condition(named.name, arms[cell.method], cell.budget)
                found.setdefault(condition, []).append(cell)
        order = [condition for condition in comparison.conditions() if condition in found]
        if all(condition.scheduler != comparison.reference for condition in order):
            raise ConfigError(
                f"there are no cells of {comparison.reference}, which the others are compared "
                "with: go on a little longer"
            )
        groups = {}
        for condition in order:
            some = tuple(found[condition])
            runs = {(run.prompt, cell.seed): run for cell in some for run in cell.drawn.runs}
            groups[condition] = Group(condition.arm.label, condition.budget, some, runs)
        return cls(groups, comparison.reference)

    @property
    def schedulers(self) -> list[str]:
        """Names, in order."""
        return list(dict.fromkeys(condition.scheduler for condition in self.groups))

    @property
    def arms(self) -> list[Arm]:
        """Arms, in order."""
        return list(dict.fromkeys(condition.arm for condition in self.groups))

    def budgets(self, arm: Arm) -> list[str]:
        """Budgets of an arm, in order."""
        return list(dict.fromkeys(c.budget for c in self.groups if c.arm == arm))

    def at(self, scheduler: str, arm: Arm, budget: str) -> Group | None:
        """The runs of a condition, if there are any."""
        return self.groups.get(Condition(scheduler, arm, budget))

    def above_reference(self, condition: Condition) -> Interval | None:
        """Gold above that of the reference with the same arm, at the NFE that was spent."""
        if condition.scheduler == self.reference:
            return None
        group = self.groups[condition]
        base = self.gold_at(self.reference, condition, group.nfe)
        shared = difference(group.gold, base)
        return interval(shared) if shared else None

    def gold_at(
        self, scheduler: str, condition: Condition, nfe: float
    ) -> Mapping[tuple[str, int], float]:
        """Gold of a scheduler with the arm of a condition, at so many measured NFE.

        That of the same budget where as much was spent, within `NFE_APART`; else each run's,
        interpolated linearly in the logarithm of NFE between the budgets that are nearest, and
        beyond all budgets that of the nearest.

        Returns:
            Gold by (prompt, seed); empty where nothing is there.
        """
        same = self.at(scheduler, condition.arm, condition.budget)
        if same is not None and abs(same.nfe - nfe) <= NFE_APART * nfe:
            return same.gold
        found = (self.at(scheduler, condition.arm, b) for b in self.budgets(condition.arm))
        curve = sorted((g for g in found if g is not None), key=lambda group: group.nfe)
        if not curve:
            return {}
        for low, high in itertools.pairwise(curve):
            if low.nfe <= nfe <= high.nfe and low.nfe < high.nfe:
                share = np.log(nfe / low.nfe) / np.log(high.nfe / low.nfe)
                return mixed(low.gold, high.gold, float(share))
        return curve[0 if nfe < curve[0].nfe else -1].gold


# Factors


class Factor(NamedTuple):
    """One way in which conditions differ.

    Attributes:
        name: ``"scheduler"``, ``"strategy"``, ``"stride policy"`` or ``"budget"``.
        levels: labels; at least one.
        reference: the level that the others are compared with.
    """

    name: str
    levels: tuple[str, ...]
    reference: str

    @property
    def others(self) -> list[str]:
        """Levels besides the reference."""
        return [level for level in self.levels if level != self.reference]


@dataclass(frozen=True)
class Design:
    """Every scheduler with every arm at every budget, so that each effect is a mean over the rest.

    Attributes:
        factors: scheduler, what tells the arms apart, budget.
        gold: ``[prompts, schedulers, arms, budgets]``, means over seeds.
        proxy: likewise, the reward that was searched.
    """

    factors: tuple[Factor, Factor, Factor]
    gold: Float[np.ndarray, "prompts schedulers arms budgets"]
    proxy: Float[np.ndarray, "prompts schedulers arms budgets"]


def designs(results: SchedulerResults) -> list[Design]:
    """The designs that the conditions fill: of strategies, and of stride policies.

    The first has one arm of each strategy, that of its first stride policy; another follows for
    each strategy with several policies. Schedulers without one of the arms are left out, and
    budgets that some arm has not (a search has none at the price of one sample).
    """
    firsts: dict[str, Arm] = {}
    policies: dict[str, list[Arm]] = {}
    for arm in results.arms:
        firsts.setdefault(arm.strategy, arm)
        policies.setdefault(arm.strategy, []).append(arm)
    wanted = [("strategy", list(firsts.values()))]
    wanted += [
        (f"stride policy of {name}", arms) for name, arms in policies.items() if len(arms) > 1
    ]
    found = [_design(results, name, arms) for name, arms in wanted]
    return [design for design in found if design is not None]


def _design(results: SchedulerResults, name: str, arms: Sequence[Arm]) -> Design | None:
    """A complete design over some arms; ``None`` where the reference has no budget for them."""
    budgets = [
        budget
        for budget in results.budgets(arms[-1])
        if all(results.at(results.reference, arm, budget) for arm in arms)
    ]
    schedulers = [
        scheduler
        for scheduler in results.schedulers
        if all(results.at(scheduler, *each) for each in itertools.product(arms, budgets))
    ]
    if not budgets:
        return None
    groups = [
        results.groups[Condition(*each)] for each in itertools.product(schedulers, arms, budgets)
    ]
    common = set.intersection(*(set(group.runs) for group in groups))
    if not common:
        return None
    shape = (-1, len(schedulers), len(arms), len(budgets))

    def stacked(number: Callable[[Run], float]) -> Float[np.ndarray, "prompts _ _ _"]:
        columns = [over_seeds({key: number(g.runs[key]) for key in common}) for g in groups]
        return np.stack(columns, axis=1).reshape(shape)

    labels = [arm.policy if "policy" in name else arm.label for arm in arms]
    return Design(
        (
            Factor("scheduler", tuple(schedulers), results.reference),
            Factor(name, tuple(labels), labels[0]),
            Factor("budget", tuple(budgets), budgets[0]),
        ),
        stacked(lambda run: run.gold),
        stacked(lambda run: run.proxy),
    )


class Effect(NamedTuple):
    """One level of a factor, all else averaged.

    Attributes:
        level: label.
        gold: mean.
        more_gold: above the reference level, paired; ``None`` of that level itself.
        proxy: mean.
        more_proxy: likewise.
    """

    level: str
    gold: Interval
    more_gold: Interval | None
    proxy: Interval
    more_proxy: Interval | None


def marginal_effects(design: Design, factor: Factor) -> list[Effect]:
    """Every level of a factor, averaged over all others."""
    gold, proxy = (_by_level(design, values, factor) for values in (design.gold, design.proxy))
    base = factor.reference
    return [
        Effect(
            level,
            bootstrap_mean(gold[level]),
            None if level == base else bootstrap_mean(gold[level] - gold[base]),
            bootstrap_mean(proxy[level]),
            None if level == base else bootstrap_mean(proxy[level] - proxy[base]),
        )
        for level in factor.levels
    ]


def _by_level(
    design: Design, values: Float[np.ndarray, "prompts _ _ _"], factor: Factor
) -> dict[str, Float[np.ndarray, " prompts"]]:
    """Means of each prompt by the levels of a factor."""
    axis = design.factors.index(factor) + 1
    rest = tuple(other for other in (1, 2, 3) if other != axis)
    means = values.mean(axis=rest)
    return {level: means[:, place] for place, level in enumerate(factor.levels)}


def interactions(design: Design, first: Factor, second: Factor) -> dict[tuple[str, str], Interval]:
    """How much more gold a level of one factor brings with a level of another.

    ``(g[a, b] - g[a0, b]) - (g[a, b0] - g[a0, b0])``, with the reference levels ``a0`` and ``b0``,
    the third factor averaged: 0 where effects add up.
    """
    axes = [design.factors.index(factor) + 1 for factor in (first, second)]
    (third,) = {1, 2, 3} - set(axes)
    means = design.gold.mean(axis=third)
    if axes[0] > axes[1]:
        means = means.swapaxes(1, 2)

    def gold(a: str, b: str) -> Float[np.ndarray, " prompts"]:
        return np.asarray(means[:, first.levels.index(a), second.levels.index(b)])

    a0, b0 = first.reference, second.reference
    return {
        (a, b): bootstrap_mean((gold(a, b) - gold(a0, b)) - (gold(a, b0) - gold(a0, b0)))
        for a in first.others
        for b in second.others
    }


# The recommendation


class Contender(NamedTuple):
    """One scheduler that may be recommended.

    Attributes:
        scheduler: name.
        gold: mean over budgets and prompts.
        below_best: gold above that of the best, paired; at most 0 in the mean.
        is_level: whether the interval is not below the best.
    """

    scheduler: str
    gold: float
    below_best: Interval
    is_level: bool


class Recommendation(NamedTuple):
    """The scheduler to take with an arm.

    Attributes:
        arm: what it is recommended for.
        budgets: that it is by.
        chosen: name.
        contenders: all schedulers that have the arm, best first.
    """

    arm: Arm
    budgets: tuple[str, ...]
    chosen: str
    contenders: tuple[Contender, ...]


RULE: Final = (
    "Recommended is the scheduler with the highest mean gold over the budgets; where the 95 % "
    "interval of the paired difference of the default from it is not below 0, that is a tie, and "
    "the default stays."
)


def recommend(results: SchedulerResults, arm: Arm) -> Recommendation | None:
    """The scheduler to take with an arm, by `RULE`; ``None`` where nothing can be compared."""
    budgets = [b for b in results.budgets(arm) if results.at(results.reference, arm, b)]
    schedulers = [s for s in results.schedulers if all(results.at(s, arm, b) for b in budgets)]
    if len(schedulers) < 2 or not budgets:
        return None
    groups = {s: [results.groups[Condition(s, arm, b)] for b in budgets] for s in schedulers}
    common = set.intersection(*(set(g.runs) for some in groups.values() for g in some))
    if not common:
        return None
    gold = {
        scheduler: np.mean(
            [over_seeds({key: g.runs[key].gold for key in common}) for g in some], axis=0
        )
        for scheduler, some in groups.items()
    }
    order = sorted(schedulers, key=lambda scheduler: -gold[scheduler].mean())
    best = order[0]
    contenders = []
    for scheduler in order:
        below = bootstrap_mean(gold[scheduler] - gold[best])
        contenders.append(
            Contender(scheduler, float(gold[scheduler].mean()), below, below.high >= 0)
        )
    level = [contender.scheduler for contender in contenders if contender.is_level]
    chosen = results.reference if results.reference in level else best
    return Recommendation(arm, tuple(budgets), chosen, tuple(contenders))


def default_arm(results: SchedulerResults) -> Arm:
    """The arm of the default search, by which the default scheduler is chosen; else the last."""
    searches = [arm for arm in results.arms if arm.strategy == "mctd"]
    others = [arm for arm in results.arms if arm.strategy != PLAIN]
    return (searches or others or results.arms)[0]
