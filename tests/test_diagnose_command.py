"""``mctd diagnose`` on a tiny model, in process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mctd_diffusers import cli
from mctd_diffusers.pipeline import MCTDPipeline
from tests.pipelines import tiny

PROMPTS = ["two blue cars", "a cup"]
QUICK = ["--pool", "2", "--siblings", "1", "--continuations", "2", "--gold", "brightness"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a reward, and a search saved beside it."""
    folder = tmp_path_factory.mktemp("model")
    pipe = MCTDPipeline.from_pipe(tiny.make_stock(), reward_model=tiny.make_clip_reward())
    pipe.save_pretrained(folder)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    pipe(
        PROMPTS, search="beam", num_inference_steps=3, compute=3, rows_per_call=2,
        generator=generators, save_to=folder / "search",
    )  # fmt: skip
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["diagnose", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_saved_searches_are_diagnosed_after_their_cost_is_said(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    saved = model / "search"
    status, out, err = run(
        capsys, saved, saved, "--model", model, "--output", tmp_path / "new", *QUICK, "--limit", 1
    )
    assert status == 0, err
    said = [line for line in err.splitlines() if line.startswith("mctd: ")]
    data = json.loads((tmp_path / "new" / "diagnosis.json").read_text())
    nfe = data["prompts"][0]["spent"]["nfe"]
    assert len(said) == 2
    assert said[0].startswith(f"mctd: diagnosing 1 image of {saved}: {nfe} NFE, about ")
    assert [prompt["prompt"] for prompt in data["prompts"]] == [PROMPTS[0]] * 2
    report = (tmp_path / "new" / "report.md").read_text()
    assert report in out
    assert "gold is brightness" in report
    assert str(tmp_path / "new" / "report.md") in out


def test_ctrl_c_leaves_a_report_on_what_is_done(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "impatience.py").write_text(
        "def gold(images, prompts):\n"
        f"    if {PROMPTS[1]!r} in prompts:\n"
        "        raise KeyboardInterrupt\n"
        "    return [0.5] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    status, _, err = run(
        capsys, model / "search", "--model", model, "--output", tmp_path / "new", *QUICK,
        "--gold", "impatience:gold", "--top-gold", 1,
    )  # fmt: skip
    assert status == 130
    assert "stopped by Ctrl-C; 2 files are saved" in err
    data = json.loads((tmp_path / "new" / "diagnosis.json").read_text())
    assert [prompt["prompt"] for prompt in data["prompts"]] == PROMPTS[:1]
    assert data["summary"]["shortfall"]["mean"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--continuations", "3"], "continuations is 3; give an even number"),
        (["--gold", "judge"], "the judge in the box cannot read every prompt"),
        (["--gold", "no_such"], "unknown reward 'no_such'"),
        (["--reward", "brightness"], "reward"),
    ],
)
def test_what_cannot_be_diagnosed_is_one_message(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    tmp_path: Path,
    options: list[str],
    said: str,
) -> None:
    # Outside the judge's grammar.
    pipe = MCTDPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe("Lorem ipsum", num_inference_steps=2, compute=1, save_to=tmp_path / "search")
    status, _, err = run(capsys, tmp_path / "search", "--model", model, *QUICK, *options)
    lines = err.splitlines()
    assert status == 1, err
    assert len(lines) == 1, err
    assert said in lines[0]


def test_a_folder_without_a_search_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = run(capsys, tmp_path, "--output", tmp_path / "new", *QUICK)
    assert status == 1
    assert "no saved search is in" in err
    assert not (tmp_path / "new").exists()
