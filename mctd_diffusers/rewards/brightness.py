"""Brightness: how light a picture is."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def brightness(
    images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
) -> Float[Tensor, " batch"]:
    """Score each picture by its mean luma (ITU-R BT.601 weights), in [0, 1]; prompts do not matter.

    Reference: ITU-R BT.601-7 (2011), section 2.5.1.

    >>> import torch
    >>> brightness(torch.ones(1, 3, 2, 2), ["anything"]).round(decimals=6).tolist()
    [1.0]
    """
    del prompts
    red, green, blue = images.double().mean(dim=(2, 3)).unbind(dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
