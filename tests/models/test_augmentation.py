"""Pictures as a generator would draw them: still pictures, still with the same objects."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers.models.augmentation import (
    TINTS,
    degrade_pictures,
    draw_warps,
    retint_object,
    warp_pictures,
    warp_points,
)

PREPARE_DATA = Path(__file__).parents[2] / "training" / "prepare_data.py"


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spot(x: float, y: float) -> torch.Tensor:
    """A picture of a dark spot on white."""
    places = (torch.arange(64) + 0.5) / 64
    distance = (places[None, :] - x) ** 2 + (places[:, None] - y) ** 2
    return (1 - torch.exp(-distance / (2 * 0.03**2))).expand(1, 3, 64, 64)


@given(st.integers(0, 1000), st.floats(0.3, 0.7), st.floats(0.3, 0.7), st.booleans())
def test_points_go_where_the_picture_goes(seed: int, x: float, y: float, mirrored: bool) -> None:
    maps, fields = draw_warps(1, generator=dice(seed), elastic=0.0)
    if mirrored:
        maps[:, 0] *= -1
    image = 1 - warp_pictures(spot(x, y), maps, fields)[0, 0]
    places = (torch.arange(64) + 0.5) / 64
    centre = torch.stack([(image.sum(0) * places).sum(), (image.sum(1) * places).sum()])
    expected = warp_points(torch.tensor([[x, y]]), maps[0])[0]
    # A tenth of a pixel, for the spot's cut and the interpolation.
    assert (centre / image.sum() - expected).abs().max() < 0.1 / 64


def test_no_warp_is_the_identity_and_outside_is_white() -> None:
    image = torch.rand(2, 3, 16, 16, generator=dice())
    still = torch.eye(3)[:2].expand(2, 2, 3)
    flat = torch.zeros(2, 2, 5, 5)
    torch.testing.assert_close(warp_pictures(image, still, flat), image, atol=1e-5, rtol=0)
    away = still.clone()
    away[:, 0, 2] = 4
    assert (warp_pictures(image, away, flat) == 1).all()


@given(st.integers(0, 1000))
def test_degraded_pictures_stay_pictures(seed: int) -> None:
    image = torch.rand(3, 3, 16, 16, generator=dice(seed))
    made = degrade_pictures(image, generator=dice(seed))
    assert made.shape == image.shape
    assert 0 <= made.min() <= made.max() <= 1
    torch.testing.assert_close(made, degrade_pictures(image, generator=dice(seed)), rtol=0, atol=0)


def test_nothing_to_degrade_by_leaves_a_picture_alone() -> None:
    image = torch.rand(3, 3, 16, 16, generator=dice())
    made = degrade_pictures(image, generator=dice(), blur=0.0, noise=0.0, colour=0.0)
    torch.testing.assert_close(made, image, atol=1e-6, rtol=0)


@pytest.mark.parametrize("new", sorted(TINTS))
def test_an_object_takes_the_path_of_its_new_colour(new: str) -> None:
    old = TINTS["green"]
    image = torch.ones(3, 8, 8)
    levels = [old.dark, old.middle, old.light]
    image[:, 2, 2:5] = torch.tensor(levels)  # lightness is all that counts
    made = retint_object(image, x=0.5, y=0.5, size=0.75, old="green", new=new)
    lightness = (made.amax(0) + made.amin(0))[2, 2:5] / 2
    expected = TINTS[new]
    torch.testing.assert_close(
        lightness, torch.tensor([expected.dark, expected.middle, expected.light])
    )
    untouched = torch.ones(8, 8, dtype=torch.bool)
    untouched[2, 2:5] = False
    assert (made[:, untouched] == 1).all(), "white changed"


def test_a_colour_given_back_is_the_colour_it_was() -> None:
    image = torch.ones(3, 8, 8)
    red = retint_object(image * 0.47, x=0.5, y=0.5, size=1.0, old="red", new="red")
    blue = retint_object(red, x=0.5, y=0.5, size=1.0, old="red", new="blue")
    again = retint_object(blue, x=0.5, y=0.5, size=1.0, old="blue", new="red")
    torch.testing.assert_close(again, red, atol=1e-5, rtol=0)


def test_the_colours_are_those_of_the_data() -> None:
    tree = ast.parse(PREPARE_DATA.read_text("utf-8"))
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TINTS"
    ]
    assert ast.literal_eval(value) == {name: tuple(tint) for name, tint in TINTS.items()}
