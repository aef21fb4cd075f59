"""The information gain evaluator's script, through its command line, on a toy log."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from mctd_diffusers.cli import main
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.ige import InformationGainEvaluator
from tests.trajectories.toy_logs import CHANNELS, FAMILY, toy_rows, write_toy_log

SCRIPT = Path(__file__).parents[2] / "training" / "train_ige.py"
TWO_STEPS = [3.548266, 3.871159]
WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = ("--embedding_size=8", "--hidden_size=16", "--num_layers=1", "--embedding_dropout=0.1")
LEARNS = (*SMALL, "--feature_dropout=0.1", "--learning_rate=0.01", "--warmup_steps=5")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_ige_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


train_ige = load_script()


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


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_log(
        tmp_path_factory.mktemp("toy") / "log",
        train=toy_rows(60) + toy_rows(60, steps=10, seed=3),
        held_out=toy_rows(40, siblings=16, seed=1, prompts="held out"),
        other_grid=toy_rows(40, steps=8, siblings=16, seed=2, prompts="other"),
    )


def run(log: Path, output: Path, *options: str, steps: int = 4) -> None:
    reset()
    train_ige.main(
        [f"--log={log}", f"--output={output}", f"--max_train_steps={steps}", *SMALL, *options]
    )


@pytest.fixture(scope="module")
def trained(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that learned what there is to learn."""
    output = tmp_path_factory.mktemp("trained") / "head"
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    steps = ("--validation_steps=50", "--decay_steps=150", "--base_model=owner/model")
    run(log, output, *LEARNS, *steps, steps=300)
    for number, handler in signals.items():
        signal.signal(number, handler)
    return output


def figures(output: Path) -> dict[str, Any]:
    return json.loads((output / "figures.json").read_text("utf-8"))["figures"]


def test_it_learns_what_features_say_of_truncation_errors_and_variances(trained: Path) -> None:
    for split in ("held_out", "other_grid"):
        found = figures(trained)[split]
        error, variance = found["truncation_error"], found["resolved_variance"]
        # A feature is 3 difficulties and noise: they correlate by 0.87, and that is all there is.
        assert error["overall"] > 0.75
        assert error["within"][0] > 0.75
        assert error["gain"][1] > 0
        # Sample variances of 16 siblings correlate with the true ones by 0.95.
        assert variance["within"][0] > 0.65
        assert variance["gain"][1] > 0
    for target in ("truncation_error", "resolved_variance"):
        assert figures(trained)["held_out"][target]["calibration_error"] < 0.1


def test_the_head_loads_and_knows_what_it_was_trained_on(trained: Path) -> None:
    head = InformationGainEvaluator.from_pretrained(trained)
    config = head.config
    assert (config["family"], dict(config["feature_channels"])) == (FAMILY, CHANNELS)
    assert config["log_snr_range"] == pytest.approx([-4, 4])
    assert (config["grids"], config["schedulers"]) == ([6, 10], ["DDIMScheduler"])
    assert config["guidance_scales"] == [4.0]
    torch.testing.assert_close(head.jump_log_snr, torch.linspace(-4, 4, 11))
    upper = torch.triu(torch.ones(11, 11), 1).bool()
    assert head.jump_cost[upper].isfinite().all()
    assert head.jump_cost[~upper].isnan().all()
    # The typical state is as hard as states are in the mean: exp(-4) for a log-SNR of one.
    gains = head.predict(None, torch.tensor([-4 / 3]), torch.tensor([[0.0]]))
    assert gains.log_truncation_error[0, 0] == pytest.approx(np.log(4 / 3) - 4, abs=0.3)


def test_the_card_has_the_figures_the_command_and_what_they_mean(trained: Path) -> None:
    card = (trained / "README.md").read_text("utf-8")
    for text in (
        "library_name: diffusers",
        "base_model: owner/model",
        "accelerate launch training/train_ige.py --log=",
        "| DDIMScheduler | 6, 10 | 4 |",
        "| other_grid | 40 | DDIMScheduler | 8 | 16 |",
        "![Predicted against measured, and observed against expected shares](calibration.png)",
    ):
        assert text in card
    found = figures(trained)["held_out"]["truncation_error"]
    assert f"| held_out | log truncation error | {found['count']} | {found['overall']:.3f}" in card
    assert (trained / "calibration.png").read_bytes()[:4] == b"\x89PNG"


def test_two_steps_are_as_recorded(log: Path, tmp_path: Path) -> None:
    found: list[float] = []
    kept = train_ige.jump_loss

    def listen(*arguments: Any, **keywords: Any) -> Any:
        loss, terms = kept(*arguments, **keywords)
        found.append(loss.item())
        return loss, terms

    train_ige.jump_loss = listen
    try:
        run(log, tmp_path, steps=2)
    finally:
        train_ige.jump_loss = kept
    # Recorded; machines differ in the last digits of a float.
    assert found == pytest.approx(TWO_STEPS, rel=1e-3)


def test_a_run_that_was_stopped_goes_on_to_the_very_weights_of_one_that_was_not(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    kept = train_ige.learning_rate

    def stop_at_fourth_step(step: int, *others: Any) -> float:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return float(kept(step, *others))

    options = ("--validation_steps=2", "--ema_decay=0.5")
    train_ige.learning_rate = stop_at_fourth_step
    try:
        run(log, stopped, *options, steps=8)
    finally:
        train_ige.learning_rate = kept
    assert "stopped at step 4" in capsys.readouterr().err
    assert not (stopped / WEIGHTS).exists()
    run(log, stopped, *options, "--resume_from_checkpoint=latest", steps=8)
    run(log, whole, *options, steps=8)
    ours, theirs = load_file(stopped / WEIGHTS), load_file(whole / WEIGHTS)
    assert all(torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in theirs)
    records = [(path / "best" / "validations.json").read_text() for path in (stopped, whole)]
    assert records[0] == records[1]


def test_it_stops_when_validation_gets_no_better(log: Path, tmp_path: Path) -> None:
    scores = iter([0.2, 0.5, 0.4, 0.3, 0.9])
    kept = train_ige.validate
    train_ige.validate = lambda head, examples: {"score": next(scores)}
    try:
        run(log, tmp_path, "--validation_steps=1", "--patience=2", steps=50)
    finally:
        train_ige.validate = kept
    found = json.loads((tmp_path / "best" / "validations.json").read_text())
    assert found == {"1": 0.2, "2": 0.5, "3": 0.4, "4": 0.3}
    assert "trained for 2 steps" in (tmp_path / "README.md").read_text("utf-8")


def test_a_head_is_trained_on(log: Path, trained: Path, tmp_path: Path) -> None:
    run(log, tmp_path, f"--init_from={trained}", "--learning_rate=1e-6", steps=1)
    before, after = load_file(trained / WEIGHTS), load_file(tmp_path / WEIGHTS)
    torch.testing.assert_close(after["head.weight"], before["head.weight"], atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="has other sizes than embedding_size"):
        run(log, tmp_path, f"--init_from={trained}", "--hidden_size=12")
    other = InformationGainEvaluator("FluxPipeline", CHANNELS)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="is for a FluxPipeline"):
        run(log, tmp_path, f"--init_from={tmp_path / 'other'}")
    fewer = InformationGainEvaluator(FAMILY, {"mid": 9})
    fewer.save_pretrained(tmp_path / "fewer")
    with pytest.raises(ConfigError, match=r"reads features \{'mid': 9\}"):
        run(log, tmp_path, f"--init_from={tmp_path / 'fewer'}")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--log=nowhere",), "'nowhere' is no folder"),
        (("--train_split=all",), "no split 'all'"),
        (("--resume_from_checkpoint=nowhere",), "is no folder checkpoint-STEP"),
        (("--validation_share=0.999",), "has 30 prompts, of which 30 would be held out"),
    ],
)
def test_what_cannot_work_ends_in_one_sentence(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str], complaint: str
) -> None:
    arguments = [f"--log={log}", f"--output={tmp_path}", *SMALL, *options]
    monkeypatch.setattr(sys, "argv", ["train_ige", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    message = str(caught.value)
    assert re.match(rf"train_ige: .*{re.escape(complaint)}", message)
    assert "\n" not in message


def test_numbers_that_are_not_finite_end_before_training(tmp_path: Path) -> None:
    rows = toy_rows(20)
    rows[3]["jumps"]["truncation_error"][0] = np.nan
    folder = write_toy_log(tmp_path / "log", train=rows)
    with pytest.raises(ConfigError, match=r"'jumps\.truncation_error' .* in trajectory 3"):
        run(folder, tmp_path / "head")
    assert not (tmp_path / "head").exists()


@pytest.mark.slow
def test_two_processes_train_one_head(log: Path, tmp_path: Path) -> None:
    arguments = [f"--log={log}", f"--output={tmp_path}", *SMALL, "--max_train_steps=4"]
    # What `accelerate launch` calls where there are accelerators; without, it starts one process.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(SCRIPT), *arguments], check=True, cwd=SCRIPT.parents[1], env=env)
    assert InformationGainEvaluator.from_pretrained(tmp_path).config["grids"] == [6, 10]


# --- mctd train-ige


@pytest.fixture
def launched_here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs in this process what the command launches; returns what comes before the script."""
    launches: list[list[str]] = []

    class Here:
        def __init__(self, command: list[str]) -> None:
            place = next(i for i, word in enumerate(command) if word.endswith("train_ige.py"))
            launches.append(command[:place])
            self.arguments = command[place:]

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None:
            reset()

        def wait(self) -> int:
            reset()
            monkeypatch.setattr(sys, "argv", self.arguments)
            try:
                runpy.run_path(self.arguments[0], run_name="__main__")
            except SystemExit as end:  # as the interpreter does
                print(end, file=sys.stderr)
                return 1
            return 0

    monkeypatch.setattr(subprocess, "Popen", Here)
    return launches


def assert_the_command_passes_its_options_on(log: Path, output: Path) -> None:
    options = ["--max_train_steps", "2", "--hidden-size", "16", "--seed=3"]
    assert main(["train-ige", str(log), "--output", str(output), *options]) == 0
    head = InformationGainEvaluator.from_pretrained(output)
    assert head.config["hidden_size"] == 16
    assert "--max_train_steps 2 --hidden-size 16 --seed=3" in (output / "README.md").read_text()


def assert_the_command_says_what_is_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train-ige", str(tmp_path / "nowhere"), "--output", str(tmp_path)]) == 1
    said = capfd.readouterr().err
    assert "train_ige: " in said
    assert "nowhere' is no folder" in said
    assert "Traceback" not in said


def test_the_command_passes_its_options_on(
    log: Path, tmp_path: Path, launched_here: list[list[str]]
) -> None:
    assert_the_command_passes_its_options_on(log, tmp_path / "head")
    ((python, *launcher),) = launched_here
    assert python == sys.executable
    assert launcher[:2] == ["-m", "accelerate.commands.launch"]


def test_the_command_says_what_is_wrong_and_fails(
    tmp_path: Path, launched_here: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert_the_command_says_what_is_wrong(tmp_path, capfd)
    assert len(launched_here) == 1


@pytest.mark.slow
def test_the_command_launches_the_script(
    log: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert_the_command_passes_its_options_on(log, tmp_path / "head")
    assert "Traceback" not in capfd.readouterr().err
    assert_the_command_says_what_is_wrong(tmp_path, capfd)
