"""Saved searches as data: what is read of them, the dataset made of it, and heads refined on it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset

from mctd_diffusers import cli, hub
from mctd_diffusers.commands import train_ige as command
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.models.observations import Observations, joined
from mctd_diffusers.models.refining import RefinementSettings, validation_loss
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.saved_calls import CallSaver
from mctd_diffusers.search.strategies import MCTD, BestOfN
from mctd_diffusers.trajectories import searches as searches_module
from mctd_diffusers.trajectories.searches import read_search, read_searches, write_searches
from tests.models.test_refining import make_head, search_of
from tests.pipelines import tiny
from tests.training.test_train_ige import reset, train_ige, undo_what_a_script_sets

__all__ = ["undo_what_a_script_sets"]

PROMPTS = ["a red cat", "two dogs"]
SEARCH = MCTD(edge_gain=0.5, seed_share=0, candidates=3)
CALL: dict[str, Any] = {
    "num_inference_steps": 6,
    "guidance_scale": 4.0,
    "output_type": "pt",
    "rows_per_call": 2,
    "search": SEARCH,
    "compute": 3,
}


def search(pipe: MCTDPipeline, folder: Path, first_seed: int = 0, **call: Any) -> Any:
    generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(PROMPTS))]
    return pipe(PROMPTS, generator=generators, save_to=folder, **{**CALL, **call})


def make_pipe() -> MCTDPipeline:
    parts = {"reward_model": tiny.redness, "ige": tiny.make_ige()}
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Observations]:
    """Two saved calls, and what the pipeline itself observed of them."""
    folder, pipe = tmp_path_factory.mktemp("searches"), make_pipe()
    search(pipe, folder / "one", online_ige=True, include_plain=True, compute=4)
    search(pipe, folder / "two" / "deep", 10, online_ige=True)
    refiner = pipe.ige_refiner
    return folder, joined([refiner.training, refiner.validation])


def assert_same(one: Observations, other: Observations) -> None:
    """Equal rows, in whatever order the images stand."""
    order, other_order = (np.argsort(part.image, kind="stable") for part in (one, other))
    for column in dataclasses.fields(Observations):
        if column.name not in ("features", "values"):
            np.testing.assert_array_equal(
                getattr(one, column.name)[order], getattr(other, column.name)[other_order]
            )
    for found, same in zip(one.values[order], other.values[other_order], strict=True):
        np.testing.assert_array_equal(found, same)
    assert set(one.features) == set(other.features)
    for name, rows in one.features.items():
        np.testing.assert_array_equal(rows[order], other.features[name][other_order])


def test_what_is_read_without_a_model_is_what_the_pipeline_observed(saved: Any) -> None:
    folder, observed = saved
    data = read_searches(folder)
    assert data.family == "StableDiffusionPipeline"
    assert len(data.observations) == len(observed) > 5
    assert_same(data.observations, observed)
    assert set(read_search(folder / "one").observations.prompt.tolist()) == set(PROMPTS)


def test_a_search_that_was_stopped_is_read_as_far_as_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saves = CallSaver.save, 0

    def stopping(saver: CallSaver, *arguments: Any) -> None:
        nonlocal saves
        save(saver, *arguments)
        saves += 1
        if saves == 5:
            raise RuntimeError("the process is gone")

    monkeypatch.setattr(CallSaver, "save", stopping)
    with pytest.raises(RuntimeError, match="gone"):
        search(make_pipe(), tmp_path, stride_policy="ige", save_every_s=0)
    assert len(read_searches(tmp_path).observations) > 0


def test_it_is_a_dataset_like_any_other(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searches_module, "ROWS_PER_SHARD", 7)
    data = read_searches(saved[0])
    shards = write_searches(data, tmp_path / "dataset", command="mctd log-searches searches")
    count = -(-len(data.observations) // 7)
    assert [path.name for path in shards] == [
        f"searches-{number:05d}-of-{count:05d}.parquet" for number in range(count)
    ]
    opened = load_dataset(str(tmp_path / "dataset"), cache_dir=str(tmp_path / "cache"))
    rows = opened["searches"]
    assert len(rows) == len(data.observations)
    first = rows[0]
    assert first["values"] == data.observations.values[0].tolist()
    assert first["prompt"] in PROMPTS
    assert {name: len(row) for name, row in first["features"].items()} == {
        name: part.shape[1] for name, part in data.observations.features.items()
    }
    card = (tmp_path / "dataset" / "README.md").read_text("utf-8")
    assert all(f"| `{name}` |" in card for name in rows.column_names)
    assert "mctd log-searches searches" in card
    again = read_searches(tmp_path / "dataset")
    assert again.family == data.family
    assert_same(again.observations, data.observations)
    with pytest.raises(ConfigError, match="holds a dataset of searches already"):
        write_searches(data, tmp_path / "dataset")


def test_searches_are_pushed_as_a_dataset(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed = []

    class Commit:
        commit_url = "https://hub.test/commit/1"

    def push(folder: Path, repository: str, *, repo_type: str) -> Commit:
        pushed.append((folder, repository, repo_type))
        return Commit()

    monkeypatch.setattr(hub, "push_folder", push)
    output = tmp_path / "dataset"
    given = ["log-searches", str(saved[0]), "--output", str(output), "--push-to-hub", "me/searches"]
    assert cli.main(given) == 0
    assert pushed == [(output, "me/searches", "dataset")]
    said = capsys.readouterr().out
    assert f"{len(saved[1])} rows in 1 files" in said
    assert "pushed: https://hub.test/commit/1" in said


# What is refused


def test_searches_without_features_are_refused_with_the_cure(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved[0] / "one", tmp_path / "one")
    search(make_pipe(), tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"plain' was saved without features .*online_ige=True"):
        read_searches(tmp_path)


def test_folders_from_which_nothing_can_be_learned_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no saved search is in"):
        read_searches(tmp_path)
    search(make_pipe(), tmp_path / "one", search=BestOfN(n=2), compute=2, online_ige=True)
    with pytest.raises(ConfigError, match="no search tried two draws"):
        read_searches(tmp_path)


def test_models_are_not_mixed(saved: Any, tmp_path: Path) -> None:
    data = read_searches(saved[0])
    write_searches(data, tmp_path)
    narrow = {name: rows[:, :5] for name, rows in data.observations.features.items()}
    other = dataclasses.replace(data.observations, features=narrow)
    (path,) = write_searches(data._replace(observations=other), tmp_path / "other")
    shutil.copy(path, tmp_path / "data" / "searches-00001-of-00002.parquet")
    with pytest.raises(ConfigError, match="keep a folder to one model"):
        read_searches(tmp_path)


def test_files_that_are_broken_are_refused(saved: Any, tmp_path: Path) -> None:
    (path,) = write_searches(read_searches(saved[0]), tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="is no parquet file"):
        read_searches(tmp_path)


# Refining


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of searches whose siblings differ by what stands in a feature; and a head."""
    folder = tmp_path_factory.mktemp("toy")
    seen = joined([search_of(image) for image in range(40)])
    data = searches_module.SearchData("StableDiffusionPipeline", seen)
    write_searches(data, folder / "searches")
    make_head().save_pretrained(folder / "head")
    return folder


def refine(toy: Path, output: Path, *options: str, steps: int = 60) -> None:
    reset()
    train_ige.main(
        [
            f"--from_searches={toy / 'searches'}",
            f"--init_from={toy / 'head'}",
            f"--output={output}",
            f"--max_train_steps={steps}",
            "--validation_share=0.3",
            "--validation_steps=20",
            *options,
        ]
    )


def test_a_head_is_refined_on_them(toy: Path, tmp_path: Path) -> None:
    refine(toy, tmp_path / "refined", "--learning_rate=0.003", "--base_model=me/model")
    held_out = joined([search_of(image) for image in range(1000, 1010)])
    before, after = (
        validation_loss(InformationGainEvaluator.from_pretrained(one), held_out, settings)
        for settings in [RefinementSettings()]
        for one in (toy / "head", tmp_path / "refined")
    )
    assert after < before - 0.1
    card = (tmp_path / "refined" / "README.md").read_text("utf-8")
    assert "base_model: me/model" in card
    assert "refined for 60 steps" in card
    assert "--from_searches" in card


def test_a_head_that_does_not_get_better_stays(toy: Path, tmp_path: Path) -> None:
    refine(toy, tmp_path / "same", "--learning_rate=1.0", "--patience=1", steps=40)
    head, same = (
        InformationGainEvaluator.from_pretrained(one).state_dict()
        for one in (toy / "head", tmp_path / "same")
    )
    assert "refined for 0 steps" in (tmp_path / "same" / "README.md").read_text("utf-8")
    for name, weight in head.items():
        torch.testing.assert_close(weight, same[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--init_from=", "name it with --init_from"),
        ("--validation_share=0", "0 to validate on: save more searches"),
    ],
)
def test_what_cannot_be_refined_is_refused(
    toy: Path, tmp_path: Path, option: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        refine(toy, tmp_path, option)


def test_a_head_of_another_model_is_not_refined(toy: Path, saved: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads features"):
        refine(toy, tmp_path, f"--from_searches={saved[0]}")


def test_the_command_line_launches_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched: list[list[str]] = []

    def launch(name: str, arguments: list[str], *, processes: int) -> int:
        assert (name, processes) == ("train_ige", 1)
        launched.append(arguments)
        return 0

    monkeypatch.setattr(command, "launch_script", launch)
    given = ["train-ige", "--from-searches", "runs", "--init-from", "me/head", "--output", "new"]
    assert cli.main([*given, "--max_train_steps", "30"]) == 0
    asked = ["--from_searches", "runs", "--output", "new"]
    assert launched == [[*asked, "--max_train_steps", "30", "--init_from", "me/head"]]
    assert cli.main(given) == 0
    assert launched[1] == [*asked, "--init_from", "me/head"]
    assert cli.main(["train-ige", "log", "--init-from", "me/head"]) == 0
    assert launched[2][:2] == ["--log", "log"]
    for wrong, message in (
        (["train-ige"], "give one of them"),
        ([*given[:1], "log", *given[1:]], "give one of them"),
        (given[:3], "name it with --init-from"),
    ):
        assert cli.main(wrong) == 1
        assert message in capsys.readouterr().err
