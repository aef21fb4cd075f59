"""What a method of fusion needs of a pipeline, and whether the pipeline has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from mctd_diffusers.denoising.denoiser import FeatureTap
from mctd_diffusers.denoising.fusion import SPATIAL_FUSIONS, VERDICTS, resolve_fusion
from mctd_diffusers.denoising.protocols import Decoder, Encoder, FeatureDecoder
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.search.bandit import MoveMade
from mctd_diffusers.search.budget import NOTHING
from mctd_diffusers.search.environment import Counts

_ANY_LATENTS: Final = "'x0', 'noise', 'mean' or 'resample'"


@dataclass(frozen=True)
class FusionParts:
    """What fusions of a search ask of the world.

    Attributes:
        method: name of the fusion; ``None`` where nothing is fused.
        encoder: of pictures, where the method works on them.
        map_block: whose features over space are kept, where the method works on them.
        spends: what fusing takes for each particle.
    """

    method: str | None = None
    encoder: Encoder | None = None
    map_block: str | None = None
    spends: Counts = NOTHING


def verdict_counts(moves: Sequence[MoveMade]) -> dict[str, int]:
    """How many groups of particles were to be fused in some moves, by the words of the verdict."""
    return dict(Counter(VERDICTS[verdict] for move in moves for verdict in move.verdicts))


NO_FUSION: Final = FusionParts()


def fusion_parts(
    method: str | None,
    *,
    latents: Tensor,
    decoder: Decoder,
    tap: FeatureTap,
    feature_decoder: FeatureDecoder | None,
    map_block: str | None = None,
) -> FusionParts:
    """What a method needs.

    Args:
        method: its name; ``None`` where nothing is fused.
        latents: of the pipeline, ``[batch, *sample]``.
        decoder: of finished samples, which may be an `Encoder` too.
        tap: on the network's blocks.
        feature_decoder: for ``features``; without one the estimates' patches go where features go.
        map_block: whose features are read without a decoder of them; the middle one on the way up
            by default.

    Raises:
        ConfigError: there is no such method, or it cannot work here.
    """
    if method is None:
        return NO_FUSION
    resolve_fusion(method)
    if method in SPATIAL_FUSIONS and latents.ndim != 4:
        raise ConfigError(
            f"fusion {method!r} works on latents of [channels, rows, columns], and this "
            f"pipeline's are {tuple(latents.shape[1:])}, packed into tokens: use {_ANY_LATENTS}"
        )
    if method == "pixel":
        return _for_pictures(decoder)
    if method == "features":
        return _for_features(tap, feature_decoder, map_block)
    return FusionParts(method)


def _for_pictures(decoder: Decoder) -> FusionParts:
    if not isinstance(decoder, Encoder):
        raise ConfigError(
            f"fusion 'pixel' encodes pictures, and this pipeline's {type(decoder).__name__} only "
            f"decodes them: use {_ANY_LATENTS}, 'tokens' or 'gaussian'"
        )
    return FusionParts("pixel", encoder=decoder, spends=Counts(decodes=1))


def _for_features(
    tap: FeatureTap, feature_decoder: FeatureDecoder | None, map_block: str | None
) -> FusionParts:
    blocks = tap.mappable
    if not blocks:
        raise ConfigError(
            "fusion 'features' reads features that lie over the picture, and this pipeline's "
            "denoiser, which is no UNet, has no blocks of such: use 'tokens' or 'x0'"
        )
    if feature_decoder is not None:
        return FusionParts("features", map_block=feature_decoder.block)
    up = [name for name in blocks if name.startswith("up.")]
    return FusionParts("features", map_block=map_block or up[(len(up) - 1) // 2])
