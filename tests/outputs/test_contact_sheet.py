"""Many pictures on one sheet."""

from __future__ import annotations

from PIL import Image

from flux2_studio.images.contact_sheet import BLANK, MAX_SHEET_PIXELS, PAPER, SheetLayout, draw_sheet

RED, BLUE = Image.new("RGB", (128, 96), "#ff0000"), Image.new("RGB", (96, 128), "#0000ff")


def colours(sheet: Image.Image) -> dict[tuple[int, ...], int]:
    found = sheet.getcolors(1 << 20)
    assert found is not None
    return {colour: count for count, colour in found if isinstance(colour, tuple)}


def test_pictures_in_their_places_at_their_own_size() -> None:
    sheet = draw_sheet(SheetLayout(columns=2, rows=1), {(0, 0): RED, (1, 0): BLUE})
    found = colours(sheet)
    assert found[255, 0, 0] == 128 * 96 and found[0, 0, 255] == 96 * 128
    left = sheet.crop((0, 0, sheet.width // 2, sheet.height))
    assert (0, 0, 255) not in colours(left)


def test_a_missing_one_stays_blank() -> None:
    sheet = draw_sheet(SheetLayout(columns=2, rows=2), {(0, 0): RED})
    blank = tuple(int(BLANK[i : i + 2], 16) for i in (1, 3, 5))
    assert colours(sheet)[blank] == 3 * 128 * 96


def test_labels_take_room_and_are_written() -> None:
    bare = draw_sheet(SheetLayout(columns=2, rows=2), {(0, 0): RED})
    layout = SheetLayout(columns=2, rows=2, title="Size: small", column_labels=("1", "2"), row_labels=("red", "green"))
    labelled = draw_sheet(layout, {(0, 0): RED})
    assert labelled.width > bare.width and labelled.height > bare.height
    top = labelled.crop((0, 0, labelled.width, labelled.height - bare.height + 16))
    assert len(colours(top)) > 1, "something is written there"
    under = draw_sheet(SheetLayout(columns=2, rows=2, captions=("word " * 200, "x" * 500, "", "狐")), {(0, 0): RED})
    assert under.size[0] == bare.width, "long labels are cut, and make nothing wider"


def test_large_sheets_have_a_limit() -> None:
    large = Image.new("RGB", (1024, 1024), "#ff0000")
    sheet = draw_sheet(SheetLayout(columns=60, rows=3), {(i, 0): large for i in range(60)})
    assert max(sheet.size) <= MAX_SHEET_PIXELS


def test_an_empty_sheet() -> None:
    sheet = draw_sheet(SheetLayout(columns=1, rows=1), {})
    assert tuple(int(PAPER[i : i + 2], 16) for i in (1, 3, 5)) in colours(sheet)
