"""Every document does what it says: its code runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>.+) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    text: str
    runs: bool


def blocks(path: Path, language: str) -> Iterator[Block]:
    """Code blocks of a document; one below a comment `<!-- not run: reason -->` is only read."""
    text = path.read_text("utf-8")
    for fence in FENCE.finditer(text):
        if fence["language"] == language:
            line = text.count("\n", 0, fence.start("text"))
            yield Block(line, language, fence["text"], fence["why"] is None)


def commands(path: Path) -> Iterator[list[str]]:
    """Command lines of a document, split into words."""
    for block in blocks(path, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@each_document
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "document"}
    for block in blocks(path, "python"):
        # Empty lines before the code, so that a traceback names the document's own line.
        # It inherits no `from __future__` of this file, which a reader who pastes it has not.
        code = compile("\n" * block.line + block.text, str(path), "exec", dont_inherit=True)
        if block.runs:
            exec(code, names)


def parse_command(words: list[str]) -> None:
    """Parse the words after `mctd` as a shell would hand them over, and run nothing."""
    from mctd_diffusers.cli import app

    group: Any = typer.main.get_command(app)
    try:
        context = group.make_context("mctd", list(words))
        name, command, rest = group.resolve_command(context, words)
        command.make_context(name, rest)
    except typer.Exit as done:  # `--help` answers while it is parsed
        if done.exit_code:
            raise


@each_document
def test_commands_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for words in commands(path):
        if words[0] == "make":
            assert set(words[1:]) <= targets, words
        elif words[0] == "mctd":
            parse_command(words[1:])
        for word in words:
            if word.startswith(("training/", "scripts/")):
                assert (ROOT / word).is_file(), words


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_the_glossary_names_what_exists() -> None:
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "mctd_diffusers").rglob("*.py"))
    rows = re.findall(
        r"^\| [\w -]+ \| `(\w+)` \|", (ROOT / "docs/concepts.md").read_text("utf-8"), re.M
    )
    assert len(rows) > 20
    missing = [name for name in rows if not re.search(rf"\b{name}\b", source)]
    assert not missing
