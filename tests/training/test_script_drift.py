"""Scripts share no imports, so what they share is copied, and the copies have to stay equal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "training").glob("*.py"))
TRAINING = [script for script in SCRIPTS if script.name.startswith("train_")]


def shared_blocks(script: Path) -> dict[str, str]:
    """Finds the marked blocks of a script by name."""
    found = re.findall(
        r"^# --- same in every script: (.+?)\n(.*?)^# --- end$",
        script.read_text("utf-8"),
        flags=re.DOTALL | re.MULTILINE,
    )
    return dict(found)


def test_copies_of_a_shared_block_are_equal() -> None:
    first: dict[str, tuple[str, str]] = {}
    for script in SCRIPTS:
        for name, block in shared_blocks(script).items():
            origin, text = first.setdefault(name, (script.name, block))
            assert block == text, f"block {name!r} differs between {origin} and {script.name}"


def test_every_marked_block_is_closed() -> None:
    for script in SCRIPTS:
        text = script.read_text("utf-8")
        assert text.count("# --- same in every script: ") == text.count("# --- end\n")


@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.stem)
def test_every_training_script_resumes_by_the_shared_block(script: Path) -> None:
    assert "checkpointing" in shared_blocks(script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_no_script_imports_another(script: Path) -> None:
    names = {other.stem for other in SCRIPTS}
    imported = re.findall(
        r"^\s*(?:from|import)\s+(?:training\.)?(\w+)", script.read_text("utf-8"), re.MULTILINE
    )
    assert not names & set(imported)
