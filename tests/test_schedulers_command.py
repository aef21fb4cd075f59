"""``mctd schedulers`` on a tiny model, in process."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from mctd_diffusers import cli
from mctd_diffusers.denoising.schedulers import REFUSED, TRAITS
from tests.pipelines import tiny

# Of schedulers of diffusers under this numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a reward and a preview decoder, and prompts beside it."""
    folder = tiny.save_with_parts(tmp_path_factory.mktemp("model"))
    (folder / "prompts.txt").write_text("a cup\na red car\ntwo cats\n")
    return folder


def quick(model: Path, out: Path) -> list[object]:
    return [
        "--model", model, "--prompts", model / "prompts.txt", "--gold", "brightness", "--steps", 3,
        "--rows-per-call", 4, "--budgets", "2x", "--sibling-prompts", 1, "--siblings", 3,
        "--prompts-per-call", 2, "--out", out,
    ]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["schedulers", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_schedulers_are_compared_once_and_reported(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    arguments = [
        *quick(model, tmp_path), "--schedulers", "DDIM,Heun", "--strategies",
        "none,best_of_n,mctd", "--stride-policies", "budget,fixed:1", "--limit", 2,
    ]  # fmt: skip
    status, said, err = run(capsys, *arguments, "--dry-run")
    assert status == 0, err
    assert "10 cells to make, 0 found" in said
    planned = int(re.findall(r"^DDIM +(\d+)", said, re.MULTILINE)[0])
    assert not (tmp_path / "cells").exists()

    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 5
    assert {row["scheduler"] for row in rows} == {"DDIM", "Heun"}
    arms = {(row["arm"], row["stride_policy"], row["budget"]) for row in rows}
    assert arms == {
        ("plain", "", "1x"), ("plain", "", "2x"), ("best_of_n", "", "2x"),
        ("mctd", "budget", "2x"), ("mctd", "fixed:1", "2x"),
    }  # fmt: skip
    assert sum(int(row["nfe"]) for row in rows if row["scheduler"] == "DDIM") == planned
    assert all(int(row["nfe"]) <= int(row["budget"][0]) * 3 for row in rows)
    report = (tmp_path / "report.md").read_text("utf-8")
    assert "**DDIM**" in report
    assert "How early the value tells samples apart" in report
    for name in ("gold.png", "branching.png", "sheet.png", "sheet-mctd.png"):
        assert str(tmp_path / name) in out
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 600

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/*/*/*.json")}
    assert len(written) == 10
    status, again, err = run(capsys, *arguments)
    assert (status, again) == (0, out), err
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/*/*/*.json")}
    assert "0 cells to make, 10 found" in run(capsys, *arguments, "--dry-run")[1]


def test_plain_samples_alone_can_be_compared_with_another_reference(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    arguments = [
        *quick(model, tmp_path), "--schedulers", "DDIM,DPM++2M:karras", "--strategies",
        "none", "--sibling-prompts", 0, "--reference", "dpm++2m:karras", "--limit", 2,
    ]  # fmt: skip
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert not (tmp_path / "branching").exists()
    report = (tmp_path / "report.md").read_text("utf-8")
    assert "## Gold above DPM++2M:karras at equal NFE" in report
    assert "with best_of_n: " in out
    assert run(capsys, *arguments, "--report-only")[1] == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedulers", "DDIM,Eulr"], "no scheduler is named 'Eulr'; did you mean 'Euler'"),
        (["--schedulers", "DDIM,DDIMInverse"], "DDIMInverseScheduler cannot be branched: it adds"),
        (["--reference", "Heun"], "the reference 'Heun' is not compared"),
        (["--budgets", "9s"], "budget 9s: schedulers are compared at equal NFE"),
        (["--stride-policies", "ige"], "the pipeline has none"),
        (["--report-only"], "no cells of this comparison"),
        (["--gold", "judge"], "the judge in the box cannot read"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "own.txt").write_text("a castle at night\n")
    prompts = ["--prompts", tmp_path / "own.txt"]
    status, out, err = run(capsys, *quick(model, tmp_path / "out"), *prompts, *arguments)
    assert (status, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "cells").exists()


def test_all_that_can_be_stepped_is_listed_and_the_rest_has_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = run(capsys, "--list")
    assert status == 0, err
    table, reasons = out.split("Refused:\n")
    rows = [[entry.strip() for entry in line.split("|")[1:-1]] for line in table.splitlines()]
    by_name = {row[0]: row[1:6] for row in rows if row}
    assert by_name["DDIM"] == ["DDIMScheduler", "1", "any", "none", "own"]
    assert by_name["Heun"] == ["HeunDiscreteScheduler", "2", "any", "none", "injected"]
    assert set(TRAITS) == {kind for kind, *_ in by_name.values()} & set(TRAITS)
    assert {line[2:].split(":")[0] for line in reasons.splitlines()} == set(REFUSED)


def test_a_scheduler_of_one_s_own_is_checked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_schedulers.py").write_text(
        "from diffusers import EulerDiscreteScheduler\n"
        "class Renamed(EulerDiscreteScheduler):\n"
        "    pass\n"
        "class Turned(EulerDiscreteScheduler):\n"
        "    def step(self, sample, timestep, model_output, **rest):\n"
        "        return super().step(model_output, timestep, sample, **rest)\n"
    )
    status, out, err = run(capsys, "--check", "own_schedulers:Renamed")
    assert status == 0, err
    *findings, said = out.splitlines()
    assert len(findings) > 5
    assert all(line.startswith("yes  ") for line in findings)
    assert said.startswith("own_schedulers:Renamed can be stepped in a tree: calls a step 1")
    status, out, err = run(capsys, "--check", "own_schedulers:Turned")
    assert status == 1
    assert out.splitlines()[-1].startswith("no   takes the common arguments: `step` takes sample,")
    assert "Turned cannot be branched" in err
    sys.modules.pop("own_schedulers")
    status, out, err = run(capsys, "--check", "Heun")
    assert (status, err) == (0, "")
    assert out.startswith("Heun can be stepped in a tree: calls a step 2")
    status, out, err = run(capsys, "--check", "DDIMInverse")
    assert (status, out) == (1, "")
    assert "DDIMInverseScheduler cannot be branched: it adds noise" in err
