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

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Num
from torch import Tensor

from mctd_diffusers.denoising.edges import Edge, Edges, extrapolate_along, noise_of
from mctd_diffusers.denoising.schedulers import check_scheduler, traits_of
from mctd_diffusers.denoising.solver_memory import SolverMemory, SolverState
from mctd_diffusers.denoising.views import Schedule
from mctd_diffusers.errors import ConfigError, ScheduleError
from mctd_diffusers.search.environment import Action

Randomness: TypeAlias = Literal["none", "own", "injected"]
"""Where an edge's noise comes from: it has none, the scheduler draws it, or it is added to a
deterministic step."""


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
        self._name = type(scheduler).__name__
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
        self._memory = SolverMemory(scheduler, self._traits)
        self._edges = Edges(scheduler, self._traits, self._schedule, self._memory, self.eta)
        self._levels = self._edges.levels
        self._scales_input = self._traits.levels == "exploding"
        self.num_steps = self._last - begin_index
        self.timesteps: Num[Tensor, " steps"] = self._schedule.timesteps[begin_index:]
        self.calls_per_step = 2 if self._traits.grid == "two calls" else 1
        self.longest_stride = self._traits.longest_stride(scheduler)

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """Standard deviation of the initial noise, as the stock pipeline multiplies it in."""
        sigma: float | Tensor = getattr(self._edges.own, "init_noise_sigma", 1.0)
        return sigma

    @property
    def alphas_cumprod(self) -> Float[Tensor, " timesteps"]:
        """Signal share ``alpha^2`` at each timestep that the model is trained at.

        Raises:
            ScheduleError: the scheduler has none (flow matching, EDM).
        """
        if not hasattr(self._edges.own, "alphas_cumprod"):
            raise ScheduleError(
                f"{self._name} has no alphas_cumprod: its levels are no function of trained "
                "timesteps; use a scheduler such as DDIMScheduler."
            )
        alphas: Tensor = self._edges.own.alphas_cumprod.cpu()
        return alphas

    @functools.cached_property
    def log_snr(self) -> Float[Tensor, " points"]:
        """Log signal-to-noise ratio at each step and, last, of the finished sample.

        ``2 log(alpha / sigma)``. That of a finished sample is the ratio of the cleanest level that
        models are trained at, where the schedule itself would say infinity.
        """
        ratios = [
            (torch.as_tensor(alpha).double() / sigma.double()).square().cpu()
            for alpha, sigma in map(self._levels.factors, range(self._begin, self._last))
        ]
        return torch.stack([*ratios, self._levels.cleanest_ratio(ratios)]).log().float()

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
        alpha, sigma = self._levels.factors(self._begin + step_index)
        total = torch.as_tensor(alpha) ** 2 + sigma**2
        return latents if self._levels.is_preserving else latents / total.sqrt()

    def initial_state(self, step_index: int = 0) -> SolverState:
        """State of a sample that begins at ``step_index``, with nothing behind it."""
        self._check_unfinished(step_index)
        visited = self._memory.points(range(self._begin + step_index))
        return SolverState(step_index, visited, (), self._memory.blank)

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
                f"stride is {action.stride}, but {self._name} can only be stepped by strides up to "
                f"{self.longest_stride} ({self._traits.note}); use those, or another scheduler."
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
        if self._edges.draws and action.eta in (None, 1):
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
        return float(self._levels.factors(self._begin + step_index)[1])

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
        outputs: Float[Tensor, "batch *output"],
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
        alpha, sigma = self.factors(step_index)
        return denoised * alpha + noise * sigma, [self.restarted(step_index)] * len(denoised)

    def factors(self, step_index: int) -> tuple[float | Tensor, Tensor]:
        """Factors of clean latents and of standard normal noise in samples at ``step_index``."""
        return self._levels.factors(self._begin + step_index)

    def restarted(self, step_index: int) -> SolverState:
        """Where a solver stands that begins anew at ``step_index``, and remembers nothing."""
        state = self.initial_state(step_index)
        return replace(state, visited=()) if self._traits.restarts_empty else state

    def step(
        self,
        latents: Float[Tensor, "batch *sample"],
        outputs: Float[Tensor, "batch *output"],
        states: Sequence[SolverState],
        actions: Sequence[Action],
        seeds: Sequence[int],
    ) -> tuple[Float[Tensor, "batch *sample"], list[SolverState]]:
        """Cross one edge for each sample, or its first half where it takes a second call.

        Args:
            latents: samples, unscaled.
            outputs: the (guided) network outputs for them, with the variance beside where the
                network predicts it.
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
        outputs: Float[Tensor, "batch *output"],
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
            extrapolate_along(edge.split, view.scheduler, latents, outputs)
        stepped = self._edges.stock_step(edge, latents, outputs, seeds)
        if edge.split is not None:
            noise = noise_of(outputs, seeds)
            # In single precision, as EulerAncestral does it.
            stepped = (stepped.float() * edge.split.rescale + noise * edge.noise_std).to(
                stepped.dtype
            )
        is_midway = view.midpoint is not None and first.midway is None
        return stepped, self._states_after(view.scheduler, states, action, is_midway=is_midway)

    def _renoised_step(
        self,
        edge: Edge,
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
            stepped = stepped + std * noise_of(outputs, seeds)
        after = step_index + action.stride
        state = SolverState(after, (), (), self._memory.blank)
        if after < self.num_steps and not self._traits.restarts_empty:
            state = self.initial_state(after)
        return stepped.to(outputs.dtype), [state] * len(states)

    def _remind(self, scheduler: Any, states: Sequence[SolverState], action: Action) -> None:
        """Give a solver what it remembers of these samples."""
        first = states[0]
        memory = first.memory
        if self._traits.equal_spacing and first.visited:
            spacing = self._begin + first.step_index - first.visited[-1]
            memory = memory if spacing == action.stride else self._memory.blank
        self._memory.put(scheduler, memory, [state.history for state in states])

    def _states_after(
        self, scheduler: Any, states: Sequence[SolverState], action: Action, *, is_midway: bool
    ) -> list[SolverState]:
        """What a solver that stepped these samples remembers of each; it forgets them itself."""
        first = states[0]
        memory, tensors = self._memory.take(scheduler)
        index = first.step_index + action.stride
        if is_midway:
            after = replace(first, memory=memory, midway=action)
        elif index == self.num_steps:  # nothing steps on from there
            return [SolverState(index, (), (), self._memory.blank)] * len(states)
        else:
            visited = self._memory.points((*first.visited, self._begin + first.step_index))
            after = SolverState(index, visited, (), memory)
        if not tensors:
            return [replace(after, history=())] * len(states)
        # Cloned, or one row would keep the memory of all.
        return [
            replace(after, history=tuple(row.clone() for row in rows))
            for rows in zip(*(tensor.unbind() for tensor in tensors), strict=True)
        ]

    def _edge(self, state: SolverState, action: Action) -> Edge:
        index = self._begin + state.step_index
        return self._edges.edge(state.visited, index, action.stride, action.eta)

    # Levels

    def _scaled(self, states: Sequence[SolverState], latents: Tensor) -> Tensor:
        first = states[0]
        if first.midway is not None:
            view = self._edge(first, first.midway).view
            view.enter(midway=True)
            self._remind(view.scheduler, states, first.midway)
            return view.scheduler.scale_model_input(latents, _there(view.midpoint))
        scheduler = self._edges.own
        scheduler._step_index = self._schedule.place(self._begin + first.step_index)
        return scheduler.scale_model_input(latents, self.timesteps[first.step_index])

    def _denoised_at(self, step_index: int, latents: Tensor, outputs: Tensor) -> Tensor:
        return self._edges.estimate(self._begin + step_index, latents, outputs)

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
