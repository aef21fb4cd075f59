"""Targets of the information gain evaluator, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.ground_truth import LinearReward, QuadraticReward, cosine_schedule
from mctd_diffusers.models.calibration import Calibration
from mctd_diffusers.trajectories.targets import (
    final_similarity,
    fit_calibration,
    gains_of_pairs,
    jump_costs,
    resolved_variance,
    reward_rate,
    truncation_error,
    variance_preserving,
)
from tests.toys import small_mixture

REWARD = QuadraticReward(np.ones(3), np.full(3, 0.5))


def levels(first: int, second: int, num_steps: int = 8) -> tuple[tuple[float, float], ...]:
    alpha, sigma = cosine_schedule(num_steps)
    return (alpha[first], sigma[first]), (alpha[second], sigma[second])


def exact_siblings(count: int, now: tuple[float, float], then: tuple[float, float]) -> np.ndarray:
    """A state of a mixture, and draws of the exact law of what it becomes."""
    generator = np.random.default_rng(0)
    state = small_mixture().noised(*now).sample(generator, 1)
    return np.concatenate(
        [state, small_mixture().transition(state, *now, *then).sample(generator, count)[0]]
    )


def test_a_perfect_value_has_no_mean_gain_and_resolves_what_the_law_of_total_variance_says() -> (
    None
):
    now, then = levels(3, 5)
    state, *arrived = exact_siblings(20_000, now, then)
    mixture, siblings = small_mixture(), np.array(arrived)
    before = REWARD.hard_value(mixture.posterior(state[None], *now))[0]
    after = REWARD.hard_value(mixture.posterior(siblings, *then))
    spread = after.std() / np.sqrt(len(after))
    assert reward_rate(np.full(len(after), before), after, 2).mean() == pytest.approx(
        0, abs=3 * spread / 2
    )
    # Var(r | x_t) = E Var(r | x_s) + Var(E(r | x_s)); the left and the middle by samples of x_0.
    generator = np.random.default_rng(1)
    ends = mixture.posterior(siblings, *then).sample(generator, 16)
    rewards = REWARD(ends.reshape(-1, 3)).reshape(len(after), 16)
    left = rewards.var()
    middle = rewards.var(axis=1, ddof=1).mean()
    assert resolved_variance(after) == pytest.approx(left - middle, rel=0.05)


def test_a_value_that_is_not_calibrated_gains_by_crossing_levels_alone() -> None:
    now, then = levels(3, 5)
    state, *arrived = exact_siblings(20_000, now, then)
    mixture = small_mixture()
    before = REWARD(mixture.denoised(state[None], *now))
    after = REWARD(mixture.denoised(np.array(arrived), *then))
    gain = reward_rate(np.repeat(before, len(after)), after, 2)
    assert abs(gain.mean()) > 10 * gain.std() / np.sqrt(len(gain))


def test_the_estimate_from_siblings_is_unbiased_however_few_they_are() -> None:
    now, then = levels(2, 4)
    reward = LinearReward(np.array([1.0, -0.5, 0.25]))
    _, *arrived = exact_siblings(30_000, now, then)
    values = reward.hard_value(small_mixture().posterior(np.array(arrived), *then))
    truth = values.var()
    for siblings in (2, 3, 10):
        estimates = resolved_variance(values.reshape(-1, siblings))
        error = estimates.std() / np.sqrt(len(estimates))
        assert estimates.mean() == pytest.approx(truth, abs=4 * error)
        assert error < 0.05 * truth


def test_one_sibling_has_no_variance() -> None:
    with pytest.raises(ConfigError, match="1 sibling: a variance needs two"):
        resolved_variance(np.zeros((3, 1)))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_gains_of_pairs_are_those_of_every_stride(values: list[float]) -> None:
    value = np.array(values)
    gains = gains_of_pairs(value)
    for i in range(len(value)):
        for j in range(len(value)):
            if j > i:
                assert gains[i, j] == value[j] - value[i]
                rate = reward_rate(value[i : i + 1], value[j : j + 1], j - i)
                assert rate * (j - i) == pytest.approx(gains[i, j])
            else:
                assert np.isnan(gains[i, j])


@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_similarity_is_a_cosine_and_one_at_the_end(seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    denoised, final = generator.normal(size=(2, 5, 7))
    similarity = final_similarity(denoised, final)
    assert (np.abs(similarity) <= 1).all()
    np.testing.assert_allclose(final_similarity(scale * denoised, final), similarity)
    np.testing.assert_allclose(final_similarity(scale * final, final), 1)
    np.testing.assert_allclose(final_similarity(-final, final), -1)


def test_latents_without_a_direction_are_refused() -> None:
    with pytest.raises(ConfigError, match="all zero: they have no direction"):
        final_similarity(np.zeros((1, 4)), np.ones((1, 4)))


def test_the_truncation_error_of_a_linear_equation_is_exact() -> None:
    # dx/dt = -x by one Euler step of h against the solution: |(1 - h) - exp(-h)| |x|.
    h, state = 0.3, np.random.default_rng(0).normal(size=(4, 6))
    jumped, fine = (1 - h) * state, np.exp(-h) * state
    expected = abs((1 - h) - np.exp(-h)) * np.sqrt((state**2).mean(axis=1))
    np.testing.assert_allclose(truncation_error(jumped, fine), expected)
    assert truncation_error(fine, fine).max() == 0


@given(st.floats(-30, 30))
def test_scales_of_signal_and_noise_have_that_ratio_and_unit_power(log_snr: float) -> None:
    alpha, sigma = variance_preserving(np.array([log_snr]))
    assert alpha**2 + sigma**2 == pytest.approx(1)
    assert 2 * np.log(alpha / sigma) == pytest.approx(log_snr, abs=1e-9)


def test_jumps_cost_nothing_on_straight_paths_and_as_much_as_they_bend_elsewhere() -> None:
    generator = np.random.default_rng(0)
    log_snr = np.linspace(-3, 3, 5)
    alpha, sigma = (scale[:, None] for scale in variance_preserving(log_snr))
    clean, noise = generator.normal(size=(2, 6, 1, 10))
    latents = alpha * clean + sigma * noise
    estimates = np.repeat(clean, 4, axis=1)
    costs = jump_costs(latents, estimates, log_snr)
    np.testing.assert_allclose(costs[np.triu_indices(5, 1)], 0, atol=1e-12)
    assert np.isnan(costs[np.tril_indices(5)]).all()
    # An estimate that is off by d: x_j is off by (alpha_j - sigma_j alpha_i / sigma_i) d.
    off = jump_costs(latents, estimates + 0.5, log_snr)
    for i, j in ((0, 1), (0, 4), (2, 3)):
        expected = 0.5 * abs(alpha[j, 0] - sigma[j, 0] * alpha[i, 0] / sigma[i, 0])
        assert off[i, j] == pytest.approx(expected)


# --- calibration


def test_a_calibration_finds_slopes_offsets_and_deviations_that_made_the_values() -> None:
    generator = np.random.default_rng(0)
    log_snr = generator.uniform(-5, 5, size=40_000)
    reward = 20 + 3 * generator.normal(size=len(log_snr))
    slope, offset = 0.5 + 0.08 * log_snr, 3 - log_snr
    noise = np.exp(-log_snr / 5) * generator.normal(size=len(log_snr))
    value = (reward + noise - offset) / slope
    fitted = fit_calibration(value, log_snr, reward, num_knots=8)
    # Values with noise are worth less than they say, as in every regression on a noisy number.
    for level in (-3.0, 0.0, 3.0):
        near = np.array([level])
        share = 9 / (9 + np.exp(-2 * level / 5))
        assert fitted.slope_at(near)[0] == pytest.approx(share * (0.5 + 0.08 * level), rel=0.06)
        deviation = np.sqrt(share) * np.exp(-level / 5)
        assert fitted.deviation_at(near)[0] == pytest.approx(deviation, rel=0.1)
    assert np.abs((fitted(value, log_snr) - reward).mean()) < 0.05


def test_calibrated_values_of_a_mixture_are_martingales_as_those_before_are_not() -> None:
    generator = np.random.default_rng(0)
    mixture, alphas = small_mixture(), cosine_schedule(6)
    ends = mixture.sample(generator, 4000)
    path = [(alpha, sigma) for alpha, sigma in zip(*alphas, strict=True)][:-1]
    states = [alpha * ends + sigma * generator.normal(size=ends.shape) for alpha, sigma in path]
    values = np.stack(
        [REWARD(mixture.denoised(x, *level)) for x, level in zip(states, path, strict=True)]
    )
    log_snr = np.repeat([[2 * np.log(a / s)] for a, s in path], len(ends), axis=1)
    rewards = np.repeat(REWARD(ends)[None], len(path), axis=0)
    fitted = fit_calibration(values.ravel(), log_snr.ravel(), rewards.ravel())
    before = gains_of_pairs(values.mean(axis=1))
    after = gains_of_pairs(fitted(values, log_snr).mean(axis=1))
    assert np.nanmax(np.abs(after)) < 0.02
    assert np.nanmax(np.abs(before)) > 0.3


def test_a_calibration_survives_a_config() -> None:
    made = Calibration((-1.0, 2.0), (0.5, 1.0), (3.0, 0.0), (1.0, 0.5))
    assert Calibration.from_dict(made.to_dict()) == made
    # Constant outside its knots.
    assert made(np.array([2.0]), np.array([-9.0])) == 4.0


@pytest.mark.parametrize(
    ("value", "complaint"),
    [(np.zeros(0), "there are no values"), (np.ones(30), "30 values do not decide on")],
)
def test_what_cannot_be_calibrated_is_refused(value: np.ndarray, complaint: str) -> None:
    log_snr = np.linspace(-1, 1, len(value))
    with pytest.raises(ConfigError, match=complaint):
        fit_calibration(value, log_snr, np.arange(float(len(value))), num_knots=4)
