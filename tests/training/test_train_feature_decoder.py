"""The feature decoder's script, through its command line, on a log of a tiny pipeline."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from mctd_diffusers.denoising.denoiser import FeatureTap
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.feature_decoder import FeatureToLatent
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.trajectories.dataset import read_latent_states
from mctd_diffusers.trajectories.feature_examples import MapReader
from mctd_diffusers.trajectories.logging import log_trajectories
from tests.trajectories.tiny_logs import PROMPTS, make_pipe, make_settings, read_rows

SCRIPT = Path(__file__).parents[2] / "training" / "train_feature_decoder.py"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = ("--hidden_size=8", "--num_layers=1", "--train_batch_size=4", "--block=up.0")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_feature_decoder_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


train_feature_decoder = load_script()


class Work(NamedTuple):
    """A saved pipeline and a log of it."""

    model: Path
    log: Path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    pipe = make_pipe()
    pipe.save_pretrained(folder / "model")
    few: dict[str, Any] = {"strides": (1,), "probes": 0, "siblings": 2, "grids": (4,)}
    schedulers = ("DDIM:eta=1", "EulerAncestral")
    settings = make_settings(**few, schedulers=schedulers, num_trajectories=8, seed=3)
    other = make_settings(**few, schedulers=schedulers[:1], prompts=("a car", "a hat"))
    for split, one in (("train", settings), ("held_out", other)):
        list(log_trajectories(pipe, one, folder / "log", split=split))
    return Work(folder / "model", folder / "log")


@pytest.fixture(autouse=True)
def undo_what_a_script_sets() -> Iterator[None]:
    """Gives back signals, logging and accelerate's one-per-process state."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    handlers, level = logging.root.handlers[:], logging.root.level
    reset()
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(work: Work, output: Path, *options: str, steps: int = 4) -> None:
    reset()
    named = (f"--log={work.log}", f"--model={work.model}", f"--output={output}")
    train_feature_decoder.main([*named, f"--max_train_steps={steps}", *SMALL, *options])


# --- what it learns from


def test_states_of_a_log_are_read_in_variance_preserving_units(work: Work) -> None:
    pipe = MCTDPipeline.from_pretrained(work.model)
    splits = read_latent_states(work.log, pipe.scheduler.config)
    assert sorted(splits) == ["held_out", "train"]
    states, rows = splits["train"], read_rows(work.log)
    assert {row["scheduler"] for row in rows} == {
        "DDIMScheduler",
        "EulerAncestralDiscreteScheduler",
    }
    assert len(states.prompt) == 4 * len(rows)
    for number, row in enumerate(rows):
        part = slice(4 * number, 4 * number + 4)
        assert set(states.prompt[part]) == {row["prompt"]}
        assert states.timestep[part].tolist() == row["timestep"]
        assert states.log_snr[part].tolist() == row["log_snr"][:-1]
        scale = (
            1.0
            if row["scheduler"] == "DDIMScheduler"
            else (1 / (1 + np.exp(-np.array(row["log_snr"][:-1])))[:, None]) ** -0.5
        )
        np.testing.assert_allclose(
            states.latents[part].reshape(4, -1) * scale, row["latents"], rtol=5e-3, atol=5e-3
        )
        np.testing.assert_array_equal(states.denoised[part].reshape(4, -1), row["denoised"])


@torch.no_grad()
def test_maps_are_those_that_a_search_with_guidance_keeps(work: Work) -> None:
    pipe = make_pipe()
    states = read_latent_states(work.log, pipe.scheduler.config)["train"]
    rows = np.array([0, 5, 9])
    maps = MapReader(pipe, "up.0", PROMPTS)(states, rows)
    world = pipe.open_world(
        states.prompt[rows].tolist(),
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
    )
    with FeatureTap(pipe.unet, rows_per_latent=2, map_block="up.0") as tap:
        latents = torch.from_numpy(states.latents[rows]).float()
        world.prepared.network(latents, torch.from_numpy(states.timestep[rows]), [0, 1, 2])
        expected = tap.take_maps()
    assert expected is not None
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)


def test_a_world_fuses_features_by_a_decoder(work: Work) -> None:
    pipe = make_pipe()
    decoder = FeatureToLatent("StableDiffusionPipeline", "up.0", 16, hidden_size=8).eval()
    world = pipe.open_world(
        PROMPTS[0],
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        feature_decoder=decoder,
    )
    environment = world.environment
    handles = environment.reset(np.zeros(2, dtype=np.int64), np.array([5, 6]))
    environment.denoise(handles)
    assert environment.feature_maps(handles).shape == (2, 16, 8, 8)
    assert list(environment.features(handles)) == ["estimate"]
    fusions = environment.fuse([handles], [np.full(2, 0.5)], ["features"], np.array([0]))
    assert len(fusions.handles) == 1


def test_a_log_of_another_model_is_refused(work: Work) -> None:
    pipe = make_pipe()
    states = read_latent_states(work.log, pipe.scheduler.config)["train"]
    reader = MapReader(pipe, "up.0", PROMPTS)
    smaller = states._replace(latents=states.latents[..., :4])
    with pytest.raises(ConfigError, match=r"of the log have shape \(4, 8, 4\), those of the model"):
        reader(smaller, np.array([0]))


# --- training


def test_it_learns_loads_and_says_how_good_it_is(work: Work, tmp_path: Path) -> None:
    options = ("--learning_rate=0.02", "--warmup_steps=1", "--decay_steps=20", "--ema_decay=0.5")
    others = ("--block=up.1", "--base_model=owner/model", "--half_precision=true")
    run(work, tmp_path, *options, *others, steps=80)
    decoder = FeatureToLatent.from_pretrained(tmp_path)
    config = decoder.config
    assert (config["family"], decoder.block) == ("StableDiffusionPipeline", "up.1")
    assert (config["feature_channels"], config["latent_channels"]) == (8, 4)
    assert config["scale_factor"] == 1
    assert config["guidance_scales"] == [4.0]
    assert load_file(tmp_path / WEIGHTS)["first.weight"].dtype == torch.float16
    errors = json.loads((tmp_path / "figures.json").read_text("utf-8"))["held_out"]
    assert errors
    # Random weights leave the sample in the features, of which their estimates are a multiple.
    assert np.mean([one["decoder"] / one["mean"] for one in errors]) < 0.8
    card = (tmp_path / "README.md").read_text("utf-8")
    for text in (
        "base_model: owner/model",
        "accelerate launch training/train_feature_decoder.py --log=",
        "trained for 80 steps",
        "| train | 32 | 3 |",
        "## Errors on held_out",
    ):
        assert text in card


def test_a_run_that_was_stopped_goes_on_to_the_very_weights_of_one_that_was_not(
    work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    kept = train_feature_decoder.learning_rate

    def stop_at_second_step(step: int, *others: Any) -> float:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return float(kept(step, *others))

    options = ("--validation_steps=2", "--ema_decay=0.5")
    train_feature_decoder.learning_rate = stop_at_second_step
    try:
        run(work, stopped, *options)
    finally:
        train_feature_decoder.learning_rate = kept
    assert "stopped at step 2" in capsys.readouterr().err
    assert not (stopped / WEIGHTS).exists()
    run(work, stopped, *options, "--resume_from_checkpoint=latest")
    run(work, whole, *options)
    ours, theirs = load_file(stopped / WEIGHTS), load_file(whole / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_decoder_is_trained_on(work: Work, tmp_path: Path) -> None:
    run(work, tmp_path / "begun", steps=1)
    begun = f"--init_from={tmp_path / 'begun'}"
    run(work, tmp_path / "more", begun, "--learning_rate=1e-6", steps=1)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("begun", "more"))
    torch.testing.assert_close(after["last.weight"], before["last.weight"], atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match=r"of block up\.0"):
        run(work, tmp_path, begun, "--block=down.0")


def test_without_another_split_some_prompts_are_held_out(work: Work) -> None:
    states = read_latent_states(work.log, make_pipe().scheduler.config)["train"]
    train, held_out = train_feature_decoder.split_states({"train": states}, "train", 0.3, 0)
    prompts = [set(part.prompt) for part in (train, held_out["held_out"])]
    assert [len(some) for some in prompts] == [2, 1]
    assert not prompts[0] & prompts[1]
    with pytest.raises(ConfigError, match="3 prompts of split 'other' are in 'train' too"):
        train_feature_decoder.split_states({"train": states, "other": states}, "train", 0.3, 0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--log=nowhere",), "'nowhere' is no folder"),
        (("--train_split=all",), "train_split='all' is no split of the log"),
        (("--block=block.0",), r"has no blocks block.0: name some of down.0"),
        (("--resume_from_checkpoint=nowhere",), "is no folder checkpoint-STEP"),
    ],
)
def test_what_cannot_work_ends_in_one_sentence(
    work: Work,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str],
    complaint: str,
) -> None:
    named = [f"--log={work.log}", f"--model={work.model}", f"--output={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train_feature_decoder", *named, *SMALL, *options])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    message = str(caught.value)
    assert re.match(rf"train_feature_decoder: .*{re.escape(complaint)}", message)
    assert "\n" not in message
