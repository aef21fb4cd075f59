"""Evolution: populations of finished samples whose states are mutated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.mixture_worlds import rugged_environment
from mctd_diffusers.search.runner import SearchResult
from mctd_diffusers.search.strategies import PRESETS, BestOfN, Evolution
from mctd_diffusers.search.strategies.evolution import tournaments
from mctd_diffusers.search.tree import DRAW, PERTURB, ROOT, STEP, path_to_root
from tests.toys import PRICES, search, small_environment

NUM_STEPS = 10


def run(strategy: Evolution, nfe: int | None, cost: float | None = None) -> SearchResult:
    prices = None if cost is None else PRICES
    (result,) = search(strategy, small_environment(1, NUM_STEPS, prices=prices), nfe=nfe, cost=cost)
    return result


def populations(result: SearchResult) -> dict[int, int]:
    """Samples that began at each step index; ``-1`` for the start."""
    tree = result.tree
    begun = np.flatnonzero((tree.move == DRAW) | (tree.move == PERTURB))
    steps = np.where(tree.move[begun] == DRAW, -1, tree.step_index[begun])
    return {int(step): int((steps == step).sum()) for step in np.unique(steps)}


# ---- what it spends


def test_populations_split_the_budget_as_they_are_set() -> None:
    """The paper's own: 42, 26, 26, 26 and 30 samples of 50, 50, 30, 20 and 10 steps: 5000 NFE."""
    (result,) = search(Evolution(stride=1), small_environment(1, 50), nfe=5000)
    assert populations(result) == {-1: 42, 0: 26, 20: 26, 30: 26, 40: 30}
    assert result.spent.nfe == 5000
    (half,) = search(Evolution(stride=1), small_environment(1, 50), nfe=2500)
    assert populations(half) == {-1: 21, 0: 13, 20: 13, 30: 13, 40: 15}


@settings(max_examples=25)
@given(stride=st.integers(1, 4), nfe=st.integers(10, 120), late=st.sampled_from((0.0, 0.5, 0.9)))
def test_it_spends_what_its_populations_say(stride: int, nfe: int, late: float) -> None:
    schedule = (late,) if late else (0.0, 0.4, 0.8)
    sizes = (3,) * (len(schedule) + 1)
    strategy = Evolution(stride=stride, schedule=schedule, populations=sizes)
    result = run(strategy, nfe)
    ends = np.minimum(np.arange(stride, NUM_STEPS + stride, stride), NUM_STEPS)
    spent = sum(
        count * int((ends > max(begin, 0)).sum()) for begin, count in populations(result).items()
    )
    assert result.spent.nfe == spent <= nfe
    assert len(result.finished) == sum(populations(result).values())
    assert result.spent.decodes == len(result.finished)
    assert result.spent.previews == 0
    # What is left pays for none of the last, and cheapest, population.
    last = max(populations(result), default=0)
    assert nfe - spent < max(int((ends > max(last, 0)).sum()), 1) or last < late * NUM_STEPS - 1


def test_without_enough_for_a_population_there_is_one_sample_and_its_late_mutants() -> None:
    result = run(Evolution(stride=1), 10)
    assert populations(result) == {-1: 1}
    result = run(Evolution(stride=1), 14)
    assert populations(result) == {-1: 1, 6: 1}
    result = run(Evolution(stride=1), 12)
    assert populations(result) == {-1: 1, 8: 1}


def test_a_cost_budget_pays_for_the_rewards_too() -> None:
    result = run(Evolution(), None, 60.0)
    assert 60 - PRICES.cost(result.spent) < 10
    assert len(populations(result)) > 2


# ---- where and how it mutates


def test_states_are_mutated_where_the_schedule_says_and_never_on_the_last_edge() -> None:
    result = run(Evolution(stride=1, strength=0.3, state_strength=0.6, branch_eta=0.9), 400)
    tree = result.tree
    assert set(populations(result)) == {-1, 0, 4, 6, 8}
    mutants = tree.move == PERTURB
    assert (tree.eta[mutants & (tree.step_index == 0)] == 0.3).all()
    assert (tree.eta[mutants & (tree.step_index > 0)] == 0.6).all()
    steps = tree.move == STEP
    landing = np.isin(tree.step_index, (4, 6, 8))
    assert (tree.eta[steps & landing] == 0.9).all()
    assert np.isnan(tree.eta[steps & ~landing]).all()
    assert tree.step_index[mutants].max() < NUM_STEPS


@pytest.mark.parametrize(
    ("stride", "stands"),
    [
        (1, {0, 4, 6, 8}),
        (2, {0, 4, 6, 8}),
        (4, {0, 4, 8}),
        (7, {0, 7}),
        (10, {0}),
        (None, {0, 4, 6, 8}),
    ],
)
def test_coarse_rollouts_are_mutated_at_the_nearest_of_their_states(
    stride: int | None, stands: set[int]
) -> None:
    result = run(Evolution(stride=stride), 400)
    assert set(populations(result)) - {-1} == stands


def test_mutants_descend_from_elites_or_the_last_population() -> None:
    result = run(Evolution(stride=2, elites=2), 300)
    tree = result.tree
    leaves = [sample.node for sample in result.finished]  # in the order of their populations
    begins = []
    for leaf in leaves:
        moves = tree.move[path_to_root(tree, leaf)]
        begun = path_to_root(tree, leaf)[int(np.argmax(np.isin(moves, (DRAW, PERTURB))))]
        begins.append((begun, -1 if tree.move[begun] == DRAW else int(tree.step_index[begun])))
    parents: list[int] = []
    for generation in sorted({begin for _, begin in begins}):
        members = [i for i, (_, begin) in enumerate(begins) if begin == generation]
        if parents:
            states = {
                node for leaf in parents for node in path_to_root(tree, leaf)
                if tree.step_index[node] == generation
            }  # fmt: skip
            assert {int(tree.parent[begins[i][0]]) for i in members} <= states
        order = sorted(parents, key=lambda leaf: -tree.reward[leaf])
        parents = order[:2] + [leaves[i] for i in members]
    assert tree.visit_count[ROOT] == len(leaves)


@settings(max_examples=25)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=12, unique=True), st.floats(0.01, 1))
def test_a_tournament_is_won_by_the_best_who_meet(fitness: list[int], share: float) -> None:
    generator = np.random.default_rng(0)
    values = np.array(fitness, dtype=np.float64)
    winners = tournaments(values, 20, share=share, generator=generator)
    size = max(1, int(share * len(values)))
    # Among any so many, the best is at least as good as the so-manieth worst.
    assert values[winners].min() >= np.sort(values)[size - 1]
    if size == len(values):
        assert set(winners) == {int(values.argmax())}


def test_who_meets_in_a_tournament_is_drawn_evenly() -> None:
    generator = np.random.default_rng(1)
    winners = tournaments(np.arange(4.0), 4000, share=0.5, generator=generator)
    counts = np.bincount(winners, minlength=4)
    # Of the 6 pairs of 4, the best of each: 0, 1, 2 and 3 of them.
    expected = 4000 * np.array([0, 1, 2, 3]) / 6
    assert counts[0] == 0
    assert (((counts - expected)[1:] ** 2) / expected[1:]).sum() < 13.8  # one in a thousand


def test_mutants_of_the_best_beat_as_many_new_samples() -> None:
    rewards = []
    for strategy in (BestOfN(stride=4), Evolution(stride=4)):
        results = search(strategy, rugged_environment(32, num_steps=16, first_seed=3), nfe=128)
        rewards.append([result.best.reward for result in results if result.best])
    gain = np.subtract(rewards[1], rewards[0])
    assert gain.mean() > 2 * gain.std() / 32**0.5


# ---- settings


def test_the_paper_has_its_name() -> None:
    assert PRESETS["evosearch"] == Evolution(stride=1)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"schedule": (0.4, 0.2)}, "give ascending shares from 0 to below 1"),
        ({"schedule": (0.0, 1.0)}, "give ascending shares from 0 to below 1"),
        ({"schedule": (0.0, 0.0)}, "give ascending shares from 0 to below 1"),
        ({"schedule": (-0.1, 0.5)}, r"schedule is -0\.1; give a number from 0 to 1"),
        ({"schedule": (0.0,)}, "one for each entry of the schedule"),
        ({"populations": (1, 1, 1, 1, 0)}, "give a size above 0 for the first population"),
        ({"populations": (1, 1, 1, 1, -1)}, "populations is -1; give a number of at least 0"),
    ],
)
def test_schedules_and_populations_that_cannot_work_are_refused(
    wrong: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        Evolution(**wrong)
