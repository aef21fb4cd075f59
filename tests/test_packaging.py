"""What is installed is what runs: weights, prompts and training scripts travel with the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    command = ["egg_info", "--egg-base", folder, "build", "--build-base", folder]
    command += ["--build-lib", folder / "lib"]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *map(str, command)], cwd=ROOT, check=True
    )
    return folder / "lib" / "mctd_diffusers"


def files(folder: Path, *, of: str = "*") -> set[str]:
    found = (
        path for path in folder.rglob(of) if path.is_file() and "__pycache__" not in path.parts
    )
    return {path.relative_to(folder).as_posix() for path in found}


def test_every_file_of_the_package_is_built(built: Path) -> None:
    package = {name for name in files(built) if not name.startswith("_training/")}
    assert package == files(ROOT / "mctd_diffusers")


def test_the_training_scripts_are_built(built: Path) -> None:
    scripts = files(ROOT / "training", of="*.py")
    assert files(built / "_training") == scripts
