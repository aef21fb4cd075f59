"""What jumps tell on mixtures, against closed forms of one Gaussian and by making them."""

from __future__ import annotations

import numpy as np
import pytest

from mctd_diffusers.errors import ConfigError, SearchError
from mctd_diffusers.evaluation.ground_truth import Mixture, RuggedReward
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment
from mctd_diffusers.search.environment import FIRST_DRAW, Action, Handles
from tests.toys import linear_gaussian, small_environment, small_mixture

STEPS = 8
STRIDES = (1, 2, 4, 8)


def evaluated(environment: MixtureEnvironment, count: int = 3) -> Handles:
    """Different noises of each problem, evaluated."""
    problems = np.repeat(np.arange(len(environment.mixtures)), count)
    seeds = np.array([FIRST_DRAW, *range(1, count)] * len(environment.mixtures), dtype=np.int64)
    handles = environment.reset(problems, seeds)
    environment.denoise(handles)
    return handles


def test_of_one_gaussian_all_is_known() -> None:
    environment = linear_gaussian(1, STEPS)
    handles = evaluated(environment)
    spent = environment.ledger.total
    gains = environment.predict_gain(handles, STRIDES)
    assert environment.ledger.total == spent
    # x_0 given x_t is N(alpha x, sigma^2), so the hard value alpha_s x_s has, given x_t, variance
    # sigma_t^2 - sigma_s^2: what is known less later (the law of total variance).
    alpha, sigma = environment.alpha, environment.sigma
    resolved = [np.log(sigma[0] ** 2 - sigma[k] ** 2) for k in STRIDES]
    np.testing.assert_allclose(gains.log_variance, np.tile(resolved, (3, 1)), atol=0.2)
    deviation = np.exp(gains.log_variance / 2)
    assert (abs(gains.mean_gain) < 3 * deviation / np.sqrt(256)).all()
    # A deterministic step is a rotation of x: by the angle between levels, to first order.
    x = environment.latents(handles)[:, 0]
    jumped = alpha[4] * alpha[0] * x + sigma[4] * (x - alpha[0] ** 2 * x) / sigma[0]
    fine = x
    for now in range(4):
        clean = alpha[now] * fine
        noise = (fine - alpha[now] * clean) / sigma[now]
        fine = alpha[now + 1] * clean + sigma[now + 1] * noise
    expected = np.log(abs(jumped - fine))
    np.testing.assert_allclose(gains.log_truncation_error[:, 2], expected, rtol=1e-9)
    assert np.isneginf(gains.log_truncation_error[:, 0]).all()
    assert gains.final_similarity == pytest.approx(1)  # in one dimension, of one sign


def test_errors_and_similarity_are_those_of_steps_really_made() -> None:
    environment = small_environment(2, STEPS)
    handles = evaluated(environment)
    gains = environment.predict_gain(handles, STRIDES)

    def walk(path: Handles, strides: list[int]) -> Handles:
        for stride in strides:
            environment.denoise(path)
            seeds = np.zeros(len(path), dtype=np.int64)
            path = environment.step(path, [Action(stride, 0.0)] * len(path), seeds)
        return path

    finished = environment.latents(walk(handles, [1] * STEPS))
    for column, stride in enumerate((2, 4), start=1):
        jumped, fine = walk(handles, [stride]), walk(handles, [1] * stride)
        environment.denoise(np.append(jumped, fine))
        off = environment.latents(jumped) - environment.latents(fine)
        error = np.log(np.sqrt((off**2).mean(axis=1)))
        np.testing.assert_allclose(gains.log_truncation_error[:, column], error, rtol=1e-9)
        arrived = environment._denoised[jumped]
        cosine = (arrived * finished).sum(axis=1) / (
            np.linalg.norm(arrived, axis=1) * np.linalg.norm(finished, axis=1)
        )
        np.testing.assert_allclose(gains.final_similarity[:, column], cosine, rtol=1e-9)


def test_longer_jumps_resolve_more_and_err_more() -> None:
    environment = small_environment(3, STEPS)
    gains = environment.predict_gain(evaluated(environment), STRIDES)
    assert (np.diff(gains.log_variance.mean(axis=0)) > 0).all()
    assert (np.diff(gains.log_truncation_error[:, 1:].mean(axis=0)) > 0).all()


def test_an_exact_value_is_a_martingale_and_the_last_jump_resolves_all_that_is_left() -> None:
    mixture = small_mixture(5)
    reward = RuggedReward(np.zeros(3), np.ones((2, 3)), np.array([0.1, 0.7]))
    environment = MixtureEnvironment([mixture], [reward], num_steps=STEPS, kernel="exact")
    handles = evaluated(environment, 8)
    gains = environment.predict_gain(handles, (STEPS,))
    deviation = np.exp(gains.log_variance / 2)
    # One set of draws decides all eight; it may be off by three of its standard errors.
    assert (abs(gains.mean_gain) < 3 * deviation / np.sqrt(256)).all()
    posterior = mixture.posterior(
        environment.latents(handles), environment.alpha[0], environment.sigma[0]
    )
    drawn = posterior.sample(np.random.default_rng(1), 20_000)
    variance = reward(drawn.reshape(-1, 3)).reshape(8, -1).var(axis=1)
    np.testing.assert_allclose(gains.log_variance[:, 0], np.log(variance), atol=0.4)


def test_predictions_are_one_samples_own_and_end_where_the_schedule_does() -> None:
    environment = small_environment(2, STEPS)
    handles = evaluated(environment)
    late = environment.step(handles[:1], [Action(6)], np.array([1]))
    environment.denoise(late)
    asked = np.concatenate([late, handles[::-1], late])
    together = environment.predict_gain(asked, STRIDES)
    for row, handle in enumerate(asked):
        alone = environment.predict_gain(np.array([handle]), STRIDES)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], other[row], rtol=1e-9, atol=1e-12)
    for prediction in together:
        assert np.isnan(prediction[0]).tolist() == [False, False, True, True]
        assert np.isfinite(prediction[1, 1:]).all()


def test_what_cannot_be_predicted_is_refused() -> None:
    environment = small_environment(1, STEPS)
    lazy = environment.reset(np.array([0]), np.array([1]))
    with pytest.raises(SearchError, match="not evaluated"):
        environment.predict_gain(lazy, STRIDES)
    plain = MixtureEnvironment(
        [Mixture(np.ones(1), np.zeros((1, 1)), np.ones((1, 1)))],
        [lambda x: x[:, 0]],
        num_steps=2,
    )
    with pytest.raises(ConfigError, match="no hard_value"):
        plain.predict_gain(evaluated(plain, 1), (1, 2))
