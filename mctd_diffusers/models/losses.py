"""Losses and targets of the models in the box; the scripts in ``training/`` only compose them.

Sections, in this order: autoencoder, diffusion, and what the reward and the judge learn by.
Pictures are in [-1, 1]; every loss is a mean, so that weights do not depend on size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Images: TypeAlias = Float[Tensor, "batch channels height width"]
PerSample: TypeAlias = Float[Tensor, " batch"]

# --- autoencoder ----------------------------------------------------------------------------------


def squared_error(reconstruction: Images, images: Images) -> PerSample:
    """Takes the mean squared error of each picture."""
    return (reconstruction - images).square().mean(dim=(1, 2, 3))


def psnr(reconstruction: Images, images: Images) -> PerSample:
    """Measures the peak signal-to-noise ratio of each picture, in dB.

    Args:
        reconstruction: clamped to [-1, 1] here, as a saved picture would be.
        images: what it should be; the peak is the range of 2.

    Returns:
        One figure a picture; infinite where the two are equal.
    """
    return 10 * torch.log10(4 / squared_error(reconstruction.clamp(-1, 1), images))


def log_error(reconstruction: Images, images: Images) -> Float[Tensor, ""]:
    """Averages the logarithm of each picture's squared error: minus the mean PSNR, up to a factor.

    Every picture then pulls by its *relative* error, the plain ones as much as the busy ones. An
    error below that of 8-bit rounding counts as rounding.
    """
    floor = (1 / 255) ** 2 / 3
    return torch.log(squared_error(reconstruction, images) + floor).mean()


def gradient_error(reconstruction: Images, images: Images) -> Float[Tensor, ""]:
    """Compares the differences between neighbouring pixels (L1), which keeps edges sharp."""
    error = reconstruction - images
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


def low_pass_error(reconstruction: Images, images: Images) -> Float[Tensor, ""]:
    """Compares the two after averaging over 8x8 pixels (L1), which settles colours early."""
    return F.avg_pool2d(reconstruction - images, 8).abs().mean()


def kl_to_standard_normal(mean: Images, logvar: Images) -> Float[Tensor, ""]:
    """Takes KL(N(mean, exp(logvar)) || N(0, 1)) in nats, averaged over latent elements."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


@dataclass(frozen=True)
class AutoencoderWeights:
    """Weights of the terms in `autoencoder_loss`; the L1 error has weight one."""

    gradient: float = 0.5
    low_pass: float = 0.5
    log_error: float = 0.05
    kl: float = 5e-4


def autoencoder_loss(
    reconstruction: Images,
    images: Images,
    mean: Images | None = None,
    logvar: Images | None = None,
    weights: AutoencoderWeights = AutoencoderWeights(),
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Sums what an autoencoder learns by.

    Args:
        reconstruction: what the decoder made.
        images: what it should have made.
        mean: of the latent distribution; without it (a frozen encoder) there is no KL term.
        logvar: of the latent distribution.
        weights: of the terms.

    Returns:
        The loss, and its terms by name before weighting.
    """
    terms = {
        "l1": (reconstruction - images).abs().mean(),
        "gradient": gradient_error(reconstruction, images),
        "low_pass": low_pass_error(reconstruction, images),
        "log_error": log_error(reconstruction, images),
    }
    loss = (
        terms["l1"]
        + weights.gradient * terms["gradient"]
        + weights.low_pass * terms["low_pass"]
        + weights.log_error * terms["log_error"]
    )
    if mean is not None and logvar is not None:
        terms["kl"] = kl_to_standard_normal(mean, logvar)
        loss = loss + weights.kl * terms["kl"]
    return loss, terms


# --- diffusion ------------------------------------------------------------------------------------


def _column(values: PerSample) -> Float[Tensor, "batch 1 1 1"]:
    return values.reshape(-1, 1, 1, 1)


def add_noise(latents: Images, noise: Images, alphas_cumprod: PerSample) -> Images:
    """Diffuses latents: sqrt(a) x_0 + sqrt(1 - a) noise, a the cumulative product of alphas."""
    alphas = _column(alphas_cumprod)
    return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise


def velocity(latents: Images, noise: Images, alphas_cumprod: PerSample) -> Images:
    """Gives the target of v-prediction, sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho, 2022)."""
    alphas = _column(alphas_cumprod)
    return alphas.sqrt() * noise - (1 - alphas).sqrt() * latents


def min_snr_weights(alphas_cumprod: PerSample, gamma: float) -> PerSample:
    """Weighs the v-prediction error of each sample by min(SNR, gamma) / (SNR + 1).

    The error of x_0 is that of v times 1 / (SNR + 1): so this is an x_0 error weighted by
    min(SNR, gamma) (Hang et al., 2023).

    Args:
        alphas_cumprod: below one.
        gamma: where the weight stops growing with the signal-to-noise ratio; infinite for the plain
            epsilon error.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / (snr + 1)


def diffusion_loss(
    prediction: Images, target: Images, weights: PerSample | None = None
) -> Float[Tensor, ""]:
    """Averages the squared error of a prediction, each sample by its weight.

    The weights are brought to a mean of one over the batch, so that the learning rate keeps its
    meaning whichever weighting is chosen.
    """
    errors = squared_error(prediction, target)
    if weights is None:
        return errors.mean()
    return (errors * weights / weights.mean()).mean()


def drop_captions(
    input_ids: Int[Tensor, "batch length"],
    empty_ids: Int[Tensor, " length"],
    is_dropped: Float[Tensor, " batch"] | Tensor,
) -> Int[Tensor, "batch length"]:
    """Replaces the captions of some samples by the empty one, for classifier-free guidance."""
    return torch.where(is_dropped.bool().unsqueeze(1), empty_ids, input_ids)
