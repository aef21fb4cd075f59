"""Particles: weighted samples of one noise level, each split into clean latents and noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.errors import ConfigError

_TELLING = 16  # numbers of a sample that tell it from others of its weight


@dataclass(frozen=True)
class Particles:
    """Samples of one image at one noise level, on one device.

    A sample is ``signal * clean + noise * eps``, by which ``eps`` is defined. As ``clean`` is an
    estimate, ``eps`` is the noise that the network sees, whose mean square is below 1 where the
    level is clean.

    Attributes:
        latents: one row for each particle: ``[channels, *space]``, packed ``[tokens, channels]``,
            or numbers of one channel.
        clean: their denoised estimates.
        signal: factor of clean latents at the level, at least 0.
        noise: factor of noise there, above 0.
        weights: at least 0; their sum is 1.
        features: of one of the network's blocks, for the fusion ``features``.

    Raises:
        ConfigError: there is no particle, the factors or weights are outside these ranges, or the
            numbers of particles differ.
    """

    latents: Float[Tensor, "particles *sample"]
    clean: Float[Tensor, "particles *sample"]
    signal: float
    noise: float
    weights: Float[Tensor, " particles"]
    features: Float[Tensor, "particles features feature_rows feature_columns"] | None = None

    def __post_init__(self) -> None:
        rows = [len(self.clean), len(self.weights)]
        rows += [] if self.features is None else [len(self.features)]
        if not len(self.latents) or set(rows) != {len(self.latents)}:
            raise ConfigError(
                f"there are {len(self.latents)} latents, but {rows} estimates, weights and maps of "
                "features: give one of each for every particle, and at least one particle."
            )
        if not (self.signal >= 0 and 0 < self.noise < math.inf):
            raise ConfigError(
                f"signal is {self.signal} and noise {self.noise}: particles need noise above 0; "
                "fuse unfinished samples."
            )
        total = float(self.weights.sum())
        if not (bool((self.weights >= 0).all()) and math.isclose(total, 1, abs_tol=1e-3)):
            raise ConfigError(
                f"weights are {self.weights.tolist()}, of sum {total}: give weights of at least 0 "
                "that sum to 1."
            )

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def signal_share(self) -> float:
        """Share of the signal in the squared factors: the cumulative alpha of a diffusion."""
        return self.signal**2 / (self.signal**2 + self.noise**2)

    @property
    def ess(self) -> float:
        """Effective sample size ``1 / sum w^2``."""
        return 1 / float(self.weights.square().sum())

    @cached_property
    def noises(self) -> Float[Tensor, "particles *sample"]:
        """``eps`` of every particle."""
        return (self.latents - self.signal * self.clean) / self.noise

    @cached_property
    def correlation(self) -> float:
        """Mean cosine between the noises of two particles; 1 of a single one."""
        count = len(self)
        if count == 1:
            return 1.0
        units = torch.nn.functional.normalize(self.noises.flatten(1), dim=1)
        # Of the squared sum only the pairs: the squares of the units themselves are 1 each.
        squared = float(units.sum(dim=0).square().sum())
        return (squared - count) / (count * (count - 1))

    def composed(
        self, clean: Float[Tensor, "*sample"], noise: Float[Tensor, "*sample"]
    ) -> Float[Tensor, "*sample"]:
        """Latents at the particles' level, of clean latents and noise."""
        return self.signal * clean + self.noise * noise

    def weighted(self, rows: Float[Tensor, "particles *axes"]) -> Float[Tensor, "*axes"]:
        """Weighted mean of what there is a row of for every particle."""
        return torch.tensordot(self.weights.to(rows), rows, dims=1)

    def ordered(self) -> Particles:
        """The heaviest first; of equal weights by their numbers, not by their rows.

        What is computed after that does not depend, to the bit, on the order that they came in.
        """
        telling = self.latents.flatten(1)[:, :_TELLING].tolist()
        weights = self.weights.tolist()
        rows = sorted(range(len(self)), key=lambda row: (-weights[row], telling[row]))
        return replace(
            self,
            latents=self.latents[rows],
            clean=self.clean[rows],
            weights=self.weights[rows],
            features=None if self.features is None else self.features[rows],
        )

    def single_precision(self) -> Particles:
        """Those of half precision in single precision; others as they are."""
        if self.latents.dtype in (torch.float32, torch.float64):
            return self
        return replace(
            self,
            latents=self.latents.float(),
            clean=self.clean.float(),
            features=None if self.features is None else self.features.float(),
        )


def by_channel(
    latents: Float[Tensor, "particles *sample"],
) -> Float[Tensor, "particles channels positions"]:
    """Numbers of each channel together.

    The first axis of a sample are the channels where it has three or more, the last one of packed
    tokens ``[tokens, channels]``; a sample of one axis is one channel.
    """
    match latents.ndim - 1:
        case 1:
            return latents[:, None]
        case 2:
            return latents.mT
    return latents.flatten(2)


def like_sample(
    channels: Float[Tensor, "channels positions"], sample: Float[Tensor, "*sample"]
) -> Float[Tensor, "*sample"]:
    """Reverse of `by_channel`, for one sample of the shape of another."""
    return channels.mT if sample.ndim == 2 else channels.reshape(sample.shape)
