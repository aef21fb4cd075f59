"""JPEG compressibility: how few bytes a picture needs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mctd_diffusers.errors import ConfigError


@dataclass(frozen=True)
class JpegCompressibility:
    """Scores each picture by minus the size of its JPEG file in kilobytes (1000 bytes).

    A reward no text model can hide behind: exact, cheap, and easy to over-optimise (a blank picture
    wins), so it is a good test of a search.

    Reference: Black et al., "Training diffusion models with reinforcement learning" (2023), section
    5.1.

    Attributes:
        quality: of the JPEG file, 1 to 95.

    Raises:
        ConfigError: ``quality`` is out of range.
    """

    quality: int = 95
    wants_pil: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise ConfigError(f"quality={self.quality}: a JPEG quality lies between 1 and 95")

    def __call__(self, images: Any, prompts: Sequence[str]) -> list[float]:
        """Return minus the kilobytes of each PIL picture; prompts do not matter."""
        del prompts
        return [-_jpeg_bytes(image, self.quality) / 1000 for image in images]


def _jpeg_bytes(image: Any, quality: int) -> int:
    """Return the length of the picture's JPEG file in bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
