"""Fusions in a search: requests, rows of the tree, logs and recipes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mctd_diffusers.errors import CapacityError, SearchError
from mctd_diffusers.evaluation.ground_truth import Mixture
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.results import makers_of, moves_to, step_indices
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import REJECTED, Action, Asks, Fusions, Handles
from mctd_diffusers.search.log import SearchLog, flat_fusions, read_fusions
from mctd_diffusers.search.moves import (
    back_up,
    denoise,
    draw,
    finish_plainly,
    fuse,
    relative_change,
    step,
)
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import rebuild, run_search
from mctd_diffusers.search.tree import (
    FUSE,
    ROOT,
    Fusion,
    ancestry,
    common_ancestor,
    from_json,
    reroot,
    to_json,
)

_NUM_STEPS = 4


class FuseOnce:
    """Draws two noises, fuses them and two siblings of the first, and finishes what came of it."""

    name = "fuse-once"

    def least_evaluations(self, num_steps: int) -> int:
        """More than it ever takes."""
        return 4 * num_steps

    def search(self, problem: Problem) -> Asks:
        """See the class."""
        draws = yield from draw(problem, 2)
        yield from denoise(problem, draws)
        siblings = yield from step(problem, [draws[0]] * 2, stride=1, eta=1.0)
        other = yield from step(problem, [draws[1]], stride=1, eta=1.0)
        particles = [*siblings, *other]
        yield from denoise(problem, particles)
        self.found = yield from fuse(
            problem,
            [
                Fusion(tuple(siblings), (0.5, 0.5), "mean"),
                Fusion(tuple(particles), (0.25, 0.25, 0.5), "mean"),
            ],
        )
        self.nodes = [found.node for found in self.found]
        yield from denoise(problem, self.nodes)
        self.changes = yield from relative_change(problem, [*draws, *particles, *self.nodes])
        leaves = yield from finish_plainly(problem, self.nodes)
        back_up(problem, leaves)


def _environment() -> MixtureEnvironment:
    means = np.array([[2.0, 0.0, 1.0], [-2.0, 1.0, 0.0]])
    data = Mixture(weights=np.array([0.5, 0.5]), means=means, variances=np.full((2, 3), 0.3))
    return MixtureEnvironment([data], [lambda points: points[:, 0]], num_steps=_NUM_STEPS)


def _problem() -> Problem:
    return Problem(index=0, num_steps=_NUM_STEPS, root_seed=5, budget=Budget(nfe=40))


def test_a_fused_node_hangs_below_the_lowest_common_ancestor_of_its_particles() -> None:
    strategy, problem = FuseOnce(), _problem()
    run_search(strategy, _environment(), [problem])
    tree = problem.tree
    of_siblings, of_all = strategy.nodes
    assert tree.move[[of_siblings, of_all]].tolist() == [FUSE, FUSE]
    assert tree.parent[of_siblings] == 1
    assert tree.parent[of_all] == ROOT
    fusion = tree.fusion_of(of_siblings)
    assert fusion is not None
    assert tree.step_index[of_siblings] == tree.step_index[list(fusion.particles)][0] == 1
    assert tree.fusion_of(1) is None
    # A visit below the fused node is one of its ancestors', and none of its particles'.
    assert tree.visit_count[[ROOT, 1, of_siblings, *fusion.particles]].tolist() == [2, 1, 1, 0, 0]


def test_what_moved_is_measured_from_the_parent_and_from_what_the_fusion_aimed_at() -> None:
    strategy = FuseOnce()
    run_search(strategy, _environment(), [_problem()])
    assert np.isnan(strategy.changes[:2]).all()
    assert (strategy.changes[2:] > 0).all()


def test_a_logged_search_with_fusions_is_read_again_bit_for_bit() -> None:
    log = SearchLog()
    (first,) = run_search(FuseOnce(), _environment(), [_problem()], log=log)
    (again,) = rebuild(FuseOnce(), [_problem()], log)
    assert to_json(first.tree) == to_json(again.tree)
    assert log.live_handles().tolist() == list(range(log.num_handles))
    assert log.num_handles == first.tree.num_nodes - 1


def test_rejected_fusions_have_no_handle_in_the_log() -> None:
    fusions = Fusions(np.array([7, REJECTED]), np.array([0, 2]), np.array([0.25, np.nan]))
    for before, after in zip(fusions, read_fusions(flat_fusions(fusions)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_tree_with_fusions_comes_back_from_json_and_from_a_new_root() -> None:
    strategy, problem = FuseOnce(), _problem()
    run_search(strategy, _environment(), [problem])
    tree = problem.tree
    assert to_json(from_json(to_json(tree))) == to_json(tree)
    below = reroot(tree, 1)
    (fused,) = np.flatnonzero(below.move == FUSE).tolist()
    fusion = below.fusion_of(fused)
    assert fusion is not None
    assert below.handle[list(fusion.particles)].tolist() == tree.handle[[3, 4]].tolist()


def test_moves_of_a_fused_sample_name_its_particles_and_hold_nothing_else() -> None:
    strategy, problem = FuseOnce(), _problem()
    (result,) = run_search(strategy, _environment(), [problem])
    tree = problem.tree
    leaf = result.finished[0].node  # of the siblings, so without the other draw
    moves = moves_to(tree, leaf)
    assert [move["move"] for move in moves[:4]] == ["draw", "step", "step", "fuse"]
    assert moves[2]["after"] == 0
    assert "after" not in moves[1]
    assert moves[3]["particles"] == [1, 2]
    assert makers_of(moves, 4) == [3]
    assert step_indices(moves) == [0, 1, 1, 1, 2, 3, 4]
    assert ancestry(tree, [leaf])[0] != ROOT


def test_what_cannot_be_fused_is_refused() -> None:
    environment = _environment()
    handles = environment.reset(np.array([0, 0]), np.array([1, 2]))
    with pytest.raises(SearchError, match="not evaluated"):
        _fuse(environment, [handles])
    environment.denoise(handles)
    (child,) = environment.step(handles[:1], [Action(1)], np.array([3]))
    environment.denoise(np.array([child]))
    with pytest.raises(SearchError, match=r"step indices \[0, 1\]"):
        _fuse(environment, [np.array([handles[0], child])])
    tree = _problem().tree
    with pytest.raises(CapacityError, match="above all"):
        common_ancestor(tree, [ROOT])


def _fuse(environment: MixtureEnvironment, groups: Sequence[Handles]) -> Fusions:
    weights = [np.full(len(group), 1 / len(group)) for group in groups]
    return environment.fuse(groups, weights, ["mean"] * len(groups), np.array([0] * len(groups)))
