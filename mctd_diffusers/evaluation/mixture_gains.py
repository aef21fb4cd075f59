"""What jumps tell on mixtures, where the denoiser, values and transitions are exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np

from mctd_diffusers.evaluation.ground_truth import (
    Floats,
    Mixture,
    Posterior,
    RewardOfPoints,
    ddim_step,
)
from mctd_diffusers.search.environment import Gains

_DRAWS: Final = 256
_SEED: Final = 0


@runtime_checkable
class HardlyValued(RewardOfPoints, Protocol):
    """A reward whose hard value is known: what it is expected to be of the finished sample."""

    def hard_value(self, posterior: Posterior) -> Floats:
        """``[points]`` expected reward of ``x_0``."""
        ...


def measure_gains(
    mixture: Mixture,
    reward: HardlyValued,
    x: Floats,
    *,
    alpha: Floats,
    sigma: Floats,
    strides: Sequence[int],
) -> Gains:
    """Make every jump, and the fine steps that it replaces, and value what comes of them.

    Truncation errors and similarity are those of deterministic DDIM steps. Mean gain and variance
    are those of the hard value under the exact law of the transition, by draws that are the same
    for all points and jumps: a hard value is a martingale, so its mean gain is 0 but for the error
    of :data:`_DRAWS` draws.

    Args:
        mixture: the data.
        reward: of ``x_0``.
        x: ``[points, dimensions]`` samples at one noise level.
        alpha: ``[left + 1]`` signal scales from that level to the end of the schedule.
        sigma: likewise the noise scales; the last is 0.
        strides: schedule steps of each jump.

    Returns:
        Each ``[points, strides]``; NaN where a stride is above ``left``.
    """
    left = len(alpha) - 1
    path = _fine_path(mixture, x, alpha, sigma)
    value = reward.hard_value(mixture.posterior(x, alpha[0], sigma[0]))
    gains = Gains(*(np.full((len(x), len(strides)), np.nan) for _ in Gains._fields))
    for column, stride in enumerate(strides):
        if stride > left:
            continue
        ends = [0, stride]
        jumped = _fine_path(mixture, x, alpha[ends], sigma[ends])[-1]
        arrived = _estimate(mixture, jumped, alpha[stride], sigma[stride])
        scale = np.sqrt(alpha[stride] ** 2 + sigma[stride] ** 2)  # to variance-preserving units
        off = (jumped - path[stride]) / scale
        values = _values_after(mixture, reward, x, alpha[ends], sigma[ends])
        gains.mean_gain[:, column] = values.mean(axis=1) - value
        with np.errstate(divide="ignore"):  # one step is its own fine path
            error = np.log(np.sqrt((off**2).mean(axis=1)))
            gains.log_variance[:, column] = np.log(values.var(axis=1, ddof=1))
        gains.log_truncation_error[:, column] = error
        gains.final_similarity[:, column] = _cosine(arrived, path[-1])
    return gains


def _fine_path(mixture: Mixture, x: Floats, alpha: Floats, sigma: Floats) -> list[Floats]:
    """Samples at every level of the deterministic path, from ``x`` on."""
    path = [x]
    for now in range(len(alpha) - 1):
        path.append(
            ddim_step(
                path[-1],
                mixture.denoised(path[-1], alpha[now], sigma[now]),
                np.zeros_like(x),
                alpha=alpha[now, None],
                sigma=sigma[now, None],
                alpha_next=alpha[now + 1, None],
                sigma_next=sigma[now + 1, None],
                eta=np.zeros(1),
            )
        )
    return path


def _estimate(mixture: Mixture, x: Floats, alpha: float, sigma: float) -> Floats:
    """The denoised estimates; finished samples are their own."""
    return mixture.denoised(x, alpha, sigma) if sigma else x


def _values_after(
    mixture: Mixture, reward: HardlyValued, x: Floats, alpha: Floats, sigma: Floats
) -> Floats:
    """``[points, draws]`` hard values after exact transitions between two levels."""
    chance = np.random.default_rng(_SEED)
    uniform = np.tile(chance.random(_DRAWS), (len(x), 1))
    noise = np.tile(chance.standard_normal((_DRAWS, mixture.dimensions)), (len(x), 1, 1))
    law = mixture.transition(x, alpha[0], sigma[0], alpha[1], sigma[1])
    drawn = law.place(uniform, noise).reshape(-1, mixture.dimensions)
    if sigma[1]:
        values = reward.hard_value(mixture.posterior(drawn, alpha[1], sigma[1]))
    else:
        values = reward(drawn)
    return values.reshape(len(x), _DRAWS)


def _cosine(one: Floats, other: Floats) -> Floats:
    """``[points]`` cosines between rows."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray((one * other).sum(axis=1) / norms)
