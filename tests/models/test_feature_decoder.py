"""The feature decoder: what it reads, what it answers, and what it refuses."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mctd_diffusers import EMBEDDED_MODEL, MCTDPipeline
from mctd_diffusers.denoising.protocols import FeatureDecoder
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.reconstruction import (
    EDGES,
    errors_table,
    level_of,
    mean_estimates,
    reconstruction_errors,
)
from mctd_diffusers.models.feature_decoder import FeatureToLatent
from mctd_diffusers.search.environment import Action
from tests.pipelines.hub import HubServer


def make_decoder(**changes: Any) -> FeatureToLatent:
    settings: dict[str, Any] = {"scale_factor": 2, "hidden_size": 8, "num_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = FeatureToLatent("StableDiffusionPipeline", "up.0", 6, **(settings | changes))
        rows = 4 * decoder.config["scale_factor"]
        denoised = torch.randn(16, decoder.config["latent_channels"], rows, rows)
        decoder.fit(features(16), 1 + 5 * denoised, torch.linspace(-4, 4, 16))
    decoder.eval()
    return decoder


def features(batch: int, seed: int = 0) -> torch.Tensor:
    return 3 + 2 * torch.randn(batch, 6, 4, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize(("scale_factor", "rows"), [(1, 4), (2, 8), (4, 16)])
def test_latents_are_as_large_as_its_config_says(scale_factor: int, rows: int) -> None:
    decoder = make_decoder(scale_factor=scale_factor, latent_channels=5)
    assert isinstance(decoder, FeatureDecoder)
    assert decoder.block == "up.0"
    assert decoder(features(3), 0.6, 0.8).shape == (3, 5, rows, rows)


@torch.no_grad()
def test_the_ratio_of_signal_and_noise_counts_alone_one_for_all_or_one_each() -> None:
    decoder, given = make_decoder(), features(3)
    ours = decoder(given, 0.6, 0.8)
    torch.testing.assert_close(ours, decoder(given, 1.0, 0.8 / 0.6))
    each = decoder(given, torch.tensor([0.6, 0.8, 0.6]), torch.tensor([0.8, 0.6, 0.8]))
    torch.testing.assert_close(each[[0, 2]], ours[[0, 2]])
    assert not torch.allclose(each[1], ours[1])


@torch.no_grad()
def test_a_map_is_decoded_alike_alone_and_among_others() -> None:
    decoder, given = make_decoder(), features(3)
    together = decoder(given, 0.6, 0.8)
    torch.testing.assert_close(decoder(given[1:2], 0.6, 0.8), together[1:2])


@torch.no_grad()
def test_beyond_its_range_it_answers_as_at_the_end() -> None:
    decoder, given = make_decoder(log_snr_range=(-2.0, 2.0)), features(2)
    low, high = (torch.tensor(level).exp().sqrt().item() for level in (-2.0, 2.0))
    torch.testing.assert_close(decoder(given, 0.0, 1.0), decoder(given, low, 1.0))
    torch.testing.assert_close(decoder(given, 1.0, 0.0), decoder(given, high, 1.0))
    assert make_decoder()(given, 0.0, 1.0).isfinite().all()


@torch.no_grad()
def test_it_begins_near_the_mean_estimate_in_units_of_the_deviation() -> None:
    decoder = make_decoder()
    torch.nn.init.zeros_(decoder.last.weight)
    assert decoder.last.bias is not None
    torch.nn.init.ones_(decoder.last.bias)
    decoded, deviation = decoder(features(2), 0.6, 0.8), decoder.deviation(torch.zeros(2))
    torch.testing.assert_close(deviation, torch.full_like(deviation, 5.0), atol=1.0, rtol=0)
    torch.testing.assert_close(decoded, torch.full_like(decoded, 6.0), atol=1.5, rtol=0)


def test_a_saved_decoder_says_the_same(tmp_path: Path) -> None:
    decoder = make_decoder(log_snr_range=(-4.0, 4.0), guidance_scales=[4.0])
    decoder.save_pretrained(tmp_path)
    loaded = FeatureToLatent.from_pretrained(tmp_path)
    for name in ("family", "block", "feature_channels", "latent_channels", "scale_factor"):
        assert loaded.config[name] == decoder.config[name]
    assert [*loaded.config["log_snr_range"], *loaded.config["guidance_scales"]] == [-4, 4, 4]
    with torch.no_grad():
        assert torch.equal(decoder(features(3), 0.6, 0.8), loaded(features(3), 0.6, 0.8))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")
def test_a_pushed_decoder_has_a_card_and_loads_at_its_revision(hub: HubServer) -> None:
    decoder = make_decoder()
    pushed = decoder.push_to_hub("somebody/decoder", token="write-token")
    loaded = FeatureToLatent.from_pretrained("somebody/decoder", revision=pushed.oid)
    assert torch.equal(loaded.first.weight, decoder.first.weight)
    assert b"`up.0`, 6 channels" in hub.repositories["somebody/decoder"].files["README.md"]


def test_its_card_says_what_it_reads_and_how_to_load_it() -> None:
    card = make_decoder(log_snr_range=(-4.0, 4.0), guidance_scales=[4.0]).card("owner/decoder")
    for text in ("# decoder", "`up.0`, 6 channels", "-4.00 to 4.00", '"owner/decoder"'):
        assert text in card


def test_other_features_and_other_families_are_refused() -> None:
    decoder = make_decoder()
    with pytest.raises(ConfigError, match=r"reads maps \[batch, 6, rows, columns\] of block up\.0"):
        decoder(torch.zeros(2, 7, 4, 4), 0.6, 0.8)
    with pytest.raises(ConfigError, match=r"these have shape \(2, 6, 4\)"):
        decoder.check_features(torch.zeros(2, 6, 4))
    decoder.check_family("StableDiffusionPipeline")
    with pytest.raises(ConfigError, match="the pipeline is a FluxPipeline"):
        decoder.check_family("FluxPipeline")
    with pytest.raises(ConfigError, match="scale_factor is 3"):
        make_decoder(scale_factor=3)


def test_the_one_in_the_box_reads_the_model_in_the_box() -> None:
    folder = Path(EMBEDDED_MODEL)
    decoder = FeatureToLatent.from_pretrained(EMBEDDED_MODEL, subfolder="feature_decoder")
    unet = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
    assert decoder.block == f"up.{len(unet['up_block_types']) - 1}"
    assert decoder.config["feature_channels"] == unet["block_out_channels"][0]
    assert decoder.config["latent_channels"] == unet["in_channels"]
    assert decoder.first.weight.dtype == torch.float32
    files = (folder / "feature_decoder").iterdir()
    assert sum(file.stat().st_size for file in files) < 1_000_000


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_one_in_the_box_knows_estimates_by_their_features() -> None:
    pipe = MCTDPipeline.from_pretrained(EMBEDDED_MODEL)
    decoder = FeatureToLatent.from_pretrained(EMBEDDED_MODEL, subfolder="feature_decoder")
    world = pipe.open_world(
        ["a red octopus", "two dogs"],
        num_inference_steps=10,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        feature_decoder=decoder.eval(),
    )
    environment = world.environment
    handles = environment.reset(np.arange(2), np.array([5, 6]))
    for step in range(10):
        environment.denoise(handles)
        clean, maps = environment.denoised(handles), environment.feature_maps(handles)
        share = environment.stepper.log_snr[step].sigmoid().item()
        error = (decoder(maps, share**0.5, (1 - share) ** 0.5) - clean).square().mean().sqrt()
        # Of what two samples differ by; a third at pure noise, a tenth in the end.
        assert error < 0.4 * (clean[0] - clean[1]).square().mean().sqrt()
        handles = environment.step(handles, [Action(1)] * 2, np.zeros(2, dtype=np.int64))


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not load the FeatureToLatent of"):
        FeatureToLatent.from_pretrained(tmp_path)


# --- figures


def test_errors_are_told_by_share_of_signal() -> None:
    rng = np.random.default_rng(0)
    log_snr = np.linspace(-6, 6, 400).astype(np.float32)
    denoised = rng.normal(size=(400, 2, 4, 4)).astype(np.float32)
    prompts = [f"prompt {row % 5}" for row in range(400)]
    means = np.zeros((len(EDGES) - 1, 2, 4, 4))
    found = reconstruction_errors(0.5 * denoised, denoised, log_snr, prompts, means)
    assert [(one.low, one.high) for one in found] == [*pairwise(EDGES)]
    assert sum(one.states for one in found) == 400
    for one in found:
        assert one.decoder == pytest.approx(one.mean / 2)
        assert one.explained == pytest.approx(0.75)
        assert one.other == pytest.approx(2**0.5, abs=0.15)
    assert errors_table(found).count("\n") == 1 + len(found)


def test_another_sample_is_of_another_prompt() -> None:
    denoised = np.array([0.0, 0.0, 0.0, 4.0]).reshape(4, 1, 1, 1)
    means = np.zeros((len(EDGES) - 1, 1, 1, 1))
    (found,) = reconstruction_errors(
        denoised, denoised, np.full(4, 5.0), ["a", "a", "a", "b"], means
    )
    assert found.other == 4.0
    assert reconstruction_errors(denoised, denoised, np.full(4, 5.0), ["a"] * 4, means) == []


def test_means_are_those_of_a_level() -> None:
    log_snr = np.array([-9.0, -8.0, 9.0])
    assert level_of(log_snr).tolist() == [0, 0, len(EDGES) - 2]
    means = mean_estimates(np.array([1.0, 3.0, 5.0]).reshape(3, 1), log_snr)
    assert means[[0, -1]].ravel().tolist() == [2.0, 5.0]
    assert np.isnan(means[1:-1]).all()
