"""Noise search: fresh and perturbed noise, at the start or on every edge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import BudgetError, ConfigError
from mctd_diffusers.evaluation.mixture_worlds import rugged_environment
from mctd_diffusers.search.runner import SearchResult
from mctd_diffusers.search.strategies import PRESETS, BestOfN, NoiseSearch
from mctd_diffusers.search.tree import DRAW, PERTURB, ROOT, STEP, Tree, subtree
from tests.toys import PRICES, search, small_environment

NUM_STEPS = 8
counts = st.integers(1, 4)


def run(strategy: NoiseSearch, nfe: int | None, cost: float | None = None) -> SearchResult:
    prices = None if cost is None else PRICES
    (result,) = search(strategy, small_environment(1, NUM_STEPS, prices=prices), nfe=nfe, cost=cost)
    return result


# ---- over the initial noise


@settings(max_examples=20)
@given(
    method=st.sampled_from(("random", "zero_order")),
    candidates=counts,
    stride=st.integers(1, 5),
    nfe=st.integers(8, 60),
)
def test_rollouts_spend_what_they_say(method, candidates: int, stride: int, nfe: int) -> None:
    result = run(NoiseSearch(method, candidates=candidates, stride=stride), nfe)
    edges = -(-NUM_STEPS // stride)
    assert result.spent.nfe == edges * len(result.finished) == edges * (nfe // edges)
    assert result.spent.previews == 0
    assert result.spent.decodes == len(result.finished)
    assert result.tree.visit_count[ROOT] == len(result.finished)


def test_zero_order_search_moves_to_the_best_neighbour_if_it_is_better() -> None:
    result = run(NoiseSearch("zero_order", candidates=3, stride=4, strength=0.4), 2 * 40)
    tree = result.tree
    noises = np.flatnonzero(tree.step_index == 0)
    assert tree.move[noises[0]] == DRAW
    assert (tree.move[noises[1:]] == PERTURB).all()
    assert (tree.eta[noises[1:]] == 0.4).all()
    rewards = {int(noise): reward_below(result, int(noise)) for noise in noises}
    pivot = int(noises[0])
    moves = 0
    for first in range(1, len(noises), 3):
        turn = [int(noise) for noise in noises[first : first + 3]]
        assert [int(tree.parent[noise]) for noise in turn] == [pivot] * len(turn)
        best = max(turn, key=lambda noise: rewards[noise])
        if rewards[best] > rewards[pivot]:
            pivot, moves = best, moves + 1
    assert result.best is not None
    assert result.best.reward == rewards[pivot]
    assert 0 < moves < 13


def reward_below(result: SearchResult, noise: int) -> float:
    """Reward of the sample that the rollout of an initial noise ends in."""
    tree = result.tree
    (node,) = (child for child in tree.children(noise) if tree.move[child] == STEP)
    while tree.step_index[node] < NUM_STEPS:
        (node,) = tree.children(node)
    return float(tree.reward[node])


def test_random_search_is_best_of_n() -> None:
    ours = run(NoiseSearch("random", stride=1), 50)
    (theirs,) = search(BestOfN(), small_environment(1, NUM_STEPS), nfe=50)
    assert ours.best is not None
    assert theirs.best is not None
    assert ours.best.reward == theirs.best.reward


# ---- over the noise of every edge


@settings(max_examples=20)
@given(candidates=counts, rounds=counts, stride=st.integers(1, 8), spare=st.integers(0, 30))
def test_a_pass_spends_what_it_says(candidates: int, rounds: int, stride: int, spare: int) -> None:
    strategy = NoiseSearch(candidates=candidates, rounds=rounds, stride=stride)
    edges = -(-NUM_STEPS // stride)
    of_pass = 1 + (edges - 1) * candidates * rounds
    assert strategy.least_evaluations(NUM_STEPS) == of_pass
    passes = 1 + spare % 3
    result = run(strategy, passes * of_pass + min(spare, of_pass - 1))
    assert len(result.finished) == passes
    assert result.spent.nfe == passes * of_pass
    is_choice = candidates * rounds > 1
    assert result.spent.previews == (passes * (of_pass - 1) if is_choice else 0)


@pytest.mark.parametrize(
    ("nfe", "per_edge"), [(8, 1), (15, 2), (21, 2), (22, 3), (30, 4), (57, 8), (120, 16)]
)
def test_rounds_and_candidates_follow_the_budget(nfe: int, per_edge: int) -> None:
    result = run(NoiseSearch(stride=1), nfe)
    tree = result.tree
    assert len(result.finished) == 1
    for step_index in range(1, NUM_STEPS):
        tried = tree.step_index == step_index
        assert tried.sum() == per_edge
        # The first round draws: 4 at most, and as many as there are below.
        assert (tried & (tree.move == STEP)).sum() >= min(per_edge, 4)


def in_first_pass(tree: Tree, step_index: int) -> list[int]:
    """Nodes at a step index below the first initial noise."""
    return [int(node) for node in subtree(tree, 1) if tree.step_index[node] == step_index]


def test_what_is_set_stays_and_the_rest_follows_the_budget() -> None:
    for settings_, per_edge in (
        ({"candidates": 3}, 6),  # 8 candidates an edge are paid
        ({"rounds": 2}, 8),
        ({"rounds": 3}, 6),
        ({"rounds": 1}, 4),  # and with what is left another pass, of 3
    ):
        tree = run(NoiseSearch(stride=1, brake_nats=1000, **settings_), 57).tree
        assert len(in_first_pass(tree, 1)) == per_edge, settings_


def test_the_brake_makes_passes_of_a_large_budget() -> None:
    braked = run(NoiseSearch(stride=1, brake_nats=7 * np.log(4)), 57)
    assert len(braked.finished) == 2
    assert len(in_first_pass(braked.tree, 1)) == 4
    free = run(NoiseSearch(stride=1, brake_nats=7 * np.log(9)), 57)
    assert len(free.finished) == 1


@pytest.mark.parametrize(("epsilon", "perturbed"), [(0.0, 12), (1.0, 0)])
def test_epsilon_is_the_probability_of_a_fresh_draw_after_the_first_round(
    epsilon: float, perturbed: int
) -> None:
    strategy = NoiseSearch(candidates=4, rounds=4, stride=1, epsilon=epsilon, strength=0.3)
    tree = run(strategy, 200).tree
    for step_index in range(1, NUM_STEPS):
        at = tree.step_index == step_index
        assert (at & (tree.move == PERTURB)).sum() == perturbed
        assert (at & (tree.move == STEP)).sum() == 16 - perturbed
    assert set(tree.eta[tree.move == PERTURB].tolist()) <= {0.3}
    # In between it is a share: 12 draws on each of 7 edges, within four standard errors.
    tree = run(NoiseSearch(candidates=4, rounds=4, stride=1, epsilon=0.4), 200).tree
    share = 1 - (tree.move == PERTURB).sum() / 84
    assert share == pytest.approx(0.4, abs=4 * (0.4 * 0.6 / 84) ** 0.5)


def test_each_edge_goes_on_from_the_best_value_of_all_its_rounds() -> None:
    tree = run(NoiseSearch(candidates=3, rounds=3, stride=1), 64).tree
    for step_index in range(1, NUM_STEPS):
        tried = np.flatnonzero(tree.step_index == step_index)
        chosen = [
            node
            for node in tried
            if any(tree.step_index[child] > step_index for child in tree.children(int(node)))
        ]
        assert chosen == [tried[np.argmax(tree.value[tried])]]


def test_other_noise_helps_more_than_none() -> None:
    """Perturbing by nothing tries the same noise again and again."""
    rewards = []
    for strength in (0.0, 0.5):
        strategy = NoiseSearch(epsilon=0.0, strength=strength)
        results = search(strategy, rugged_environment(16, num_steps=16, first_seed=2), nfe=128)
        rewards.append([result.best.reward for result in results if result.best])
    gain = np.subtract(rewards[1], rewards[0])
    assert gain.mean() > 3 * gain.std() / 4  # measured: five standard errors


# ---- budgets and settings


def test_a_cost_budget_pays_for_values_too() -> None:
    for cost in (12.0, 20.0, 60.0):
        result = run(NoiseSearch(stride=1), None, cost)
        assert PRICES.cost(result.spent) <= cost
        assert result.finished
    plain = 8 + PRICES.decode + PRICES.reward_call
    assert run(NoiseSearch(stride=1), None, plain).spent.previews == 0  # as least_evaluations says
    with pytest.raises(BudgetError, match="cannot pay for one pass of noise search with its 29"):
        run(NoiseSearch(stride=1, candidates=4, rounds=1), None, 29 + 2.0)


def test_published_settings_have_their_names() -> None:
    zero_order, eps_greedy = PRESETS["zero-order"], PRESETS["eps-greedy"]
    assert zero_order == NoiseSearch("zero_order", strength=0.31, stride=1)
    assert eps_greedy == NoiseSearch("eps_greedy", strength=0.15, stride=1)
    # lambda of .95 in zero-order search's own parametrisation
    assert (1 - 0.95**2) ** 0.5 == pytest.approx(zero_order.strength, abs=0.005)
    assert 0.15 / (1 + 0.15**2) ** 0.5 == pytest.approx(eps_greedy.strength, abs=0.005)


def test_edges_without_noise_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"branch_eta is 0; without noise .* a share above 0"):
        NoiseSearch(branch_eta=0)
