"""Running the trajectories of a shard, the jumps from their states, and siblings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mctd_diffusers.denoising.environment import LatentEnvironment
from mctd_diffusers.errors import SearchError
from mctd_diffusers.search.environment import FIRST_DRAW, Action, Handles
from mctd_diffusers.search.stride_policies import PURE_NOISE
from mctd_diffusers.trajectories.plan import LogSettings, Shard, class_and_settings, number_of


class Jumps(NamedTuple):
    """Deterministic jumps of one stride from the states at one step index, a row a trajectory.

    Attributes:
        step_index: of the grid.
        stride: steps of the grid.
        latents: where they arrived.
        denoised: the estimate there.
        truncation_error: rms difference of the latents from the fine path's, in
            variance-preserving units.
        estimate_error: rms difference of the denoised estimates.
        value: reward of the estimate there.
    """

    step_index: int
    stride: int
    latents: npt.NDArray[np.float16]
    denoised: npt.NDArray[np.float16]
    truncation_error: npt.NDArray[np.float32]
    estimate_error: npt.NDArray[np.float32]
    value: npt.NDArray[np.float64]


class Siblings(NamedTuple):
    """Draws of the stochastic edge of one stride from the states at one step index.

    Attributes:
        step_index: of the grid.
        stride: steps of the grid.
        denoised: ``[trajectories, siblings, size]`` estimates where they arrived.
        values: ``[trajectories, siblings]`` their rewards.
    """

    step_index: int
    stride: int
    denoised: npt.NDArray[np.float16]
    values: npt.NDArray[np.float64]


class _Leap(NamedTuple):
    """Jumps that are made and not yet compared."""

    step_index: int
    stride: int
    arrived: Handles


def run_shard(
    environment: LatentEnvironment, settings: LogSettings, shard: Shard, *, family: str
) -> dict[str, list[Any]]:
    """Run the trajectories of a shard side by side; returns the columns of its rows.

    Args:
        environment: with features, over the *fine* schedule, of which the grid's steps are strides;
            its images are the shard's trajectories.
        settings: of the split.
        shard: which part of it.
        family: class of the stock pipeline, which the rows name.
    """
    return _Run(environment, settings, shard, family).log()


class _Run:
    def __init__(
        self, environment: LatentEnvironment, settings: LogSettings, shard: Shard, family: str
    ) -> None:
        self.world = environment
        self.family = family
        self.settings = settings
        self.shard = shard
        self.edge = Action(shard.refinement)
        self.deterministic = not environment.stepper.is_stochastic(0, self.edge)
        self.jumps: list[Jumps] = []
        self.siblings: list[Siblings] = []

    def log(self) -> dict[str, list[Any]]:
        shard, world = self.shard, self.world
        count = len(shard.rows)
        state = world.reset(np.arange(count), np.full(count, FIRST_DRAW, dtype=np.int64))
        states: list[dict[str, Any]] = []
        leaps: list[_Leap] = []
        for step_index in range(shard.num_steps):
            world.denoise(state)
            states.append(self._read(state))
            leaps = self._land(leaps, step_index, state)
            if self.deterministic:
                leaps += self._leap(state, step_index)
            elif step_index in shard.probes:
                self._follow(self._leap(state, step_index), state)
            if step_index in shard.probes:
                self._draw_siblings(state, step_index)
            state = self._advance(state)
        self._land(leaps, shard.num_steps, state)
        final, rewards = _half(world.latents(state)), world.reward(state)
        world.release(state)
        return self._columns(states, final, rewards)

    def _read(self, state: Handles) -> dict[str, Any]:
        """What is logged of the states at one step index."""
        features = self.world.features(state)
        return {
            "latents": _half(self.world.latents(state)),
            "denoised": _half(self.world.denoised(state)),
            "value": self.world.value(state),
            "features": {name: _half(rows) for name, rows in features.items()},
        }

    def _advance(self, state: Handles) -> Handles:
        """One step of the grid: many fine ones, where that is the path that jumps approximate."""
        if not self.deterministic:
            return self._step(state, self.edge, forget=state)
        for fine in range(self.shard.refinement):
            if fine:
                self.world.denoise(state)
            state = self._step(state, Action(1), forget=state)
        return state

    def _step(
        self,
        parents: Handles,
        action: Action,
        *,
        draws: int = 1,
        forget: Handles | None = None,
    ) -> Handles:
        """``draws`` children of each trajectory, whose noise depends on their own place alone."""
        fine = self.world.step_indices(parents[:1])[0]
        seeds = [
            number_of(self.settings.seed, "edge", row, fine, *action[:2], draw) >> 1
            for row in self.shard.rows
            for draw in range(draws)
        ]
        made = self.world.step(np.repeat(parents, draws), [action] * len(seeds), np.array(seeds))
        if forget is not None:
            self.world.latents(made)  # makes them, while their parents are there
            self.world.release(forget)
        return made

    def _strides_at(self, step_index: int) -> list[int]:
        return [k for k in self.settings.strides if step_index + k <= self.shard.num_steps]

    def _leap(self, state: Handles, step_index: int) -> list[_Leap]:
        """Make the deterministic jump of every stride."""
        made = []
        for stride in self._strides_at(step_index):
            arrived = self._step(state, Action(stride * self.shard.refinement, eta=0.0))
            self.world.latents(arrived)
            made.append(_Leap(step_index, stride, arrived))
        return made

    def _follow(self, leaps: list[_Leap], state: Handles) -> None:
        """Compare jumps with a fine deterministic path from the states that they left."""
        path = state
        reach = max((leap.stride for leap in leaps), default=0) * self.shard.refinement
        for fine in range(1, reach + 1):
            self.world.denoise(path)
            forget = None if path is state else path
            path = self._step(path, Action(1, eta=0.0), forget=forget)
            stride, between = divmod(fine, self.shard.refinement)
            here = [leap for leap in leaps if leap.stride == stride and not between]
            if here:
                self._evaluate(path)
                self._land(here, here[0].step_index + stride, path)
        if path is not state:
            self.world.release(path)

    def _land(self, leaps: list[_Leap], step_index: int, reference: Handles) -> list[_Leap]:
        """Compare jumps that arrive at ``step_index`` with the fine path; returns the others."""
        world = self.world
        for start, stride, arrived in leaps:
            if start + stride != step_index:
                continue
            value = self._value(arrived)
            latents, denoised = world.latents(arrived), world.denoised(arrived)
            off = latents - world.latents(reference)
            here = world.step_indices(arrived[:1])[0]
            self.jumps.append(
                Jumps(
                    step_index=start,
                    stride=stride,
                    latents=_half(latents),
                    denoised=_half(denoised),
                    truncation_error=_rms(world.stepper.variance_preserving(off.float(), here)),
                    estimate_error=_rms(denoised - world.denoised(reference)),
                    value=value,
                )
            )
            world.release(arrived)
        return [leap for leap in leaps if leap.step_index + leap.stride != step_index]

    def _draw_siblings(self, state: Handles, step_index: int) -> None:
        draws = self.settings.siblings
        for stride in self._strides_at(step_index):
            if step_index + stride == self.shard.num_steps:
                continue  # the last edge is deterministic
            drawn = self._step(state, Action(stride * self.shard.refinement, 1.0), draws=draws)
            values = self._value(drawn).reshape(-1, draws)
            denoised = _half(self.world.denoised(drawn))
            self.siblings.append(
                Siblings(step_index, stride, denoised.reshape(len(state), draws, -1), values)
            )
            self.world.release(drawn)

    def _value(self, handles: Handles) -> npt.NDArray[np.float64]:
        """Rewards of finished samples; of the estimates of others, which are evaluated first."""
        if self._is_finished(handles):
            return self.world.reward(handles)
        self._evaluate(handles)
        return self.world.value(handles)

    def _evaluate(self, handles: Handles) -> None:
        if not self._is_finished(handles):
            self.world.denoise(handles)

    def _is_finished(self, handles: Handles) -> bool:
        return self.world.step_indices(handles[:1])[0] == self.world.num_steps

    def _columns(
        self,
        states: list[dict[str, Any]],
        final: npt.NDArray[np.float16],
        rewards: npt.NDArray[np.float64],
    ) -> dict[str, list[Any]]:
        shard, settings, stepper = self.shard, self.settings, self.world.stepper
        count = len(shard.rows)
        grid = list(range(0, self.world.num_steps + 1, shard.refinement))
        same = {
            "family": self.family,
            "scheduler": class_and_settings(shard.scheduler),
            "eta": shard.scheduler.eta or 0.0,
            "num_steps": shard.num_steps,
            "guidance_scale": settings.guidance_scale,
            "latent_shape": list(self.world.sample_shape),
            "timestep": stepper.timesteps[grid[:-1]].float().numpy(),
            "log_snr": stepper.log_snr[grid].clamp(min=PURE_NOISE).numpy(),
        }
        return {
            "index": list(shard.rows),
            "prompt": [settings.prompts[prompt] for prompt in shard.prompts],
            "prompt_index": list(shard.prompts),
            "seed": list(shard.seeds),
            **{name: [entry] * count for name, entry in same.items()},
            "latents": [[state["latents"][row] for state in states] for row in range(count)],
            "denoised": [[state["denoised"][row] for state in states] for row in range(count)],
            "value": [[state["value"][row] for state in states] for row in range(count)],
            "features": [
                {
                    name: [state["features"][name][row] for state in states]
                    for name in states[0]["features"]
                }
                for row in range(count)
            ],
            "final_latents": list(final),
            "reward": rewards.tolist(),
            "jumps": [_of(Jumps, self.jumps, row) for row in range(count)],
            "siblings": [_of(Siblings, self.siblings, row) for row in range(count)],
        }


def _of(
    kind: type[Jumps] | type[Siblings], parts: Sequence[Jumps] | Sequence[Siblings], row: int
) -> dict[str, list[Any]]:
    """The jumps or siblings of one trajectory, as columns."""
    ordered = sorted(parts, key=lambda part: (part.step_index, part.stride))
    return {
        name: [
            entry if isinstance(entry, int) else entry[row]
            for entry in (getattr(part, name) for part in ordered)
        ]
        for name in kind._fields
    }


def _half(rows: Tensor) -> npt.NDArray[np.float16]:
    """``[batch, size]`` on the host, in half precision.

    Raises:
        SearchError: a number is not finite, or too large for half precision.
    """
    halves: npt.NDArray[np.float16] = rows.flatten(1).half().cpu().numpy()
    if not np.isfinite(halves).all():
        largest = float(rows.abs().max())
        raise SearchError(
            f"numbers to be logged reach {largest:g}, and half precision holds finite ones up to "
            f"{np.finfo(np.float16).max:g}: load the model in single precision, or leave this "
            "scheduler or model out"
        )
    return halves


def _rms(difference: Tensor) -> npt.NDArray[np.float32]:
    errors: npt.NDArray[np.float32] = (
        difference.float().flatten(1).square().mean(1).sqrt().cpu().numpy()
    )
    return errors
