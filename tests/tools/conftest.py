"""A data set in the layout of the real one, small enough to be drawn on the spot: five things in every style."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.tools import shapes
from tests.tools.shapes import KNOWN, STRANGERS
from tools.nano.classifier import UNSEEN
from tools.nano.scenes import STYLES, Subject, read_subjects

NAMES = ("dog", "cat", "fox", "panda", "elephant")
FILLS = ((200, 60, 40), (60, 160, 70), (60, 90, 210), (230, 180, 40), (150, 70, 180))


def drawing(number: int, style: str) -> bytes:
    """A 64-pixel RGBA WebP: a shape of its own for every number, and a look of its own for every style."""
    image = Image.new("RGBA", (64, 64))
    draw = ImageDraw.Draw(image)
    fill = (0, 0, 0) if style == "line" else FILLS[number]
    sides = number + 3
    if style == "line":
        draw.regular_polygon((32, 32, 28), sides, outline=(*fill, 255), width=4)
    else:
        draw.regular_polygon((32, 32, 28), sides, fill=(*fill, 255))
    if style in ("3d", "color"):
        draw.ellipse((18, 14, 34, 30), fill=(255, 255, 255, 150))
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True)
    return file.getvalue()


@pytest.fixture(scope="session")
def nano_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with index.json and the zips; the names are the first of tools/nano/subjects.json."""
    folder = tmp_path_factory.mktemp("nano-data")
    styles = ("3d", "color", "flat", "line")
    index = [
        {"id": f"1f4{number}", "name": name, "tags": [], "group": "animals-nature", "styles": list(styles)}
        for number, name in enumerate(NAMES)
    ]
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    for style in styles:
        with zipfile.ZipFile(folder / f"{style}-256.zip", "w") as archive:
            for number, entry in enumerate(index):
                archive.writestr(f"{style}/{entry['id']}.webp", drawing(number, style))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in the real one's layout."""
    folder = tmp_path_factory.mktemp("drawings")
    chosen = json.loads((Path("tools/nano/subjects.json")).read_text("utf-8"))[:KNOWN]
    names = [entry["data"] for entry in chosen] + [f"stranger {number}" for number in range(STRANGERS)]
    index = [{"id": f"{number:x}", "name": name, "styles": STYLES} for number, name in enumerate(names)]
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    for style in (*STYLES, UNSEEN):
        with zipfile.ZipFile(folder / f"{style}-256.zip", "w") as file:
            for number in range(len(names)):
                stored = io.BytesIO()
                shapes.drawing(number, style).save(stored, "WEBP", lossless=True)
                file.writestr(f"{style}/{number:x}.webp", stored.getvalue())
    return folder


@pytest.fixture(scope="session")
def subjects(data: Path) -> list[Subject]:
    return read_subjects(data, KNOWN)
