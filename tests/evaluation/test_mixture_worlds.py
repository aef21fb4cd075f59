"""The problems that strategies are compared on: the same for a seed, as hard in any dimension."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.ground_truth import standardised_log_likelihood
from mctd_diffusers.evaluation.mixture_worlds import (
    coefficients_of,
    dct_basis,
    field_environment,
    field_of,
    field_spectrum,
    mixture_suite,
    rugged_environment,
    subspace_environment,
)
from mctd_diffusers.search.strategies import BestOfN
from tests.toys import linear_gaussian, search

SUITE = mixture_suite((16, 64, 256))
each_world = pytest.mark.parametrize("name", SUITE)


def test_a_suite_has_each_kind_in_each_number_of_dimensions() -> None:
    assert list(mixture_suite()) == ["rugged-16", "subspace-16", "rugged-64", "subspace-64"]
    assert list(SUITE)[4:] == ["rugged-256", "subspace-256", "fields-256"]
    for name, make in SUITE.items():
        environment = make(2, num_steps=4, first_seed=1)
        assert environment.mixtures[0].dimensions == int(name.split("-")[1])
        assert len(environment.mixtures) == 2


@each_world
def test_a_world_is_the_same_for_a_seed_and_does_not_depend_on_how_many_follow(name: str) -> None:
    make = SUITE[name]
    one, same, other = (
        make(n, num_steps=4, first_seed=seed) for n, seed in ((2, 1), (3, 1), (2, 2))
    )
    for problem in (0, 1):
        x = one.mixtures[problem].means
        np.testing.assert_array_equal(x, same.mixtures[problem].means)
        np.testing.assert_array_equal(one.rewards[problem](x), same.rewards[problem](x))
        np.testing.assert_array_equal(one.first_noise(problem), same.first_noise(problem))
        assert (x != other.mixtures[problem].means).all()
        assert (one.first_noise(problem) != other.first_noise(problem)).all()
    assert (one.mixtures[0].means != one.mixtures[1].means).all()
    assert (linear_gaussian(1, 4).first_noise(0) != one.first_noise(0)[0]).all()


def test_the_worlds_of_old_are_those_of_the_suite() -> None:
    for make, dimensions in ((rugged_environment, 16), (subspace_environment, 32)):
        plain = make(1, num_steps=4, first_seed=3)
        named = make(1, num_steps=4, first_seed=3, dimensions=dimensions)
        np.testing.assert_array_equal(plain.mixtures[0].means, named.mixtures[0].means)


@pytest.mark.parametrize("kind", ["rugged", "subspace"])
def test_rewards_of_samples_are_alike_in_any_number_of_dimensions(kind: str) -> None:
    # Means over 30 problems of 500 samples: what a plain sample scores, and how far they spread.
    scores = {}
    for dimensions in (16, 64, 256):
        world = SUITE[f"{kind}-{dimensions}"](30, num_steps=4, first_seed=1)
        rewards = np.array(
            [
                reward(mixture.sample(np.random.default_rng(0), 500))
                for mixture, reward in zip(world.mixtures, world.rewards, strict=True)
            ]
        )
        scores[dimensions] = rewards.mean(), rewards.std(axis=1).mean()
    for dimensions in (64, 256):
        assert scores[dimensions][0] == pytest.approx(scores[16][0], rel=0.25)
        assert scores[dimensions][1] == pytest.approx(scores[16][1], rel=0.6)


@each_world
@pytest.mark.parametrize("kernel", ["ddim", "exact"])
def test_plain_samples_are_on_the_manifold(name: str, kernel: str) -> None:
    environment = SUITE[name](12, num_steps=16, first_seed=1, kernel=kernel)
    results = search(BestOfN(n=1), environment, nfe=16)
    handles = [result.best.handle for result in results if result.best]
    z = [
        standardised_log_likelihood(mixture, environment.latents(np.array([handle])))[0]
        for mixture, handle in zip(environment.mixtures, handles, strict=True)
    ]
    if kernel == "exact":  # samples of the mixture: four standard errors of the mean of twelve
        assert abs(np.mean(z)) < 4 / 12**0.5
    else:  # few steps make them smoother than the data, the more so in many dimensions
        assert 0 < np.mean(z) < 6
    assert min(z) > -3


# ---- fields


def test_the_basis_is_that_of_the_cosine_transform() -> None:
    fields = np.random.default_rng(0).standard_normal((3, 8, 8))
    coefficients = coefficients_of(fields)
    expected = scipy.fft.dctn(fields, axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(coefficients.reshape(3, 8, 8), expected, atol=1e-12)
    np.testing.assert_allclose(field_of(coefficients), fields, atol=1e-12)
    np.testing.assert_allclose(dct_basis(8) @ dct_basis(8).T, np.eye(8), atol=1e-12)


def test_fields_are_smooth_and_their_pixels_have_variance_one() -> None:
    assert field_spectrum(16).mean() == pytest.approx(1)
    environment = field_environment(1, num_steps=4, first_seed=1)
    variances = environment.mixtures[0].variances[0]
    noise = np.random.default_rng(0).standard_normal((2000, 256))
    fields = field_of(noise * np.sqrt(variances / 0.3))
    assert fields.var(axis=0).mean() == pytest.approx(1, rel=0.05)
    neighbours = (fields[:, 1:] * fields[:, :-1]).mean() / (fields**2).mean()
    assert neighbours > 0.5


def test_a_field_is_asked_for_its_layout_alone() -> None:
    environment = field_environment(1, num_steps=4, first_seed=1)
    (reward,) = environment.rewards
    x = np.zeros((1, 16, 16))
    fine = x.copy()
    fine[0, 4:, 4:] = 1.0
    coarse = x.copy()
    coarse[0, 0, 3] = 1.0
    plain = reward(x.reshape(1, -1))
    assert reward(fine.reshape(1, -1)) == plain
    assert reward(coarse.reshape(1, -1)) != plain


@pytest.mark.parametrize("wrong", [8, 9, 60])
def test_fields_are_squares(wrong: int) -> None:
    with pytest.raises(ConfigError, match=f"dimensions is {wrong}; fields are squares"):
        field_environment(1, num_steps=4, first_seed=1, dimensions=wrong)


@pytest.mark.parametrize("wrong", [(), (16, 3)])
def test_a_suite_needs_dimensions(wrong: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="give at least one, of at least 4"):
        mixture_suite(wrong)
