"""Losses and targets of the training scripts; the scripts only compose them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

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
    by_image = functional.cross_entropy(logits, right)
    by_text = functional.cross_entropy(logits[:, :batch].T, right)
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
    by_noun = functional.cross_entropy(noun_logits.flatten(0, 1), nouns.flatten())
    covered = (colours >= 0).sum().clamp(min=1)
    by_colour = functional.cross_entropy(
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
    missed = functional.softplus(-centre) * middles
    invented = functional.softplus(centre) * (1 - targets.heat) ** 4
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
    total = functional.cross_entropy(logits, classes, ignore_index=-1, reduction="sum")
    return total / cells
