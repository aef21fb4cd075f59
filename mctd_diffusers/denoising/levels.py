"""How much signal and how much noise a scheduler's samples hold, and the estimates that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mctd_diffusers.denoising.scheduler_traits import SchedulerTraits
from mctd_diffusers.denoising.views import Schedule


class NoiseLevels:
    """Factors of signal and noise, ``x = alpha x0 + sigma noise``, along a schedule.

    Args:
        scheduler: prepared, to read them off.
        traits: of its class.
        schedule: its points.
    """

    def __init__(self, scheduler: Any, traits: SchedulerTraits, schedule: Schedule) -> None:
        self._scheduler = scheduler
        self._traits = traits
        self._schedule = schedule

    @property
    def is_preserving(self) -> bool:
        """Whether the squares of the factors of signal and noise sum to 1."""
        levels = self._traits.levels
        if levels == "solver":
            return not self._scheduler.config.get("use_flow_sigmas", False)
        return levels in ("alphas", "sine")

    def factors(self, index: int) -> tuple[float | Tensor, Tensor]:
        """Factors of clean latents and of noise at a point of the schedule."""
        schedule = self._schedule
        match self._traits.levels:
            case "alphas":
                if index == self._schedule.num_steps:
                    final = getattr(self._scheduler, "final_alpha_cumprod", torch.tensor(1.0))
                    return final**0.5, (1 - final) ** 0.5
                alpha_squared = self._scheduler.alphas_cumprod[self._schedule.timesteps[index]]
                return alpha_squared**0.5, (1 - alpha_squared) ** 0.5
            case "sine":
                return schedule["alphas"][index], schedule["betas"][index]
            case "trigonometric":
                angle = schedule["timesteps"][index]
                return torch.cos(angle), torch.sin(angle) * self._scheduler.config.sigma_data
            case "flow":
                sigma = schedule["sigmas"][index]
                return 1 - sigma, sigma
            case "solver":
                alpha, sigma = self._scheduler._sigma_to_alpha_sigma_t(schedule["sigmas"][index])
                return alpha, sigma
        return 1.0, schedule["sigmas"][index]

    def signal_at(self, sigma: Tensor) -> float | Tensor:
        """Factor of clean latents where noise per signal is ``sigma``: 1 if variance explodes."""
        if self._traits.levels != "solver":
            return 1.0
        alpha: Tensor = self._scheduler._sigma_to_alpha_sigma_t(sigma)[0]
        return alpha

    def cleanest_ratio(self, ratios: Sequence[Tensor]) -> Tensor:
        """Signal to noise, squared, of the cleanest level that models are trained at."""
        if hasattr(self._scheduler, "alphas_cumprod"):
            cleanest = self._scheduler.alphas_cumprod[0].double()
            return cleanest / (1 - cleanest)
        # Not by attribute: diffusers warns of it where only the config has one.
        own, config = vars(self._scheduler), self._scheduler.config
        sigma = own.get("sigma_min") or config.get("sigma_min")
        if not sigma:
            return ratios[-1]
        sigma = torch.tensor(float(sigma), dtype=torch.float64)
        alpha = 1 - sigma if self._traits.levels == "flow" else 1
        return torch.maximum((alpha / sigma) ** 2, ratios[-1])

    def estimate(self, index: int, latents: Tensor, outputs: Tensor) -> Tensor:
        """The estimate by the formula of the prediction type."""
        alpha, sigma = self.factors(index)
        name = type(self._scheduler).__name__
        if name == "CMStochasticIterativeScheduler":
            skip, out = self._scheduler.get_scalings_for_boundary_condition(sigma)
            estimate = out * outputs + skip * latents
            return estimate.clamp(-1, 1) if self._scheduler.config.clip_denoised else estimate
        if name == "MiniMaxH3Scheduler":
            return latents + sigma * outputs
        prediction = self._scheduler.config.get("prediction_type", "flow_prediction")
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
