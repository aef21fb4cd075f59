"""Pictures as a generator would draw them: warped, blurred, noisy, off in colour.

Whoever judges generated pictures must not stumble over what generators do to real ones, so the
reward and the judge are trained on pictures that went through here. Everything is torch, on the
pictures' own device, with the draws from a generator that is handed in.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

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
