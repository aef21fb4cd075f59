"""Backups: what a node is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.search.backups import max_backup, mean_backup, soft_backup
from mctd_diffusers.search.tree import DRAW, ROOT, STEP, Tree, add_child, backup
from tests.strategies import trees


def two_levels() -> tuple[Tree, list[int]]:
    """A root with two children; the first has two leaves, the second one."""
    tree = Tree(1)
    nodes = []
    for handle, parent in enumerate((0, 0, 1, 1, 2)):
        nodes.append(
            add_child(
                tree,
                parent,
                handle=handle,
                step_index=0 if parent == ROOT else 1,
                move=DRAW if parent == ROOT else STEP,
                stride=0 if parent == ROOT else 1,
                eta=None,
                seed=0,
            )
        )
    return tree, nodes


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
