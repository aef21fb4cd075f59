from __future__ import annotations

import pytest
from PIL import Image

from mctd_diffusers.viewing import sheets
from mctd_diffusers.viewing.sheets import Cell, comparison_sheet, wrap


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


def test_lines_break_between_words_and_a_long_word_stands_alone() -> None:
    font = sheets._font(15)
    lines = wrap("a green cat to the left of a yellow star", 120, font)
    assert " ".join(lines) == "a green cat to the left of a yellow star"
    assert max(font.getlength(line) for line in lines) <= 120
    assert wrap("incomprehensibilities", 10, font) == ["incomprehensibilities"]


def test_pictures_stand_in_the_order_of_columns_and_rows() -> None:
    rows = [
        ("two blue cars", [Cell(picture("red"), ("reward 0.1",)), Cell(picture("lime"))]),
        ("a cup", [Cell(picture("blue"), ("x" * 99,), is_best=True), Cell(picture("black"))]),
    ]
    sheet = comparison_sheet([("plain", ""), ("mctd", "64 NFE")], rows, title="t", footer="f")
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]
    pixels = sheet.load()
    places = []
    for colour in colours:
        found = [
            (x, y)
            for y in range(0, sheet.height, 10)
            for x in range(0, sheet.width, 10)
            if pixels is not None and pixels[x, y] == colour
        ]
        assert len(found) >= 300, colour  # 200 x 200 pixels, looked at in steps of ten
        places.append((min(x for x, _ in found), min(y for _, y in found)))
    red, lime, blue, black = places
    assert red[0] == blue[0] < lime[0] == black[0]
    assert red[1] == lime[1] < blue[1] == black[1]


def test_a_wide_picture_keeps_its_shape() -> None:
    wide = Image.new("RGB", (128, 64), "red")
    tall = comparison_sheet([("a", "")], [("p", [Cell(picture("red"))])]).height
    assert comparison_sheet([("a", "")], [("p", [Cell(wide)])]).height == tall - 100


def test_a_row_with_a_missing_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells for 'a cup', but 2 columns"):
        comparison_sheet([("a", ""), ("b", "")], [("a cup", [Cell(picture("red"))])])
