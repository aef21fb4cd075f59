"""Prompts over two processes of `accelerate launch`: as in one process, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.processes import search_in_processes
from mctd_diffusers.results import read_recipe
from tests.in_processes import PROMPTS
from tests.pipelines import tiny

ROOT = Path(__file__).parents[1]
LAUNCH = "accelerate.commands.accelerate_cli launch --num_machines 1 --mixed_precision no"


def launch(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `in_processes.py` in a number of processes."""
    launcher = ["-m", *LAUNCH.split(), "--num_processes", processes, "--dynamo_backend", "no"]
    if processes > 1:
        launcher.append("--multi_gpu")  # the launcher of torch, with gloo where there is no GPU
    return subprocess.run(
        [sys.executable, *map(str, launcher), "-m", "tests.in_processes", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    MCTDPipeline.from_pipe(tiny.make_stock()).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_two_processes_find_what_one_finds(model: Path, tmp_path: Path) -> None:
    runs = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = launch(processes, model, folder)
        assert done.returncode == 0, done.stderr
        runs[processes] = (
            done,
            [torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))],
        )
    done, (first, second) = runs[2]
    (alone,) = runs[1][1]
    assert first.pop("status") == second.pop("status") == alone.pop("status") == (1, 1)
    assert first == second  # every process has everything
    assert first.pop("processes") == [0, 0, 0, 1, 1]
    assert alone.pop("processes") == [0] * 5
    for name, found in alone.items():
        if name != "errors":
            assert first[name] == found, name
    assert alone["prompts"] == PROMPTS
    assert alone["seeds"] == [3, 4, 5, 6, 7]
    for run in (alone, first):  # one prompt failed, the rest is delivered
        assert list(run["errors"]) == ["a bad idea"]
        assert "RuntimeError: no idea" in run["errors"]["a bad idea"]
        assert [image is None for image in run["images"]] == [False, False, True, False, False]
    assert_same_files(tmp_path / "1" / "cli", tmp_path / "2" / "cli", alone)
    said = [line for line in done.stderr.splitlines() if line.startswith("mctd: 'a bad idea'")]
    assert len(said) == 1  # by the first process alone
    saved = tmp_path / "2" / "saved"
    assert sorted(path.name for path in saved.iterdir()) == ["process-0-of-2", "process-1-of-2"]


def assert_same_files(one: Path, two: Path, alone: dict[str, Any]) -> None:
    """The command line wrote the same in one process and in two."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert "a-bad-idea.png" not in names
    for name in (name for name in names if name.endswith(".png")):
        with Image.open(one / name) as picture, Image.open(two / name) as same:
            assert picture.tobytes() == same.tobytes(), name
    assert read_recipe(two / "a-cup.png") == alone["recipes"][3]
    reports = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    (found,), (same,) = (report["searches"].values() for report in reports)
    assert [image["prompt"] for image in found["images"]] == PROMPTS
    for image, other in zip(found["images"], same["images"], strict=True):
        assert image | {"cost": 0} == other | {"cost": 0}  # prices are measured in each run
    assert found["ledger"]["nfe"] == same["ledger"]["nfe"]


def test_one_process_needs_no_launcher(model: Path) -> None:
    pipe = MCTDPipeline.from_pretrained(model, reward_model=tiny.redness)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 4, "compute": 2, "rows_per_call": 4}
    out = search_in_processes(pipe, PROMPTS[:3], seed=3, together=2, **call)
    assert [one.prompt for one in out.found] == PROMPTS[:3]
    assert out.errors == {}
    for one in out.found:
        alone = pipe(one.prompt, generator=torch.Generator().manual_seed(one.seed), **call)
        assert one.image is not None
        assert one.image.tobytes() == alone.images[0].tobytes()
        assert one.reward == alone.rewards[0]
        assert one.recipe is not None
        assert pipe.replay(one.recipe).images[0].tobytes() == one.image.tobytes()
    assert out.ledger is not None
    assert out.ledger.total.nfe == sum(one.nfe for one in out.found)
    assert sorted(out.ledger.by_problem) == [0, 1, 2]
    plain = search_in_processes(pipe, PROMPTS[:1], search=None, num_inference_steps=2)
    assert plain.ledger is None
    assert plain.found[0].recipe is None
    assert plain.images[0] is not None


def test_what_the_helper_sets_itself_is_refused(model: Path) -> None:
    pipe = MCTDPipeline.from_pretrained(model)
    with pytest.raises(ConfigError, match="generator, output_type are set by search_in_processes"):
        search_in_processes(pipe, ["a"], generator=None, output_type="pt")
    with pytest.raises(ConfigError, match="save_to saves the search of one call"):
        search_in_processes(pipe, ["a"], save_to="folder")
    with pytest.raises(ConfigError, match="together=0"):
        search_in_processes(pipe, ["a"], together=0)


def test_a_found_image_is_saved_with_its_recipe(model: Path, tmp_path: Path) -> None:
    pipe = MCTDPipeline.from_pretrained(model, reward_model=tiny.redness)
    pipe.set_progress_bar_config(disable=True)
    (one,) = search_in_processes(pipe, ["a cup"], num_inference_steps=2, compute=1).found
    one.save(tmp_path / "cup.png")
    assert read_recipe(tmp_path / "cup.png") == one.recipe
