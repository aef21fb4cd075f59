"""Weighted particles: their weights and resampling, and which nodes of a tree are such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mctd_diffusers.search.backups import BackupFn
from mctd_diffusers.search.environment import Values
from mctd_diffusers.search.selection import best_first, calibrated
from mctd_diffusers.search.tree import ROOT, Tree


def log_mean_weight(log_weights: Values) -> float:
    """Log of the mean weight of ``[P]`` particles."""
    return float(np.logaddexp.reduce(log_weights) - np.log(len(log_weights)))


def normalised_weights(log_weights: Values) -> Values:
    """``[P]`` weights that sum to 1.

    >>> normalised_weights(np.log([1.0, 3.0])).tolist()
    [0.25, 0.75]
    """
    weights = np.exp(log_weights - log_weights.max())
    return np.asarray(weights / weights.sum())


def ess(log_weights: Values) -> float:
    """Effective sample size ``1 / sum w^2`` of normalised weights (Kong, Liu and Wong, 1994).

    Returns:
        1, where one particle has all the weight, to the number of particles, where all are equal.

    >>> round(ess(np.log([8.0, 1.0, 1.0, 1.0])), 3)
    1.806
    """
    return float(1 / (normalised_weights(log_weights) ** 2).sum())


def systematic(log_weights: Values, uniform: float) -> npt.NDArray[np.int64]:
    """Systematic resampling (Kitagawa, 1996): the points ``(uniform + i) / P`` pick the particles.

    A particle is picked ``P w`` times on average over ``uniform``, rounded up or down.

    Args:
        log_weights: ``[P]``, not all ``-inf``.
        uniform: 0 to 1 (exclusive), the only chance in it.

    Returns:
        ``[P]`` positions of the ancestors, in ascending order.

    >>> systematic(np.log([8.0, 1.0, 1.0, 1.0]), 0.5).tolist()
    [0, 0, 0, 2]
    """
    cumulative = np.cumsum(normalised_weights(log_weights))
    points = (uniform + np.arange(len(log_weights))) / len(log_weights)
    points = np.minimum(points * cumulative[-1], np.nextafter(cumulative[-1], 0))
    return np.searchsorted(cumulative, points, side="right")


@dataclass(frozen=True)
class ParticleSet:
    """Nodes of a tree at one step index, weighted by ``softmax(score / temperature)``.

    Siblings are particles of ``p(x_{t-k} | x_t)``; nodes across the tree are particles of the law
    of samples at that step.

    Attributes:
        nodes: rows, each once, at least one.
        scores: ``[particles]`` in reward units, finite.
        temperature: in units of the scores, above 0; infinity for equal weights.
    """

    nodes: tuple[int, ...]
    scores: Values
    temperature: float

    @cached_property
    def weights(self) -> Values:
        """``[particles]``, which sum to 1."""
        return normalised_weights(self._logarithms)

    @cached_property
    def ess(self) -> float:
        """Effective number of particles, 1 to their number."""
        return ess(self._logarithms)

    @property
    def mean(self) -> float:
        """Plain mean of the scores."""
        return float(self.scores.mean())

    @property
    def weighted_mean(self) -> float:
        """Mean of the scores by weight."""
        return float(self.weights @ self.scores)

    @property
    def soft_value(self) -> float:
        """``temperature log mean exp(score / temperature)``: from the mean to the greatest."""
        if self.temperature == np.inf:
            return self.mean
        top = float(self.scores.max())
        shifted = (self.scores - top) / self.temperature
        return top + self.temperature * float(np.log(np.exp(shifted).mean()))

    @property
    def _logarithms(self) -> Values:
        # A temperature near 0 leaves the greatest alone.
        with np.errstate(over="ignore"):
            return np.asarray((self.scores - self.scores.max()) / self.temperature)


def particle_set(
    nodes: Sequence[int], scores: Values, temperature: float, *, relative: bool = True
) -> ParticleSet:
    """Weighted particles of scored nodes.

    Args:
        nodes: rows.
        scores: of each, in reward units.
        temperature: above 0.
        relative: whether the temperature is in standard deviations of the scores, not in reward
            units. Scores that are all equal weigh the same either way.
    """
    unit = float(scores.std()) if relative else 1.0
    return ParticleSet(tuple(nodes), scores, temperature * unit if unit > 0 else np.inf)


def scores_of(tree: Tree, nodes: Sequence[int], backup_fn: BackupFn) -> Values:
    """What nodes at one step index may be expected to lead to; NaN where nothing is known of one.

    Rewards where something was finished below, else estimates, shifted by what the estimates of the
    others are off.
    """
    rows = list(nodes)
    return calibrated(tree.value[rows], backup_fn(tree, rows))


def particles_at(tree: Tree, step_index: int, backup_fn: BackupFn) -> tuple[list[int], Values]:
    """The evaluated, scored and live nodes at a step index, with their scores; best first."""
    rows = np.flatnonzero((tree.step_index == step_index) & tree.evaluated & tree.live)
    return _scored(tree, rows.tolist(), backup_fn)


def children_particles(tree: Tree, node: int, backup_fn: BackupFn) -> tuple[list[int], Values]:
    """The evaluated, scored and live children of a node at the step index of most of them.

    The noisier one where two hold as many; best first, with their scores.
    """
    rows = [child for child in tree.children(node) if tree.evaluated[child] and tree.live[child]]
    if not rows:
        return [], np.empty(0)
    levels, counts = np.unique(tree.step_index[rows], return_counts=True)
    level = levels[np.argmax(counts)]
    return _scored(tree, [row for row in rows if tree.step_index[row] == level], backup_fn)


def one_of_each_family(tree: Tree, nodes: Sequence[int]) -> list[int]:
    """Nodes without those whose parent has one among them already; draws have none in common."""
    families: set[int] = set()
    kept = []
    for node in nodes:
        parent = int(tree.parent[node])
        if parent == ROOT or parent not in families:
            families.add(parent)
            kept.append(node)
    return kept


def _scored(tree: Tree, rows: list[int], backup_fn: BackupFn) -> tuple[list[int], Values]:
    if not rows:
        return [], np.empty(0)
    scores = scores_of(tree, rows, backup_fn)
    known = np.flatnonzero(np.isfinite(scores))
    order = known[best_first(scores[known])]
    return [rows[i] for i in order], scores[order]
