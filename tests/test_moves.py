"""The moves of a search that change noise or guidance, in worlds with exact answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import erf
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError, SearchError
from mctd_diffusers.evaluation.ground_truth import LinearReward
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import FIRST_DRAW, Action, Asks, Counts, Gains
from mctd_diffusers.search.moves import (
    denoise,
    draw,
    perturb,
    predict_gain,
    renoise,
    reward,
    step,
    value,
)
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import replay
from mctd_diffusers.search.seeding import edge_seed
from mctd_diffusers.search.tree import DRAW, PERTURB, RENOISE, STEP
from tests.by_hand import step_by_hand
from tests.toys import linear_gaussian, problems_of, search, small_environment, small_mixture

NUM_STEPS = 4
strengths = st.floats(0, 1)


@dataclass(frozen=True)
class Asking:
    """A search that does what it is told."""

    asks: Callable[[Problem], Asks]
    name: str = "asking"

    def least_evaluations(self, num_steps: int) -> int:
        return 1

    def search(self, problem: Problem) -> Asks:
        yield from self.asks(problem)


def array(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def noised(environment: MixtureEnvironment, count: int, step_index: int) -> np.ndarray:
    """Handles of samples of problem 0 at a step index, each of its own noise."""
    handles = environment.reset(np.zeros(count, dtype=np.int64), np.arange(count))
    if step_index:
        environment.denoise(handles)
        actions = [Action(step_index, 1.0)] * count
        handles = environment.step(handles, actions, np.arange(count) + 10**6)
    return handles


# ---- perturbation


@pytest.mark.parametrize("step_index", [0, 2])
def test_a_perturbation_of_strength_0_or_1_is_the_sample_or_a_fresh_one(step_index: int) -> None:
    environment = small_environment(1, NUM_STEPS)
    start = noised(environment, 3, 0)
    environment.denoise(start)
    actions, seeds = [Action(2, 0.8)] * 3, array(5, 6, 7)

    def fresh() -> np.ndarray:
        if step_index == 0:
            return environment.reset(array(0, 0, 0), seeds)
        return environment.step(start, actions, seeds)

    old = start if step_index == 0 else environment.step(start, actions, array(1, 2, 3))
    same = environment.perturb(old, np.zeros(3), seeds)
    other = environment.perturb(old, np.ones(3), seeds)
    np.testing.assert_array_equal(environment.latents(same), environment.latents(old))
    np.testing.assert_array_equal(environment.latents(other), environment.latents(fresh()))


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_perturbation_is_decided_by_its_path_and_costs_nothing(evaluates: bool) -> None:
    environment = small_environment(1, NUM_STEPS)
    old = np.concatenate([noised(environment, 2, 0), noised(environment, 2, 3)])
    if evaluates:
        environment.denoise(old)
    before = environment.ledger.total
    seeds, shares = array(8, 9, 10, 11), np.array([0.1, 0.5, 0.5, 0.9])
    together = environment.latents(environment.perturb(old, shares, seeds))
    for i in (2, 0, 3, 1):
        alone = environment.perturb(old[i : i + 1], shares[i : i + 1], seeds[i : i + 1])
        np.testing.assert_array_equal(environment.latents(alone), together[i : i + 1])
    assert environment.ledger.total == before
    saved = environment.restore(environment.export(old))  # remembers what was injected
    again = environment.latents(environment.perturb(saved, shares, seeds))
    np.testing.assert_array_equal(again, together)


def test_perturbing_leaves_the_law_of_samples_and_correlates_as_it_should() -> None:
    """In closed form: on Gaussian data every sample is Gaussian, with a known deviation."""
    environment = linear_gaussian(1, NUM_STEPS)
    count, strength = 4000, 0.6
    kept = (1 - strength**2) ** 0.5
    for step_index in (0, 2):
        old = noised(environment, count, step_index)
        a, s = environment.alpha, environment.sigma
        fresh = s[2] / s[0] * np.sqrt(1 - (a[0] / a[2]) ** 2)  # at eta = 1
        slope = a[0] * a[2] + s[0] * np.sqrt(s[2] ** 2 - fresh**2)  # for x0hat = alpha x
        injected, variance = (1.0, 1.0) if step_index == 0 else (fresh**2, slope**2 + fresh**2)
        x = environment.latents(old)[:, 0]
        shares = np.full(count, strength)
        once = environment.perturb(old, shares, np.arange(count) + 2 * 10**6)
        twice = environment.perturb(once, shares, np.arange(count) + 3 * 10**6)
        for generation, handles in ((1, once), (2, twice)):
            y = environment.latents(handles)[:, 0]
            covariance = variance - injected * (1 - kept**generation)
            # Four standard errors: sqrt(2/n) of a variance, at most as much of a covariance.
            error = 4 * variance * (2 / count) ** 0.5
            assert y.var() == pytest.approx(variance, abs=error)
            assert np.cov(x, y)[0, 1] == pytest.approx(covariance, abs=error)
            assert kolmogorov_smirnov(y / variance**0.5) < 1.95 / count**0.5  # one in a thousand


def kolmogorov_smirnov(x: np.ndarray) -> float:
    """Largest distance between the samples' distribution function and the standard normal's."""
    expected = np.array([0.5 * (1 + erf(point / 2**0.5)) for point in np.sort(x)])
    ranks = np.arange(len(x) + 1) / len(x)
    return float(max((expected - ranks[:-1]).max(), (ranks[1:] - expected).max()))


@settings(max_examples=20)
@given(st.lists(strengths, min_size=1, max_size=4))
def test_a_chain_of_perturbations_keeps_the_product_of_what_each_keeps(chain: list[float]) -> None:
    environment = linear_gaussian(1, NUM_STEPS)
    handles = noised(environment, 400, 0)
    x = environment.latents(handles)[:, 0]
    for turn, strength in enumerate(chain):
        seeds = np.arange(400) + 1000 * (turn + 1)
        handles = environment.perturb(handles, np.full(400, strength), seeds)
    kept = np.prod([(1 - strength**2) ** 0.5 for strength in chain])
    correlation = np.corrcoef(x, environment.latents(handles)[:, 0])[0, 1]
    assert correlation == pytest.approx(kept, abs=4 * (1 - kept**2) / 400**0.5 + 1e-9)


def test_what_has_no_noise_to_perturb_is_refused_with_the_handles() -> None:
    environment = small_environment(1, NUM_STEPS)
    start = noised(environment, 1, 0)
    environment.denoise(start)
    plain = environment.step(start, [Action(1, 0.0)], array(1))
    finished = environment.step(start, [Action(NUM_STEPS)], array(1))
    for wrong, match in ((plain, "edges without noise"), (finished, "cannot be perturbed")):
        with pytest.raises(SearchError, match=match) as caught:
            environment.perturb(np.concatenate([start, wrong]), np.full(2, 0.5), array(1, 2))
        assert caught.value.handles == tuple(wrong.tolist())
    for strength in (-0.1, 1.1, np.nan):
        with pytest.raises(ConfigError, match="strength is"):
            environment.perturb(start, np.array([strength]), array(1))


# ---- what the tree says


def every_move(problem: Problem) -> Asks:
    """One edge of each move, and a finished sample that all of them led to."""
    nodes = yield from draw(problem, 2)
    nodes = yield from perturb(problem, [*nodes, nodes[0]], strength=0.3)
    yield from denoise(problem, nodes)
    guidance = None if problem.guidance_scale is None else 2.5
    nodes = yield from step(problem, nodes, stride=2, eta=1.0, guidance=guidance)
    nodes = yield from perturb(problem, nodes, strength=0.7)
    nodes = yield from perturb(problem, nodes, strength=0.2)
    yield from denoise(problem, nodes)
    yield from value(problem, nodes)
    nodes = yield from renoise(problem, nodes, step_index=1)
    nodes = yield from perturb(problem, nodes, strength=0.5)
    yield from denoise(problem, nodes)
    left = problem.num_steps - 1
    nodes = yield from step(problem, nodes, stride=left, eta=None)
    yield from reward(problem, nodes)
    (again,) = yield from renoise(problem, nodes[:1], step_index=1)
    yield from denoise(problem, [again])
    nodes = yield from step(problem, [again], stride=left, eta=None)
    yield from reward(problem, nodes)


def test_moves_stand_in_the_tree_with_strength_guidance_and_the_seed_of_their_path() -> None:
    environment = guided_environment()
    (result,) = search(Asking(every_move), environment, nfe=10)
    tree = result.tree
    assert environment.ledger.total.nfe == 3 * 3 + 1
    path = [(int(tree.move[row]), row) for row in reversed(path_rows(tree, tree.num_nodes - 1))]
    assert [move for move, _ in path] == [
        DRAW, PERTURB, STEP, PERTURB, PERTURB, RENOISE, PERTURB, STEP, RENOISE, STEP,
    ]  # fmt: skip
    rows = [row for _, row in path]
    indices = [0, 0, 2, 2, 2, 1, 1, NUM_STEPS, 1, NUM_STEPS]
    assert tree.step_index[rows].tolist() == indices
    assert tree.depth[rows].tolist() == list(range(1, 11))
    etas = [None, 0.3, 1.0, 0.7, 0.2, None, 0.5, None, None, None]
    assert [None if np.isnan(eta) else eta for eta in tree.eta[rows]] == etas
    guidances = tree.guidance[rows]
    assert guidances[2] == 2.5
    assert np.isnan(np.delete(guidances, 2)).all()
    # The second of two perturbations of one noise is its path's, whatever stood beside it.
    second = tree.children(1)[1]
    assert tree.seed[1] == FIRST_DRAW
    assert tree.seed[second] == edge_seed(tree.root_seed, [(DRAW, 0, 0), (PERTURB, 0, 1)])
    ends = edge_seed(tree.root_seed, [(DRAW, 0, 1), (PERTURB, 0, 0), (STEP, 2, 0), (PERTURB, 0, 0)])
    assert ends in tree.seed.tolist()


def path_rows(tree: Any, node: int) -> list[int]:
    """Rows from a node to a draw."""
    rows = [node]
    while tree.parent[rows[-1]] != 0:
        rows.append(int(tree.parent[rows[-1]]))
    return rows


def test_moves_are_the_same_by_hand_and_from_a_log() -> None:
    (result,) = search(Asking(every_move), guided_environment(), nfe=10)
    environment = guided_environment()
    (problem,) = problems_of(environment, Budget(nfe=10))
    for _ in step_by_hand(Asking(every_move), problem, environment):
        pass
    np.testing.assert_array_equal(problem.tree.reward, result.tree.reward)
    (again,) = problems_of(environment, Budget(nfe=10))
    assert replay(Asking(every_move), again, result.replies) is None
    np.testing.assert_array_equal(again.tree.reward, result.tree.reward)
    np.testing.assert_array_equal(again.tree.seed, result.tree.seed)


def test_requests_of_several_images_with_other_strengths_ride_together() -> None:
    def two_images(problem: Problem) -> Asks:
        (node,) = yield from draw(problem, 1)
        (node,) = yield from perturb(problem, [node], strength=0.2 + 0.5 * problem.index)
        (node,) = yield from perturb(problem, [node], strength=0.5)
        yield from denoise(problem, [node])
        leaf = yield from step(problem, [node], stride=NUM_STEPS, eta=None)
        yield from reward(problem, leaf)

    environment = small_environment(2, NUM_STEPS)
    results = search(Asking(two_images), environment, nfe=1)
    for index, result in enumerate(results):
        alone = small_environment(2, NUM_STEPS)
        problems = problems_of(alone, Budget(nfe=1), [index])
        for _ in step_by_hand(Asking(two_images), problems[0], alone):
            pass
        np.testing.assert_array_equal(problems[0].tree.reward, result.tree.reward)


# ---- predictions


def test_predictions_of_several_images_ride_together_and_cost_nothing() -> None:
    found: dict[int, Gains] = {}

    def asking(problem: Problem) -> Asks:
        nodes = yield from draw(problem, 1 + problem.index)
        yield from denoise(problem, nodes)
        strides = (1, 2) if problem.index < 2 else (4, 1, 8)
        found[problem.index] = yield from predict_gain(problem, nodes, strides)
        leaves = yield from step(problem, nodes, stride=NUM_STEPS, eta=None)
        yield from reward(problem, leaves)

    results = search(Asking(asking), small_environment(3, NUM_STEPS), nfe=3)
    together, found = found, {}
    assert [result.spent.nfe for result in results] == [1, 2, 3]
    assert [gains.mean_gain.shape for gains in together.values()] == [(1, 2), (2, 2), (3, 3)]
    for index in range(3):
        alone = small_environment(3, NUM_STEPS)
        (problem,) = problems_of(alone, Budget(nfe=3), [index])
        for _ in step_by_hand(Asking(asking), problem, alone):
            pass
        for one, other in zip(found[index], together[index], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


# ---- guidance


def guided_environment() -> MixtureEnvironment:
    """A mixture that is one of two sorts of data, with guidance away from all of it."""
    reward = LinearReward(np.ones(3))
    return MixtureEnvironment(
        [small_mixture(1)], [reward], num_steps=NUM_STEPS, unconditional=[small_mixture(2)]
    )


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_an_edge_steps_by_the_guided_estimate(guidance: float) -> None:
    environment = guided_environment()
    start = noised(environment, 2, 0)
    environment.denoise(start)
    values = environment.value(start)
    ends = environment.step(start, [Action(NUM_STEPS, None, guidance)] * 2, array(1, 2))
    mixture, (without,) = environment.mixtures[0], environment.unconditional or ()
    x, a, s = environment.latents(start), environment.alpha[0], environment.sigma[0]
    u, c = without.denoised(x, a, s), mixture.denoised(x, a, s)
    np.testing.assert_allclose(environment.latents(ends), u + guidance * (c - u))
    np.testing.assert_allclose(values, environment.rewards[0](c))  # not moved by any edge
    assert environment.ledger.total == Counts(nfe=2, rows=4, calls=1, previews=2, reward_calls=2)


def test_edges_of_other_guidance_share_their_noise_and_nothing_else() -> None:
    environment = guided_environment()
    start = noised(environment, 1, 0)
    environment.denoise(start)
    actions = [Action(1), Action(1, None, 1.0), Action(1, None, 4.0)]
    x = environment.latents(environment.step(np.repeat(start, 3), actions, array(7, 7, 7)))
    np.testing.assert_allclose(x[0], x[1])
    assert (x[0] != x[2]).any()


def test_guidance_where_there_is_none_is_refused() -> None:
    environment = small_environment(1, NUM_STEPS)
    assert environment.guidance_scale is None
    start = noised(environment, 1, 0)
    environment.denoise(start)
    with pytest.raises(ConfigError, match=r"guidance of a move is 2\.0, but there is nothing to"):
        environment.step(start, [Action(1, None, 2.0)], array(1))

    def asks(problem: Problem) -> Asks:
        nodes = yield from draw(problem, 1)
        yield from step(problem, nodes, stride=1, eta=None, guidance=2.0)

    with pytest.raises(ConfigError, match=r"guidance 2\.0 of one move needs .* guidance_scale"):
        search(Asking(asks), environment, nfe=4)
    with pytest.raises(ConfigError, match="1 mixtures and 2 unconditional ones"):
        MixtureEnvironment(
            [small_mixture()],
            [LinearReward(np.ones(3))],
            num_steps=2,
            unconditional=[small_mixture()] * 2,
        )
