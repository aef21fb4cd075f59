"""Fuses particles of a search: reads what a method works on, and charges what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.denoiser import timed
from mctd_diffusers.denoising.fusion import Fused, Particles, fuse
from mctd_diffusers.denoising.latents import Sample
from mctd_diffusers.denoising.protocols import Encoder, FeatureDecoder
from mctd_diffusers.denoising.reading import SampleReader
from mctd_diffusers.denoising.scoring import Scorer
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.search.environment import Ledger, Values


class Fuser:
    """Fuses evaluated samples of one image at one step index.

    Args:
        reader: of the samples.
        scorer: decodes them, for methods that work on pictures.
        stepper: knows their noise level.
        ledger: is charged the seconds.
        device: that the samples are computed on.
        encoder: as for `LatentEnvironment`.
        feature_decoder: the same.
    """

    def __init__(
        self,
        reader: SampleReader,
        scorer: Scorer,
        stepper: Stepper,
        ledger: Ledger,
        device: torch.device,
        *,
        encoder: Encoder | None,
        feature_decoder: FeatureDecoder | None,
    ) -> None:
        self._reader = reader
        self._scorer = scorer
        self._stepper = stepper
        self._ledger = ledger
        self._device = device
        self._encoder = encoder
        self._feature_decoder = feature_decoder

    def __call__(
        self,
        samples: Sequence[Sample],
        weights: Values,
        method: str,
        seed: int,
        guidance: float | None,
    ) -> Fused:
        """One group of particles fused, by itself, so that no other decides what becomes of it.

        Args:
            samples: the particles.
            weights: of each, at least 0.
            method: name of the fusion.
            seed: of its noise.
            guidance: of the particles' estimates; ``None`` is the call's own.

        Raises:
            ConfigError: the method is not known, not for samples of this kind, or lacks what it
                needs.
        """
        signal, noise = self._stepper.factors(samples[0].step_index)
        particles = Particles(
            latents=self._reader.latents(samples),
            clean=self._reader.denoised(samples, [guidance] * len(samples)),
            signal=float(signal),
            noise=float(noise),
            weights=torch.as_tensor(weights, dtype=torch.float64),
            features=self._reader.maps(samples) if method == "features" else None,
        )
        encoder = self._encoder
        codec = None if encoder is None else _Codec(self._scorer, encoder, samples)
        with timed(self._ledger, "fuse", self._device):
            return fuse(
                method,
                particles,
                seed=seed,
                codec=codec,
                feature_decoder=self._feature_decoder,
            )


class _Codec(NamedTuple):
    """Decodes the estimates of particles at their image's cost, and encodes pictures."""

    scorer: Scorer
    encoder: Encoder
    samples: Sequence[Sample]

    def decode(
        self, clean: Float[Tensor, "batch *sample"]
    ) -> Float[Tensor, "batch 3 rows columns"]:
        """Images in [0, 1], in calls of the same size as all."""
        return self.scorer.decode(clean, self.samples, preview=False)

    def encode(
        self, images: Float[Tensor, "batch 3 rows columns"]
    ) -> Float[Tensor, "batch *sample"]:
        """Clean latents of images."""
        return self.encoder.encode(images)
