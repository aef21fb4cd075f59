from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mctd_diffusers.search import tree as trees
from mctd_diffusers.viewing.tree_picture import assign_lanes, draw_tree, node_scores


def chains(num_chains: int, num_steps: int) -> tuple[trees.Tree, int]:
    """The tree of a best-of-n search, and its best finished node."""
    tree = trees.Tree(root_seed=7)
    leaves = []
    for _ in range(num_chains):
        node = trees.ROOT
        for step_index in range(num_steps + 1):
            node = trees.add_child(
                tree,
                node,
                handle=tree.num_nodes,
                step_index=step_index,
                move=trees.STEP if step_index else trees.DRAW,
                stride=min(step_index, 1),
                eta=None,
                seed=tree.num_nodes,
            )
        leaves.append(node)
    rewards = np.linspace(0.0, 1.0, num_chains)
    trees.record_rewards(tree, tree.handle[leaves], rewards)
    for leaf, reward in zip(leaves, rewards, strict=True):
        trees.backup(tree, leaf, float(reward))
    return tree, leaves[-1]


def test_a_reward_is_preferred_to_a_value() -> None:
    scores = node_scores(np.array([1.0, 2.0, np.nan]), np.array([np.nan, 5.0, np.nan]))
    assert scores.tolist()[:2] == [1.0, 5.0]
    assert np.isnan(scores[2])


def test_the_trunk_is_lane_zero_and_chains_lie_below_each_other() -> None:
    tree, winner = chains(3, 4)
    path = trees.path_to_root(tree, winner)
    lanes = assign_lanes(tree.parent, tree.step_index, tree.reward, path)
    assert set(lanes[path]) == {0}
    assert sorted(lanes[tree.step_index == 4]) == [0, 1, 2]


@st.composite
def random_trees(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    size = draw(st.integers(1, 40))
    parent, column = [-1], [-1]
    for node in range(1, size):
        parent.append(draw(st.integers(0, node - 1)))
        back = draw(st.booleans()) and column[parent[-1]] > 2
        column.append(0 if back else column[parent[-1]] + draw(st.sampled_from([1, 2, 4])))
    score = np.array(draw(st.lists(st.floats(-1, 1), min_size=size, max_size=size)))
    score[np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))] = np.nan
    node = draw(st.integers(0, size - 1))
    path = [node]
    while parent[path[-1]] != -1:
        path.append(parent[path[-1]])
    return np.array(parent), np.array(column), score, path


@given(random_trees())
def test_no_two_lines_of_descent_share_a_place(
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray, list[int]],
) -> None:
    parent, column, score, path = drawn
    lanes = assign_lanes(parent, column, score, path)
    assert set(lanes[path]) == {0}
    assert (lanes >= 0).all()
    for node in range(1, len(parent)):
        for other in range(1, node):
            same_place = lanes[node] == lanes[other] and column[node] == column[other]
            if same_place:  # only a move back up the schedule returns to a place, in its own line
                ancestors = {node}
                walk = node
                while parent[walk] != -1:
                    walk = int(parent[walk])
                    ancestors.add(walk)
                assert other in ancestors


@pytest.mark.parametrize("with_previews", [True, False])
def test_a_tree_is_drawn(tmp_path: Path, with_previews: bool) -> None:
    tree, winner = chains(3, 16)
    path = trees.path_to_root(tree, winner)
    previews = {node: Image.new("RGB", (8, 8), (node, 0, 0)) for node in path[:-1]}
    figure = draw_tree(
        tree,
        winner=winner,
        num_steps=16,
        title="a red octopus above two blue cars " * 5,
        subtitle="best_of_n · 48 NFE",
        previews=previews if with_previews else None,
    )
    figure.savefig(tmp_path / "tree.png")
    pictures = sum(bool(axes.get_images()) for axes in figure.axes)
    assert pictures == (9 if with_previews else 0)
    with Image.open(tmp_path / "tree.png") as drawn:
        assert drawn.width == 1650


def test_a_tree_of_one_path_and_equal_values_is_drawn(tmp_path: Path) -> None:
    tree, winner = chains(1, 1)
    draw_tree(tree, winner=winner, num_steps=1).savefig(tmp_path / "tree.png")
