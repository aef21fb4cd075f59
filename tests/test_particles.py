"""Particles: effective sample size and systematic resampling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mctd_diffusers.search.backups import max_backup
from mctd_diffusers.search.particles import (
    children_particles,
    ess,
    log_mean_weight,
    normalised_weights,
    one_of_each_family,
    particle_set,
    particles_at,
    systematic,
)
from mctd_diffusers.search.tree import backup, prune, record_evaluated, record_values
from tests.toys import two_levels

log_weights = arrays(np.float64, st.integers(1, 40), elements=st.floats(-50, 50, allow_nan=False))
uniforms = st.floats(0, 1, exclude_max=True)


@given(log_weights, uniforms)
def test_systematic_resampling_rounds_each_expected_count_up_or_down(
    log_weights: np.ndarray, uniform: float
) -> None:
    count = len(log_weights)
    ancestors = systematic(log_weights, uniform)
    expected = count * normalised_weights(log_weights)
    copies = np.bincount(ancestors, minlength=count)
    assert copies.sum() == count
    assert (np.diff(ancestors) >= 0).all()
    slack = 1e-9 * count  # sums of weights are rounded
    assert (copies >= np.floor(expected - slack)).all()
    assert (copies <= np.ceil(expected + slack)).all()


@settings(max_examples=25)
@given(arrays(np.float64, st.integers(1, 12), elements=st.floats(-3, 3)))
def test_systematic_resampling_is_unbiased(log_weights: np.ndarray) -> None:
    # Exactly so: over a fine grid of its one uniform number, which counts are constant between.
    grid = (np.arange(400) + 0.5) / 400
    copies = np.array(
        [
            np.bincount(systematic(log_weights, uniform), minlength=len(log_weights))
            for uniform in grid
        ]
    )
    expected = len(log_weights) * normalised_weights(log_weights)
    # A count changes at two points at most, each met to within one step of the grid.
    np.testing.assert_allclose(copies.mean(axis=0), expected, atol=2 / 400)


def test_a_particle_without_weight_is_never_drawn_again() -> None:
    weights = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    for uniform in (0.0, 0.3, np.nextafter(1, 0)):
        assert set(systematic(weights, uniform).tolist()) <= {1, 3}


@given(log_weights)
def test_ess_lies_between_one_and_the_number_of_particles(log_weights: np.ndarray) -> None:
    assert 1 - 1e-9 <= ess(log_weights) <= len(log_weights) + 1e-9
    shifted = log_weights + 700.0  # whose exponentials overflow
    assert ess(shifted) == pytest.approx(ess(log_weights))
    assert log_mean_weight(shifted) == pytest.approx(log_mean_weight(log_weights) + 700)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 1, 1, 1], 4), ([1, 0, 0], 1), ([2, 1, 1], 16 / 6), ([3, 1], 1.6)],
)
def test_ess_is_the_square_of_the_sum_by_the_sum_of_squares(
    weights: list[float], expected: float
) -> None:
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    assert ess(log_weights) == pytest.approx(expected)
    assert log_mean_weight(log_weights) == pytest.approx(np.log(np.mean(weights)))


scored = arrays(np.float64, st.integers(2, 20), elements=st.floats(-1e3, 1e3))
temperatures = st.sampled_from((0.05, 1.0, 20.0))


@given(scored, temperatures, st.booleans())
def test_particles_are_weighted_by_the_softmax_of_their_scores(
    scores: np.ndarray, temperature: float, relative: bool
) -> None:
    particles = particle_set(range(len(scores)), scores, temperature, relative=relative)
    unit = scores.std() if relative else 1.0
    if not (np.ptp(scores) and unit > 0):
        wanted = np.full(len(scores), 1 / len(scores))
    else:
        weights = np.exp((scores - scores.max()) / (temperature * unit))
        wanted = weights / weights.sum()
    np.testing.assert_allclose(particles.weights, wanted, rtol=1e-6, atol=1e-12)
    assert 1 - 1e-9 <= particles.ess <= len(scores) + 1e-9
    slack = 1e-6 * (1 + np.abs(scores).max())
    assert scores.mean() - slack <= particles.soft_value <= scores.max() + slack
    assert scores.mean() - slack <= particles.weighted_mean <= scores.max() + slack


@given(scored, temperatures, st.floats(0.1, 10.0), st.floats(-100, 100))
def test_a_relative_temperature_knows_no_unit_of_rewards(
    scores: np.ndarray, temperature: float, scale: float, shift: float
) -> None:
    scores = np.round(scores)  # so that spreads are not lost in rounding
    one = particle_set(range(len(scores)), scores, temperature)
    other = particle_set(range(len(scores)), scale * scores + shift, temperature)
    if np.ptp(scores):
        np.testing.assert_allclose(other.weights, one.weights, rtol=1e-6, atol=1e-12)


def test_a_high_temperature_weighs_alike_and_a_low_one_takes_the_best() -> None:
    scores = np.array([0.0, 1.0, 3.0])
    hot, cold = (particle_set((4, 5, 6), scores, tau, relative=False) for tau in (1e6, 1e-3))
    np.testing.assert_allclose(hot.weights, 1 / 3, rtol=1e-5)
    assert hot.ess == pytest.approx(3)
    assert hot.soft_value == pytest.approx(hot.mean, abs=1e-3)
    assert cold.ess == pytest.approx(1)
    assert cold.soft_value == pytest.approx(3.0, abs=1e-2)
    assert [cold.weighted_mean, cold.mean] == pytest.approx([3.0, 4 / 3])


def test_particles_are_evaluated_scored_and_live_nodes_of_one_step_best_first() -> None:
    tree, (_, _, *below) = two_levels()  # rows 3 and 4 below row 1, row 5 below row 2
    assert particles_at(tree, 1, max_backup)[0] == []
    record_evaluated(tree, tree.handle[below])
    record_values(tree, tree.handle[below], np.array([1.0, 3.0, 2.0]))
    rows, scores = particles_at(tree, 1, max_backup)
    assert (rows, scores.tolist()) == ([4, 5, 3], [3.0, 2.0, 1.0])
    assert one_of_each_family(tree, rows) == [4, 5]
    assert children_particles(tree, 1, max_backup)[0] == [4, 3]
    assert children_particles(tree, 3, max_backup)[0] == []
    backup(tree, 3, 11.0)  # its estimate was 10 too low, and so, one must think, were the others
    rows, scores = particles_at(tree, 1, max_backup)
    assert (rows, scores.tolist()) == ([4, 5, 3], [13.0, 12.0, 11.0])
    prune(tree, 4)
    assert particles_at(tree, 1, max_backup)[0] == [5, 3]


def test_draws_are_no_siblings_of_each_other() -> None:
    tree, draws = two_levels()
    assert one_of_each_family(tree, draws[:2]) == draws[:2]
