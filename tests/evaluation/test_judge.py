"""The gold judge: facts from sightings, targets from scenes, and the weights in the box."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.judge import (
    EMBEDDED_JUDGE,
    SceneJudge,
    Sighting,
    fact_probability,
    load_judge,
    poisson_binomial,
    scene_targets,
)
from mctd_diffusers.evaluation.real_scenes import RealScenes, judge_figures
from mctd_diffusers.evaluation.scenes import (
    COLOURS,
    OBJECTS,
    PlacedObject,
    facts,
    load_prompts,
    parse_prompt,
)
from mctd_diffusers.models.losses import scene_loss

in_the_box = pytest.mark.skipif(
    not (EMBEDDED_JUDGE / "config.json").is_file(), reason="no judge is in the box yet"
)


def sure(noun: str, colour: str | None, x: float, y: float, probability: float = 1.0) -> Sighting:
    """A sighting that is certain of noun and colour."""
    nouns = np.zeros(len(OBJECTS))
    nouns[OBJECTS.index(noun)] = 1
    colours = np.zeros(len(COLOURS) + 1)
    colours[len(COLOURS) if colour is None else COLOURS.index(colour)] = 1
    return Sighting(probability, nouns, colours, x, y)


def truth(prompt: str, seen: list[Sighting]) -> list[float]:
    return [round(fact_probability(fact, seen), 3) for fact in facts(parse_prompt(prompt))]


RED_CAT_LEFT_OF_BLUE_CAR = [sure("cat", "red", 0.25, 0.5), sure("car", "blue", 0.75, 0.5)]
THREE_STARS = [sure("star", "red", x, 0.3) for x in (0.2, 0.8)] + [sure("star", "pink", 0.5, 0.8)]


@pytest.mark.parametrize(
    ("prompt", "seen", "expected"),
    [
        ("a cat", RED_CAT_LEFT_OF_BLUE_CAR, [1]),
        ("a fish", RED_CAT_LEFT_OF_BLUE_CAR, [0]),
        ("a fish", [], [0]),
        ("a red cat", RED_CAT_LEFT_OF_BLUE_CAR, [1, 1]),
        ("a blue cat and a red car", RED_CAT_LEFT_OF_BLUE_CAR, [1, 0, 1, 0]),
        ("a cat to the left of a car", RED_CAT_LEFT_OF_BLUE_CAR, [1, 1, 1]),
        ("a cat to the right of a car", RED_CAT_LEFT_OF_BLUE_CAR, [1, 1, 0]),
        ("a red cat to the left of a red car", RED_CAT_LEFT_OF_BLUE_CAR, [1, 1, 1, 0, 0]),
        ("a cat above a car", RED_CAT_LEFT_OF_BLUE_CAR, [1, 1, 0.5]),
        ("three stars", THREE_STARS, [1, 1]),
        ("two stars", THREE_STARS, [1, 0]),
        ("four stars", THREE_STARS, [1, 0]),
        ("three red stars", THREE_STARS, [1, 1, 0]),
        ("a star", THREE_STARS, [1]),
    ],
)
def test_facts_are_read_off_certain_sightings(
    prompt: str, seen: list[Sighting], expected: list[float]
) -> None:
    assert truth(prompt, seen) == expected


def test_doubt_about_an_object_passes_into_its_facts() -> None:
    seen = [sure("star", "red", 0.2, 0.2, 0.9), sure("star", "red", 0.8, 0.8, 0.5)]
    assert truth("two red stars", seen) == [0.95, 0.45, 0.95]


@given(st.lists(st.floats(0, 1), max_size=6))
def test_counts_follow_the_poisson_binomial_law(probabilities: list[float]) -> None:
    law = poisson_binomial(np.array(probabilities))
    numbers = np.arange(len(law))
    assert math.isclose(law.sum(), 1, abs_tol=1e-12)
    assert math.isclose(law @ numbers, sum(probabilities), abs_tol=1e-9)
    variance = sum(p * (1 - p) for p in probabilities)
    assert math.isclose(law @ numbers**2 - (law @ numbers) ** 2, variance, abs_tol=1e-9)


def test_targets_mark_each_object_once() -> None:
    scene = [
        PlacedObject("cat", "red", "noto", x=0.30, y=0.40, size=0.45),
        PlacedObject("key", None, "noto", x=0.78, y=0.78, size=0.45),
        PlacedObject("star", "red", "noto", x=1.10, y=0.50, size=0.45),  # moved out of the picture
    ]
    targets = scene_targets([scene, []], grid=16)
    assert (targets.heat[0] == 1).nonzero().tolist() == [[6, 4], [12, 12]]
    assert targets.heat[1].max() == 0
    assert targets.noun[0, 6, 4] == OBJECTS.index("cat")
    assert targets.colour[0, 12, 12] == len(COLOURS)
    assert (targets.noun[0] >= 0).sum() == 18
    torch.testing.assert_close(
        targets.offset[0, :, 6, 4], torch.tensor([0.30 * 16 - 4.5, 0.40 * 16 - 6.5])
    )


def test_an_answer_equal_to_the_targets_has_nearly_no_loss_and_reads_the_scene() -> None:
    scene = [PlacedObject("cat", "red", "noto", x=0.30, y=0.40, size=0.45)]
    targets = scene_targets([scene], grid=16)
    centre = torch.where(targets.heat == 1, 20.0, -20.0)
    noun = 20.0 * torch.nn.functional.one_hot(targets.noun.clamp(min=0), len(OBJECTS))
    colour = 20.0 * torch.nn.functional.one_hot(targets.colour.clamp(min=0), len(COLOURS) + 1)
    parts = scene_loss(centre, noun.movedim(-1, 1), colour.movedim(-1, 1), targets.offset, targets)
    assert set(parts) == {"centre", "noun", "colour", "offset"}
    assert all(part < 1e-4 for part in parts.values())
    wrong = scene_loss(
        -centre, -noun.movedim(-1, 1), colour.movedim(-1, 1), targets.offset, targets
    )
    assert wrong["centre"] > 1
    assert wrong["noun"] > 1


@pytest.fixture(scope="module")
def untrained() -> SceneJudge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SceneJudge(channels=(8, 16, 16)).eval()


def test_a_judge_survives_saving(untrained: SceneJudge, tmp_path: Path) -> None:
    untrained.save_pretrained(tmp_path)
    images, prompts = torch.rand(2, 3, 64, 64), ["a cat", "two red cars above a key"]
    report, again = untrained.score(images, prompts), load_judge(tmp_path).score(images, prompts)
    np.testing.assert_array_equal(report.gold, again.gold)
    assert [len(values) for values in report.probabilities] == [1, 5]
    assert all(((values >= 0) & (values <= 1)).all() for values in report.probabilities)


def test_a_verdict_does_not_depend_on_the_batch(untrained: SceneJudge) -> None:
    images, prompts = torch.rand(3, 3, 64, 64), ["a cat", "two keys", "a red car"]
    together = untrained.score(images, prompts).gold
    alone = [untrained.score(images[i : i + 1], prompts[i : i + 1]).gold[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_pictures_of_another_size_are_resized(untrained: SceneJudge) -> None:
    assert untrained.features(torch.rand(2, 3, 128, 96)).shape == (2, 64)
    assert len(untrained.score(torch.rand(2, 3, 128, 128), ["a cat", "a key"]).gold) == 2


def test_prompts_outside_the_grammar_are_refused(untrained: SceneJudge) -> None:
    with pytest.raises(ConfigError, match="unicorn"):
        untrained.score(torch.rand(1, 3, 64, 64), ["a unicorn"])
    with pytest.raises(ConfigError, match="2 images and 1 prompts"):
        untrained.score(torch.rand(2, 3, 64, 64), ["a cat"])


def test_a_folder_without_a_judge_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_judge"):
        load_judge(tmp_path)


@in_the_box
def test_the_judge_in_the_box_reads_real_scenes_and_is_not_blind() -> None:
    figures = judge_figures(load_judge(), RealScenes.load())
    assert figures["facts_right"] >= 0.95
    assert figures["refused"] >= 0.9


@in_the_box
def test_the_judge_in_the_box_finds_nothing_in_a_blank_picture() -> None:
    prompts = [prompt.caption() for prompt in load_prompts("tune")[:12]]
    assert not load_judge().score(torch.ones(12, 3, 64, 64), prompts).all_right.any()


@in_the_box
def test_the_judge_in_the_box_is_small() -> None:
    size = sum(path.stat().st_size for path in EMBEDDED_JUDGE.rglob("*") if path.is_file())
    assert size <= 6_000_000
