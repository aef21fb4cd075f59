"""Captions that are wrong in exactly one way: to test judges and rewards, and to train rewards.

A reward that cannot tell "two cats" from "three cats" is of no use to a search for two cats. So the
caption of a real picture is changed in one fact, and whoever scores it has to notice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.scenes import (
    COLOURS,
    MAX_OBJECTS,
    OBJECTS,
    ScenePrompt,
    make_prompt,
)

Change = Literal["object", "count", "colour", "binding", "position"]
CHANGES: tuple[Change, ...] = ("object", "count", "colour", "binding", "position")

_Edit: TypeAlias = dict[int, dict[str, Any]] | str
"""New fields of the groups at these places, or a new relation."""

_OPPOSITES = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}


@dataclass(frozen=True)
class Contradiction:
    """A prompt that is false of every picture of which the original is the caption.

    Attributes:
        change: what was changed: a noun, a number, a colour, which group has which colour or number
            ("binding"), or the relation.
        prompt: the false prompt.
    """

    change: Change
    prompt: ScenePrompt


def contradict(
    prompt: ScenePrompt, rng: np.random.Generator, change: Change | None = None
) -> Contradiction:
    """Change one fact of a prompt, at random.

    Args:
        prompt: a caption that says all that its picture shows.
        rng: draws the change and its place.
        change: what to change, or ``None`` for any that is possible, each equally likely.

    Raises:
        ConfigError: the prompt has nothing of the kind ``change``.
    """
    kinds = CHANGES if change is None else (change,)
    possible = {kind: found for kind in kinds if (found := _edits(prompt, kind))}
    if not possible:
        raise ConfigError(f"change={change!r}: {prompt.caption()!r} has no such fact to change")
    kind = list(possible)[rng.integers(len(possible))]
    edit = possible[kind][rng.integers(len(possible[kind]))]
    if isinstance(edit, str):
        return Contradiction(kind, make_prompt(prompt.items, edit, prompt.style))
    items = [replace(item, **edit.get(place, {})) for place, item in enumerate(prompt.items)]
    return Contradiction(kind, make_prompt(items, prompt.relation, prompt.style))


def contradict_each(prompt: ScenePrompt, rng: np.random.Generator) -> list[Contradiction]:
    """One contradiction for each kind of fact that a prompt states, in the order of `CHANGES`.

    Args:
        prompt: a caption that says all that its picture shows.
        rng: draws the place and the word of each change.
    """
    return [contradict(prompt, rng, change) for change in CHANGES if _edits(prompt, change)]


def _edits(prompt: ScenePrompt, change: Change) -> list[_Edit]:
    """List every way to change one fact of the kind: new fields by group, or a new relation."""
    if change == "position":
        return [] if prompt.relation is None else [_OPPOSITES[prompt.relation]]
    if change == "binding":
        return _swaps(prompt)
    edits: list[_Edit] = []
    for place, item in enumerate(prompt.items):
        if change == "object":
            present = {other.noun for other in prompt.items}
            edits += [{place: {"noun": noun}} for noun in OBJECTS if noun not in present]
        elif change == "count":
            rest = sum(other.count for other in prompt.items) - item.count
            most = MAX_OBJECTS - rest if prompt.relation is None else min(MAX_OBJECTS - rest, 2)
            # From two: "a cat" is true of a picture with three cats.
            edits += [{place: {"count": n}} for n in range(2, most + 1) if n != item.count]
        elif item.colour is not None:
            edits += [{place: {"colour": colour}} for colour in COLOURS if colour != item.colour]
    return edits


def _swaps(prompt: ScenePrompt) -> list[_Edit]:
    """List the swaps of colours, and of numbers, between two groups."""
    if len(prompt.items) != 2:
        return []
    first, second = prompt.items
    swaps: list[_Edit] = []
    if first.colour is not None and second.colour is not None and first.colour != second.colour:
        swaps.append({0: {"colour": second.colour}, 1: {"colour": first.colour}})
    if first.count != second.count:
        swaps.append({0: {"count": second.count}, 1: {"count": first.count}})
    return swaps
