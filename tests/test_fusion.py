"""Fusion: closed forms of every method, gates, checks, and what order and batch do not change."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mctd_diffusers.denoising.fusion import (
    DEFAULT_FUSION,
    FUSIONS,
    Particles,
    fuse,
    fuse_groups,
    resolve_fusion,
)
from mctd_diffusers.denoising.fusion_checks import (
    ONE_OUTWEIGHS,
)
from mctd_diffusers.denoising.fusion_methods import (
    Draft,
    FusionMethod,
)
from mctd_diffusers.errors import ConfigError

each_method = pytest.mark.parametrize("method", FUSIONS)


class Doubling:
    """A codec of pictures twice the size of the latents, all but linear both ways."""

    def decode(self, clean: Tensor) -> Tensor:
        images = torch.nn.functional.interpolate(clean[:, :3], scale_factor=2.0, mode="bilinear")
        return (0.5 + 0.1 * images).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(images, 2)
        return torch.cat([(small - 0.5) * 10, small[:, :1]], dim=1)


def noise_like(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def made(
    count: int,
    shape: tuple[int, ...] = (4, 8, 8),
    *,
    signal: float = 0.6,
    noise: float = 0.8,
    seed: int = 0,
    correlation: float = 0.0,
    dtype: torch.dtype = torch.float32,
    weights: list[float] | None = None,
) -> Particles:
    """Particles of white estimates and noises of so much correlation."""
    clean = noise_like(count, *shape, seed=seed, dtype=dtype)
    shared = noise_like(1, *shape, seed=seed + 1000, dtype=dtype)
    own = noise_like(count, *shape, seed=seed + 2000, dtype=dtype)
    eps = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    shares = torch.arange(count, 0, -1.0) if weights is None else torch.tensor(weights)
    return Particles(
        latents=signal * clean + noise * eps,
        clean=clean,
        signal=signal,
        noise=noise,
        weights=shares / shares.sum(),
        features=noise_like(count, 6, 4, 4, seed=seed + 3000, dtype=dtype),
    )


def run(method: str, particles: Particles, seed: int = 0) -> Draft:
    """The method alone, without gates and checks."""
    return FUSIONS[method](particles.ordered(), seed=seed, codec=Doubling())


# ---- all methods


@each_method
def test_a_single_particle_is_itself(method: str) -> None:
    particles = made(1)
    draft = run(method, particles)
    torch.testing.assert_close(draft.latents, particles.latents[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(draft.clean, particles.clean[0], atol=2e-5, rtol=1e-5)
    fused = fuse(method, particles, seed=0, codec=Doubling())
    assert fused.verdict == ONE_OUTWEIGHS
    assert torch.equal(fused.latents, particles.latents[0])
    assert fused.correlation == 1


@each_method
def test_particles_in_any_order_fuse_to_the_same_bits(method: str) -> None:
    particles = made(4, weights=[0.3, 0.3, 0.2, 0.2])
    expected = fuse(method, particles, seed=5, codec=Doubling())
    for order in itertools.islice(itertools.permutations(range(4)), 5, 24, 6):
        rows = list(order)
        assert particles.features is not None
        turned = replace(
            particles,
            latents=particles.latents[rows],
            clean=particles.clean[rows],
            weights=particles.weights[rows],
            features=particles.features[rows],
        )
        fused = fuse(method, turned, seed=5, codec=Doubling())
        assert torch.equal(fused.latents, expected.latents)
        assert torch.equal(fused.clean, expected.clean)
        assert fused[2:] == expected[2:]


@each_method
def test_groups_do_not_change_each_other(method: str) -> None:
    groups = [made(count, seed=count) for count in (3, 5, 2)]
    seeds = [7, 8, 9]
    alone = [fuse(method, g, seed=s, codec=Doubling()) for g, s in zip(groups, seeds, strict=True)]
    for threads in (1, 2):
        together = fuse_groups(method, groups, seeds=seeds, codec=Doubling(), num_threads=threads)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one.latents, other.latents)
            assert one[2:] == other[2:]


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_precision_stays_what_it_was(method: str, dtype: torch.dtype) -> None:
    fused = fuse(method, made(3, dtype=dtype), seed=0, codec=Doubling())
    assert fused.latents.dtype == fused.clean.dtype == dtype
    assert fused.latents.shape == (4, 8, 8)
    assert torch.isfinite(fused.latents).all()


@each_method
def test_single_precision_is_as_good_as_double(method: str) -> None:
    double = run(method, made(4, dtype=torch.float64))
    single = run(method, made(4))
    torch.testing.assert_close(single.latents.double(), double.latents, atol=1e-4, rtol=1e-4)


@each_method
def test_a_particle_without_weight_does_not_matter(method: str) -> None:
    two, three = made(2), made(3)
    padded = replace(three, weights=torch.tensor([*two.weights.tolist(), 0.0]))
    torch.testing.assert_close(
        run(method, padded).latents, run(method, two).latents, atol=1e-5, rtol=1e-5
    )


def test_a_name_that_is_close_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        resolve_fusion("token")
    assert resolve_fusion(DEFAULT_FUSION) is FUSIONS[DEFAULT_FUSION]
    assert all(isinstance(method, FusionMethod) for method in FUSIONS.values())
    assert [name for name, method in FUSIONS.items() if not method.is_checked] == [
        "mean",
        "resample",
    ]
