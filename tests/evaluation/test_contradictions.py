"""Captions that are wrong in exactly one way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.contradictions import CHANGES, contradict, contradict_each
from mctd_diffusers.evaluation.judge import Sighting, fact_probability
from mctd_diffusers.evaluation.scenes import (
    COLOURS,
    OBJECTS,
    ScenePrompt,
    facts,
    load_prompts,
    parse_prompt,
)

PROMPTS = load_prompts("tune") + load_prompts("report")


def drawn(prompt: ScenePrompt) -> list[Sighting]:
    """The sightings of a picture that shows a prompt, in its relation, and nothing else."""
    step = {"to the left of": (1, 0), "to the right of": (-1, 0), "below": (0, -1)}
    dx, dy = step.get(prompt.relation or "above", (0, 1))
    seen = []
    for group, item in enumerate(prompt.items):
        for _ in range(item.count):
            nouns, colours = np.zeros(len(OBJECTS)), np.zeros(len(COLOURS) + 1)
            nouns[OBJECTS.index(item.noun)] = 1
            colours[len(COLOURS) if item.colour is None else COLOURS.index(item.colour)] = 1
            place = (0.5 + (group - 0.5) * dx, 0.5 + (group - 0.5) * dy)
            seen.append(Sighting(1.0, nouns, colours, *place))
    return seen


@given(st.sampled_from(PROMPTS), st.integers(0, 2**32))
def test_a_contradiction_is_false_where_its_prompt_is_true(prompt: ScenePrompt, seed: int) -> None:
    seen = drawn(prompt)
    false = contradict(prompt, np.random.default_rng(seed)).prompt
    assert all(fact_probability(fact, seen) > 0.99 for fact in facts(prompt))
    assert any(fact_probability(fact, seen) < 0.01 for fact in facts(false))
    assert parse_prompt(false.caption()) == false
    assert false.style == prompt.style


def test_every_change_occurs_and_is_what_it_says() -> None:
    rng = np.random.default_rng(0)
    coloured = parse_prompt("a red cat to the left of a blue car")
    found = {contradict(coloured, rng).change for _ in range(200)}
    assert found == set(CHANGES)
    binding = contradict(coloured, rng, "binding").prompt.caption()
    assert binding == "a blue cat to the left of a red car"
    position = contradict(coloured, rng, "position").prompt.caption()
    assert position == "a red cat to the right of a blue car"


def test_what_is_not_there_cannot_be_changed() -> None:
    with pytest.raises(ConfigError, match="'a cat' has no such fact"):
        contradict(parse_prompt("a cat"), np.random.default_rng(0), "colour")


def test_each_kind_of_fact_is_contradicted_once() -> None:
    rng = np.random.default_rng(0)
    related = parse_prompt("a red cat to the left of a blue fish")
    assert [false.change for false in contradict_each(related, rng)] == [
        "object",
        "count",
        "colour",
        "binding",
        "position",
    ]
    alone = contradict_each(parse_prompt("a cat"), rng)
    assert [false.change for false in alone] == ["object", "count"]
