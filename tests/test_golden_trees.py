"""Searches grow the same trees as when they were recorded."""

from __future__ import annotations

import json

import pytest

from mctd_diffusers.search.strategies import STRATEGIES
from tests.by_hand import assert_same_columns
from tests.golden_trees import FOLDER, SEARCHES, as_text, grow, path_of


@pytest.mark.parametrize("name", SEARCHES)
def test_the_tree_is_the_one_that_was_recorded(name: str) -> None:
    recorded = json.loads(path_of(name).read_text("utf-8"))
    try:
        assert_same_columns(grow(name), recorded)
    except AssertionError as error:
        error.add_note(
            f"The search {name!r} grows another tree than {path_of(name)} holds. If that is meant, "
            "run scripts/regold and commit what it changes together with the change."
        )
        raise


def test_every_strategy_has_its_tree_and_every_tree_its_strategy() -> None:
    assert {search.name for search in SEARCHES.values()} == STRATEGIES.keys()
    assert {path.stem for path in FOLDER.glob("*.json")} == SEARCHES.keys()
    for name, strategy in SEARCHES.items():
        assert name.startswith(strategy.name)


@pytest.mark.parametrize("name", SEARCHES)
def test_recording_keeps_what_it_reads(name: str) -> None:
    text = path_of(name).read_text("utf-8")
    assert as_text(json.loads(text)) == text
