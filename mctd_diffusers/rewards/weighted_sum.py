"""Several rewards in one: a weighted sum of standardised parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.protocols import RewardFn
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.rewards.calls import call_reward, raw_rewards, reward_name


@dataclass(frozen=True)
class WeightedPart:
    """One reward of a sum, with the constants that put it on a common scale.

    Attributes:
        reward: the part.
        weight: its weight in the sum, in standard deviations; negative to avoid what it likes.
        mean: what counts as an ordinary reward, in reward units.
        std: what counts as a large difference, in reward units, above 0.

    Raises:
        ConfigError: a number is not finite, or ``std`` is not above 0.
    """

    reward: RewardFn
    weight: float
    mean: float
    std: float

    def __post_init__(self) -> None:
        for name in ("weight", "mean", "std"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(
                    f"{name}={getattr(self, name)} of reward '{reward_name(self.reward)}' is not "
                    "finite"
                )
        if self.std <= 0:
            raise ConfigError(
                f"std={self.std} of reward '{reward_name(self.reward)}' must be above 0: "
                "state the spread of this reward over ordinary pictures, or use WeightedSum.fit"
            )


@dataclass(frozen=True)
class WeightedSum:
    """The sum of ``weight * (reward - mean) / std`` over parts.

    The constants are stated, or fitted once to example pictures; they never follow the batch that
    is being scored, so the same picture has the same reward in any company.

    Attributes:
        parts: the rewards with their weights and scales; at least one.

    Raises:
        ConfigError: there are no parts.
    """

    parts: tuple[WeightedPart, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("parts=(): a weighted sum needs at least one reward")

    @classmethod
    def fit(
        cls,
        rewards: Sequence[RewardFn],
        weights: Sequence[float],
        *,
        images: Float[Tensor, "examples 3 height width"],
        prompts: Sequence[str],
    ) -> WeightedSum:
        """Fit means and standard deviations to example pictures, once.

        Args:
            rewards: the parts.
            weights: one for each reward.
            images: examples of what the search will see (a few dozen plain samples), in [0, 1].
            prompts: one for each example.

        Returns:
            A sum whose parts have mean 0 and standard deviation 1 over the examples, before
            weighting.

        Raises:
            ConfigError: numbers of rewards and weights differ, or a reward is constant on the
                examples.
            RewardError: a reward fails on the examples.
        """
        if len(rewards) != len(weights):
            raise ConfigError(
                f"{len(rewards)} rewards and {len(weights)} weights: pass one weight each"
            )
        parts = []
        for reward, weight in zip(rewards, weights, strict=True):
            values = call_reward(reward, images, prompts, range(len(images)))
            parts.append(WeightedPart(reward, weight, float(values.mean()), float(values.std())))
        return cls(tuple(parts))

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """Return the weighted sum for each picture; a NaN of a part makes its sum NaN."""
        total = torch.zeros(len(images), dtype=torch.float64)
        for part in self.parts:
            values = torch.from_numpy(raw_rewards(part.reward, images, prompts))
            total += part.weight * (values - part.mean) / part.std
        return total
