"""Fusion: closed forms of every method, gates, checks, and what order and batch do not change."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mctd_diffusers.denoising.fusion import (
    ACCEPTED,
    DEFAULT_FUSION,
    FUSIONS,
    VERDICTS,
    Particles,
    consistency,
    fuse,
    fuse_groups,
    resolve_fusion,
)
from mctd_diffusers.denoising.fusion_checks import (
    NOISE_CHANNELS,
    NOISE_NORM,
    ONE_OUTWEIGHS,
    SAMPLE_NORM,
    SPECTRUM,
    TOO_ALIKE,
    TOO_CLEAN,
    check,
    octave_powers,
)
from mctd_diffusers.denoising.fusion_methods import (
    Draft,
    FusionMethod,
    TokenBarycenter,
    composed_noise,
    slerp,
)
from mctd_diffusers.denoising.fusion_tokens import (
    Transport,
    patch_size,
    patchified,
    unpatchified,
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
    particles = made(3, dtype=dtype)
    particles = replace(particles, weights=particles.weights.double())
    fused = fuse(method, particles, seed=0, codec=Doubling())
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


# ---- noise


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_composed_noise_has_unit_variance_whatever_is_shared(correlation: float) -> None:
    particles = made(8, (4, 32, 32), correlation=correlation)
    numbers = particles.latents[0].numel()
    slack = 4 * math.sqrt(2 / numbers)
    assert abs(float(composed_noise(particles).square().mean()) - 1) < slack
    assert particles.correlation == pytest.approx(correlation, abs=4 / math.sqrt(numbers))
    # The norm of the weights instead, which is right for independent noises alone.
    naive = particles.weighted(particles.noises) / particles.weights.square().sum().sqrt()
    is_right = abs(float(naive.square().mean()) - 1) < slack
    assert is_right == (correlation == 0)


def test_composed_noise_is_divided_by_the_root_of_the_quadratic_form_of_cosines() -> None:
    particles = made(5, correlation=0.4, dtype=torch.float64)
    units = torch.nn.functional.normalize(particles.noises.flatten(1), dim=1).view(5, 4, 8, 8)
    units = units * math.sqrt(units[0].numel())
    particles = replace(
        particles, latents=particles.signal * particles.clean + particles.noise * units
    )
    cosines = units.flatten(1) @ units.flatten(1).T / units[0].numel()
    weights = particles.weights.double()
    expected = particles.weighted(units) / (weights @ cosines @ weights).sqrt()
    torch.testing.assert_close(composed_noise(particles), expected, atol=1e-6, rtol=1e-6)


def test_slerp_of_two_is_composed_noise_where_the_noises_are_orthogonal() -> None:
    one, other = torch.eye(8, dtype=torch.float64)[:2] * math.sqrt(8)
    torch.testing.assert_close(slerp(one, other, 0.5), (one + other) / math.sqrt(2))
    share = 0.3
    turned = slerp(one, 2 * other, share)
    assert float(turned.norm()) == pytest.approx(math.sqrt(8) * (1 + share))
    angle = math.atan2(float(turned[1]), float(turned[0]))
    assert angle == pytest.approx(share * math.pi / 2)
    torch.testing.assert_close(slerp(one, 3 * one, share), (1 + 2 * share) * one)


@given(st.integers(2, 6), st.floats(0, 0.8))
@settings(max_examples=10)
def test_the_noise_keeps_the_norm_of_the_particles_noises(count: int, correlation: float) -> None:
    particles = made(count, correlation=correlation)
    norms = particles.noises.flatten(1).norm(dim=1)
    for method in ("x0", "noise", "gaussian"):
        draft = run(method, particles)
        noise = (draft.latents - particles.signal * draft.clean) / particles.noise
        assert norms.min() - 1e-3 <= noise.norm() <= norms.max() + 1e-3


def test_noises_that_cancel_are_let_pass_by_no_check() -> None:
    particles = made(2, weights=[0.5, 0.5])
    opposed = particles.latents[:1] * torch.tensor([1.0, -1.0])[:, None, None, None]
    nothing = torch.zeros_like(particles.clean)
    fused = fuse("x0", replace(particles, latents=opposed, clean=nothing), seed=0)
    assert fused.verdict == NOISE_NORM
    assert fused.correlation == pytest.approx(-1, abs=1e-5)


# ---- estimates


def test_the_mean_is_the_mean_and_ghosts() -> None:
    particles = made(3)
    draft = run("mean", particles)
    expected = sum(w * x for w, x in zip(particles.weights, particles.latents, strict=True))
    torch.testing.assert_close(draft.latents, expected)


def test_resampling_draws_by_weight() -> None:
    particles = made(3, weights=[0.6, 0.3, 0.1])
    draws = [run("resample", particles, seed).latents for seed in range(500)]
    for row, weight in enumerate([0.6, 0.3, 0.1]):
        drawn = sum(torch.equal(draw, particles.latents[row]) for draw in draws) / len(draws)
        assert abs(drawn - weight) < 4 * math.sqrt(weight * (1 - weight) / len(draws))


def test_contrast_is_given_back_half_way() -> None:
    particles = made(4, weights=[1.0] * 4)
    plain = particles.weighted(particles.clean).flatten(1)
    clean = run("x0", particles).clean.flatten(1)
    asked = particles.clean.flatten(2).std(dim=2, correction=0).mean(dim=0)
    own = plain.std(dim=1, correction=0)
    torch.testing.assert_close(clean.std(dim=1, correction=0), (own + asked) / 2)
    torch.testing.assert_close(clean.mean(dim=1), plain.mean(dim=1), atol=1e-6, rtol=1e-5)


def test_colours_are_those_of_the_bures_barycenter() -> None:
    # Of covariances that are diagonal, deviations are averaged.
    waves = torch.tensor([[1.0, 1, -1, -1, 1, 1, -1, -1], [1, -1, 1, -1, 1, -1, 1, -1]])
    deviations = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    means = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    clean = (deviations[:, :, None] * waves + means[:, :, None])[:, :, None]
    particles = Particles(
        latents=0.6 * clean + 0.8 * noise_like(2, 2, 1, 8),
        clean=clean,
        signal=0.6,
        noise=0.8,
        weights=torch.tensor([0.75, 0.25]),
    )
    fused = run("gaussian", particles).clean
    expected = torch.tensor([1.5, 3.5])[:, None] * waves + torch.tensor([0.5, 0.5])[:, None]
    torch.testing.assert_close(fused[:, 0], expected, atol=1e-4, rtol=1e-4)


# ---- transport


def test_the_barycenter_of_shifted_clouds_is_the_shifted_cloud() -> None:
    cloud = noise_like(40, 5, dtype=torch.float64)
    shifts = noise_like(3, 1, 5, seed=1, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    clouds = torch.stack([cloud[torch.randperm(40, generator=generator)] + s for s in shifts])
    support = Transport()._support(clouds, weights)
    base = clouds[0] - shifts[0]
    torch.testing.assert_close(support, base + torch.tensordot(weights, shifts, 1))


def test_what_moved_is_matched_where_the_mean_ghosts() -> None:
    one = noise_like(1, 6, 5, 5, dtype=torch.float64)
    other = one.flatten(2)[:, :, torch.randperm(25, generator=torch.Generator().manual_seed(0))]
    maps = torch.cat([one, other.view_as(one)])
    weights = torch.tensor([0.6, 0.4])
    fused = Transport(position_scale=0.1).barycenter(maps, weights)
    torch.testing.assert_close(fused, one[0])
    ghost = 0.6 * maps[0] + 0.4 * maps[1]
    assert ghost.std() < 0.8 * fused.std()


def test_tokens_that_may_not_move_are_averaged() -> None:
    maps = noise_like(3, 2, 4, 6, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    fused = Transport(position_scale=1e3).barycenter(maps, weights)
    torch.testing.assert_close(fused, torch.tensordot(weights, maps, 1))


def test_entropy_blurs() -> None:
    maps, weights = noise_like(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0.5, 0.5])
    exact = Transport().barycenter(maps, weights)
    little = Transport(entropy=0.02).barycenter(maps, weights)
    assert (little - exact).norm() < 0.2 * exact.norm()
    assert Transport(entropy=10.0).barycenter(maps, weights).std() < 0.2 * exact.std()
    blurred = TokenBarycenter(transport=Transport(entropy=0.1))
    assert fuse(blurred, made(3), seed=0).latents.shape == (4, 8, 8)


def test_couplings_of_exact_transport_are_permutations() -> None:
    plans = Transport().couplings(noise_like(2, 3, 4, 4), torch.tensor([0.5, 0.5]))
    for sums in (plans.sum(dim=1), plans.sum(dim=2), plans.amax(dim=2)):
        torch.testing.assert_close(sums, torch.ones(2, 16))
    smooth = Transport(entropy=0.5).couplings(noise_like(2, 3, 4, 4), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(smooth.sum(dim=2), torch.ones(2, 16))


def test_patches_are_as_small_as_the_number_of_tokens_allows() -> None:
    for rows, columns in [(64, 64), (16, 16), (7, 31), (90, 160)]:
        side = patch_size(rows, columns, 256)
        maps = noise_like(2, 3, rows, columns)
        cells = patchified(maps, side)
        assert cells.shape[2] * cells.shape[3] <= 256
        if side > 1:
            assert math.ceil(rows / (side - 1)) * math.ceil(columns / (side - 1)) > 256
        assert torch.equal(unpatchified(cells, rows, columns, side), maps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position_scale": -1.0}, "position_scale is -1.0"),
        ({"entropy": -0.1}, "entropy -0.1"),
        ({"iterations": 0}, "iterations are 0"),
        ({"max_tokens": 0}, "max_tokens 0"),
    ],
)
def test_settings_of_transport_have_ranges(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Transport(**settings)  # type: ignore[arg-type]  # of any type, or wrong


# ---- features and pictures


class Tripling:
    """A decoder of features: their first channels, tripled."""

    block = "mid"

    def __call__(self, features: Tensor, signal: float, noise: float) -> Tensor:
        assert (signal, noise) == (0.6, 0.8)
        return 3 * torch.nn.functional.interpolate(features[:, :4], scale_factor=2.0)


def test_features_come_back_by_what_the_decoder_changes() -> None:
    particles = made(3)
    assert particles.features is not None
    fused = FUSIONS["features"](particles, seed=0, feature_decoder=Tripling())
    barycenter = Transport().barycenter(particles.features, particles.weights)
    change = Tripling()((barycenter - particles.features[0])[None], 0.6, 0.8)[0]
    torch.testing.assert_close(fused.clean, particles.clean[0] + change, atol=1e-5, rtol=1e-5)


def test_estimates_go_where_features_went() -> None:
    # Features that only swap their places take the patches of the estimates along.
    features = noise_like(1, 6, 4, 4).repeat(2, 1, 1, 1)
    clean = noise_like(1, 4, 8, 8).repeat(2, 1, 1, 1)
    swap = torch.arange(16)
    swap[[0, 5]] = torch.tensor([5, 0])
    features[1] = features[1].flatten(1)[:, swap].view(6, 4, 4)
    patches = patchified(clean[1:], 2)
    clean[1:] = unpatchified(patches.flatten(2)[:, :, swap].view_as(patches), 8, 8, 2)
    particles = replace(made(2), clean=clean, features=features)
    fused = run("features", particles).clean
    torch.testing.assert_close(fused, clean[0], atol=1e-5, rtol=1e-5)


def test_a_picture_has_the_layout_of_all_and_the_detail_of_the_best() -> None:
    particles = made(3, (4, 24, 24))  # pictures of 48x48, which are shrunk to 16x16
    codec = Doubling()
    fused = run("pixel", particles).clean
    small = torch.nn.functional.avg_pool2d(codec.decode(particles.clean), 3)
    asked = Transport().barycenter(small, particles.weights)
    found = torch.nn.functional.avg_pool2d(codec.decode(fused[None]), 3)[0]
    assert (found - asked).norm() < 0.6 * (small[0] - asked).norm()


# ---- shapes


@pytest.mark.parametrize("method", ["mean", "resample", "x0", "noise", "gaussian"])
def test_packed_tokens_fuse_as_latents_over_space_do(method: str) -> None:
    particles = made(3)
    packed = replace(
        particles,
        latents=particles.latents.flatten(2).mT.contiguous(),
        clean=particles.clean.flatten(2).mT.contiguous(),
        features=None,
    )
    one, other = run(method, replace(particles, weights=packed.weights)), run(method, packed)
    torch.testing.assert_close(other.latents.mT.reshape(4, 8, 8), one.latents)


@pytest.mark.parametrize("shape", [(64,), (4, 3, 8, 8)])
def test_other_shapes_fuse_too(shape: tuple[int, ...]) -> None:
    particles = replace(made(4, shape), features=None)
    for method in ("mean", "resample", "x0", "noise", "gaussian"):
        assert fuse(method, particles, seed=0).latents.shape == shape


@pytest.mark.parametrize("method", ["tokens", "features"])
def test_what_needs_space_refuses_packed_tokens(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"{method}' needs .* use 'x0', 'noise'"):
        fuse(method, made(3, (64, 4)), seed=0)


def test_what_is_missing_is_named() -> None:
    particles = made(3)
    with pytest.raises(ConfigError, match="'pixel' needs a codec"):
        fuse("pixel", particles, seed=0)
    with pytest.raises(ConfigError, match="maps of features"):
        fuse("features", replace(particles, features=None), seed=0)
    with pytest.raises(ConfigError, match="have 6 and 8; use"):
        fuse("gaussian", made(3, (6, 8)), seed=0)
    with pytest.raises(ConfigError, match="1 groups but 2 seeds"):
        fuse_groups("x0", [particles], seeds=[1, 2])


def test_particles_have_ranges() -> None:
    particles = made(2)
    with pytest.raises(ConfigError, match="noise 0"):
        replace(particles, noise=0.0)
    with pytest.raises(ConfigError, match="sum to 1"):
        replace(particles, weights=torch.tensor([0.5, 0.6]))
    with pytest.raises(ConfigError, match="at least one particle"):
        replace(made(0, weights=[]), features=None)


# ---- gates and checks


@each_method
def test_gates_are_shut_for_all_methods(method: str) -> None:
    open_to_all = fuse(method, made(4), seed=0, codec=Doubling())
    assert open_to_all.verdict in VERDICTS
    too_clean = made(4, signal=0.8, noise=0.6)
    one_outweighs = made(4, weights=[0.9, 0.04, 0.03, 0.03])
    too_alike = made(4, correlation=0.97)
    for particles, verdict in [
        (too_clean, TOO_CLEAN),
        (one_outweighs, ONE_OUTWEIGHS),
        (too_alike, TOO_ALIKE),
    ]:
        fused = fuse(method, particles, seed=0, codec=Doubling())
        assert fused.verdict == verdict
        assert torch.equal(fused.latents, particles.latents[0])


def test_levels_are_told_by_the_share_of_the_signal() -> None:
    # Variance exploding and flow matching are gated as variance preserving is.
    for signal, noise in [(1.0, 0.7), (0.6, 0.4)]:
        assert fuse("x0", made(4, signal=signal, noise=noise), seed=0).verdict == TOO_CLEAN
    for signal, noise in [(1.0, 0.9), (0.0, 1.0)]:
        assert fuse("mean", made(4, signal=signal, noise=noise), seed=0).verdict == ACCEPTED


def test_numbers_that_are_none_shut_the_gate() -> None:
    particles = made(3)
    broken = replace(particles, latents=particles.latents * math.nan)
    assert fuse("tokens", broken, seed=0).verdict == TOO_ALIKE


def smooth_particles(count: int = 4) -> Particles:
    particles = made(count, (4, 16, 16), correlation=0.3)
    clean = torch.nn.functional.interpolate(
        noise_like(count, 4, 8, 8, seed=5), scale_factor=2.0, mode="bilinear"
    )
    latents = particles.latents + particles.signal * (clean - particles.clean)
    return replace(particles, latents=latents, clean=clean)


def test_every_particle_passes_the_checks() -> None:
    particles = smooth_particles()
    for latents, clean in zip(particles.latents, particles.clean, strict=True):
        assert check(particles, Draft(latents, clean)) == ACCEPTED


def test_checks_say_what_is_wrong() -> None:
    particles = smooth_particles()
    eps, clean = particles.noises[0], particles.clean[0]
    tilted = eps.clone()
    tilted[0] += 0.5
    tilted *= eps.norm() / tilted.norm()
    flat = torch.nn.functional.avg_pool2d(clean, 5, 1, 2)
    along = clean / clean.square().mean().sqrt()
    along = 0.8 * eps + 0.6 * along
    along *= eps.norm() / along.norm()
    assert check(particles, Draft(particles.composed(clean, eps), clean)) == ACCEPTED
    for noise, estimate, verdict in [
        (0.7 * eps, clean, NOISE_NORM),
        (1.4 * eps, clean, NOISE_NORM),
        (tilted, clean, NOISE_CHANNELS),
        (eps, flat, SPECTRUM),
        (eps, 2 * clean, SPECTRUM),
        (along, clean, SAMPLE_NORM),
    ]:
        assert check(particles, Draft(particles.composed(estimate, noise), estimate)) == verdict


def test_the_mean_would_be_refused_if_it_were_checked() -> None:
    particles = smooth_particles().ordered()
    assert check(particles, run("mean", particles)) == NOISE_NORM
    assert fuse("mean", particles, seed=0).verdict == ACCEPTED


def test_consistency_is_in_units_of_the_particles_changes() -> None:
    fused = torch.full((4, 2, 2), 2.0)
    estimate = fused + 0.5
    changes = torch.tensor([0.1, 0.125, 0.9])
    assert consistency(fused, estimate, changes) == pytest.approx(0.25 / 0.125)


def test_octaves_hold_the_waves_of_their_frequencies() -> None:
    places = torch.arange(32) / 32
    for waves, octave in [(1, 0), (2, 1), (3, 1), (5, 2), (9, 3), (16, 3)]:
        wave = torch.cos(2 * math.pi * waves * places).expand(1, 1, 32, 32)
        powers = octave_powers(wave)[0]
        assert len(powers) == 4
        assert int(powers.argmax()) == octave
        assert powers[octave] > 0.999 * powers.sum()
    assert octave_powers(torch.ones(1, 2, 1, 1)).shape == (1, 0)
