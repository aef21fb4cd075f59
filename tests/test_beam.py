"""Beam: what it spends, what it keeps, and that without a choice it is plain sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.search.strategies import Beam, BestOfN, resolve_strategy
from mctd_diffusers.search.tree import DRAW, STEP, Tree, path_to_root
from tests.toys import linear_gaussian, search, small_environment


def nats(tree: Tree, node: int) -> float:
    """Summed log of the candidates along the path to ``node``; the draws do not count."""
    return sum(math.log(len(tree.children(parent))) for parent in path_to_root(tree, node)[1:-1])


@pytest.mark.parametrize("passes", [1, 3])
def test_without_a_choice_it_is_plain_ancestral_sampling_of_the_same_seeds(passes: int) -> None:
    nfe = 5 * passes
    beam_world, plain_world = small_environment(2, 5), small_environment(2, 5)
    beams = search(Beam(candidates=1), beam_world, nfe=nfe)
    plain = search(BestOfN(wave_size=1), plain_world, nfe=nfe)
    for beam, sample in zip(beams, plain, strict=True):
        np.testing.assert_array_equal(beam.tree.seed, sample.tree.seed)
        np.testing.assert_array_equal(
            beam_world.latents(beam.tree.handle[1:]), plain_world.latents(sample.tree.handle[1:])
        )
        assert [one.reward for one in beam.finished] == [one.reward for one in sample.finished]


@settings(max_examples=30)
@given(
    candidates=st.integers(1, 4),
    width=st.integers(1, 3),
    stride=st.integers(1, 4),
    block=st.integers(1, 4),
    num_steps=st.integers(1, 9),
    extra=st.integers(0, 25),
)
def test_it_spends_whole_passes_and_nothing_else(
    candidates: int, width: int, stride: int, block: int, num_steps: int, extra: int
) -> None:
    strategy = Beam(candidates=candidates, width=width, stride=stride, block=block)
    edges = -(-num_steps // stride)
    one_pass = width + (edges - 1) * width * candidates
    assert strategy.least_evaluations(num_steps) == one_pass
    nfe = one_pass + extra
    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    passes = nfe // one_pass
    assert result.spent.nfe == passes * one_pass
    tree = result.tree
    assert (tree.move == DRAW).sum() == passes * width
    selections = math.ceil(edges / block) - 1
    assert result.spent.previews == passes * width * candidates * selections
    last_block = edges - selections * block
    assert len(result.finished) == passes * width * (candidates if last_block > 1 else 1)
    strides = tree.stride[tree.move == STEP]
    assert set(strides.tolist()) <= {stride, num_steps - (edges - 1) * stride}


@settings(max_examples=25)
@given(candidates=st.integers(2, 4), width=st.integers(1, 3), num_steps=st.integers(3, 7))
def test_it_goes_on_from_the_best_of_each_level(
    candidates: int, width: int, num_steps: int
) -> None:
    strategy = Beam(candidates=candidates, width=width)
    nfe = strategy.least_evaluations(num_steps)
    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    tree = result.tree
    for step_index in range(1, num_steps - 1):
        level = np.flatnonzero(tree.step_index == step_index)
        assert len(level) == width * candidates
        went_on = [node for node in level if tree.children(int(node))]
        assert len(went_on) == width
        assert sorted(tree.value[went_on]) == sorted(tree.value[level])[-width:]


def test_by_a_temperature_it_goes_on_as_softmax_says() -> None:
    temperature = 0.7
    results = search(
        Beam(candidates=4, temperature=temperature), linear_gaussian(500, 3), nfe=1 + 2 * 4
    )
    taken, law = np.zeros((500, 4)), np.zeros((500, 4))
    for row, result in enumerate(results):
        tree = result.tree
        level = sorted(np.flatnonzero(tree.step_index == 1), key=lambda node: tree.value[node])
        taken[row] = [bool(tree.children(int(node))) for node in level]
        law[row] = np.exp(tree.value[level] / temperature)
        law[row] /= law[row].sum()
    assert (taken.sum(axis=1) == 1).all()
    error = np.sqrt((law * (1 - law)).sum(axis=0))
    # Four standard errors; the best alone would be taken more than a hundred times too often.
    assert (np.abs((taken - law).sum(axis=0)) < 4 * error).all()
    assert (1 - law[:, -1]).sum() > 10 * error[-1]


@settings(max_examples=25)
@given(width=st.integers(1, 3), temperature=st.floats(0.01, 100), num_steps=st.integers(3, 6))
def test_by_a_temperature_it_goes_on_from_states_that_differ(
    width: int, temperature: float, num_steps: int
) -> None:
    strategy = Beam(candidates=3, width=width, temperature=temperature)
    nfe = strategy.least_evaluations(num_steps)
    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    tree = result.tree
    assert result.spent.nfe == nfe
    for step_index in range(1, num_steps - 1):
        level = np.flatnonzero(tree.step_index == step_index)
        assert sum(bool(tree.children(int(node))) for node in level) == width


@pytest.mark.parametrize(
    ("name", "spent"),
    [("svdd", 1 + 15 * 4), ("code", 1 + 15 * 4), ("treeg", 2 + 15 * 2 * 2)],
)
def test_published_searches_take_the_evaluations_of_a_pass(name: str, spent: int) -> None:
    (result,) = search(resolve_strategy(name), small_environment(1, 16), nfe=64)
    assert result.spent.nfe == spent
    assert (result.tree.move == DRAW).sum() == (2 if name == "treeg" else 1)


@settings(max_examples=25)
@given(
    nats_allowed=st.floats(0, 12),
    width=st.integers(1, 2),
    block=st.integers(1, 3),
    num_steps=st.integers(2, 8),
    nfe=st.integers(20, 120),
)
def test_candidates_of_its_own_choice_stay_within_the_brake(
    nats_allowed: float, width: int, block: int, num_steps: int, nfe: int
) -> None:
    strategy = Beam(width=width, block=block, brake_nats=nats_allowed)
    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    tree = result.tree
    selections = math.ceil(num_steps / block) - 1
    if selections:  # within the last block all candidates are finished: best of n, not selection
        for sample in result.finished:
            path = path_to_root(tree, sample.node)
            chosen = [node for node in path if tree.step_index[node] <= selections * block]
            assert nats(tree, chosen[0]) <= nats_allowed + 1e-9


def test_the_budget_is_used_up_to_less_than_a_pass_of_one_more_candidate() -> None:
    for nfe in (16, 40, 64, 100, 256):
        (result,) = search(Beam(), small_environment(1, 16), nfe=nfe)
        passes = int((result.tree.move == DRAW).sum())
        assert nfe - result.spent.nfe < passes * 15 + 1
