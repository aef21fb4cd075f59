"""Rules by which a search stops paying for what cannot win: formulas on the columns of a tree.

``bounds``
    A rollout is given up midway where its upper bound lies under the best finished reward, which is
    exact and so its own lower bound. The upper bound is ``value + shift_i + z * s_i``: the value of
    its denoised estimate, calibrated at its step index ``i`` (`calibration_at`). This is pruning
    between bounds as in branch and bound (Land and Doig, 1960) by the confidence intervals of
    action elimination (Even-Dar, Mannor and Mansour, 2006). Levels at which values cannot tell
    samples apart prune nothing (`can_tell_apart`, `is_right_often_enough`).
``siblings``
    No more siblings are tried on an edge once one more is expected to raise the best of them by
    less than ``least_gain`` of what rewards differ by (`expected_improvement`: Mockus, 1975; as a
    rule of stopping, that with recall of Chow and Robbins, 1961).
``gain``
    As ``bounds``, by the deviation that a gain model predicts to be still resolved below the node
    itself (`still_resolved`), in the place of what the search measured.
``memory``
    At most ``max_live`` evaluated samples stay live, the least valuable go first
    (`least_valuable`); those under way and finished ones stay.
``particles``
    When a fused sample has led to a better sample than any of its particles has, those particles
    below which nothing is finished go (`beaten_particles`).

By all of them, samples that the search will not go on from are released (``unused``). A pruned node
keeps its row and all its numbers, and its recipe still makes it again: only its sample is gone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.environment import Values
from mctd_diffusers.search.tree import FUSE, ROOT, Nodes, Tree

RULES: Final = ("bounds", "siblings", "gain", "memory", "particles")
"""Names of the rules, to be joined by ``+``."""
UNUSED: Final = "unused"
"""In the place of a rule: nothing would have gone on from the node."""

_NORMAL: Final = NormalDist()
_LEAST_KNOWN: Final = 4  # outcomes by which a level is calibrated
_LEAST_ACCURACY: Final = 0.6  # of pairs, below which values tell nothing
_GAP_AT_THE_END, _GAP_AT_THE_START = 0.35, 0.5  # of LPO for Stable Diffusion 1.5
_RANGE_OF_FOUR: Final = 2.059  # expected, of four standard normal draws: the siblings of LPO


@runtime_checkable
class MayPrune(Protocol):
    """A strategy that gives up what cannot win, by rules."""

    @property
    def rules(self) -> tuple[str, ...]:
        """Names in :data:`RULES`."""
        ...


def parse_pruning(text: str) -> tuple[str, ...]:
    """The rules that a setting names.

    Args:
        text: names of rules joined by ``+``, ``"all"`` of them that need no model of their own, or
            ``"none"``.

    Raises:
        ConfigError: a name is unknown, or stands there twice.

    >>> parse_pruning("bounds+memory")
    ('bounds', 'memory')
    """
    if text == "none":
        return ()
    if text == "all":
        return tuple(rule for rule in RULES if rule != "gain")
    names = tuple(text.split("+"))
    if not set(names) <= set(RULES) or len(set(names)) < len(names):
        raise ConfigError(
            f"pruning is {text!r}; give 'none', 'all', or some of {', '.join(RULES)} joined by '+'."
        )
    return names


@dataclass
class Savings:
    """What pruning has saved of one image's search, and what it must not touch.

    Attributes:
        evaluations: planned and not made. They are not spent elsewhere.
        rewards: finished samples planned and not scored.
        under_way: how many rollouts stand at a node, by its row.
    """

    evaluations: int = 0
    rewards: int = 0
    under_way: Counter[int] = field(default_factory=Counter)

    def hold(self, nodes: Sequence[int]) -> None:
        """Note that a rollout stands at ``nodes``."""
        self.under_way.update(nodes)

    def let_go(self, nodes: Sequence[int]) -> None:
        """Take back one :meth:`hold`."""
        self.under_way.subtract(nodes)

    def is_held(self, node: int) -> bool:
        """Whether a rollout stands at ``node``."""
        return self.under_way[node] > 0


# ---- bounds


class Calibration(NamedTuple):
    """What the values of one step index tell of outcomes, within one search.

    Attributes:
        shift: mean of outcome minus value, reward units.
        deviation: of the outcome of one more sample about its shifted value, reward units.
        accuracy: share of pairs that the values put in the order of their outcomes, ties a half;
            NaN where no two outcomes differ.
    """

    shift: float
    deviation: float
    accuracy: float


def calibration_at(tree: Tree, step_index: int) -> Calibration | None:
    """What values at a step index tell, by the search's own finished samples below valued nodes.

    The residuals ``d = max_value - value`` (the best that came of a node, above its own estimate)
    of the ``n`` valued nodes at the step index give ``shift = mean(d)`` and, shrunk towards the
    spread ``s0`` of all finished rewards (as if values told nothing) by the weight of one
    observation,

        ``s^2 = (s0^2 + sum (d - shift)^2) / n``,  ``deviation = s sqrt(1 + 1 / n)``,

    the last for the error of the shift. Where fewer than four are known, the nearest noisier level
    that has them stands in, whose deviation is larger.

    Returns:
        ``None`` where no level tells anything yet.
    """
    known = np.isfinite(tree.value) & (tree.visit_count > 0)
    levels, counts = np.unique(tree.step_index[known], return_counts=True)
    usable = levels[(levels <= step_index) & (counts >= _LEAST_KNOWN)]
    if not usable.size:
        return None
    there = known & (tree.step_index == usable[-1])
    values, outcomes = tree.value[there], tree.max_value[there]
    residuals = outcomes - values
    number = len(residuals)
    prior = float(np.nanvar(tree.reward))
    shift = float(residuals.mean())
    variance = (prior + float(((residuals - shift) ** 2).sum())) / number
    return Calibration(
        shift, math.sqrt(variance * (1 + 1 / number)), pair_accuracy(values, outcomes)
    )


def pair_accuracy(values: Values, outcomes: Values) -> float:
    """Share of pairs that ``values`` put in the order of their ``outcomes``; NaN without pairs.

    >>> pair_accuracy(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))
    0.6666666666666666
    """
    first, second = np.triu_indices(len(values), 1)
    by_value = np.sign(values[first] - values[second])
    by_outcome = np.sign(outcomes[first] - outcomes[second])
    differ = by_outcome != 0
    if not differ.any():
        return math.nan
    return float((1 + by_value * by_outcome)[differ].mean() / 2)


def can_tell_apart(values: Values, deviation: float, *, step_index: int, num_steps: int) -> bool:
    """Whether values at a step index differ by more than outcomes do by themselves.

    After the threshold of LPO (Zhang et al., 2025, arXiv 2502.01051): the best and the worst of
    four siblings tell something where the gap of their softmax probabilities is above

        ``th_t = th_min + (sigma_t - sigma_min) / (sigma_max - sigma_min) (th_max - th_min)``,

    0.35 at the end of the schedule to 0.5 at its start. Values are divided by ``deviation``, which
    makes them logits, and four of them span 2.06 standard deviations, so the gap is
    ``tanh(1.03 sd(values) / deviation)``; the share of the schedule that is left stands for sigma.

    Args:
        values: of samples at that level, finite.
        deviation: of outcomes about calibrated values there, reward units.
        step_index: position in the schedule, 0 is noisiest.
        num_steps: of the schedule.
    """
    if len(values) < 2:
        return False
    spread = float(np.std(values, ddof=1))
    gap = math.tanh(_RANGE_OF_FOUR * spread / (2 * deviation)) if deviation else float(spread > 0)
    left = 1 - step_index / num_steps
    return gap > _GAP_AT_THE_END + left * (_GAP_AT_THE_START - _GAP_AT_THE_END)


def is_hopeless(tree: Tree, node: int, *, num_steps: int, confidence: float) -> bool:
    """Whether the upper bound of a valued node lies under the best finished reward.

    Never at levels where values cannot tell samples apart: pairs of finished ones are ordered
    rightly less than 60 % of the time, or `can_tell_apart` says no.

    Args:
        tree: of the search.
        node: valued and not finished.
        num_steps: of the schedule.
        confidence: deviations between a calibrated value and its upper bound, at least 0.
    """
    step_index = int(tree.step_index[node])
    calibration = calibration_at(tree, step_index)
    if calibration is None or not calibration.accuracy >= _LEAST_ACCURACY:
        return False
    there = (tree.step_index == step_index) & np.isfinite(tree.value)
    if not can_tell_apart(
        tree.value[there], calibration.deviation, step_index=step_index, num_steps=num_steps
    ):
        return False
    upper = tree.value[node] + calibration.shift + confidence * calibration.deviation
    return bool(upper < incumbent(tree))


def incumbent(tree: Tree) -> float:
    """Best finished reward; minus infinity where none is."""
    return float(np.nanmax(tree.reward, initial=-np.inf))


# ---- siblings


def expected_improvement(values: Values) -> float:
    """How much one more sibling is expected to raise the best, if siblings are normal.

    ``s (phi(u) - u (1 - Phi(u)))`` with ``u = (max - mean) / s`` and the standard deviation ``s``
    of those seen (Mockus, 1975).

    Args:
        values: of the siblings so far, at least two.
    """
    spread = float(np.std(values, ddof=1))
    if not spread:
        return 0.0
    u = (float(values.max()) - float(values.mean())) / spread
    return spread * (_NORMAL.pdf(u) - u * (1 - _NORMAL.cdf(u)))


def pays_another(tree: Tree, siblings: Sequence[int], *, least_gain: float) -> bool:
    """Whether one more sibling is expected to gain ``least_gain`` of what rewards differ by.

    That is the spread of the siblings' own values, or that of four or more finished rewards where
    it is wider: early in a search nothing else is known, and late siblings may differ by little.
    """
    values = tree.value[list(siblings)]
    rewards = tree.reward[np.isfinite(tree.reward)]
    spread = float(np.std(values, ddof=1))
    if len(rewards) >= _LEAST_KNOWN:
        spread = max(spread, float(np.std(rewards, ddof=1)))
    return expected_improvement(values) > least_gain * spread


# ---- gain


def still_resolved(
    log_variance: npt.NDArray[np.float64], strides: Sequence[int], steps_left: int
) -> float:
    """Deviation of the value that what is left of the schedule resolves, by a gain model.

    The variance that the longest predicted jump resolves, by the step of the schedule, goes on for
    all that is left: ``sqrt(exp(log_variance) * steps_left / stride)``.

    Args:
        log_variance: ``[strides]`` natural log of the variance that jumps resolve, squared reward
            units; NaN where it is not known.
        strides: of the jumps.
        steps_left: of the schedule, at least 1.

    Returns:
        Reward units; infinity where nothing is known.
    """
    known = [i for i in range(len(strides)) if not math.isnan(log_variance[i])]
    if not known:
        return math.inf
    longest = max(known, key=lambda i: strides[i])
    return math.sqrt(math.exp(float(log_variance[longest])) * steps_left / strides[longest])


def lacks_more(tree: Tree, node: int, resolved: float, *, confidence: float) -> bool:
    """Whether a valued node lacks more to the best finished reward than is still resolved."""
    calibration = calibration_at(tree, int(tree.step_index[node]))
    if calibration is None:
        return False
    lack = incumbent(tree) - (tree.value[node] + calibration.shift)
    return bool(lack > confidence * resolved)


# ---- memory and particles


def least_valuable(tree: Tree, savings: Savings, *, num_steps: int, most: int) -> list[int]:
    """Evaluated nodes to release, so that at most ``most`` stay live.

    First those without a value of their own that have been gone on from, then by their calibrated
    value, the lowest first; finished nodes and those under way are never among them, nor what leads
    to the best finished sample, from which a search likes to go on.

    Returns:
        Rows; as many as are too many, or as can be released.
    """
    live = np.flatnonzero(tree.live & tree.evaluated)
    excess = len(live) - most
    if excess <= 0:
        return []
    kept = set(_best_path(tree))
    free = [
        int(node)
        for node in live
        if tree.step_index[node] < num_steps
        and not tree.in_flight[node]
        and not savings.is_held(int(node))
        and int(node) not in kept
    ]
    levels = {int(tree.step_index[node]) for node in free}
    shifts = {
        level: 0.0 if (known := calibration_at(tree, level)) is None else known.shift
        for level in levels
    }

    def worth(node: int) -> tuple[bool, float, int]:
        value = float(tree.value[node])
        if math.isnan(value):
            return (not tree.children(node), -math.inf, node)
        expected = value + shifts[int(tree.step_index[node])]
        return (True, max(expected, float(tree.max_value[node])), node)

    return sorted(free, key=worth)[:excess]


def _best_path(tree: Tree) -> list[int]:
    """Rows from the best finished node to the root; none where nothing is finished."""
    if np.isnan(tree.reward).all():
        return []
    path, node = [], int(np.nanargmax(tree.reward))
    while node != ROOT:
        path.append(node)
        node = int(tree.parent[node])
    return path


def beaten_particles(tree: Tree) -> list[int]:
    """Live particles of fused nodes that lost to what they fused into.

    A fused node has beaten its particles when the best finished below it is above the best finished
    below any of them. Those below which nothing is finished go.
    """
    beaten: set[int] = set()
    for node in np.flatnonzero(tree.move == FUSE).tolist():
        fusion = tree.fusion_of(node)
        assert fusion is not None
        particles = list(fusion.particles)
        if tree.max_value[node] > tree.max_value[particles].max():
            beaten |= {row for row in particles if tree.live[row] and not tree.visit_count[row]}
    return sorted(beaten)


def pruned_ends(tree: Tree) -> Nodes:
    """Pruned nodes that nothing was made from: where a search stopped short.

    What is ``unused`` is not among them: by no rule was it expected to lose.
    """
    return np.array(
        [
            node
            for node in np.flatnonzero(~tree.live).tolist()
            if tree.pruned_by(node) != UNUSED and not tree.children(node)
        ],
        dtype=np.int64,
    )
