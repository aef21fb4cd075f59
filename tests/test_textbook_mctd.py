"""MCTD as published: UCT against its formula, actions taken once, visits that none of them lose."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.ground_truth import QuadraticReward
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.evaluation.mixture_worlds import rugged_environment
from mctd_diffusers.search.runner import SearchResult
from mctd_diffusers.search.strategies import TextbookMCTD, resolve_strategy
from mctd_diffusers.search.tree import ROOT, STEP, Tree, path_to_root
from tests.strategies import textbook_mctds
from tests.toys import PRICES, CountingEnvironment, search, small_environment, small_mixture


def guided_environment(num_steps: int) -> MixtureEnvironment:
    """A mixture whose prompt sharpens it, so that guidance tells children apart."""
    return MixtureEnvironment(
        [small_mixture(1)],
        [QuadraticReward(np.ones(3), np.full(3, 0.5))],
        num_steps=num_steps,
        unconditional=[small_mixture(2)],
    )


def run(strategy: TextbookMCTD, num_steps: int, nfe: int) -> SearchResult:
    """A search of a small mixture, with a budget that pays for a sample at least."""
    nfe = max(nfe, strategy.least_evaluations(num_steps))
    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    return result


def expansion(tree: Tree, leaf: int, strategy: TextbookMCTD) -> tuple[int, int]:
    """The node that was expanded by the simulation that ended at ``leaf``, and the new child.

    A simulation goes on from each of its states before anybody else can: it made all first children
    up to the node that it began with.
    """
    row = leaf
    while tree.parent[row] != ROOT and tree.children(int(tree.parent[row]))[0] == row:
        row = int(tree.parent[row])
    node = int(tree.parent[row])
    num_steps = int(tree.step_index[leaf])
    end = 0 if node == ROOT else tree.step_index[node] + math.ceil(num_steps / strategy.depth)
    (child,) = [r for r in path_to_root(tree, leaf) if tree.step_index[r] == min(end, num_steps)]
    return node, child


# ---- the algorithm box


@settings(max_examples=25)
@given(textbook_mctds, st.integers(1, 40), st.integers(1, 8), st.integers(1, 80))
def test_visits_are_conserved_at_any_wave_size(
    strategy: TextbookMCTD, wave_size: int, num_steps: int, nfe: int
) -> None:
    result = run(replace(strategy, wave_size=wave_size), num_steps, nfe)
    tree = result.tree
    assert not tree.in_flight.any()
    assert tree.visit_count[ROOT] == len(result.finished)
    for node in range(tree.num_nodes):
        below = list(tree.children(node))
        if below:
            assert tree.visit_count[node] == tree.visit_count[below].sum()
            assert tree.max_value[node] == tree.max_value[below].max()
        else:
            assert tree.visit_count[node] == 1
            assert tree.max_value[node] == tree.reward[node]


@pytest.mark.parametrize("wave_size", [1, 20])
@pytest.mark.parametrize("redundancy_weight", [0.0, 1.0])
def test_no_visit_is_lost_where_published_code_counts_a_batch_as_one(
    wave_size: int, redundancy_weight: float
) -> None:
    strategy = TextbookMCTD(wave_size=wave_size, redundancy_weight=redundancy_weight)
    (result,) = search(strategy, rugged_environment(1, num_steps=10, first_seed=1), nfe=400)
    assert len(result.finished) > 80
    assert result.tree.visit_count[ROOT] == len(result.finished)


@pytest.mark.parametrize("exploration", [0.1, 1.0])
def test_selection_is_the_formula_of_the_paper(exploration: float) -> None:
    strategy = TextbookMCTD(guidances=(None,) * 3, noises=4, depth=4, exploration=exploration)
    (result,) = search(strategy, rugged_environment(1, num_steps=8, first_seed=3), nfe=300)
    tree = result.tree
    children: dict[int, list[int]] = {ROOT: []}
    rewards: dict[int, list[float]] = {ROOT: []}  # of all simulations through a node
    num_choices = 0

    def is_tried(node: int) -> bool:
        return len(children[node]) == (4 if node == ROOT else 3)

    def is_done(node: int) -> bool:
        return tree.step_index[node] == 8 or (
            is_tried(node) and all(is_done(child) for child in children[node])
        )

    for sample in result.finished:  # one simulation after the other
        node = ROOT
        while is_tried(node):
            low, high = min(rewards[ROOT]), max(rewards[ROOT])
            total = sum(len(rewards[child]) for child in children[node])
            scores = {}
            for child in children[node]:
                if not is_done(child):
                    visits = len(rewards[child])
                    bonus = math.sqrt(2) * math.sqrt(math.log(total) / visits)
                    value = (max(rewards[child]) - low) / (high - low)
                    scores[child] = value + exploration * bonus
            num_choices += len(scores) > 1
            node = max(scores, key=lambda child: scores[child])
        parent, child = expansion(tree, sample.node, strategy)
        assert parent == node
        children[node].append(child)
        children[child], rewards[child] = [], []
        for row in path_to_root(tree, child):
            if row in rewards:
                rewards[row].append(sample.reward)
    assert num_choices > 30


@settings(max_examples=25)
@given(textbook_mctds, st.integers(1, 10), st.integers(1, 90))
def test_each_action_is_taken_once(strategy: TextbookMCTD, num_steps: int, nfe: int) -> None:
    nfe = max(nfe, strategy.least_evaluations(num_steps))
    (result,) = search(strategy, guided_environment(num_steps), nfe=nfe)
    tree = result.tree
    for node in range(1, tree.num_nodes):
        below = list(tree.children(node))
        scales = [scale for scale in tree.guidance[below].tolist() if not math.isnan(scale)]
        named = [scale for scale in strategy.guidances if scale is not None]
        # An expansion for each scale, one for each `None`, and a simulation.
        assert all(scales.count(scale) <= named.count(scale) for scale in scales)
        assert len(below) <= len(strategy.guidances) + 1


def test_guidance_is_the_action_where_it_is_free_and_noise_elsewhere() -> None:
    strategy = TextbookMCTD(guidances=(0.5, 2.0), branch_eta=0.0)
    (guided,) = search(strategy, guided_environment(10), nfe=150)
    tree = guided.tree
    inside = (tree.move == STEP) & ~np.isnan(tree.guidance)
    assert set(tree.guidance[inside].tolist()) == {0.5, 2.0}
    # Without fresh noise guidance alone tells them apart.
    assert len(set(tree.reward[~np.isnan(tree.reward)].tolist())) == len(guided.finished)
    (plain,) = search(TextbookMCTD(guidances=(0.5, 2.0)), small_environment(1, 10), nfe=150)
    assert np.isnan(plain.tree.guidance).all()
    assert len({sample.reward for sample in plain.finished}) == len(plain.finished)


# ---- what it spends


@settings(max_examples=25)
@given(textbook_mctds, st.integers(1, 10), st.integers(1, 90))
def test_the_nfe_are_those_of_its_formula(strategy: TextbookMCTD, num_steps: int, nfe: int) -> None:
    result = run(strategy, num_steps, nfe)
    tree = result.tree
    jump = strategy.simulation_stride or max(1, round(num_steps / 5))
    spent = 0
    for sample in result.finished:
        node, child = expansion(tree, sample.node, strategy)
        begin, end = int(tree.step_index[node]), int(tree.step_index[child])
        if node != ROOT:  # which is evaluated already
            spent += math.ceil((end - begin) / strategy.expansion_stride) - 1
        spent += math.ceil((num_steps - end) / jump)
    assert result.spent.nfe == spent
    assert result.spent.previews == 0
    assert result.spent.decodes == len(result.finished)
    assert strategy.least_evaluations(num_steps) == math.ceil(num_steps / jump)


@settings(max_examples=25)
@given(textbook_mctds, st.integers(1, 10), st.integers(1, 90))
def test_the_budget_is_used_up(strategy: TextbookMCTD, num_steps: int, nfe: int) -> None:
    nfe = max(nfe, strategy.least_evaluations(num_steps))
    result = run(strategy, num_steps, nfe)
    dearest = math.ceil(num_steps / strategy.depth) + strategy.least_evaluations(num_steps)
    assert nfe - dearest < result.spent.nfe <= nfe
    assert result.stop_reason == "budget"


def test_a_cost_budget_is_kept() -> None:
    environment = small_environment(2, 6, prices=PRICES)
    for result in search(TextbookMCTD(wave_size=5), environment, nfe=None, cost=70.0):
        assert 58 < PRICES.cost(result.spent) <= 70 + 1e-6


def test_when_all_is_tried_another_noise_joins() -> None:
    strategy = TextbookMCTD(guidances=(None, None), noises=1, depth=2, wave_size=3)
    (result,) = search(strategy, small_environment(1, 4), nfe=100)
    tree = result.tree
    assert len(tree.children(ROOT)) > 3
    # Of each noise but the last: itself, two halves, and two ends of each.
    for noise in tree.children(ROOT)[:-1]:
        assert tree.visit_count[noise] == 1 + 2 + 2 * 2


def test_a_wave_fills_calls_and_takes_other_edges_only_by_choice() -> None:
    calls = {}
    for wave_size in (1, 16):
        environment = small_environment(1, 10, make=CountingEnvironment)
        assert isinstance(environment, CountingEnvironment)
        (result,) = search(TextbookMCTD(wave_size=wave_size, noises=8), environment, nfe=300)
        denoised = [size for kind, size in environment.sizes if kind == "denoise"]
        calls[wave_size] = len(denoised)
        assert sum(denoised) == result.spent.nfe
    assert calls[16] < calls[1] / 4


# ---- settings


@pytest.mark.parametrize("wrong", [(-1.0,), (2.0, float("nan"))])
def test_scales_of_guidance_are_refused_by_value(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"guidances is (-1\.0|nan); give a number of at least 0"):
        TextbookMCTD(guidances=wrong)


def test_an_action_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"guidances is \(\); give at least one scale"):
        TextbookMCTD(guidances=())


def test_published_names_have_the_switches_of_their_papers() -> None:
    paper, fast = resolve_strategy("mctd-paper"), resolve_strategy("fast-mctd")
    assert isinstance(paper, TextbookMCTD)
    assert isinstance(fast, TextbookMCTD)
    assert paper == TextbookMCTD()
    assert (paper.wave_size, paper.expansion_stride, paper.exploration) == (1, 1, 1.0)
    assert fast.wave_size > 1
    assert fast.expansion_stride > 1
    assert replace(fast, wave_size=1, expansion_stride=1) == paper
