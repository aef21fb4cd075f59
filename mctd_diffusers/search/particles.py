"""Weights of a population of particles, and its resampling; logarithms throughout."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mctd_diffusers.search.environment import Values


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
