"""SMC: what it spends, its weights, and normalising constants known in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import BudgetError, ConfigError
from mctd_diffusers.evaluation.ground_truth import QuadraticReward
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Asks, Handles, Values
from mctd_diffusers.search.moves import generator_for
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import run_search
from mctd_diffusers.search.strategies import SMC, BestOfN, resolve_strategy
from mctd_diffusers.search.strategies.smc import Population, telescoped
from mctd_diffusers.search.tree import DRAW, ROOT, STEP, path_to_root
from tests.toys import (
    PRICES,
    Guidances,
    linear_gaussian,
    problems_of,
    search,
    small_environment,
    small_mixture,
    spread_of_samples,
)

POTENTIALS = ("diff", "max", "add")
each_potential = pytest.mark.parametrize("potential", POTENTIALS)


@dataclass(frozen=True)
class Sampling:
    """One pass of SMC on each problem; keeps the populations, which a search has no use for."""

    smc: SMC
    particles: int
    populations: dict[int, Population] = field(default_factory=dict)
    name: str = "sampling"

    def least_evaluations(self, num_steps: int) -> int:
        return self.particles * num_steps

    def search(self, problem: Problem) -> Asks:
        generator = generator_for(problem, "smc")
        population = yield from self.smc.sample(problem, self.particles, generator)
        self.populations[problem.index] = population
        return "exhausted"


def populations(
    smc: SMC, environment: MixtureEnvironment, particles: int
) -> tuple[list[Population], list[Values]]:
    """Of each problem: the weighted population, and the rewards of its samples."""
    sampling = Sampling(smc, particles)
    results = run_search(sampling, environment, problems_of(environment, Budget()))
    found = [sampling.populations[result.problem] for result in results]
    rewards = [
        result.tree.reward[population.nodes]
        for result, population in zip(results, found, strict=True)
    ]
    return found, rewards


# ---- closed forms


@each_potential
@pytest.mark.parametrize("ess_threshold", [0.8, 1.0])
def test_the_normalising_constant_is_unbiased(potential: Any, ess_threshold: float) -> None:
    num_problems, temperature = 200, 1.2
    environment = linear_gaussian(num_problems, 4)
    spread = spread_of_samples(environment)
    smc = SMC(
        temperature=temperature,
        potential=potential,
        window_start=0.0,
        ess_threshold=ess_threshold,
    )
    found, rewards = populations(smc, environment, 6)
    # Of x ~ N(0, spread^2): the mean of exp(x / temperature), and of x exp(x / temperature).
    tilt = spread / temperature
    evidence = np.exp([population.log_evidence for population in found])
    weighted = [
        np.exp(population.log_normaliser) * np.mean(np.exp(population.log_weights) * points)
        for population, points in zip(found, rewards, strict=True)
    ]
    for estimates, truth in (
        (evidence, np.exp(tilt**2 / 2)),
        (weighted, tilt * spread * np.exp(tilt**2 / 2)),
    ):
        error = np.std(estimates, ddof=1) / np.sqrt(num_problems)
        # Four standard errors; with weights dropped where resampling is skipped it is six to
        # fourteen of them off.
        assert abs(np.mean(estimates) - truth) < 4 * error
        assert error < 0.1 * truth
    num_resampled = sum(population.log_normaliser != 0 for population in found)
    assert num_resampled == num_problems if ess_threshold == 1 else 0 < num_resampled < 200


@each_potential
def test_with_the_exact_kernel_it_weighs_the_modes_of_the_tilted_mixture(potential: Any) -> None:
    temperature, num_problems = 2.0, 150
    mixture, reward = small_mixture(), QuadraticReward(np.ones(3), np.zeros(3))
    tilted, log_normaliser = reward.tilted(mixture, temperature)
    environment = MixtureEnvironment(
        [mixture] * num_problems, [reward] * num_problems, num_steps=4, kernel="exact"
    )
    smc = SMC(temperature=temperature, potential=potential, window_start=0.0)
    sampling = Sampling(smc, 8)
    results = run_search(sampling, environment, problems_of(environment, Budget()))
    estimates = np.empty((num_problems, 1 + len(tilted.weights)))
    for row, result in enumerate(results):
        population = sampling.populations[result.problem]
        points = environment.latents(result.tree.handle[population.nodes])
        joint = tilted.log_joint(points)
        modes = np.exp(joint - np.logaddexp.reduce(joint, axis=1)[:, None])
        weights = np.exp(population.log_normaliser + population.log_weights) / 8
        estimates[row] = [weights.sum(), *(weights @ modes)]
    truth = np.exp(log_normaliser) * np.r_[1, tilted.weights]
    error = estimates.std(axis=0, ddof=1) / np.sqrt(num_problems)
    assert (np.abs(estimates.mean(axis=0) - truth) < 4 * error).all()
    assert error[0] < 0.1 * truth[0]
    # The plain mixture weighs its modes otherwise, by more than can be missed.
    assert (np.abs(np.exp(log_normaliser) * mixture.weights - truth[1:]) > 8 * error[1:]).any()


@each_potential
def test_potentials_telescope_to_the_reward(potential: Any) -> None:
    smc = SMC(temperature=0.7, potential=potential, window_start=0.0, ess_threshold=0.0)
    found, rewards = populations(smc, small_environment(3, 6), 4)
    for population, scores in zip(found, rewards, strict=True):
        np.testing.assert_allclose(population.log_weights, scores / 0.7, rtol=1e-12)
        assert population.values.shape == (5, 4)


# ---- weights, by hand


class ScriptedEnvironment(MixtureEnvironment):
    """Values four samples as the script says, level by level."""

    script: Sequence[Sequence[float]] = ()
    asked: int = 0

    def value(self, handles: Handles, guidances: Guidances = None) -> Values:
        super().value(handles, guidances)
        self.asked += 1
        return np.array(self.script[self.asked - 1])


def test_weights_are_accumulated_where_resampling_is_skipped() -> None:
    environment = small_environment(1, 4, make=ScriptedEnvironment)
    assert isinstance(environment, ScriptedEnvironment)
    # Weights 2 1 1 1 have an effective size of 25 / 7, above a half of four particles: kept. The
    # next potentials are 4 1 1 1. Alone (as in the published code) their size of 49 / 19 is above
    # a half too; times the weights they are 8 1 1 1, and 121 / 67 is below.
    # What is drawn there, three copies of the first, has potentials of 1 at the last level.
    environment.script = np.log([[2.0, 1, 1, 1], [8, 1, 1, 1], [8, 8, 8, 1]]).tolist()
    smc = SMC(temperature=1.0, window_start=0.0, ess_threshold=0.5)
    sampling = Sampling(smc, 4)
    (result,) = run_search(sampling, environment, problems_of(environment, Budget()))
    tree = result.tree
    copies = [
        [len(tree.children(int(node))) for node in np.flatnonzero(tree.step_index == level)]
        for level in range(3)
    ]
    assert copies[0] == copies[2] == [1, 1, 1, 1]
    assert copies[1][0] == 3  # 4 x 8 / 11, rounded up
    assert sum(copies[1]) == 4
    population = sampling.populations[0]
    assert population.log_normaliser == pytest.approx(np.log(11 / 4))
    np.testing.assert_allclose(
        population.log_weights, tree.reward[population.nodes] - np.log([8, 8, 8, 1]), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("potential", "products"),
    # Of the values 2, 8, 1 and of 1, 1, 5 along two lineages, level by level.
    [
        ("diff", [[2, 1], [8, 1], [1, 5]]),
        ("max", [[2, 1], [2 * 8, 1], [2 * 8 * 8, 5]]),
        ("add", [[2, 1], [2 * 16, 1], [2 * 16 * 16, 5]]),
    ],
)
def test_potentials_are_those_of_the_values_along_the_lineage(
    potential: Any, products: list[list[int]]
) -> None:
    values = np.log([[2, 1], [8, 1], [1, 5]])
    np.testing.assert_array_equal(telescoped(values[:0], potential), np.zeros(2))
    for level, product in enumerate(products, start=1):
        np.testing.assert_allclose(
            telescoped(values[:level], potential), np.log(product), atol=1e-12
        )


# ---- what it spends


@settings(max_examples=40)
@given(
    particles=st.none() | st.integers(1, 5),
    stride=st.integers(1, 4),
    interval=st.integers(1, 3),
    window=st.sampled_from(((0.0, 1.0), (0.3, 0.7), (0.5, 0.5))),
    num_steps=st.integers(1, 9),
    extra=st.integers(0, 40),
)
def test_it_spends_an_evaluation_for_each_particle_and_edge(
    particles: int | None,
    stride: int,
    interval: int,
    window: tuple[float, float],
    num_steps: int,
    extra: int,
) -> None:
    strategy = SMC(
        particles=particles,
        stride=stride,
        interval=interval,
        window_start=window[0],
        window_end=window[1],
    )
    edges = -(-num_steps // stride)
    least = (particles or 1) * edges
    assert strategy.least_evaluations(num_steps) == least
    nfe = least + extra
    (result,) = search(strategy, small_environment(1, num_steps), nfe=nfe)
    count = particles or nfe // edges
    passes = nfe // (count * edges)
    assert result.spent.nfe == passes * count * edges
    assert len(result.finished) == passes * count
    tree = result.tree
    assert (tree.move == DRAW).sum() == passes * count
    assert (tree.move == STEP).sum() == passes * count * edges
    levels = [
        level for level in range(edges - 1) if window[0] <= level * stride / num_steps <= window[1]
    ][::interval]
    assert result.spent.previews == (passes * count * len(levels) if count > 1 else 0)
    assert tree.visit_count[ROOT] == passes * count
    assert all(len(path_to_root(tree, sample.node)) == edges + 2 for sample in result.finished)


def test_a_budget_in_cost_pays_for_values_too() -> None:
    environment = small_environment(1, 5, prices=PRICES)
    value, reward = PRICES.preview + PRICES.reward_call, PRICES.decode + PRICES.reward_call
    each = 5 + 3 * value + reward  # valued after one, two and three edges
    (result,) = search(SMC(), environment, nfe=None, cost=4.9 * each)
    assert len(result.finished) == 4 + 1  # what is left pays for a plain sample
    assert result.spent.previews == 4 * 3
    with pytest.raises(BudgetError, match="cannot pay for 5 particles over 5 steps"):
        search(SMC(particles=5), environment, nfe=None, cost=4.9 * each)


def test_one_particle_is_a_plain_sample() -> None:
    steered, plain = small_environment(2, 5), small_environment(2, 5)
    for one, other in zip(
        search(SMC(), steered, nfe=9), search(BestOfN(), plain, nfe=5), strict=True
    ):
        assert one.spent.previews == 0
        assert [sample.reward for sample in one.finished] == [
            sample.reward for sample in other.finished
        ]


def test_without_a_temperature_it_does_not_matter_what_unit_rewards_have() -> None:
    @dataclass(frozen=True)
    class Scaled:
        reward: Any

        def __call__(self, points: Values) -> Values:
            return np.asarray(1000 * self.reward(points) - 7)

    one = small_environment(1, 6)
    other = MixtureEnvironment(one.mixtures, [Scaled(one.rewards[0])], num_steps=6)
    trees = [search(SMC(), world, nfe=60)[0].tree for world in (one, other)]
    np.testing.assert_array_equal(trees[0].parent, trees[1].parent)
    np.testing.assert_allclose(1000 * trees[0].reward - 7, trees[1].reward)


def test_settings_that_cannot_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"window_start is 0.6; give at most window_end.* 0.5"):
        SMC(window_start=0.6, window_end=0.5)


def test_the_published_name_is_its_own_settings() -> None:
    assert resolve_strategy("fk") == SMC()
