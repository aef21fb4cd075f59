"""Prompts of a benchmark: the committed lists, and files of others."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any, Final, NamedTuple

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.benchmark.plan import by_turns
from mctd_diffusers.evaluation.scenes import load_prompts, parse_prompt

LISTS: Final = ("tune", "report")
_TEXT: Final = ("prompt", "prompts", "text")
_KIND: Final = ("kind", "category", "tag")
OTHER_KIND: Final = "other"
"""Kind of a prompt of which nothing else is known."""


class PromptList(NamedTuple):
    """Prompts, each once.

    Attributes:
        prompts: the texts.
        kinds: kind of each.
    """

    prompts: tuple[str, ...]
    kinds: tuple[str, ...]


def read_prompts(source: str, limit: int | None = None) -> PromptList:
    """Reads prompts; the kinds take turns, so that any beginning has them all.

    Args:
        source: ``"tune"``, ``"report"``, or a file: ``.jsonl`` with an object a line, ``.csv`` or
            ``.tsv`` with a head (a column ``prompt`` or ``prompts``, and one ``kind``, ``category``
            or ``tag`` if there are kinds), or plain text with a prompt a line.
        limit: use the first so many; ``None`` for all.

    Raises:
        ConfigError: no such list or file, or it holds no prompts.
    """
    if source in LISTS:
        scenes = load_prompts(source)
        pairs = [(scene.caption(), scene.kind) for scene in scenes]
    else:
        pairs = _read_file(source)
    once = dict(pairs)
    if len(once) < len(pairs):
        warnings.warn(
            f"{len(pairs) - len(once)} of {len(pairs)} prompts in {source!r} are repetitions, "
            "which are left out",
            stacklevel=2,
        )
    pairs = list(once.items())
    turns = by_turns([kind for _, kind in pairs])[:limit]
    return PromptList(tuple(pairs[i][0] for i in turns), tuple(pairs[i][1] for i in turns))


def _read_file(source: str) -> list[tuple[str, str]]:
    """Read (prompt, kind) from a file."""
    path = Path(source)
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"prompts {source!r} is neither 'tune' nor 'report' nor a readable file: {error}"
        ) from error
    try:
        if path.suffix == ".jsonl":
            pairs = [_entry(json.loads(line)) for line in lines]
        elif path.suffix in (".csv", ".tsv"):
            delimiter = "\t" if path.suffix == ".tsv" else ","
            pairs = [_entry(row) for row in csv.DictReader(lines, delimiter=delimiter)]
        else:
            pairs = [(line.strip(), _kind_of(line.strip())) for line in lines]
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"file {source!r} cannot be read as {path.suffix} ({error}): give each prompt under "
            f"one of {', '.join(_TEXT)}, and its kind, if any, under one of {', '.join(_KIND)}"
        ) from error
    if not pairs:
        raise ConfigError(f"file {source!r} holds no prompts: write one in each line")
    return pairs


def _entry(row: dict[str, Any]) -> tuple[str, str]:
    """The prompt of a row and its kind, under the names that files have for them."""
    named = {str(name).strip().lower(): entry for name, entry in row.items()}
    text = next((str(named[name]) for name in _TEXT if named.get(name)), None)
    if text is None:
        raise KeyError(f"no prompt among {', '.join(named)}")
    kind = next((str(named[name]) for name in _KIND if named.get(name)), None)
    return text.strip(), kind or _kind_of(text)


def _kind_of(prompt: str) -> str:
    """Kind of a prompt of the judge's grammar."""
    try:
        return parse_prompt(prompt).kind
    except ConfigError:
        return OTHER_KIND
