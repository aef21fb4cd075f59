"""How particles become one sample: by averaging, by transport, or by picking one.

Every method takes particles ordered by weight, the heaviest (*best*) first. In formulas ``x_i`` are
the particles' latents, ``c_i`` their denoised estimates, ``e_i = (x_i - signal c_i) / noise`` their
noises, ``w_i`` their weights. Most fuse estimates and noises apart and put them together again at
the particles' level, ``x = signal c + noise e``; those that average no noise compose it, see
`composed_noise`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.fusion_particles import Particles, by_channel, like_sample
from mctd_diffusers.denoising.fusion_tokens import (
    Transport,
    patch_size,
    patchified,
    unpatchified,
)
from mctd_diffusers.denoising.protocols import Codec, FeatureDecoder
from mctd_diffusers.errors import ConfigError


class Draft(NamedTuple):
    """A fused sample that nothing was checked of yet.

    Attributes:
        latents: at the particles' level.
        clean: its denoised estimate, as it is meant.
    """

    latents: Float[Tensor, "*sample"]
    clean: Float[Tensor, "*sample"]


@runtime_checkable
class FusionMethod(Protocol):
    """Makes one sample of particles.

    Attributes:
        is_checked: whether what it makes must pass the checks of `fusion_checks`. References are
            not checked, so that a comparison shows what they do.
    """

    @property
    def is_checked(self) -> bool:
        """Whether what it makes must pass the checks."""
        ...

    def __call__(
        self,
        particles: Particles,
        *,
        seed: int,
        codec: Codec | None = None,
        feature_decoder: FeatureDecoder | None = None,
    ) -> Draft:
        """Fuse particles, which are ordered by weight.

        Args:
            particles: at least one, in single precision or better.
            seed: of all chance that there is in it.
            codec: of the pipeline, for a method that works on pictures.
            feature_decoder: for a method that works on features.
        """
        ...


@dataclass(frozen=True)
class Mean:
    """``x = sum w_i x_i``, which is the Wasserstein barycenter of points (Agueh and Carlier, 2011).

    The reference that must lose: independent noises cancel to a variance of ``sum w_i^2``, and what
    is left is a blur that no network has seen at this level.
    """

    is_checked: ClassVar[bool] = False

    def __call__(
        self,
        particles: Particles,
        *,
        seed: int = 0,
        codec: Codec | None = None,
        feature_decoder: FeatureDecoder | None = None,
    ) -> Draft:
        """Weighted means of latents and of estimates."""
        return Draft(particles.weighted(particles.latents), particles.weighted(particles.clean))


@dataclass(frozen=True)
class Resample:
    """``x = x_i`` with probability ``w_i``: multinomial resampling (Gordon et al., 1993).

    The control that averages nothing: what a fusion gains over it, it gains by fusing.
    """

    is_checked: ClassVar[bool] = False

    def __call__(
        self,
        particles: Particles,
        *,
        seed: int,
        codec: Codec | None = None,
        feature_decoder: FeatureDecoder | None = None,
    ) -> Draft:
        """One of the particles."""
        generator = torch.Generator().manual_seed(seed)
        row = int(torch.multinomial(particles.weights.cpu().double(), 1, generator=generator))
        return Draft(particles.latents[row], particles.clean[row])


@dataclass(frozen=True)
class CleanMean:
    """``c = sum w_i c_i``, with some of the contrast that averaging took given back.

    The deviation of every channel is set to ``(1 - share)`` of its own and ``share`` of
    ``sum w_i sd(c_i)``, which is that of the Bures barycenter of the channel's laws (the mean is
    that of the barycenter already). So it is AdaIN (Huang and Belongie, 2017, equation 8) towards
    the barycenter, half-way by default: at low noise all the contrast would be ghosts. The noise is
    composed.

    Attributes:
        share: of the contrast, 0 to 1.
    """

    share: float = 0.5
    is_checked: ClassVar[bool] = True

    def __call__(
        self,
        particles: Particles,
        *,
        seed: int = 0,
        codec: Codec | None = None,
        feature_decoder: FeatureDecoder | None = None,
    ) -> Draft:
        """Mean of the estimates, composed with the noises."""
        clean = particles.weighted(particles.clean)
        return _with_composed_noise(particles, with_contrast(clean, particles, self.share))


@dataclass(frozen=True)
class NoiseSlerp:
    """``c`` is the best particle's; ``e`` the noises on great circles (slerp, Shoemake, 1985).

    Of more than two one after the other, by weight:
    ``e <- slerp(e, e_i; w_i / (w_1 + ... + w_i))``. The norm goes on a line from the one's to the
    other's.
    """

    is_checked: ClassVar[bool] = True

    def __call__(
        self,
        particles: Particles,
        *,
        seed: int = 0,
        codec: Codec | None = None,
        feature_decoder: FeatureDecoder | None = None,
    ) -> Draft:
        """The best particle's estimate under noise in between."""
        noise, total = particles.noises[0], float(particles.weights[0])
        for other, weight in zip(particles.noises[1:], particles.weights[1:].tolist(), strict=True):
            total += weight
            noise = slerp(noise, other, weight / total)
        clean = particles.clean[0]
        return Draft(particles.composed(clean, noise), clean)


@dataclass(frozen=True)
class TokenBarycenter:
    """``c`` is the free-support Wasserstein-2 barycenter of the estimates' tokens.

    A token is a patch of latents with its place, see `Transport`; patches are as small as
    ``max_tokens`` allows. Averaging tokens takes contrast too, so it is given back as by
    `CleanMean`. The noise is composed.

    Attributes:
        transport: its settings.
        share: of the contrast, 0 to 1.
    """

    transport: Transport = field(default_factory=Transport)
    share: float = 0.5
    is_checked: ClassVar[bool] = True

    def __call__(
        self,
        particles: Particles,
        *,
        seed: int = 0,
        codec: Codec | None = None,
        feature_decoder: FeatureDecoder | None = None,
    ) -> Draft:
        """Barycenter of the estimates, composed with the noises.

        Raises:
            ConfigError: latents that are no ``[channels, rows, columns]``.
        """
        _check_space("tokens", particles)
        rows, columns = particles.clean.shape[2:]
        side = patch_size(rows, columns, self.transport.max_tokens)
        cells = self.transport.barycenter(patchified(particles.clean, side), particles.weights)
        clean = unpatchified(cells[None], rows, columns, side)[0]
        return _with_composed_noise(particles, with_contrast(clean, particles, self.share))


@dataclass(frozen=True)
class FeatureBarycenter:
    """``c`` by the barycenter of the features of one of the network's blocks.

    With a `FeatureDecoder` ``D``: ``c = c_1 + D(barycenter) - D(features of the best)``, so that
    the decoder's own error cancels. Without one the estimates' patches go where the features went,
    ``c = sum w_i T_i c_i``, with ``T_i`` the couplings of the barycenter to the features (their
    barycentric projection); contrast is given back as by `CleanMean`. The noise is composed.

    Attributes:
        transport: its settings.
        share: of the contrast, 0 to 1, where there is no decoder.
    """

    transport: Transport = field(default_factory=Transport)
    share: float = 0.5
    is_checked: ClassVar[bool] = True

    def __call__(
        self,
        particles: Particles,
        *,
        seed: int = 0,
        codec: Codec | None = None,
        feature_decoder: FeatureDecoder | None = None,
    ) -> Draft:
        """Estimates moved as the features are, composed with the noises.

        Raises:
            ConfigError: particles without features; or, without a decoder, latents that are no
                ``[channels, rows, columns]``.
        """
        if particles.features is None:
            raise ConfigError(
                "fusion 'features' needs the particles' maps of features, and there are none; use "
                f"{_names(*_ANYWHERE)}."
            )
        if feature_decoder is not None:
            clean = self._decoded(particles, particles.features, feature_decoder)
            return _with_composed_noise(particles, clean)
        _check_space("features", particles)
        clean = self._projected(particles, particles.features)
        return _with_composed_noise(particles, with_contrast(clean, particles, self.share))

    def _decoded(
        self, particles: Particles, features: Tensor, feature_decoder: FeatureDecoder
    ) -> Tensor:
        """What the decoder makes of the barycenter, as a change of the best particle."""
        rows, columns = features.shape[2:]
        side = patch_size(rows, columns, self.transport.max_tokens)
        cells = self.transport.barycenter(patchified(features, side), particles.weights)
        fused = unpatchified(cells[None], rows, columns, side)
        both = feature_decoder(
            torch.cat([fused, features[:1]]), particles.signal, particles.noise
        ).to(particles.clean)
        return particles.clean[0] + both[0] - both[1]

    def _projected(self, particles: Particles, features: Tensor) -> Tensor:
        """The estimates' patches, carried along the couplings of the features."""
        rows, columns = particles.clean.shape[2:]
        cells_of_features = features.shape[2] * features.shape[3]
        side = patch_size(rows, columns, min(self.transport.max_tokens, cells_of_features))
        patches = patchified(particles.clean, side)
        cells = F.adaptive_avg_pool2d(features, (patches.shape[2], patches.shape[3]))
        plans = self.transport.couplings(cells, particles.weights).to(patches)
        moved = particles.weighted(plans @ patches.flatten(2).mT)
        return unpatchified(moved.mT.reshape(1, *patches.shape[1:]), rows, columns, side)[0]


@dataclass(frozen=True)
class GaussianBarycenter:
    """``c`` is the best particle's, recoloured to the barycenter of all particles' channels.

    Channels of a particle are taken for a Gaussian over positions, of mean ``m_i`` and covariance
    ``S_i``; the Bures-Wasserstein barycenter has ``m = sum w_i m_i`` and
    ``S = sum w_i (S^1/2 S_i S^1/2)^1/2`` (Agueh and Carlier, 2011). Of the maps that whiten and
    colour, ``c = m + A (c_1 - m_1)`` is the one nearest to the identity,
    ``A = S_1^-1/2 (S_1^1/2 S S_1^1/2)^1/2 S_1^-1/2``. The noise is composed.
    """

    is_checked: ClassVar[bool] = True

    def __call__(
        self,
        particles: Particles,
        *,
        seed: int = 0,
        codec: Codec | None = None,
        feature_decoder: FeatureDecoder | None = None,
    ) -> Draft:
        """The best particle's estimate in the colours of all, composed with the noises.

        Raises:
            ConfigError: latents with no more positions than channels, whose covariances are
                singular.
        """
        import ot

        channels = by_channel(particles.clean).cpu().double()
        if channels.shape[2] <= channels.shape[1]:
            raise ConfigError(
                f"fusion 'gaussian' needs more positions than channels, but latents have "
                f"{channels.shape[2]} and {channels.shape[1]}; use {_names(*_ANYWHERE)}."
            )
        means = channels.mean(dim=2)
        centred = channels - means[:, :, None]
        covariances = centred @ centred.mT / channels.shape[2]
        mean, covariance = ot.gaussian.bures_wasserstein_barycenter(
            means, covariances, weights=particles.weights.cpu().double()
        )
        A, _ = ot.gaussian.bures_wasserstein_mapping(means[0], mean, covariances[0], covariance)
        coloured = mean[:, None] + A @ centred[0]
        clean = like_sample(coloured.to(particles.clean), particles.clean[0])
        return _with_composed_noise(particles, clean)


@dataclass(frozen=True)
class PixelBarycenter:
    """``c`` by a barycenter of pictures: what moved is moved, the fine detail is the best's.

    Estimates are decoded and shrunk to at most ``max_tokens`` pixels; with ``b`` their barycenter
    over colours and places and ``l`` the best one shrunk, the picture is the best one plus
    ``enlarge(b - l)``. Encoded, ``c = c_1 + encode(picture) - encode(best)``, so that what encoding
    loses cancels. The noise is composed.

    Attributes:
        transport: its settings.
    """

    transport: Transport = field(default_factory=Transport)
    is_checked: ClassVar[bool] = True

    def __call__(
        self,
        particles: Particles,
        *,
        seed: int = 0,
        codec: Codec | None = None,
        feature_decoder: FeatureDecoder | None = None,
    ) -> Draft:
        """The best particle's picture with the layout of all, composed with the noises.

        Raises:
            ConfigError: there is no codec.
        """
        if codec is None:
            raise ConfigError(
                "fusion 'pixel' needs a codec that decodes and encodes latents, and there is none; "
                f"use {_names(*_ANYWHERE)}."
            )
        images = codec.decode(particles.clean).to(particles.clean)
        rows, columns = images.shape[2:]
        side = patch_size(rows, columns, self.transport.max_tokens)
        small = F.interpolate(
            images, size=(math.ceil(rows / side), math.ceil(columns / side)), mode="area"
        )
        change = self.transport.barycenter(small, particles.weights) - small[0]
        enlarged = F.interpolate(change[None], size=(rows, columns), mode="bilinear")
        picture = (images[:1] + enlarged).clamp(0, 1)
        both = codec.encode(torch.cat([picture, images[:1]])).to(particles.clean)
        return _with_composed_noise(particles, particles.clean[0] + both[0] - both[1])


# ---- what methods share


def composed_noise(particles: Particles) -> Float[Tensor, "*sample"]:
    """``sum w_i e_i`` at the norm of the particles' noises, ``sqrt(sum w_i |e_i|^2)``.

    Of noises of one norm that is ``sum w_i e_i / sqrt(w' R w)`` with ``R`` their cosines, which has
    unit variance whatever they have in common; ``sqrt(sum w_i^2)`` in its place (Bodin et al.,
    2024, arXiv 2408.08558) holds for independent ones alone, and siblings are not. Noises that
    cancel to nothing have no direction: what comes of them is not finite, and no check lets it
    pass.
    """
    noise = particles.weighted(particles.noises)
    squares = particles.noises.flatten(1).square().sum(dim=1)
    return noise * (particles.weighted(squares) / noise.square().sum()).sqrt()


def slerp(
    one: Float[Tensor, "*sample"], other: Float[Tensor, "*sample"], share: float
) -> Float[Tensor, "*sample"]:
    """On the great circle from ``one`` to ``other``; norms go on a line.

    Args:
        one: at share 0.
        other: at share 1.
        share: of the way, 0 to 1.
    """
    lengths = one.norm(), other.norm()
    units = one / lengths[0], other / lengths[1]
    angle = torch.arccos((units[0] * units[1]).sum().clamp(-1, 1))
    length = (1 - share) * lengths[0] + share * lengths[1]
    if angle < 1e-3:  # where the sine is the angle, to single precision
        return length * ((1 - share) * units[0] + share * units[1])
    towards = torch.sin((1 - share) * angle) * units[0] + torch.sin(share * angle) * units[1]
    return length * towards / torch.sin(angle)


def with_contrast(
    clean: Float[Tensor, "*sample"], particles: Particles, share: float
) -> Float[Tensor, "*sample"]:
    """Fused estimates with channels' deviations a share of the way to ``sum w_i sd(c_i)``."""
    channels = by_channel(clean[None])[0]
    mean = channels.mean(dim=1, keepdim=True)
    deviation = channels.std(dim=1, correction=0, keepdim=True)
    asked = particles.weighted(by_channel(particles.clean).std(dim=2, correction=0))[:, None]
    factor = torch.where(deviation > 0, 1 - share + share * asked / deviation, 1.0)
    return like_sample(mean + factor * (channels - mean), clean)


def _with_composed_noise(particles: Particles, clean: Tensor) -> Draft:
    return Draft(particles.composed(clean, composed_noise(particles)), clean)


_ANYWHERE = ("x0", "noise", "mean", "resample")  # that need nothing but latents


def _names(*names: str) -> str:
    quoted = [repr(name) for name in names]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _check_space(name: str, particles: Particles) -> None:
    shape = tuple(particles.clean.shape[1:])
    if len(shape) != 3:
        raise ConfigError(
            f"fusion {name!r} needs latents of [channels, rows, columns], and these are of shape "
            f"{shape}; use {_names(*_ANYWHERE, 'gaussian')}."
        )
