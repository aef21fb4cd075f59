"""Third moves of a tree search: fused nodes, going back, resampling, and the bandit over them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.backups import SoftValues, max_backup, soft_values
from mctd_diffusers.search.bandit import INCONSISTENT, ORDINARY, MoveMade, choose_move
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.log import SearchLog
from mctd_diffusers.search.runner import SearchResult, rebuild, run_search
from mctd_diffusers.search.strategies import MCTD
from mctd_diffusers.search.tree import (
    FUSE,
    RENOISE,
    Fusion,
    add_fused,
    backup,
    common_ancestor,
    record_values,
    to_json,
)
from tests.by_hand import columns_of
from tests.strategies import mctds_with_third_moves
from tests.test_mctd import assert_visits_are_exact, least_budget
from tests.toys import (
    PRICES,
    guided_environment,
    problems_of,
    search,
    small_environment,
    two_levels,
)

ALL = ("fuse", "go_back", "resample")
STEPS, NFE = 16, 256
each_kind = pytest.mark.parametrize("make", [small_environment, guided_environment])


def searched(**settings: object) -> SearchResult:
    """One image of the guided toy."""
    (result,) = search(MCTD(**settings), guided_environment(1, STEPS), nfe=NFE)  # type: ignore[arg-type]  # of any type, or wrong
    return result


@each_kind
@settings(max_examples=15)
@given(mctds_with_third_moves, st.integers(1, 7), st.integers(4, 60))
def test_visits_stay_exact_and_fused_nodes_hang_below_their_particles_common_ancestor(
    make: Callable[..., MixtureEnvironment], strategy: MCTD, num_steps: int, nfe: int
) -> None:
    nfe = least_budget(strategy, num_steps, nfe)
    (result,) = search(strategy, make(1, num_steps), nfe=nfe)
    assert_visits_are_exact(result)
    assert result.spent.nfe <= nfe
    tree = result.tree
    for node in np.flatnonzero(tree.move == FUSE).tolist():
        fusion = tree.fusion_of(node)
        assert fusion is not None
        assert tree.parent[node] == common_ancestor(tree, fusion.particles)
        assert set(tree.step_index[list(fusion.particles)]) == {tree.step_index[node]}
        assert 2 <= len(fusion.particles) <= strategy.num_particles
        assert sum(fusion.weights) == pytest.approx(1)


def test_a_budget_of_cost_holds_where_fusing_has_a_price() -> None:
    environment = guided_environment(2, STEPS, prices=PRICES)
    strategy = MCTD(third_moves=ALL)
    problems = problems_of(environment, Budget(cost=400.0), strategy=strategy)
    results = run_search(strategy, environment, problems)
    for result in results:
        assert environment.ledger.prices.cost(result.spent) <= 400.0 + 1e-9


@pytest.mark.parametrize("move", ALL)
def test_each_third_move_is_made_with_a_small_budget(move: str) -> None:
    (result,) = search(MCTD(third_moves=(move,)), guided_environment(1, STEPS), nfe=4 * STEPS)
    assert any(made.move == move for made in result.moves_made)


def test_rollouts_go_on_from_where_third_moves_lead() -> None:
    result = searched(third_moves=ALL)
    tree = result.tree
    begun = [made for made in result.moves_made if made.move != ORDINARY and made.nodes]
    assert {made.move for made in begun} == set(ALL)
    for made in begun:
        assert tree.evaluated[list(made.nodes)].all()
        assert any(tree.children(node) for node in made.nodes) or made is begun[-1]
    assert (tree.move[[n for m in begun if m.move == "go_back" for n in m.nodes]] == RENOISE).all()
    leaves = [int(tree.parent[node]) for node in np.flatnonzero(tree.move == RENOISE)]
    assert (tree.step_index[leaves] == STEPS).all()


def test_what_the_denoiser_makes_something_else_of_is_pruned_and_counted() -> None:
    # At the first step there is no estimate before, so nothing to ask.
    result = searched(third_moves=("fuse",), max_inconsistency=0.0, third_levels=(0.1, 0.75))
    verdicts = [verdict for made in result.moves_made for verdict in made.verdicts]
    tree = result.tree
    fused = np.flatnonzero(tree.move == FUSE)
    assert INCONSISTENT in verdicts
    assert 0 not in verdicts
    assert len(fused) == verdicts.count(INCONSISTENT)
    assert not tree.live[fused].any()
    assert not any(tree.children(node) for node in fused.tolist())


def test_references_are_not_asked_whether_the_denoiser_agrees() -> None:
    result = searched(third_moves=("fuse",), fusion="mean", max_inconsistency=0.0)
    assert INCONSISTENT not in [v for made in result.moves_made for v in made.verdicts]


def test_no_group_of_particles_is_fused_twice() -> None:
    result = searched(third_moves=("fuse",))
    groups = [frozenset(group) for made in result.moves_made for group in made.particles]
    assert len(groups) > 1
    assert len(set(groups)) == len(groups)


def test_children_of_a_node_that_was_widened_often_are_fused() -> None:
    settings = {"third_moves": ("fuse",), "fuse_after": 2, "first_share": 0.3, "fusion": "resample"}
    (result,) = search(MCTD(**settings), small_environment(1, STEPS), nfe=NFE)  # type: ignore[arg-type]  # of any type, or wrong
    tree = result.tree
    fused = [tree.fusion_of(node) for node in np.flatnonzero(tree.move == FUSE).tolist()]
    families = [{int(p) for p in tree.parent[list(f.particles)]} for f in fused if f is not None]
    assert any(len(family) == 1 for family in families)


def test_a_search_with_third_moves_is_rebuilt_from_its_log() -> None:
    strategy, environment = MCTD(third_moves=ALL), guided_environment(2, STEPS)
    log = SearchLog()
    first = run_search(strategy, environment, problems_of(environment, Budget(nfe=NFE)), log=log)
    again = rebuild(strategy, problems_of(environment, Budget(nfe=NFE)), log)
    for one, other in zip(first, again, strict=True):
        assert to_json(one.tree) == to_json(other.tree)
        assert list(map(repr, one.moves_made)) == list(map(repr, other.moves_made))


def test_images_do_not_depend_on_each_other() -> None:
    strategy = MCTD(third_moves=ALL)
    together = search(strategy, guided_environment(3, STEPS), nfe=128)
    alone = []
    for index in range(3):
        environment = guided_environment(3, STEPS)
        problems = problems_of(environment, Budget(nfe=128), [index])
        alone += run_search(strategy, environment, problems)
    for one, other in zip(together, alone, strict=True):
        mine, others = columns_of(one.tree), columns_of(other.tree)
        del mine["handle"], others["handle"]
        assert repr(mine) == repr(others)


def test_the_bandit_tries_every_move_and_then_follows_the_gain_for_the_cost() -> None:
    made: list[MoveMade] = []
    moves = ("fuse", "go_back", ORDINARY)
    gains = {"fuse": 0.0, "go_back": 1.0, ORDINARY: 0.2}
    for _ in range(60):
        move = choose_move(moves, made, exploration=0.2)
        made.append(MoveMade(move, cost=4.0, gain=gains[move]))
    assert [one.move for one in made[:3]] == list(moves)
    counts = {move: sum(one.move == move for one in made) for move in moves}
    assert counts["go_back"] > 5 * max(counts["fuse"], counts[ORDINARY])


def test_the_bandit_counts_gain_for_cost_not_gain_alone() -> None:
    made = [MoveMade("fuse", cost=10.0, gain=1.0), MoveMade("go_back", cost=1.0, gain=0.5)]
    assert choose_move(("fuse", "go_back"), made, exploration=0.0) == "go_back"


def test_a_fused_node_is_worth_its_particles_before_a_visit_and_itself_after() -> None:
    tree, _ = two_levels()
    record_values(tree, tree.handle[[3, 4]], np.array([1.0, 3.0]))
    node = add_fused(tree, Fusion((3, 4), (0.25, 0.75), "x0"), handle=99, seed=1)
    for prior, expected in (("weighted", 2.5), ("plain", 2.0)):
        strategy = MCTD(third_moves=("fuse",), fused_prior=prior)  # type: ignore[arg-type]  # of any type, or wrong
        assert strategy._third.prior_of(tree, node, max_backup) == pytest.approx(expected)


def test_fused_nodes_are_no_part_of_soft_values() -> None:
    tree, leaves = two_levels()
    before = SoftValues(tree, 0.5)
    for node, reward in zip(leaves[2:], (1.0, 2.0, 3.0), strict=True):
        backup(tree, node, reward)
        before.update(node)
    without = soft_values(tree, 0.5)
    node = add_fused(tree, Fusion((3, 4), (0.5, 0.5), "x0"), handle=99, seed=1)
    backup(tree, node, 100.0)
    before.update(node)
    after = soft_values(tree, 0.5)
    np.testing.assert_allclose(after[:6], without)
    np.testing.assert_allclose(before.of(range(7)), after)
    assert after[node] == 100.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"third_moves": ("fues",)},
        {"third_moves": ("fuse", "fuse")},
        {"num_particles": 1},
        {"fuse_after": 1},
        {"particle_temperature": 0.0},
        {"third_levels": (0.5, 0.2)},
        {"third_levels": (0.0, 2.0)},
        {"third_share": 1.5},
    ],
)
def test_settings_outside_their_ranges_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MCTD(**wrong)  # type: ignore[arg-type]  # of any type, or wrong


@pytest.mark.parametrize("rules", ["all", "memory"])
def test_third_moves_go_with_pruning(rules: str) -> None:
    strategy = MCTD(third_moves=ALL, pruning=rules, max_live=8)
    for make in (small_environment, guided_environment):
        (result,) = search(strategy, make(1, STEPS), nfe=NFE)
        assert_visits_are_exact(result)
        best = result.best
        assert best is not None
        assert result.tree.live[best.node]
