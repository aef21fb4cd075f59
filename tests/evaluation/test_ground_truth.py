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

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.ground_truth import (
    SCHEDULES,
    Floats,
    LinearReward,
    Mixture,
    Posterior,
    QuadraticReward,
    RuggedReward,
    cosine_schedule,
    ddim_std,
    ddim_step,
    standardised_log_likelihood,
)
from tests.toys import small_mixture

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


def test_a_posterior_sample_is_what_its_numbers_say() -> None:
    law = Posterior(
        np.log([[0.25, 0.75], [0.5, 0.5]]), np.arange(8.0).reshape(2, 2, 2), np.full((2, 2), 4.0)
    )
    uniform = np.array([[0.2, 0.3], [0.49, 1.0]])
    noise = np.zeros((2, 2, 2))
    noise[1, 1] = 1.0, -1.0
    placed = law.place(uniform, noise)
    assert placed.tolist() == [[[0, 1], [2, 3]], [[4, 5], [8, 5]]]


def test_log_likelihoods_are_standardised_by_those_of_samples() -> None:
    # For one Gaussian the log density is a constant less half a chi-square number.
    dimensions = 64
    mixture = Mixture(np.ones(1), np.zeros((1, dimensions)), np.full((1, dimensions), 0.3))
    x = mixture.sample(np.random.default_rng(1), 500)
    chi_square = (x**2 / 0.3).sum(axis=1)
    expected = (dimensions - chi_square) / (2 * dimensions) ** 0.5
    found = standardised_log_likelihood(mixture, x)
    # Mean and deviation are known to 1 / sqrt(4096), the deviation a little less well.
    np.testing.assert_allclose(found, expected, atol=0.15)
    assert abs(found.mean()) < 4 / 500**0.5
    far = standardised_log_likelihood(mixture, 1.5 * x)
    assert (far < found - 3).all()


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
@settings(max_examples=12)
@given(seed=seeds)
def test_the_hard_value_of_ripples_is_an_integral(path: Path, seed: int) -> None:
    mixture = small_mixture(seed, dimensions=1)
    waves, phases = np.array([[1.5], [-4.0]]), np.array([0.3, 2.0])
    reward = RuggedReward(np.array([0.5]), waves, phases, curvature=0.2, height=0.7)
    x = some_points(mixture, path, seed, 3)
    joint = mixture.log_density(GRID) + log_normal(
        x[:, None], path.alpha * GRID[None], path.sigma**2
    )
    density = np.exp(joint)
    density /= density.sum(axis=1, keepdims=True)
    hard = reward.hard_value(mixture.posterior(x, *path.now))
    np.testing.assert_allclose(hard, density @ reward(GRID), atol=1e-8)


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


@each_path
@settings(max_examples=12)
@given(seed=seeds)
def test_one_ddim_step_has_the_exact_mean_but_too_little_variance(path: Path, seed: int) -> None:
    mixture = small_mixture(seed)
    x = some_points(mixture, path, seed)
    levels = {name: np.array([[number]]) for name, number in path._asdict().items()}
    eta = np.ones((1, 1))
    denoised = mixture.denoised(x, *path.now)
    step = ddim_step(x, denoised, np.zeros_like(x), eta=eta, **levels)
    law = mixture.transition(x, *path)
    np.testing.assert_allclose(step, law.mean(), atol=1e-10)
    weights = np.exp(law.log_weights)
    variance = np.einsum("nk,nki->ni", weights, law.variances + law.means**2) - law.mean() ** 2
    assert (variance > ddim_std(eta=eta, **levels) ** 2).all()


@each_path
@settings(max_examples=12)
@given(seed=seeds)
def test_the_noise_of_a_step_is_that_of_a_known_clean_sample(path: Path, seed: int) -> None:
    # A component without variance: x_s given x_t is what Bayes' rule says of two normal laws.
    mean = small_mixture(seed).means[:1]
    point = Mixture(np.ones(1), mean, np.full((1, 3), 1e-14))
    x = some_points(point, path, seed)
    levels = {name: np.array([[number]]) for name, number in path._asdict().items()}
    law = point.transition(x, *path)
    std = ddim_std(eta=np.ones((1, 1)), **levels)
    np.testing.assert_allclose(np.sqrt(law.variances), np.broadcast_to(std, (1, 3)), rtol=1e-6)


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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_every_schedule_ends_at_the_data_and_begins_at_noise(schedule: Any, num_steps: int) -> None:
    alpha, sigma = SCHEDULES[schedule](num_steps)
    assert alpha.shape == sigma.shape == (num_steps + 1,)
    assert (alpha[-1], sigma[-1]) == (1, 0)
    assert (np.diff(sigma) < 0).all()
    assert (np.diff(alpha) >= 0).all()
    assert alpha[0] < 0.04 * sigma[0]


def test_named_schedules_are_those_of_their_papers() -> None:
    alpha, sigma = SCHEDULES["flow"](4)
    assert sigma.tolist() == [1, 0.75, 0.5, 0.25, 0]
    np.testing.assert_array_equal(alpha + sigma, 1)
    alpha, sigma = SCHEDULES["edm"](18)
    assert (alpha == 1).all()
    # Karras et al. (2022), equation 5, at i = 0, 1 and 17 of 18.
    middle = (80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17) ** 7
    np.testing.assert_allclose(sigma[[0, 1, 17, 18]], [80, middle, 0.002, 0])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_many_steps_draw_from_the_mixture(schedule: Any, eta: float) -> None:
    mixture = Mixture(np.array([0.3, 0.7]), np.array([[-2.0], [1.5]]), np.array([[0.25], [0.5]]))
    count, num_steps = 4000, 200
    alpha, sigma = (term.reshape(-1, 1) for term in SCHEDULES[schedule](num_steps))
    generator = np.random.default_rng(1)
    x = np.hypot(alpha[0], sigma[0]) * generator.standard_normal((count, 1))
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
