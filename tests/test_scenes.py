"""The grammar of scenes: what it writes it reads, and what is held out stays held out."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation import scenes
from mctd_diffusers.evaluation.scenes import (
    COLOURS,
    KINDS,
    MISSING_SPRITES,
    OBJECTS,
    RELATIONS,
    STYLES,
    Fact,
    SceneItem,
    ScenePrompt,
    facts,
    held_out,
    load_prompts,
    make_prompt,
    parse_prompt,
)

HELD_OUT_HASH = 17_058_085_974_810_893_055
"""Data and weights stand on these sets: a change means new data and new training."""

groups = st.lists(
    st.tuples(st.sampled_from(OBJECTS), st.integers(1, 4), st.sampled_from((None, *COLOURS))),
    min_size=1,
    max_size=2,
    unique_by=lambda group: group[0],
)


@given(groups, st.sampled_from((None, *RELATIONS)), st.sampled_from((None, *STYLES)))
def test_parsing_is_the_inverse_of_writing(
    groups: list[tuple[str, int, str | None]], relation: str | None, style: str | None
) -> None:
    assume(sum(count for _, count, _ in groups) <= scenes.MAX_OBJECTS)
    if len(groups) == 1 or any(count > 2 for _, count, _ in groups):
        relation = None
    prompt = make_prompt([SceneItem(*group) for group in groups], relation, style)
    assert parse_prompt(prompt.caption()) == prompt
    assert parse_prompt(f"  {prompt.caption().upper()} ") == prompt


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("a cup, twemoji style", "one_object"),
        ("a pizza and an octopus", "two_objects"),
        ("three orange snowmen", "counting"),
        ("an orange butterfly", "colours"),
        ("a green cat to the left of a yellow star", "positions"),
        ("a red octopus above two blue cars", "positions"),
        ("two blue cars and a red octopus", "colour_attribution"),
    ],
)
def test_captions_are_read_and_written_word_for_word(caption: str, kind: str) -> None:
    prompt = parse_prompt(caption)
    assert prompt.kind == kind
    assert prompt.caption() == caption


def test_one_may_be_written_as_a_number() -> None:
    assert parse_prompt("one cup") == parse_prompt("a cup")


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("a dragon", "'dragon' is no known noun"),
        ("a mauve cat", "'mauve' is no known colour"),
        ("five cats", "'five' is no number"),
        ("two cat", "'two' and 'cat' do not agree"),
        ("a cats", "'a' and 'cats' do not agree"),
        ("a cat, cubist style", "'cubist' is no known style"),
        ("a cat and a car and a cup", "more than two groups"),
        ("three cats and two cars", "5 objects"),
        ("a cat and a cat", "both groups"),
        ("three cats above a car", "at most two"),
        ("cat", "cannot read 'cat'"),
        ("", "cannot read ''"),
        ("a very big red cat", "cannot read"),
    ],
)
def test_a_caption_outside_the_grammar_is_refused_by_its_word(caption: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_prompt(caption)


def test_a_refusal_tells_the_grammar() -> None:
    with pytest.raises(ConfigError, match=r"to the left of.*umbrella.*twemoji"):
        parse_prompt("a dragon")


@pytest.mark.parametrize(
    ("noun", "count", "colour"), [("dragon", 1, None), ("cat", 5, None), ("cat", 0, None)]
)
def test_an_item_outside_the_vocabulary_is_refused(
    noun: str, count: int, colour: str | None
) -> None:
    with pytest.raises(ConfigError):
        SceneItem(noun, count, colour)


def test_a_prompt_refuses_parts_that_do_not_fit() -> None:
    cat, car = SceneItem("cat"), SceneItem("car")
    with pytest.raises(ConfigError, match="is of kind 'one_object'"):
        ScenePrompt("colours", (cat,))
    with pytest.raises(ConfigError, match="needs a second group"):
        make_prompt([cat], "above")
    with pytest.raises(ConfigError, match="'beside' is not a known relation"):
        make_prompt([cat, car], "beside")
    with pytest.raises(ConfigError, match="0 groups"):
        make_prompt([])


def test_facts_say_what_must_be_seen() -> None:
    assert facts(parse_prompt("a cup, twemoji style")) == (Fact("object", "cup"),)
    assert facts(parse_prompt("two blue cars and an octopus")) == (
        Fact("object", "car"),
        Fact("count", "car", count=2),
        Fact("colour", "car", colour="blue"),
        Fact("object", "octopus"),
    )
    assert facts(parse_prompt("a green cat above a star"))[-1] == Fact(
        "position", "cat", colour="green", relation="above", other="star"
    )


def test_held_out_sets_have_the_sizes_they_state_and_leave_every_word_known() -> None:
    out = held_out()
    sizes = (len(out.colours), len(out.counts), len(out.styles), len(out.pairs))
    assert sizes == (42, 18, 45, 55)
    assert not out.styles & MISSING_SPRITES
    for noun in OBJECTS:
        kept = [s for s in STYLES if (noun, s) not in out.styles | MISSING_SPRITES]
        assert len(kept) >= 3
        assert sum((noun, colour) not in out.colours for colour in COLOURS) >= 5
    for colour in COLOURS:
        assert any((noun, colour) not in out.colours for noun in OBJECTS)


def test_held_out_sets_never_change() -> None:
    out = held_out()
    found = [sorted(out.colours), sorted(out.counts), sorted(out.styles), sorted(out.pairs)]
    assert scenes.stable_hash(json.dumps(found)) == HELD_OUT_HASH


def test_prompt_lists_are_committed_as_drawn_balanced_and_disjoint() -> None:
    tune, report = load_prompts("tune"), load_prompts("report")
    assert {"tune": tune, "report": report} == scenes.draw_prompts()
    for prompts_of_list in (tune, report):
        assert Counter(p.kind for p in prompts_of_list) == dict.fromkeys(KINDS, 20)
        assert len({p.caption() for p in prompts_of_list}) == 120
    assert not {p.caption() for p in tune} & {p.caption() for p in report}


def test_every_prompt_tests_a_held_out_combination_of_its_kind() -> None:
    wanted = {
        "one_object": "styles",
        "two_objects": "pairs",
        "counting": "counts",
        "colours": "colours",
        "positions": "pairs",
        "colour_attribution": "colours",
    }
    for prompt in itertools.chain(load_prompts("tune"), load_prompts("report")):
        assert held_out().broken_by(prompt) == (wanted[prompt.kind],), prompt.caption()


def test_prompt_files_name_the_kind_that_the_grammar_finds() -> None:
    for name in ("tune", "report"):
        path = Path(scenes.__file__).parent / "prompts" / f"{name}.json"
        for entry in json.loads(path.read_text("utf-8")):
            assert parse_prompt(entry["prompt"]).kind == entry["kind"]


def test_another_prompt_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="no prompt list named 'test'"):
        load_prompts("test")
