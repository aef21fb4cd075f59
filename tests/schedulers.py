"""Schedulers as the tests want them: set up, and a network to run them on."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor

# As Stable Diffusion 1.5 sets them up, but with the spacing whose cuts are again such spacings.
COMMON = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddim-eta": (DDIMScheduler, {"clip_sample": False}),
    "ddim-clip": (DDIMScheduler, {"clip_sample": True, "set_alpha_to_one": False}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "ddpm-large": (DDPMScheduler, {"clip_sample": True, "variance_type": "fixed_large"}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++-min": (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
    "dpm++-1": (DPMSolverMultistepScheduler, {"solver_order": 1}),
    "sde-dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
}
ETAS = {"ddim-eta": 0.7}


def make_scheduler(name: str, num_steps: int = 0, **settings: Any) -> Any:
    """The scheduler of that name, with its schedule set where `num_steps` is given."""
    kind, own = SCHEDULERS[name]
    scheduler = kind(**{**COMMON, **own, **settings})
    if num_steps:
        scheduler.set_timesteps(num_steps)
    return scheduler


def network(inputs: Tensor, timesteps: Tensor) -> Tensor:
    """Not linear, and without a sum over rows or pixels: its bits know nothing of the batch."""
    times = (timesteps.to(inputs.dtype) / 1000).reshape(-1, *[1] * (inputs.ndim - 1))
    return 0.6 * inputs + 0.3 * times - 0.4 * inputs / (1 + inputs * inputs)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stock_loop(
    scheduler: Any, latents: Tensor, seeds: list[int], eta: float = 0.0, begin: int = 0
) -> Tensor:
    """The loop of a stock pipeline, whose step `i` draws from a generator seeded by `seeds[i]`."""
    for i, timestep in enumerate(scheduler.timesteps[begin:]):
        inputs = scheduler.scale_model_input(latents, timestep)
        output = network(inputs, timestep)
        extra: dict[str, Any] = {"generator": torch.Generator().manual_seed(seeds[i])}
        if isinstance(scheduler, DDIMScheduler):
            extra["eta"] = eta
        latents = scheduler.step(output, timestep, latents, return_dict=False, **extra)[0]
    return latents
