"""Decodes samples and scores their pictures, in calls of one fixed size, at their image's cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.denoiser import Calls, Chunk, chunks
from mctd_diffusers.denoising.latents import Sample
from mctd_diffusers.denoising.protocols import CheckedReward, Decoder
from mctd_diffusers.search.environment import Counts, Ledger


class Scorer:
    """Decodes clean latents of samples, in full or by preview, and asks the reward.

    Args:
        decoder: decodes finished samples.
        preview: decodes estimates of unfinished ones; ``None`` uses ``decoder``.
        reward: scores pictures.
        prompts: of each problem, for the reward.
        rows_per_call: latents in every call, see `Calls`.
        ledger: is charged.
        device: that the calls run on.

    Raises:
        ConfigError: ``rows_per_call`` is below 1.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        preview: Decoder | None,
        reward: CheckedReward,
        prompts: Sequence[str],
        rows_per_call: int,
        ledger: Ledger,
        device: torch.device,
    ) -> None:
        self.decoder = decoder
        self.preview = preview
        self.reward = reward
        self.prompts = list(prompts)
        self._rows_per_call = rows_per_call
        self._ledger = ledger
        self._calls = Calls(rows_per_call, ledger, device)

    def batches(self, samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
        """Samples, as many at once as fill a call where memory suffices."""
        for chunk in chunks(len(samples), self._rows_per_call):
            yield samples[chunk.rows]

    def decode(
        self, clean: Float[Tensor, "batch *sample"], samples: Sequence[Sample], *, preview: bool
    ) -> Float[Tensor, "batch 3 height width"]:
        """Pictures of clean latents, one a sample."""
        decoder = self.preview if preview and self.preview is not None else self.decoder
        is_preview = decoder is not self.decoder
        each = Counts(previews=1) if is_preview else Counts(decodes=1)

        def call(chunk: Chunk) -> Tensor:
            return decoder(chunk.fill(clean[chunk.rows]))

        pictures = []
        phase = "preview" if is_preview else "decode"
        for chunk, images in self._calls.make(phase, len(samples), call):
            problems = [sample.problem for sample in samples[chunk.rows]]
            self._ledger.charge(problems, each)
            pictures.append(images[: chunk.useful])
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    def score(
        self,
        images: Float[Tensor, "batch 3 height width"],
        samples: Sequence[Sample],
        handles: Mapping[Sample, int],
    ) -> list[float]:
        """Rewards of pictures, one a sample."""
        problems = [sample.problem for sample in samples]
        prompts = [self.prompts[problem] for problem in problems]
        names = [handles[sample] for sample in samples]

        def call(chunk: Chunk) -> npt.NDArray[np.float64]:
            filled = chunk.fill(images[chunk.rows])
            return self.reward(filled, chunk.pick(prompts), chunk.pick(names))

        found: list[float] = []
        for chunk, scores in self._calls.make("reward", len(samples), call):
            self._ledger.charge(problems[chunk.rows], Counts(reward_calls=1))
            found += [float(score) for score in scores[: chunk.useful]]
        return found

    def pictures(
        self,
        clean: Callable[[Sequence[Sample]], Tensor],
        samples: Sequence[Sample],
        *,
        preview: bool,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Pictures of samples, decoded anew.

        Args:
            clean: makes clean latents of some samples.
            samples: at least one.
            preview: whether to decode by preview.
        """
        return torch.cat(
            [self.decode(clean(some), some, preview=preview) for some in self.batches(samples)]
        )
