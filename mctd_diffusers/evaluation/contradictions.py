"""Captions that are wrong in exactly one way: to test judges and rewards, and to train rewards.

A reward that cannot tell "two cats" from "three cats" is of no use to a search for two cats. So the
caption of a real picture is changed in one fact, and whoever scores it has to notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.scenes import (
    COLOURS,
    MAX_OBJECTS,
    OBJECTS,
    SceneItem,
    ScenePrompt,
    make_prompt,
)

Change = Literal["object", "count", "colour", "binding", "position"]
CHANGES: tuple[Change, ...] = ("object", "count", "colour", "binding", "position")

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
    possible = {
        kind: found
        for kind in (CHANGES if change is None else (change,))
        if (found := list(_changed(prompt, kind)))
    }
    if not possible:
        raise ConfigError(f"change={change!r}: {prompt.caption()!r} has no such fact to change")
    kind = list(possible)[rng.integers(len(possible))]
    return Contradiction(kind, possible[kind][rng.integers(len(possible[kind]))])


def _changed(prompt: ScenePrompt, change: Change) -> Iterator[ScenePrompt]:
    """Yield every prompt that differs from this one by one change of the kind."""
    if change == "position":
        if prompt.relation is not None:
            yield make_prompt(prompt.items, _OPPOSITES[prompt.relation], prompt.style)
        return
    if change == "binding":
        yield from _swapped(prompt)
        return
    for place, item in enumerate(prompt.items):
        rest = sum(other.count for other in prompt.items) - item.count
        for changed in _changed_item(prompt, item, change, MAX_OBJECTS - rest):
            items = [*prompt.items[:place], changed, *prompt.items[place + 1 :]]
            yield make_prompt(items, prompt.relation, prompt.style)


def _changed_item(
    prompt: ScenePrompt, item: SceneItem, change: Change, most: int
) -> Iterator[SceneItem]:
    """Yield the ways to change the noun, the number or the colour of one group."""
    if change == "object":
        present = {other.noun for other in prompt.items}
        yield from (replace(item, noun=noun) for noun in OBJECTS if noun not in present)
    elif change == "count":
        most = most if prompt.relation is None else min(most, 2)
        # From two: "a cat" is true of a picture with three cats.
        yield from (replace(item, count=n) for n in range(2, most + 1) if n != item.count)
    elif item.colour is not None:
        yield from (replace(item, colour=colour) for colour in COLOURS if colour != item.colour)


def _swapped(prompt: ScenePrompt) -> Iterator[ScenePrompt]:
    """Yield the prompt with the colours, or the numbers, of its two groups swapped."""
    if len(prompt.items) != 2:
        return
    first, second = prompt.items
    if first.colour is not None and second.colour is not None and first.colour != second.colour:
        items = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        yield make_prompt(items, prompt.relation, prompt.style)
    if first.count != second.count:
        items = (replace(first, count=second.count), replace(second, count=first.count))
        yield make_prompt(items, prompt.relation, prompt.style)
