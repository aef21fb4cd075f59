"""Diagnoses on mixtures, where the truth is known, and of the calls of a tiny pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.diagnosis import Effort
from mctd_diffusers.evaluation.diagnosis.looking import (
    Scene,
    choices_on_path,
    diagnose_search,
    exact_value_of,
    num_scored,
    plain_rows,
    planned_nfe,
)
from mctd_diffusers.evaluation.diagnosis.terms import (
    Regret,
    sibling_regret,
    stands_out,
    t_quantile,
)
from mctd_diffusers.evaluation.ground_truth import QuadraticReward
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.budget import Budget
from mctd_diffusers.search.environment import Asks
from mctd_diffusers.search.moves import back_up, denoise, draw, reward, step
from mctd_diffusers.search.problem import Problem
from mctd_diffusers.search.runner import SearchResult, Strategy, run_search
from mctd_diffusers.search.strategies import BestOfN
from mctd_diffusers.search.tree import ROOT, path_to_root
from tests.strategies import searches
from tests.toys import problems_of, small_mixture

NUM_STEPS = 6


@dataclass(frozen=True)
class Greedy:
    """Goes on from the child of the best exact value, but at one level from the worst."""

    environment: MixtureEnvironment
    children: int = 6
    mistaken_at: int | None = None
    name: str = "greedy"

    def least_evaluations(self, num_steps: int) -> int:
        return self.children * num_steps

    def search(self, problem: Problem) -> Asks:
        reward_of = self.environment.rewards[problem.index]
        exact = exact_value_of(self.environment, problem.index, reward_of)
        tree = problem.tree
        nodes = yield from draw(problem, self.children)
        for step_index in range(problem.num_steps):
            values = exact(tree.handle[nodes], [step_index] * len(nodes))
            worst = step_index == self.mistaken_at
            chosen = nodes[int(values.argmin() if worst else values.argmax())]
            yield from denoise(problem, [chosen])
            count = self.children if step_index < problem.num_steps - 1 else 1
            nodes = yield from step(problem, [chosen] * count, stride=1, eta=1.0)
        yield from reward(problem, nodes)
        back_up(problem, nodes)
        return "budget"


def world(kernel: Literal["ddim", "exact"] = "ddim") -> MixtureEnvironment:
    mixtures = [small_mixture(seed) for seed in range(2)]
    rewards = [QuadraticReward(np.ones(3), np.full(3, 0.5 * seed)) for seed in range(2)]
    return MixtureEnvironment(mixtures, rewards, num_steps=NUM_STEPS, kernel=kernel)


def scene_of(
    environment: MixtureEnvironment,
    result: SearchResult,
    *,
    gold: QuadraticReward | None = None,
    exact: bool = False,
) -> Scene:
    problem = result.problem
    proxy = environment.rewards[problem]
    judge = gold or proxy
    return Scene(
        environment=environment,
        problem=problem,
        gold=lambda handles: judge(environment.latents(handles)),
        noise_levels=environment.sigma.tolist(),
        exact=(
            exact_value_of(environment, problem, proxy),
            exact_value_of(environment, problem, judge),
        )
        if exact
        else None,
    )


def searched(strategy: Strategy, environment: MixtureEnvironment, nfe: int = 100) -> SearchResult:
    problems = problems_of(environment, Budget(nfe), [1], strategy=strategy)
    (result,) = run_search(strategy, environment, problems)
    return result


# ---- estimating


@pytest.mark.parametrize("degrees", [5, 10, 40, 1000])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.995])
def test_t_quantiles_are_those_of_student(probability: float, degrees: int) -> None:
    expected = stats.t.ppf(probability, degrees)
    assert t_quantile(probability, degrees) == pytest.approx(expected, abs=0.02)


def regrets(
    siblings: Sequence[float], *, continuations: int = 8, times: int = 2000
) -> list[Regret]:
    """Estimates where the chosen one is worth 0 and siblings are worth this, with unit noise."""
    generator = np.random.default_rng(0)
    return [
        sibling_regret(
            generator.standard_normal(continuations),
            [worth + generator.standard_normal(continuations) for worth in siblings],
        )
        for _ in range(times)
    ]


def test_the_winners_curse_is_corrected() -> None:
    # The best of four means of 8 looks better by about 0.36, where all are worth the same.
    means = np.random.default_rng(0).standard_normal((2000, 4, 8)).mean(axis=2)
    assert means.max(axis=1).mean() > 0.3
    found = [regret.mean for regret in regrets([0.0] * 4)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found))


def test_intervals_cover_and_false_alarms_are_rare() -> None:
    covered = [
        interval.low <= 2.0 <= interval.high
        for interval in (regret.interval() for regret in regrets([0.0, 2.0, 0.5]))
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)
    alarms = [stands_out(regret, levels=1) for regret in regrets([0.0] * 4)]
    assert np.mean(alarms) < 0.04  # 2.5 % of a normal law; the best of several is skewed


def test_exact_scores_need_no_halves_and_have_no_error() -> None:
    regret = sibling_regret(np.array([0.5]), [np.array([0.2]), np.array([0.9])])
    assert regret == Regret(0.4, 0.0, 0, 0.5, 0.9)
    assert regret.interval() == pytest.approx((0.4, 0.4, 0.4))


# ---- mixtures


def test_estimated_regret_agrees_with_the_exact_one() -> None:
    environment = world("exact")
    result = searched(Greedy(environment, mistaken_at=2), environment)
    effort = Effort(pool=1, siblings=5, continuations=64)
    exact = diagnose_search(scene_of(world("exact"), result, exact=True), result, effort)
    estimated = diagnose_search(scene_of(world("exact"), result), result, effort)
    assert [level.step_index for level in exact.levels] == list(range(NUM_STEPS))
    # Over the last edge the exact law is no single sample, which a search takes it for.
    for true, found in zip(exact.levels[:-1], estimated.levels[:-1], strict=True):
        assert true.gold.standard_error == 0
        low, high = found.gold.interval(0.999)[1:]
        assert low <= true.gold.mean <= high
        assert found.gold.standard_error < 0.25


@pytest.mark.parametrize(
    ("mistaken_at", "is_exact"), [(1, True), (2, True), (4, True), (3, False), (4, False)]
)
def test_a_planted_mistake_is_found(mistaken_at: int, is_exact: bool) -> None:
    environment = world()
    result = searched(Greedy(environment, mistaken_at=mistaken_at), environment)
    scene = scene_of(world(), result, exact=is_exact)
    diagnosis = diagnose_search(scene, result, Effort(pool=8, siblings=5, continuations=64))
    assert diagnosis.went_wrong is not None
    assert diagnosis.went_wrong.step_index == mistaken_at
    assert diagnosis.went_wrong.noise_level == environment.sigma[mistaken_at]
    assert diagnosis.went_wrong.proxy == diagnosis.went_wrong.gold  # gold is the reward here


def test_where_nothing_is_wrong_no_level_stands_out() -> None:
    environment = world()
    result = searched(Greedy(environment), environment)
    scene = scene_of(world(), result, exact=True)
    diagnosis = diagnose_search(scene, result, Effort(pool=1, siblings=5))
    assert diagnosis.went_wrong is None
    assert all(level.gold.mean <= 0 for level in diagnosis.levels)


def test_a_reward_that_misleads_is_told_from_a_search_that_errs() -> None:
    environment = world()
    result = searched(Greedy(environment), environment)
    opposite = QuadraticReward(np.ones(3), np.full(3, -3.0))  # the search goes the other way
    scene = scene_of(world(), result, gold=opposite, exact=True)
    diagnosis = diagnose_search(scene, result, Effort(pool=64, siblings=5), top_gold=0.0)
    assert diagnosis.reward_error > diagnosis.ceiling
    assert diagnosis.reward_error > 10 * abs(diagnosis.regret)
    assert all(level.proxy.mean <= 0 for level in diagnosis.levels)
    assert any(level.gold.mean > 0 for level in diagnosis.levels)


@settings(max_examples=20)
@given(strategy=searches, nfe=st.integers(NUM_STEPS, 60), top_gold=st.none() | st.just(0.0))
def test_every_search_can_be_diagnosed(
    strategy: Strategy, nfe: int, top_gold: float | None
) -> None:
    environment = world()
    nfe = max(nfe, strategy.least_evaluations(NUM_STEPS))
    result = searched(strategy, environment, nfe)
    ledger, spent = environment.ledger.total, result.spent
    other = QuadraticReward(np.ones(3), np.zeros(3))
    scene = scene_of(world(), result, gold=other)
    effort = Effort(pool=3, siblings=2, continuations=2, stride=2)
    told: list[int] = []
    diagnosis = diagnose_search(scene, result, effort, top_gold=top_gold, on_nfe=told.append)

    assert diagnosis.winner.proxy == pytest.approx(result.best.reward)  # made again by its moves
    terms = diagnosis.ceiling + diagnosis.reward_error + diagnosis.regret
    assert terms == pytest.approx(diagnosis.shortfall, abs=1e-12)
    assert diagnosis.shortfall == pytest.approx(diagnosis.top - diagnosis.winner.gold)
    assert diagnosis.reward_error >= 0
    if top_gold is None:
        assert diagnosis.ceiling == 0
    planned = planned_nfe(result, NUM_STEPS, effort)
    assert diagnosis.spent.nfe == planned == sum(told)
    assert diagnosis.spent.decodes <= num_scored(result, NUM_STEPS, effort)
    assert environment.ledger.total == ledger
    assert result.spent == spent


def test_exact_values_cost_no_continuations() -> None:
    environment = world()
    result = searched(Greedy(environment), environment)
    effort = Effort(pool=2, siblings=3)
    diagnosis = diagnose_search(scene_of(world(), result, exact=True), result, effort)
    assert diagnosis.spent.nfe == planned_nfe(result, NUM_STEPS, effort, exact=True)
    # Two plain samples, and the path once more.
    assert diagnosis.spent.nfe == 2 * NUM_STEPS + NUM_STEPS


def test_plain_samples_that_are_not_selected_are_reused() -> None:
    environment = world()
    result = searched(BestOfN(n=5), environment, 5 * NUM_STEPS)
    rows = plain_rows(result)
    assert len(rows) == 5
    fresh = world()
    handles = np.array([result.finished[row].handle for row in rows])
    plain = fresh.restore(environment.export(handles))
    scene = Scene(**{**vars(scene_of(fresh, result)), "plain": plain})
    effort = Effort(pool=5, siblings=1, continuations=2)
    diagnosis = diagnose_search(scene, result, effort)
    assert (diagnosis.pool, diagnosis.reused) == (5, 5)
    assert diagnosis.regret == pytest.approx(0, abs=1e-12)  # the winner is the pool's pick
    assert diagnosis.reached
    assert diagnosis.spent.nfe == planned_nfe(result, NUM_STEPS, effort, reused=5)


def test_selected_samples_are_not_reused() -> None:
    environment = world()
    result = searched(Greedy(environment), environment)
    assert plain_rows(result) == []


def test_of_many_siblings_those_are_looked_at_of_which_the_search_thought_most() -> None:
    environment = world()
    result = searched(BestOfN(n=5), environment, 5 * NUM_STEPS)
    (choice,) = choices_on_path(result.tree, result.best.node, 2)
    others = sorted(result.finished, key=lambda sample: -sample.reward)[1:3]
    draws = [path_to_root(result.tree, sample.node)[-2] for sample in others]
    assert choice.rejected == tuple(draws)
    assert choice.num_rejected == 4
    assert choice.chosen in result.tree.children(ROOT)


def test_another_world_is_refused() -> None:
    environment = world()
    result = searched(BestOfN(n=2), environment)
    mixtures = [small_mixture(7), small_mixture(8)]
    other = MixtureEnvironment(mixtures, environment.rewards, num_steps=NUM_STEPS)
    with pytest.raises(ConfigError, match=r"made again, has reward .* where the search saw"):
        diagnose_search(scene_of(other, result), result, Effort(pool=1))


def test_rewards_without_closed_form_have_no_exact_value() -> None:
    with pytest.raises(ConfigError, match="ufunc has no hard_value"):
        exact_value_of(world(), 0, np.add)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pool": 0}, "pool"),
        ({"siblings": 0}, "siblings"),
        ({"continuations": 3}, "even number"),
        ({"stride": 0}, "stride"),
        ({"eta": 0.0}, "eta is 0"),
        ({"eta": 1.5}, "eta"),
    ],
)
def test_an_effort_checks_itself(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Effort(**settings)  # type: ignore[arg-type]  # some are wrong
