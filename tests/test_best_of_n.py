"""Best of n: plain samples, whose best follows the laws of order statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.search.strategies import BestOfN
from mctd_diffusers.search.tree import ROOT, STEP
from tests.toys import linear_gaussian, search, small_environment, spread_of_samples


@pytest.mark.parametrize(
    ("n", "num_problems", "expected", "spread"),
    # Mean and standard deviation of the greatest of n standard normal numbers (Tippett, 1925).
    [(4, 240, 1.0294, 0.7012), (16, 90, 1.7660, 0.5308)],
)
def test_the_best_reward_is_that_of_order_statistics(
    n: int, num_problems: int, expected: float, spread: float
) -> None:
    environment = linear_gaussian(num_problems, 2)
    scale = spread_of_samples(environment)
    assert 0.5 < scale < 1
    results = search(BestOfN(), environment, nfe=2 * n)
    best = np.array([result.best.reward for result in results if result.best]) / scale
    # Three standard errors, at fixed seeds.
    assert abs(best.mean() - expected) < 3 * spread / np.sqrt(num_problems)
    # A sample's spread is itself known to about a tenth at these numbers.
    assert best.std() == pytest.approx(spread, rel=0.2)


@settings(max_examples=15)
@given(st.none() | st.integers(1, 6), st.integers(1, 5), st.integers(1, 8), st.integers(1, 40))
def test_it_draws_n_samples_or_as_many_as_are_paid_for(
    n: int | None, wave_size: int, stride: int, nfe: int
) -> None:
    num_steps = 7
    edges = math.ceil(num_steps / stride)
    strategy = BestOfN(n=n, wave_size=wave_size, stride=stride)
    assert strategy.least_evaluations(num_steps) == edges
    nfe = max(nfe, edges)
    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    paid = nfe // edges
    count = paid if n is None else min(n, paid)
    assert len(result.finished) == count
    assert result.spent.nfe == count * edges
    assert result.spent.decodes == result.spent.reward_calls == count
    assert result.spent.previews == 0
    assert result.stop_reason == ("exhausted" if count == n else "budget")
    # Chains from the root, plain steps all the way.
    tree = result.tree
    assert len(tree.children(ROOT)) == count
    assert all(len(tree.children(node)) <= 1 for node in range(1, tree.num_nodes))
    assert np.isnan(tree.eta).all()
    assert tree.stride[tree.move == STEP].max() == min(stride, num_steps)


def test_a_greater_n_finds_the_same_samples_and_more() -> None:
    found = []
    for n in (3, 7):
        (result,) = search(BestOfN(n=n, wave_size=2), small_environment(1, 3), nfe=100)
        found.append([sample.reward for sample in result.finished])
    np.testing.assert_allclose(found[1][:3], found[0], rtol=1e-12)
