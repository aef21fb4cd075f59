"""Losses and targets of the models in the box; the scripts in ``training/`` only compose them.

Sections, in this order: autoencoder, diffusion, and what the reward, the judge and the information
gain evaluator learn by.
Pictures are in [-1, 1]; every loss is a mean, so that weights do not depend on size.
"""

from __future__ import annotations

from collections.abc import Mapping
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


# --- the information gain evaluator ---------------------------------------------------------------


class JumpTargets(NamedTuple):
    """What is known of jumps; NaN where it is not.

    Attributes:
        mean_gain: change of the calibrated value over the jump, in reward units.
        sibling_variance: of the calibrated values of siblings, estimated without bias, in squared
            reward units.
        final_similarity: cosine of the arrived estimate with the finished latents.
        log_truncation_error: natural log, of latent units.
    """

    mean_gain: Float[Tensor, "batch jumps"]
    sibling_variance: Float[Tensor, "batch jumps"]
    final_similarity: Float[Tensor, "batch jumps"]
    log_truncation_error: Float[Tensor, "batch jumps"]


@dataclass(frozen=True)
class JumpWeights:
    """Weights of the terms in `jump_loss`; that of the truncation error is one."""

    variance: float = 0.5
    gain: float = 0.5
    similarity: float = 1.0
    ranking: float = 0.2


def variance_nll(
    log_variance: Float[Tensor, "*shape"], sibling_variance: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return ``log v + s^2 / v``, least in expectation where v is the variance of siblings.

    Of M Gaussian siblings it is the negative log likelihood of their sample variance ``s^2``, which
    is ``v / (M - 1)`` times a chi-square number, by ``(M - 1) / 2`` and up to a constant.

    Args:
        log_variance: predicted, log v.
        sibling_variance: s^2, estimated without bias.
    """
    return log_variance + sibling_variance * (-log_variance).exp()


def pair_ranking_loss(
    predictions: Float[Tensor, " items"],
    targets: Float[Tensor, " items"],
    groups: Int[Tensor, " items"],
) -> Float[Tensor, ""]:
    """Compare pairs of one group: ``log(1 + exp(-difference of predictions))`` of ordered pairs.

    Args:
        predictions: on the scale of the targets' logs, so that a difference of one counts.
        targets: a pair counts by their difference.
        groups: an integer for each item.

    Returns:
        The mean over pairs, weighted; 0 where no group has two items that differ.

    Reference: Burges et al., "Learning to rank using gradient descent" (2005), equation 3.
    """
    gaps = (targets[:, None] - targets[None, :]).clamp(min=0)
    weights = gaps * (groups[:, None] == groups[None, :])
    total = weights.sum()
    if total == 0:
        return predictions.sum() * 0
    wrong = F.softplus(predictions[None, :] - predictions[:, None])
    return (weights * wrong).sum() / total


def jump_loss(
    predicted: Mapping[str, Float[Tensor, "batch jumps"]],
    targets: JumpTargets,
    states: Int[Tensor, "batch jumps"],
    cells: Int[Tensor, "batch jumps"],
    *,
    reward_scale: float,
    weights: JumpWeights = JumpWeights(),
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Sum what an information gain evaluator learns by.

    The log variance by likelihood (`variance_nll`), the mean gain by a Gaussian one of a fixed
    variance, similarity and log truncation error by a smooth regression; and both logs by ranking:
    jumps of one state against each other, and states of one cell against each other.

    Args:
        predicted: by the names of `InformationGainEvaluator`'s output.
        targets: of the same jumps.
        states: an integer for each jump, equal where they leave the same state.
        cells: likewise, equal where they cross the same levels of the same schedule.
        reward_scale: standard deviation of the reward, in which gains are counted.
        weights: of the terms.

    Returns:
        The loss, and its terms by name before weighting; a term of which nothing is known is 0.
    """
    # Rows are picked before anything is computed: a NaN poisons gradients even where masked.
    known = JumpTargets(*(~rows.isnan() for rows in targets))
    rows = known.log_truncation_error
    error, true_error = predicted["log_truncation_error"][rows], targets.log_truncation_error[rows]
    ranking = [pair_ranking_loss(error, true_error, groups[rows]) for groups in (states, cells)]
    terms = {"error": _mean(_smooth(error - true_error, 0.5))}

    rows = known.sibling_variance
    variance, sample = predicted["log_variance"][rows], targets.sibling_variance[rows]
    terms["variance"] = _mean(variance_nll(variance, sample))
    rows = rows & (targets.sibling_variance > 0)
    variance, order = predicted["log_variance"][rows], targets.sibling_variance[rows].log()
    ranking += [pair_ranking_loss(variance, order, groups[rows]) for groups in (states, cells)]

    rows = known.mean_gain
    gain = predicted["mean_gain"][rows] - targets.mean_gain[rows]
    terms["gain"] = _mean((gain / reward_scale).square() / 2)
    rows = known.final_similarity
    similarity = predicted["final_similarity"][rows] - targets.final_similarity[rows]
    terms["similarity"] = _mean(_smooth(similarity, 0.05))
    terms["ranking"] = torch.stack(ranking).mean()
    loss = terms["error"] + (
        weights.variance * terms["variance"]
        + weights.gain * terms["gain"]
        + weights.similarity * terms["similarity"]
        + weights.ranking * terms["ranking"]
    )
    return loss, terms


def _mean(errors: Float[Tensor, " known"]) -> Float[Tensor, ""]:
    """Return the mean, 0 of nothing."""
    return errors.sum() / max(1, len(errors))


def _smooth(errors: Float[Tensor, "*shape"], turn: float) -> Float[Tensor, "*shape"]:
    """Return Huber's loss over its turning point: quadratic below it, with slope one above."""
    size = errors.abs()
    return torch.where(size < turn, errors.square() / (2 * turn), size - turn / 2)
