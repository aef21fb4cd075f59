"""Backups: what a node is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.search.backups import (
    SoftValues,
    max_backup,
    mean_backup,
    soft_backup,
    soft_values,
)
from mctd_diffusers.search.tree import ROOT, STEP, Tree, add_child, backup
from tests.strategies import trees
from tests.toys import two_levels


def test_mean_max_and_soft_of_a_small_tree() -> None:
    tree, (left, right, one, other, third) = two_levels()
    backup(tree, one, 1.0)
    backup(tree, other, 3.0)
    backup(tree, other, 3.0)
    assert np.isnan(mean_backup(tree, [right, third])).all()
    assert np.isnan(max_backup(tree, [right])).all()
    assert np.isnan(soft_backup(tree, [right], temperature=1.0)).all()
    assert mean_backup(tree, [left, ROOT]).tolist() == pytest.approx([7 / 3, 7 / 3])
    assert max_backup(tree, [left, ROOT]).tolist() == [3.0, 3.0]
    # every child counts once, however often it was visited
    soft = 0.5 * math.log((math.exp(1 / 0.5) + math.exp(3 / 0.5)) / 2)
    assert soft_backup(tree, [left], temperature=0.5).tolist() == pytest.approx([soft])


@given(trees(), st.data())
def test_soft_lies_between_the_lowest_and_the_highest(tree: Tree, data: st.DataObject) -> None:
    leaves = [node for node in range(tree.num_nodes) if not tree.children(node)]
    for node in data.draw(st.lists(st.sampled_from(leaves), min_size=1, max_size=8, unique=True)):
        backup(tree, node, float(node))
    soft = soft_backup(tree, [ROOT], temperature=2.0)[0]
    assert soft <= max_backup(tree, [ROOT])[0] + 1e-9
    cold = soft_backup(tree, [ROOT], temperature=1e-3)[0]
    assert cold == pytest.approx(max_backup(tree, [ROOT])[0], abs=0.1)
    assert soft <= cold + 1e-9


def soft_value_by_hand(tree: Tree, node: int, temperature: float) -> float:
    """The definition, child by child."""
    if tree.visit_count[node] == 0:
        return math.nan
    below = [soft_value_by_hand(tree, child, temperature) for child in tree.children(node)]
    below = [value for value in below if not math.isnan(value)]
    if not below:
        return float(tree.total_value[node] / tree.visit_count[node])
    return temperature * math.log(np.mean([math.exp(value / temperature) for value in below]))


@given(trees(), st.data(), st.sampled_from((0.5, 3.0)))
def test_soft_values_are_those_of_the_definition(
    tree: Tree, data: st.DataObject, temperature: float
) -> None:
    leaves = [node for node in range(tree.num_nodes) if not tree.children(node)]
    running = SoftValues(tree, temperature)
    for node in data.draw(st.lists(st.sampled_from(leaves), max_size=12)):
        backup(tree, node, math.sin(node))
        running.update(node)
    everything = range(tree.num_nodes)
    expected = [soft_value_by_hand(tree, node, temperature) for node in everything]
    np.testing.assert_allclose(soft_values(tree, temperature), expected, atol=1e-12)
    np.testing.assert_allclose(running.of(everything), expected, atol=1e-12)
    running.renew(2 * temperature)
    np.testing.assert_allclose(running.of(everything), soft_values(tree, 2 * temperature))


def test_soft_values_take_in_nodes_that_are_new() -> None:
    tree, (left, *_) = two_levels()
    running = SoftValues(tree, 1.0)
    for handle in range(10, 100):
        leaf = add_child(
            tree, left, handle=handle, step_index=1, move=STEP, stride=1, eta=None, seed=0
        )
        backup(tree, leaf, float(handle % 7))
        running.update(leaf)
    np.testing.assert_allclose(running.of(range(tree.num_nodes)), soft_values(tree, 1.0))


def test_a_temperature_near_zero_leaves_the_greatest() -> None:
    tree, (left, _, one, other, _) = two_levels()
    running = SoftValues(tree, 1e-300)
    for node, value in ((one, 1.0), (other, 3.0)):
        backup(tree, node, value)
        running.update(node)
    assert soft_values(tree, 1e-300)[[left, ROOT]].tolist() == [3.0, 3.0]
    assert running.of([left, ROOT]).tolist() == [3.0, 3.0]
