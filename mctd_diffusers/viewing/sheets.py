"""Samples side by side: a row for each prompt, a column for each search, notes below each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_INK = "#3a3a3a"
_SOFT = "#6f6f6f"
_BEST = "#d1495b"
_FRAME = "#d5d5d5"
_MARGIN = 24
_GAP = 18
_PROMPT_WIDTH = 210
_LINE = 20


@dataclass(frozen=True)
class Cell:
    """One sample of a sheet.

    Args:
        picture: the sample; scaled to the side of the sheet's pictures.
        notes: short lines below it, the most important first.
        is_best: frame it as the best of its row.
    """

    picture: Image.Image
    notes: tuple[str, ...] = ()
    is_best: bool = False


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Loads the font that comes with matplotlib, so that a sheet looks alike everywhere."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Breaks ``text`` between words into lines of at most ``width`` pixels, or of one word."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Cuts ``text`` to ``width`` pixels, with an ellipsis where something is missing."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def comparison_sheet(
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, Sequence[Cell]]],
    *,
    title: str = "",
    footer: str = "",
    side: int = 200,
) -> Image.Image:
    """Lays samples out in a table.

    Args:
        columns: heading and the line below it, from left to right.
        rows: prompt and one cell for each column, from top to bottom.
        title: a line over the table.
        footer: a sentence under it, such as what the frame means.
        side: width of a picture in pixels; its height keeps its shape.

    Returns:
        The sheet, RGB on white.

    Raises:
        ValueError: a row whose number of cells is not that of the columns.
    """
    for prompt, cells in rows:
        if len(cells) != len(columns):
            raise ValueError(f"{len(cells)} cells for {prompt!r}, but {len(columns)} columns")
    heights = [
        max((round(side * cell.picture.height / cell.picture.width) for cell in cells), default=0)
        + _LINE * max((len(cell.notes) for cell in cells), default=0)
        + _GAP
        for _, cells in rows
    ]
    top = _MARGIN + (38 if title else 0)
    width = 2 * _MARGIN + _PROMPT_WIDTH + len(columns) * (side + _GAP)
    footer_lines = wrap(footer, width - 2 * _MARGIN, _font(12)) if footer else []
    height = top + 50 + sum(heights) + (_LINE * len(footer_lines) + 8) + _MARGIN // 2
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN - 4), title, fill=_INK, font=_font(20, True))
    lefts = [_MARGIN + _PROMPT_WIDTH + place * (side + _GAP) for place in range(len(columns))]
    for left, (heading, below) in zip(lefts, columns, strict=True):
        draw.text((left, top), _shorten(heading, side, _font(16, True)), _INK, _font(16, True))
        draw.text((left, top + 22), _shorten(below, side, _font(12)), _SOFT, _font(12))
    y = top + 50
    for (prompt, cells), tall in zip(rows, heights, strict=True):
        for number, line in enumerate(wrap(prompt, _PROMPT_WIDTH - _GAP, _font(15))):
            draw.text((_MARGIN, y + number * 21), line, _INK, _font(15))
        for left, cell in zip(lefts, cells, strict=True):
            _draw_cell(sheet, draw, cell, left, y, side)
        y += tall
    for number, line in enumerate(footer_lines):
        draw.text((_MARGIN, y + 2 + number * _LINE), line, _SOFT, _font(12))
    return sheet


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, left: int, top: int, side: int
) -> None:
    tall = round(side * cell.picture.height / cell.picture.width)
    picture = cell.picture.convert("RGB").resize((side, tall), Image.Resampling.LANCZOS)
    sheet.paste(picture, (left, top))
    wide = 3 if cell.is_best else 1
    draw.rectangle(
        (left - wide, top - wide, left + side + wide - 1, top + tall + wide - 1),
        outline=_BEST if cell.is_best else _FRAME,
        width=wide,
    )
    for number, note in enumerate(cell.notes):
        font = _font(13, bold=cell.is_best and number == 0)
        where = (left, top + tall + 5 + number * _LINE)
        draw.text(where, _shorten(note, side, font), _INK if number == 0 else _SOFT, font)
