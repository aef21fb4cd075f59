"""Gaussian mixtures: every closed form against a truth that was come by in another way.

In one dimension integrals are sums over a fine grid, exact to rounding; in three dimensions they
are means of samples, and the tolerance is four standard errors of the mean at fixed seeds. Laws of
``x_s`` given ``x_t`` are checked point by point with Bayes' rule, which leaves nothing to chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from mctd_diffusers.errors import CapacityError, ConfigError, NonFiniteRewardError, SearchError
from mctd_diffusers.evaluation.ground_truth import (
    Floats,
    LinearReward,
    Mixture,
    MixtureEnvironment,
    Posterior,
    QuadraticReward,
    cosine_schedule,
    ddim_step,
    rugged_environment,
    subspace_environment,
)
from mctd_diffusers.search.environment import FIRST_DRAW, Action, Counts, Environment
from tests.toys import (
    PRICES,
    CountingEnvironment,
    linear_gaussian,
    small_environment,
    small_mixture,
)

TEMPERATURE = 0.8


class Path(NamedTuple):
    """Two noise levels of one process, the second less noisy."""

    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float

    @property
    def now(self) -> tuple[float, float]:
        return self.alpha, self.sigma


PATHS = {
    "variance preserving": Path(0.3**0.5, 0.7**0.5, 0.6**0.5, 0.4**0.5),
    "flow": Path(0.4, 0.6, 0.65, 0.35),
    "variance exploding": Path(1.0, 1.5, 1.0, 0.7),
}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
seeds = st.integers(0, 10_000)


def some_points(mixture: Mixture, path: Path, seed: int, count: int = 5) -> Floats:
    """Samples of ``x_t``."""
    return mixture.noised(*path.now).sample(np.random.default_rng(seed), count)


def log_normal(x: Floats, mean: Floats, variance: Floats | float) -> Floats:
    """Log density of independent normals, summed over the last axis."""
    variance = np.broadcast_to(variance, np.broadcast_shapes(x.shape, mean.shape))
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance)).sum(axis=-1)


def log_density(law: Posterior, x: Floats) -> Floats:
    """``[points]`` log density of the law of each point at its own ``x``."""
    each = law.log_weights + log_normal(x[:, None], law.means, law.variances)
    return np.logaddexp.reduce(each, axis=1)


def gradient(function: Callable[[Floats], Floats], x: Floats, width: float = 1e-5) -> Floats:
    """Central differences along each dimension, stacked in the last axis."""
    shifts = width * np.eye(x.shape[1])
    return np.stack(
        [(function(x + shift) - function(x - shift)) / (2 * width) for shift in shifts], axis=-1
    )


# ---- densities, scores and posteriors


@settings(max_examples=20)
@given(seeds)
def test_densities_are_weighted_sums_of_normal_densities(seed: int) -> None:
    mixture = small_mixture(seed)
    x = 4 * np.random.default_rng(seed).standard_normal((6, 3))
    densities = [
        weight * np.exp(log_normal(x, mean, variance))
        for weight, mean, variance in zip(
            mixture.weights, mixture.means, mixture.variances, strict=True
        )
    ]
    np.testing.assert_allclose(np.exp(mixture.log_density(x)), sum(densities), rtol=1e-9)


@settings(max_examples=20)
@given(seeds)
def test_the_score_is_the_gradient_of_the_log_density(seed: int) -> None:
    mixture = small_mixture(seed)
    x = mixture.sample(np.random.default_rng(seed), 5)
    # Central differences of width 1e-5: about 1e-10 of truncation, 1e-10 of rounding.
    np.testing.assert_allclose(mixture.score(x), gradient(mixture.log_density, x), atol=1e-7)


@each_path
@settings(max_examples=12)
@given(seed=seeds)
def test_the_denoised_estimate_obeys_tweedie(path: Path, seed: int) -> None:
    mixture = small_mixture(seed)
    x = some_points(mixture, path, seed)
    denoised = mixture.denoised(x, *path.now)
    tweedie = (x + path.sigma**2 * mixture.noised(*path.now).score(x)) / path.alpha
    np.testing.assert_allclose(denoised, tweedie, atol=1e-10)
    np.testing.assert_allclose(denoised, mixture.posterior(x, *path.now).mean(), atol=1e-10)


@each_path
@settings(max_examples=12)
@given(seed=seeds)
def test_the_posterior_is_what_bayes_rule_says(path: Path, seed: int) -> None:
    mixture = small_mixture(seed)
    x = some_points(mixture, path, seed)
    clean = mixture.sample(np.random.default_rng(seed + 1), len(x))
    joint = mixture.log_density(clean) + log_normal(x, path.alpha * clean, path.sigma**2)
    bayes = joint - mixture.noised(*path.now).log_density(x)
    np.testing.assert_allclose(log_density(mixture.posterior(x, *path.now), clean), bayes)


@each_path
@settings(max_examples=12)
@given(seed=seeds)
def test_the_posterior_covariance_is_that_of_the_hessian(path: Path, seed: int) -> None:
    mixture = small_mixture(seed)
    x = some_points(mixture, path, seed)
    law = mixture.posterior(x, *path.now)
    weights = np.exp(law.log_weights)
    second = np.einsum("nk,nki,nkj->nij", weights, law.means, law.means)
    second += np.einsum("nk,ki->ni", weights, law.variances)[:, :, None] * np.eye(3)
    covariance = second - law.mean()[:, :, None] * law.mean()[:, None, :]
    hessian = gradient(mixture.noised(*path.now).score, x)
    expected = (path.sigma / path.alpha) ** 2 * (np.eye(3) + path.sigma**2 * hessian)
    np.testing.assert_allclose(covariance, expected, atol=1e-7)


def test_samples_have_the_moments_of_their_mixture() -> None:
    mixture = small_mixture(3)
    count = 40_000
    x = mixture.sample(np.random.default_rng(0), count)
    mean = mixture.weights @ mixture.means
    spread = mixture.weights @ (mixture.variances + mixture.means**2) - mean**2
    assert (np.abs(x.mean(axis=0) - mean) < 4 * np.sqrt(spread / count)).all()
    error = ((x - mean) ** 2).std(axis=0) / np.sqrt(count)
    assert (np.abs(x.var(axis=0) - spread) < 4 * error).all()


def test_posterior_samples_have_the_moments_of_their_posterior() -> None:
    mixture, path = small_mixture(3), PATHS["flow"]
    law = mixture.posterior(some_points(mixture, path, 0, 3), *path.now)
    count = 40_000
    samples = law.sample(np.random.default_rng(0), count)
    weights = np.exp(law.log_weights)
    spread = np.einsum("nk,nki->ni", weights, law.variances + law.means**2) - law.mean() ** 2
    deviation = np.abs(samples.mean(axis=1) - law.mean())
    assert (deviation < 4 * np.sqrt(spread / count)).all()
    error = ((samples - law.mean()[:, None]) ** 2).std(axis=1) / np.sqrt(count)
    assert (np.abs(samples.var(axis=1) - spread) < 4 * error).all()


@pytest.mark.parametrize(
    ("weights", "means", "variances", "message"),
    [
        (np.ones(2) / 2, np.zeros((3, 1)), np.ones((3, 1)), r"weights \(2,\)"),
        (np.ones(1), np.zeros((1, 2)), np.ones((1, 1)), r"variances \(1, 1\)"),
        (np.full(2, 0.4), np.zeros((2, 1)), np.ones((2, 1)), "at least 0 and sum to 1"),
        (np.array([1.5, -0.5]), np.zeros((2, 1)), np.ones((2, 1)), "at least 0"),
        (np.ones(1), np.zeros((1, 1)), np.zeros((1, 1)), "variances be above 0"),
    ],
)
def test_impossible_mixtures_are_refused(
    weights: Floats, means: Floats, variances: Floats, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture(weights, means, variances)


# ---- values of rewards


REWARDS: dict[str, Any] = {
    "linear": LinearReward(np.array([0.7, -0.4, 0.2]), 0.3),
    "quadratic": QuadraticReward(np.array([1.0, 0.5, 0.0]), np.array([0.5, -1.0, 0.25])),
}
ON_A_LINE: dict[str, Any] = {
    "linear": LinearReward(np.array([0.7]), 0.3),
    "quadratic": QuadraticReward(np.array([1.3]), np.array([0.5])),
}
each_reward = pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS.keys())
each_reward_on_a_line = pytest.mark.parametrize("reward", ON_A_LINE.values(), ids=ON_A_LINE.keys())

GRID = np.linspace(-16, 16, 1601)[:, None]
"""Sums over it are integrals to rounding: the densities are smooth and vanish at its ends."""
CELL = float(GRID[1, 0] - GRID[0, 0])


@each_path
@each_reward_on_a_line
@settings(max_examples=12)
@given(seed=seeds)
def test_values_are_integrals_over_the_posterior(path: Path, reward: Any, seed: int) -> None:
    mixture = small_mixture(seed, dimensions=1)
    x = some_points(mixture, path, seed, 3)
    joint = mixture.log_density(GRID) + log_normal(
        x[:, None], path.alpha * GRID[None], path.sigma**2
    )
    density = np.exp(joint)
    density /= density.sum(axis=1, keepdims=True) * CELL
    law = mixture.posterior(x, *path.now)
    hard = density @ reward(GRID) * CELL
    soft = TEMPERATURE * np.log(density @ np.exp(reward(GRID) / TEMPERATURE) * CELL)
    np.testing.assert_allclose(reward.hard_value(law), hard, atol=1e-8)
    np.testing.assert_allclose(reward.soft_value(law, TEMPERATURE), soft, atol=1e-8)


@each_path
@each_reward
def test_values_are_means_over_samples(path: Path, reward: Any) -> None:
    # Importance sampling from the prior, which knows nothing of the posterior's formulas.
    mixture = small_mixture(5)
    x = some_points(mixture, path, 1, 1)
    clean = mixture.sample(np.random.default_rng(2), 100_000)
    weights = np.exp(log_normal(x, path.alpha * clean, path.sigma**2))
    weights /= weights.mean()
    law = mixture.posterior(x, *path.now)
    gain = np.exp(reward(clean) / TEMPERATURE)
    for found, terms in (
        (reward.hard_value(law)[0], reward(clean)),
        (np.exp(reward.soft_value(law, TEMPERATURE)[0] / TEMPERATURE), gain),
    ):
        mean = (weights * terms).mean()
        error = (weights * (terms - mean)).std() / np.sqrt(len(clean))
        assert abs(found - mean) < 4 * error
        assert error < 0.05 * (1 + abs(mean))  # or the line above would say nothing


@each_path
@settings(max_examples=12)
@given(seed=seeds)
def test_only_curvature_biases_the_reward_of_the_denoised_estimate(path: Path, seed: int) -> None:
    mixture = small_mixture(seed)
    x = some_points(mixture, path, seed)
    law, denoised = mixture.posterior(x, *path.now), mixture.denoised(x, *path.now)
    linear, quadratic = REWARDS["linear"], REWARDS["quadratic"]
    np.testing.assert_allclose(linear.hard_value(law), linear(denoised), atol=1e-9)
    weights = np.exp(law.log_weights)
    spread = np.einsum("nk,nki->ni", weights, law.variances + law.means**2) - denoised**2
    bias = 0.5 * spread @ quadratic.curvature
    np.testing.assert_allclose(quadratic.hard_value(law), quadratic(denoised) - bias, atol=1e-9)


@each_path
@each_reward
@settings(max_examples=12)
@given(seed=seeds)
def test_a_soft_value_lies_above_the_hard_one_and_tends_to_it(
    path: Path, reward: Any, seed: int
) -> None:
    mixture = small_mixture(seed)
    law = mixture.posterior(some_points(mixture, path, seed), *path.now)
    hard = reward.hard_value(law)
    soft = [reward.soft_value(law, temperature) for temperature in (0.5, 5.0, 1e6)]
    assert (soft[0] >= soft[1]).all()
    assert (soft[1] >= hard).all()
    # The gap is half the reward's variance over the temperature: here below 1e-3.
    np.testing.assert_allclose(soft[2], hard, atol=1e-3)


@each_reward
@settings(max_examples=12)
@given(seed=seeds, temperature=st.sampled_from((0.2, 0.8, 5.0)))
def test_tilting_multiplies_the_density_and_its_normaliser_makes_it_one(
    reward: Any, seed: int, temperature: float
) -> None:
    mixture = small_mixture(seed)
    tilted, log_normaliser = reward.tilted(mixture, temperature)
    x = mixture.sample(np.random.default_rng(seed), 6)
    # A mixture is a density by itself, so that this equality fixes the normaliser too.
    np.testing.assert_allclose(
        tilted.log_density(x),
        mixture.log_density(x) + reward(x) / temperature - log_normaliser,
        atol=1e-8,
    )


@each_reward_on_a_line
@settings(max_examples=12)
@given(seed=seeds)
def test_the_normaliser_is_an_integral(reward: Any, seed: int) -> None:
    mixture = small_mixture(seed, dimensions=1)
    _, log_normaliser = reward.tilted(mixture, TEMPERATURE)
    terms = mixture.log_density(GRID) + reward(GRID) / TEMPERATURE
    assert log_normaliser == pytest.approx(np.logaddexp.reduce(terms) + np.log(CELL), abs=1e-8)


@each_reward
def test_the_value_of_pure_noise_is_the_normaliser(reward: Any) -> None:
    mixture = small_mixture(7)
    law = mixture.posterior(np.ones((1, 3)), 1e-9, 1.0)
    _, log_normaliser = reward.tilted(mixture, TEMPERATURE)
    value = reward.soft_value(law, TEMPERATURE)[0]
    assert value == pytest.approx(TEMPERATURE * log_normaliser, abs=1e-7)


@each_reward
def test_a_strong_tilt_may_leave_components_without_weight(reward: Any) -> None:
    mixture = Mixture(np.full(2, 0.5), np.array([[0.0] * 3, [60.0, -60.0, 60.0]]), np.ones((2, 3)))
    tilted, _ = reward.tilted(mixture, 0.005)
    assert tilted.weights.min() == 0
    x = tilted.sample(np.random.default_rng(0), 4)
    assert np.isfinite(tilted.log_density(x)).all()
    assert np.isfinite(tilted.score(x)).all()
    assert np.isfinite(tilted.denoised(x, 0.8, 0.6)).all()
    assert np.isfinite(reward.soft_value(tilted.posterior(x, 0.8, 0.6), 1.0)).all()
    assert np.isfinite(reward.tilted(tilted, 1.0)[1])


# ---- the exact transition


@each_path
@settings(max_examples=12)
@given(seed=seeds)
def test_the_transition_is_what_bayes_rule_says(path: Path, seed: int) -> None:
    mixture = small_mixture(seed)
    x = some_points(mixture, path, seed)
    later = mixture.noised(path.alpha_next, path.sigma_next)
    x_next = later.sample(np.random.default_rng(seed + 1), len(x))
    ratio = path.alpha / path.alpha_next
    fresh = path.sigma**2 - (ratio * path.sigma_next) ** 2
    joint = later.log_density(x_next) + log_normal(x, ratio * x_next, fresh)
    bayes = joint - mixture.noised(*path.now).log_density(x)
    np.testing.assert_allclose(log_density(mixture.transition(x, *path), x_next), bayes)


def densities_on_grid(mixture: Mixture, path: Path, x: Floats) -> Floats:
    """``[points, grid]`` density of the exact transition from each point."""
    law = mixture.transition(x, *path)
    return np.stack(
        [
            np.exp(
                log_density(
                    Posterior(
                        np.repeat(law.log_weights[i : i + 1], len(GRID), 0),
                        np.repeat(law.means[i : i + 1], len(GRID), 0),
                        law.variances,
                    ),
                    GRID,
                )
            )
            for i in range(len(x))
        ]
    )


@each_path
@each_reward_on_a_line
@settings(max_examples=12)
@given(seed=seeds)
def test_the_soft_bellman_equation_holds(path: Path, reward: Any, seed: int) -> None:
    mixture = small_mixture(seed, dimensions=1)
    x = some_points(mixture, path, seed, 3)
    density = densities_on_grid(mixture, path, x)
    after = mixture.posterior(GRID, path.alpha_next, path.sigma_next)
    before = mixture.posterior(x, *path.now)
    # A linear reward's value grows without bound, and the density falls faster: no overflow here.
    soft = reward.soft_value(after, TEMPERATURE) / TEMPERATURE
    expected = TEMPERATURE * np.log(density @ np.exp(soft) * CELL)
    np.testing.assert_allclose(reward.soft_value(before, TEMPERATURE), expected, atol=1e-7)
    # The hard value is a martingale: a perfect value gains nothing on average.
    expected = density @ reward.hard_value(after) * CELL
    np.testing.assert_allclose(reward.hard_value(before), expected, atol=1e-7)


@each_path
def test_transitions_lead_from_marginal_to_marginal(path: Path) -> None:
    mixture = small_mixture(11, dimensions=1)
    x = GRID[::4]  # coarser for the outer integral, still a tenth of a standard deviation
    start = np.exp(mixture.noised(*path.now).log_density(x))
    arrived = start @ densities_on_grid(mixture, path, x) * 4 * CELL
    expected = np.exp(mixture.noised(path.alpha_next, path.sigma_next).log_density(GRID))
    np.testing.assert_allclose(arrived, expected, atol=1e-9)


@settings(max_examples=12)
@given(seed=seeds)
def test_one_ddim_step_has_the_exact_mean_but_too_little_variance(seed: int) -> None:
    mixture, path = small_mixture(seed), PATHS["variance preserving"]
    x = some_points(mixture, path, seed)
    alpha, sigma, alpha_next, sigma_next = (np.array([[number]]) for number in path)
    step = ddim_step(
        x,
        mixture.denoised(x, *path.now),
        np.zeros_like(x),
        alpha=alpha,
        sigma=sigma,
        alpha_next=alpha_next,
        sigma_next=sigma_next,
        eta=np.ones((1, 1)),
    )
    law = mixture.transition(x, *path)
    np.testing.assert_allclose(step, law.mean(), atol=1e-10)
    fresh = sigma_next**2 / sigma**2 * (1 - alpha**2 / alpha_next**2)
    weights = np.exp(law.log_weights)
    variance = np.einsum("nk,nki->ni", weights, law.variances + law.means**2) - law.mean() ** 2
    assert (variance > fresh).all()


# ---- steps and the schedule


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("index", [0, 3, 7])
def test_a_ddim_step_is_that_of_diffusers(eta: float, index: int) -> None:
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(8)
    products = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)]).double()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    x, denoised, noise = np.random.default_rng(index).standard_normal((3, 4, 5))
    alpha, sigma = (term.sqrt().numpy().reshape(-1, 1) for term in (products, 1 - products))
    epsilon = (x - alpha[index] * denoised) / sigma[index]
    stock = scheduler.step(
        torch.from_numpy(epsilon),
        scheduler.timesteps[index],
        torch.from_numpy(x),
        eta=eta,
        variance_noise=torch.from_numpy(noise),
    ).prev_sample
    ours = ddim_step(
        x,
        denoised,
        noise,
        alpha=alpha[index : index + 1],
        sigma=sigma[index : index + 1],
        alpha_next=alpha[index + 1 : index + 2],
        sigma_next=sigma[index + 1 : index + 2],
        eta=np.full((1, 1), eta),
    )
    np.testing.assert_allclose(ours, stock.numpy(), atol=1e-10)


@given(st.integers(1, 60))
def test_the_schedule_preserves_variance_and_ends_at_the_data(num_steps: int) -> None:
    alpha, sigma = cosine_schedule(num_steps)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1)
    assert (np.diff(alpha) > 0).all()
    assert (alpha[-1], sigma[-1]) == (1, 0)
    assert alpha[0] > 0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_many_steps_draw_from_the_mixture(eta: float) -> None:
    mixture = Mixture(np.array([0.3, 0.7]), np.array([[-2.0], [1.5]]), np.array([[0.25], [0.5]]))
    count, num_steps = 4000, 200
    alpha, sigma = (term.reshape(-1, 1) for term in cosine_schedule(num_steps))
    generator = np.random.default_rng(1)
    x = generator.standard_normal((count, 1))
    for i in range(num_steps):
        x = ddim_step(
            x,
            mixture.denoised(x, alpha[i, 0], sigma[i, 0]),
            generator.standard_normal((count, 1)),
            alpha=alpha[i : i + 1],
            sigma=sigma[i : i + 1],
            alpha_next=alpha[i + 1 : i + 2],
            sigma_next=sigma[i + 1 : i + 2],
            eta=np.full((1, 1), eta),
        )
    samples = np.sort(x[:, 0])
    density = np.exp(mixture.log_density(GRID)) * CELL
    distribution = np.cumsum(density) - density / 2
    expected = np.interp(samples, GRID[:, 0], distribution)
    deviation = np.abs(expected - (np.arange(count) + 0.5) / count).max()
    # 1.63 / sqrt(count) is the 1 % point of Kolmogorov and Smirnov; the rest is for finite steps.
    assert deviation < 1.63 / count**0.5 + 0.01


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
    saved[0][:] = 0
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


@pytest.mark.parametrize("make", [rugged_environment, subspace_environment])
def test_the_worlds_of_the_comparison_are_the_same_for_a_seed(make: Any) -> None:
    one, same, other = (make(2, num_steps=4, first_seed=seed) for seed in (1, 1, 2))
    for problem in (0, 1):
        x = one.mixtures[problem].means
        np.testing.assert_array_equal(x, same.mixtures[problem].means)
        np.testing.assert_array_equal(one.rewards[problem](x), same.rewards[problem](x))
        np.testing.assert_array_equal(one.first_noise(problem), same.first_noise(problem))
        assert (x != other.mixtures[problem].means).all()
        assert (one.first_noise(problem) != other.first_noise(problem)).all()
    assert (one.mixtures[0].means != one.mixtures[1].means).all()
    assert (linear_gaussian(1, 4).first_noise(0) != one.first_noise(0)[0]).all()
