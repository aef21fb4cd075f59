"""``mctd train-ige``: launches the training of an information gain evaluator on a log."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mctd_diffusers.errors import ConfigError


def train_ige(
    log: Annotated[Path, typer.Argument(help="Folder that `mctd log-trajectories` wrote.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="Further options, passed on to the script.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the head and its card.")] = Path(
        "outputs/ige"
    ),
    processes: Annotated[int, typer.Option(min=1, help="Processes to train in.")] = 1,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Repository of the Hub to push the head to at the end.")
    ] = None,
) -> None:
    """Train an information gain evaluator on logged trajectories.

    Options of training/train_ige.py are passed on to it, such as --max_train_steps 3000,
    --base_model user/model or --resume_from_checkpoint latest.
    """
    arguments = ["--log", str(log), "--output", str(output), *(options or [])]
    if push_to_hub is not None:
        arguments += ["--push_to_hub", "true", "--hub_model_id", push_to_hub]
    status = launch_script("train_ige", arguments, processes=processes)
    if status:
        raise typer.Exit(status)


def launch_script(name: str, arguments: Sequence[str], *, processes: int = 1) -> int:
    """Run a script of ``training/`` by `accelerate launch`; returns its exit status.

    Args:
        name: of the script, without ``.py``.
        arguments: of the script.
        processes: that run it together.

    Raises:
        ConfigError: the script was not installed with the package.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    # What `accelerate config` would ask, so that it does not warn of having to guess.
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_processes", str(processes), str(script_path(name)), *arguments]
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # the script was interrupted too, and ends with a checkpoint


def script_path(name: str) -> Path:
    """Where a script of ``training/`` is installed.

    Raises:
        ConfigError: it is not.
    """
    package = importlib.util.find_spec("mctd_diffusers._training")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        path = Path(folder) / f"{name}.py"
        if path.exists():
            return path
    raise ConfigError(
        f"the script {name}.py was not installed with mctd_diffusers: install the package again, "
        "or run training/ of its repository by `accelerate launch`"
    )
