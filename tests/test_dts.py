"""DTS: branch levels, exact visits, the law of widening, and chance that belongs to the problem."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.mixture_worlds import rugged_environment
from mctd_diffusers.search.backups import soft_values
from mctd_diffusers.search.runner import SearchResult
from mctd_diffusers.search.strategies import DTS, resolve_strategy
from mctd_diffusers.search.tree import ROOT, STEP, Tree, path_to_root
from tests.by_hand import columns_of
from tests.strategies import dtss
from tests.toys import PRICES, search, small_environment

PAPER_LEVELS = {0, 3, 6, 10, 13}
"""Step indices of 16 at which 1, .8, .6, .4 and .2 of them are left."""


def tree_of(strategy: DTS, num_steps: int, nfe: int) -> tuple[Tree, SearchResult]:
    """A tree grown on a small mixture, with a budget that pays for a sample at least."""
    nfe = max(nfe, strategy.least_evaluations(num_steps))
    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    return result.tree, result


def inner_nodes(tree: Tree) -> list[int]:
    """Rows that have children, the root first."""
    return [node for node in range(tree.num_nodes) if tree.children(node)]


# ---- the algorithm box


@settings(max_examples=25)
@given(dtss, st.integers(1, 70), st.integers(1, 8), st.integers(1, 60))
def test_visits_are_conserved_at_any_wave_size(
    strategy: DTS, wave_size: int, num_steps: int, nfe: int
) -> None:
    tree, result = tree_of(replace(strategy, wave_size=wave_size), num_steps, nfe)
    assert not tree.in_flight.any()
    for node in inner_nodes(tree):
        assert tree.visit_count[node] == tree.visit_count[list(tree.children(node))].sum()
    leaves = [sample.node for sample in result.finished]
    # A finished sample may be visited again; nothing else is ever backed up from.
    assert tree.visit_count[ROOT] == tree.visit_count[leaves].sum() >= len(leaves)
    np.testing.assert_allclose(
        tree.total_value[leaves], tree.reward[leaves] * tree.visit_count[leaves]
    )


@settings(max_examples=25)
@given(dtss, st.integers(1, 12), st.integers(1, 80))
def test_the_nfe_are_those_of_its_formula(strategy: DTS, num_steps: int, nfe: int) -> None:
    tree, result = tree_of(strategy, num_steps, nfe)
    # A new initial noise costs all edges of a rollout; another child of a node, whose evaluation
    # is made, costs the edges that are left but one, since the finished sample is not evaluated.
    spent = 0
    for node in inner_nodes(tree):
        edges = tree.depth[result.finished[0].node] - max(int(tree.depth[node]), 1)
        new = len(tree.children(node)) - (node != ROOT)
        spent += new * (edges if node == ROOT else edges - 1)
    assert result.spent.nfe == spent
    assert result.spent.previews == 0
    assert result.spent.decodes == len(result.finished)
    assert strategy.least_evaluations(num_steps) == tree.depth[result.finished[0].node] - 1


@settings(max_examples=25)
@given(dtss, st.integers(1, 12), st.integers(1, 80))
def test_it_branches_at_its_levels_only(strategy: DTS, num_steps: int, nfe: int) -> None:
    tree, _ = tree_of(strategy, num_steps, nfe)
    levels = {round(num_steps * (1 - share)) for share in strategy.branch_levels}
    for node in inner_nodes(tree):
        if len(tree.children(node)) > 1:
            assert node == ROOT or tree.step_index[node] in levels
    last = (tree.move == STEP) & (tree.step_index == num_steps)
    assert np.isnan(tree.eta[last]).all()
    assert (tree.eta[(tree.move == STEP) & ~last] == strategy.branch_eta).all()
    assert tree.stride[tree.move == STEP].max() <= strategy.stride


@settings(max_examples=25)
@given(dtss, st.integers(1, 8), st.integers(1, 120))
def test_no_node_has_more_children_than_the_law_of_widening_lets_in(
    strategy: DTS, num_steps: int, nfe: int
) -> None:
    tree, _ = tree_of(strategy, num_steps, nfe)
    if not strategy._course(num_steps).branches:  # plain sampling: the root has no law
        return
    for node in inner_nodes(tree):
        visits = tree.visit_count[node]
        most = strategy.widening_constant * visits**strategy.widening_exponent
        assert len(tree.children(node)) <= max(1, math.ceil(most))


def test_the_defaults_branch_where_the_paper_does() -> None:
    strategy = DTS(temperature=10.0, wave_size=1)
    (result,) = search(strategy, rugged_environment(1, num_steps=16, first_seed=1), nfe=700)
    tree = result.tree
    course = strategy._course(16)
    assert course.branches == PAPER_LEVELS
    assert course.strides == dict.fromkeys(range(16), 1)
    # The law of the paper: up to 32 visits all are new noises.
    visits = int(tree.visit_count[ROOT])
    assert visits > 40
    assert len(tree.children(ROOT)) == math.floor(2 * (visits - 1) ** 0.8)


@pytest.mark.parametrize("name", ["dts", "dts*"])
def test_selection_goes_on_from_the_best(name: str) -> None:
    # With a temperature near 0 and no exploration, most visits go the same way.
    strategy = resolve_strategy(name)
    assert isinstance(strategy, DTS)
    strategy = replace(
        strategy, temperature=1e-3, exploration=0.0, widening_constant=1.0, widening_exponent=0.5
    )
    (result,) = search(strategy, rugged_environment(1, num_steps=8, first_seed=5), nfe=300)
    tree = result.tree
    draws = list(tree.children(ROOT))
    best = draws[int(np.argmax(soft_values(tree, 1e-3)[draws]))]
    assert tree.visit_count[best] == max(tree.visit_count[draws])
    # Beside it, a visit for each noise and what went to those that were the best for a time.
    assert tree.visit_count[best] > 0.4 * tree.visit_count[ROOT]


def test_chance_belongs_to_the_problem() -> None:
    strategy = DTS(widening_constant=1.0, widening_exponent=0.5)
    trees = [
        columns_of(
            search(strategy, rugged_environment(2, num_steps=8, first_seed=1), nfe=200)[i].tree
        )
        for i in (1, 1)
    ]
    assert trees[0] == trees[1]


# ---- budget


@settings(max_examples=25)
@given(dtss, st.integers(1, 8), st.integers(1, 100))
def test_the_budget_is_used_up(strategy: DTS, num_steps: int, nfe: int) -> None:
    nfe = max(nfe, strategy.least_evaluations(num_steps))
    tree, result = tree_of(strategy, num_steps, nfe)
    if result.stop_reason == "budget":
        assert result.spent.nfe <= nfe
        assert nfe - result.spent.nfe < strategy.least_evaluations(num_steps)
    else:  # the law lets nothing in for a thousand visits
        assert result.stop_reason == "exhausted"
        assert tree.visit_count[ROOT] > 1000


def test_a_cost_budget_is_kept() -> None:
    environment = small_environment(2, 6, prices=PRICES)
    for result in search(DTS(wave_size=5), environment, nfe=None, cost=70.0):
        assert 60 < PRICES.cost(result.spent) <= 70 + 1e-6


def test_a_law_that_lets_nothing_new_in_ends_the_search() -> None:
    # So hot that all is visited.
    strategy = DTS(temperature=1e6, widening_constant=2.0, widening_exponent=0.0)
    (result,) = search(strategy, small_environment(1, 3), nfe=1000)
    assert result.stop_reason == "exhausted"
    # At most two children each: of the root, and of the levels with at least two edges left.
    assert len(result.finished) == 8
    assert result.tree.visit_count[ROOT] > 1000


# ---- temperature


def test_the_temperature_is_a_share_of_the_spread_at_the_root() -> None:
    strategy = DTS(temperature_share=0.3, widening_constant=1.0, widening_exponent=0.5)
    (result,) = search(strategy, rugged_environment(1, num_steps=8, first_seed=2), nfe=300)
    tree = result.tree
    first = []
    for draw in tree.children(ROOT):
        below = [s.reward for s in result.finished if draw in path_to_root(tree, s.node)]
        first.append(below[0])
    assert len(first) < len(result.finished)
    assert strategy.temperature_of(tree) == pytest.approx(0.3 * np.std(first))
    assert replace(strategy, temperature=0.7).temperature_of(tree) == 0.7
    assert strategy.temperature_of(Tree(0)) == 1.0


def test_units_of_the_reward_do_not_matter_where_the_temperature_follows_them() -> None:
    trees = []
    for scale in (1.0, 128.0):
        environment = rugged_environment(1, num_steps=8, first_seed=3)
        (plain,) = environment.rewards
        environment.rewards = (lambda x, plain=plain, scale=scale: scale * plain(x),)
        strategy = DTS(widening_constant=1.0, widening_exponent=0.5)
        (result,) = search(strategy, environment, nfe=300)
        trees.append(result.tree)
    np.testing.assert_array_equal(trees[0].parent, trees[1].parent)


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [("branch_levels", (0.5, 1.2)), ("branch_levels", (-0.1,))],
)
def test_branch_levels_are_shares(setting: str, wrong: tuple[float, ...]) -> None:
    with pytest.raises(
        ConfigError, match=r"branch_levels is (1\.2|-0\.1); give a number from 0 to"
    ):
        DTS(**{setting: wrong})


def test_a_wrong_law_of_selection_is_refused() -> None:
    strategy = DTS()
    object.__setattr__(strategy, "select", "puct")  # the type checker of the tests stands before it
    with pytest.raises(ConfigError, match="select is 'puct'; give one of boltzmann, uct"):
        strategy.__post_init__()


def test_its_star_is_its_search_by_upper_confidence_bounds() -> None:
    assert resolve_strategy("dts*") == resolve_strategy("dts-star") == DTS(select="uct")
