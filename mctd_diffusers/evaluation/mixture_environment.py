"""A search's world over mixtures with exact denoisers: milliseconds, and truths to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mctd_diffusers.denoising.fusion import VERDICTS, Fused, Particles, fuse
from mctd_diffusers.errors import (
    CapacityError,
    ConfigError,
    NonFiniteRewardError,
    ScheduleError,
    SearchError,
)
from mctd_diffusers.evaluation.ground_truth import (
    SCHEDULES,
    Floats,
    Mixture,
    RewardOfPoints,
    ScheduleName,
    ddim_std,
    ddim_step,
)
from mctd_diffusers.evaluation.mixture_gains import HardlyValued, measure_gains
from mctd_diffusers.search.environment import (
    FIRST_DRAW,
    REJECTED,
    Action,
    Counts,
    Fusions,
    Gains,
    Handles,
    Ledger,
    Prices,
    Seeds,
    Values,
    check_one_level,
    check_unused,
)
from mctd_diffusers.search.settings import check_setting, is_number

_ONE_VALUE: Final = Counts(previews=1, reward_calls=1)
_ONE_REWARD: Final = Counts(decodes=1, reward_calls=1)
_SAVED: Final = (
    "mean", "noise", "std", "step_index", "problem", "evaluated", "denoised", "reward", "before"
)  # fmt: skip


class MixtureEnvironment:
    """A search's world over mixtures with exact denoisers: a (mixture, reward) a problem.

    Steps are DDIM steps with ``eta`` (Song et al., 2021, equation 16) over any stride; the last
    edge is deterministic. Noise comes from one Philox generator an edge, by its seed.

    With ``kernel="exact"`` every edge, the last one too, is a draw from the exact law of ``x_s``
    given ``x_t``, and initial noise from that of the noisiest point. So plain samples of any stride
    are samples of the mixture, and soft values obey the soft Bellman equation: an estimator that is
    right must reproduce the closed forms of ``ground_truth``, not those of a sampler.

    With ``unconditional`` mixtures there is classifier-free guidance (Ho and Salimans, 2022): an
    edge of guidance ``g`` steps by ``u + g (c - u)``, where ``c`` and ``u`` are the denoised
    estimates under ``mixtures`` and under ``unconditional``. The call's own guidance is 1.

    Args:
        mixtures: the data of each problem.
        rewards: the reward of each problem.
        unconditional: the data of each problem without its prompt; ``None`` for no guidance.
        sample_shape: axes of a sample for fusions, channels first; by default numbers of one
            channel.
        num_steps: steps of the schedule.
        schedule: path from noise to data, a name in ``ground_truth.SCHEDULES``.
        kernel: ``"ddim"``, or ``"exact"``, which knows neither guidance nor an ``eta`` below 1.
        eta: what an action with ``eta=None`` means, 0 to 1.
        first_seed: seed of the initial noises that come with the problems.
        prices: the price list of the ledger.

    Raises:
        ConfigError: there is not one of each a problem, dimensions differ, a setting is outside its
            range, or guidance and the exact kernel are both asked for.
    """

    def __init__(
        self,
        mixtures: Sequence[Mixture],
        rewards: Sequence[RewardOfPoints],
        *,
        num_steps: int,
        schedule: ScheduleName = "vp",
        kernel: Literal["ddim", "exact"] = "ddim",
        eta: float = 1.0,
        first_seed: int = 0,
        prices: Prices | None = None,
        unconditional: Sequence[Mixture] | None = None,
        sample_shape: tuple[int, ...] | None = None,
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
        dimensions = {mixture.dimensions for mixture in (*mixtures, *(unconditional or ()))}
        if len(dimensions) > 1:
            raise ConfigError(
                f"mixtures have {sorted(dimensions)} dimensions; give one number of them to all."
            )
        if schedule not in SCHEDULES or kernel not in ("ddim", "exact"):
            raise ConfigError(
                f"schedule is {schedule!r} and kernel {kernel!r}; give one of "
                f"{', '.join(SCHEDULES)}, and ddim or exact."
            )
        if kernel == "exact" and (unconditional is not None or eta != 1):
            raise ConfigError(
                f"kernel is 'exact' with eta {eta!r} and "
                f"{'no' if unconditional is None else 'given'} unconditional mixtures; it knows "
                "neither guidance nor another eta than 1."
            )
        shape = sample_shape or (mixtures[0].dimensions,)
        if math.prod(shape) != mixtures[0].dimensions:
            raise ConfigError(
                f"sample_shape is {shape}, and mixtures have {mixtures[0].dimensions} dimensions; "
                "give axes whose product is that."
            )
        check_setting("num_steps", num_steps, 1, whole=True)
        check_setting("eta", eta, 0, 1)
        self.num_steps = num_steps
        self.ledger = Ledger(prices=prices or Prices())
        self.guidance_scale = None if unconditional is None else 1.0
        self.rows_per_nfe = 1 if unconditional is None else 2
        self.unconditional = None if unconditional is None else tuple(unconditional)
        self.mixtures = tuple(mixtures)
        self.rewards = tuple(rewards)
        self.alpha, self.sigma = SCHEDULES[schedule](num_steps)
        self.kernel = kernel
        self.eta = eta
        self.first_seed = first_seed
        self._dimensions = mixtures[0].dimensions
        self._shape = shape
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
        self._before = np.empty((64, self._dimensions))  # the estimate that a sample came from

    def first_noise(self, problem: int) -> Floats:
        """``[dimensions]`` initial noise that comes with a problem."""
        return self._chance(problem, FIRST_DRAW).standard_normal(self._dimensions)

    def latents(self, handles: Handles) -> Floats:
        """``[batch, dimensions]`` the samples themselves, for tests and measurements."""
        return self._x[self._known(handles)].copy()

    def reset(self, problems: Handles, seeds: Seeds) -> Handles:
        """Draw initial noise for each problem; 0 NFE."""
        noise = np.empty((len(problems), self._dimensions))
        mean = np.zeros_like(noise)
        # Noise of the spread that data of variance 1 have at that level.
        std = np.hypot(self.alpha[0], self.sigma[0])
        if self.kernel == "exact":
            std = self.sigma[0]
        for place, (problem, seed) in enumerate(zip(problems, seeds, strict=True)):
            chance = self._chance(int(problem), int(seed))
            noise[place] = chance.standard_normal(self._dimensions)
            if self.kernel == "exact":
                mean[place] = self.alpha[0] * self.mixtures[problem].sample(chance, 1)[0]
        start = np.zeros(len(problems), dtype=np.int64)
        return self._add(mean, noise, np.full(len(problems), std), start, problems)

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
        for given in set(etas.tolist()):
            check_setting("Action.eta", given, 0, 1)
        if self.kernel == "exact":
            return self._step_exactly(rows, then, actions, seeds)
        noise = self._noises(seeds)
        levels = {
            "alpha": self.alpha[now, None],
            "sigma": self.sigma[now, None],
            "alpha_next": self.alpha[then, None],
            "sigma_next": self.sigma[then, None],
            "eta": etas[:, None],
        }
        denoised = self._guided(rows, [action.guidance for action in actions])
        mean = ddim_step(self._x[rows], denoised, np.zeros_like(noise), **levels)
        handles = self._add(mean, noise, ddim_std(**levels)[:, 0], then, self._problem[rows])
        self._before[handles] = self._denoised[rows]
        return handles

    def step_price(self, parents: Handles, actions: Sequence[Action]) -> Counts:
        """Nothing: a DDIM step is arithmetic."""
        del parents, actions
        return Counts()

    def value(self, handles: Handles, guidances: Sequence[float | None] | None = None) -> Values:
        """Reward of the denoised estimates of unfinished, evaluated samples."""
        rows = self._known(handles)
        self._need_evaluated(rows)
        self.ledger.charge(self._problem[rows], _ONE_VALUE)
        return self._score(rows, self._guided(rows, guidances))

    def reward(self, handles: Handles) -> Values:
        """Reward of finished samples; asked again it costs nothing."""
        rows = self._known(handles)
        if (self._step_index[rows] != self.num_steps).any():
            raise SearchError("only finished samples have a reward.", handles=handles.tolist())
        new = np.unique(rows[np.isnan(self._reward[rows])])
        self._reward[new] = self._score(new, self._x[new])
        self.ledger.charge(self._problem[new], _ONE_REWARD)
        return self._reward[rows]

    def renoise(self, handles: Handles, step_index: int, seeds: Seeds) -> Handles:
        """Noise the denoised estimates (of evaluated or finished samples) to ``step_index``."""
        rows = self._known(handles)
        if not is_number(step_index, 0, self.num_steps - 1, whole=True):
            raise ScheduleError(
                f"step index is {step_index!r}; give one of 0 to {self.num_steps - 1} to noise "
                f"samples to, in a schedule of {self.num_steps} steps."
            )
        finished = self._step_index[rows] == self.num_steps
        self._need_evaluated(rows[~finished])
        clean = np.where(finished[:, None], self._x[rows], self._denoised[rows])
        noise = self._noises(seeds)
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
                f"handles {plain.tolist()} came by edges without noise of their own; step with eta "
                "above 0, by the kernel 'ddim'.",
                handles=plain.tolist(),
            )
        fresh = self._noises(seeds)
        share = strengths[:, None]
        noise = np.sqrt(1 - share**2) * self._noise[rows] + share * fresh
        stands = self._step_index[rows]
        return self._add(self._mean[rows], noise, self._std[rows], stands, self._problem[rows])

    def fuse(
        self,
        groups: Sequence[Handles],
        weights: Sequence[Values],
        methods: Sequence[str],
        seeds: Seeds,
        guidances: Sequence[float | None] | None = None,
    ) -> Fusions:
        """Fuse each group of particles into a sample at their step index; 0 NFE."""
        fused: list[tuple[Fused, int]] = []
        for group, shares, method, seed, guidance in zip(
            groups, weights, methods, seeds, guidances or [None] * len(groups), strict=True
        ):
            rows = self._known(group)
            self._need_evaluated(rows)
            check_one_level(self._step_index[rows].tolist(), self._problem[rows].tolist(), group)
            step_index = int(self._step_index[rows[0]])
            particles = Particles(
                latents=self._shaped(self._x[rows]),
                clean=self._shaped(self._guided(rows, [guidance] * len(rows))),
                signal=float(self.alpha[step_index]),
                noise=float(self.sigma[step_index]),
                weights=torch.from_numpy(np.asarray(shares, dtype=np.float64)),
            )
            fused.append((fuse(method, particles, seed=int(seed)), int(rows[0])))
        handles = np.full(len(fused), REJECTED, dtype=np.int64)
        for place, (found, row) in enumerate(fused):
            if found.verdict == VERDICTS[0]:
                handles[place] = self._take_in(found, row)
        verdicts = [VERDICTS.index(found.verdict) for found, _ in fused]
        correlations = [found.correlation for found, _ in fused]
        return Fusions(handles, np.array(verdicts, dtype=np.int64), np.array(correlations))

    def _take_in(self, fused: Fused, particle: int) -> int:
        """Handle of a fused sample; no noise of it is kept apart."""
        made = fused.latents.numpy().reshape(1, -1)
        nothing = np.zeros_like(made)
        rows = np.array([particle])
        (handle,) = self._add(
            made, nothing, nothing[:, 0], self._step_index[rows], self._problem[rows]
        )
        self._before[handle] = fused.clean.numpy().ravel()
        return int(handle)

    def _shaped(self, rows: Floats) -> Tensor:
        """Samples with the axes that fusions see."""
        return torch.from_numpy(rows.reshape(-1, *self._shape).copy())

    def relative_change(self, handles: Handles) -> Values:
        """How far denoised estimates moved since those that the samples came from."""
        rows = self._known(handles)
        self._need_evaluated(rows)
        before = self._before[rows]
        moved = np.linalg.norm(self._denoised[rows] - before, axis=1)
        return moved / np.linalg.norm(before, axis=1)

    def predict_gain(self, handles: Handles, strides: Sequence[int]) -> Gains:
        """What jumps from unfinished, evaluated samples would tell, measured; 0 NFE.

        The call's own guidance holds, which is 1, so that of ``mixtures``.

        Raises:
            ConfigError: a reward has no ``hard_value``.
        """
        rows = self._known(handles)
        self._need_evaluated(rows)
        rows, places = np.unique(rows, return_inverse=True)
        gains = np.empty((len(Gains._fields), len(rows), len(strides)))
        for problem, now, group in self._groups(rows):
            reward = self.rewards[problem]
            if not isinstance(reward, HardlyValued):
                raise ConfigError(
                    f"the reward of problem {problem} has no hard_value, by which what jumps "
                    "resolve is measured; give it one, or use stride_policy='budget'."
                )
            gains[:, np.searchsorted(rows, group)] = measure_gains(
                self.mixtures[problem],
                reward,
                self._x[group],
                alpha=self.alpha[now:],
                sigma=self.sigma[now:],
                strides=strides,
            )
        return Gains(*gains[:, places])

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

    def _step_exactly(
        self,
        rows: npt.NDArray[np.int64],
        then: npt.NDArray[np.int64],
        actions: Sequence[Action],
        seeds: Seeds,
    ) -> Handles:
        """Children by the exact transition; their noise is not kept apart from their means."""
        for action in actions:
            if action.eta not in (None, 1) or action.guidance is not None:
                raise ConfigError(
                    f"Action has eta {action.eta!r} and guidance {action.guidance!r}; the exact "
                    "kernel knows eta 1 and no guidance: leave both None."
                )
        made = np.empty((len(rows), self._dimensions))
        chances = [np.random.Generator(np.random.Philox(int(seed))) for seed in seeds]
        uniform = np.array([chance.random() for chance in chances])
        noise = np.stack([chance.standard_normal(self._dimensions) for chance in chances])
        key = self._step_index[rows] * (self.num_steps + 1) + then
        for problem, value in sorted(
            set(zip(self._problem[rows].tolist(), key.tolist(), strict=True))
        ):
            group = np.flatnonzero((self._problem[rows] == problem) & (key == value))
            now, later = divmod(value, self.num_steps + 1)
            law = self.mixtures[problem].transition(
                self._x[rows[group]],
                self.alpha[now],
                self.sigma[now],
                self.alpha[later],
                self.sigma[later],
            )
            made[group] = law.place(uniform[group, None], noise[group, None])[:, 0]
        nothing = np.zeros_like(made)
        return self._add(made, nothing, nothing[:, 0], then, self._problem[rows])

    def _chance(self, problem: int, seed: int) -> np.random.Generator:
        """What decides an initial noise."""
        if seed == FIRST_DRAW:
            come = np.random.SeedSequence([self.first_seed, problem])
            return np.random.Generator(np.random.Philox(come))
        return np.random.Generator(np.random.Philox(seed))

    def _noises(self, seeds: Seeds) -> Floats:
        """``[batch, dimensions]`` standard normal, each by its own seed."""
        generators = [np.random.Generator(np.random.Philox(int(seed))) for seed in seeds]
        return np.stack([generator.standard_normal(self._dimensions) for generator in generators])

    def _guided(
        self, rows: npt.NDArray[np.int64], guidances: Sequence[float | None] | None
    ) -> Floats:
        """Denoised estimates of samples, each under its guidance."""
        denoised = self._denoised[rows]
        for place, (row, guidance) in enumerate(
            zip(rows, guidances or [None] * len(rows), strict=True)
        ):
            if guidance is None:
                continue
            if self.unconditional is None:
                raise ConfigError(
                    f"guidance of a move is {guidance!r}, but there is nothing to scale: give "
                    "unconditional mixtures, or leave it None."
                )
            step_index = self._step_index[row]
            without = self.unconditional[self._problem[row]].denoised(
                self._x[row : row + 1], self.alpha[step_index], self.sigma[step_index]
            )[0]
            denoised[place] = without + guidance * (denoised[place] - without)
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
                "_evaluated", "_released", "_reward", "_before",
            ):  # fmt: skip
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self._x[first:last] = mean + std[:, None] * noise
        self._mean[first:last], self._noise[first:last], self._std[first:last] = mean, noise, std
        self._step_index[first:last] = step_index
        self._problem[first:last] = problem
        self._reward[first:last] = np.nan
        self._before[first:last] = np.nan
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
            scores[mine] = self.rewards[problem](points[mine])
        bad = ~np.isfinite(scores)
        if bad.any():
            raise NonFiniteRewardError(
                f"reward is {scores[bad].tolist()} for handles {rows[bad].tolist()}; rewards "
                "must be finite.",
                handles=rows[bad].tolist(),
            )
        return scores
