"""What `test_log_command.py` kills: the command, forked from a process that has imported it.

Usage: in_kills.py FOLDER KILLS ARGUMENT...

Runs ``mctd ARGUMENT...`` in ``FOLDER/whole`` to its end. Then in ``FOLDER/killed``, where it is
killed as often as said: twice while it loads its model, then at random moments after it has written
another file; and at last to its end. Prints how many files there were after each.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

# Once, and before the forks: most of what a short command takes.
import mctd_diffusers.commands.log_trajectories
import mctd_diffusers.pipeline
import mctd_diffusers.trajectories.card
import mctd_diffusers.trajectories.logging  # noqa: F401
from mctd_diffusers import cli


def start(folder: Path, arguments: list[str]) -> int:
    """Fork the command; returns its process."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os._exit(cli.main(arguments))
    return child


def count(folder: Path) -> int:
    return len([*(folder / "log" / "data").glob("train-*.parquet")])


def seconds_until(folder: Path, files: int, child: int) -> float:
    """Wait for a number of files, or for the end of whoever writes them."""
    started = time.monotonic()
    while (
        count(folder) < files
        and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        time.sleep(0.002)
    return time.monotonic() - started


def main(folder: Path, kills: int, arguments: list[str]) -> int:
    """Kill the command again and again, and then let it end."""
    for name in ("whole", "killed"):
        (folder / name).mkdir()
        shutil.copy("prompts.txt", folder / name)
    child = start(folder / "whole", arguments)
    loading = seconds_until(folder / "whole", 1, child)
    started = time.monotonic()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        return 1
    each = (time.monotonic() - started) / count(folder / "whole")
    chance = random.Random(0)
    for kill in range(kills):
        before = count(folder / "killed")
        child = start(folder / "killed", arguments)
        if kill < 2:
            time.sleep(loading * chance.random())
        else:
            seconds_until(folder / "killed", before + 1, child)
            time.sleep(1.5 * each * chance.random())
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(f"{count(folder / 'killed')} files, killed {os.WIFSIGNALED(status)}", flush=True)
    child = start(folder / "killed", arguments)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
