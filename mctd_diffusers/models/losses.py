"""Losses and targets of the models in the box; the scripts in ``training/`` only compose them.

Sections, in this order: autoencoder, diffusion, and what the reward and the judge learn by.
Pictures are in [-1, 1]; every loss is a mean, so that weights do not depend on size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Images: TypeAlias = Float[Tensor, "batch channels height width"]
Moments: TypeAlias = Float[Tensor, "batch latent_channels latent_height latent_width"]
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


def kl_to_standard_normal(mean: Moments, logvar: Moments) -> Float[Tensor, ""]:
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
    mean: Moments | None = None,
    logvar: Moments | None = None,
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


# --- the reward: contrastive ----------------------------------------------------------------------


def contrastive_loss(
    images: Float[Tensor, "batch channels"],
    texts: Float[Tensor, "captions channels"],
    owners: Int[Tensor, " captions"],
    logit_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Contrast pictures with captions, some of which are wrong on purpose.

    The mean of two cross-entropies: of each picture over all captions (right ones of other pictures
    and wrong ones alike), and of each right caption over all pictures. Equal captions do not
    compete.

    Args:
        images: embeddings of unit length.
        texts: embeddings of unit length; the first ``batch`` are the right captions in the order of
            the pictures, the rest are wrong ones.
        owners: an integer for each caption, equal where captions are equal.
        logit_scale: what cosines are multiplied by, above 0.

    Returns:
        The loss in nats, at least 0.

    Reference: Radford et al. (2021), figure 3; hard negative captions as in Yuksekgonul et al.,
    "When and why vision-language models behave like bags-of-words" (2023), section 4.
    """
    batch = len(images)
    logits = logit_scale * images @ texts.T
    right = torch.arange(batch, device=images.device)
    twins = owners[None, :] == owners[:batch, None]
    twins[right, right] = False
    logits = logits.masked_fill(twins, -torch.inf)
    by_image = F.cross_entropy(logits, right)
    by_text = F.cross_entropy(logits[:, :batch].T, right)
    return (by_image + by_text) / 2


def patch_loss(
    noun_logits: Float[Tensor, "batch patches nouns"],
    colour_logits: Float[Tensor, "batch patches colours"],
    nouns: Int[Tensor, "batch patches"],
    colours: Int[Tensor, "batch patches"],
) -> Float[Tensor, ""]:
    """Name what each patch of a picture shows: a helper that speeds up a small vision transformer.

    Args:
        noun_logits: class 0 is the background.
        colour_logits: over colours.
        nouns: right classes of nouns, 0 where nothing is.
        colours: right classes of colours, -1 where nothing is: those patches do not count.

    Returns:
        The sum of both cross-entropies in nats, each a mean over what counts.
    """
    by_noun = F.cross_entropy(noun_logits.flatten(0, 1), nouns.flatten())
    covered = (colours >= 0).sum().clamp(min=1)
    by_colour = F.cross_entropy(
        colour_logits.flatten(0, 1), colours.flatten(), ignore_index=-1, reduction="sum"
    )
    return by_noun + by_colour / covered


# --- the judge: detection -------------------------------------------------------------------------


class SceneTargets(NamedTuple):
    """What a detector should say of each cell of its grid.

    Attributes:
        heat: 1 at the centre of an object, falling off around it, 0 elsewhere.
        noun: class of the noun in the cells around a centre, -1 elsewhere.
        colour: class of the colour there, -1 elsewhere.
        offset: from the middle of the cell to the centre (x, y), in cells; read only where noun >=
            0.
    """

    heat: Float[Tensor, "batch rows columns"]
    noun: Int[Tensor, "batch rows columns"]
    colour: Int[Tensor, "batch rows columns"]
    offset: Float[Tensor, "batch 2 rows columns"]


def scene_loss(
    centre: Float[Tensor, "batch rows columns"],
    noun: Float[Tensor, "batch nouns rows columns"],
    colour: Float[Tensor, "batch colours rows columns"],
    offset: Float[Tensor, "batch 2 rows columns"],
    targets: SceneTargets,
) -> dict[str, Float[Tensor, ""]]:
    """Compare a detector's answer with the scene.

    The heat map is a cross-entropy with the penalty near centres reduced by ``(1 - heat)^4``,
    without the focal factor, so that peaks stay probabilities. Nouns, colours and offsets count
    around centres only. Each part is a mean per object.

    Args:
        centre: logits of centres.
        noun: logits over nouns.
        colour: logits over colours.
        offset: predicted offsets, in cells.
        targets: of `scene_targets`.

    Returns:
        The parts by name ("centre", "noun", "colour", "offset"), to be added up.

    Reference: Zhou et al., "Objects as points" (2019), equations 1 and 3.
    """
    middles = targets.heat == 1
    objects = middles.sum().clamp(min=1)
    missed = F.softplus(-centre) * middles
    invented = F.softplus(centre) * (1 - targets.heat) ** 4
    around = targets.noun >= 0
    cells = around.sum().clamp(min=1)
    gap = (offset - targets.offset).abs().sum(dim=1) * around
    return {
        "centre": (missed + invented).sum() / objects,
        "noun": _mean_cross_entropy(noun, targets.noun, cells),
        "colour": _mean_cross_entropy(colour, targets.colour, cells),
        "offset": gap.sum() / cells,
    }


def _mean_cross_entropy(
    logits: Float[Tensor, "batch classes rows columns"],
    classes: Int[Tensor, "batch rows columns"],
    cells: Int[Tensor, ""],
) -> Float[Tensor, ""]:
    """Return the mean over cells whose class is not -1, 0 where there is none."""
    total = F.cross_entropy(logits, classes, ignore_index=-1, reduction="sum")
    return total / cells
