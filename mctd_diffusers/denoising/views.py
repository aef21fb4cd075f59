"""Views of a scheduler: clones whose schedule is cut down to the points that one sample visits.

A stride of ``k`` is one step of the stock scheduler on such a view: the points that it visited, the
current one, the target, and beyond it the points that strides of the same length would visit. A
multistep solver then sees the noise levels really visited, and a constant stride is the stock
scheduler set to every k-th point.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mctd_diffusers.denoising.scheduler_traits import SchedulerTraits
from mctd_diffusers.errors import ScheduleError


@dataclass(frozen=True)
class View:
    """A clone of a scheduler, cut down to the points of one edge.

    Attributes:
        scheduler: the clone; what it mutates in a step is set before each.
        position: the current point's place in the view, in steps of the clone.
        timestep: the current timestep, 0-d, as the stock loop passes it.
        midpoint: the timestep of the second call; ``None`` where one is enough.
        arguments: further arguments of its step.
    """

    scheduler: Any
    position: int
    timestep: Tensor
    midpoint: Tensor | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def enter(self, *, midway: bool = False) -> None:
        """Let the clone stand at the view's point, or midway to its target."""
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = self.position + midway


class Schedule:
    """The points of a prepared scheduler, and its views.

    Args:
        scheduler: on which ``set_timesteps`` was called; left alone.
        traits: of its class.

    Attributes:
        num_steps: number of its steps.
        timesteps: what the network is conditioned on at each, on the CPU.

    Raises:
        ScheduleError: ``set_timesteps`` was not called.
    """

    def __init__(self, scheduler: Any, traits: SchedulerTraits) -> None:
        is_set = getattr(scheduler, "num_inference_steps", None) is not None
        if not is_set and not getattr(scheduler, "custom_timesteps", False):
            raise ScheduleError(
                f"the {type(scheduler).__name__} has no schedule yet; call "
                "`scheduler.set_timesteps(num_inference_steps)` first."
            )
        self._traits = traits
        self._scheduler = scheduler
        self._calls = 2 if traits.grid == "two calls" else 1
        timesteps = scheduler.timesteps.cpu()
        self._values: dict[str, Tensor] = {
            name: getattr(scheduler, name).cpu() for name in traits.schedule
        }
        if self._calls == 2:  # points are interleaved with midpoints; the last is the finished one
            self.num_steps = (len(timesteps) + 1) // 2
            sigmas = self._values["sigmas"]
            self._values["sigmas"] = torch.cat([sigmas[: 2 * self.num_steps : 2], sigmas[-1:]])
        elif "sigmas" in self._values:
            self.num_steps = len(self._values["sigmas"]) - 1
        else:
            self.num_steps = len(timesteps) - (traits.levels == "trigonometric")
        self._interleaved = timesteps
        self.timesteps = timesteps[:: self._calls][: self.num_steps]
        self._values["timesteps"] = timesteps[:: self._calls]

    def __getitem__(self, name: str) -> Tensor:
        """What the scheduler holds at each point: ``"sigmas"``, ``"alphas"``, ..."""
        return self._values[name]

    def place(self, index: int) -> int:
        """A point's place among the steps of the stock loop."""
        return self._calls * index

    def target_timestep(self, target: int) -> int:
        """The timestep at a point; -1 is the finished sample."""
        return int(self.timesteps[target]) if target < self.num_steps else -1

    def view(self, scheduler: Any, visited: Sequence[int], index: int, stride: int) -> View:
        """A view for the edge of ``stride`` from the point at ``index``.

        Args:
            scheduler: the prepared one, or a relative of it on the same schedule.
            visited: earlier points that the solver looks at, oldest first.
            index: of the current point.
            stride: at most the steps left.
        """
        clone = copy.copy(scheduler)
        if self._calls == 2:
            return self._with_midpoint(clone, index, index + stride)
        if not self._traits.schedule:
            return View(clone, index, self.timesteps[index])
        points = [*visited, index, *range(index + stride, self.num_steps, stride)]
        for name, values in self._values.items():
            is_finished_there = len(values) > self.num_steps
            places = [*points, self.num_steps] if is_finished_there else points
            setattr(clone, name, values[places])
        if hasattr(clone, "num_inference_steps"):
            clone.num_inference_steps = len(points)
        if hasattr(clone, "get_order_list"):
            clone.order_list = clone.get_order_list(len(points))
        timestep = self.timesteps[index]
        if self._traits.grid == "target":
            target = torch.tensor(self.target_timestep(index + stride))
            return View(clone, len(visited), timestep, arguments={"prev_timestep": target})
        return View(clone, len(visited), timestep)

    def _with_midpoint(self, clone: Any, index: int, target: int) -> View:
        """A view of two points, whose edge may need the network at a midpoint."""
        sigmas = self._values["sigmas"]
        sigma, sigma_next = sigmas[index], sigmas[target]
        timestep = self.timesteps[index]
        clone.timesteps = timestep[None]
        clone.sigmas = torch.stack([sigma, sigma_next, sigma_next])
        is_last = target == self.num_steps
        midpoint = None if is_last else self._interleaved[2 * index + 1]
        match type(clone).__name__:
            case "HeunDiscreteScheduler" | "FlowMatchHeunDiscreteScheduler":
                midpoint = None if is_last else self.timesteps[target]
            case "KDPM2DiscreteScheduler":
                between = self._between(sigma_next, sigma)
                if target == index + 1:
                    between = self._scheduler.sigmas_interpol[2 * index + 1].cpu()
                elif midpoint is not None:
                    midpoint = self._timestep_at(clone, between)
                clone.sigmas_interpol = between.expand(3)
            case "KDPM2AncestralDiscreteScheduler":
                up, down = ancestral_split(sigma, sigma_next, 1.0)
                between = down if is_last else self._between(sigma, down)
                if target == index + 1:
                    between = self._scheduler.sigmas_interpol[2 * index].cpu()
                    up, down = (
                        values[2 * index].cpu()
                        for values in (self._scheduler.sigmas_up, self._scheduler.sigmas_down)
                    )
                elif midpoint is not None:
                    midpoint = self._timestep_at(clone, between)
                clone.sigmas = sigma.expand(3)
                clone.sigmas_interpol = between.expand(3)
                clone.sigmas_up, clone.sigmas_down = up.expand(3), down.expand(3)
            case "DPMSolverSDEScheduler":
                if midpoint is not None and target > index + 1:
                    ends = torch.stack([sigma, sigma_next]).double().numpy()
                    found = clone._second_order_timesteps(ends, _log_sigmas(clone))
                    midpoint = torch.as_tensor(found[0], dtype=midpoint.dtype)
        return View(clone, 0, timestep, midpoint)

    def _between(self, one: Tensor, other: Tensor) -> Tensor:
        """The geometric mean of two levels, written as the stock schedulers write it."""
        return one.log().lerp(other.log(), 0.5).exp()

    def _timestep_at(self, clone: Any, sigma: Tensor) -> Tensor:
        found = clone._sigma_to_t(sigma.numpy(), _log_sigmas(clone))
        return torch.as_tensor(found, dtype=self.timesteps.dtype)


class BrownianEdge:
    """Noise of an edge that asks for it twice: to the midpoint, and over the whole edge.

    Increments of one Brownian path in the noise level, divided by the roots of their lengths; the
    path is drawn for each edge from its seed, in place of torchsde's path over the whole schedule.

    Args:
        generators: one for each sample.
        like: the samples.
        midpoint: level of the midpoint, once it is behind; else ``None``.
    """

    def __init__(
        self, generators: list[torch.Generator], like: Tensor, midpoint: Tensor | None
    ) -> None:
        self._generators = generators
        self._like = like
        self._midpoint = midpoint

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Standard normal noise for the way from ``sigma`` to ``sigma_next``."""
        first = self._draw()
        if self._midpoint is None:
            return first
        behind = (sigma - self._midpoint) / (sigma - sigma_next)
        return behind.sqrt() * first + (1 - behind).sqrt() * self._draw()

    def _draw(self) -> Tensor:
        like = self._like
        return randn_tensor(
            like.shape, generator=self._generators, device=like.device, dtype=like.dtype
        )


def land_at(scheduler: Any, timestep: int, landing: int) -> None:
    """Make a scheduler of constant steps go from ``timestep`` to ``landing``.

    It derives where it lands from two numbers of its own.
    """
    scheduler.num_inference_steps = 1
    scheduler._internal_dict = FrozenDict(
        {**scheduler.config, "num_train_timesteps": timestep - landing}
    )


def ancestral_split(sigma: Tensor, target: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Noise to add, and level to step down to before, so as to end at ``target``.

    Ancestral sampling as k-diffusion splits it (``get_ancestral_step``), written as EulerAncestral
    writes it, for equal bits.
    """
    up = eta * (target**2 * (sigma**2 - target**2) / sigma**2) ** 0.5
    return up, (target**2 - up**2) ** 0.5


def _log_sigmas(scheduler: Any) -> Any:
    """Logarithms of the levels that models are trained at, noisiest last."""
    alphas = scheduler.alphas_cumprod
    return np.log(np.array(((1 - alphas) / alphas) ** 0.5))
