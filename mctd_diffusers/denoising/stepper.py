"""Variable-stride steps of a stock diffusers scheduler, many samples at once.

A scheduler object remembers where it stands, so branches cannot share one. Here what a solver
remembers is a value, :class:`SolverState`, that travels with the sample; and a stride of ``k`` is a
step of the stock scheduler on a *view* of itself: a clone whose schedule is cut down to the points
this sample visits (visited + current + target + those that strides of the same length would visit).
Samples with equal points are stepped by one clone in one call, with one generator for each edge, so
that an edge is the same whatever batch it rode in. With stride 1 the view's arithmetic is the stock
loop's, bit for bit. What each scheduler class needs is in `denoising.schedulers`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Num, Shaped
from torch import Tensor

from mctd_diffusers.denoising.schedulers import SchedulerTraits, check_scheduler, traits_of
from mctd_diffusers.denoising.views import BrownianEdge, Schedule, View, ancestral_split, land_at
from mctd_diffusers.errors import ConfigError, ScheduleError
from mctd_diffusers.search.environment import Action

Randomness: TypeAlias = Literal["none", "own", "injected"]
"""Where an edge's noise comes from: it has none, the scheduler draws it, or it is added to a
deterministic step."""

_MAX_VIEWS = 4096
_NO_NOISE = 1e-5  # of rounding, where a scheduler adds the root of a difference that should be 0


@dataclass(frozen=True, eq=False)
class SolverState:
    """What the next step of one sample needs beside its latents.

    Attributes:
        step_index: position in the schedule, 0 is noisiest; ``num_steps`` is finished. A sample
            midway still stands where its edge began.
        visited: grid key: the earlier points of the schedule that the solver still looks at, oldest
            first, as indices into the schedule.
        history: the tensors that the solver remembers, each shaped like the sample; empty for
            solvers without memory and after a restart.
        memory: all else that it remembers, with the places of those tensors, in plain types.
        midway: the edge that the sample is on, where the network must be called a second time
            before it is crossed; ``None`` at the points of the schedule.
    """

    step_index: int
    visited: tuple[int, ...]
    history: tuple[Shaped[Tensor, "*sample"], ...]
    memory: Hashable = ()
    midway: Action | None = None


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
class _Renoising:
    """An edge of first order in the estimate: DDIM's step with a share of noise, at any levels.

    ``alpha' x0hat + sqrt(sigma'^2 - std^2) noise_hat + std z`` (Song et al., 2021, equation 12),
    for solvers that have no noise of their own, or cannot do with less of it.

    Attributes:
        signal: factors of clean latents at the point and at the target.
        noise: factors of noise at the point and at the target.
    """

    signal: tuple[float | Tensor, float | Tensor]
    noise: tuple[float | Tensor, float | Tensor]


@dataclass(frozen=True)
class _Edge:
    """How an edge is crossed.

    Attributes:
        view: the clone that steps it.
        draws: whether the clone draws noise, so needs generators.
        noise_std: standard deviation of the noise in the sample after the edge; NaN where it is not
            simply added to it.
        split: how noise is added after the clone's step; ``None`` where it is not.
        renoising: set where the clone's step is not taken at all.
    """

    view: View
    draws: bool
    noise_std: float | Tensor
    split: _Split | None = None
    renoising: _Renoising | None = None


class Stepper:
    """Steps samples along a scheduler's schedule by any stride, each with its own noise.

    What ``Action.eta`` means:

    - ``None``: the stock step, with the stock meaning of ``eta`` (DDIM and TCD have one).
    - a number, 0 to 1: that share of fresh noise, in every scheduler. DDIM and TCD take it as their
      argument. Euler and the ODE DPM-Solver step to a lower noise level and noise up again (the
      ancestral split of k-diffusion; at 1 Euler is EulerAncestral). Schedulers that draw noise
      themselves are themselves at 1; below that the deterministic companion of DDPM,
      EulerAncestral and the SDE DPM-Solver (DDIM, Euler, the ODE DPM-Solver) steps with that
      share. Everywhere else an edge with a share is DDIM's step at the scheduler's own levels,
      of first order, after which a multistep solver starts anew; it takes one network call.

    Args:
        scheduler: a stock scheduler on which ``set_timesteps`` was called; copied, not changed.
        eta: the user's ``eta``, for edges that name none.
        begin_index: first step of the schedule in use (image to image starts in the middle).

    Attributes:
        num_steps: steps from the first point to the finished sample.
        timesteps: what the network is conditioned on at each step, in the scheduler's dtype, on the
            CPU.
        calls_per_step: network calls that an edge may take, 1 or 2; see :meth:`needs_midpoint`.
        longest_stride: the longest stride that an edge may cross; ``None`` is any.

    Raises:
        UnsupportedSchedulerError: see `denoising.schedulers.check_scheduler`.
        ScheduleError: ``set_timesteps`` was not called, or ``begin_index`` is past the schedule.
        ConfigError: ``eta`` is not between 0 and 1.
    """

    def __init__(self, scheduler: Any, *, eta: float = 0.0, begin_index: int = 0) -> None:
        check_scheduler(scheduler)
        _check_eta(eta, "eta")
        self._traits = traits_of(scheduler)
        self._schedule = Schedule(scheduler, self._traits)
        self._last = self._schedule.num_steps
        if not 0 <= begin_index < self._last:
            raise ScheduleError(
                f"begin_index is {begin_index}, but the schedule has {self._last} steps; "
                f"choose 0 to {self._last - 1}."
            )
        self.eta = float(eta)
        self._begin = begin_index
        self._own = _prepared(scheduler)
        self._plain = _deterministic_companion(self._own)
        self._draws = self._traits.draws(self._own)
        self._splits = _splits(self._own, self._traits)
        self._scales_input = self._traits.levels == "exploding"
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self._reads = self._traits.reads(scheduler)
        blank = self._traits.blank(scheduler)
        self._blank = _pack(blank, []) if blank else ()
        self.num_steps = self._last - begin_index
        self.timesteps: Num[Tensor, " steps"] = self._schedule.timesteps[begin_index:]
        self.calls_per_step = 2 if self._traits.grid == "two calls" else 1
        self.longest_stride = self._traits.longest_stride(scheduler)
        self._edges: dict[Hashable, _Edge] = {}

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """Standard deviation of the initial noise, as the stock pipeline multiplies it in."""
        sigma: float | Tensor = getattr(self._own, "init_noise_sigma", 1.0)
        return sigma

    @property
    def alphas_cumprod(self) -> Float[Tensor, " timesteps"]:
        """Signal share ``alpha^2`` at each timestep that the model is trained at.

        Raises:
            ScheduleError: the scheduler has none (flow matching, EDM).
        """
        if not hasattr(self._own, "alphas_cumprod"):
            raise ScheduleError(
                f"{type(self._own).__name__} has no alphas_cumprod: its levels are no function of "
                "trained timesteps; use a scheduler such as DDIMScheduler."
            )
        alphas: Tensor = self._own.alphas_cumprod.cpu()
        return alphas

    @functools.cached_property
    def log_snr(self) -> Float[Tensor, " points"]:
        """Log signal-to-noise ratio at each step and, last, of the finished sample.

        ``2 log(alpha / sigma)``. That of a finished sample is the ratio of the cleanest level that
        models are trained at, where the schedule itself would say infinity.
        """
        ratios = [
            (torch.as_tensor(alpha).double() / sigma.double()).square().cpu()
            for alpha, sigma in map(self._alpha_sigma, range(self._begin, self._last))
        ]
        return torch.stack([*ratios, self._cleanest_ratio(ratios)]).log().float()

    def variance_preserving(
        self, latents: Float[Tensor, "batch *sample"], step_index: int
    ) -> Float[Tensor, "batch *sample"]:
        """Samples at one step index (``num_steps``: finished) in variance-preserving units.

        Those of Euler explode in variance, those of flow matching shrink between data and noise;
        here ``alpha^2 + sigma^2 = 1`` for every scheduler.
        """
        if self._scales_input:
            return latents * self.log_snr[step_index].sigmoid().sqrt()
        if step_index == self.num_steps:
            return latents
        alpha, sigma = self._alpha_sigma(self._begin + step_index)
        total = torch.as_tensor(alpha) ** 2 + sigma**2
        return latents if self._is_preserving else latents / total.sqrt()

    def initial_state(self, step_index: int = 0) -> SolverState:
        """State of a sample that begins at ``step_index``, with nothing behind it."""
        self._check_unfinished(step_index)
        visited = self._remember(range(self._begin + step_index))
        return SolverState(step_index, visited, (), self._blank)

    def check_action(self, step_index: int, action: Action) -> None:
        """Refuse an edge that does not fit.

        Raises:
            ScheduleError: the stride is below 1, beyond the steps left or longer than the scheduler
                can, or no steps are left.
            ConfigError: ``eta`` is not between 0 and 1.
        """
        self._check_unfinished(step_index)
        left = self.num_steps - step_index
        if not 1 <= action.stride <= left:
            raise ScheduleError(
                f"stride is {action.stride} at step index {step_index} of {self.num_steps}, with "
                f"{left} steps left; choose 1 to {left}."
            )
        if self.longest_stride is not None and action.stride > self.longest_stride:
            raise ScheduleError(
                f"stride is {action.stride}, but {type(self._own).__name__} can only be stepped by "
                f"strides up to {self.longest_stride} ({self._traits.note}); use those, or another "
                "scheduler."
            )
        if action.eta is not None:
            _check_eta(action.eta, "Action.eta")

    def is_stochastic(self, step_index: int, action: Action) -> bool:
        """Whether edges of ``action`` differ by their seeds; the last one rarely does."""
        self.check_action(step_index, action)
        return self.noise_std(self.initial_state(step_index), action) != 0

    def noise_std(self, state: SolverState, action: Action) -> float:
        """Standard deviation of an edge's noise in the sample.

        0 where it is deterministic, and NaN where noise is not simply added to the sample: where it
        moves the midpoint, or is used again by the next step.
        """
        return float(self._edge(state, action).noise_std)

    def noise_dtype(self, action: Action, dtype: torch.dtype) -> torch.dtype:
        """What an edge's noise is drawn in, where the network's outputs are of ``dtype``."""
        is_own = self.randomness(action) == "own"
        return torch.float32 if is_own and self._traits.noise_in_single else dtype

    def randomness(self, action: Action) -> Randomness:
        """Where the noise of edges like ``action`` comes from; the last edge mostly has none."""
        if self._draws and action.eta in (None, 1):
            return "own"
        if self._traits.takes_eta:
            return "own" if (self.eta if action.eta is None else action.eta) > 0 else "none"
        return "injected" if action.eta else "none"

    def needs_midpoint(self, step_index: int, action: Action) -> bool:
        """Whether an edge takes a second network call.

        Raises:
            ScheduleError: the stride does not fit the steps left.
            ConfigError: ``eta`` is not between 0 and 1.
        """
        self.check_action(step_index, action)
        edge = self._edge(self.initial_state(step_index), action)
        return edge.renoising is None and edge.view.midpoint is not None

    def renoise_std(self, step_index: int) -> float:
        """Standard deviation of the noise that :meth:`renoise` adds.

        Raises:
            ScheduleError: ``step_index`` is not in the schedule.
        """
        self._check_unfinished(step_index)
        return float(self._alpha_sigma(self._begin + step_index)[1])

    def network_input(
        self, latents: Float[Tensor, "batch *sample"], states: Sequence[SolverState]
    ) -> tuple[Float[Tensor, "batch *sample"], Num[Tensor, " batch"]]:
        """What the network sees of samples: the samples as it wants them scaled, and its timesteps.

        Args:
            latents: samples, unscaled; of those midway the midpoints.
            states: where each stands.
        """
        timesteps = [
            self.timesteps[state.step_index]
            if state.midway is None
            else _there(self._edge(state, state.midway).view.midpoint)
            for state in states
        ]
        inputs = latents
        if self._scales_input:
            keys = [(s.step_index, s.visited, s.memory, s.midway) for s in states]
            inputs = _by_group(
                keys, lambda rows: self._scaled([states[row] for row in rows], latents[rows])
            )
        return inputs, torch.stack(timesteps).to(latents.device)

    def denoised(
        self,
        latents: Float[Tensor, "batch *sample"],
        outputs: Float[Tensor, "batch *sample"],
        step_indices: Sequence[int],
    ) -> Float[Tensor, "batch *sample"]:
        """The denoised estimate of each sample, clipped where the scheduler clips.

        Args:
            latents: samples, unscaled.
            outputs: the (guided) network outputs for them: epsilon, v, sample, velocity or what EDM
                preconditions, as the scheduler's ``prediction_type`` says.
            step_indices: where each sample stands.
        """
        return _by_group(
            step_indices,
            lambda rows: self._denoised_at(step_indices[rows[0]], latents[rows], outputs[rows]),
        )

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
        if self._traits.restarts_empty:
            state = replace(state, visited=())
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
        """Cross one edge for each sample, or its first half where it takes a second call.

        Args:
            latents: samples, unscaled.
            outputs: the (guided) network outputs for them.
            states: where each sample stands.
            actions: stride and share of noise of each edge.
            seeds: of each edge's noise; unused where the edge is deterministic.

        Returns:
            The samples at the targets, and their states; where a state is ``midway`` the sample is
            the midpoint, to be evaluated and handed to :meth:`complete`.

        Raises:
            ScheduleError: a stride does not fit the steps left.
            ConfigError: an ``eta`` is not between 0 and 1.
        """
        for state, action in zip(states, actions, strict=True):
            self.check_action(state.step_index, action)
        return self._in_groups(latents, outputs, states, actions, seeds)

    def complete(
        self,
        latents: Float[Tensor, "batch *sample"],
        outputs: Float[Tensor, "batch *sample"],
        states: Sequence[SolverState],
        seeds: Sequence[int],
    ) -> tuple[Float[Tensor, "batch *sample"], list[SolverState]]:
        """Cross the second half of each edge.

        Args:
            latents: the midpoints.
            outputs: the (guided) network outputs for them.
            states: midway.
            seeds: of each edge's noise, as for the first half.

        Returns:
            The samples at the targets, and their states.

        Raises:
            ScheduleError: a state is not midway.
        """
        actions = []
        for state in states:
            if state.midway is None:
                raise ScheduleError(
                    f"a sample at step index {state.step_index} is not midway: there is no edge to "
                    "complete; use `step`."
                )
            actions.append(state.midway)
        return self._in_groups(latents, outputs, states, actions, seeds)

    # Crossing edges, in groups

    def _in_groups(
        self,
        latents: Tensor,
        outputs: Tensor,
        states: Sequence[SolverState],
        actions: Sequence[Action],
        seeds: Sequence[int],
    ) -> tuple[Tensor, list[SolverState]]:
        groups: dict[Hashable, list[int]] = {}
        for row, (state, action) in enumerate(zip(states, actions, strict=True)):
            midway = state.midway is not None
            key = (
                state.step_index, state.visited, state.memory, midway, action.stride, action.eta
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
        edge = self._edge(first, action)
        if edge.renoising is not None:
            return self._renoised_step(edge, latents, outputs, states, action, seeds)
        view = edge.view
        view.enter(midway=first.midway is not None)
        self._remind(view.scheduler, states, action)
        if edge.split is not None:
            _extrapolate_along(edge.split, view.scheduler, latents, outputs)
        stepped = self._stock_step(edge, latents, outputs, seeds)
        if edge.split is not None:
            noise = _noise(outputs, seeds)
            # In single precision, as EulerAncestral does it.
            stepped = (stepped.float() * edge.split.rescale + noise * edge.noise_std).to(
                stepped.dtype
            )
        is_midway = view.midpoint is not None and first.midway is None
        return stepped, self._states_after(view.scheduler, states, action, is_midway=is_midway)

    def _stock_step(
        self, edge: _Edge, latents: Tensor, outputs: Tensor, seeds: Sequence[int]
    ) -> Tensor:
        """One step of the clone, which stands where it should and remembers what it should."""
        scheduler = edge.view.scheduler
        arguments = dict(edge.view.arguments)
        if edge.draws and self._takes_generator:
            arguments["generator"] = _generators(seeds)
        if edge.draws and hasattr(scheduler, "noise_sampler"):
            midpoint = getattr(scheduler, "mid_point_sigma", None)
            scheduler.noise_sampler = BrownianEdge(_generators(seeds), latents, midpoint)
        timestep = edge.view.timestep
        stepped: Tensor = scheduler.step(
            outputs, timestep, latents, return_dict=False, **arguments
        )[0]
        return stepped

    def _renoised_step(
        self,
        edge: _Edge,
        latents: Tensor,
        outputs: Tensor,
        states: Sequence[SolverState],
        action: Action,
        seeds: Sequence[int],
    ) -> tuple[Tensor, list[SolverState]]:
        """An edge of first order in the estimate, after which the solver starts anew."""
        renoising = edge.renoising
        assert renoising is not None
        step_index = states[0].step_index
        estimate = self._denoised_at(step_index, latents, outputs).float()
        (alpha, alpha_next), (sigma, sigma_next) = renoising.signal, renoising.noise
        direction = (latents.float() - alpha * estimate) / sigma
        std = float(edge.noise_std)
        kept = (torch.as_tensor(sigma_next) ** 2 - std**2).clamp(min=0) ** 0.5
        stepped = alpha_next * estimate + kept * direction
        if std > 0:
            stepped = stepped + std * _noise(outputs, seeds)
        after = step_index + action.stride
        state = SolverState(after, (), (), self._blank)
        if after < self.num_steps and not self._traits.restarts_empty:
            state = self.initial_state(after)
        return stepped.to(outputs.dtype), [state] * len(states)

    def _remind(self, scheduler: Any, states: Sequence[SolverState], action: Action) -> None:
        """Give a solver what it remembers of these samples."""
        first = states[0]
        memory = first.memory
        if self._traits.equal_spacing and first.visited:
            spacing = self._begin + first.step_index - first.visited[-1]
            memory = memory if spacing == action.stride else self._blank
        if memory:
            columns = zip(*(state.history for state in states), strict=True)
            for name, value in _unpack(memory, [torch.stack(rows) for rows in columns]).items():
                setattr(scheduler, name, value)

    def _forget(self, scheduler: Any) -> None:
        """Let a solver remember nothing."""
        for name, value in self._traits.blank(scheduler).items():
            setattr(scheduler, name, value)

    def _states_after(
        self, scheduler: Any, states: Sequence[SolverState], action: Action, *, is_midway: bool
    ) -> list[SolverState]:
        """What a solver that stepped these samples remembers of each; it forgets them itself."""
        first = states[0]
        tensors: list[Tensor] = []
        remembered = {name: getattr(scheduler, name) for name in self._traits.blank(scheduler)}
        if self._traits.drops_oldest:
            remembered["model_outputs"] = [None, *remembered["model_outputs"][1:]]
        memory = _pack(remembered, tensors) if remembered else ()
        self._forget(scheduler)
        if is_midway:
            after = replace(first, memory=memory, midway=action)
        else:
            visited = self._remember((*first.visited, self._begin + first.step_index))
            after = SolverState(first.step_index + action.stride, visited, (), memory)
        if not tensors:
            return [replace(after, history=())] * len(states)
        # Cloned, or one row would keep the memory of all.
        return [
            replace(after, history=tuple(row.clone() for row in rows))
            for rows in zip(*(tensor.unbind() for tensor in tensors), strict=True)
        ]

    # Edges

    def _edge(self, state: SolverState, action: Action) -> _Edge:
        """How to cross an edge; made once, since many samples cross the same points."""
        key = (state.step_index, state.visited, action.stride, action.eta)
        edge = self._edges.get(key)
        if edge is None:
            if len(self._edges) >= _MAX_VIEWS:
                self._edges.clear()
            index = self._begin + state.step_index
            edge = self._edges[key] = self._make_edge(
                state.visited, index, action.stride, action.eta
            )
        return edge

    def _make_edge(
        self, visited: tuple[int, ...], index: int, stride: int, eta: float | None
    ) -> _Edge:
        is_own = self._draws and eta in (None, 1)
        scheduler = self._own if is_own else self._plain
        view = self._schedule.view(scheduler, visited, index, stride)
        share = self.eta if eta is None else float(eta)
        if self._traits.takes_eta and self._traits.grid == "points":
            view = replace(view, arguments={"eta": share})
            return self._drawing_edge(view) if share > 0 else _Edge(view, False, 0.0)
        if self._traits.takes_eta or isinstance(scheduler, DDIMScheduler):
            return self._ddim_edge(view, index, stride, share)
        if self._traits.grid == "constant":
            land_at(view.scheduler, int(view.timestep), self._landing(index, stride))
        if is_own:
            return self._drawing_edge(view)
        share = float(eta or 0.0)
        if share == 0 and (not self._draws or self._plain is not self._own):
            return _Edge(view, False, 0.0)
        if self._splits:
            return self._split_edge(view, share)
        return self._renoising_edge(view, index, stride, share)

    def _drawing_edge(self, view: View) -> _Edge:
        """A step of a scheduler that draws its noise itself."""
        edge = _Edge(view, True, 0.0)
        return replace(edge, noise_std=self._own_std(edge))

    def _ddim_edge(self, view: View, index: int, stride: int, share: float) -> _Edge:
        """A step of DDIM, which takes the share of noise as an argument."""
        timestep, landing = int(view.timestep), self._landing(index, stride)
        land_at(view.scheduler, timestep, landing)
        std = share * view.scheduler._get_variance(timestep, landing) ** 0.5
        return _Edge(replace(view, arguments={"eta": share}), share > 0, std)

    def _split_edge(self, view: View, eta: float) -> _Edge:
        """A step to a lower level, and noise up from there."""
        sigmas = view.scheduler.sigmas
        sigma, target = sigmas[view.position : view.position + 2].clone()
        up, down = ancestral_split(sigma, target, eta)
        alpha = self._alpha(target)
        if up == 0:
            return _Edge(view, False, alpha * up)
        sigmas[view.position + 1] = down
        shortening = torch.log(sigma / target) / torch.log(sigma / down)
        return _Edge(view, False, alpha * up, split=_Split(alpha / self._alpha(down), shortening))

    def _renoising_edge(self, view: View, index: int, stride: int, eta: float) -> _Edge:
        alpha, sigma = self._alpha_sigma(index)
        alpha_next, sigma_next = self._alpha_sigma(index + stride)
        ratio = sigma_next * alpha / (alpha_next * sigma)
        std = eta * sigma_next * (1 - ratio**2) ** 0.5
        renoising = _Renoising((alpha, alpha_next), (sigma, sigma_next))
        return _Edge(view, False, std, renoising=renoising)

    def _landing(self, index: int, stride: int) -> int:
        """The timestep that a stride ends at; below 0 it is the finished sample."""
        if self._traits.grid != "constant":  # DDIM in the place of DDPM lands on its timesteps
            return self._schedule.target_timestep(index + stride)
        # The stock scheduler steps by a constant, even where its timesteps do not: land where it
        # lands after as many steps of its own.
        constant = self._own.config.num_train_timesteps // self._own.num_inference_steps
        return int(self._schedule.timesteps[index + stride - 1]) - constant

    def _own_std(self, edge: _Edge) -> float | Tensor:
        """Standard deviation of the noise that the scheduler draws on an edge."""
        scheduler = edge.view.scheduler
        if isinstance(scheduler, DDPMScheduler):
            return _ddpm_std(scheduler, edge.view.timestep)
        if self._splits:
            sigma, target = scheduler.sigmas[edge.view.position : edge.view.position + 2]
            return self._alpha(target) * ancestral_split(sigma, target, 1.0)[0]
        std = self._measured_std(edge)
        return math.nan if std and not self._traits.adds_noise else std

    def _measured_std(self, edge: _Edge) -> float:
        """The same, as the difference of two steps shows it by that of their noises."""
        shape = (1, 4, 8, 8)
        ends, noises = [], []
        for seed in (0, 1):
            latents = torch.zeros(shape)
            scheduler = edge.view.scheduler
            self._forget(scheduler)
            for midway in (False, True) if edge.view.midpoint is not None else (False,):
                edge.view.enter(midway=midway)
                latents = self._stock_step(edge, latents, torch.zeros(shape), [seed])
            ends.append(latents.double())
            noises.append(_noise(torch.zeros(shape), [seed]).double())
        moved, by = ends[0] - ends[1], noises[0] - noises[1]
        std = float((moved * by).sum() / (by * by).sum())
        return std if std > _NO_NOISE else 0.0

    # Levels and estimates

    def _scaled(self, states: Sequence[SolverState], latents: Tensor) -> Tensor:
        first = states[0]
        if first.midway is not None:
            view = self._edge(first, first.midway).view
            view.enter(midway=True)
            self._remind(view.scheduler, states, first.midway)
            return view.scheduler.scale_model_input(latents, _there(view.midpoint))
        scheduler = self._own
        scheduler._step_index = self._schedule.place(self._begin + first.step_index)
        return scheduler.scale_model_input(latents, self.timesteps[first.step_index])

    def _denoised_at(self, step_index: int, latents: Tensor, outputs: Tensor) -> Tensor:
        """The scheduler's own estimate, from the part of its step that draws no noise."""
        index = self._begin + step_index
        scheduler = self._plain
        match self._traits.estimate:
            case "convert":
                scheduler._step_index = index
                estimate = scheduler.convert_model_output(outputs, sample=latents)
            case "formula":
                estimate = self._formula(index, latents, outputs)
            case "step":
                edge = self._estimating_edge(index)
                edge.view.enter()
                arguments = dict(edge.view.arguments)
                if self._takes_generator:
                    arguments["generator"] = _generators([0] * len(latents))
                step = edge.view.scheduler.step(outputs, edge.view.timestep, latents, **arguments)
                self._forget(edge.view.scheduler)
                estimate = getattr(step, "pred_original_sample", None)
                estimate = step.denoised if estimate is None else estimate
        return estimate.to(outputs.dtype)

    def _estimating_edge(self, index: int) -> _Edge:
        """An edge of stride 1 to read the estimate off, without noise where that can be."""
        key = ("estimate", index)
        if key not in self._edges:
            view = self._schedule.view(self._plain, (), index, 1)
            if self._traits.grid == "constant" or isinstance(self._plain, DDIMScheduler):
                land_at(view.scheduler, int(view.timestep), self._landing(index, 1))
            self._edges[key] = _Edge(view, self._takes_generator, 0.0)
        return self._edges[key]

    def _formula(self, index: int, latents: Tensor, outputs: Tensor) -> Tensor:
        """The estimate by the formula of the prediction type."""
        alpha, sigma = self._alpha_sigma(index)
        name = type(self._own).__name__
        if name == "CMStochasticIterativeScheduler":
            skip, out = self._own.get_scalings_for_boundary_condition(sigma)
            estimate = out * outputs + skip * latents
            return estimate.clamp(-1, 1) if self._own.config.clip_denoised else estimate
        if name == "MiniMaxH3Scheduler":
            return latents + sigma * outputs
        prediction = self._own.config.get("prediction_type", "flow_prediction")
        if self._traits.levels == "flow":
            prediction = "flow_prediction"
        elif self._traits.levels == "sine":
            prediction = "v_prediction"
        match prediction:
            case "epsilon":
                return (latents - sigma * outputs) / alpha
            case "v_prediction":
                return alpha * latents - sigma * outputs
            case "sample":
                return outputs
        return latents - sigma * outputs

    @property
    def _is_preserving(self) -> bool:
        """Whether the squares of the factors of signal and noise sum to 1."""
        levels = self._traits.levels
        if levels == "solver":
            return not self._own.config.get("use_flow_sigmas", False)
        return levels in ("alphas", "sine")

    def _alpha_sigma(self, index: int) -> tuple[float | Tensor, Tensor]:
        """Factors of clean latents and of noise at a point of the schedule."""
        schedule = self._schedule
        match self._traits.levels:
            case "alphas":
                if index == self._last:
                    final = getattr(self._own, "final_alpha_cumprod", torch.tensor(1.0))
                    return final**0.5, (1 - final) ** 0.5
                alpha_squared = self._own.alphas_cumprod[self._schedule.timesteps[index]]
                return alpha_squared**0.5, (1 - alpha_squared) ** 0.5
            case "sine":
                return schedule["alphas"][index], schedule["betas"][index]
            case "trigonometric":
                angle = schedule["timesteps"][index]
                return torch.cos(angle), torch.sin(angle) * self._own.config.sigma_data
            case "flow":
                sigma = schedule["sigmas"][index]
                return 1 - sigma, sigma
            case "solver":
                alpha, sigma = self._own._sigma_to_alpha_sigma_t(schedule["sigmas"][index])
                return alpha, sigma
        return 1.0, schedule["sigmas"][index]

    def _alpha(self, sigma: Tensor) -> float | Tensor:
        """Factor of clean latents where noise per signal is ``sigma``: 1 if variance explodes."""
        if self._traits.levels != "solver":
            return 1.0
        alpha: Tensor = self._own._sigma_to_alpha_sigma_t(sigma)[0]
        return alpha

    def _cleanest_ratio(self, ratios: Sequence[Tensor]) -> Tensor:
        """Signal to noise, squared, of the cleanest level that models are trained at."""
        if hasattr(self._own, "alphas_cumprod"):
            cleanest = self.alphas_cumprod[0].double()
            return cleanest / (1 - cleanest)
        sigma = getattr(self._own, "sigma_min", None) or self._own.config.get("sigma_min")
        if not sigma:
            return ratios[-1]
        sigma = torch.tensor(float(sigma), dtype=torch.float64)
        alpha = 1 - sigma if self._traits.levels == "flow" else 1
        return torch.maximum((alpha / sigma) ** 2, ratios[-1])

    def _remember(self, visited: Iterable[int]) -> tuple[int, ...]:
        points = tuple(visited)
        return points if self._reads is None else points[max(len(points) - self._reads, 0) :]

    def _check_unfinished(self, step_index: int) -> None:
        if not 0 <= step_index < self.num_steps:
            raise ScheduleError(
                f"step index is {step_index}, but the schedule has {self.num_steps} steps; an "
                f"unfinished sample stands at 0 to {self.num_steps - 1}."
            )


def _check_eta(eta: float, argument: str) -> None:
    if not 0 <= eta <= 1:
        raise ConfigError(f"{argument} is {eta}; choose 0 (deterministic) to 1.")


def _there(midpoint: Tensor | None) -> Tensor:
    assert midpoint is not None, "the edge of a state midway has a midpoint"
    return midpoint


def _prepared(scheduler: Any) -> Any:
    """A clone to read levels from, on the CPU, that warns of nothing."""
    own = copy.copy(scheduler)
    if hasattr(own, "alphas_cumprod"):
        own.alphas_cumprod = scheduler.alphas_cumprod.cpu()
    if hasattr(own, "is_scale_input_called"):
        # Only tells a warning that the caller forgot to scale: here nobody can.
        own.is_scale_input_called = True
    return own


def _splits(scheduler: Any, traits: SchedulerTraits) -> bool:
    """Whether noise may be added by a split; of flow sigmas and the third order it may not."""
    config = scheduler.config
    is_flow, order = config.get("use_flow_sigmas", False), config.get("solver_order", 1)
    return traits.split and not is_flow and order <= 2


def _deterministic_companion(scheduler: Any) -> Any:
    """The scheduler itself if it draws no noise unasked, else its deterministic relative.

    Where there is none it is the scheduler itself.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    if name in ("DDPMScheduler", "DDPMParallelScheduler"):
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
    if name == "EulerAncestralDiscreteScheduler":
        euler = EulerDiscreteScheduler(prediction_type=config.prediction_type)
        euler.is_scale_input_called = True
        return euler
    if str(config.get("algorithm_type", "")).startswith("sde-"):
        solver = copy.copy(scheduler)
        solver._internal_dict = FrozenDict({**config, "algorithm_type": "dpmsolver++"})
        return solver
    return scheduler


def _extrapolate_along(split: _Split, scheduler: Any, latents: Tensor, outputs: Tensor) -> None:
    """Let a multistep solver extrapolate along the edge, not along the step below it."""
    remembered = getattr(scheduler, "model_outputs", [])
    if all(row is None for row in remembered):
        return
    current = scheduler.convert_model_output(outputs, sample=latents)
    scheduler.model_outputs = [
        row if row is None else current + split.shortening * (row - current) for row in remembered
    ]


def _ddpm_std(scheduler: Any, timestep: Tensor) -> float | Tensor:
    """Standard deviation of DDPM's noise; 0 where it is only the floor under a logarithm."""
    if timestep <= 0:
        return 0.0
    variance: Tensor = scheduler._get_variance(timestep)
    if scheduler.variance_type == "fixed_small_log":  # is a deviation already
        return variance if variance > 1e-10 else 0.0
    return variance**0.5 if variance > 1e-20 else 0.0


# Memory of solvers, as a value


def _pack(value: Any, tensors: list[Tensor]) -> Hashable:
    """What a solver remembers, hashable: tensors of samples go to ``tensors``."""
    match value:
        case dict():
            return ("dict", *((name, _pack(each, tensors)) for name, each in value.items()))
        case list():
            return ("list", *(_pack(each, tensors) for each in value))
        case Tensor() if value.ndim > 0:
            tensors.append(value)
            return ("row", len(tensors) - 1)
        case Tensor():
            return ("number", value.item(), str(value.dtype).removeprefix("torch."))
    return value


def _unpack(packed: Any, rows: Sequence[Tensor]) -> Any:
    """The inverse of :func:`_pack`, of a batch."""
    match packed:
        case ("dict", *items):
            return {name: _unpack(each, rows) for name, each in items}
        case ("list", *items):
            return [_unpack(each, rows) for each in items]
        case ("row", number):
            return rows[number]
        case ("number", number, dtype):
            return torch.tensor(number, dtype=getattr(torch, dtype))
    return packed


def _noise(like: Tensor, seeds: Sequence[int]) -> Tensor:
    return randn_tensor(
        like.shape, generator=_generators(seeds), device=like.device, dtype=like.dtype
    )


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _by_group(keys: Sequence[Hashable], function: Callable[[list[int]], Tensor]) -> Tensor:
    """Apply ``function(rows)`` to the rows of each key, and put the answers in order."""
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    if len(groups) == 1:
        return function(list(range(len(keys))))
    return _in_order([function(rows) for rows in groups.values()], groups.values())


def _in_order(parts: Sequence[Tensor], rows: Iterable[Sequence[int]]) -> Tensor:
    """Concatenate ``parts``, whose rows belong at ``rows`` of the result."""
    together = torch.cat(list(parts))
    order = torch.tensor([row for part in rows for row in part], device=together.device)
    return torch.empty_like(together).index_copy_(0, order, together)
