"""A world with exact answers: Gaussian mixtures, their denoiser in closed form, and known values.

A search can be tested and measured here in milliseconds, against truths that no network has: the
score, the denoised estimate, hard and soft values, the exact transition, and the mixture tilted by
a reward. numpy and float64 only. ``scripts/compare_on_mixtures.py`` prints how the strategies
compare at equal NFE on two kinds of mixtures.

Symbols, as in the diffusion literature: ``alpha`` (``a``) scales the signal and ``sigma`` (``s``)
the noise, ``x_t = a x_0 + s noise``; ``gamma_k`` are responsibilities of the components given
``x_t``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from mctd_diffusers.errors import CapacityError, ConfigError, NonFiniteRewardError, SearchError
from mctd_diffusers.search.environment import (
    FIRST_DRAW,
    Action,
    Counts,
    Handles,
    Ledger,
    Prices,
    Seeds,
    Values,
    check_unused,
)
from mctd_diffusers.search.settings import check_setting

Floats: TypeAlias = npt.NDArray[np.float64]

_ONE_VALUE = Counts(previews=1, reward_calls=1)
_ONE_REWARD = Counts(decodes=1, reward_calls=1)


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
        cumulative = np.cumsum(np.exp(self.log_weights), axis=1)
        picks = generator.random((points, count, 1)) * cumulative[:, None, -1:]
        component = (picks > cumulative[:, None, :]).sum(axis=2)
        noise = generator.standard_normal((points, count, dimensions))
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


class MixtureEnvironment:
    """A search's world over mixtures with exact denoisers: a (mixture, reward) a problem.

    Steps are DDIM steps with ``eta`` (Song et al., 2021, equation 16) over any stride; the last
    edge is deterministic. Noise comes from one Philox generator an edge, by its seed.

    With ``unconditional`` mixtures there is classifier-free guidance (Ho and Salimans, 2022): an
    edge of guidance ``g`` steps by ``u + g (c - u)``, where ``c`` and ``u`` are the denoised
    estimates under ``mixtures`` and under ``unconditional``. The call's own guidance is 1.

    Args:
        mixtures: the data of each problem.
        rewards: the reward of each problem.
        unconditional: the data of each problem without its prompt; ``None`` for no guidance.
        num_steps: steps of the cosine schedule.
        eta: what an action with ``eta=None`` means, 0 to 1.
        first_seed: seed of the initial noises that come with the problems.
        prices: the price list of the ledger.
    """

    def __init__(
        self,
        mixtures: Sequence[Mixture],
        rewards: Sequence[RewardOfPoints],
        *,
        num_steps: int,
        eta: float = 1.0,
        first_seed: int = 0,
        prices: Prices | None = None,
        unconditional: Sequence[Mixture] | None = None,
    ) -> None:
        if len(mixtures) != len(rewards) or not mixtures:
            raise ConfigError(
                f"{len(mixtures)} mixtures and {len(rewards)} rewards; give one of each a problem."
            )
        if unconditional is not None and len(unconditional) != len(mixtures):
            raise ConfigError(
                f"{len(mixtures)} mixtures and {len(unconditional)} unconditional ones; give one "
                "of each a problem."
            )
        self.num_steps = num_steps
        self.ledger = Ledger(prices=prices or Prices())
        self.free_guidance = unconditional is not None
        self.rows_per_nfe = 1 if unconditional is None else 2
        self.unconditional = None if unconditional is None else tuple(unconditional)
        self.mixtures = tuple(mixtures)
        self.rewards = tuple(rewards)
        self.alpha, self.sigma = cosine_schedule(num_steps)
        self.eta = eta
        self.first_seed = first_seed
        self._dimensions = mixtures[0].dimensions
        self._num_samples = 0
        self._x = np.empty((64, self._dimensions))
        self._mean = np.empty((64, self._dimensions))  # x is this plus std times noise
        self._noise = np.empty((64, self._dimensions))
        self._std = np.empty(64)
        self._denoised = np.empty((64, self._dimensions))
        self._step_index = np.empty(64, dtype=np.int64)
        self._problem = np.empty(64, dtype=np.int64)
        self._evaluated = np.zeros(64, dtype=np.bool_)
        self._released = np.zeros(64, dtype=np.bool_)
        self._reward = np.empty(64)

    def first_noise(self, problem: int) -> Floats:
        """``[dimensions]`` initial noise that comes with a problem."""
        seed = np.random.SeedSequence([self.first_seed, problem])
        return np.random.Generator(np.random.Philox(seed)).standard_normal(self._dimensions)

    def latents(self, handles: Handles) -> Floats:
        """``[batch, dimensions]`` the samples themselves, for tests and measurements."""
        return self._x[self._known(handles)].copy()

    def reset(self, problems: Handles, seeds: Seeds) -> Handles:
        """Draw initial noise for each problem; 0 NFE."""
        noise = np.stack(
            [
                self.first_noise(int(problem))
                if seed == FIRST_DRAW
                else _noise(int(seed), self._dimensions)
                for problem, seed in zip(problems, seeds, strict=True)
            ]
        )
        spread = np.hypot(self.alpha[0], self.sigma[0])  # 1 for variance-preserving schedules
        stds = np.full(len(problems), spread)
        start = np.zeros(len(problems), dtype=np.int64)
        return self._add(np.zeros_like(noise), noise, stds, start, problems)

    def denoise(self, handles: Handles) -> None:
        """Evaluate samples that are not yet evaluated; 1 NFE each."""
        rows = self._known(handles)
        rows = np.unique(rows[~self._evaluated[rows]])
        if (self._step_index[rows] >= self.num_steps).any():
            raise SearchError("finished samples cannot be denoised.", handles=rows.tolist())
        for problem, step_index, group in self._groups(rows):
            self._denoised[group] = self.mixtures[problem].denoised(
                self._x[group], self.alpha[step_index], self.sigma[step_index]
            )
        self._evaluated[rows] = True
        self.ledger.charge(self._problem[rows], Counts(nfe=1, rows=self.rows_per_nfe))
        self.ledger.charge_shared(Counts(calls=min(len(rows), 1)))

    def step(self, parents: Handles, actions: Sequence[Action], seeds: Seeds) -> Handles:
        """Make one lazy child for each (evaluated parent, action, seed)."""
        rows = self._known(parents)
        self._need_evaluated(rows)
        strides = np.array([action.stride for action in actions], dtype=np.int64)
        etas = np.array(
            [self.eta if action.eta is None else action.eta for action in actions], dtype=np.float64
        )
        now = self._step_index[rows]
        then = now + strides
        if (strides < 1).any() or (then > self.num_steps).any():
            raise SearchError(
                f"strides {strides.tolist()} from steps {now.tolist()} leave the schedule of "
                f"{self.num_steps} steps.",
                handles=parents.tolist(),
            )
        noise = np.stack([_noise(int(seed), self._dimensions) for seed in seeds])
        levels = {
            "alpha": self.alpha[now, None],
            "sigma": self.sigma[now, None],
            "alpha_next": self.alpha[then, None],
            "sigma_next": self.sigma[then, None],
            "eta": etas[:, None],
        }
        denoised = self._guided(rows, actions)
        mean = ddim_step(self._x[rows], denoised, np.zeros_like(noise), **levels)
        return self._add(mean, noise, ddim_std(**levels)[:, 0], then, self._problem[rows])

    def step_price(self, parents: Handles, actions: Sequence[Action]) -> Counts:
        """Nothing: a DDIM step is arithmetic."""
        del parents, actions
        return Counts()

    def value(self, handles: Handles) -> Values:
        """Reward of the denoised estimates of unfinished, evaluated samples."""
        rows = self._known(handles)
        self._need_evaluated(rows)
        self.ledger.charge(self._problem[rows], _ONE_VALUE)
        return self._score(rows, self._denoised)

    def reward(self, handles: Handles) -> Values:
        """Reward of finished samples; asked again it costs nothing."""
        rows = self._known(handles)
        if (self._step_index[rows] != self.num_steps).any():
            raise SearchError("only finished samples have a reward.", handles=handles.tolist())
        new = np.unique(rows[np.isnan(self._reward[rows])])
        self._reward[new] = self._score(new, self._x)
        self.ledger.charge(self._problem[new], _ONE_REWARD)
        return self._reward[rows]

    def renoise(self, handles: Handles, step_index: int, seeds: Seeds) -> Handles:
        """Noise the denoised estimates (of evaluated or finished samples) to ``step_index``."""
        rows = self._known(handles)
        finished = self._step_index[rows] == self.num_steps
        self._need_evaluated(rows[~finished])
        clean = np.where(finished[:, None], self._x[rows], self._denoised[rows])
        noise = np.stack([_noise(int(seed), self._dimensions) for seed in seeds])
        mean = self.alpha[step_index] * clean
        stds = np.full(len(rows), self.sigma[step_index])
        return self._add(mean, noise, stds, np.full(len(rows), step_index), self._problem[rows])

    def perturb(self, handles: Handles, strengths: Values, seeds: Seeds) -> Handles:
        """Variants of unfinished samples with fresh noise mixed into that of their last edges."""
        rows = self._known(handles)
        for strength in strengths:
            check_setting("strength", strength, 0, 1)
        finished = self._step_index[rows] == self.num_steps
        if finished.any():
            raise SearchError(
                "finished samples cannot be perturbed.", handles=rows[finished].tolist()
            )
        plain = rows[self._std[rows] == 0]
        if plain.size:
            raise SearchError(
                f"handles {plain.tolist()} came by edges without noise; step with eta above 0.",
                handles=plain.tolist(),
            )
        fresh = np.stack([_noise(int(seed), self._dimensions) for seed in seeds])
        share = strengths[:, None]
        noise = np.sqrt(1 - share**2) * self._noise[rows] + share * fresh
        stands = self._step_index[rows]
        return self._add(self._mean[rows], noise, self._std[rows], stands, self._problem[rows])

    def export(self, handles: Handles) -> Any:
        """Copy of the samples: ``[batch, ...]`` columns, with their evaluations and rewards."""
        rows = self._known(handles)
        return {name: getattr(self, f"_{name}")[rows].copy() for name in _SAVED}

    def restore(
        self, saved: Any, handles: Handles | None = None, *, num_handles: int = 0
    ) -> Handles:
        """Samples back from ``export``, under new handles or those given; see `Environment`."""
        columns = [saved[name] for name in ("mean", "noise", "std", "step_index", "problem")]
        if handles is None:
            handles = self._add(*columns)
        else:
            check_unused(handles, self._num_samples)
            size = max(num_handles, int(handles.max(initial=-1)) + 1)
            self._add(*(np.zeros((size, *column.shape[1:]), column.dtype) for column in columns))
            self._released[:size] = True
            self._released[handles] = False
            self._x[handles] = saved["mean"] + saved["std"][:, None] * saved["noise"]
        for name in _SAVED:
            getattr(self, f"_{name}")[handles] = saved[name]
        return handles

    def release(self, handles: Handles) -> None:
        """Forget samples; their handles are never used again."""
        self._released[self._known(handles)] = True

    def _guided(self, rows: npt.NDArray[np.int64], actions: Sequence[Action]) -> Floats:
        """Denoised estimates of samples, each under the guidance of its action."""
        denoised = self._denoised[rows]
        for place, (row, action) in enumerate(zip(rows, actions, strict=True)):
            if action.guidance is None:
                continue
            if self.unconditional is None:
                raise ConfigError(
                    f"Action.guidance is {action.guidance!r}, but there is nothing to scale: give "
                    "unconditional mixtures, or leave it None."
                )
            step_index = self._step_index[row]
            without = self.unconditional[self._problem[row]].denoised(
                self._x[row : row + 1], self.alpha[step_index], self.sigma[step_index]
            )[0]
            denoised[place] = without + action.guidance * (denoised[place] - without)
        return denoised

    def _add(
        self,
        mean: Floats,
        noise: Floats,
        std: Floats,
        step_index: npt.NDArray[np.int64],
        problem: Handles,
    ) -> Handles:
        first, last = self._num_samples, self._num_samples + len(mean)
        while last > len(self._x):
            for name in (
                "_x", "_mean", "_noise", "_std", "_denoised", "_step_index", "_problem",
                "_evaluated", "_released", "_reward",
            ):  # fmt: skip
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self._x[first:last] = mean + std[:, None] * noise
        self._mean[first:last], self._noise[first:last], self._std[first:last] = mean, noise, std
        self._step_index[first:last] = step_index
        self._problem[first:last] = problem
        self._reward[first:last] = np.nan
        self._num_samples = last
        return np.arange(first, last, dtype=np.int64)

    def _known(self, handles: Handles) -> npt.NDArray[np.int64]:
        rows = np.asarray(handles, dtype=np.int64)
        unknown = (rows < 0) | (rows >= self._num_samples)
        unknown[~unknown] = self._released[rows[~unknown]]
        if unknown.any():
            raise CapacityError(
                f"handles {rows[unknown].tolist()} do not exist (any more) among "
                f"{self._num_samples} samples.",
                handles=rows[unknown].tolist(),
            )
        return rows

    def _need_evaluated(self, rows: npt.NDArray[np.int64]) -> None:
        missing = rows[~self._evaluated[rows]]
        if missing.size:
            raise SearchError(
                f"handles {missing.tolist()} are not evaluated; denoise them first.",
                handles=missing.tolist(),
            )

    def _groups(self, rows: npt.NDArray[np.int64]) -> list[tuple[int, int, npt.NDArray[np.int64]]]:
        """Rows by problem and step index, the units of the closed-form denoiser."""
        key = self._problem[rows] * (self.num_steps + 1) + self._step_index[rows]
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=-1))
        return [
            (int(self._problem[group[0]]), int(self._step_index[group[0]]), group)
            for group in np.split(rows[order], starts[1:])
            if len(group)
        ]

    def _score(self, rows: npt.NDArray[np.int64], points: Floats) -> Values:
        scores = np.empty(len(rows))
        for problem in np.unique(self._problem[rows]):
            mine = self._problem[rows] == problem
            scores[mine] = self.rewards[problem](points[rows[mine]])
        bad = ~np.isfinite(scores)
        if bad.any():
            raise NonFiniteRewardError(
                f"reward is {scores[bad].tolist()} for handles {rows[bad].tolist()}; rewards "
                "must be finite.",
                handles=rows[bad].tolist(),
            )
        return scores


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
    """One DDIM step (Song et al., 2021, equations 12 and 16) on a variance-preserving schedule.

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
    share = np.sqrt(np.maximum(1 - (alpha / alpha_next) ** 2, 0))
    return np.asarray(eta * sigma_next / sigma * share)


_SAVED: Final = (
    "mean", "noise", "std", "step_index", "problem", "evaluated", "denoised", "reward"
)  # fmt: skip


def _noise(seed: int, dimensions: int) -> Floats:
    return np.random.Generator(np.random.Philox(seed)).standard_normal(dimensions)


def _logsumexp(x: Floats) -> Floats:
    """Log of the sum of exponentials over the last axis."""
    top = x.max(axis=-1, keepdims=True)
    return np.asarray(np.log(np.exp(x - top).sum(axis=-1)) + top[..., 0])


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


def rugged_environment(num_problems: int, *, num_steps: int, first_seed: int) -> MixtureEnvironment:
    """16 dimensions, 8 Gaussians; the reward peaks between two of them and has three ripples."""
    generator = np.random.default_rng(first_seed)
    mixtures, rewards = [], []
    for _ in range(num_problems):
        means = generator.standard_normal((8, 16))
        waves = generator.standard_normal((3, 16))
        waves *= 4 / np.linalg.norm(waves, axis=1, keepdims=True)
        phases = generator.uniform(0, 2 * np.pi, 3)
        one, other = generator.choice(8, 2, replace=False)
        mixtures.append(Mixture(np.full(8, 1 / 8), means, np.full((8, 16), 0.15)))
        rewards.append(RuggedReward((means[one] + means[other]) / 2, waves, phases))
    return MixtureEnvironment(mixtures, rewards, num_steps=num_steps, first_seed=first_seed)


def subspace_environment(
    num_problems: int, *, num_steps: int, first_seed: int
) -> MixtureEnvironment:
    """32 dimensions, 24 Gaussians; the reward is minus the squared distance in 8 of them."""
    generator = np.random.default_rng(first_seed)
    curvature = np.r_[np.full(8, 2.0), np.zeros(24)]
    mixtures, rewards = [], []
    for _ in range(num_problems):
        means = generator.standard_normal((24, 32))
        target = np.r_[generator.standard_normal(8), np.zeros(24)]
        mixtures.append(Mixture(np.full(24, 1 / 24), means, np.full((24, 32), 0.0625)))
        rewards.append(QuadraticReward(curvature, target))
    return MixtureEnvironment(mixtures, rewards, num_steps=num_steps, first_seed=first_seed)
