"""``mctd log-trajectories`` and ``mctd relabel``, and their script, as users run them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import enable_progress_bars

from mctd_diffusers import cli, hub
from mctd_diffusers.trajectories import plan
from tests.trajectories.tiny_logs import PROMPTS, files_of, make_pipe, read_rows

ROOT = Path(__file__).parents[2]
FINE_STEPS = plan.FINE_STEPS
LAUNCH = "accelerate.commands.accelerate_cli launch --num_machines 1 --mixed_precision no"

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipe().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder with a file of prompts, and fewer fine steps; undoes what commands set."""
    monkeypatch.setattr(plan, "FINE_STEPS", 12)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    monkeypatch.chdir(tmp_path)
    yield
    enable_progress_bars()


def arguments(model: Path, *more: str) -> list[str]:
    """A log of four files, in a second."""
    given = ["log-trajectories", "--prompts", "prompts.txt", "--trajectories", "4"]
    given += ["--model", str(model), "--reward", "brightness", "--output", "log"]
    given += [
        "--grids",
        "8",
        "--strides",
        "1,4",
        "--schedulers",
        "DDIM:eta=1,ddpm",
        "--probes",
        "1",
    ]
    given += ["--siblings", "2", "--shard-size", "1", "--rows-per-call", "1"]
    return [*given, *more]


def test_a_log_is_written_and_relabelled(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(model)) == 0
    said = capsys.readouterr()
    assert "4 trajectories: log, split train" in said.out
    assert "card: log/README.md" in said.out
    assert "4/4" in said.err
    card = (tmp_path / "log" / "README.md").read_text()
    command = " ".join(arguments(model)).replace(" --rows-per-call 1", "")
    for words in command.split(" --"):
        assert words in card
    again = ["relabel", "log", "--reward", "colourfulness", "--output", "new"]
    before = files_of(tmp_path / "log")
    assert cli.main([*again, "--model", str(model)]) == 0
    assert "4 files: new" in capsys.readouterr().out
    assert files_of(tmp_path / "log") == before
    assert (
        "mctd relabel log --output new --reward colourfulness"
        in (tmp_path / "new" / "README.md").read_text()
    )
    for old, new in zip(read_rows(tmp_path / "log"), read_rows(tmp_path / "new"), strict=True):
        assert old["latents"] == new["latents"]
        assert old["reward"] != new["reward"]
    assert cli.main([*again, "--model", str(model), "--reward", "jpeg"]) == 1
    assert "reward 'colourfulness', now 'JpegCompressibility'" in capsys.readouterr().err


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(tmp_path)
    assert cli.main(arguments(model, "--dry-run", "--trajectories", "1000")) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["trajectories"].strip() == "1,000 in 1,000 files"
    assert int(lines["NFE"].replace(",", "")) > 1000 * 8
    assert float(lines["gigabytes"]) > 0.01
    assert " in one process on " in lines["hours"]
    assert files_of(tmp_path) == before


def test_ctrl_c_says_what_is_there_and_how_to_go_on(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mctd_diffusers.trajectories import logging

    write, written = logging.write_shard, []

    def stop_at_the_third(dataset: Any, path: Path) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(dataset, path)
        written.append(path)

    monkeypatch.setattr(logging, "write_shard", stop_at_the_third)
    assert cli.main(arguments(model)) == 130
    assert (
        "stopped by Ctrl-C; 2 of 4 trajectories of split train are in log: the same command goes "
        "on from there"
    ) in capsys.readouterr().err
    monkeypatch.setattr(logging, "write_shard", write)
    assert cli.main(arguments(model)) == 0
    assert [row["index"] for row in read_rows(tmp_path / "log")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (
            ["--prompts", "nowhere.txt"],
            "'nowhere.txt' is neither 'tune' nor 'report' nor a readable",
        ),
        (["--prompts", "empty.txt"], "holds no prompts"),
        (["--strides", "1,64"], "stride 64 is longer than every grid"),
        (["--strides", "1,x"], "--strides is '1,x': give whole numbers"),
        (["--grids", "8,2000"], "grid 2000 is run on 2000 fine steps"),
        (["--schedulers", "ddin"], "no scheduler is named 'ddin'; did you mean 'DDIM'?"),
        (["--schedulers", "Amused"], "scheduler 'Amused' is one of the samplers that set"),
        (["--schedulers", "DDIMInverse"], "DDIMInverseScheduler cannot be branched"),
        (["--schedulers", "ddim:eta=2"], "eta is '2'; give the share of fresh noise"),
        (["--schedulers", "ddim:1"], "DDIMScheduler has no setting '1'"),
        (["--schedulers", "euler:eta=1"], "has an eta, and the step of EulerDiscreteScheduler"),
        (["--schedulers", ","], "a name is empty"),
        (["--split", "held-out"], "use letters, digits and underscores"),
        (["--guidance", "nan"], "guidance_scale is nan"),
        (["--reward", "brihgtness"], "brihgtness"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_what_cannot_work_ends_in_one_message(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    complaint: str,
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    before = files_of(tmp_path)
    assert cli.main(arguments(model, *more)) == 1
    said = capsys.readouterr().err
    assert complaint in said
    assert len(said.strip().splitlines()) == 1
    assert files_of(tmp_path) == before


def test_a_reward_is_asked_for(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(model)
    place = given.index("--reward")
    assert cli.main([*given[:place], *given[place + 2 :]]) == 1
    assert "has none: name one, as by --reward clip" in capsys.readouterr().err


def test_a_finished_log_is_pushed(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed = []

    class Commit:
        commit_url = "https://hub.test/commit/1"

    def push(folder: Path, repository: str, *, repo_type: str) -> Commit:
        pushed.append((str(folder), repository, repo_type))
        return Commit()

    monkeypatch.setattr(hub, "push_folder", push)
    assert cli.main(arguments(model, "--push-to-hub", "me/log")) == 0
    assert pushed == [("log", "me/log", "dataset")]
    assert "pushed: https://hub.test/commit/1" in capsys.readouterr().out


# --- killed -------------------------------------------------------------------------------------


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def quick(model: Path) -> list[str]:
    """A log of forty files, in seconds."""
    given = arguments(model, "--trajectories", "40", "--grids", "4,6", "--strides", "1")
    return [*given, "--schedulers", "DDIM:eta=1,ddpm"]


@pytest.mark.slow
def test_a_log_that_was_killed_ten_times_equals_one_that_was_not(
    model: Path, tmp_path: Path
) -> None:
    done = run("-m", "tests.trajectories.in_kills", tmp_path, 10, *quick(model), cwd=tmp_path)
    after = [line for line in done.stdout.splitlines() if "files, killed" in line]
    assert [line.split()[-1] for line in after] == ["True"] * 10
    files = [int(line.split()[0]) for line in after]
    assert files == sorted(files)
    assert 0 < files[-1] < 40
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert files_of(killed) == files_of(whole)
    assert [row["index"] for row in read_rows(killed / "log")] == list(range(40))


@pytest.mark.slow
def test_the_same_of_processes_that_begin_anew(model: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    command = ["-m", "mctd_diffusers", *quick(model)]
    run(*command, cwd=tmp_path)
    chance = random.Random(1)
    for files in range(2, 22, 2):
        child = subprocess.Popen([sys.executable, *command], cwd=killed, stderr=subprocess.DEVNULL)
        while len([*killed.rglob("train-*.parquet")]) < files and child.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        child.kill()
        assert child.wait() < 0
    assert len(read_rows(killed / "log")) < 40
    run(*command, cwd=killed)
    assert files_of(killed / "log") == files_of(tmp_path / "log")


# --- the script ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_of_the_script_write_what_one_command_writes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "FINE_STEPS", FINE_STEPS)  # as in the processes
    assert cli.main(arguments(model)) == 0
    script = ROOT / "training" / "log_trajectories.py"
    options = [word.replace("-", "_") if word[:2] == "--" else word for word in arguments(model)]
    options = [word.replace("__", "--", 1) for word in options[1:]]
    options[options.index("--output") + 1] = "shared"
    for processes in (2, 1):  # and again, with nothing to do
        launcher = f"-m {LAUNCH} --num_processes 1 --dynamo_backend no --cpu".split()
        if processes > 1:  # what `accelerate launch` calls where there are accelerators
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        done = run(*launcher, script, *options, cwd=tmp_path)
        assert "card: shared/README.md" in done.stderr
        assert ("2/2 [" in done.stderr) == (processes == 2)  # the first of two writes half
    one, two = files_of(tmp_path / "log"), files_of(tmp_path / "shared")
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(".parquet"):
            assert one[name] == two[name], name
    settings = [json.loads(files["settings-train.json"]) for files in (one, two)]
    assert settings[0] | {"command": ""} == settings[1] | {"command": ""}
    assert "accelerate launch" in settings[1]["command"]
