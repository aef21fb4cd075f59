"""Particles: effective sample size and systematic resampling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mctd_diffusers.search.particles import ess, log_mean_weight, normalised_weights, systematic

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
