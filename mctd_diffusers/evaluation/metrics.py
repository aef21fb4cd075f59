"""Numbers about samples: intervals over prompts, distances of sets of pictures, diversity."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mctd_diffusers.errors import ConfigError

_RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean with its bootstrap interval.

    Attributes:
        mean: of the values as they are.
        low: lower end of the interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Float[np.ndarray, " prompts"], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Return the mean over prompts with its percentile bootstrap interval (10,000 resamples).

    Args:
        values: one for each prompt; the prompts are what is drawn again.
        confidence: coverage of the interval, between 0 and 1.
        seed: of the resampling.

    Raises:
        ConfigError: there are no values.

    Reference: Efron and Tibshirani, "An introduction to the bootstrap" (1993), chapter 13.
    """
    tail = 50 * (1 - confidence)
    low, high = np.percentile(resampled_means(values, seed=seed), [tail, 100 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def kernel_distance(
    first: Float[np.ndarray, "some features"], second: Float[np.ndarray, "others features"]
) -> float:
    """Return the unbiased squared maximum mean discrepancy of two sets of features (KID).

    With the cubic polynomial kernel ``(x . y / features + 1)^3``. Its expectation is 0 for two
    samples of one law, so it can come out slightly negative.

    Args:
        first: features of one set of pictures, at least two.
        second: features of the other, at least two.

    Raises:
        ConfigError: a set has fewer than two pictures.

    Reference: Binkowski et al., "Demystifying MMD GANs" (2018), section 3 and equation 4.
    """
    if min(len(first), len(second)) < 2:
        raise ConfigError(f"{len(first)} and {len(second)} pictures: a distance needs two of each")

    within = _mean_of_pairs(_kernel(first, first)) + _mean_of_pairs(_kernel(second, second))
    return within - 2 * float(_kernel(first, second).mean())


def pairwise_diversity(features: Float[np.ndarray, "pictures features"]) -> float:
    """Return the mean cosine distance over all pairs of pictures: 0 where all are alike.

    Args:
        features: of at least two pictures, none of them zero.

    Raises:
        ConfigError: there are fewer than two pictures, or features of a picture are all zero.
    """
    count = len(features)
    if count < 2:
        raise ConfigError(f"{count} pictures: diversity needs two")
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not norms.all():
        raise ConfigError("features of a picture are all zero: its direction is undefined")
    units = features / norms
    return float(1 - ((units.sum(axis=0) ** 2).sum() - count) / (count * (count - 1)))


def correlation(
    first: Float[np.ndarray, " values"], second: Float[np.ndarray, " values"]
) -> float | None:
    """Return Pearson's correlation, or ``None`` where one side is constant and it is undefined.

    >>> correlation(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 5.0]))
    1.0
    >>> correlation(np.array([0.0, 1.0]), np.array([1.0, 1.0])) is None
    True
    """
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    a, b = first - first.mean(), second - second.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _kernel(
    x: Float[np.ndarray, "some features"], y: Float[np.ndarray, "others features"]
) -> Float[np.ndarray, "some others"]:
    """Return the cubic polynomial kernel of all pairs."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _mean_of_pairs(gram: Float[np.ndarray, "some some"]) -> float:
    """Return the mean over pairs of different pictures."""
    count = len(gram)
    return float((gram.sum() - np.trace(gram)) / (count * (count - 1)))


def vendi_score(features: Float[np.ndarray, "samples features"]) -> float:
    """Return the Vendi score of samples: how many different ones there are, from 1 to all of them.

    The exponential of the entropy of the eigenvalues of ``K / samples``, with the cosine kernel K.

    Args:
        features: of at least one sample, none of them zero.

    Raises:
        ConfigError: there are no samples, or features of one are all zero.

    >>> round(vendi_score(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 4.0]])), 6)
    2.0

    Reference: Friedman and Dieng, "The Vendi score" (2023), definition 3.1.
    """
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not len(features) or not norms.all():
        raise ConfigError(
            f"{len(features)} samples, {int((norms == 0).sum())} of them all zero: a Vendi score "
            "needs one at least, and each a direction"
        )
    units = features / norms
    shares = np.linalg.eigvalsh(units @ units.T / len(features))
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def resampled_means(
    values: Float[np.ndarray, " prompts"], *, seed: int = 0
) -> Float[np.ndarray, " resamples"]:
    """Return the means of 10,000 bootstrap resamples, the same prompts for the same number of them.

    Args:
        values: one for each prompt; the prompts are what is drawn again.
        seed: of the resampling.

    Raises:
        ConfigError: there are no values.
    """
    if len(values) == 0:
        raise ConfigError("values are empty: a mean needs at least one prompt")
    return np.asarray(values[_resampled_rows(len(values), seed)].mean(axis=1))


@functools.lru_cache(maxsize=2)
def _resampled_rows(count: int, seed: int) -> Int[np.ndarray, "resamples rows"]:
    """Rows of every resample of so many values."""
    return np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count), dtype=np.int32)


def bootstrap_p_value(
    values: Float[np.ndarray, " prompts"], *, bound: float = 0.0, seed: int = 0
) -> float:
    """Return the one-sided p-value against "the mean over prompts is at most ``bound``".

    ``p = (1 + number of resampled means at most bound) / (1 + resamples)``, which is below ``a``
    where the percentile bootstrap's lower bound of confidence ``1 - a`` lies above ``bound``.

    Args:
        values: one for each prompt, such as paired differences.
        bound: 0 to ask whether the mean is above 0, minus a margin to ask for non-inferiority.
        seed: of the resampling.

    Raises:
        ConfigError: there are no values.

    Reference: Davison and Hinkley, "Bootstrap methods and their application" (1997), equation 4.11.
    """
    means = resampled_means(values, seed=seed)
    return float((1 + (means <= bound).sum()) / (1 + len(means)))


def holm(p_values: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Return p-values adjusted for the number of tests, in their order.

    With ``p_(1) <= ... <= p_(m)``, the i-th is ``max over j <= i of min(1, (m - j + 1) p_(j))``; to
    reject what is at most ``a`` keeps the chance of any false rejection at most ``a``.

    >>> holm(np.array([0.04, 0.01, 0.03])).tolist()
    [0.06, 0.03, 0.06]

    Reference: Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    order = np.argsort(p_values, kind="stable")
    times = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.minimum(1, times * p_values[order]))
    return adjusted
