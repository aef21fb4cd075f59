"""Samples from a finished tree follow the soft values of its nodes."""

from __future__ import annotations

import numpy as np
import pytest

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.sampling import sample_from_tree
from mctd_diffusers.search.strategies import DTS
from mctd_diffusers.search.tree import Tree, backup
from tests.toys import search, small_environment, two_levels


def small_tree() -> tuple[Tree, list[int]]:
    """Two noises; below the first, two leaves of rewards 0 and 1, below the second one of 2."""
    tree, nodes = two_levels()
    for leaf, value in zip(nodes[2:], (0.0, 1.0, 2.0), strict=True):
        backup(tree, leaf, value)
    return tree, nodes[2:]


def test_draws_follow_the_soft_values() -> None:
    tree, leaves = small_tree()
    temperature, count = 0.8, 4_000
    gain = np.exp(np.array([0.0, 1.0, 2.0]) / temperature)
    left = gain[:2].mean()  # siblings count alike: two leaves share the weight of one noise
    expected = np.r_[gain[:2] / gain[:2].sum() * left, gain[2]] / (left + gain[2])
    drawn = sample_from_tree(tree, temperature=temperature, seed=3, count=count)
    shares = np.array([(drawn == leaf).mean() for leaf in leaves])
    assert (np.abs(shares - expected) < 4 * np.sqrt(expected * (1 - expected) / count)).all()


def test_a_cold_draw_is_the_best_sample_and_a_hot_one_a_plain_walk() -> None:
    tree, leaves = small_tree()
    cold = sample_from_tree(tree, temperature=1e-300, seed=0, count=50)
    assert (cold == leaves[2]).all()
    hot = sample_from_tree(tree, temperature=1e9, seed=0, count=4_000)
    assert np.isclose((hot == leaves[2]).mean(), 0.5, atol=0.03)


def test_draws_are_finished_samples_and_cost_nothing() -> None:
    environment = small_environment(1, 5)
    (result,) = search(DTS(wave_size=3), environment, nfe=120)
    before = environment.ledger.total
    drawn = sample_from_tree(result.tree, temperature=0.5, seed=1, count=40)
    assert environment.ledger.total == before
    assert set(drawn.tolist()) <= {sample.node for sample in result.finished}
    again = sample_from_tree(result.tree, temperature=0.5, seed=1, count=40)
    np.testing.assert_array_equal(drawn, again)
    other = sample_from_tree(result.tree, temperature=0.5, seed=2, count=40)
    assert (drawn != other).any()


def test_what_cannot_be_drawn_is_refused() -> None:
    tree, _ = small_tree()
    with pytest.raises(ConfigError, match=r"no reward was backed up in this tree of 1 nodes"):
        sample_from_tree(Tree(0), temperature=1.0, seed=0)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="temperature is"):
            sample_from_tree(tree, temperature=wrong, seed=0)
    with pytest.raises(ConfigError, match="seed is -1"):
        sample_from_tree(tree, temperature=1.0, seed=-1)
    with pytest.raises(ConfigError, match="count is 0"):
        sample_from_tree(tree, temperature=1.0, seed=0, count=0)
