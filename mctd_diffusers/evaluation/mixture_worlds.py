"""Problems on mixtures that strategies are compared on, at any number of dimensions.

Each kind has its own difficulty; what makes it hard does not change with the dimensions, by the
scales given here. ``scripts/compare_on_mixtures.py`` prints how strategies compare on them.

``rugged``
    8 Gaussians of equal weight at standard normal means (variance 0.15 along each axis). The reward
    is a hill half-way between two of them, where data are rare, with three fine ripples of a period
    of about four standard deviations of a component: the path decides the mode early, the last
    steps decide the ripples, and selection that is too strong leaves the data for the hilltop.
``subspace``
    24 Gaussians at standard normal means (variance 0.0625). The reward is minus the squared
    distance to a point in 8 dimensions (half of them where there are fewer than 16); the rest does
    not matter to it. Nothing is rugged: what counts is to find the mode that happens to lie near,
    and to move within it.
``fields``
    12 Gaussians over images of ``size x size``, smooth and with fine detail (a power spectrum in a
    DCT basis, in which all is diagonal). The reward asks for a given layout: the 16 lowest
    frequencies. Samples are coefficients; :func:`field_of` makes pictures of them.

Gold is the reward itself, for it is exact; so over-optimisation shows in the log likelihood
(``ground_truth.standardised_log_likelihood``) alone. Few steps make plain samples smoother than the
data: at 16 steps their z is about 1 in 16 dimensions, 2 in 64 and 4 in 256, and 0 by the exact
kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.ground_truth import (
    Floats,
    Mixture,
    QuadraticReward,
    RuggedReward,
)
from mctd_diffusers.evaluation.mixture_environment import MixtureEnvironment


@runtime_checkable
class MakeWorld(Protocol):
    """Makes problems of one kind."""

    def __call__(
        self, num_problems: int, *, num_steps: int, first_seed: int, **settings: Any
    ) -> MixtureEnvironment:
        """So many problems, of which the first ones do not depend on how many follow.

        Args:
            num_problems: at least 1.
            num_steps: of the schedule.
            first_seed: decides mixtures, rewards and initial noises.
            settings: of the environment: its schedule, kernel, prices.
        """
        ...


def rugged_environment(
    num_problems: int, *, num_steps: int, first_seed: int, dimensions: int = 16, **settings: Any
) -> MixtureEnvironment:
    """Problems of the kind ``rugged``."""
    generator = np.random.default_rng(first_seed)
    mixtures, rewards = [], []
    for _ in range(num_problems):
        means = generator.standard_normal((8, dimensions))
        waves = generator.standard_normal((3, dimensions))
        waves *= 4 / np.linalg.norm(waves, axis=1, keepdims=True)
        phases = generator.uniform(0, 2 * np.pi, 3)
        one, other = generator.choice(8, 2, replace=False)
        mixtures.append(Mixture(np.full(8, 1 / 8), means, np.full((8, dimensions), 0.15)))
        target = (means[one] + means[other]) / 2
        rewards.append(RuggedReward(target, waves, phases, curvature=0.15 * 16 / dimensions))
    return MixtureEnvironment(
        mixtures, rewards, num_steps=num_steps, first_seed=first_seed, **settings
    )


def subspace_environment(
    num_problems: int, *, num_steps: int, first_seed: int, dimensions: int = 32, **settings: Any
) -> MixtureEnvironment:
    """Problems of the kind ``subspace``."""
    generator = np.random.default_rng(first_seed)
    asked = min(8, dimensions // 2)
    rest = np.zeros(dimensions - asked)
    curvature = np.r_[np.full(asked, 16 / asked), rest]
    mixtures, rewards = [], []
    for _ in range(num_problems):
        means = generator.standard_normal((24, dimensions))
        target = np.r_[generator.standard_normal(asked), rest]
        mixtures.append(Mixture(np.full(24, 1 / 24), means, np.full((24, dimensions), 0.0625)))
        rewards.append(QuadraticReward(curvature, target))
    return MixtureEnvironment(
        mixtures, rewards, num_steps=num_steps, first_seed=first_seed, **settings
    )


_LAYOUT: Final = 4  # frequencies along each axis that the reward of a field looks at


def field_environment(
    num_problems: int, *, num_steps: int, first_seed: int, dimensions: int = 256, **settings: Any
) -> MixtureEnvironment:
    """Problems of the kind ``fields``, over squares of so many pixels.

    Raises:
        ConfigError: ``dimensions`` is not the square of a number of at least 4.
    """
    size = math.isqrt(dimensions)
    if size**2 != dimensions or size < _LAYOUT:
        raise ConfigError(
            f"dimensions is {dimensions}; fields are squares: give the square of a number of at "
            f"least {_LAYOUT}, such as 64 or 256."
        )
    generator = np.random.default_rng(first_seed)
    spectrum = field_spectrum(size)
    is_low = np.zeros((size, size), dtype=np.bool_)
    is_low[:_LAYOUT, :_LAYOUT] = True
    curvature = np.where(is_low.ravel(), 0.5 / spectrum, 0.0)
    mixtures, rewards = [], []
    for _ in range(num_problems):
        means = generator.standard_normal((12, dimensions)) * np.sqrt(0.7 * spectrum)
        target = generator.standard_normal(dimensions) * np.sqrt(spectrum)
        variances = np.tile(0.3 * spectrum, (12, 1))
        mixtures.append(Mixture(np.full(12, 1 / 12), means, variances))
        rewards.append(QuadraticReward(curvature, target))
    return MixtureEnvironment(
        mixtures, rewards, num_steps=num_steps, first_seed=first_seed, **settings
    )


def mixture_suite(dimensions: Sequence[int] = (16, 64)) -> dict[str, MakeWorld]:
    """What a benchmark on mixtures runs over.

    Args:
        dimensions: numbers of dimensions, at least 4 each; from 256 on ``fields`` is among them.

    Returns:
        Name of a world, such as ``"rugged-16"``, -> what makes its problems.

    Raises:
        ConfigError: a number that is too small, or none.
    """
    if not dimensions or min(dimensions) < 4:
        raise ConfigError(f"dimensions are {tuple(dimensions)}; give at least one, of at least 4.")
    worlds: dict[str, MakeWorld] = {}
    for number in dimensions:
        worlds[f"rugged-{number}"] = partial(rugged_environment, dimensions=number)
        worlds[f"subspace-{number}"] = partial(subspace_environment, dimensions=number)
        if number >= 256:
            worlds[f"fields-{number}"] = partial(field_environment, dimensions=number)
    return worlds


# ---- fields


def field_spectrum(size: int) -> Floats:
    """Variances of the coefficients of smooth fields, ``1 / (1 + frequency^2)``.

    Args:
        size: pixels along each axis.

    Returns:
        ``[size * size]``; their mean, which is that of the pixels' variances, is 1.
    """
    squares = np.arange(size) ** 2
    spectrum = 1 / (1.0 + squares[:, None] + squares[None, :])
    return np.asarray((spectrum / spectrum.mean()).ravel())


def dct_basis(size: int) -> Floats:
    """The orthonormal cosine basis (DCT-II).

    Args:
        size: numbers along one axis.

    Returns:
        ``[size, size]``; row ``k`` is the wave of frequency ``k``; the inverse is the transpose.
    """
    positions = (np.arange(size) + 0.5) / size
    basis = np.cos(np.pi * np.arange(size)[:, None] * positions) * np.sqrt(2 / size)
    basis[0] /= np.sqrt(2)
    return np.asarray(basis)


def field_of(coefficients: Floats) -> Floats:
    """Pixels ``[points, size, size]`` of fields, by coefficients ``[points, size * size]``.

    The basis is orthonormal, so noise of equal variance on pixels is so on coefficients: a search
    over the one is a search over the other.
    """
    size = math.isqrt(coefficients.shape[1])
    basis = dct_basis(size)
    return np.asarray(basis.T @ coefficients.reshape(-1, size, size) @ basis)


def coefficients_of(fields: Floats) -> Floats:
    """Reverse of :func:`field_of`."""
    basis = dct_basis(fields.shape[1])
    return np.asarray((basis @ fields @ basis.T).reshape(len(fields), -1))
