"""Maps of features: kept where a tap says so, of the conditional rows, and freed with samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers.denoising.denoiser import Denoiser, FeatureTap, mappable_blocks, pooled
from mctd_diffusers.denoising.environment import LatentEnvironment
from mctd_diffusers.denoising.stepper import Stepper
from mctd_diffusers.errors import ConfigError, SearchError
from mctd_diffusers.search.environment import FIRST_DRAW, Handles, Ledger
from tests.pipelines import tiny_flux
from tests.schedulers import make_scheduler, noise
from tests.tiny_models import GuidedUNet, PlainUNet

EMBEDS, NEGATIVE = noise(3, 5, 16, seed=1), noise(3, 5, 16, seed=2)
SHAPES = {
    "down.0": (32, 4, 4),
    "down.1": (64, 4, 4),
    "mid": (64, 4, 4),
    "up.0": (64, 8, 8),
    "up.1": (32, 8, 8),
}


def make_denoiser(network: Any, features: FeatureTap | None, **extra: Any) -> Denoiser:
    return Denoiser(
        network,
        Stepper(make_scheduler("ddim", 8)),
        rows_per_call=2,
        ledger=Ledger(),
        device=torch.device("cpu"),
        features=features,
        **extra,
    )


def make_environment(unet: Any, features: FeatureTap | None, **extra: Any) -> LatentEnvironment:
    return LatentEnvironment(
        network=GuidedUNet(unet, EMBEDS, NEGATIVE, 3.0),
        stepper=Stepper(make_scheduler("ddim", 8)),
        decoder=lambda latents: latents[:, :3].sigmoid(),
        reward=lambda images, prompts, handles: images.double().mean((1, 2, 3)).numpy(),
        prompts=["a", "b", "c"],
        first_latents=noise(3, 4, 8, 8, seed=3),
        rows_per_call=2,
        features=features,
        **extra,
    )


def start(environment: LatentEnvironment) -> Handles:
    handles = environment.reset(np.arange(3), np.full(3, FIRST_DRAW, dtype=np.int64))
    environment.denoise(handles)
    return handles


@torch.no_grad()
@pytest.mark.parametrize("block", SHAPES)
def test_the_map_of_a_block_is_that_of_the_conditional_rows(unet: Any, block: str) -> None:
    latents, indices = noise(3, 4, 8, 8), [0, 3, 7]

    def maps_of(network: Any, tap: FeatureTap) -> Any:
        denoiser = make_denoiser(network, tap)
        states = [denoiser.stepper.initial_state(index) for index in indices]
        return denoiser(latents, states, [0, 1, 2])

    guided = GuidedUNet(unet, EMBEDS, NEGATIVE, 3.0)
    ours = maps_of(guided, FeatureTap(unet, rows_per_latent=2, map_block=block))
    plain = maps_of(PlainUNet(unet, EMBEDS), FeatureTap(unet, names=(), map_block=block))
    assert ours.maps.shape == (3, *SHAPES[block])
    assert plain.features == {}
    torch.testing.assert_close(ours.maps, plain.maps, rtol=1e-4, atol=1e-4)
    if block in ours.features:
        torch.testing.assert_close(pooled(ours.maps), ours.features[block])


@torch.no_grad()
def test_rows_keep_their_maps_whatever_the_order_of_calls(unet: Any) -> None:
    tap = FeatureTap(unet, rows_per_latent=2).mapping("up.1")
    network = GuidedUNet(unet, EMBEDS, NEGATIVE, 3.0)
    latents, problems = noise(4, 4, 8, 8), [0, 1, 2, 1]
    said: list[Any] = []
    for kinds in (None, ["short", "long", "short"]):
        denoiser = make_denoiser(network, tap, kinds=kinds)
        states = [denoiser.stepper.initial_state(index) for index in (0, 3, 7, 2)]
        said.append(denoiser(latents, states, problems).maps)
    assert torch.equal(said[0], said[1])


@torch.no_grad()
def test_nothing_changes_where_nobody_asks_for_maps(unet: Any) -> None:
    tap = FeatureTap(unet, rows_per_latent=2)
    without, kept = make_environment(unet, tap), make_environment(unet, tap.mapping("up.0"))
    ours, theirs = start(without), start(kept)
    assert without.map_bytes == 0
    assert torch.equal(without.denoised(ours), kept.denoised(theirs))
    before, after = without.features(ours), kept.features(theirs)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert without.ledger.total == kept.ledger.total
    with pytest.raises(ConfigError, match="3 of 3 samples have no map of features"):
        without.feature_maps(ours)


@torch.no_grad()
def test_maps_take_memory_as_long_as_their_samples_live(unet: Any) -> None:
    tap = FeatureTap(unet, rows_per_latent=2).mapping("up.1", pools=False)
    environment = make_environment(unet, tap)
    handles = start(environment)
    assert list(environment.features(handles)) == ["estimate"]
    assert environment.feature_maps(handles).shape == (3, 32, 8, 8)
    assert environment.map_bytes == 3 * 32 * 8 * 8 * 4
    environment.release(handles[1:])
    assert environment.map_bytes == 32 * 8 * 8 * 4
    halved = make_environment(unet, tap, half=True)
    handles = start(halved)
    assert halved.map_bytes == 3 * 32 * 8 * 8 * 2
    assert halved.feature_maps(handles).dtype == torch.float32


@torch.no_grad()
def test_maps_are_saved_with_their_samples(unet: Any) -> None:
    tap = FeatureTap(unet, rows_per_latent=2).mapping("mid")
    environment = make_environment(unet, tap)
    handles = start(environment)
    again = make_environment(unet, tap)
    restored = again.restore(environment.export(handles))
    assert torch.equal(again.feature_maps(restored), environment.feature_maps(handles))


@torch.no_grad()
def test_samples_that_are_not_evaluated_have_no_map(unet: Any) -> None:
    environment = make_environment(unet, FeatureTap(unet, rows_per_latent=2, map_block="mid"))
    fresh = environment.reset(np.array([0]), np.array([FIRST_DRAW]))
    with pytest.raises(SearchError, match="is not evaluated; denoise it first"):
        environment.feature_maps(fresh)


class Tripling:
    """A decoder of features that notes what it is asked."""

    block = "up.1"

    def __init__(self) -> None:
        self.asked: list[tuple[torch.Tensor, float, float]] = []

    def __call__(self, features: torch.Tensor, signal: float, noise: float) -> torch.Tensor:
        self.asked.append((features, signal, noise))
        return 3 * features[:, :4]


@torch.no_grad()
def test_samples_are_fused_by_the_maps_that_they_hold(unet: Any) -> None:
    decoder = Tripling()
    tap = FeatureTap(unet, rows_per_latent=2).mapping(decoder.block, pools=False)
    environment = make_environment(unet, tap, feature_decoder=decoder)
    handles = environment.reset(np.zeros(2, dtype=np.int64), np.array([5, 6]))
    environment.denoise(handles)
    maps, shares = environment.feature_maps(handles), np.array([0.6, 0.4])
    spent = environment.ledger.total
    environment.fuse([handles], [shares], ["features"], np.array([0]))
    ((features, signal, factor),) = decoder.asked
    assert torch.equal(features[1], maps[0])
    assert signal**2 + factor**2 == pytest.approx(1)
    assert environment.ledger.total == spent
    # Without a decoder the estimates go where the features went; without maps nothing goes.
    projecting = make_environment(unet, tap)
    handles = projecting.reset(np.zeros(2, dtype=np.int64), np.array([5, 6]))
    projecting.denoise(handles)
    assert len(projecting.fuse([handles], [shares], ["features"], np.array([0])).handles) == 1
    without = make_environment(unet, None)
    handles = start(without)[:1]
    with pytest.raises(ConfigError, match="1 of 1 samples have no map of features"):
        without.fuse([handles], [np.ones(1)], ["features"], np.array([0]))


def test_hooks_for_maps_are_gone_however_the_tap_closes(unet: Any) -> None:
    tap = FeatureTap(unet, names=(), map_block="up.0")
    with pytest.raises(TypeError), tap:
        unet()
    assert not any(block._forward_hooks for block in mappable_blocks(unet).values())
    assert tap.take_maps() is None


def test_a_map_of_a_block_that_is_not_there_is_refused(unet: Any) -> None:
    with pytest.raises(ConfigError, match=r"no blocks up\.7: name some of down\.0.*up\.0, up\.1"):
        FeatureTap(unet).mapping("up.7")
    transformer = tiny_flux.make_components()["transformer"]
    with pytest.raises(
        ConfigError, match=r"FluxTransformer2DModel has no blocks block\.0: it has none"
    ):
        FeatureTap(transformer, map_block="block.0")
