"""Logs as folders: written, gone on with, split over processes, opened and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import List, Value, load_dataset

from mctd_diffusers.denoising.scheduler_names import read_scheduler
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.search.stride_policies import PURE_NOISE
from mctd_diffusers.trajectories import plan
from mctd_diffusers.trajectories.card import write_card
from mctd_diffusers.trajectories.dataset import read_log
from mctd_diffusers.trajectories.files import shard_path, whole_splits
from mctd_diffusers.trajectories.logging import (
    estimate_log,
    is_deterministic,
    log_trajectories,
)
from mctd_diffusers.trajectories.plan import nfe_of, shard_of
from tests.pipelines import tiny, tiny_sd3
from tests.trajectories.tiny_logs import files_of, make_pipe, make_settings, read_rows

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def pipe() -> MCTDPipeline:
    return make_pipe()


@pytest.fixture(autouse=True)
def few_fine_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "FINE_STEPS", 12)


@pytest.fixture(scope="module")
def log(pipe: MCTDPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two splits, written without interruption, and its card."""
    folder = tmp_path_factory.mktemp("log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "FINE_STEPS", 12)
        assert list(log_trajectories(pipe, make_settings(), folder, command="logged")) == [0, 1, 2]
        held_out = make_settings(num_trajectories=2, siblings=4, seed=2)
        assert list(log_trajectories(pipe, held_out, folder, split="held_out")) == [0]
        write_card(pipe, folder)
    return folder


def test_the_folder_opens_as_a_dataset(log: Path, tmp_path: Path) -> None:
    data = load_dataset(str(log), cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in data.items()} == {"train": 5, "held_out": 2}
    row = data["train"].with_format("numpy")[3]
    steps = row["num_steps"]
    assert row["index"] == 3
    assert row["latent_shape"].tolist() == [4, 8, 8]
    assert np.shape(row["latents"]) == np.shape(row["denoised"]) == (steps, 256)
    assert data["train"].features["latents"] == List(List(Value("float16")))
    assert len(row["value"]) == len(row["timestep"]) == len(row["log_snr"]) - 1 == steps
    assert np.isfinite(row["log_snr"]).all()
    assert (np.diff(row["log_snr"]) > 0).all()
    assert {*row["features"]} == {"down.0", "down.1", "mid", "estimate"}
    assert np.shape(row["features"]["mid"]) == (steps, 2 * 16)
    assert np.shape(row["features"]["estimate"]) == (steps, 3 * 4)
    assert np.shape(row["jumps"]["denoised"]) == (len(row["jumps"]["stride"]), 256)
    assert np.shape(row["siblings"]["denoised"])[1:] == (3, 256)


def test_the_card_says_what_is_there_and_how_it_was_made(log: Path, pipe: MCTDPipeline) -> None:
    card = (log / "README.md").read_text()
    assert "split: train\n        path: data/train-*.parquet" in card
    assert "split: held_out" in card
    settings = make_settings()
    nfe = sum(
        nfe_of(settings, shard, deterministic=is_deterministic(pipe, shard.scheduler))
        for shard in (shard_of(settings, number) for number in range(3))
    )
    assert f"| `train` | 5 | 3 | 3 | {nfe:,} | " in card
    assert "```bash\nlogged\n```" in card
    assert "`estimate` 12" in card
    assert "redness" in card
    assert "grids: 4, 6 steps, strides 1, 2, 4" in card
    assert list(whole_splits(log)) == ["train", "held_out"]
    described = {name for name in read_rows(log)[0] if f"`{name}" in card or f" {name}" in card}
    assert described == {*read_rows(log)[0]}


def test_half_precision_is_all_that_is_lost(pipe: MCTDPipeline, log: Path) -> None:
    row = read_rows(log)[0]
    for name in ("latents", "denoised"):
        stored = np.array(row[name])
        assert (stored == stored.astype(np.float16)).all()


def test_an_interrupted_log_is_completed_by_what_is_missing(
    pipe: MCTDPipeline, log: Path, tmp_path: Path
) -> None:
    writing = log_trajectories(pipe, make_settings(), tmp_path, command="logged")
    assert next(writing) == 0
    writing.close()
    (tmp_path / "data" / ".train-00001-of-00003.parquet").write_bytes(b"half a shard")
    assert list(log_trajectories(pipe, make_settings(), tmp_path)) == [1, 2]
    assert list(log_trajectories(pipe, make_settings(), tmp_path)) == []
    expected = {name: file for name, file in files_of(log).items() if "train" in name}
    assert files_of(tmp_path) == expected


def test_two_processes_write_what_one_writes(pipe: MCTDPipeline, log: Path, tmp_path: Path) -> None:
    written = [
        list(
            log_trajectories(
                pipe,
                make_settings(),
                tmp_path,
                process_index=process,
                num_processes=2,
                command="logged",
            )
        )
        for process in range(2)
    ]
    assert written == [[0, 2], [1]]
    assert files_of(tmp_path) == {n: file for n, file in files_of(log).items() if "train" in n}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"siblings": 4}, "siblings 3, now 4"),
        ({"num_trajectories": 7}, "num_trajectories 5, now 7"),
        ({"grids": (4, 5)}, r"grids\[1\] 6, now 5"),
        ({"grids": (4,)}, "2 grids, now 1"),
        ({"prompts": ("a red cat", "two dogs", "a cup")}, "'a cup on a car', now 'a cup'"),
        ({"rows_per_call": 3}, "rows_per_call 2, now 3"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    pipe: MCTDPipeline, log: Path, changes: dict[str, Any], complaint: str
) -> None:
    before = files_of(log)
    with pytest.raises(ConfigError, match=f"begun with other settings .*{complaint}.*: go on with"):
        next(log_trajectories(pipe, make_settings(**changes), log))
    assert files_of(log) == before


def test_rows_per_call_is_settled_when_a_split_begins(pipe: MCTDPipeline, tmp_path: Path) -> None:
    undecided = make_settings(rows_per_call=None)
    assert next(log_trajectories(pipe, undecided, tmp_path)) == 0
    begun = json.loads((tmp_path / "settings-train.json").read_text())
    assert begun["rows_per_call"] >= 1
    begun["rows_per_call"] = 5  # as another device would have had it
    (tmp_path / "settings-train.json").write_text(json.dumps(begun))
    assert next(log_trajectories(pipe, undecided, tmp_path)) == 1
    again = make_settings(rows_per_call=5)
    assert next(log_trajectories(pipe, again, tmp_path)) == 2


def test_another_model_or_reward_is_refused(log: Path) -> None:
    other = make_pipe()
    with_other_reward = make_pipe(reward="brightness")
    other.unet.conv_in.weight.data[0, 0, 0, 0] += 1
    with pytest.raises(ConfigError, match=r"unet of model '[0-9a-f]{16}', now '[0-9a-f]{16}'"):
        next(log_trajectories(other, make_settings(), log))
    with pytest.raises(ConfigError, match="reward 'redness', now 'brightness'"):
        next(log_trajectories(with_other_reward, make_settings(), log))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"schedulers": ("Amused",)}, "'Amused' is one of the samplers that set noise levels"),
        ({"schedulers": ("FlowEuler",)}, "'FlowEuler' is for flow-matching models"),
        ({"schedulers": ("DDIMInverse",)}, "DDIMInverseScheduler cannot be branched"),
        ({"grids": (4, 1001)}, "grid 1001 is run on 1001 fine steps, and .* knows 1000 timesteps"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_anything_is_written(
    pipe: MCTDPipeline, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        next(log_trajectories(pipe, make_settings(**changes), tmp_path))
    with pytest.raises(ConfigError, match=complaint):
        estimate_log(pipe, make_settings(**changes))
    assert files_of(tmp_path) == {}


@pytest.mark.parametrize("split", ["held-out", "", "a/b", "all", "train.x"])
def test_names_that_datasets_cannot_open_are_refused(
    pipe: MCTDPipeline, tmp_path: Path, split: str
) -> None:
    with pytest.raises(ConfigError, match="split is named"):
        next(log_trajectories(pipe, make_settings(), tmp_path, split=split))


def test_a_reward_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the value of a state is a reward"):
        next(log_trajectories(make_pipe(reward=None), make_settings(), tmp_path))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("DDIM", True),
        ("DDIM:eta=0.1", False),
        ("DDPM", False),
        ("Euler", True),
        ("EulerAncestral", False),
        ("DPM++2M", True),
        ("DPM++2M-SDE", False),
    ],
)
def test_schedulers_with_noise_are_known(
    pipe: MCTDPipeline, scheduler: str, expected: bool
) -> None:
    assert is_deterministic(pipe, read_scheduler(scheduler)) is expected


def test_an_estimate_counts_what_is_written(pipe: MCTDPipeline, log: Path) -> None:
    settings = make_settings()
    estimate = estimate_log(pipe, settings)
    begun = json.loads((log / "settings-train.json").read_text())
    assert (estimate.trajectories, estimate.shards, estimate.nfe) == (5, 3, begun["nfe"])
    numbers = sum(map(_bytes_in, read_rows(log)))
    assert estimate.bytes == pytest.approx(numbers, rel=0.01)
    assert estimate.seconds > 0
    twice = estimate_log(pipe, dataclasses.replace(settings, num_trajectories=500))
    assert twice.nfe > 50 * estimate.nfe


def _bytes_in(row: dict[str, Any]) -> int:
    """Bytes of the numbers of a row, two for each that is stored in half precision."""
    halves = [row["latents"], row["denoised"], row["final_latents"], row["jumps"]["latents"]]
    halves += [row["jumps"]["denoised"], row["siblings"]["denoised"], *row["features"].values()]
    singles = [row["value"], row["timestep"], row["log_snr"], row["siblings"]["values"]]
    singles += [row["jumps"][name] for name in ("truncation_error", "estimate_error", "value")]
    doubles = [row[part][n] for part in ("jumps", "siblings") for n in ("step_index", "stride")]
    return sum(
        size * np.size(numbers)
        for size, some in ((2, halves), (4, singles), (8, doubles))
        for numbers in some
    )


def test_shards_have_names_that_datasets_reads() -> None:
    assert shard_path(Path("log"), "train", 12, 64).name == "train-00012-of-00064.parquet"


def test_flows_are_logged_from_pure_noise_on(tmp_path: Path) -> None:
    pipe = MCTDPipeline.from_pipe(tiny_sd3.make_stock(), reward_model=tiny.redness)
    settings = make_settings(schedulers=("FlowEuler",), num_trajectories=2)
    assert list(log_trajectories(pipe, settings, tmp_path)) == [0]
    log = read_log(tmp_path)
    levels = log.splits["train"].states.log_snr
    assert levels.min() == PURE_NOISE
    assert levels[levels > PURE_NOISE].min() > -10
    assert log.feature_channels == {"block.0": 32, "block.1": 32, "estimate": 12}
