"""Pictures as a generator would draw them: warped, blurred, noisy, off in colour.

Whoever judges generated pictures must not stumble over what generators do to real ones, so the
reward and the judge are trained on pictures that went through here. Everything is torch, on the
pictures' own device, with the draws from a generator that is handed in.
"""

from __future__ import annotations

import colorsys
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


class Tint(NamedTuple):
    """A named colour as a path through lightness.

    Attributes:
        hue: in degrees.
        saturation: in [0, 1].
        dark: lightness of the darkest part of a tinted object.
        middle: of its median part.
        light: of its lightest part.
    """

    hue: float
    saturation: float
    dark: float
    middle: float
    light: float


TINTS: dict[str, Tint] = {
    "red": Tint(0, 0.85, 0.22, 0.47, 0.82),
    "orange": Tint(28, 0.95, 0.26, 0.52, 0.82),
    "yellow": Tint(52, 0.95, 0.30, 0.55, 0.87),
    "green": Tint(125, 0.75, 0.18, 0.40, 0.80),
    "blue": Tint(218, 0.85, 0.20, 0.48, 0.82),
    "purple": Tint(276, 0.70, 0.20, 0.48, 0.82),
    "pink": Tint(330, 0.90, 0.45, 0.72, 0.92),
    "brown": Tint(24, 0.50, 0.12, 0.30, 0.64),
}
"""The colours of ``training/prepare_data.py``."""

_BLUR_RADIUS = 3
"""Pixels of the blur kernel to each side; holds three standard deviations of the widest blur."""


def draw_warps(
    batch: int,
    *,
    generator: torch.Generator,
    rotation: float = 0.12,
    scale: float = 0.08,
    shift: float = 0.05,
    elastic: float = 0.012,
    cells: int = 5,
) -> tuple[Float[Tensor, "batch 2 3"], Float[Tensor, "batch 2 cells cells"]]:
    """Draw a small affine map and a smooth displacement field for each picture.

    Args:
        batch: number of pictures.
        generator: on the CPU.
        rotation: largest angle, in radians.
        scale: largest change of size, as a fraction.
        shift: largest shift, as a fraction of the picture.
        elastic: largest displacement of a node of the field, as a fraction of the picture.
        cells: nodes of the field along each side.

    Returns:
        The maps from output to input points and the fields, in coordinates from -1 to 1 as
        `torch.nn.functional.affine_grid` has them.
    """

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    angle, zoom = rotation * uniform(batch), 1 + scale * uniform(batch)
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    moves = 2 * shift * uniform(batch, 2)
    rows = [
        torch.stack([cosine, -sine, moves[:, 0]], 1),
        torch.stack([sine, cosine, moves[:, 1]], 1),
    ]
    return torch.stack(rows, 1), 2 * elastic * uniform(batch, 2, cells, cells)


def warp_pictures(
    images: Float[Tensor, "batch 3 height width"],
    maps: Float[Tensor, "batch 2 3"],
    fields: Float[Tensor, "batch 2 cells cells"],
) -> Float[Tensor, "batch 3 height width"]:
    """Warp pictures in [0, 1]; what comes in from outside is white."""
    grid = functional.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    smooth = functional.interpolate(
        fields.to(images), images.shape[-2:], mode="bicubic", align_corners=True
    )
    grid = grid + smooth.permute(0, 2, 3, 1)
    return 1 - functional.grid_sample(1 - images, grid, align_corners=False)


def warp_points(
    points: Float[Tensor, "count 2"], affine: Float[Tensor, "2 3"]
) -> Float[Tensor, "count 2"]:
    """Say where points of one picture (x, y as fractions) come to lie after its affine map.

    The displacement field is left out: it moves a point by a pixel at the most.
    """
    centred = 2 * points - 1
    inverse = torch.linalg.inv(affine[:, :2])
    return ((centred - affine[:, 2]) @ inverse.T + 1) / 2


def degrade_pictures(
    images: Float[Tensor, "batch 3 height width"],
    *,
    generator: torch.Generator,
    blur: float = 1.0,
    noise: float = 0.06,
    colour: float = 0.08,
) -> Float[Tensor, "batch 3 height width"]:
    """Blur, tint and add noise, each picture by its own amount from nothing to the largest.

    Args:
        images: in [0, 1].
        generator: on the CPU.
        blur: largest standard deviation of the Gaussian blur, in pixels.
        noise: largest standard deviation of the noise.
        colour: largest change of each channel's gain, as a fraction.

    Returns:
        Pictures in [0, 1].
    """
    batch = len(images)
    draws = torch.rand(batch, 5, generator=generator).to(images)
    taps = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    width = (blur * draws[:, :1]).clamp(min=0.05)
    kernel = torch.softmax(-((taps / width) ** 2) / 2, dim=1).repeat_interleave(3, dim=0)
    flat = images.reshape(1, 3 * batch, *images.shape[-2:])
    flat = functional.pad(flat, (_BLUR_RADIUS,) * 4, mode="replicate")
    flat = functional.conv2d(flat, kernel[:, None, :, None], groups=3 * batch)
    flat = functional.conv2d(flat, kernel[:, None, None, :], groups=3 * batch)
    gains = 1 + colour * (2 * draws[:, 1:4] - 1)
    grain = torch.randn(images.shape, generator=generator).to(images)
    scatter = (noise * draws[:, 4])[:, None, None, None] * grain
    return (flat.reshape(images.shape) * gains[:, :, None, None] + scatter).clamp(0, 1)


def retint_object(
    image: Float[Tensor, "3 height width"],
    *,
    x: float,
    y: float,
    size: float,
    old: str,
    new: str,
) -> Float[Tensor, "3 height width"]:
    """Give a tinted object another of the named colours; what is white stays white.

    Some pairs of object and colour are held out of the data. Who learns from it to *measure* must
    not learn that there are no brown airplanes: noun and colour have to be read independently.

    Args:
        image: in [0, 1], on white.
        x: centre of the object from the left, as a fraction of the picture.
        y: centre from the top.
        size: side of its box.
        old: the colour it was tinted in.
        new: the colour it is to have.

    Returns:
        Another picture; lightness goes from the old colour's path to the new one's.

    >>> white = torch.ones(3, 4, 4)
    >>> bool((retint_object(white, x=0.5, y=0.5, size=1.0, old="red", new="blue") == white).all())
    True
    """
    height, width = image.shape[1:]
    rows = slice(max(round((y - size / 2) * height), 0), round((y + size / 2) * height))
    columns = slice(max(round((x - size / 2) * width), 0), round((x + size / 2) * width))
    box = image[:, rows, columns].numpy()
    before, after = TINTS[old], TINTS[new]
    lightness = np.interp(
        (box.max(axis=0) + box.min(axis=0)) / 2,
        [before.dark, before.middle, before.light, 1.0],
        [after.dark, after.middle, after.light, 1.0],
    )
    pure = np.array(colorsys.hls_to_rgb(after.hue / 360, 0.5, 1.0))[:, None, None]
    chroma = after.saturation * (1 - np.abs(2 * lightness - 1))
    changed = image.clone()
    tinted = (lightness + chroma * (pure - 0.5)).clip(0, 1)
    changed[:, rows, columns] = torch.from_numpy(tinted).to(image)
    return changed
