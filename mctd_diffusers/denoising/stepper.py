"""Variable-stride steps of a stock diffusers scheduler, many samples at once.

A scheduler object remembers where it stands, so branches cannot share one. Here what a solver
remembers is a value, :class:`SolverState`, that travels with the sample; and a stride of ``k`` is a
step of the stock scheduler on a *view* of itself: a clone whose schedule is cut down to the points
this sample visits (visited + current + target + the rest). Samples with equal points are stepped by
one clone in one call, with one generator for each edge, so that an edge is the same whatever batch
it rode in. With stride 1 the view's arithmetic is the stock loop's, bit for bit.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Num, Shaped
from torch import Tensor

from mctd_diffusers.errors import ConfigError, ScheduleError, UnsupportedSchedulerError
from mctd_diffusers.search.environment import Action

SUPPORTED = (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
"""Scheduler classes whose strides are proven; subclasses are not."""

_MAX_VIEWS = 4096


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler whose steps cannot be branched and strided, by class and by setting.

    Raises:
        UnsupportedSchedulerError: the class is none of :data:`SUPPORTED` (a subclass may keep more
            state), or it is set up in a way whose strides are not proven.
    """
    name = type(scheduler).__name__
    if type(scheduler) not in SUPPORTED:
        names = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise UnsupportedSchedulerError(
            f"scheduler is a {name}, whose steps cannot be branched and strided yet; supported are "
            f"{names}. Make one from yours: `DDIMScheduler.from_config(pipe.scheduler.config)`."
        )
    for setting, given, allowed in _settings(scheduler):
        if given not in allowed:
            raise UnsupportedSchedulerError(
                f"{name} with {setting}={given!r} cannot be branched and strided yet; allowed are "
                f"{', '.join(map(repr, allowed))}. Make another from it: "
                f"`{name}.from_config(scheduler.config, {setting}={allowed[0]!r})`."
            )


def scheduler_from(kind: Any, config: Any) -> Any:
    """A scheduler of one class from the config of another.

    Latents are not clipped where the config says nothing of it: schedulers that clip by default
    are meant for pixels.

    Args:
        kind: class of diffusers.
        config: of any scheduler.
    """
    known = inspect.signature(kind).parameters
    silent = [name for name in ("clip_sample", "set_alpha_to_one") if name not in config]
    return kind.from_config(config, **{name: False for name in silent if name in known})


def _settings(scheduler: Any) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """Settings that are proven for some values only: ``(name, given, allowed)``."""
    config = scheduler.config
    predictions: tuple[Any, ...] = ("epsilon", "v_prediction", "sample")
    match scheduler:
        case DPMSolverMultistepScheduler():
            return [
                ("prediction_type", config.prediction_type, predictions),
                # The third order looks at how many steps are to come: a stride changes that.
                ("solver_order", config.solver_order, (2, 1)),
                ("algorithm_type", config.algorithm_type, ("dpmsolver++", "sde-dpmsolver++")),
                ("use_flow_sigmas", config.use_flow_sigmas, (False,)),
                ("variance_type", config.variance_type, (None,)),
            ]
        case EulerAncestralDiscreteScheduler():  # the stock step itself cannot do "sample"
            return [("prediction_type", config.prediction_type, predictions[:2])]
        case DDPMScheduler():
            variances = ("fixed_small", "fixed_small_log", "fixed_large")
            return [
                ("prediction_type", config.prediction_type, predictions),
                ("variance_type", scheduler.variance_type, variances),
            ]
        case EulerDiscreteScheduler():
            return [("prediction_type", config.prediction_type, (*predictions, "original_sample"))]
    return [("prediction_type", config.prediction_type, predictions)]


@dataclass(frozen=True, eq=False)
class SolverState:
    """What the next step of one sample needs beside its latents.

    Attributes:
        step_index: position in the schedule, 0 is noisiest; ``num_steps`` is finished.
        visited: grid key: the earlier points of the schedule that the solver still looks at, oldest
            first, as indices into the scheduler's own ``timesteps``.
        history: what the solver remembers of them (its converted model outputs), oldest first, each
            shaped like the sample; empty for first-order solvers and after a restart.
    """

    step_index: int
    visited: tuple[int, ...]
    history: tuple[Shaped[Tensor, "*sample"], ...]


@dataclass(frozen=True)
class _Split:
    """An edge in two: a step below the target's noise level, then noise up to it.

    Attributes:
        rescale: factor of the stepped sample, from the lower level's signal to the target's.
        shortening: length of the edge by that of the step, in log signal to noise. A multistep
            solver extrapolates along the step, but the estimate it extrapolates changes along the
            edge: without this it looks too far ahead (at a full share of noise twice as far, and
            Gaussian data of deviation 2 come out at 2.6 after 8 steps, with it at 1.98); with it,
            a full share is exactly the SDE DPM-Solver.
    """

    rescale: float | Tensor
    shortening: Tensor


@dataclass(frozen=True)
class _View:
    """A clone of the scheduler, cut down to the points of one edge, and how to step it.

    Attributes:
        scheduler: the clone; what it mutates in a step is set before each.
        position: the current point's index in the view.
        timestep: the current timestep, 0-d, as the stock loop passes it.
        eta: the ``eta`` argument of the step, for those that have it.
        draws: whether the scheduler draws noise of its own, so needs generators.
        noise_std: standard deviation of the noise in the sample after the edge.
        split: how noise is added after the step; ``None`` where it is not.
    """

    scheduler: Any
    position: int
    timestep: Tensor
    eta: float | None
    draws: bool
    noise_std: float | Tensor
    split: _Split | None = None


class Stepper:
    """Steps samples along a scheduler's schedule by any stride, each with its own noise.

    What ``Action.eta`` means:

    - ``None``: the stock step, with the stock meaning of ``eta`` (only DDIM has one).
    - a number, 0 to 1: that share of fresh noise, in every scheduler. DDIM takes it as its
      argument. Euler and the ODE DPM-Solver step to a lower noise level and noise up again (the
      ancestral split of k-diffusion; at 1 Euler is EulerAncestral). DDPM, EulerAncestral and the
      SDE DPM-Solver are themselves at 1; below that their deterministic companion (DDIM, Euler,
      the ODE DPM-Solver) steps with that share.

    Args:
        scheduler: a stock scheduler on which ``set_timesteps`` was called; copied, not changed.
        eta: the user's ``eta``, for edges that name none.
        begin_index: first point of the schedule in use (image to image starts in the middle).

    Attributes:
        num_steps: steps from the first point to the finished sample.
        timesteps: what the network is conditioned on at each step, in the scheduler's dtype, on the
            CPU.

    Raises:
        UnsupportedSchedulerError: see :func:`check_scheduler`.
        ScheduleError: ``set_timesteps`` was not called, or ``begin_index`` is past the schedule.
        ConfigError: ``eta`` is not between 0 and 1.
    """

    def __init__(self, scheduler: Any, *, eta: float = 0.0, begin_index: int = 0) -> None:
        check_scheduler(scheduler)
        _check_eta(eta, "eta")
        if scheduler.num_inference_steps is None and not getattr(
            scheduler, "custom_timesteps", False
        ):
            raise ScheduleError(
                f"the {type(scheduler).__name__} has no schedule yet; call "
                "`scheduler.set_timesteps(num_inference_steps)` first."
            )
        self._last = len(scheduler.timesteps)
        if not 0 <= begin_index < self._last:
            raise ScheduleError(
                f"begin_index is {begin_index}, but the schedule has {self._last} steps; "
                f"choose 0 to {self._last - 1}."
            )
        self.eta = float(eta)
        self._begin = begin_index
        self._own = copy.copy(scheduler)
        self._timesteps = scheduler.timesteps.cpu()
        self._sigmas = scheduler.sigmas.cpu() if hasattr(scheduler, "sigmas") else None
        if self._sigmas is None:
            self._own.alphas_cumprod = scheduler.alphas_cumprod.cpu()
        else:
            # Only tells a warning that the caller forgot to scale: here nobody can.
            self._own.is_scale_input_called = True
        self._plain = _deterministic_companion(self._own)
        self._is_sde = self._plain is not self._own
        self._is_multistep = isinstance(scheduler, DPMSolverMultistepScheduler)
        self._scales_input = isinstance(
            scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler
        )
        self._memory = _points_remembered(scheduler)
        self.num_steps = self._last - begin_index
        self.timesteps: Num[Tensor, " steps"] = self._timesteps[begin_index:]
        self._views: dict[Hashable, _View] = {}

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """Standard deviation of the initial noise, as the stock pipeline multiplies it in."""
        sigma: float | Tensor = self._own.init_noise_sigma
        return sigma

    @property
    def alphas_cumprod(self) -> Float[Tensor, " timesteps"]:
        """Signal share ``alpha^2`` at each timestep that the model is trained at."""
        alphas: Tensor = self._own.alphas_cumprod.cpu()
        return alphas

    @functools.cached_property
    def log_snr(self) -> Float[Tensor, " points"]:
        """Log signal-to-noise ratio at each step and, last, of the finished sample.

        ``2 log(alpha / sigma)``. That of a finished sample is the ratio of the cleanest timestep
        that models are trained at, where the schedule itself would say infinity.
        """
        cleanest = self.alphas_cumprod[0].double()
        ratios = [
            (torch.as_tensor(alpha).double() / sigma.double()).square().cpu()
            for alpha, sigma in map(self._alpha_sigma, range(self._begin, self._last))
        ]
        return torch.stack([*ratios, cleanest / (1 - cleanest)]).log().float()

    def variance_preserving(
        self, latents: Float[Tensor, "batch *sample"], step_index: int
    ) -> Float[Tensor, "batch *sample"]:
        """Samples at one step index (``num_steps``: finished) in variance-preserving units.

        Those of Euler explode in variance; here ``alpha^2 + sigma^2 = 1`` for every scheduler.
        """
        if not self._scales_input:
            return latents
        return latents * self.log_snr[step_index].sigmoid().sqrt()

    def initial_state(self, step_index: int = 0) -> SolverState:
        """State of a sample that begins at ``step_index``, with nothing behind it."""
        self._check_unfinished(step_index)
        return SolverState(step_index, self._remember(range(self._begin + step_index)), ())

    def check_action(self, step_index: int, action: Action) -> None:
        """Refuse an edge that does not fit.

        Raises:
            ScheduleError: the stride is below 1 or beyond the steps left, or none are left.
            ConfigError: ``eta`` is not between 0 and 1.
        """
        self._check_unfinished(step_index)
        left = self.num_steps - step_index
        if not 1 <= action.stride <= left:
            raise ScheduleError(
                f"stride is {action.stride} at step index {step_index} of {self.num_steps}, with "
                f"{left} steps left; choose 1 to {left}."
            )
        if action.eta is not None:
            _check_eta(action.eta, "Action.eta")

    def is_stochastic(self, step_index: int, action: Action) -> bool:
        """Whether edges of ``action`` differ by their seeds; the last one rarely does."""
        self.check_action(step_index, action)
        return self.noise_std(self.initial_state(step_index), action) > 0

    def noise_std(self, state: SolverState, action: Action) -> float:
        """Standard deviation of an edge's noise in the sample; 0 where it is deterministic."""
        return float(self._view(state, action).noise_std)

    def noise_dtype(self, action: Action, dtype: torch.dtype) -> torch.dtype:
        """What an edge's noise is drawn in, where the network's outputs are of ``dtype``."""
        is_own = self._is_sde and action.eta in (None, 1)
        return torch.float32 if self._is_multistep and is_own else dtype

    def renoise_std(self, step_index: int) -> float:
        """Standard deviation of the noise that :meth:`renoise` adds.

        Raises:
            ScheduleError: ``step_index`` is not in the schedule.
        """
        self._check_unfinished(step_index)
        return float(self._alpha_sigma(self._begin + step_index)[1])

    def scale_model_input(
        self, latents: Float[Tensor, "batch *sample"], step_indices: Sequence[int]
    ) -> Float[Tensor, "batch *sample"]:
        """What the network sees of ``latents``, each at its own step index."""
        if not self._scales_input:
            return latents
        return _by_group(step_indices, self._scale_at, latents)

    def denoised(
        self,
        latents: Float[Tensor, "batch *sample"],
        outputs: Float[Tensor, "batch *sample"],
        step_indices: Sequence[int],
    ) -> Float[Tensor, "batch *sample"]:
        """The denoised estimate of each sample, clipped where the scheduler clips.

        Args:
            latents: samples, unscaled.
            outputs: the (guided) network outputs for them: epsilon, v or sample, as the scheduler's
                ``prediction_type`` says.
            step_indices: where each sample stands.
        """
        return _by_group(step_indices, self._denoised_at, latents, outputs)

    def renoise(
        self,
        denoised: Float[Tensor, "batch *sample"],
        step_index: int,
        noise: Float[Tensor, "batch *sample"],
    ) -> tuple[Float[Tensor, "batch *sample"], list[SolverState]]:
        """Noise clean latents forward to ``step_index``; the solver restarts there.

        Args:
            denoised: clean latents, or estimates of them.
            step_index: level to go to, 0 to ``num_steps - 1``.
            noise: standard normal.

        Returns:
            The samples, in the scheduler's own parametrisation (variance preserving for DDIM, DDPM
            and DPM-Solver, variance exploding for Euler), and their states.
        """
        state = self.initial_state(step_index)
        alpha, sigma = self._alpha_sigma(self._begin + step_index)
        return denoised * alpha + noise * sigma, [state] * len(denoised)

    def step(
        self,
        latents: Float[Tensor, "batch *sample"],
        outputs: Float[Tensor, "batch *sample"],
        states: Sequence[SolverState],
        actions: Sequence[Action],
        seeds: Sequence[int],
    ) -> tuple[Float[Tensor, "batch *sample"], list[SolverState]]:
        """Cross one edge for each sample.

        Args:
            latents: samples, unscaled.
            outputs: the (guided) network outputs for them.
            states: where each sample stands.
            actions: stride and share of noise of each edge.
            seeds: of each edge's noise; unused where the edge is deterministic.

        Returns:
            The samples at the targets, and their states.

        Raises:
            ScheduleError: a stride does not fit the steps left.
            ConfigError: an ``eta`` is not between 0 and 1.
        """
        groups: dict[Hashable, list[int]] = {}
        for row, (state, action) in enumerate(zip(states, actions, strict=True)):
            self.check_action(state.step_index, action)
            key = (
                state.step_index, state.visited, len(state.history), action.stride, action.eta
            )  # fmt: skip
            groups.setdefault(key, []).append(row)
        if len(groups) == 1:
            return self._step_group(latents, outputs, states, actions[0], seeds)
        after: list[SolverState] = list(states)
        parts = []
        for rows in groups.values():
            part, part_states = self._step_group(
                latents[rows],
                outputs[rows],
                [states[row] for row in rows],
                actions[rows[0]],
                [seeds[row] for row in rows],
            )
            parts.append(part)
            for row, state in zip(rows, part_states, strict=True):
                after[row] = state
        return _in_order(parts, groups.values()), after

    def _step_group(
        self,
        latents: Tensor,
        outputs: Tensor,
        states: Sequence[SolverState],
        action: Action,
        seeds: Sequence[int],
    ) -> tuple[Tensor, list[SolverState]]:
        """Step samples that stand at the same points by one action."""
        first = states[0]
        view = self._view(first, action)
        scheduler = view.scheduler
        if self._sigmas is not None:
            scheduler._step_index = view.position
        if self._is_multistep:
            self._remind(view, latents, outputs, states)
        extra: dict[str, Any] = {}
        if view.eta is not None:
            extra["eta"] = view.eta
        if view.draws:
            extra["generator"] = _generators(seeds)
        stepped = scheduler.step(outputs, view.timestep, latents, return_dict=False, **extra)[0]
        if view.split is not None:
            noise = randn_tensor(
                outputs.shape, _generators(seeds), device=outputs.device, dtype=outputs.dtype
            )
            # In single precision, as EulerAncestral does it.
            stepped = (stepped.float() * view.split.rescale + noise * view.noise_std).to(
                stepped.dtype
            )
        visited = self._remember((*first.visited, self._begin + first.step_index))
        after = SolverState(first.step_index + action.stride, visited, ())
        if not self._is_multistep:
            return stepped, [after] * len(states)
        converted = scheduler.model_outputs[-1]
        scheduler.model_outputs = []
        if scheduler.config.solver_order == 1:
            return stepped, [after] * len(states)
        # Cloned, or one row would keep the memory of all.
        return stepped, [replace(after, history=(row.clone(),)) for row in converted.unbind()]

    def _remind(
        self, view: _View, latents: Tensor, outputs: Tensor, states: Sequence[SolverState]
    ) -> None:
        """Give the multistep solver what it remembers of these samples."""
        scheduler = view.scheduler
        remembered = [torch.stack(rows) for rows in zip(*(s.history for s in states), strict=True)]
        scheduler.lower_order_nums = len(remembered)
        if view.split is not None:
            current = scheduler.convert_model_output(outputs, sample=latents)
            remembered = [current + view.split.shortening * (r - current) for r in remembered]
        blank = [None] * (scheduler.config.solver_order - len(remembered))
        scheduler.model_outputs = [*blank, *remembered]

    def _view(self, state: SolverState, action: Action) -> _View:
        """The view for one edge; made once, since edges of many samples cross the same points."""
        key = (state.step_index, state.visited, action.stride, action.eta)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            index = self._begin + state.step_index
            view = self._views[key] = self._make_view(
                state.visited, index, action.stride, action.eta
            )
        return view

    def _make_view(
        self, visited: tuple[int, ...], index: int, stride: int, eta: float | None
    ) -> _View:
        is_own = self._is_sde and eta in (None, 1)
        scheduler = copy.copy(self._own if is_own else self._plain)
        points = [*visited, index, *range(index + stride, self._last)]
        position = len(visited)
        scheduler.timesteps = self._timesteps[points]
        scheduler.num_inference_steps = len(points)
        timestep = scheduler.timesteps[position]
        if self._sigmas is None:
            if is_own:
                std = _ddpm_std(scheduler, timestep)
                return _View(scheduler, position, timestep, None, bool(timestep > 0), std)
            share = self.eta if eta is None else float(eta)
            landing = self._ddim_landing(index, stride)
            _land_ddim(scheduler, int(timestep), landing)
            std = share * scheduler._get_variance(int(timestep), landing) ** 0.5
            return _View(scheduler, position, timestep, share, share > 0, std)

        scheduler.sigmas = self._sigmas[[*points, self._last]]
        sigma, target = scheduler.sigmas[position : position + 2].clone()
        up, down = _ancestral_split(sigma, target, 1.0 if is_own else float(eta or 0.0))
        alpha = self._alpha(target)
        if is_own or up == 0:
            return _View(scheduler, position, timestep, None, is_own, alpha * up)
        scheduler.sigmas[position + 1] = down
        split = _Split(
            alpha / self._alpha(down), torch.log(sigma / target) / torch.log(sigma / down)
        )
        return _View(scheduler, position, timestep, None, False, alpha * up, split)

    def _ddim_landing(self, index: int, stride: int) -> int:
        """The timestep that a stride ends at; below 0 it is the finished sample."""
        target = index + stride
        if self._is_sde:  # DDIM in the place of DDPM, which lands on its timesteps
            return int(self._timesteps[target]) if target < self._last else -1
        # The stock scheduler steps by a constant, even where its timesteps do not: land where it
        # lands after as many steps of its own.
        constant = self._own.config.num_train_timesteps // self._own.num_inference_steps
        return int(self._timesteps[target - 1]) - constant

    def _scale_at(self, step_index: int, latents: Tensor) -> Tensor:
        scheduler = self._own
        scheduler._step_index = self._begin + step_index
        return scheduler.scale_model_input(latents, self.timesteps[step_index])

    def _denoised_at(self, step_index: int, latents: Tensor, outputs: Tensor) -> Tensor:
        """The scheduler's own estimate, from the part of its step that draws no noise."""
        scheduler = self._plain
        index = self._begin + step_index
        if self._is_multistep:
            scheduler._step_index = index
            return scheduler.convert_model_output(outputs, sample=latents).to(outputs.dtype)
        view = self._view(SolverState(step_index, (), ()), Action(1, 0.0))
        if self._sigmas is not None:
            view.scheduler._step_index = view.position
        step = view.scheduler.step(outputs, view.timestep, latents)
        return step.pred_original_sample.to(outputs.dtype)

    def _alpha_sigma(self, index: int) -> tuple[float | Tensor, Tensor]:
        """Factors of clean latents and of noise at a point of the schedule."""
        if self._sigmas is None:
            alpha_squared = self._own.alphas_cumprod[self._timesteps[index]]
            return alpha_squared**0.5, (1 - alpha_squared) ** 0.5
        sigma = self._sigmas[index]
        alpha = self._alpha(sigma)
        return alpha, sigma * alpha

    def _alpha(self, sigma: Tensor) -> float | Tensor:
        """Factor of clean latents where noise per signal is ``sigma``: 1 if variance explodes."""
        if not self._is_multistep:
            return 1.0
        alpha: Tensor = self._own._sigma_to_alpha_sigma_t(sigma)[0]
        return alpha

    def _remember(self, visited: Iterable[int]) -> tuple[int, ...]:
        points = tuple(visited)
        return points[max(len(points) - self._memory, 0) :]

    def _check_unfinished(self, step_index: int) -> None:
        if not 0 <= step_index < self.num_steps:
            raise ScheduleError(
                f"step index is {step_index}, but the schedule has {self.num_steps} steps; an "
                f"unfinished sample stands at 0 to {self.num_steps - 1}."
            )


def _check_eta(eta: float, argument: str) -> None:
    if not 0 <= eta <= 1:
        raise ConfigError(f"{argument} is {eta}; choose 0 (deterministic) to 1.")


def _deterministic_companion(scheduler: Any) -> Any:
    """The scheduler itself if it draws no noise unasked, else its deterministic relative."""
    match scheduler:
        case DDPMScheduler():
            config = scheduler.config
            shared = {
                name: config[name]
                for name in (
                    "num_train_timesteps",
                    "prediction_type",
                    "clip_sample",
                    "clip_sample_range",
                    "thresholding",
                    "dynamic_thresholding_ratio",
                    "sample_max_value",
                )
            }
            ddim = DDIMScheduler(**shared)
            ddim.alphas_cumprod = scheduler.alphas_cumprod
            return ddim
        case EulerAncestralDiscreteScheduler():
            euler = EulerDiscreteScheduler(prediction_type=scheduler.config.prediction_type)
            euler.is_scale_input_called = True
            return euler
        case DPMSolverMultistepScheduler() if scheduler.config.algorithm_type == "sde-dpmsolver++":
            solver = copy.copy(scheduler)
            solver._internal_dict = FrozenDict(
                {**scheduler.config, "algorithm_type": "dpmsolver++"}
            )
            return solver
    return scheduler


def _points_remembered(scheduler: Any) -> int:
    """How many visited points decide the next step; fewer means larger groups."""
    if not isinstance(scheduler, DPMSolverMultistepScheduler):
        return 0
    config = scheduler.config
    if (
        config.lower_order_final
        and not config.euler_at_final
        and config.final_sigmas_type != "zero"
    ):
        # Whether the last step is of first order then depends on the number of all steps.
        return len(scheduler.timesteps)
    return int(config.solver_order) - 1


def _land_ddim(scheduler: Any, timestep: int, landing: int) -> None:
    """Make DDIM step from ``timestep`` to ``landing``, which it derives from two numbers."""
    scheduler.num_inference_steps = 1
    scheduler._internal_dict = FrozenDict(
        {**scheduler.config, "num_train_timesteps": timestep - landing}
    )


def _ddpm_std(scheduler: Any, timestep: Tensor) -> float | Tensor:
    """Standard deviation of DDPM's noise; 0 where it is only the floor under a logarithm."""
    if timestep <= 0:
        return 0.0
    variance: Tensor = scheduler._get_variance(timestep)
    if scheduler.variance_type == "fixed_small_log":  # is a deviation already
        return variance if variance > 1e-10 else 0.0
    return variance**0.5 if variance > 1e-20 else 0.0


def _ancestral_split(sigma: Tensor, target: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Noise to add, and level to step down to before, so as to end at ``target``.

    Ancestral sampling as k-diffusion splits it (``get_ancestral_step``), written as EulerAncestral
    writes it, for equal bits.
    """
    up = eta * (target**2 * (sigma**2 - target**2) / sigma**2) ** 0.5
    return up, (target**2 - up**2) ** 0.5


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _by_group(keys: Sequence[int], function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """Apply ``function(key, *rows)`` to the rows of each key, and put the answers in order."""
    groups: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(int(key), []).append(row)
    if len(groups) == 1:
        return function(int(keys[0]), *batches)
    parts = [function(key, *(b[rows] for b in batches)) for key, rows in groups.items()]
    return _in_order(parts, groups.values())


def _in_order(parts: Sequence[Tensor], rows: Iterable[Sequence[int]]) -> Tensor:
    """Concatenate ``parts``, whose rows belong at ``rows`` of the result."""
    together = torch.cat(list(parts))
    order = torch.tensor([row for part in rows for row in part], device=together.device)
    return torch.empty_like(together).index_copy_(0, order, together)
