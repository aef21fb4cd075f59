"""Fusion where the density is known: smooth fields of a Gaussian mixture with its exact denoiser.

A fused sample should be a sample of its noise level. On a mixture that has a number: its log
density there, standardised by that of samples (``ground_truth.standardised_log_likelihood``). 0 is
typical, above 0 is smoother than samples are, below it is off the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mctd_diffusers.denoising.fusion import ACCEPTED, FUSIONS
from mctd_diffusers.denoising.fusion_checks import check, gate
from mctd_diffusers.denoising.fusion_methods import Draft, FusionMethod
from mctd_diffusers.denoising.fusion_particles import Particles
from mctd_diffusers.evaluation.ground_truth import Floats, Mixture, cosine_schedule
from mctd_diffusers.evaluation.mixture_worlds import coefficients_of, field_of, field_spectrum

Kin: TypeAlias = Literal["independent", "siblings", "far siblings"]

KIN_STRIDES: Final[dict[Kin, int | None]] = {"independent": None, "siblings": 1, "far siblings": 5}
"""How particles are related: by nothing, or by a parent so many steps of 20 before them."""

LEVELS: Final = (0.05, 0.2, 0.4, 0.58, 0.9)
"""Shares of the signal, ``alpha^2``; at the last one fusion is refused."""

COUNTS: Final = (2, 4, 8, 16)
"""Numbers of particles."""

_SIZE = 16
_COMPONENTS = 6
_STEPS = 20
_LAYOUT = 4
_TYPICAL = 1000


class FusionWorld(NamedTuple):
    """Fields to fuse.

    Attributes:
        mixture: of the fields' coefficients in a cosine basis.
        target: ``[dimensions]`` coefficients of the layout that is asked for.
    """

    mixture: Mixture
    target: Floats


@lru_cache(maxsize=64)
def fusion_world(seed: int) -> FusionWorld:
    """6 Gaussians over fields of 16x16, most of whose power is in coarse structure."""
    generator = np.random.default_rng(seed)
    spectrum = field_spectrum(_SIZE)
    shape = _COMPONENTS, _SIZE**2
    means = generator.standard_normal(shape) * np.sqrt(0.7 * spectrum)
    weights = np.full(_COMPONENTS, 1 / _COMPONENTS)
    mixture = Mixture(weights, means, np.tile(0.3 * spectrum, (_COMPONENTS, 1)))
    return FusionWorld(mixture, generator.standard_normal(_SIZE**2) * np.sqrt(spectrum))


def drawn_particles(
    world: FusionWorld, *, level: float, count: int, kin: Kin, seed: int
) -> Particles:
    """Particles of a level with exact estimates, weighted by how near these are to the target.

    Weights are ``softmax(r / 2)`` of standardised rewards ``r``.

    Args:
        world: that they are drawn from.
        level: share of the signal, above 0 and below 1.
        count: of particles, at least 2.
        kin: how they are related. Siblings come from their parent by the exact transition, so each
            of them is a sample of the level.
        seed: of all noise.
    """
    generator = np.random.default_rng([seed, 1])  # of another stream than the world
    alpha, sigma = np.sqrt(level), np.sqrt(1 - level)
    stride = KIN_STRIDES[kin]
    if stride is None:
        points = world.mixture.noised(alpha, sigma).sample(generator, count)
    else:
        parent = _noisier(alpha, stride)
        start = world.mixture.noised(*parent).sample(generator, 1)
        onward = world.mixture.transition(start, *parent, alpha, sigma)
        points = onward.sample(generator, count)[0]
    clean = world.mixture.denoised(points, alpha, sigma)
    fields = torch.from_numpy(field_of(clean))[:, None]
    return Particles(
        latents=torch.from_numpy(field_of(points))[:, None],
        clean=fields,
        signal=float(alpha),
        noise=float(sigma),
        weights=torch.softmax(torch.from_numpy(_standardised(_rewards(world, clean)) / 2), 0),
        features=_features_of(fields),
    )


def _noisier(alpha: float, stride: int) -> tuple[float, float]:
    """Signal and noise so many steps before, on a cosine schedule."""
    start = np.arccos(cosine_schedule(_STEPS)[0][0])
    angle = min(np.arccos(alpha) + stride * start / _STEPS, start)
    return float(np.cos(angle)), float(np.sin(angle))


def _rewards(world: FusionWorld, clean: Floats) -> Floats:
    """Minus squared distances of the coarse structure, in its deviations."""
    spectrum = field_spectrum(_SIZE).reshape(_SIZE, _SIZE)[:_LAYOUT, :_LAYOUT]
    gaps = (clean - world.target).reshape(-1, _SIZE, _SIZE)[:, :_LAYOUT, :_LAYOUT]
    return np.asarray(-0.25 * (gaps**2 / spectrum).sum(axis=(1, 2)))


def _standardised(rewards: Floats) -> Floats:
    return np.asarray((rewards - rewards.mean()) / rewards.std())


def _features_of(
    fields: Float[Tensor, "batch 1 rows columns"],
) -> Float[Tensor, "batch features rows columns"]:
    """What stands for features of a network here: fields, their slopes, and both blurred."""
    down = F.pad(fields, (0, 0, 0, 1), mode="replicate").diff(dim=2)
    across = F.pad(fields, (0, 1, 0, 0), mode="replicate").diff(dim=3)
    sharp = torch.cat([fields, down, across], dim=1)
    return torch.cat([sharp, F.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False)], dim=1)


class GreyCodec:
    """Fields as grey pictures, within the range that they have."""

    def decode(
        self, clean: Float[Tensor, "batch 1 rows columns"]
    ) -> Float[Tensor, "batch 3 rows columns"]:
        """Pictures in [0, 1], where 8 deviations of the fields fit."""
        return (0.5 + clean / 16).clamp(0, 1).expand(-1, 3, -1, -1)

    def encode(
        self, images: Float[Tensor, "batch 3 rows columns"]
    ) -> Float[Tensor, "batch 1 rows columns"]:
        """Fields again."""
        return (images.mean(dim=1, keepdim=True) - 0.5) * 16


class Outcome(NamedTuple):
    """One fusion, as the closed form sees it.

    Attributes:
        z: standardised log density of the fused sample at its level.
        best_z: that of the best particle.
        noise_norm: mean square of its noise.
        usual_norm: mean of that of the particles' noises.
        verdict: of gates and checks. The method works where a gate is shut too, so that it shows
            what the gate is for.
    """

    z: float
    best_z: float
    noise_norm: float
    usual_norm: float
    verdict: str


@dataclass(frozen=True)
class Cell:
    """Fusions of one kind.

    Attributes:
        outcomes: one for each trial.
    """

    outcomes: tuple[Outcome, ...]

    @property
    def z(self) -> float:
        """Mean z of the fused samples."""
        return self._mean([one.z for one in self.outcomes])

    @property
    def best_z(self) -> float:
        """Mean z of the best particles."""
        return self._mean([one.best_z for one in self.outcomes])

    @property
    def widest_z(self) -> float:
        """The largest ``|z|`` of a single fused sample."""
        return max(abs(one.z) for one in self.outcomes)

    @property
    def noise_norm(self) -> float:
        """Mean of the mean squares of the noises."""
        return self._mean([one.noise_norm for one in self.outcomes])

    @property
    def accepted(self) -> float:
        """Share that passed gates and checks."""
        return self._mean([one.verdict == ACCEPTED for one in self.outcomes])

    @staticmethod
    def _mean(numbers: Sequence[float]) -> float:
        return float(np.mean(numbers))


def measure_fusion(
    method: str | FusionMethod,
    *,
    level: float,
    count: int,
    kin: Kin,
    trials: int = 40,
    first_seed: int = 0,
) -> Cell:
    """Fuse particles of so many worlds, and look each result up in the closed form."""
    chosen = FUSIONS[method] if isinstance(method, str) else method
    outcomes = []
    for seed in range(first_seed, first_seed + trials):
        world = fusion_world(seed)
        particles = drawn_particles(world, level=level, count=count, kin=kin, seed=seed)
        ordered = particles.ordered()
        draft = chosen(ordered, seed=seed, codec=GreyCodec())
        outcomes.append(_looked_up(world, seed, level, ordered, draft, chosen))
    return Cell(tuple(outcomes))


def _looked_up(
    world: FusionWorld,
    seed: int,
    level: float,
    particles: Particles,
    draft: Draft,
    method: FusionMethod,
) -> Outcome:
    verdict = gate(particles)
    if verdict == ACCEPTED and method.is_checked:
        verdict = check(particles, draft)
    fields = torch.stack([draft.latents, particles.latents[0]])[:, 0].numpy()
    points = coefficients_of(fields)
    noised = world.mixture.noised(particles.signal, particles.noise)
    mean, deviation = _typical(seed, level)
    z, best_z = (noised.log_density(points) - mean) / deviation
    noise = (draft.latents - particles.signal * draft.clean) / particles.noise
    return Outcome(
        z=float(z),
        best_z=float(best_z),
        noise_norm=float(noise.square().mean()),
        usual_norm=float(particles.noises.square().mean()),
        verdict=verdict,
    )


@lru_cache(maxsize=1024)
def _typical(seed: int, level: float) -> tuple[float, float]:
    """Mean and deviation of the log density of samples of a world at a level."""
    noised = fusion_world(seed).mixture.noised(np.sqrt(level), np.sqrt(1 - level))
    density = noised.log_density(noised.sample(np.random.default_rng(0), _TYPICAL))
    return float(density.mean()), float(density.std())
