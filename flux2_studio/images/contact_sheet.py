"""Many pictures on one sheet, in rows and columns with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

MAX_SHEET_PIXELS = 8192  # pixels along a side of the sheet, at most
TILE_PIXELS = 512  # pixels along the longer side of a picture on it, at most
MARGIN_PIXELS = 16
GAP_PIXELS = 8
PAPER, INK, BLANK = "#f7f7f7", "#262626", "#e0e0e0"


@dataclass(frozen=True, kw_only=True)
class SheetLayout:
    """`columns` x `rows` places. Labels above the columns and beside the rows, and under each picture (by its place,
    row by row); empty where there are none. `title` stands above all of it."""

    columns: int
    rows: int
    title: str = ""
    column_labels: Sequence[str] = ()
    row_labels: Sequence[str] = ()
    captions: Sequence[str] = ()


def draw_sheet(layout: SheetLayout, pictures: Mapping[tuple[int, int], Image.Image]) -> Image.Image:
    """The sheet of `pictures`, by (column, row); a place without one stays blank.

    Pictures are scaled down to `TILE_PIXELS`, and further where the sheet would be larger than `MAX_SHEET_PIXELS`;
    never up.
    """
    width = max((it.width for it in pictures.values()), default=TILE_PIXELS)
    height = max((it.height for it in pictures.values()), default=TILE_PIXELS)
    room_across = (MAX_SHEET_PIXELS - 2 * MARGIN_PIXELS) // layout.columns - GAP_PIXELS
    room_down = (MAX_SHEET_PIXELS - 2 * MARGIN_PIXELS) // layout.rows - GAP_PIXELS - 40
    scale = min(1.0, TILE_PIXELS / max(width, height), room_across / width, room_down / height)
    across, down = max(16, round(width * scale)), max(16, round(height * scale))
    font = ImageFont.load_default(max(10, min(18, across // 10)))
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow comes with FreeType, and a font"
    line = round(font.size * 1.35)
    left = MARGIN_PIXELS + (
        max(_width(font, it, across) for it in layout.row_labels) + GAP_PIXELS if layout.row_labels else 0
    )
    above = [_wrapped(font, label, across, 3) for label in layout.column_labels]
    title = _wrapped(font, layout.title, layout.columns * (across + GAP_PIXELS), 4) if layout.title else []
    top = (
        MARGIN_PIXELS
        + (len(title) * line + GAP_PIXELS if title else 0)
        + max((len(it) for it in above), default=0) * line
    )
    foot = 2 * line if layout.captions else 0
    sheet = Image.new(
        "RGB",
        (
            left + layout.columns * (across + GAP_PIXELS) - GAP_PIXELS + MARGIN_PIXELS,
            top + layout.rows * (down + foot + GAP_PIXELS) - GAP_PIXELS + MARGIN_PIXELS,
        ),
        PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    _write(pen, (MARGIN_PIXELS, MARGIN_PIXELS), title, font, line)
    for column, lines in enumerate(above):
        _write(pen, (left + column * (across + GAP_PIXELS), top - len(lines) * line), lines, font, line)
    for row, label in enumerate(layout.row_labels):
        y = top + row * (down + foot + GAP_PIXELS)
        _write(
            pen,
            (MARGIN_PIXELS, y),
            _wrapped(font, label, left - MARGIN_PIXELS - GAP_PIXELS, max(1, down // line)),
            font,
            line,
        )
    for row in range(layout.rows):
        for column in range(layout.columns):
            x, y = left + column * (across + GAP_PIXELS), top + row * (down + foot + GAP_PIXELS)
            if (picture := pictures.get((column, row))) is None:
                pen.rectangle((x, y, x + across - 1, y + down - 1), fill=BLANK)
            else:
                tile = picture.convert("RGB")
                tile.thumbnail((across, down), Image.Resampling.LANCZOS)
                sheet.paste(tile, (x + (across - tile.width) // 2, y + (down - tile.height) // 2))
            place = row * layout.columns + column
            if place < len(layout.captions):
                _write(pen, (x, y + down + 2), _wrapped(font, layout.captions[place], across, 2), font, line)
    return sheet


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], font: ImageFont.FreeTypeFont, line: int
) -> None:
    for number, text in enumerate(lines):
        pen.text((at[0], at[1] + number * line), text, fill=INK, font=font)


def _width(font: ImageFont.FreeTypeFont, text: str, most: int) -> int:
    return min(most, round(font.getlength(text)) + 1)


def _wrapped(font: ImageFont.FreeTypeFont, text: str, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels, cut with an ellipsis where it is longer."""
    found: list[str] = []
    current = ""
    for word in text.split():
        longer = f"{current} {word}".strip()
        if current and font.getlength(longer) > width:
            found.append(current)
            current = word
        else:
            current = longer
    if current:
        found.append(current)
    cut = found[:lines]
    if len(found) > lines:
        cut[-1] += "\u2026"
    return [_cut(font, it, width) for it in cut]


def _cut(font: ImageFont.FreeTypeFont, text: str, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "\u2026") > width:
        text = text[:-1]
    return text + "\u2026"
