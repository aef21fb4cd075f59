"""Which of several siblings to look at next: formulas on arrays, nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mctd_diffusers.search.environment import Values

VisitCounts = npt.NDArray[np.int64]


def min_max(values: Values) -> Values:
    """Values mapped to [0, 1] by their own smallest and largest (as MuZero does).

    Rewards have no common scale, and estimates at different noise levels are not comparable, so a
    weight for exploration only means something after this, among siblings.

    Returns:
        ``[K]``; all 0 where all values are equal.
    """
    low = values.min(initial=np.inf)
    spread = values.max(initial=-np.inf) - low
    return np.asarray((values - low) / spread) if spread > 0 else np.zeros_like(values)


def uct_scores(
    value: Values,
    visit_count: VisitCounts,
    in_flight: VisitCounts,
    *,
    exploration: float,
    redundancy_weight: float = 1.0,
) -> Values:
    """Upper confidence scores of siblings, with simulations under way counted (WU-UCT).

    ``value + exploration * sqrt(2 ln sum(n + w o) / (n + w o))`` after Liu et al. (2020, arXiv
    1810.11755, equation 4), the sum being over the siblings; the weight ``w`` is that of P-MCTD
    (2025, arXiv 2506.09498: redundancy-aware selection). Without simulations under way it is UCT
    (Kocsis and Szepesvari, 2006).

    Args:
        value: ``[K]``, as :func:`min_max` gives; ignored where nothing was looked at.
        visit_count: ``[K]`` looks at each sibling.
        in_flight: ``[K]`` looks under way.
        exploration: weight of the bonus, in units of ``value``.
        redundancy_weight: looks that one under way counts for, at least 0.

    Returns:
        ``[K]`` scores; ``+inf`` where nothing was looked at and nothing under way counts.
    """
    looks = visit_count + redundancy_weight * in_flight
    new = looks == 0
    total = np.log(max(float(looks.sum()), 1.0))
    bonus = exploration * np.sqrt(2 * total / np.where(new, 1, looks))
    return np.where(new, np.inf, np.where(new, 0.0, value) + bonus)


def boltzmann(values: Values, temperature: float, generator: np.random.Generator) -> int:
    """Draw a sibling with a probability proportional to ``exp(value / temperature)``.

    Args:
        values: ``[K]`` in reward units, finite, at least one.
        temperature: in reward units, above 0.
        generator: gives one uniform number.

    Returns:
        Its position.
    """
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the greatest alone
        cumulative = np.cumsum(np.exp((values - values.max()) / temperature))
    position = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return min(int(position), len(values) - 1)  # the product may round up to the sum


def calibrated(value: Values, outcome: Values) -> Values:
    """What siblings may be expected to lead to: outcomes where known, else shifted estimates.

    The estimate of an unfinished sample is biased (blur has its own reward), by about the same
    amount for siblings, since they stand at the same noise level. So a sibling without outcome is
    expected to lead to its own estimate plus the mean of ``outcome - value`` over those with one.

    Args:
        value: ``[K]`` own estimates; NaN where there is none.
        outcome: ``[K]`` backed-up rewards; NaN where nothing was finished below.

    Returns:
        ``[K]``; NaN where neither is known.

    >>> calibrated(np.array([1.0, 3.0]), np.array([np.nan, 2.0])).tolist()
    [0.0, 2.0]
    """
    both = ~np.isnan(outcome) & ~np.isnan(value)
    shift = float((outcome - value)[both].mean()) if both.any() else 0.0
    return np.where(np.isnan(outcome), value + shift, outcome)


def best_first(values: Values) -> npt.NDArray[np.int64]:
    """Positions from the highest value to the lowest; the first of equals comes first."""
    return np.argsort(-values, kind="stable")
