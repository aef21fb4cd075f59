"""Rollover: when it advances, what it rolls forward, and what that spends."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.environment import Handles, Values
from mctd_diffusers.search.runner import SearchResult
from mctd_diffusers.search.strategies import BestOfN, Rollover, resolve_strategy
from mctd_diffusers.search.tree import DRAW, ROOT, STEP, Tree, path_to_root
from tests.toys import PRICES, Guidances, search, small_environment


class RisingEnvironment(MixtureEnvironment):
    """Every sample is valued above all that were valued before."""

    asked: int = 0

    def value(self, handles: Handles, guidances: Guidances = None) -> Values:
        super().value(handles, guidances)
        self.asked += len(handles)
        return self.asked - np.arange(len(handles), dtype=np.float64)[::-1]


class FallingEnvironment(RisingEnvironment):
    """Every sample is valued below all that were valued before."""

    def value(self, handles: Handles, guidances: Guidances = None) -> Values:
        return -super().value(handles, guidances)


def run(strategy: Rollover, nfe: int, num_steps: int, make: Any) -> SearchResult:
    (result,) = search(strategy, small_environment(1, num_steps, make=make), nfe=nfe)
    return result


def tried(tree: Tree, step_index: int) -> list[int]:
    """Children that were made at a step index, in order."""
    return np.flatnonzero((tree.step_index == step_index) & (tree.move == STEP)).tolist()


settings_of_any = {
    "initial_share": st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    "stride": st.integers(1, 4),
    "wave_size": st.integers(1, 4),
    "num_steps": st.integers(2, 9),
    "extra": st.integers(0, 40),
}


@settings(max_examples=30)
@given(**settings_of_any)
def test_where_no_child_is_better_quotas_use_up_the_budget(
    initial_share: float, stride: int, wave_size: int, num_steps: int, extra: int
) -> None:
    strategy = Rollover(initial_share=initial_share, stride=stride, wave_size=wave_size)
    edges = -(-num_steps // stride)
    assert strategy.least_evaluations(num_steps) == edges
    assume(edges > 1)
    nfe = edges + extra
    result = run(strategy, nfe, num_steps, FallingEnvironment)
    assert result.spent.nfe == result.spent.previews == nfe
    assert len(result.finished) == 1
    tree = result.tree
    noises = int((tree.move == DRAW).sum())
    assert noises == min(max(1, int(initial_share * nfe)), nfe - (edges - 1))
    for edge in range(1, edges):
        quota = (nfe - noises) * edge // (edges - 1) - (nfe - noises) * (edge - 1) // (edges - 1)
        assert len(tried(tree, edge * stride)) == quota


@settings(max_examples=30)
@given(**settings_of_any)
def test_where_every_child_is_better_it_advances_at_once_and_starts_anew(
    initial_share: float, stride: int, wave_size: int, num_steps: int, extra: int
) -> None:
    strategy = Rollover(initial_share=initial_share, stride=stride, wave_size=wave_size)
    edges = -(-num_steps // stride)
    left = edges + extra
    passes = spent = 0
    while left >= edges:
        noises = min(max(1, int(initial_share * left)), left - (edges - 1))
        used = 0
        for edge in range(1, edges):
            used += min(wave_size, (left - noises) * edge // (edges - 1) - used)
        passes, spent, left = passes + 1, spent + noises + used, left - noises - used
    result = run(strategy, edges + extra, num_steps, RisingEnvironment)
    assert result.spent.nfe == result.spent.previews == spent
    assert len(result.finished) == passes == result.tree.visit_count[ROOT]


def test_an_unused_quota_is_rolled_forward_to_the_next_edge() -> None:
    # 21 NFE over 5 edges: one noise, then quotas of 5 for each of four. The second child is better;
    # then none is, so the next edge takes 5 + 3; then the first is, and 4 are rolled to the last.
    script = [0.0, -1.0, 1.0, *[0.5] * 8, 2.0, *[1.0] * 9]

    class Scripted(MixtureEnvironment):
        def value(self, handles: Handles, guidances: Guidances = None) -> Values:
            super().value(handles, guidances)
            return np.array([script.pop(0) for _ in handles])

    result = run(Rollover(initial_share=0.0, wave_size=1), 21, 5, Scripted)
    assert [len(tried(result.tree, level)) for level in range(1, 5)] == [2, 8, 1, 9]
    assert result.spent.nfe == 1 + 2 + 8 + 1 + 9
    assert not script


@settings(max_examples=25)
@given(
    threshold=st.none() | st.floats(-3, 3),
    wave_size=st.integers(1, 3),
    num_steps=st.integers(3, 6),
    nfe=st.integers(12, 60),
)
def test_it_advances_as_soon_as_a_child_is_good_enough_and_else_to_the_best(
    threshold: float | None, wave_size: int, num_steps: int, nfe: int
) -> None:
    strategy = Rollover(threshold=threshold, wave_size=wave_size, initial_share=0.3)
    result = run(strategy, nfe, num_steps, MixtureEnvironment)
    tree = result.tree
    first = result.finished[0]  # of the first pass
    path = path_to_root(tree, first.node)[::-1]
    noises = [node for node in tree.children(ROOT) if node < path[2]]
    assert tree.value[path[1]] == tree.value[noises].max()
    fixed = None
    if threshold is not None:
        fixed = tree.value[noises].mean() + threshold * tree.value[noises].std()
    used = len(noises)
    for edge, (parent, kept) in enumerate(pairwise(path[1:-1]), start=1):
        children = list(tree.children(parent))
        bar = tree.value[parent] if fixed is None else fixed
        values = tree.value[children]
        waves = [values[i : i + wave_size] for i in range(0, len(values), wave_size)]
        used += len(children)
        assert kept == children[int(np.argmax(values))]
        assert not any((wave > bar).any() for wave in waves[:-1])
        quota_is_used = used == len(noises) + (nfe - len(noises)) * edge // (num_steps - 1)
        assert (waves[-1] > bar).any() or quota_is_used


def test_a_wave_of_one_tries_no_child_in_vain() -> None:
    result = run(Rollover(wave_size=1, initial_share=0.0), 40, 8, RisingEnvironment)
    assert result.spent.nfe == 40  # five samples, as of best of n
    assert len(result.finished) == 5
    tree = result.tree
    assert max(len(tree.children(node)) for node in range(1, tree.num_nodes)) == 1


def test_a_threshold_out_of_reach_makes_it_a_beam_of_even_quotas() -> None:
    strategy = Rollover(threshold=1e9, initial_share=0.0)
    result = run(strategy, 2 + 4 * 7, 8, MixtureEnvironment)
    assert [len(tried(result.tree, level)) for level in range(1, 8)] == [4] * 7


def test_an_account_that_pays_for_no_values_still_pays_for_a_sample() -> None:
    environment = small_environment(1, 4, prices=PRICES)
    cost = 4 + PRICES.decode + PRICES.reward_call
    (result,) = search(Rollover(), environment, nfe=None, cost=cost)
    (plain,) = search(BestOfN(n=1), small_environment(1, 4), nfe=4)
    assert result.spent.previews == 0
    assert [sample.reward for sample in result.finished] == [plain.finished[0].reward]


@pytest.mark.parametrize("cost", [12.0, 30.0, 100.0])
def test_a_budget_in_cost_pays_for_values_too(cost: float) -> None:
    environment = small_environment(1, 4, prices=PRICES, make=FallingEnvironment)
    (result,) = search(Rollover(), environment, nfe=None, cost=cost)
    each = 1 + PRICES.preview + PRICES.reward_call
    nfe = int((cost - PRICES.decode - PRICES.reward_call) / each)
    assert result.spent.nfe == result.spent.previews == nfe
    assert environment.ledger.cost <= cost


def test_published_names_are_its_settings() -> None:
    assert resolve_strategy("rbf") == Rollover()
    assert resolve_strategy("verifier-threshold") == Rollover(threshold=2.0)
