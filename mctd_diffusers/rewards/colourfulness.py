"""Colourfulness: how strong and how varied the colours of a picture are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def colourfulness(
    images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
) -> Float[Tensor, " batch"]:
    """Score each picture by its colourfulness; prompts do not matter.

    The spread of the opponent colours red-green and yellow-blue plus 0.3 of the distance of their
    mean from grey, on the scale of 8-bit pixels: 0 is grey, about 45 quite colourful, above 100
    extreme.

    Reference: Hasler and Suesstrunk, "Measuring colourfulness in natural images" (2003), M3.

    >>> import torch
    >>> colourfulness(torch.full((1, 3, 2, 2), 0.5), ["anything"]).tolist()
    [0.0]
    """
    del prompts
    red, green, blue = (255 * images.double()).unbind(dim=1)
    red_green = (red - green).flatten(1)
    yellow_blue = (0.5 * (red + green) - blue).flatten(1)
    spread = torch.hypot(red_green.std(1, correction=0), yellow_blue.std(1, correction=0))
    return spread + 0.3 * torch.hypot(red_green.mean(1), yellow_blue.mean(1))
