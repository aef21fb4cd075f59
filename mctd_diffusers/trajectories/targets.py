"""What an information gain evaluator is to predict of a jump, each by a formula of its own.

``x_t`` is a state, ``x_{t-k}`` what a jump of ``k`` steps makes of it, ``x0hat`` the denoised
estimate there, and ``V`` a calibrated value: an estimate of the final reward, in reward units.
numpy and float64 only.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.calibration import Calibration


def reward_rate(
    value: Float[np.ndarray, "*batch"],
    value_after: Float[np.ndarray, "*batch"],
    stride: Float[np.ndarray, "*batch"] | int,
) -> Float[np.ndarray, "*batch"]:
    """Return the change of the value for each step crossed, ``(V(x_{t-k}) - V(x_t)) / k``.

    Both values have to be calibrated (:class:`Calibration`): a value that is worth something else
    at each noise level gains by crossing levels alone. The rate of a perfect value has mean zero,
    whatever the stride (it is a martingale): so by itself it says nothing about where to look.

    Args:
        value: before the jump, in reward units.
        value_after: after it.
        stride: steps crossed, at least 1.

    >>> reward_rate(np.array([1.0]), np.array([3.0]), 4)
    array([0.5])
    """
    return np.asarray((value_after - value) / stride)


def gains_of_pairs(value: Float[np.ndarray, " states"]) -> Float[np.ndarray, "states states"]:
    """Return the gain of every jump along one trajectory, ``V(x_j) - V(x_i)`` at ``[i, j]``.

    They are free: no jump has to be made. NaN where ``j`` does not come after ``i``.

    Args:
        value: calibrated, of the states in the order of denoising; the last may be the reward.

    >>> gains_of_pairs(np.array([1.0, 3.0, 2.5]))
    array([[ nan,  2. ,  1.5],
           [ nan,  nan, -0.5],
           [ nan,  nan,  nan]])
    """
    gains = np.subtract.outer(value, value).T
    gains[np.tril_indices(len(value))] = np.nan
    return gains


def final_similarity(
    denoised: Float[np.ndarray, "*batch size"], final: Float[np.ndarray, "*batch size"]
) -> Float[np.ndarray, "*batch"]:
    """Return the cosine of the denoised estimate with the finished sample, from -1 to 1.

    How far a trajectory has settled; known only in hindsight. 1 at the end.

    Args:
        denoised: ``x0hat`` at a state, flattened, not all zero.
        final: the latents that its trajectory ends in, flattened, not all zero.

    Reference: Liao et al., "Step-level reward for free in RL-based T2I diffusion model fine-tuning"
    (2025, arXiv 2505.19196), the similarity of section 4.
    """
    first, second = _units(denoised), _units(final)
    return np.asarray(np.clip((first * second).sum(axis=-1), -1, 1))


def resolved_variance(values: Float[np.ndarray, "*batch siblings"]) -> Float[np.ndarray, "*batch"]:
    """Return ``Var(V(x_{t-k}) | x_t)``, estimated without bias from siblings.

    What a jump of ``k`` steps *resolves*: by the law of total variance it is
    ``Var(r | x_t) - E[Var(r | x_{t-k}) | x_t]`` of the final reward ``r``, if ``V`` is its
    conditional mean.

    Args:
        values: calibrated, of draws of one stochastic edge from one state, two at the least.

    Raises:
        ConfigError: there are fewer than two siblings.
    """
    if values.shape[-1] < 2:
        raise ConfigError(
            f"{values.shape[-1]} sibling: a variance needs two; log with siblings=2 or more"
        )
    return np.asarray(values.astype(np.float64).var(axis=-1, ddof=1))


def truncation_error(
    latents: Float[np.ndarray, "*batch size"], fine: Float[np.ndarray, "*batch size"]
) -> Float[np.ndarray, "*batch"]:
    """Return how far a jump leads off the path of fine steps: ``|x - x_fine| / sqrt(n)``.

    Args:
        latents: after one deterministic jump, flattened, in variance-preserving units.
        fine: after fine deterministic steps over the same stretch.
    """
    difference = np.asarray(latents, np.float64) - fine
    return np.asarray(np.sqrt((difference**2).mean(axis=-1)))


def variance_preserving(
    log_snr: Float[np.ndarray, "*batch"],
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]:
    """Return the scales of signal and noise, whose squares add up to 1, at log-SNRs.

    >>> variance_preserving(np.array([0.0]))[0] ** 2
    array([0.5])
    """
    return np.exp(-np.logaddexp(0, -log_snr) / 2), np.exp(-np.logaddexp(0, log_snr) / 2)


def jump_costs(
    latents: Float[np.ndarray, "trajectories levels size"],
    denoised: Float[np.ndarray, "trajectories states size"],
    log_snr: Float[np.ndarray, " levels"],
) -> Float[np.ndarray, "levels levels"]:
    """Return the mean latent error of one jump between any two levels of fine trajectories.

    A jump is the deterministic step ``alpha_j x0hat_i + sigma_j noise_i`` of a variance-preserving
    process (DDIM, Song et al., 2021, equation 12), compared with the latents at ``j``: the cost of
    Chen et al., "On the trajectory regularity of ODE-based diffusion sampling" (2024, arXiv
    2405.11326), section 4.1.

    Args:
        latents: of deterministic trajectories, at every level.
        denoised: likewise, at every level but the last.
        log_snr: of the levels, rising.

    Returns:
        At ``[i, j]`` the mean over trajectories of the rms error, in latent units; NaN where ``j``
        does not come after ``i``.
    """
    alpha, sigma = variance_preserving(log_snr)
    levels = len(log_snr)
    costs = np.full((levels, levels), np.nan)
    for i in range(levels - 1):
        noise = (latents[:, i] - alpha[i] * denoised[:, i]) / sigma[i]
        for j in range(i + 1, levels):
            arrived = alpha[j] * denoised[:, i] + sigma[j] * noise
            costs[i, j] = np.sqrt(((arrived - latents[:, j]) ** 2).mean(axis=-1)).mean()
    return costs


# --- calibration


def fit_calibration(
    value: Float[np.ndarray, " states"],
    log_snr: Float[np.ndarray, " states"],
    reward: Float[np.ndarray, " states"],
    *,
    num_knots: int = 12,
) -> Calibration:
    """Fit a calibration by least squares of the final reward on the value.

    Knots stand at quantiles of the log-SNR, so that about equally many states decide on each.

    Args:
        value: of unfinished states.
        log_snr: of these states.
        reward: that their trajectories ended in.
        num_knots: at most; fewer where there are fewer distinct noise levels.

    Raises:
        ConfigError: too few states, or values that are all alike, decide on a knot.
    """
    value, reward = value.astype(np.float64), reward.astype(np.float64)
    log_snr = log_snr.astype(np.float64)
    if len(value) == 0:
        raise ConfigError("there are no values to calibrate: give the states of some trajectories")
    shares = np.linspace(0, 1, min(num_knots, len(np.unique(log_snr))))
    knots = np.unique(np.quantile(log_snr, shares))
    hats = np.stack([np.interp(log_snr, knots, unit) for unit in np.eye(len(knots))], axis=1)
    centre = value.mean()
    design = np.concatenate([hats * (value - centre)[:, None], hats], axis=1)
    solution, _, rank, _ = np.linalg.lstsq(design, reward, rcond=None)
    if rank < design.shape[1]:
        raise ConfigError(
            f"{len(value)} values do not decide on {len(knots)} slopes and offsets: log more "
            "trajectories, or values that differ"
        )
    slope, offset = np.split(solution, 2)
    squares = (reward - design @ solution) ** 2
    deviation = np.sqrt((hats * squares[:, None]).sum(axis=0) / hats.sum(axis=0))
    curves = (knots, slope, offset - centre * slope, deviation)
    return Calibration(*(tuple(curve.tolist()) for curve in curves))


def _units(rows: Float[np.ndarray, "*batch size"]) -> Float[np.ndarray, "*batch size"]:
    """Rows brought to a length of one.

    Raises:
        ConfigError: one is all zero.
    """
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not norms.all():
        raise ConfigError("latents of a sample are all zero: they have no direction to compare")
    return np.asarray(rows / norms)
