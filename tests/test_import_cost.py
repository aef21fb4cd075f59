"""Importing the package costs next to nothing: whoever lists its names must not wait for torch."""

from __future__ import annotations

import json
import subprocess
import sys

SECONDS_ALLOWED = 0.3
"""CPU seconds that the package may add to what importing diffusers costs."""

MEASURE = """
import json, sys, time
start = time.process_time()
import mctd_diffusers
mctd_diffusers.EMBEDDED_MODEL, mctd_diffusers.__version__, dir(mctd_diffusers)
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""


def measure() -> tuple[float, set[str]]:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    answer = json.loads(run.stdout)
    return answer["seconds"], set(answer["modules"])


def test_importing_the_package_loads_nothing_heavy() -> None:
    _, modules = measure()
    assert not modules & {"torch", "diffusers", "transformers", "numpy", "matplotlib", "typer"}


def test_importing_the_package_costs_little() -> None:
    assert min(measure()[0] for _ in range(3)) < SECONDS_ALLOWED
