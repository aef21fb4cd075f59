"""`mctd generate`, saved and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mctd_diffusers.results import read_recipe
from mctd_diffusers.rewards import resolving
from tests.pipelines import tiny
from tests.test_cli import fails, model, run

__all__ = ["model"]  # a fixture

PROMPTS = ["two blue cars", "a cup"]


class Impatient:
    """Stops the command at one of its calls."""

    def __init__(self, at: int | None) -> None:
        self.at, self.calls = at, 0

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return tiny.redness(images, prompts)


@pytest.mark.parametrize("at", [1, 3])
def test_a_command_stopped_by_ctrl_c_goes_on_as_if_never_stopped(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    rewards = {"impatient": Impatient(at), "patient": Impatient(None)}
    for name, reward in rewards.items():
        monkeypatch.setitem(resolving._NAMED_REWARDS, name, lambda reward=reward: reward)
    settings = ["--steps", 4, "--compute", 3, "--rows-per-call", 4]
    settings += ["--search", "best_of_n:wave_size=1"]
    settings += ["--offload-latents", "--half-latents", "--reward-prompt", "blue"]
    call = [*PROMPTS, *settings, "--seed", 7, "--model", model]
    whole = ["--reward", "patient", "--output", tmp_path / "whole"]
    assert run(capsys, "generate", *call, *whole)[0] == 0
    status, _, err = run(
        capsys, "generate", *call, "--reward", "impatient", "--output", tmp_path / "cut",
        "--save-to", tmp_path / "saved",
    )  # fmt: skip
    assert status == 130
    assert "stopped by Ctrl-C" in err
    said = fails(capsys, "generate", *call, "--save-to", tmp_path / "saved")
    assert "holds a saved search" in said
    resume = ["--resume", tmp_path / "saved", "--model", model, "--reward", "patient"]
    status, out, err = run(capsys, "generate", *resume, "--output", tmp_path / "again", "--trees")
    assert status == 0, err
    names = ["a-cup", "two-blue-cars"]
    for name in names:
        files = [tmp_path / folder / f"{name}.png" for folder in ("whole", "again")]
        with Image.open(files[0]) as picture, Image.open(files[1]) as same:
            assert picture.tobytes() == same.tobytes()
        assert str(files[1]) in out
        assert (tmp_path / "again" / f"{name}-tree.png").is_file()
    reports = [
        json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("whole", "again")
    ]
    for key in ("command", "seed", "budget", "num_inference_steps", "guidance_scale"):
        assert reports[0][key] == reports[1][key]
    images = [next(iter(report["searches"].values()))["images"] for report in reports]
    for image, same in zip(*images, strict=True):
        assert image | {"cost": 0} == same | {"cost": 0}  # prices are measured in each run


def test_options_of_a_search_reach_it(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    call = ["a cup", "--steps", 4, "--compute", 3, "--model", model]
    given = ["--offload-latents", "--half-latents", "--include-plain", "--reward-prompt", "red"]
    status, _, err = run(capsys, "generate", *call, *given, "--output", tmp_path)
    assert status == 0, err
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["offload_latents"] is report["half_latents"] is report["include_plain"] is True
    recipe = read_recipe(tmp_path / "a-cup.png")
    assert recipe["half_latents"] is True
    assert (recipe["prompt"], recipe["reward_prompt"]) == ("a cup", "red")
    said = fails(capsys, "generate", *call, "--search", "none", "--half-latents")
    assert "leave --half-latents out, or name a search" in said


def test_fusions_are_reported_with_what_became_of_them(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    call = ["a cup", "--steps", 8, "--compute", 6, "--model", model, "--output", tmp_path]
    status, out, err = run(capsys, "generate", *call, "--fusion", "resample", "--trees")
    assert status == 0, err
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["fusion"] == "resample"
    (image,) = report["searches"]["mctd"]["images"]
    assert image["moves_made"]["fuse"]["times"]
    made, became = image["moves_made"]["fuse"]["times"], image["fusions"]
    assert f"{made} fuse" in out
    assert all(f"{count} {verdict}" in out for verdict, count in became.items())
    assert (tmp_path / "a-cup-tree.png").is_file()


def test_a_search_that_goes_on_takes_no_other_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    resume = ["--resume", tmp_path]
    assert "--steps cannot be given with --resume" in fails(
        capsys, "generate", *resume, "--steps", 8
    )
    assert "prompts cannot be given with --resume" in fails(capsys, "generate", "a cup", *resume)
    assert "no saved search is in" in fails(capsys, "generate", *resume)
    assert "Missing argument" in fails(capsys, "generate", status=2)
    said = fails(capsys, "generate", "a cup", "--search", "none", "--save-to", tmp_path / "new")
    assert "the stock pipeline, which saves no search" in said
