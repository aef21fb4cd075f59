"""Fusion: one sample of several particles of a noise level, so made that it could be one of them.

The mean of samples is no sample: noises cancel, and structure that moved fades. So estimates and
noises are fused apart (`fusion_methods`), fusion is refused where it cannot work, and what comes of
it is checked against the particles (`fusion_checks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from typing import Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.fusion_checks import (
    ACCEPTED,
    MAX_INCONSISTENCY,
    VERDICTS,
    check,
    consistency,
    gate,
)
from mctd_diffusers.denoising.fusion_methods import (
    CleanMean,
    FeatureBarycenter,
    FusionMethod,
    GaussianBarycenter,
    Mean,
    NoiseSlerp,
    PixelBarycenter,
    Resample,
    TokenBarycenter,
)
from mctd_diffusers.denoising.fusion_particles import Particles
from mctd_diffusers.denoising.protocols import Codec, FeatureDecoder
from mctd_diffusers.errors import ConfigError

__all__ = [
    "ACCEPTED",
    "DECODING_FUSIONS",
    "DEFAULT_FUSION",
    "FUSIONS",
    "MAX_INCONSISTENCY",
    "SPATIAL_FUSIONS",
    "VERDICTS",
    "Fused",
    "Particles",
    "consistency",
    "fuse",
    "fuse_groups",
]

FUSIONS: Final[dict[str, FusionMethod]] = {
    "mean": Mean(),
    "resample": Resample(),
    "x0": CleanMean(),
    "noise": NoiseSlerp(),
    "tokens": TokenBarycenter(),
    "features": FeatureBarycenter(),
    "gaussian": GaussianBarycenter(),
    "pixel": PixelBarycenter(),
}
"""Name of a method -> the method with its default settings."""

DEFAULT_FUSION: Final = "x0"
DECODING_FUSIONS: Final = ("pixel",)
"""Methods that decode every particle."""
SPATIAL_FUSIONS: Final = ("tokens", "pixel", "features")
"""Methods that work on maps, ``[channels, rows, columns]``."""


class Fused(NamedTuple):
    """What came of particles.

    Attributes:
        latents: at the particles' level. Where fusion was refused, those of the best particle.
        clean: its denoised estimate, as it is meant.
        verdict: one of `VERDICTS`; only what is ``"accepted"`` may enter a search.
        correlation: mean cosine between the noises of two particles, 1 of a single one.
    """

    latents: Float[Tensor, "*sample"]
    clean: Float[Tensor, "*sample"]
    verdict: str
    correlation: float


@torch.no_grad()
def fuse(
    method: str | FusionMethod,
    particles: Particles,
    *,
    seed: int,
    codec: Codec | None = None,
    feature_decoder: FeatureDecoder | None = None,
) -> Fused:
    """Fuse particles into one sample of their level.

    Refused before it begins at too clean a level, where one particle has nearly all the weight, and
    where particles are nearly one; that holds for all methods. What methods make but the references
    ``mean`` and ``resample`` is checked afterwards.

    Args:
        method: one of `FUSIONS`, or a method with settings of its own.
        particles: in any order, which does not matter.
        seed: of all chance that there is in it, which is in ``resample`` alone.
        codec: decodes and encodes clean latents, for ``pixel``.
        feature_decoder: clean latents by features, for ``features``.

    Raises:
        ConfigError: there is no such method, or it cannot work on what it is given.
    """
    chosen = resolve_fusion(method)
    ordered = particles.single_precision().ordered()
    verdict = gate(ordered)
    latents, clean = ordered.latents[0], ordered.clean[0]
    if verdict == ACCEPTED:
        draft = chosen(ordered, seed=seed, codec=codec, feature_decoder=feature_decoder)
        latents, clean = draft
        verdict = check(ordered, draft) if chosen.is_checked else ACCEPTED
    dtype = particles.latents.dtype
    return Fused(latents.to(dtype), clean.to(dtype), verdict, ordered.correlation)


def fuse_groups(
    method: str | FusionMethod,
    groups: Sequence[Particles],
    *,
    seeds: Sequence[int],
    codec: Codec | None = None,
    feature_decoder: FeatureDecoder | None = None,
    num_threads: int = 1,
) -> list[Fused]:
    """Fuse each of several groups; what becomes of one does not depend on the others.

    Args:
        method: as for `fuse`.
        groups: each with particles of one level.
        seeds: of each.
        codec: as for `fuse`; called by several threads where there are several.
        feature_decoder: likewise.
        num_threads: groups at a time. Transport runs outside Python's lock, so it gains by them.
            Where there are several, even a single group is fused in one of them, so that its last
            bits are those that it has in company.

    Raises:
        ConfigError: as `fuse`, or there are not as many seeds as groups.
    """
    if len(seeds) != len(groups):
        raise ConfigError(
            f"there are {len(groups)} groups but {len(seeds)} seeds; give one of each."
        )

    def fuse_one(group: Particles, seed: int) -> Fused:
        return fuse(method, group, seed=seed, codec=codec, feature_decoder=feature_decoder)

    if num_threads == 1:
        return [fuse_one(group, seed) for group, seed in zip(groups, seeds, strict=True)]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(fuse_one, groups, seeds))


def resolve_fusion(method: str | FusionMethod) -> FusionMethod:
    """A method by its name; one that is no name is taken as it is.

    Raises:
        ConfigError: there is none of this name.
    """
    if not isinstance(method, str):
        return method
    if method not in FUSIONS:
        near = get_close_matches(method, FUSIONS, 1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them."
        raise ConfigError(f"there is no fusion {method!r} among {', '.join(FUSIONS)}; {hint}")
    return FUSIONS[method]
