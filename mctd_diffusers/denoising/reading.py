"""Reads samples of a search in batches: latents, estimates, features, and how estimates move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.denoiser import Denoiser, pooled
from mctd_diffusers.denoising.latents import (
    Latents,
    Sample,
    made_latents,
    network_outputs,
)
from mctd_diffusers.denoising.protocols import Outputs
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.environment import Values


class SampleReader:
    """Reads what samples hold, where they are computed; makes no network call and no sample.

    Args:
        samples: where they live.
        denoiser: whose answers they hold; its stepper makes estimates of these.
    """

    def __init__(self, samples: Latents, denoiser: Denoiser) -> None:
        self._samples = samples
        self._denoiser = denoiser
        self._stepper = denoiser.stepper

    def latents(self, samples: Sequence[Sample]) -> Float[Tensor, "batch *sample"]:
        """Latents of made samples, unscaled."""
        return self._samples.gather([made_latents(sample) for sample in samples])

    def guided(
        self, samples: Sequence[Sample], guidances: Sequence[float | None] | None = None
    ) -> Float[Tensor, "batch *sample"]:
        """Guided network outputs of evaluated samples.

        Args:
            samples: at least one.
            guidances: of each; ``None`` is the call's own.
        """
        outputs = [network_outputs(sample) for sample in samples]
        unconditional = [o.unconditional for o in outputs if o.unconditional is not None]
        return self._denoiser.combine(
            Outputs(
                self._samples.gather([o.conditional for o in outputs]),
                self._samples.gather(unconditional) if unconditional else None,
            ),
            guidances,
        )

    def maps(self, samples: Sequence[Sample]) -> Float[Tensor, "batch channels rows columns"]:
        """Features of evaluated samples over space, of the block whose map the tap keeps.

        Raises:
            ConfigError: no maps are kept.
        """
        maps = [sample.map for sample in samples if sample.map is not None]
        if len(maps) < len(samples):
            raise ConfigError(
                f"{len(samples) - len(maps)} of {len(samples)} samples have no map of features: "
                "make the environment with a tap that keeps one, FeatureTap.mapping(block)"
            )
        return self._samples.gather(maps)

    def denoised(
        self, samples: Sequence[Sample], guidances: Sequence[float | None] | None = None
    ) -> Float[Tensor, "batch *sample"]:
        """Denoised estimates of evaluated samples; ``guidances`` as for :meth:`guided`."""
        return self._stepper.denoised(
            self.latents(samples),
            self.guided(samples, guidances),
            [sample.step_index for sample in samples],
        )

    def estimates(self, samples: Sequence[Sample]) -> Float[Tensor, "batch *sample"]:
        """Clean latents of made samples: estimated where unfinished."""
        clean = self.latents(samples)
        rows = [row for row, s in enumerate(samples) if s.step_index < self._stepper.num_steps]
        if rows:
            clean[rows] = self.denoised([samples[row] for row in rows])
        return clean

    def features(self, samples: Sequence[Sample]) -> dict[str, Float[Tensor, "batch _"]]:
        """Pooled features of evaluated samples; see `LatentEnvironment.features`."""
        features = {
            name: self._samples.gather([sample.features[name] for sample in samples])
            for name in samples[0].features
        }
        outputs = [network_outputs(sample) for sample in samples]
        differences = [
            torch.zeros_like(conditional) if unconditional is None else conditional - unconditional
            for conditional, unconditional in outputs
        ]
        # Of a network that predicts its variance, without that.
        difference = self._samples.gather(differences)[:, : len(made_latents(samples[0]))]
        scaled = pooled(difference.float()).chunk(2, dim=1)[1]
        estimate = pooled(self.denoised(samples).float())
        features["estimate"] = torch.cat([estimate, scaled], dim=1)
        return features

    def relative_changes(self, samples: Sequence[Sample]) -> Values:
        """How far estimates of evaluated samples moved; see `LatentEnvironment.relative_change`."""
        changes = np.full(len(samples), np.nan)
        for row, sample in enumerate(samples):
            if sample.before is not None:
                before = self._samples.gather([sample.before.estimate])
                moved = self.denoised([sample], [sample.before.guidance]) - before
                changes[row] = (moved.float().norm() / before.float().norm()).item()
        return changes

    def changes_by_log_snr(self, samples: Sequence[Sample]) -> npt.NDArray[np.float64]:
        """The same by half the log-SNR passed; see `LatentEnvironment.estimate_change`."""
        log_snr = self._stepper.log_snr
        changes = np.full(len(samples), np.nan)
        for row, sample in enumerate(samples):
            before = sample.before
            if before is not None:
                moved = self.denoised([sample])[0] - before.estimate.to(self._samples.device)
                passed = (log_snr[sample.step_index] - log_snr[before.step_index]) / 2
                if passed.isfinite() and passed != 0:
                    changes[row] = moved.float().square().mean().sqrt() / passed
        return changes
