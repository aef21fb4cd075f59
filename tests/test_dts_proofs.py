"""DTS against closed forms: soft values, and the law of the samples drawn from finished trees.

The kernel is exact, so that the truth is that of the mixture: the value of the root is the log
normaliser of the tilted mixture, and samples are to follow the tilted mixture itself. Limits are
quantiles of what chance does, at fixed seeds; each test is shown to be able to fail, by a sampler
that is known to be wrong.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest

from mctd_diffusers.evaluation.ground_truth import Floats, LinearReward, Mixture
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.backups import soft_values
from mctd_diffusers.search.sampling import sample_from_tree
from mctd_diffusers.search.strategies import DTS
from mctd_diffusers.search.tree import ROOT
from tests.toys import search

MIXTURE = Mixture(
    np.array([0.4, 0.3, 0.2, 0.1]),
    np.array([[-2.0, 0.0], [0.0, 1.5], [1.5, -1.0], [3.0, 1.0]]),
    np.full((4, 2), 0.2),
)
REWARD = LinearReward(np.array([0.8, 0.3]))
TEMPERATURE = 1.0
TILTED, LOG_NORMALISER = REWARD.tilted(MIXTURE, TEMPERATURE)
"""Its modes have weights of 0.03, 0.19, 0.19 and 0.59: the rarest becomes the commonest."""

AS_PUBLISHED = DTS(
    temperature=TEMPERATURE, widening_constant=1.0, widening_exponent=0.5, wave_size=16
)
EVENLY = replace(AS_PUBLISHED, selection_temperature=math.inf)
"""But for the constants of the law of widening, by which a small tree has some depth."""


class Forest(NamedTuple):
    """What many searches of one problem found.

    Attributes:
        gains: ``[trees]`` of ``exp(V / lambda)`` at the root, in units of the truth.
        visits: ``[trees]`` of the root.
        drawn: ``[trees, 2]`` one sample of each finished tree.
        plain: ``[trees, 2]`` the first finished sample of each, which no reward has touched.
    """

    gains: Floats
    visits: Floats
    drawn: Floats
    plain: Floats


@lru_cache
def grown(strategy: DTS, *, trees: int, nfe: int) -> Forest:
    """Search one problem from so many initial noises."""
    environment = MixtureEnvironment(
        [MIXTURE] * trees, [REWARD] * trees, num_steps=3, schedule="flow", kernel="exact"
    )
    results = search(strategy, environment, nfe=nfe)
    values = np.array([soft_values(result.tree, TEMPERATURE)[ROOT] for result in results])
    drawn = [
        result.tree.handle[sample_from_tree(result.tree, temperature=TEMPERATURE, seed=i)[0]]
        for i, result in enumerate(results)
    ]
    return Forest(
        gains=np.exp(values / TEMPERATURE - LOG_NORMALISER),
        visits=np.array([float(result.tree.visit_count[ROOT]) for result in results]),
        drawn=environment.latents(np.array(drawn)),
        plain=environment.latents(np.array([result.finished[0].handle for result in results])),
    )


def errors_off(gains: Floats) -> float:
    """How many standard errors the mean of unbiased estimates would lie from 1."""
    return float((gains.mean() - 1) / (gains.std(ddof=1) / len(gains) ** 0.5))


def modes(x: Floats) -> np.ndarray:
    """``[4]`` how many points belong to each mode."""
    return np.bincount(TILTED.log_joint(x).argmax(axis=1), minlength=4)


@lru_cache
def mode_weights() -> Floats:
    """``[4]`` shares of the modes among samples of the truth."""
    return modes(TILTED.sample(np.random.default_rng(0), 200_000)) / 200_000


def chi_square(x: Floats) -> float:
    """Pearson's statistic of the modes of ``x`` against those of the truth; 3 degrees."""
    expected = len(x) * mode_weights()
    return float(((modes(x) - expected) ** 2 / expected).sum())


def mean_discrepancy(x: Floats, y: Floats) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al., 2012)."""

    def kernel(a: Floats, b: Floats) -> Floats:
        return np.exp(-0.5 * ((a[:, None] - b[None]) ** 2).sum(axis=2))

    n, m = len(x), len(y)
    within = (kernel(x, x).sum() - n) / (n * (n - 1)) + (kernel(y, y).sum() - m) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


CHI_SQUARE_LIMIT = 11.34
"""The 1 % point for 3 degrees of freedom."""


@lru_cache
def mean_discrepancy_limit(count: int) -> tuple[Floats, float]:
    """Samples of the truth, and the greatest discrepancy of 100 other such sets to them."""
    generator = np.random.default_rng(1)
    truth = TILTED.sample(generator, 500)
    return truth, max(mean_discrepancy(TILTED.sample(generator, count), truth) for _ in range(100))


SMALL = {"trees": 64, "nfe": 48}
LARGE = {"trees": 200, "nfe": 100}
each_size = pytest.mark.parametrize(
    "size", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["small", "large"]
)


# ---- soft values


@each_size
def test_soft_values_are_unbiased_where_growth_does_not_look_at_values(
    size: dict[str, int],
) -> None:
    forest = grown(EVENLY, **size)
    assert forest.visits.mean() > 0.7 * size["nfe"], "a tree, not a bundle of plain samples"
    assert abs(errors_off(forest.gains)) < 3
    assert forest.gains.std() / len(forest.gains) ** 0.5 < 0.08, "or that would say little"


@each_size
def test_a_tree_that_goes_on_from_what_looks_good_underrates(size: dict[str, int]) -> None:
    # What is high by chance is looked at again and falls; what is low by chance stays low.
    assert errors_off(grown(AS_PUBLISHED, **size).gains) < -4


@pytest.mark.slow
def test_four_times_the_visits_halve_the_error_of_the_root() -> None:
    # The root has children in proportion to its visits, so its error falls as their root.
    strategy = replace(EVENLY, widening_constant=0.5, widening_exponent=1.0)
    forests = [grown(strategy, trees=120, nfe=nfe) for nfe in (12, 48, 192)]
    visits = np.log([forest.visits.mean() for forest in forests])
    errors = np.log([np.sqrt(((forest.gains - 1) ** 2).mean()) for forest in forests])
    slope = np.polyfit(visits, errors, 1)[0]
    # The logarithm of each error is known to about 1 / sqrt(2 * 120), more for skewed numbers.
    assert slope == pytest.approx(-0.5, abs=0.1)


# ---- samples


@each_size
def test_samples_from_finished_trees_follow_the_tilted_mixture(size: dict[str, int]) -> None:
    forest = grown(EVENLY, **size)
    truth, limit = mean_discrepancy_limit(size["trees"])
    assert chi_square(forest.drawn) < CHI_SQUARE_LIMIT
    assert mean_discrepancy(forest.drawn, truth) < limit
    # Plain samples of the same searches do not, by far: both tests can tell.
    assert chi_square(forest.plain) > 5 * CHI_SQUARE_LIMIT
    assert mean_discrepancy(forest.plain, truth) > 5 * limit
