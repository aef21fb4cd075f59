"""Loading, wrapping and saving: folders stay stock, and give our parts back."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.families.stable_diffusion import MCTDStableDiffusionPipeline
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.rewards.clip import ClipReward
from tests.pipelines import tiny

CALL = {"num_inference_steps": 2, "output_type": "pt"}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all our parts."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = MCTDPipeline.from_pipe(
        tiny.make_stock(),
        reward_model=tiny.make_clip_reward(),
        preview_vae=tiny.make_preview_vae(),
        ige=tiny.make_ige(),
    )
    pipe.feature_decoder = tiny.make_feature_decoder()
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    tiny.make_stock().save_pretrained(folder)
    return folder


# Saved folders


@pytest.mark.parametrize(
    "loader", [DiffusionPipeline, AutoPipelineForText2Image, StableDiffusionPipeline]
)
def test_stock_classes_open_what_we_saved(
    saved: Path, loader: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level("WARNING"):
        pipe = loader.from_pretrained(saved)
    said = caplog.text + capfd.readouterr().err
    assert type(pipe) is StableDiffusionPipeline
    assert "_mctd" not in said
    assert "not expected" not in said
    assert "preview" not in said
    assert "ige" not in said
    pipe.set_progress_bar_config(disable=True)
    expected = tiny.make_stock()("a cat", generator=seeded(), **CALL).images
    assert torch.equal(pipe("a cat", generator=seeded(), **CALL).images, expected)


@pytest.mark.parametrize("loader", [MCTDPipeline, MCTDStableDiffusionPipeline])
def test_ours_restore_reward_preview_decoder_and_head(saved: Path, loader: Any) -> None:
    pipe = loader.from_pretrained(saved)
    assert type(pipe) is MCTDStableDiffusionPipeline
    assert isinstance(pipe, StableDiffusionPipeline)
    assert isinstance(pipe.reward_model, ClipReward)
    images = torch.rand((2, 3, 16, 16), generator=seeded())
    reward, prompts = tiny.make_clip_reward(), ["a cat", "a dog"]
    assert torch.equal(pipe.reward_model(images, prompts), reward(images, prompts))
    latents = torch.rand((1, 4, 8, 8), generator=seeded())
    expected = tiny.make_preview_vae().decode(latents).sample
    with torch.no_grad():
        assert torch.equal(pipe.preview_vae.decode(latents).sample, expected)
    source, target = torch.zeros(1), torch.ones(1, 2)
    expected = tiny.make_ige().predict(None, source, target)
    assert np.array_equal(pipe.ige.predict(None, source, target), expected)
    assert torch.equal(pipe.ige.jump_cost, tiny.make_ige().jump_cost)
    features = torch.rand((1, 8, 4, 4), generator=seeded())
    expected = tiny.make_feature_decoder()(features, 0.6, 0.8)
    assert torch.equal(pipe.feature_decoder(features, 0.6, 0.8), expected)
    pipe.set_progress_bar_config(disable=True)
    out = pipe("a cat", search="beam", compute=2, **CALL)
    assert out.ledger.total.previews > 0


def test_the_scale_of_a_reward_is_saved(tmp_path: Path, stock: Any) -> None:
    reward = tiny.make_clip_reward()
    reward.scale = "cosine"
    MCTDPipeline.from_pipe(stock, reward_model=reward).save_pretrained(tmp_path)
    assert MCTDPipeline.from_pretrained(tmp_path).reward_model.scale == "cosine"


def test_saved_parts_can_be_replaced_or_left_out(saved: Path) -> None:
    pipe = MCTDPipeline.from_pretrained(
        saved, reward_model=tiny.redness, preview_vae=None, ige=None
    )
    assert pipe.reward_model is tiny.redness
    assert pipe.preview_vae is None
    assert pipe.ige is None
    head = tiny.make_ige(seed=4)
    assert MCTDPipeline.from_pretrained(saved, ige=head).ige is head
    assert MCTDPipeline.from_pretrained(saved, reward_model=None).reward_model is None


def test_the_index_is_stock_but_for_one_private_key_and_what_not_to_download(
    saved: Path, saved_stock: Path
) -> None:
    ours = json.loads((saved / "model_index.json").read_text())
    stock = json.loads((saved_stock / "model_index.json").read_text())
    entries, not_to_download = ours.pop("_mctd"), ours.pop("_ignore_files")
    assert ours == stock
    assert set(entries) == {"feature_decoder", "ige", "preview_vae", "reward_model"}
    assert not_to_download == [
        path.relative_to(saved).as_posix()
        for folder in ("feature_decoder", "ige", "preview_vae", "reward_model")
        for path in sorted((saved / folder).iterdir())
    ]


def test_no_path_of_this_machine_is_written(saved: Path, tmp_path: Path) -> None:
    MCTDPipeline.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").rglob("*.json"):
        assert str(saved) not in path.read_text(), path
        assert str(tmp_path) not in path.read_text(), path


def test_parts_that_a_script_put_beside_the_stock_ones_are_found(
    saved_stock: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "together"
    shutil.copytree(saved_stock, folder)
    tiny.make_clip_reward().save_pretrained(folder / "reward_model")
    tiny.make_preview_vae().save_pretrained(folder / "preview_vae")
    tiny.make_ige().save_pretrained(folder / "ige")
    tiny.make_feature_decoder().save_pretrained(folder / "feature_decoder")
    pipe = MCTDPipeline.from_pretrained(folder)
    assert isinstance(pipe.reward_model, ClipReward)
    assert pipe.preview_vae is not None
    assert pipe.ige is not None
    assert pipe.feature_decoder is not None
    pipe.reward_model = tiny.redness
    pipe.preview_vae = pipe.ige = pipe.feature_decoder = None
    pipe.save_pretrained(folder)
    again = MCTDPipeline.from_pretrained(folder)
    assert again.reward_model is None
    assert again.preview_vae is None
    assert again.ige is None
    assert again.feature_decoder is None


def test_parts_assigned_late_are_saved(stock: Any, tmp_path: Path) -> None:
    pipe = MCTDPipeline.from_pipe(stock)
    pipe.preview_vae = tiny.make_preview_vae()
    pipe.ige = tiny.make_ige()
    pipe.reward_model = tiny.make_clip_reward()
    pipe.save_pretrained(tmp_path)
    again = MCTDPipeline.from_pretrained(tmp_path)
    assert again.preview_vae is not None
    assert again.ige is not None
    assert again.reward_model is not None


def test_a_callable_reward_is_said_to_be_unsaved(
    stock: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    with caplog.at_level("WARNING", logger="mctd_diffusers"):
        pipe.save_pretrained(tmp_path)
    assert "not saved" in caplog.text
    assert MCTDPipeline.from_pretrained(tmp_path).reward_model is None


# Loading


def test_a_stock_folder_opens_as_its_family(saved_stock: Path) -> None:
    pipe = MCTDPipeline.from_pretrained(saved_stock, reward_model=tiny.redness)
    assert type(pipe) is MCTDStableDiffusionPipeline
    assert pipe.reward_model is tiny.redness
    assert pipe.preview_vae is None
    assert pipe.ige is None


def test_stock_arguments_reach_the_stock_loader(saved: Path) -> None:
    pipe = MCTDPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.preview_vae.dtype == pipe.ige.dtype == torch.bfloat16
    dtypes = {"unet": torch.bfloat16, "ige": torch.float16, "default": torch.float32}
    pipe = MCTDPipeline.from_pretrained(saved, dtype=dtypes)
    assert pipe.unet.dtype == torch.bfloat16
    assert pipe.ige.dtype == torch.float16
    assert pipe.preview_vae.dtype == torch.float32
    scheduler = tiny.make_scheduler("euler")
    assert MCTDPipeline.from_pretrained(saved, scheduler=scheduler).scheduler is scheduler


def test_parts_are_loaded_in_the_variant_that_was_saved(stock: Any, tmp_path: Path) -> None:
    pipe = MCTDPipeline.from_pipe(stock, preview_vae=tiny.make_preview_vae(), ige=tiny.make_ige())
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "ige" / "diffusion_pytorch_model.safetensors").exists()
    again = MCTDPipeline.from_pretrained(tmp_path, variant="fp16")
    assert again.ige is not None
    assert again.preview_vae is not None
    pipe.ige.save_pretrained(tmp_path / "ige")
    (tmp_path / "ige" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert MCTDPipeline.from_pretrained(tmp_path, variant="fp16").ige is not None


def test_an_unknown_pipeline_is_refused_with_those_supported(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StrangePipeline"}')
    known = r"FluxPipeline, .*StableDiffusionPipeline, StableDiffusionXLPipeline"
    with pytest.raises(ConfigError, match=rf"StrangePipeline.* {known}.*docs/extending\.md"):
        MCTDPipeline.from_pretrained(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_index"):
        MCTDPipeline.from_pretrained(tmp_path / "nothing" / "here")
    with pytest.raises(ConfigError, match="model_index"):
        MCTDPipeline.from_pretrained(tmp_path)


def test_a_wrong_reward_is_refused_before_anything_is_loaded(
    saved_stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the stock loader ran")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match="colourful"):
        MCTDPipeline.from_pretrained(saved_stock, reward_model="colourfull")


def test_a_head_of_another_network_is_refused(saved_stock: Path, tmp_path: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(saved_stock)
    other = InformationGainEvaluator("StableDiffusionPipeline", {"mid": 32, "down.0": 640})
    other.save_pretrained(tmp_path)
    for load in (
        lambda: MCTDPipeline.from_pretrained(saved_stock, ige=tmp_path),
        lambda: MCTDPipeline.from_pipe(stock, ige=tmp_path),
        lambda: MCTDPipeline.from_pipe(stock, ige=other),
    ):
        with pytest.raises(ConfigError, match=r"'down\.0': 640.*'down\.0': 16.*train one"):
            load()
    with pytest.raises(ConfigError, match=r"FluxPipeline.*StableDiffusionPipeline"):
        MCTDPipeline.from_pipe(stock, ige=tiny.make_ige(family="FluxPipeline"))
    with pytest.raises(ConfigError, match=r"is a type: pass an InformationGainEvaluator"):
        MCTDPipeline.from_pipe(stock, ige=InformationGainEvaluator)


def test_a_head_reads_the_features_that_a_search_gives(stock: Any) -> None:
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.redness)
    world = pipe.open_world("a cat", num_inference_steps=2, reads_features=True)
    handles = world.environment.reset(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    world.environment.denoise(handles)
    features = world.environment.features(handles)
    given = {name: rows.shape[-1] for name, rows in features.items()}
    assert given == pipe._feature_channels()


# Wrapping


def test_wrapping_shares_every_module(stock: StableDiffusionPipeline) -> None:
    pipe = MCTDPipeline.from_pipe(stock)
    assert type(pipe) is MCTDStableDiffusionPipeline
    for name, part in stock.components.items():
        assert getattr(pipe, name) is part


def test_wrapping_keeps_every_dtype() -> None:
    stock = tiny.make_stock()
    stock.unet.to(torch.bfloat16)
    stock.text_encoder.to(torch.float16)
    MCTDPipeline.from_pipe(stock)
    assert stock.unet.dtype == torch.bfloat16
    assert stock.text_encoder.dtype == torch.float16
    assert stock.vae.dtype == torch.float32
    assert MCTDPipeline.from_pipe(stock, dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def test_wrapping_ours_keeps_our_parts(stock: StableDiffusionPipeline) -> None:
    preview_vae = tiny.make_preview_vae()
    ige = tiny.make_ige()
    first = MCTDPipeline.from_pipe(
        stock, reward_model=tiny.redness, preview_vae=preview_vae, ige=ige
    )
    second = MCTDPipeline.from_pipe(first)
    assert second.ige is ige
    assert second.reward_model is tiny.redness
    assert second.preview_vae is preview_vae
    third = MCTDStableDiffusionPipeline.from_pipe(first, reward_model=None)
    assert third.reward_model is None


def test_wrapping_takes_other_parts(stock: StableDiffusionPipeline) -> None:
    scheduler = tiny.make_scheduler("euler")
    assert MCTDPipeline.from_pipe(stock, scheduler=scheduler).scheduler is scheduler
    with pytest.raises(ConfigError, match="schedular"):
        MCTDPipeline.from_pipe(stock, schedular=scheduler)


def test_wrapping_a_pipeline_of_no_family_is_refused() -> None:
    class StrangePipeline(DiffusionPipeline):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

    with pytest.raises(ConfigError, match="StrangePipeline"):
        MCTDPipeline.from_pipe(StrangePipeline())


def test_a_reward_follows_to_a_device(stock: StableDiffusionPipeline) -> None:
    pipe = MCTDPipeline.from_pipe(stock, reward_model=tiny.make_clip_reward())
    moved = []
    pipe.reward_model.to = moved.append
    pipe.to("cpu")
    assert moved == [torch.device("cpu")]
    assert "reward_model" not in pipe.components


def test_components_are_the_stock_ones_the_preview_decoder_and_the_head(
    stock: StableDiffusionPipeline,
) -> None:
    pipe = MCTDPipeline.from_pipe(stock)
    assert set(pipe.components) == {*stock.components, "ige", "preview_vae"}
    again = MCTDStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    assert again.unet is stock.unet
