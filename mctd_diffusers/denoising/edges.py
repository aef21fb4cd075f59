"""How edges are crossed: by which clone of the scheduler, and where their noise comes from."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mctd_diffusers.denoising.levels import NoiseLevels
from mctd_diffusers.denoising.scheduler_traits import LEARNED, SchedulerTraits
from mctd_diffusers.denoising.solver_memory import SolverMemory
from mctd_diffusers.denoising.views import BrownianEdge, Schedule, View, ancestral_split, land_at

_MAX_EDGES = 4096
_NO_NOISE = 1e-5  # of rounding, where a scheduler adds the root of a difference that should be 0


@dataclass(frozen=True)
class Split:
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
class Renoising:
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
class Edge:
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
    split: Split | None = None
    renoising: Renoising | None = None


class Edges:
    """The edges of a prepared scheduler; each is made once, since many samples cross it.

    Args:
        scheduler: on which ``set_timesteps`` was called; copied, not changed.
        traits: of its class.
        schedule: its points.
        memory: what it remembers.
        eta: the user's ``eta``, for edges that name none.

    Attributes:
        own: the clone that levels are read off.
        plain: its deterministic relative, itself where it has none.
        levels: factors of signal and noise.
        draws: whether its own step draws noise.
    """

    def __init__(
        self,
        scheduler: Any,
        traits: SchedulerTraits,
        schedule: Schedule,
        memory: SolverMemory,
        eta: float,
    ) -> None:
        self.own = _prepared(scheduler)
        self.plain = _deterministic_companion(self.own)
        self.levels = NoiseLevels(self.own, traits, schedule)
        self.draws = traits.draws(scheduler)
        self._eta = eta
        self._traits = traits
        self._schedule = schedule
        self._memory = memory
        self._splits = _splits(self.own, traits)
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self._edges: dict[Hashable, Edge] = {}

    def edge(self, visited: tuple[int, ...], index: int, stride: int, eta: float | None) -> Edge:
        """How to cross an edge.

        Args:
            visited: earlier points that the solver looks at.
            index: of the current point.
            stride: at most the steps left.
            eta: share of noise; ``None`` is the user's own.
        """
        key = (index, visited, stride, eta)
        edge = self._edges.get(key)
        if edge is None:
            if len(self._edges) >= _MAX_EDGES:
                self._edges.clear()
            edge = self._edges[key] = self._make(visited, index, stride, eta)
        return edge

    def stock_step(
        self, edge: Edge, latents: Tensor, outputs: Tensor, seeds: Sequence[int]
    ) -> Tensor:
        """One step of the clone, which stands where it should and remembers what it should."""
        scheduler = edge.view.scheduler
        if not reads_variance(scheduler):
            outputs = without_variance(outputs, latents)
        arguments = dict(edge.view.arguments)
        if edge.draws and self._takes_generator:
            arguments["generator"] = generators(seeds)
        if edge.draws and hasattr(scheduler, "noise_sampler"):
            midpoint = getattr(scheduler, "mid_point_sigma", None)
            scheduler.noise_sampler = BrownianEdge(generators(seeds), latents, midpoint)
        timestep = edge.view.timestep
        stepped: Tensor = scheduler.step(
            outputs, timestep, latents, return_dict=False, **arguments
        )[0]
        return stepped

    def estimate(self, index: int, latents: Tensor, outputs: Tensor) -> Tensor:
        """The scheduler's own denoised estimate at a point, clipped where it clips."""
        outputs = without_variance(outputs, latents)
        match self._traits.estimate:
            case "convert":
                self.plain._step_index = index
                estimate = self.plain.convert_model_output(outputs, sample=latents)
            case "formula":
                estimate = self.levels.estimate(index, latents, outputs)
            case "step":
                estimate = self._estimate_of_step(index, latents, outputs)
        return estimate.to(outputs.dtype)

    def _estimate_of_step(self, index: int, latents: Tensor, outputs: Tensor) -> Tensor:
        """What a step says of it, from the part that draws no noise."""
        edge = self._estimating(index)
        edge.view.enter()
        arguments = dict(edge.view.arguments)
        if edge.draws:
            arguments["generator"] = generators([0] * len(latents))
        if hasattr(edge.view.scheduler, "noise_sampler"):  # or it makes one, for this batch alone
            edge.view.scheduler.noise_sampler = BrownianEdge(
                generators([0] * len(latents)), latents, None
            )
        step = edge.view.scheduler.step(outputs, edge.view.timestep, latents, **arguments)
        self._memory.clear(edge.view.scheduler)
        estimate: Tensor | None = getattr(step, "pred_original_sample", None)
        return step.denoised if estimate is None else estimate

    def _estimating(self, index: int) -> Edge:
        """An edge of stride 1 to read the estimate off, without noise where that can be."""
        key = ("estimate", index)
        if key not in self._edges:
            view = self._schedule.view(self.plain, (), index, 1)
            if self._traits.grid == "constant" or isinstance(self.plain, DDIMScheduler):
                land_at(view.scheduler, int(view.timestep), self._landing(index, 1))
            self._edges[key] = Edge(view, self._takes_generator, 0.0)
        return self._edges[key]

    def _make(self, visited: tuple[int, ...], index: int, stride: int, eta: float | None) -> Edge:
        is_own = self.draws and eta in (None, 1)
        scheduler = self.own if is_own else self.plain
        view = self._schedule.view(scheduler, visited, index, stride)
        share = self._eta if eta is None else float(eta)
        if self._traits.takes_eta and self._traits.grid == "points":
            view = replace(view, arguments={"eta": share})
            return self._drawing_edge(view) if share > 0 else Edge(view, False, 0.0)
        if self._traits.takes_eta or isinstance(scheduler, DDIMScheduler):
            return self._ddim_edge(view, index, stride, share)
        if self._traits.grid == "constant":
            land_at(view.scheduler, int(view.timestep), self._landing(index, stride))
        if is_own:
            return self._drawing_edge(view)
        share = float(eta or 0.0)
        if share == 0 and (not self.draws or self.plain is not self.own):
            return Edge(view, False, 0.0)
        if self._splits:
            return self._split_edge(view, share)
        return self._renoising_edge(view, index, stride, share)

    def _drawing_edge(self, view: View) -> Edge:
        """A step of a scheduler that draws its noise itself."""
        edge = Edge(view, True, 0.0)
        return replace(edge, noise_std=self._drawn_std(edge))

    def _ddim_edge(self, view: View, index: int, stride: int, share: float) -> Edge:
        """A step of DDIM, which takes the share of noise as an argument."""
        timestep, landing = int(view.timestep), self._landing(index, stride)
        land_at(view.scheduler, timestep, landing)
        alphas, final = view.scheduler.alphas_cumprod, view.scheduler.final_alpha_cumprod
        variance = view.scheduler._get_variance(timestep, landing)
        if 1 - (alphas[landing] if landing >= 0 else final) - (share * variance**0.5) ** 2 < 0:
            share *= 1 - 1e-6  # from a signal of zero nothing but noise is left, to rounding
        std = share * variance**0.5
        return Edge(replace(view, arguments={"eta": share}), share > 0, std)

    def _split_edge(self, view: View, eta: float) -> Edge:
        """A step to a lower level, and noise up from there."""
        sigmas = view.scheduler.sigmas
        sigma, target = sigmas[view.position : view.position + 2].clone()
        up, down = ancestral_split(sigma, target, eta)
        alpha = self.levels.signal_at(target)
        if up == 0:
            return Edge(view, False, alpha * up)
        sigmas[view.position + 1] = down
        shortening = torch.log(sigma / target) / torch.log(sigma / down)
        return Edge(
            view, False, alpha * up, split=Split(alpha / self.levels.signal_at(down), shortening)
        )

    def _renoising_edge(self, view: View, index: int, stride: int, eta: float) -> Edge:
        alpha, sigma = self.levels.factors(index)
        alpha_next, sigma_next = self.levels.factors(index + stride)
        ratio = sigma_next * alpha / (alpha_next * sigma)
        # Between equal levels the rest may be below 0, by rounding.
        std = eta * sigma_next * torch.as_tensor(1 - ratio**2).clamp(min=0) ** 0.5
        renoising = Renoising((alpha, alpha_next), (sigma, sigma_next))
        return Edge(view, False, std, renoising=renoising)

    def _landing(self, index: int, stride: int) -> int:
        """The timestep that a stride ends at; below 0 it is the finished sample."""
        if self._traits.grid != "constant":  # DDIM in the place of DDPM lands on its timesteps
            return self._schedule.target_timestep(index + stride)
        # The stock scheduler steps by a constant, even where its timesteps do not: land where it
        # lands after as many steps of its own.
        constant = self.own.config.num_train_timesteps // self.own.num_inference_steps
        return int(self._schedule.timesteps[index + stride - 1]) - constant

    def _drawn_std(self, edge: Edge) -> float | Tensor:
        """Standard deviation of the noise that the scheduler draws on an edge."""
        scheduler = edge.view.scheduler
        if isinstance(scheduler, DDPMScheduler):
            return _ddpm_std(scheduler, edge.view.timestep)
        if self._splits:
            sigma, target = scheduler.sigmas[edge.view.position : edge.view.position + 2]
            return self.levels.signal_at(target) * ancestral_split(sigma, target, 1.0)[0]
        std = self._measured_std(edge)
        return math.nan if std and not self._traits.adds_noise else std

    def _measured_std(self, edge: Edge) -> float:
        """The same, as the difference of two steps shows it by that of their noises."""
        shape = (1, 4, 8, 8)
        ends, noises = [], []
        for seed in (0, 1):
            latents = torch.zeros(shape)
            scheduler = edge.view.scheduler
            self._memory.clear(scheduler)
            for midway in (False, True) if edge.view.midpoint is not None else (False,):
                edge.view.enter(midway=midway)
                latents = self.stock_step(edge, latents, torch.zeros(shape), [seed])
            ends.append(latents.double())
            noises.append(noise_of(torch.zeros(shape), [seed]).double())
        moved, by = ends[0] - ends[1], noises[0] - noises[1]
        std = float((moved * by).sum() / (by * by).sum())
        return std if std > _NO_NOISE else 0.0


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


def extrapolate_along(split: Split, scheduler: Any, latents: Tensor, outputs: Tensor) -> None:
    """Let a multistep solver extrapolate along the edge, not along the step below it."""
    remembered = getattr(scheduler, "model_outputs", [])
    if all(row is None for row in remembered):
        return
    current = scheduler.convert_model_output(outputs, sample=latents)
    scheduler.model_outputs = [
        row if row is None else current + split.shortening * (row - current) for row in remembered
    ]


def reads_variance(scheduler: Any) -> bool:
    """Whether a step takes the variance from the network, beside what it predicts."""
    is_ddpm = isinstance(scheduler, DDPMScheduler)  # others may have the entry from its config
    return is_ddpm and scheduler.config.variance_type in LEARNED


def without_variance(outputs: Tensor, latents: Tensor) -> Tensor:
    """A network's outputs less the variance that some predict in as many channels beside them."""
    channels = latents.shape[1]
    return outputs[:, :channels] if outputs.shape[1] == 2 * channels else outputs


def _ddpm_std(scheduler: Any, timestep: Tensor) -> float | Tensor:
    """Standard deviation of DDPM's noise; 0 where it is only the floor under a logarithm.

    NaN where the network says it, for each number of the sample.
    """
    if timestep <= 0:
        return 0.0
    if reads_variance(scheduler):
        return math.nan
    variance: Tensor = scheduler._get_variance(timestep)
    if scheduler.variance_type == "fixed_small_log":  # is a deviation already
        return variance if variance > 2e-10 else 0.0
    return variance**0.5 if variance > 1e-20 else 0.0


def noise_of(like: Tensor, seeds: Sequence[int]) -> Tensor:
    """Standard normal noise of a batch, each row of its own seed."""
    return randn_tensor(
        like.shape, generator=generators(seeds), device=like.device, dtype=like.dtype
    )


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator on the CPU for each seed, so that noise is the same on every device."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]
