"""Whether particles may be fused, and whether what came of it may enter a search."""

from __future__ import annotations

import math
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.fusion_methods import Draft
from mctd_diffusers.denoising.fusion_particles import Particles, by_channel

ACCEPTED: Final = "accepted"
TOO_CLEAN: Final = "the level is too clean"
ONE_OUTWEIGHS: Final = "one particle outweighs the others"
TOO_ALIKE: Final = "the noises are too alike"
NOISE_NORM: Final = "the noise is of another norm than the particles'"
NOISE_CHANNELS: Final = "channels of the noise have other statistics than the particles'"
SPECTRUM: Final = "the power spectrum is not that of the particles"
SAMPLE_NORM: Final = "the sample is of another norm than the particles"
DENOISER: Final = "the denoiser estimates something else"

VERDICTS: Final = (
    ACCEPTED,
    TOO_CLEAN,
    ONE_OUTWEIGHS,
    TOO_ALIKE,
    NOISE_NORM,
    NOISE_CHANNELS,
    SPECTRUM,
    SAMPLE_NORM,
    DENOISER,
)
"""What is said of a fusion: that it may enter, or why not. The last one is for who asks the
denoiser, see `consistency`."""

MAX_SIGNAL_SHARE: Final = 0.6
"""Of the squared factors; above it fused estimates are blurs or ghosts that no noise covers."""
MIN_ESS: Final = 1.5
"""Below it there is nothing to fuse with."""
MAX_CORRELATION: Final = 0.9
"""Of noises; above it particles are one sample with small changes."""
MAX_INCONSISTENCY: Final = 1.5
"""The most that `consistency` may say of a sample that stays."""

_STANDARD_ERRORS = 4
_SPECTRUM_FACTOR = 2


def gate(particles: Particles) -> str:
    """The verdict before fusing: `ACCEPTED`, or which of the three gates is shut."""
    if particles.signal_share > MAX_SIGNAL_SHARE:
        return TOO_CLEAN
    if particles.ess < MIN_ESS:
        return ONE_OUTWEIGHS
    # Turned around, so that it shuts on what is no number too.
    if not particles.correlation <= MAX_CORRELATION:
        return TOO_ALIKE
    return ACCEPTED


def check(particles: Particles, draft: Draft) -> str:
    """The verdict after fusing, by what can be seen without the denoiser.

    Particles are samples of the level, so they say what is normal there: a statistic must lie in
    their range, widened by 4 standard errors at either end. (The norm of the noise is no exception:
    by an estimate of the clean latents it is below 1, the more so the cleaner the level.) The power
    of the estimate must be in their range, or within a factor of 2 of their mean, in every octave.
    """
    noise = (draft.latents - particles.signal * draft.clean) / particles.noise
    numbers = noise.numel()
    if not _is_usual(_power(noise[None])[0], _power(particles.noises), math.sqrt(2 / numbers)):
        return NOISE_NORM
    if not _has_usual_channels(noise, particles.noises):
        return NOISE_CHANNELS
    if draft.clean.ndim == 3 and not _has_usual_spectrum(draft.clean, particles):
        return SPECTRUM
    usual = _power(particles.latents)
    if not _is_usual(_power(draft.latents[None])[0], usual, math.sqrt(2 / numbers)):
        return SAMPLE_NORM
    return ACCEPTED


def consistency(
    fused_clean: Float[Tensor, "*sample"],
    estimate: Float[Tensor, "*sample"],
    particle_changes: Float[Tensor, " particles"],
) -> float:
    """How far the denoiser moves a fused estimate, in units of what it moves the particles by.

    Args:
        fused_clean: what the fused sample was meant to become.
        estimate: the denoiser's, at the fused sample: 1 NFE, which its children need anyway.
        particle_changes: ``|c' - c| / |c|`` of each particle, from its estimate to one a step on.

    Returns:
        ``|estimate - fused| / |fused|`` by the median of the changes; above `MAX_INCONSISTENCY`
        the sample is nothing that the denoiser knows.
    """
    change = (estimate - fused_clean).norm() / fused_clean.norm()
    return float(change / particle_changes.median())


def octave_powers(
    maps: Float[Tensor, "batch channels rows columns"],
) -> Float[Tensor, "batch octaves"]:
    """Power of maps in octaves of radial frequency, ``[2^k, 2^(k+1))`` waves a side, over channels.

    The mean is left out; so are corners of the spectrum above half a wave a pixel.
    """
    rows, columns = maps.shape[2:]
    power = torch.fft.rfft2(maps).abs().square().sum(dim=1).flatten(1)
    down = torch.fft.fftfreq(rows, device=maps.device)[:, None]
    across = torch.fft.rfftfreq(columns, device=maps.device)[None]
    waves = (min(rows, columns) * torch.hypot(down, across)).flatten()
    highest = min(rows, columns) / 2
    octaves = []
    lowest = 1.0
    while lowest < highest:
        inside = (waves >= lowest) & ((waves < 2 * lowest) | (2 * lowest >= highest))
        inside &= waves <= highest
        octaves.append(power[:, inside].sum(dim=1))
        lowest *= 2
    return torch.stack(octaves, dim=1) if octaves else power[:, :0]


def _power(rows: Tensor) -> Tensor:
    """Mean square of each row."""
    return rows.flatten(1).square().mean(dim=1)


def _is_usual(found: Tensor, usual: Tensor, relative_error: float) -> bool:
    """Whether numbers lie in the range that the particles span, or close to it."""
    low, high = usual.amin(dim=0), usual.amax(dim=0)
    slack = _STANDARD_ERRORS * relative_error
    return bool(((found >= low * (1 - slack)) & (found <= high * (1 + slack))).all())


def _has_usual_channels(noise: Tensor, noises: Tensor) -> bool:
    """Whether means and deviations of channels are those of the particles' noises, or close."""
    own, usual = by_channel(noise[None])[0], by_channel(noises)
    positions = own.shape[1]
    deviations = usual.std(dim=2, correction=0)
    if not _is_usual(own.std(dim=1, correction=0), deviations, math.sqrt(1 / (2 * positions))):
        return False
    means = usual.mean(dim=2)
    slack = _STANDARD_ERRORS * deviations.mean(dim=0) / math.sqrt(positions)
    found = own.mean(dim=1)
    return bool(((found >= means.amin(0) - slack) & (found <= means.amax(0) + slack)).all())


def _has_usual_spectrum(clean: Tensor, particles: Particles) -> bool:
    found = octave_powers(clean[None])[0]
    usual = octave_powers(particles.clean)
    low = torch.minimum(usual.amin(dim=0), usual.mean(dim=0) / _SPECTRUM_FACTOR)
    high = torch.maximum(usual.amax(dim=0), usual.mean(dim=0) * _SPECTRUM_FACTOR)
    return bool(((found >= low) & (found <= high)).all())
