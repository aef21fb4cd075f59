"""Autoencoder, preview and text-to-image scripts through their command lines, on a toy dataset."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from mctd_diffusers.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "training"
VAE_PSNR = [6.83, 7.23]
PREVIEW_PSNR = [1.0]
V_LOSS = [0.985]

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_under_test", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


train_vae = load_script("train_vae")
train_preview_vae = load_script("train_preview_vae")
train_text_to_image = load_script("train_text_to_image")


@pytest.fixture(autouse=True)
def undo_what_a_script_sets() -> Iterator[None]:
    """Gives back signals, logging and accelerate's one-per-process state."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    handlers, level = logging.root.handlers[:], logging.root.level
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves twenty coloured squares with captions, and six more to validate on."""
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    rng = np.random.default_rng(0)

    def squares(number: int) -> Dataset:
        pictures = np.full((number, 16, 16, 3), 255, np.uint8)
        for picture in pictures:
            left, top = rng.integers(0, 8, 2)
            picture[top : top + 8, left : left + 8] = rng.integers(0, 255, 3)
        return Dataset.from_dict(
            {
                "image": [Image.fromarray(picture) for picture in pictures],
                "caption": [f"a square number {index}" for index in range(number)],
            },
            features=features,
        )

    folder = tmp_path_factory.mktemp("toy") / "squares"
    DatasetDict({"train": squares(20), "validation": squares(6)}).save_to_disk(str(folder))
    return folder


def common(dataset: Path, output: Path, steps: int) -> list[str]:
    return [
        *("--dataset", str(dataset), "--split", "train", "--extra_split", ""),
        *("--validation_split", "validation", "--resolution", "16", "--output", str(output)),
        *("--max_train_steps", str(steps), "--train_batch_size", "4", "--report_to", "none"),
        *("--warmup_steps", "1", "--decay_steps", "1", "--checkpoints_total_limit", "2"),
    ]


def vae_arguments(dataset: Path, output: Path, steps: int) -> list[str]:
    return [
        *common(dataset, output, steps),
        *("--block_out_channels", "8,8", "--norm_num_groups", "4"),
    ]


@pytest.fixture(scope="module")
def vae(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains the toy autoencoder that the other scripts build on, for two steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("vae")
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    train_vae.main(vae_arguments(dataset, output, 2))
    for number, handler in signals.items():
        signal.signal(number, handler)
    return output


def text_to_image_arguments(dataset: Path, vae: Path, output: Path, steps: int) -> list[str]:
    return [
        *common(dataset, output, steps),
        *("--vae", str(vae / "vae"), "--block_out_channels", "8,16", "--norm_num_groups", "4"),
        *("--attention_heads", "1", "--text_width", "16", "--text_layers", "1"),
        *("--validation_prompts", "a square|a number", "--num_inference_steps", "2"),
    ]


def figures(log: str, pattern: str) -> list[float]:
    """Reads the figures that a script reported."""
    return [float(found) for found in re.findall(pattern, log)]


# --- what every script does ----------------------------------------------------------------------


def test_batches_go_through_every_row_once_an_epoch_and_begin_anywhere() -> None:
    batches = train_vae.batch_indices(10, 4, seed=3, first_step=0)
    first = [next(batches) for _ in range(10)]
    rows = [row for batch in first for row in batch]
    for epoch in range(4):
        assert sorted(rows[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert rows[:10] != rows[10:20]
    later = train_vae.batch_indices(10, 4, seed=3, first_step=7)
    assert [next(later) for _ in range(3)] == first[7:]


def test_a_batch_may_be_larger_than_the_set() -> None:
    assert sorted(next(train_vae.batch_indices(2, 5, 0, 0)))[:1] == [0]


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [train_vae.learning_rate(step, 2.0, 4, 5, 20) for step in range(21)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert set(rates[4:15]) == {2.0}
    assert rates[15:] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4, 0.0])


def test_a_run_that_broke_resumes_to_the_very_weights_of_an_uninterrupted_one(
    dataset: Path, tmp_path: Path
) -> None:
    def break_at_sixth_step(step: int, *others: Any) -> float:
        if step == 5:
            raise InterruptedError
        return float(kept(step, *others))

    broken, whole = tmp_path / "broken", tmp_path / "whole"
    more = ("--checkpointing_steps", "2", "--decay_steps", "0", "--validation_split", "")
    kept = train_vae.learning_rate
    train_vae.learning_rate = break_at_sixth_step
    try:
        with pytest.raises(InterruptedError):
            train_vae.main([*vae_arguments(dataset, broken, 8), *more])
    finally:
        train_vae.learning_rate = kept
    assert [path.name for path in train_vae.checkpoints(broken)] == ["checkpoint-2", "checkpoint-4"]
    for folder, resume in ((broken, ("--resume_from_checkpoint", "latest")), (whole, ())):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_vae.main([*vae_arguments(dataset, folder, 8), *more, *resume])
    resumed, expected = (load_file(folder / "vae" / WEIGHTS) for folder in (broken, whole))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_very_weights_of_an_uninterrupted_one(
    dataset: Path, tmp_path: Path
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    more = ("--checkpointing_steps", "2", "--decay_steps", "0", "--validation_split", "")
    endless = [*vae_arguments(dataset, killed, 100_000), *more]
    with subprocess.Popen(
        [sys.executable, str(FOLDER / "train_vae.py"), *endless],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=FOLDER.parent,
    ) as process:
        deadline = time.monotonic() + 240
        while not (killed / "checkpoint-4").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    steps = int(train_vae.checkpoints(killed)[-1].name[11:]) + 3
    resume = ("--resume_from_checkpoint", "latest")
    train_vae.main([*vae_arguments(dataset, killed, steps), *more, *resume])
    AcceleratorState._reset_state(reset_partial_state=True)
    train_vae.main([*vae_arguments(dataset, whole, steps), *more])
    resumed = load_file(killed / "vae" / WEIGHTS)
    expected = load_file(whole / "vae" / WEIGHTS)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_terminated_run_ends_with_a_checkpoint(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop_at_third_step(step: int, *others: object) -> float:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return 1e-3

    kept = train_vae.learning_rate
    train_vae.learning_rate = stop_at_third_step
    try:
        train_vae.main([*vae_arguments(dataset, tmp_path, 50), "--validation_split", ""])
    finally:
        train_vae.learning_rate = kept
    assert [path.name for path in train_vae.checkpoints(tmp_path)] == ["checkpoint-3"]
    assert "stopped at step 3" in capsys.readouterr().err


def test_old_checkpoints_go_and_unfinished_ones_do_not_count(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-99.unfinished").mkdir()
    arguments = vae_arguments(dataset, tmp_path, 3)
    train_vae.main([*arguments, "--checkpointing_steps", "1", "--validation_split", ""])
    names = [path.name for path in train_vae.checkpoints(tmp_path)]
    assert names == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--dataset", "nowhere"), "no folder made by datasets' save_to_disk"),
        (("--split", "test"), r"no split 'test' in .*'train', 'validation'"),
        (("--image_column", "photo"), r"no column 'photo' in .*\['image', 'caption'\]"),
        (("--resume_from_checkpoint", "nowhere"), "is no folder checkpoint-STEP"),
    ],
)
def test_what_cannot_work_is_refused_with_both_values(
    dataset: Path, tmp_path: Path, more: tuple[str, str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train_vae.main([*vae_arguments(dataset, tmp_path, 1), *more])


@pytest.mark.parametrize("name", ["train_preview_vae", "train_text_to_image"])
def test_a_missing_autoencoder_ends_in_one_sentence(
    name: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*common(dataset, tmp_path, 1), "--vae", "nowhere"]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert str(caught.value).startswith(f"{name}: vae='nowhere' is no folder")


# --- autoencoder ---------------------------------------------------------------------------------


def test_the_autoencoder_learns_as_recorded(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_vae.main([*vae_arguments(dataset, tmp_path, 2), "--validation_steps", "1"])
    found = figures(capsys.readouterr().err, r"PSNR ([\d.]+) dB")
    # Recorded; machines differ in the last digits of a float.
    assert found == pytest.approx(VAE_PSNR, abs=0.05)
    assert (tmp_path / "reconstructions-2.png").exists()


def test_the_saved_autoencoder_is_stock_and_scales_latents_to_one(dataset: Path, vae: Path) -> None:
    loaded = AutoencoderKL.from_pretrained(vae / "vae")
    options = train_vae.Options(dataset=str(dataset), resolution=16)
    data = train_vae.open_split(options, "train")
    std = train_vae.latent_std(loaded, data, options)
    assert std * loaded.config.scaling_factor == pytest.approx(1, abs=1e-4)


def test_training_the_decoder_alone_leaves_the_latents(
    dataset: Path, vae: Path, tmp_path: Path
) -> None:
    more = ("--init_from", str(vae / "vae"), "--train_encoder", "false")
    train_vae.main([*vae_arguments(dataset, tmp_path, 2), *more, "--validation_split", ""])
    before, after = load_file(vae / "vae" / WEIGHTS), load_file(tmp_path / "vae" / WEIGHTS)
    for name in before:
        is_fixed = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(before[name], after[name]) == is_fixed, name
    configs = [json.loads((path / "vae" / "config.json").read_text()) for path in (vae, tmp_path)]
    assert configs[0]["scaling_factor"] == configs[1]["scaling_factor"]


# --- preview -------------------------------------------------------------------------------------


def preview_arguments(dataset: Path, vae: Path, output: Path, steps: int) -> list[str]:
    return [
        *common(dataset, output, steps),
        *("--vae", str(vae / "vae"), "--width", "4", "--decoder_blocks", "1,1"),
    ]


def test_the_preview_learns_as_recorded_and_is_stock(
    dataset: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_preview_vae.main(preview_arguments(dataset, vae, tmp_path, 2))
    log = capsys.readouterr().err
    assert figures(log, r"PSNR ([\d.]+) dB") == pytest.approx(PREVIEW_PSNR, abs=0.05)
    assert 0 < figures(log, r"costs ([\d.]+) of a full decode")[0] < 1
    tiny = AutoencoderTiny.from_pretrained(tmp_path / "preview_vae")
    assert tiny.config.scaling_factor == 1
    assert tiny.decode(torch.zeros(1, 4, 8, 8)).sample.shape == (1, 3, 16, 16)


def test_a_preview_with_another_number_of_sides_is_refused(
    dataset: Path, vae: Path, tmp_path: Path
) -> None:
    arguments = preview_arguments(dataset, vae, tmp_path, 2)
    with pytest.raises(ConfigError, match="has 3 numbers, but the autoencoder has 2 sides"):
        train_preview_vae.main([*arguments, "--decoder_blocks", "1,1,1"])


def test_blending_changes_the_stated_share_of_latents() -> None:
    torch.manual_seed(0)
    latents = torch.randn(200, 4, 8, 8)
    blended = train_preview_vae.blend(latents, 0.5)
    is_kept = (blended == latents).all(dim=(1, 2, 3)).float().mean().item()
    assert is_kept == pytest.approx(0.5, abs=0.1)  # Three standard errors of 200 draws.
    assert torch.equal(train_preview_vae.blend(latents, 0.0), latents)


# --- text to image -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_to_image(
    dataset: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Trains the toy pipeline for four steps, with a checkpoint after two."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("t2i")
    arguments = text_to_image_arguments(dataset, vae, output, 4)
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    log = output / "log.txt"
    handler = logging.FileHandler(log)
    logging.getLogger("train_text_to_image").addHandler(handler)
    train_text_to_image.main([*arguments, "--checkpointing_steps", "2"])
    logging.getLogger("train_text_to_image").removeHandler(handler)
    handler.close()
    for number, kept in signals.items():
        signal.signal(number, kept)
    return output, log.read_text("utf-8")


def test_the_denoiser_learns_as_recorded(text_to_image: tuple[Path, str]) -> None:
    output, log = text_to_image
    assert figures(log, r"v loss ([\d.]+)") == pytest.approx(V_LOSS, abs=0.02)
    assert (output / "samples-4.png").exists()


def test_the_stock_pipeline_loads_and_draws_without_being_told_a_type(
    text_to_image: tuple[Path, str],
) -> None:
    folder = text_to_image[0] / "pipeline"
    weights = load_file(folder / "unet" / WEIGHTS)
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    picture = pipeline("a square", num_inference_steps=2).images[0]
    assert picture.size == (16, 16)


def test_the_tokenizer_knows_frequent_words_whole_and_every_byte(
    text_to_image: tuple[Path, str],
) -> None:
    tokenizer = train_text_to_image.CLIPTokenizer.from_pretrained(
        text_to_image[0] / "pipeline" / "tokenizer"
    )
    assert tokenizer.tokenize("a SQUARE number") == ["a</w>", "square</w>", "number</w>"]
    ids = tokenizer("été 紅 ~").input_ids
    assert ids.count(tokenizer.eos_token_id) == 1
    assert train_text_to_image.tokenize(tokenizer, ["a square"]).shape == (1, 24)


def test_the_same_captions_give_the_same_tokenizer_every_time() -> None:
    captions = [f"a square number {index}" for index in range(20)]
    tokenizers = [train_text_to_image.train_tokenizer(captions, 2048, 24) for _ in range(5)]
    for tokenizer in tokenizers[1:]:
        assert tokenizer.get_vocab() == tokenizers[0].get_vocab()
        assert tokenizer(captions).input_ids == tokenizers[0](captions).input_ids


def test_a_resumed_denoiser_equals_an_uninterrupted_one(
    dataset: Path, vae: Path, text_to_image: tuple[Path, str], tmp_path: Path
) -> None:
    output = text_to_image[0]
    for folder in ("checkpoint-2", "latents"):
        shutil.copytree(output / folder, tmp_path / folder)
    train_text_to_image.main(
        [
            *text_to_image_arguments(dataset, vae, tmp_path, 4),
            *("--resume_from_checkpoint", "latest"),
        ]
    )
    for part in ("unet/" + WEIGHTS, "text_encoder/model.safetensors"):
        expected = load_file(output / "pipeline" / part)
        resumed = load_file(tmp_path / "pipeline" / part)
        assert all(torch.equal(resumed[name], expected[name]) for name in expected), part


def test_training_may_begin_from_a_finished_pipeline(
    dataset: Path, vae: Path, text_to_image: tuple[Path, str], tmp_path: Path
) -> None:
    train_text_to_image.main(
        [
            *text_to_image_arguments(dataset, vae, tmp_path, 1),
            *("--init_from", str(text_to_image[0] / "pipeline"), "--validation_split", ""),
            *("--learning_rate", "0", "--validation_prompts", ""),
        ]
    )
    expected = load_file(text_to_image[0] / "pipeline" / "unet" / WEIGHTS)
    kept = load_file(tmp_path / "pipeline" / "unet" / WEIGHTS)
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_a_missing_caption_column_is_named(dataset: Path, vae: Path, tmp_path: Path) -> None:
    arguments = text_to_image_arguments(dataset, vae, tmp_path, 1)
    with pytest.raises(ConfigError, match=r"no column 'text' in .*\['image', 'caption'\]"):
        train_text_to_image.main([*arguments, "--caption_column", "text"])


def test_timesteps_lie_in_the_schedule_and_crowd_the_middle() -> None:
    torch.manual_seed(0)
    evenly = train_text_to_image.draw_timesteps(4000, 1000, 0.0)
    middle = train_text_to_image.draw_timesteps(4000, 1000, 1.0)
    for timesteps in (evenly, middle):
        assert timesteps.min() >= 0
        assert timesteps.max() <= 999
    assert evenly.float().std() > 1.25 * middle.float().std()


def test_latents_are_encoded_once_and_kept(dataset: Path, vae: Path, tmp_path: Path) -> None:
    options = train_text_to_image.Options(dataset=str(dataset), resolution=16)
    data = train_text_to_image.open_split(options, "train")
    model = AutoencoderKL.from_pretrained(vae / "vae").eval()
    latents = train_text_to_image.Latents(model, data, options, tmp_path)
    first = latents[[3, 1]]
    images = train_text_to_image.load_pictures(data, [3, 1], options)
    with torch.no_grad():
        expected = model.encode(images).latent_dist.mean * model.config.scaling_factor
    torch.testing.assert_close(first, expected, atol=5e-3, rtol=5e-3)  # Kept as float16.
    again = train_text_to_image.Latents(model, data, options, tmp_path)
    again.vae = None
    assert torch.equal(again[[3, 1]], first)
    assert len(list(tmp_path.iterdir())) == 1
