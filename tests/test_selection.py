"""Selection: formulas on arrays of siblings."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.search.selection import (
    best_first,
    boltzmann,
    calibrated,
    min_max,
    uct_scores,
)
from tests.strategies import siblings

Siblings = tuple[np.ndarray, np.ndarray, np.ndarray]


@given(siblings(), st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_the_order_of_siblings(group: Siblings, random: Random) -> None:
    values, visits, under_way = group
    order = list(range(len(values)))
    random.shuffle(order)
    scores = uct_scores(min_max(values), visits, under_way, exploration=0.2)
    shuffled = uct_scores(min_max(values[order]), visits[order], under_way[order], exploration=0.2)
    np.testing.assert_array_equal(shuffled, scores[order])


@given(siblings())
def test_what_nobody_looked_at_comes_first(group: Siblings) -> None:
    values, visits, under_way = group
    scores = uct_scores(values, visits, under_way, exploration=0.2)
    new = visits + under_way == 0
    assert np.isposinf(scores[new]).all()
    assert np.isfinite(scores[~new]).all()


def test_uct_is_the_textbook_formula() -> None:
    scores = uct_scores(np.array([0.5, 1.0]), np.array([3, 1]), np.array([0, 0]), exploration=0.7)
    np.testing.assert_allclose(
        scores,
        [0.5 + 0.7 * math.sqrt(2 * math.log(4) / 3), 1.0 + 0.7 * math.sqrt(2 * math.log(4))],
    )


def test_a_visit_under_way_makes_the_same_sibling_less_attractive() -> None:
    values, visits = np.array([0.5, 0.5]), np.array([2, 2])
    before = uct_scores(values, visits, np.array([0, 0]), exploration=0.2)
    after = uct_scores(values, visits, np.array([1, 0]), exploration=0.2)
    assert before[0] == before[1]
    assert after[0] < after[1]


@given(siblings())
def test_normalised_values_span_zero_to_one_and_keep_their_order(group: Siblings) -> None:
    values = group[0]
    scaled = min_max(values)
    assert ((scaled >= 0) & (scaled <= 1)).all()
    if values.max() > values.min():
        assert scaled[values.argmax()] == 1
        assert scaled[values.argmin()] == 0
    else:
        assert not scaled.any()
    assert (np.diff(scaled[np.argsort(values, kind="stable")]) >= 0).all()


def test_estimates_are_shifted_by_what_siblings_turned_out_to_be() -> None:
    nan = math.nan
    worth = calibrated(np.array([1.0, 2.0, 3.0, nan]), np.array([nan, 2.5, 4.5, 7.0]))
    np.testing.assert_allclose(worth, [2.0, 2.5, 4.5, 7.0])
    np.testing.assert_allclose(calibrated(np.array([1.0, 2.0]), np.array([nan, nan])), [1.0, 2.0])


def test_best_first_keeps_the_order_of_equals() -> None:
    assert best_first(np.array([1.0, 3.0, 3.0, 2.0])).tolist() == [1, 2, 3, 0]


@given(siblings(), st.sampled_from((0.0, 0.1, 1.0, 5.0)), st.sampled_from((0.2, 1.0)))
def test_uct_is_the_formula_of_redundancy_aware_selection(
    group: Siblings, weight: float, exploration: float
) -> None:
    values, visits, under_way = group
    scores = uct_scores(
        values, visits, under_way, exploration=exploration, redundancy_weight=weight
    )
    looks = [n + weight * o for n, o in zip(visits, under_way, strict=True)]
    for score, value, n in zip(scores, values, looks, strict=True):
        if n == 0:
            assert score == math.inf
        else:
            bonus = math.sqrt(2) * math.sqrt(math.log(max(sum(looks), 1)) / n)
            assert score == pytest.approx(value + exploration * bonus)


def test_a_draw_by_boltzmann_has_the_weights_of_exponentials() -> None:
    values, temperature, count = np.array([1.0, 3.0, 2.0, -500.0]), 0.7, 20_000
    generator = np.random.default_rng(0)
    drawn = np.bincount([boltzmann(values, temperature, generator) for _ in range(count)])
    weights = np.exp(values / temperature)
    expected = weights / weights.sum()
    assert len(drawn) == 3, "the last one has no weight"
    error = np.sqrt(expected[:3] * (1 - expected[:3]) / count)
    assert (np.abs(drawn / count - expected[:3]) < 4 * error).all()


def test_a_draw_near_zero_temperature_is_the_greatest() -> None:
    generator = np.random.default_rng(0)
    for temperature in (1e-3, 1e-300):
        assert boltzmann(np.array([1.0, 3.0, 2.0]), temperature, generator) == 1
