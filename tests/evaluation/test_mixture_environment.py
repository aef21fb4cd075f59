"""The world of a search over mixtures: what it promises, and the exact kernel against its laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import (
    CapacityError,
    ConfigError,
    NonFiniteRewardError,
    ScheduleError,
    SearchError,
)
from mctd_diffusers.evaluation.ground_truth import SCHEDULES, LinearReward, Mixture
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.environment import FIRST_DRAW, Action, Counts, Environment
from tests.toys import PRICES, CountingEnvironment, small_environment, small_mixture

# ---- the environment's contract


def evaluated(environment: MixtureEnvironment, count: int = 3) -> np.ndarray:
    """Handles of ``count`` evaluated initial noises of problem 0."""
    handles = environment.reset(np.zeros(count, dtype=np.int64), np.arange(count) + 1)
    environment.denoise(handles)
    return handles


def finish(environment: MixtureEnvironment, handles: np.ndarray) -> np.ndarray:
    """Handles of children that jump to the end."""
    stride = environment.num_steps
    return environment.step(handles, [Action(stride)] * len(handles), np.arange(len(handles)))


def test_a_mixture_is_an_environment() -> None:
    assert isinstance(small_environment(), Environment)


def test_handles_are_never_used_again() -> None:
    environment = small_environment(2, 4)
    seen: set[int] = set()
    for turn in range(40):  # beyond the first capacity of 64 rows
        new = [environment.reset(np.array([0, 1]), np.array([FIRST_DRAW, turn]))]
        environment.denoise(new[0])
        new.append(environment.step(new[0], [Action(1), Action(2)], np.array([turn, turn])))
        new.append(environment.renoise(new[0], 0, np.array([turn, turn])))
        new.append(environment.restore(environment.export(new[1])))
        handles = np.concatenate(new).tolist()
        assert len(set(handles)) == len(handles)
        assert not seen & set(handles)
        assert min(handles) > max(seen, default=-1)
        seen.update(handles)
        environment.release(np.array(handles))


def test_children_are_lazy_until_somebody_evaluates_them() -> None:
    environment = small_environment(1, 4)
    parents = evaluated(environment)
    before = environment.ledger.total
    children = environment.step(parents, [Action(2, 1.0)] * 3, np.arange(3))
    assert environment.ledger.total == before
    assert environment.step_price(parents, [Action(2, 1.0)] * 3) == Counts()
    for ask in (
        lambda: environment.value(children[1:]),
        lambda: environment.step(children[1:], [Action(1)] * 2, np.arange(2)),
        lambda: environment.renoise(children[1:], 0, np.arange(2)),
    ):
        with pytest.raises(SearchError, match="are not evaluated; denoise them first") as caught:
            ask()
        assert caught.value.handles == tuple(children[1:])
    environment.denoise(children)
    assert np.isfinite(environment.value(children)).all()


def test_an_edge_is_the_same_in_any_company() -> None:
    environment = small_environment(1, 4)
    parents = evaluated(environment)
    actions = [Action(1, 1.0), Action(2, 0.5), Action(2, None)]
    edge_seeds = np.array([5, 6, 7])
    together = environment.latents(environment.step(parents, actions, edge_seeds))
    for i in (2, 0, 1):
        alone = environment.step(parents[i : i + 1], actions[i : i + 1], edge_seeds[i : i + 1])
        np.testing.assert_array_equal(environment.latents(alone), together[i : i + 1])
    others = environment.latents(environment.step(parents, actions, edge_seeds + 10))
    assert (others != together).any(axis=1).all()


@pytest.mark.parametrize(
    ("stride", "eta", "is_noisy"),
    [(2, 1.0, True), (2, None, True), (2, 0.0, False), (4, 1.0, False)],
)
def test_noise_enters_by_eta_and_never_on_the_last_edge(
    stride: int, eta: float | None, is_noisy: bool
) -> None:
    environment = small_environment(1, 4)
    parent = np.repeat(evaluated(environment, 1), 2)
    one, other = environment.latents(
        environment.step(parent, [Action(stride, eta)] * 2, np.array([1, 2]))
    )
    assert (one != other).any() == is_noisy


def test_the_environments_own_eta_stands_for_none() -> None:
    for eta in (0.0, 0.6):
        mixture = small_mixture()
        environment = MixtureEnvironment(
            [mixture], [LinearReward(np.ones(3))], num_steps=4, eta=eta
        )
        parent = np.repeat(evaluated(environment, 1), 2)
        children = environment.step(parent, [Action(1), Action(1, eta)], np.array([3, 3]))
        one, other = environment.latents(children)
        np.testing.assert_array_equal(one, other)


def test_steps_are_ddim_steps_of_the_exact_denoiser() -> None:
    environment = small_environment(2, 5)
    handles = environment.reset(np.array([0, 1]), np.array([4, 4]))
    environment.denoise(handles)
    x = environment.latents(handles)
    assert x[0].tolist() == x[1].tolist()  # a seed is a noise, whatever the problem
    children = environment.step(handles, [Action(3, 0.0)] * 2, np.array([0, 0]))
    a, s = environment.alpha, environment.sigma
    for i, mixture in enumerate(environment.mixtures):
        denoised = mixture.denoised(x[i : i + 1], a[0], s[0])
        epsilon = (x[i : i + 1] - a[0] * denoised) / s[0]
        expected = a[3] * denoised + s[3] * epsilon
        np.testing.assert_allclose(environment.latents(children)[i : i + 1], expected)
        value = environment.rewards[i](denoised)
        np.testing.assert_allclose(environment.value(handles)[i : i + 1], value)


def test_first_draws_belong_to_problems_and_others_to_seeds() -> None:
    environment = small_environment(2, 3)
    handles = environment.reset(np.array([0, 1, 0, 1]), np.array([FIRST_DRAW, FIRST_DRAW, 8, 8]))
    x = environment.latents(handles)
    spread = np.hypot(environment.alpha[0], environment.sigma[0])
    np.testing.assert_array_equal(x[0], spread * environment.first_noise(0))
    np.testing.assert_array_equal(x[1], spread * environment.first_noise(1))
    assert (x[0] != x[1]).all()
    np.testing.assert_array_equal(x[2], x[3])


@settings(max_examples=25)
@given(st.lists(st.sampled_from(("reset", "denoise", "again", "value", "finish")), max_size=20))
def test_the_ledger_counts_what_was_asked(asked: list[str]) -> None:
    environment = small_environment(2, 3, make=CountingEnvironment, prices=PRICES)
    assert isinstance(environment, CountingEnvironment)
    new: list[int] = []
    done: list[int] = []
    finished: list[int] = []
    calls = values = 0
    for turn, what in enumerate(asked):
        if what == "reset":
            new += environment.reset(np.array([0, 1]), np.array([turn, turn])).tolist()
        elif what == "denoise" and new:
            environment.denoise(np.array(new))
            done, new, calls = done + new, [], calls + 1
        elif what == "again" and done:  # costs nothing
            environment.denoise(np.array(done))
            environment.reward(np.array(finished, dtype=np.int64))
        elif what == "value" and done:
            environment.value(np.array(done))
            values += len(done)
        elif what == "finish" and done:
            made = finish(environment, np.array(done))
            environment.reward(made)
            finished += made.tolist()
    total = environment.ledger.total
    assert total == Counts(
        nfe=len(done),
        rows=len(done),
        calls=calls,
        previews=values,
        decodes=len(finished),
        reward_calls=values + len(finished),
    )
    by_problem = [environment.ledger.spent(problem) for problem in (0, 1)]
    assert by_problem[0] == by_problem[1]
    assert by_problem[0] + by_problem[1] == total - Counts(calls=calls)
    assert environment.ledger.cost == pytest.approx(PRICES.cost(total))


def test_a_sample_named_twice_is_paid_once() -> None:
    environment = small_environment(1, 3)
    handles = environment.reset(np.zeros(1, dtype=np.int64), np.array([2]))
    environment.denoise(np.repeat(handles, 3))
    leaf = finish(environment, handles)
    one, other = environment.reward(np.repeat(leaf, 2))
    assert one == other == environment.reward(leaf)[0]
    assert environment.ledger.total.nfe == 1
    assert environment.ledger.total.decodes == 1


def test_finished_samples_are_rewarded_by_their_own_problem() -> None:
    environment = small_environment(3, 2)
    handles = environment.reset(np.array([2, 0, 1]), np.array([4, 4, 5]))
    environment.denoise(handles)
    leaves = finish(environment, handles)
    expected = [
        environment.rewards[problem](environment.latents(leaves[i : i + 1]))[0]
        for i, problem in enumerate((2, 0, 1))
    ]
    np.testing.assert_allclose(environment.reward(leaves), expected)


def test_going_back_up_starts_from_the_denoised_estimate_or_the_finished_sample() -> None:
    environment = small_environment(1, 4)
    parents = evaluated(environment, 1)
    leaf = finish(environment, parents)
    both = np.concatenate([parents, leaf])
    again = environment.renoise(both, 2, np.array([9, 9]))
    mixture, a, s = environment.mixtures[0], environment.alpha, environment.sigma
    clean = np.concatenate(
        [
            mixture.denoised(environment.latents(parents), a[0], s[0]),
            environment.latents(leaf),
        ]
    )
    noise = environment.latents(environment.reset(np.zeros(1, dtype=np.int64), np.array([9])))
    noise /= np.hypot(a[0], s[0])
    np.testing.assert_allclose(environment.latents(again), a[2] * clean + s[2] * noise)
    environment.denoise(again)  # unfinished, and not yet evaluated
    assert environment.ledger.total.nfe == 3


def test_saved_samples_go_on_where_they_were() -> None:
    environment = small_environment(2, 4)
    handles = environment.reset(np.array([1, 0]), np.array([3, FIRST_DRAW]))
    environment.denoise(handles)
    children = environment.step(handles, [Action(1, 1.0), Action(2, 1.0)], np.array([1, 2]))
    saved = environment.export(children)
    other = small_environment(2, 4)
    ends = []
    for world, at in ((environment, children), (other, other.restore(saved))):
        np.testing.assert_array_equal(world.latents(at), environment.latents(children))
        world.denoise(at)
        leaves = world.step(at, [Action(3, 1.0), Action(2, 1.0)], np.array([5, 6]))
        ends.append((world.value(at), world.reward(leaves), world.latents(leaves)))
    for one, same in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, same)
    assert other.ledger.spent(0).nfe == other.ledger.spent(1).nfe == 1


def test_what_was_saved_is_a_copy() -> None:
    environment = small_environment(1, 4)
    handles = evaluated(environment, 2)
    saved = environment.export(handles)
    before = environment.latents(handles)
    for column in saved.values():
        column[:] = 0
    environment.latents(handles)[:] = 0
    np.testing.assert_array_equal(environment.latents(handles), before)


def test_what_cannot_be_asked_is_refused_with_the_handles() -> None:
    environment = small_environment(1, 4)
    parents = evaluated(environment, 2)
    leaves = finish(environment, parents)
    with pytest.raises(SearchError, match="finished samples cannot be denoised") as caught:
        environment.denoise(leaves)
    assert caught.value.handles == tuple(leaves)
    with pytest.raises(SearchError, match="only finished samples have a reward") as caught:
        environment.reward(parents)
    assert caught.value.handles == tuple(parents)
    for stride in (0, 5):
        with pytest.raises(SearchError, match=rf"strides \[{stride}, 1\] from steps \[0, 0\]"):
            environment.step(parents, [Action(stride), Action(1)], np.arange(2))


def test_unknown_and_released_handles_are_refused_everywhere() -> None:
    environment = small_environment(1, 4)
    handles = evaluated(environment, 2)
    environment.release(handles[:1])
    for handle in (int(handles[0]), -1, 2, 10**6):
        some = np.array([handles[1], handle])
        actions, edge_seeds = [Action(1)] * 2, np.arange(2)
        for name, arguments in (
            ("denoise", ()),
            ("step", (actions, edge_seeds)),
            ("value", ()),
            ("reward", ()),
            ("renoise", (0, edge_seeds)),
            ("export", ()),
            ("latents", ()),
            ("release", ()),
        ):
            with pytest.raises(
                CapacityError, match=rf"handles \[{handle}\] do not exist"
            ) as caught:
                getattr(environment, name)(some, *arguments)
            assert caught.value.handles == (handle,)
    assert np.isfinite(environment.value(handles[1:])).all()


def test_rewards_that_are_not_finite_are_named() -> None:
    environment = small_environment(1, 2)
    environment.rewards = (lambda x: np.where(x[:, 0] > x[:, 0].min(), 1.0, np.nan),)
    handles = evaluated(environment, 3)
    leaves = finish(environment, handles)
    worst = int(leaves[environment.latents(leaves)[:, 0].argmin()])
    with pytest.raises(NonFiniteRewardError, match=rf"nan\] for handles \[{worst}\]") as caught:
        environment.reward(leaves)
    assert caught.value.handles == (worst,)


def test_every_problem_needs_a_mixture_and_a_reward() -> None:
    mixture, reward = small_mixture(), LinearReward(np.ones(3))
    for mixtures, rewards in (([mixture], []), ([], []), ([mixture], [reward, reward])):
        with pytest.raises(ConfigError, match="give one of each a problem"):
            MixtureEnvironment(mixtures, rewards, num_steps=4)


def test_mixtures_of_one_environment_have_as_many_dimensions() -> None:
    mixtures, reward = (
        [small_mixture(dimensions=3), small_mixture(dimensions=2)],
        LinearReward(np.ones(3)),
    )
    with pytest.raises(ConfigError, match=r"mixtures have \[2, 3\] dimensions"):
        MixtureEnvironment(mixtures, [reward] * 2, num_steps=4)
    with pytest.raises(ConfigError, match=r"mixtures have \[2, 3\] dimensions"):
        MixtureEnvironment(mixtures[:1], [reward], num_steps=4, unconditional=mixtures[1:])


@pytest.mark.parametrize(("setting", "wrong"), [("eta", 1.5), ("eta", -0.1), ("num_steps", 0)])
def test_settings_outside_their_range_are_refused(setting: str, wrong: float) -> None:
    settings_ = {"num_steps": 4, setting: wrong}
    with pytest.raises(ConfigError, match=f"{setting} is {wrong}; give"):
        MixtureEnvironment([small_mixture()], [LinearReward(np.ones(3))], **settings_)


def test_an_eta_of_an_edge_outside_its_range_is_refused() -> None:
    environment = small_environment(1, 4)
    parents = evaluated(environment, 1)
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=f"Action.eta is {wrong}; give a number from 0 to 1"):
            environment.step(parents, [Action(1, wrong)], np.array([1]))


@pytest.mark.parametrize("wrong", [-1, 4, 9])
def test_a_step_index_that_is_not_in_the_schedule_is_refused(wrong: int) -> None:
    environment = small_environment(1, 4)
    parents = evaluated(environment, 1)
    with pytest.raises(ScheduleError, match=f"step index is {wrong}; give one of 0 to 3"):
        environment.renoise(parents, wrong, np.array([1]))


# ---- the exact kernel


def exact_environment(schedule: Any, num_steps: int, kernel: Any = "exact") -> MixtureEnvironment:
    """Two modes on a line."""
    mixture = Mixture(np.array([0.3, 0.7]), np.array([[-2.0], [1.5]]), np.array([[0.25], [0.5]]))
    return MixtureEnvironment(
        [mixture], [LinearReward(np.ones(1))], num_steps=num_steps, schedule=schedule, kernel=kernel
    )


def plain_samples(environment: MixtureEnvironment, count: int) -> np.ndarray:
    """Finished samples of single steps, on a line."""
    handles = environment.reset(np.zeros(count, dtype=np.int64), np.arange(count))
    for index in range(environment.num_steps):
        environment.denoise(handles)
        edge_seeds = np.arange(count) + (index + 1) * 1_000_000
        handles = environment.step(handles, [Action(1)] * count, edge_seeds)
    return environment.latents(handles)[:, 0]


def deviation_from(law: Mixture, samples: np.ndarray) -> float:
    """Greatest deviation of their distribution from the law's (Kolmogorov and Smirnov)."""
    spread = np.sqrt(law.variances[:, 0])
    scaled = (samples[:, None] - law.means[:, 0]) / (spread * 2**0.5)
    distribution = np.sort((0.5 * (1 + np.vectorize(math.erf)(scaled))) @ law.weights)
    return float(np.abs(distribution - (np.arange(len(samples)) + 0.5) / len(samples)).max())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_plain_samples_of_few_exact_steps_have_the_law_of_the_mixture(
    schedule: Any, num_steps: int
) -> None:
    count = 2000
    limit = 1.63 / count**0.5  # the 1 % point
    environment = exact_environment(schedule, num_steps)
    (law,) = environment.mixtures
    assert deviation_from(law, plain_samples(environment, count)) < limit
    # So few steps of DDIM do not: the test can tell.
    other = exact_environment(schedule, num_steps, kernel="ddim")
    assert deviation_from(law, plain_samples(other, count)) > 2 * limit


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stride", [1, 2])
def test_exact_children_have_the_law_of_the_transition(schedule: Any, stride: int) -> None:
    count = 2000
    environment = exact_environment(schedule, 4)
    handles = environment.reset(np.zeros(1, dtype=np.int64), np.array([7]))
    environment.denoise(handles)
    (parent,) = environment.step(handles, [Action(2)], np.array([8]))
    environment.denoise(np.array([parent]))
    children = environment.step(
        np.full(count, parent), [Action(stride)] * count, np.arange(count) + 100
    )
    a, s = environment.alpha, environment.sigma
    law = environment.mixtures[0].transition(
        environment.latents(np.array([parent])), a[2], s[2], a[2 + stride], s[2 + stride]
    )
    mixture = Mixture(np.exp(law.log_weights[0]), law.means[0], law.variances)
    found = environment.latents(children)[:, 0]
    assert deviation_from(mixture, found) < 1.63 / count**0.5


def test_exact_initial_noise_has_the_law_of_the_noisiest_point() -> None:
    environment = exact_environment("vp", 4)
    handles = environment.reset(np.zeros(2000, dtype=np.int64), np.arange(2000))
    law = environment.mixtures[0].noised(environment.alpha[0], environment.sigma[0])
    assert deviation_from(law, environment.latents(handles)[:, 0]) < 1.63 / 2000**0.5


def test_an_exact_edge_is_the_same_in_any_company() -> None:
    mixtures = [small_mixture(seed) for seed in (0, 1)]
    environment = MixtureEnvironment(
        mixtures, [LinearReward(np.ones(3))] * 2, num_steps=4, kernel="exact"
    )
    parents = environment.reset(np.array([0, 1, 0]), np.array([1, 2, FIRST_DRAW]))
    environment.denoise(parents)
    actions, edge_seeds = [Action(1), Action(2, 1.0), Action(2)], np.array([5, 6, 7])
    together = environment.latents(environment.step(parents, actions, edge_seeds))
    for i in (2, 0, 1):
        alone = environment.step(parents[i : i + 1], actions[i : i + 1], edge_seeds[i : i + 1])
        np.testing.assert_allclose(environment.latents(alone), together[i : i + 1], rtol=1e-12)


def test_the_exact_kernel_knows_no_guidance_and_no_other_eta() -> None:
    mixture, reward = small_mixture(), LinearReward(np.ones(3))
    for settings_ in ({"unconditional": [mixture]}, {"eta": 0.5}):
        with pytest.raises(ConfigError, match="knows neither guidance nor another eta than 1"):
            MixtureEnvironment([mixture], [reward], num_steps=4, kernel="exact", **settings_)
    environment = MixtureEnvironment([mixture], [reward], num_steps=4, kernel="exact")
    parents = evaluated(environment, 1)
    for action in (Action(1, 0.5), Action(1, None, 2.0)):
        with pytest.raises(ConfigError, match="the exact kernel knows eta 1 and no guidance"):
            environment.step(parents, [action], np.array([1]))
    child = environment.step(parents, [Action(1)], np.array([1]))
    with pytest.raises(SearchError, match="came by edges without noise of their own"):
        environment.perturb(child, np.array([0.5]), np.array([1]))
