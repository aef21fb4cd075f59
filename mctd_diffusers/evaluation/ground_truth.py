"""Exact answers: Gaussian mixtures, their denoiser in closed form, and known values of rewards.

Truths that no network has: the score, the denoised estimate, hard and soft values, the exact
transition, and the mixture tilted by a reward, for any path ``x_t = alpha x_0 + sigma noise``:
variance preserving, variance exploding (EDM) or flow. numpy and float64 only. A search runs on them
in ``mixture_environment``; ``mixture_worlds`` has the problems that strategies are compared on.

Symbols, as in the diffusion literature: ``alpha`` (``a``) scales the signal and ``sigma`` (``s``)
the noise; ``gamma_k`` are responsibilities of the components given ``x_t``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from mctd_diffusers.errors import ConfigError

Floats: TypeAlias = npt.NDArray[np.float64]


class Posterior(NamedTuple):
    """A mixture for each of several points.

    Attributes:
        log_weights: ``[points, components]``, normalised.
        means: ``[points, components, dimensions]``.
        variances: ``[components, dimensions]``.
    """

    log_weights: Floats
    means: Floats
    variances: Floats

    def mean(self) -> Floats:
        """``[points, dimensions]`` overall means."""
        return np.einsum("nk,nkd->nd", np.exp(self.log_weights), self.means)

    def sample(self, generator: np.random.Generator, count: int) -> Floats:
        """``[points, count, dimensions]`` independent samples of each mixture."""
        points, _, dimensions = self.means.shape
        uniform = generator.random((points, count))
        return self.place(uniform, generator.standard_normal((points, count, dimensions)))

    def place(self, uniform: Floats, noise: Floats) -> Floats:
        """Samples as numbers decide: which component, and where in it.

        Args:
            uniform: ``[points, count]`` from 0 to 1.
            noise: ``[points, count, dimensions]`` standard normal.

        Returns:
            ``[points, count, dimensions]`` samples of each mixture.
        """
        cumulative = np.cumsum(np.exp(self.log_weights), axis=1)
        picks = uniform[:, :, None] * cumulative[:, None, -1:]
        component = (picks > cumulative[:, None, :]).sum(axis=2)
        means = np.take_along_axis(self.means, component[:, :, None], axis=1)
        return means + np.sqrt(self.variances[component]) * noise


@dataclass(frozen=True)
class Mixture:
    """Mixture of Gaussians with diagonal covariances.

    Attributes:
        weights: ``[components]``, at least 0, sum to 1.
        means: ``[components, dimensions]``.
        variances: ``[components, dimensions]``, above 0.

    Raises:
        ConfigError: shapes that do not fit, or numbers outside these ranges.
    """

    weights: Floats
    means: Floats
    variances: Floats

    def __post_init__(self) -> None:
        if self.means.shape != self.variances.shape or self.weights.shape != self.means.shape[:1]:
            raise ConfigError(
                f"mixture has weights {self.weights.shape}, means {self.means.shape} and variances "
                f"{self.variances.shape}; give [K], [K, d] and [K, d]."
            )
        is_law = (self.weights >= 0).all() and np.isclose(self.weights.sum(), 1)
        if not is_law or not (self.variances > 0).all():
            raise ConfigError(
                "mixture weights must be at least 0 and sum to 1, and variances be above 0."
            )

    @property
    def dimensions(self) -> int:
        """Length of a sample."""
        return self.means.shape[1]

    @property
    def log_weights(self) -> Floats:
        """``[components]``; ``-inf`` for a component that a strong tilt left without weight."""
        with np.errstate(divide="ignore"):
            return np.log(self.weights)

    def noised(self, alpha: float, sigma: float) -> Mixture:
        """Law of ``alpha x_0 + sigma noise``."""
        return Mixture(self.weights, alpha * self.means, alpha**2 * self.variances + sigma**2)

    def log_joint(self, x: Floats) -> Floats:
        """``[points, components]`` log of weight times density of each component."""
        precision = 1 / self.variances
        # Expanded squares: three matrix products instead of a [points, components, d] array.
        squares = x**2 @ precision.T - 2 * x @ (self.means * precision).T
        squares = squares + (self.means**2 * precision).sum(axis=1)
        constant = np.log(2 * np.pi * self.variances).sum(axis=1)
        return np.asarray(self.log_weights - 0.5 * (squares + constant))

    def log_density(self, x: Floats) -> Floats:
        """``[points]`` log density."""
        return _logsumexp(self.log_joint(x))

    def score(self, x: Floats) -> Floats:
        """``[points, dimensions]`` gradient of the log density."""
        joint = self.log_joint(x)
        gamma = np.exp(joint - _logsumexp(joint)[:, None])
        return np.asarray(
            gamma @ (self.means / self.variances) - x * (gamma @ (1 / self.variances))
        )

    def sample(self, generator: np.random.Generator, count: int) -> Floats:
        """``[count, dimensions]`` independent samples."""
        component = generator.choice(len(self.weights), size=count, p=self.weights)
        noise = generator.standard_normal((count, self.dimensions))
        return self.means[component] + np.sqrt(self.variances[component]) * noise

    def posterior(self, x: Floats, alpha: float, sigma: float) -> Posterior:
        """Law of ``x_0`` given ``x_t = x``: a mixture for each point."""
        noised = self.noised(alpha, sigma)
        joint = noised.log_joint(x)
        gain = alpha * self.variances / noised.variances
        means = self.means + gain * (x[:, None, :] - noised.means)
        variances = self.variances * sigma**2 / noised.variances
        return Posterior(joint - _logsumexp(joint)[:, None], means, variances)

    def denoised(self, x: Floats, alpha: float, sigma: float) -> Floats:
        """``[points, dimensions]`` mean of ``x_0`` given ``x_t = x``, the exact denoiser."""
        noised = self.noised(alpha, sigma)
        joint = noised.log_joint(x)
        gamma = np.exp(joint - _logsumexp(joint)[:, None])
        gain = alpha * self.variances / noised.variances
        return np.asarray(gamma @ (self.means - gain * noised.means) + x * (gamma @ gain))

    def transition(
        self, x: Floats, alpha: float, sigma: float, alpha_next: float, sigma_next: float
    ) -> Posterior:
        """Exact law of ``x_s`` given ``x_t = x``, for any less noisy ``s``; not the DDPM kernel."""
        posterior = self.posterior(x, alpha, sigma)
        ratio = alpha / alpha_next
        fresh = sigma**2 - ratio**2 * sigma_next**2
        from_x = ratio * sigma_next**2 / sigma**2
        from_clean = alpha_next * fresh / sigma**2
        means = from_x * x[:, None, :] + from_clean * posterior.means
        variances = sigma_next**2 * fresh / sigma**2 + from_clean**2 * posterior.variances
        return Posterior(posterior.log_weights, means, variances)


def standardised_log_likelihood(
    mixture: Mixture, x: Floats, *, num_samples: int = 4096, seed: int = 0
) -> Floats:
    """How typical points are of a mixture: ``(log p - E log p) / sd log p``.

    0 is typical; below -3 a search has left the data manifold, however high its reward. Far above 0
    points are too smooth: nearer to the modes than samples are.

    Args:
        mixture: the law of the data.
        x: ``[points, dimensions]``.
        num_samples: of the mixture, from which mean and deviation are taken.
        seed: of these samples.

    Returns:
        ``[points]``, in standard deviations.
    """
    typical = mixture.log_density(mixture.sample(np.random.default_rng(seed), num_samples))
    return np.asarray((mixture.log_density(x) - typical.mean()) / typical.std())


@runtime_checkable
class RewardOfPoints(Protocol):
    """Scores points; higher is better."""

    def __call__(self, x: Floats) -> Floats:
        """``[points]`` rewards of ``[points, dimensions]``."""
        ...


@dataclass(frozen=True)
class LinearReward:
    """``direction . x + offset``; its hard value is exactly the reward of ``denoised``."""

    direction: Floats
    offset: float = 0.0

    def __call__(self, x: Floats) -> Floats:
        """``[points]`` rewards."""
        return np.asarray(x @ self.direction + self.offset)

    def hard_value(self, posterior: Posterior) -> Floats:
        """``[points]`` expected reward of ``x_0``."""
        return self(posterior.mean())

    def soft_value(self, posterior: Posterior, temperature: float) -> Floats:
        """``[points]`` ``temperature * log E exp(reward / temperature)``."""
        spread = posterior.variances @ self.direction**2 / (2 * temperature**2)
        exponent = posterior.log_weights + self(posterior.means) / temperature + spread
        return temperature * _logsumexp(exponent)

    def tilted(self, mixture: Mixture, temperature: float) -> tuple[Mixture, float]:
        """Mixture proportional to ``p exp(reward / temperature)``; the log of its normaliser."""
        spread = mixture.variances @ self.direction**2 / (2 * temperature**2)
        log_weights = mixture.log_weights + self(mixture.means) / temperature + spread
        log_normaliser = _logsumexp(log_weights[None])[0]
        means = mixture.means + mixture.variances * self.direction / temperature
        weights = np.exp(log_weights - log_normaliser)
        return Mixture(weights, means, mixture.variances), float(log_normaliser)


@dataclass(frozen=True)
class QuadraticReward:
    """``-1/2 sum_i curvature_i (x_i - target_i)^2``; curvatures at least 0."""

    curvature: Floats
    target: Floats

    def __call__(self, x: Floats) -> Floats:
        """``[points]`` rewards."""
        return np.asarray(-0.5 * (x - self.target) ** 2 @ self.curvature)

    def hard_value(self, posterior: Posterior) -> Floats:
        """``[points]`` expected reward of ``x_0``."""
        expected = self(posterior.means) - 0.5 * posterior.variances @ self.curvature
        return np.asarray((np.exp(posterior.log_weights) * expected).sum(axis=1))

    def soft_value(self, posterior: Posterior, temperature: float) -> Floats:
        """``[points]`` ``temperature * log E exp(reward / temperature)``."""
        shrink = 1 + posterior.variances * self.curvature / temperature
        squares = (posterior.means - self.target) ** 2 * (self.curvature / temperature / shrink)
        exponent = posterior.log_weights - 0.5 * (squares + np.log(shrink)).sum(axis=2)
        return temperature * _logsumexp(exponent)

    def tilted(self, mixture: Mixture, temperature: float) -> tuple[Mixture, float]:
        """Mixture proportional to ``p exp(reward / temperature)``; the log of its normaliser."""
        shrink = 1 + mixture.variances * self.curvature / temperature
        squares = (mixture.means - self.target) ** 2 * (self.curvature / temperature / shrink)
        log_weights = mixture.log_weights - 0.5 * (squares + np.log(shrink)).sum(axis=1)
        log_normaliser = _logsumexp(log_weights[None])[0]
        variances = mixture.variances / shrink
        means = (
            mixture.means + mixture.variances * self.curvature * self.target / temperature
        ) / shrink
        weights = np.exp(log_weights - log_normaliser)
        return Mixture(weights, means, variances), float(log_normaliser)


@dataclass(frozen=True)
class RuggedReward:
    """A hill with fine ripples: ``height sum sin(w.x + phase) - curvature |x - target|^2``.

    Attributes:
        target: ``[dimensions]``.
        waves: ``[ripples, dimensions]`` wave vectors.
        phases: ``[ripples]``.
        curvature: of the hill.
        height: of the ripples.
    """

    target: Floats
    waves: Floats
    phases: Floats
    curvature: float = 0.15
    height: float = 0.5

    def __call__(self, x: Floats) -> Floats:
        """``[points]`` rewards."""
        hill = ((x - self.target) ** 2).sum(axis=1)
        ripples = np.sin(x @ self.waves.T + self.phases).sum(axis=1)
        return np.asarray(self.height * ripples - self.curvature * hill)

    def hard_value(self, posterior: Posterior) -> Floats:
        """``[points]`` expected reward of ``x_0``; its soft value has no closed form."""
        squares = (posterior.means - self.target) ** 2 + posterior.variances
        damping = np.exp(-0.5 * posterior.variances @ (self.waves**2).T)
        ripples = (np.sin(posterior.means @ self.waves.T + self.phases) * damping).sum(axis=2)
        expected = self.height * ripples - self.curvature * squares.sum(axis=2)
        return np.asarray((np.exp(posterior.log_weights) * expected).sum(axis=1))


def cosine_schedule(num_steps: int, start: float = 0.98) -> tuple[Floats, Floats]:
    """``alpha`` and ``sigma`` of the cosine schedule (Nichol and Dhariwal, 2021).

    Args:
        num_steps: steps from the noisiest point to the data.
        start: time of the noisiest point, below 1 (where nothing but noise would be left).

    Returns:
        Two arrays ``[num_steps + 1]``; the last entries are 1 and 0.
    """
    angle = np.linspace(start, 0, num_steps + 1) * np.pi / 2
    alpha, sigma = np.cos(angle), np.sin(angle)
    alpha[-1], sigma[-1] = 1.0, 0.0
    return alpha, sigma


def karras_schedule(
    num_steps: int, *, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0
) -> tuple[Floats, Floats]:
    """Variance exploding: ``alpha`` 1, the noise levels of EDM (Karras et al., 2022, equation 5).

    Args:
        num_steps: steps from the noisiest point to the data.
        sigma_max: noise of the first point, in units of the data.
        sigma_min: noise of the last point before the data.
        rho: how much the levels crowd at little noise.

    Returns:
        Two arrays ``[num_steps + 1]``; the last entries are 1 and 0.
    """
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigma = np.append(np.linspace(*ends, num_steps) ** rho, 0.0)
    return np.ones(num_steps + 1), sigma


def flow_schedule(num_steps: int) -> tuple[Floats, Floats]:
    """The straight path from noise to data: ``alpha = 1 - t``, ``sigma = t`` (rectified flow).

    Args:
        num_steps: steps from pure noise to the data.

    Returns:
        Two arrays ``[num_steps + 1]``; the first entries are 0 and 1, the last 1 and 0.
    """
    sigma = np.linspace(1, 0, num_steps + 1)
    return 1 - sigma, sigma


ScheduleName: TypeAlias = Literal["vp", "edm", "flow"]

SCHEDULES: Final[dict[ScheduleName, Callable[[int], tuple[Floats, Floats]]]] = {
    "vp": cosine_schedule,
    "edm": karras_schedule,
    "flow": flow_schedule,
}
"""Name of a path -> its signal and noise scales for so many steps."""


def ddim_step(
    x: Floats,
    denoised: Floats,
    noise: Floats,
    *,
    alpha: Floats,
    sigma: Floats,
    alpha_next: Floats,
    sigma_next: Floats,
    eta: Floats,
) -> Floats:
    """One DDIM step (Song et al., 2021, equations 12 and 16), along any path.

    With ``eta`` 1 its noise is that of ``x_s`` given ``x_t`` and the clean sample, for any scales
    of signal and noise; in the paper they preserve variance.

    Args:
        x: ``[batch, dimensions]`` samples at ``(alpha, sigma)``.
        denoised: estimates of their clean samples.
        noise: standard normal; the caller owns its seed.
        alpha: signal scale now, ``[batch, 1]``; likewise ``sigma`` (above 0), and both ``_next``.
        sigma: noise scale now.
        alpha_next: signal scale after the step.
        sigma_next: noise scale after the step.
        eta: share of fresh noise, 0 to 1.

    Returns:
        ``[batch, dimensions]`` samples at ``(alpha_next, sigma_next)``.
    """
    fresh = ddim_std(
        alpha=alpha, sigma=sigma, alpha_next=alpha_next, sigma_next=sigma_next, eta=eta
    )
    kept = np.sqrt(np.maximum(sigma_next**2 - fresh**2, 0))
    return np.asarray(alpha_next * denoised + kept * (x - alpha * denoised) / sigma + fresh * noise)


def ddim_std(
    *, alpha: Floats, sigma: Floats, alpha_next: Floats, sigma_next: Floats, eta: Floats
) -> Floats:
    """Standard deviation of the noise that :func:`ddim_step` injects; its arguments are those."""
    kept = alpha / alpha_next * sigma_next / sigma  # of the noise, if the step added none
    return np.asarray(eta * sigma_next * np.sqrt(np.maximum(1 - kept**2, 0)))


def _logsumexp(x: Floats) -> Floats:
    """Log of the sum of exponentials over the last axis."""
    top = x.max(axis=-1, keepdims=True)
    return np.asarray(np.log(np.exp(x - top).sum(axis=-1)) + top[..., 0])
