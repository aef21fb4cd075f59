"""Intervals, distances and correlations against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.metrics import (
    bootstrap_mean,
    bootstrap_p_value,
    correlation,
    holm,
    kernel_distance,
    pairwise_diversity,
    vendi_score,
)


def test_a_bootstrap_interval_has_the_width_of_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    interval = bootstrap_mean(values)
    # 1.96 standard errors to each side; 10,000 resamples leave about 2 % of noise.
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.mean == pytest.approx(half, rel=0.08)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.08)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(-5, 5))
def test_intervals_hold_their_mean_and_move_with_the_values(
    numbers: list[float], shift: float
) -> None:
    values = np.array(numbers)
    low, high = bootstrap_mean(values)[1:]
    assert low - 1e-9 <= values.mean() <= high + 1e-9
    moved = bootstrap_mean(values + shift)
    np.testing.assert_allclose([moved.low, moved.high], [low + shift, high + shift], atol=1e-9)


def test_pairing_takes_out_what_prompts_share() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=100)
    better = hard + 0.1 + 0.01 * rng.normal(size=100)
    difference = bootstrap_mean(better - hard)
    assert 0.09 < difference.low < difference.mean < difference.high < 0.11


def test_the_kernel_distance_of_two_points_each_is_that_of_its_formula() -> None:
    first, second = np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]])
    # Kernel (xy + 1)^3: 27 within the first, 1 within the second, across (1 + 8 + 1 + 27) / 4.
    assert kernel_distance(first, second) == pytest.approx(27 + 1 - 2 * 37 / 4)


def test_the_kernel_distance_is_zero_on_average_for_one_law() -> None:
    rng = np.random.default_rng(0)
    distances = [kernel_distance(*rng.normal(size=(2, 40, 3))) for _ in range(300)]
    error = np.std(distances) / np.sqrt(len(distances))
    assert abs(np.mean(distances)) < 3 * error
    assert kernel_distance(rng.normal(size=(40, 3)), 1 + rng.normal(size=(40, 3))) > 10 * error


def test_diversity_is_the_mean_cosine_distance() -> None:
    features = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert pairwise_diversity(features) == pytest.approx((1 + 1 + 2) / 3)
    assert pairwise_diversity(np.ones((4, 3))) == pytest.approx(0)


def test_correlation_agrees_with_numpy_and_knows_when_it_is_undefined() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 50))
    assert correlation(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert correlation(first, np.ones(50)) is None


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        bootstrap_mean(np.zeros(0))
    with pytest.raises(ConfigError, match="two of each"):
        kernel_distance(np.zeros((1, 2)), np.zeros((3, 2)))
    with pytest.raises(ConfigError, match="diversity needs two"):
        pairwise_diversity(np.ones((1, 2)))
    with pytest.raises(ConfigError, match="all zero"):
        pairwise_diversity(np.zeros((2, 2)))


def test_a_bootstrap_p_value_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, size=300)
    error = values.std() / np.sqrt(300)
    for bound in (0.1, 0.2, -0.05):
        z = (values.mean() - bound) / error
        normal = 0.5 * math.erfc(z / math.sqrt(2))
        # 10,000 resamples leave a standard error of 0.005 at most.
        assert bootstrap_p_value(values, bound=bound) == pytest.approx(normal, abs=0.015)


def test_a_p_value_below_its_level_is_an_interval_above_the_bound() -> None:
    for seed in range(8):
        values = np.random.default_rng(seed).normal(0.15, 1.0, size=150)
        low = bootstrap_mean(values, confidence=0.9).low  # its lower end leaves 5 % below
        p_value = bootstrap_p_value(values)
        if abs(p_value - 0.05) > 1e-3:
            assert (p_value < 0.05) == (low > 0)


def test_the_least_p_value_is_one_in_the_resamples() -> None:
    assert bootstrap_p_value(np.ones(5)) == pytest.approx(1 / 10_001)
    assert bootstrap_p_value(np.ones(5), bound=1.0) == 1.0
    with pytest.raises(ConfigError, match="values are empty"):
        bootstrap_p_value(np.array([]))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float]) -> None:
    adjusted = holm(np.array(p_values))
    rejected = np.zeros(len(p_values), dtype=bool)
    for step, i in enumerate(np.argsort(p_values, kind="stable")):
        if (len(p_values) - step) * p_values[i] > 0.05:
            break
        rejected[i] = True
    assert ((adjusted <= 0.05) == rejected).all()
    assert (adjusted >= np.array(p_values)).all()
    assert (adjusted <= 1).all()


def test_a_vendi_score_counts_what_differs() -> None:
    assert vendi_score(np.eye(5)) == pytest.approx(5)
    assert vendi_score(np.ones((5, 3))) == pytest.approx(1)
    assert vendi_score(np.array([[1.0, 0.0]])) == pytest.approx(1)
    # Two samples at an angle: eigenvalues (1 + cos) / 2 and (1 - cos) / 2.
    cosine = 0.6
    shares = np.array([(1 + cosine) / 2, (1 - cosine) / 2])
    pair = np.array([[1.0, 0.0], [0.6, 0.8]])
    assert vendi_score(pair) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert vendi_score(7 * pair) == pytest.approx(vendi_score(pair))
    with pytest.raises(ConfigError, match="1 of them all zero"):
        vendi_score(np.array([[1.0, 0.0], [0.0, 0.0]]))
