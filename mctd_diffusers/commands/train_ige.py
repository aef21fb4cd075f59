"""``mctd train-ige``: launches the training of an information gain evaluator.

On a log of trajectories; or, of one that there is, on what saved searches observed, which ``mctd
log-searches`` writes as a dataset.
"""

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
    log: Annotated[
        Path | None, typer.Argument(help="Folder that `mctd log-trajectories` wrote.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Argument(help="Further options, passed on to the script.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the head and its card.")] = Path(
        "outputs/ige"
    ),
    from_searches: Annotated[
        Path | None,
        typer.Option(
            help="Saved searches, or their dataset, to refine a head on in place of a log."
        ),
    ] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Folder or repository of a head to begin with.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes to train in.")] = 1,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Repository of the Hub to push the head to at the end.")
    ] = None,
) -> None:
    """Train an information gain evaluator on logged trajectories, or refine it on saved searches.

    Searches are of use where they were saved with features: by calls with online_ige=True or
    stride_policy="ige". Options of training/train_ige.py are passed on to it, such as
    --max_train_steps 3000, --base_model user/model or --resume_from_checkpoint latest.
    """
    further = list(options or [])
    if from_searches is not None and str(log or "").startswith("--"):
        further.insert(0, str(log))  # the first of the script's options, where no log is named
        log = None
    if (log is None) == (from_searches is None):
        raise ConfigError(
            "train on a log, which is named first, or refine a head by --from-searches: give one "
            "of them"
        )
    if from_searches is not None and init_from is None:
        raise ConfigError("--from-searches refines a head: name it with --init-from")
    arguments = ["--log", str(log)] if log else ["--from_searches", str(from_searches)]
    arguments += ["--output", str(output), *further]
    if init_from is not None:
        arguments += ["--init_from", init_from]
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
