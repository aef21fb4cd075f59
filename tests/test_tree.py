"""The tree: one structure, written by its own functions only."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.errors import CapacityError
from mctd_diffusers.search.environment import FIRST_DRAW
from mctd_diffusers.search.seeding import edge_seed
from mctd_diffusers.search.tree import (
    DRAW,
    NO_PARENT,
    ROOT,
    STEP,
    Tree,
    add_child,
    add_virtual_visit,
    ancestor_at,
    backup,
    from_json,
    issue_seeds,
    path_to_root,
    prune,
    record_evaluated,
    record_rewards,
    record_values,
    reroot,
    settle,
    subtree,
    to_json,
)
from tests.strategies import rewards, trees

COLUMNS = (
    "parent handle step_index stride eta guidance seed move depth visit_count in_flight "
    "total_value max_value value reward evaluated live"
).split()


def assert_same(one: Tree, other: Tree) -> None:
    assert one.root_seed == other.root_seed
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert [one.children(node) for node in range(one.num_nodes)] == [
        other.children(node) for node in range(other.num_nodes)
    ]


@given(trees(), st.data())
def test_backup_conserves_visits_and_value(tree: Tree, data: st.DataObject) -> None:
    started = np.zeros(tree.num_nodes, dtype=int)
    leaves = data.draw(
        st.lists(st.tuples(st.integers(0, tree.num_nodes - 1), rewards), max_size=20)
    )
    for node, value in leaves:
        backup(tree, node, value)
        started[node] += 1
    for node in range(tree.num_nodes):
        below = list(tree.children(node))
        assert tree.visit_count[node] == tree.visit_count[below].sum() + started[node]
    assert tree.visit_count[ROOT] == len(leaves)
    assert tree.total_value[ROOT] == pytest.approx(sum(value for _, value in leaves))
    if leaves:
        assert tree.max_value[ROOT] == max(value for _, value in leaves)


@given(trees(), st.data())
def test_the_ancestor_at_a_step_index_is_the_nearest_of_the_path(
    tree: Tree, data: st.DataObject
) -> None:
    node = data.draw(st.integers(0, tree.num_nodes - 1))
    path = path_to_root(tree, node)
    for row in path:
        found = ancestor_at(tree, node, int(tree.step_index[row]))
        assert tree.step_index[found] == tree.step_index[row]
        assert path.index(found) <= path.index(row)
    with pytest.raises(CapacityError, match=f"no node at step index 99 leads to node {node}"):
        ancestor_at(tree, node, 99)


@given(trees(), st.data())
def test_virtual_visits_are_all_settled(tree: Tree, data: st.DataObject) -> None:
    nodes = data.draw(st.lists(st.integers(0, tree.num_nodes - 1), max_size=10))
    for node in nodes:
        add_virtual_visit(tree, node)
    assert tree.in_flight[ROOT] == len(nodes)
    for node in reversed(nodes):
        settle(tree, node)
    assert not tree.in_flight.any()


def test_settling_what_is_not_under_way_is_our_own_error() -> None:
    with pytest.raises(AssertionError, match="no virtual visit"):
        settle(Tree(1), ROOT)


@given(trees())
def test_parents_come_first_and_depth_counts_edges(tree: Tree) -> None:
    for node in range(1, tree.num_nodes):
        assert tree.parent[node] < node
        assert tree.depth[node] == len(path_to_root(tree, node)) - 1
        assert node in tree.children(int(tree.parent[node]))
    assert tree.parent[ROOT] == NO_PARENT
    assert path_to_root(tree, ROOT) == [ROOT]


@given(trees())
def test_rerooting_at_the_root_is_the_identity(tree: Tree) -> None:
    assert_same(reroot(tree, ROOT), tree)


@given(trees(), st.data())
def test_rerooting_keeps_what_is_below_and_nothing_else(tree: Tree, data: st.DataObject) -> None:
    node = data.draw(st.integers(0, tree.num_nodes - 1))
    rows = subtree(tree, node)
    new = reroot(tree, node)
    np.testing.assert_array_equal(new.handle, tree.handle[rows])
    assert new.depth[ROOT] == 0
    assert new.parent[ROOT] == NO_PARENT
    for row in range(1, new.num_nodes):
        assert tree.handle[tree.parent[rows[row]]] == new.handle[new.parent[row]]
        assert new.node_of(int(new.handle[row])) == row


@given(trees())
def test_json_keeps_everything(tree: Tree) -> None:
    backup(tree, tree.num_nodes - 1, 0.5)
    again = from_json(to_json(tree))
    assert_same(again, tree)
    assert issue_seeds(again, ROOT, move=DRAW, stride=0, count=2) == issue_seeds(
        tree, ROOT, move=DRAW, stride=0, count=2
    )
    json.loads(to_json(tree), parse_constant=pytest.fail)  # no NaN, no Infinity


@given(trees(), st.data())
def test_pruning_names_each_sample_once(tree: Tree, data: st.DataObject) -> None:
    copy = tree.copy()
    node = data.draw(st.integers(0, tree.num_nodes - 1))
    handles = prune(tree, node)
    below = subtree(tree, node)
    assert handles == [int(tree.handle[row]) for row in below if row != ROOT]
    assert not tree.live[below].any()
    assert tree.live.sum() == tree.num_nodes - len(below)
    assert prune(tree, node) == []
    assert copy.live.all()


def test_rows_grow_without_limit_and_columns_are_read_only() -> None:
    tree = Tree(3)
    for handle in range(500):
        add_child(
            tree, handle, handle=handle, step_index=handle, move=STEP, stride=1, eta=None, seed=0
        )
    assert tree.num_nodes == 501
    assert tree.depth[500] == 500
    assert np.isnan(tree.eta[1:]).all()
    with pytest.raises(ValueError, match="read-only"):
        tree.visit_count[0] = 1


def test_replies_are_recorded_at_their_nodes() -> None:
    tree = Tree(3)
    nodes = [
        add_child(tree, ROOT, handle=handle, step_index=0, move=DRAW, stride=0, eta=None, seed=1)
        for handle in (7, 5)
    ]
    record_evaluated(tree, np.array([5]))
    record_values(tree, np.array([5, 7]), np.array([0.25, -1.0]))
    record_rewards(tree, np.array([7]), np.array([2.0]))
    assert tree.evaluated[nodes].tolist() == [False, True]
    assert tree.value[nodes].tolist() == [-1.0, 0.25]
    assert tree.reward[nodes[0]] == 2.0
    assert np.isnan(tree.reward[nodes[1]])


def test_unknown_nodes_and_handles_are_named() -> None:
    tree = Tree(3)
    with pytest.raises(CapacityError, match="node 4 does not exist in a tree of 1 nodes"):
        tree.children(4)
    with pytest.raises(CapacityError, match="handle 9 has no node") as caught:
        tree.node_of(9)
    assert caught.value.handles == (9,)
    add_child(tree, ROOT, handle=9, step_index=0, move=DRAW, stride=0, eta=None, seed=1)
    with pytest.raises(CapacityError, match="handle 9 is already node 1"):
        add_child(tree, ROOT, handle=9, step_index=0, move=DRAW, stride=0, eta=None, seed=1)


def test_seeds_follow_the_path_and_are_given_out_once() -> None:
    tree = Tree(11)
    first, second = issue_seeds(tree, ROOT, move=DRAW, stride=0, count=2)
    assert first == FIRST_DRAW
    assert second == edge_seed(11, [(DRAW, 0, 1)])
    node = add_child(tree, ROOT, handle=0, step_index=0, move=DRAW, stride=0, eta=None, seed=first)
    below = issue_seeds(tree, node, move=STEP, stride=2, count=3)
    assert below == [edge_seed(11, [(DRAW, 0, 0), (STEP, 2, ordinal)]) for ordinal in range(3)]
    (other,) = issue_seeds(tree, node, move=STEP, stride=1, count=1)
    assert other == edge_seed(11, [(DRAW, 0, 0), (STEP, 1, 0)])
    (later,) = issue_seeds(tree, node, move=STEP, stride=2, count=1)
    assert later == edge_seed(11, [(DRAW, 0, 0), (STEP, 2, 3)])
