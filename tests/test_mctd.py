"""MCTD: visits are exact, paths are braked, and the budget goes into samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.evaluation.mixture_worlds import rugged_environment
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Reset, Step, Value
from mctd_diffusers.search.runner import SearchResult
from mctd_diffusers.search.selection import best_first
from mctd_diffusers.search.strategies import MCTD
from mctd_diffusers.search.tree import DRAW, ROOT, STEP, path_to_root
from tests.by_hand import step_by_hand
from tests.strategies import mctds
from tests.toys import PRICES, guided_environment, problems_of, search, small_environment

each_kind = pytest.mark.parametrize("make", [small_environment, guided_environment])


def least_budget(strategy: MCTD, num_steps: int, nfe: int) -> int:
    """A budget that ``strategy`` accepts."""
    return max(nfe, strategy.least_evaluations(num_steps))


def assert_visits_are_exact(result: SearchResult) -> None:
    """Visits, sums and greatest values of every node are those of the rewards below it."""
    tree = result.tree
    visits = np.zeros(tree.num_nodes, dtype=np.int64)
    total, most = np.zeros(tree.num_nodes), np.full(tree.num_nodes, -np.inf)
    for node in range(tree.num_nodes - 1, -1, -1):  # children come after their parents
        below = list(tree.children(node))
        visits[node], total[node] = visits[below].sum(), total[below].sum()
        most[node] = most[below].max(initial=-np.inf)
        if not np.isnan(tree.reward[node]):  # backed up once, from its own node
            visits[node] += 1
            total[node] += tree.reward[node]
            most[node] = max(most[node], tree.reward[node])
    np.testing.assert_array_equal(tree.visit_count, visits)
    np.testing.assert_array_equal(tree.max_value, most)
    np.testing.assert_allclose(tree.total_value, total, rtol=1e-9, atol=1e-9)
    assert tree.visit_count[ROOT] == len(result.finished)
    assert not tree.in_flight.any()


def num_resumed(result: SearchResult) -> int:
    """Stored states that more than one simulation went through."""
    tree = result.tree
    return sum(
        sum(bool(tree.children(child)) for child in tree.children(node)) > 1
        for node in range(1, tree.num_nodes)
    )


@each_kind
@settings(max_examples=25)
@given(mctds, st.integers(1, 8), st.integers(1, 7), st.integers(4, 60))
def test_visits_are_the_backups_through_a_node_at_any_wave_size(
    make: Callable[..., MixtureEnvironment],
    strategy: MCTD,
    wave_size: int,
    num_steps: int,
    nfe: int,
) -> None:
    strategy = replace(strategy, wave_size=wave_size)
    nfe = least_budget(strategy, num_steps, nfe)
    (result,) = search(strategy, make(1, num_steps), nfe=nfe)
    assert_visits_are_exact(result)


@pytest.mark.parametrize("wave_size", [1, 8])
def test_visits_are_exact_where_stored_states_are_gone_on_from(wave_size: int) -> None:
    strategy = MCTD(wave_size=wave_size, first_share=0.25)
    (result,) = search(strategy, rugged_environment(1, num_steps=12, first_seed=1), nfe=250)
    assert_visits_are_exact(result)
    assert num_resumed(result) > 2


@each_kind
@settings(max_examples=25)
@given(mctds, st.integers(1, 9), st.integers(1, 60))
def test_strides_are_those_allowed_and_jumps_keep_to_a_quarter(
    make: Callable[..., MixtureEnvironment], strategy: MCTD, num_steps: int, nfe: int
) -> None:
    nfe = least_budget(strategy, num_steps, nfe)
    (result,) = search(strategy, make(1, num_steps), nfe=nfe)
    tree = result.tree
    for node in np.flatnonzero(tree.move == STEP):
        stride, target = tree.stride[node], tree.step_index[node]
        cut_short = strategy.stride_policy == "constant" and target == num_steps
        assert stride in strategy.strides or cut_short
        is_to_a_seed = 3 * target <= num_steps
        assert stride == 1 or 4 * stride <= num_steps or is_to_a_seed
    assert ((tree.move == DRAW) == (tree.parent == ROOT)).all()


@pytest.mark.parametrize("brake_nats", [0.0, 4.0, 12.0, 30.0])
@pytest.mark.parametrize("first_share", [0.3, 0.9])
def test_the_candidates_of_a_path_stay_within_the_brake(
    brake_nats: float, first_share: float
) -> None:
    strategy = MCTD(brake_nats=brake_nats, first_share=first_share)
    environment = rugged_environment(1, num_steps=8, first_seed=3)
    (problem,) = problems_of(environment, Budget(nfe=100))
    tried: dict[int, int] = {}  # handle -> candidates that were tried beside it, in one request
    for request, reply in step_by_hand(strategy, problem, environment):
        if isinstance(request, Step):
            same_parent = len(set(request.parents.tolist())) == 1
            count = len(request.parents) if same_parent else 1
            tried.update((handle, count) for handle in reply.result.tolist())
    tree = problem.tree
    for leaf in np.flatnonzero(~np.isnan(tree.reward)):
        edges = path_to_root(tree, int(leaf))[:-2]  # without the draw
        spent = sum(math.log(tried[int(tree.handle[node])]) for node in edges)
        assert spent <= brake_nats + 1e-9


@pytest.mark.parametrize("finish", [1, 2, 3])
def test_the_best_of_the_last_level_are_finished(finish: int) -> None:
    strategy = MCTD(finish=finish, first_share=0.5, seed_share=0.0)
    environment = rugged_environment(1, num_steps=8, first_seed=4)
    (problem,) = problems_of(environment, Budget(nfe=120))
    tree = problem.tree
    level: dict[int, tuple[int, ...]] = {}  # handle -> handles that were tried together
    num_finished = []
    for request, reply in step_by_hand(strategy, problem, environment):
        if not isinstance(request, Step | Reset):
            continue
        together = tuple(reply.result.tolist())
        level.update(dict.fromkeys(together, together))
        if isinstance(request, Reset):
            continue
        parents = request.parents.tolist()
        first = int(tree.step_index[tree.node_of(parents[0])])
        if first + request.actions[0].stride == problem.num_steps:
            values = {handle: tree.value[tree.node_of(handle)] for handle in level[parents[0]]}
            assert parents == sorted(values, key=lambda h: -values[h])[:finish]
            num_finished.append(len(parents))
    assert max(num_finished) == finish


@pytest.mark.parametrize("nfe", [16, 40, 100])
def test_the_budget_is_used_up(nfe: int) -> None:
    for result in search(MCTD(), rugged_environment(2, num_steps=16, first_seed=2), nfe=nfe):
        assert nfe - 8 <= result.spent.nfe <= nfe
        assert result.stop_reason == "budget"


@each_kind
@pytest.mark.parametrize("cost", [30.0, 90.0])
def test_a_cost_budget_is_used_up_and_never_exceeded(
    make: Callable[..., MixtureEnvironment], cost: float
) -> None:
    environment = make(2, 8, prices=PRICES)
    for result in search(MCTD(), environment, nfe=None, cost=cost):
        assert cost - 12 <= PRICES.cost(result.spent) <= cost + 1e-6
        assert result.finished


def test_seeds_are_valued_a_third_down_and_the_best_of_them_are_finished_coarsely() -> None:
    (result,) = search(MCTD(), guided_environment(1, 16), nfe=96)
    tree = result.tree
    seeds = [node for draw in tree.children(ROOT) for node in tree.children(draw)]
    assert len(seeds) == 24, "half of 96 NFE, two a seed"
    assert (tree.step_index[seeds] == 4).all()
    assert not np.isnan(tree.value[seeds]).any()
    coarse = [sample for sample in result.finished if sample.nfe_when_found == 48 + 24]
    assert len(coarse) == 12, "a quarter of 96 NFE, two a rollout"
    for sample in coarse:
        path = path_to_root(tree, sample.node)[:-2]
        assert tree.stride[path].tolist() == [4, 4, 4, 4]
        assert np.isnan(tree.eta[path]).all(), "it steps as the user's own scheduler"
    finished = {path_to_root(tree, sample.node)[-3] for sample in coarse}
    assert finished == {seeds[i] for i in best_first(tree.value[seeds])[:12]}
    # The first greedy rollout goes on from the seed of the best of them.
    best = path_to_root(tree, max(coarse, key=lambda sample: sample.reward).node)[-3]
    assert len(tree.children(best)) > 2
    assert all(len(tree.children(seed)) <= 1 for seed in seeds if seed != best)


def test_a_share_that_pays_for_one_seed_at_most_seeds_none() -> None:
    (result,) = search(MCTD(seed_share=0.15), guided_environment(1, 16), nfe=20)
    draws = result.tree.children(ROOT)
    assert len(draws) > 1, "candidates of a greedy rollout from the root"
    assert not np.isnan(result.tree.value[list(draws)]).any()


def test_without_guidance_to_weaken_there_are_no_seeds() -> None:
    (result,) = search(MCTD(), small_environment(1, 16), nfe=96)
    draws = result.tree.children(ROOT)
    assert not np.isnan(result.tree.value[list(draws)]).any(), "noises are valued as they are"


def test_guidance_is_a_share_of_the_calls_where_it_can_be_chosen() -> None:
    environment = guided_environment(1, 8)
    (problem,) = problems_of(environment, Budget(nfe=60))
    strategy = MCTD(value_guidance=0.5, rollout_guidance=0.75)
    asked: dict[type, set[float | None]] = {Step: set(), Value: set()}
    for request, _ in step_by_hand(strategy, problem, environment):
        if isinstance(request, Step):
            asked[Step] |= {action.guidance for action in request.actions}
        elif isinstance(request, Value):
            asked[Value].add(request.guidance)
    assert asked == {Step: {0.5, 0.75}, Value: {0.5}}


def test_values_below_a_node_decide_where_the_search_goes_on() -> None:
    # Without exploration and with max backups, most visits go through the best draw.
    strategy = MCTD(exploration=0.0, first_share=0.2, widening_constant=1.0, wave_size=1)
    for result in search(strategy, rugged_environment(2, num_steps=8, first_seed=5), nfe=150):
        tree = result.tree
        draws = [node for node in tree.children(ROOT) if tree.visit_count[node]]
        assert result.best is not None
        best_draw = path_to_root(tree, result.best.node)[-2]
        assert tree.max_value[best_draw] == max(tree.max_value[draws])
        assert tree.visit_count[best_draw] == max(tree.visit_count[draws])
