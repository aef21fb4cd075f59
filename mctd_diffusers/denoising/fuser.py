"""Fuses particles of a search: reads what a method works on, and charges what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.denoiser import timed
from mctd_diffusers.denoising.fusion import DECODING_FUSIONS, Fused, Particles, fuse_groups
from mctd_diffusers.denoising.latents import Sample
from mctd_diffusers.denoising.protocols import Encoder, FeatureDecoder
from mctd_diffusers.denoising.reading import SampleReader
from mctd_diffusers.denoising.scoring import Scorer
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.search.environment import Ledger, Values


class Group(NamedTuple):
    """Particles to be fused: evaluated samples of one image at one step index.

    Attributes:
        samples: the particles.
        weights: of each, at least 0.
        method: name of the fusion.
        seed: of its noise.
        guidance: of the particles' estimates; ``None`` is the call's own.
    """

    samples: Sequence[Sample]
    weights: Values
    method: str
    seed: int
    guidance: float | None


class Fuser:
    """Fuses groups of evaluated samples.

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

    def __call__(self, groups: Sequence[Group]) -> list[Fused]:
        """Each group fused by itself, so that no other decides what becomes of it.

        Groups of one method are fused side by side, in as many threads as torch has: transport is
        most of what fusing costs, and runs outside Python's lock. With methods that decode, which
        is charged, one comes after the other.

        Raises:
            ConfigError: a method is not known, not for such samples, or lacks what it needs.
        """
        fused: dict[int, Fused] = {}
        for method in dict.fromkeys(group.method for group in groups):
            places = [place for place, group in enumerate(groups) if group.method == method]
            decodes = method in DECODING_FUSIONS
            for some in [[place] for place in places] if decodes else [places]:
                fused |= zip(some, self._fuse([groups[place] for place in some]), strict=True)
        return [fused[place] for place in range(len(groups))]

    def _fuse(self, groups: Sequence[Group]) -> list[Fused]:
        """Groups of one method; only one where it decodes."""
        method, encoder = groups[0].method, self._encoder
        codec = None if encoder is None else _Codec(self._scorer, encoder, groups[0].samples)
        particles = [self._particles(group) for group in groups]
        with timed(self._ledger, "fuse", self._device):
            return fuse_groups(
                method,
                particles,
                seeds=[group.seed for group in groups],
                codec=codec if method in DECODING_FUSIONS else None,
                feature_decoder=self._feature_decoder,
                num_threads=torch.get_num_threads(),
            )

    def _particles(self, group: Group) -> Particles:
        """What a method works on."""
        samples = group.samples
        signal, noise = self._stepper.factors(samples[0].step_index)
        return Particles(
            latents=self._reader.latents(samples),
            clean=self._reader.denoised(samples, [group.guidance] * len(samples)),
            signal=float(signal),
            noise=float(noise),
            weights=torch.as_tensor(group.weights, dtype=torch.float64),
            features=self._reader.maps(samples) if group.method == "features" else None,
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
