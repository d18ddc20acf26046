"""The Inspect tab, and hostile files for it."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, expect

from flux2_studio.checkpoints import NANO
from flux2_studio.provenance import metadata
from flux2_studio.record import Record
from flux2_studio.request import Request
from tests.browser.steps import open_tab


def inspect(page: Page, file: Path) -> None:
    open_tab(page, "Inspect")
    page.locator("#inspect input[type=file]").set_input_files(str(file))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def changed(data: bytes) -> bytes:
    """A signed PNG with one pixel changed, its credentials as they were."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        image.putpixel((3, 3), (1, 2, 3))
        out = io.BytesIO()
        info = PngInfo()
        info.add_text("parameters", image.text["parameters"])  # type: ignore[attr-defined]
        image.save(out, "PNG", pnginfo=info)
    start = data.index(b"caBX") - 4
    length = int.from_bytes(data[start : start + 4], "big") + 12
    bare = out.getvalue()
    return bare[:33] + data[start : start + length] + bare[33:]  # behind IHDR, as it was


GOOD = metadata.record_to_dict(
    Record(
        request=Request(prompt="a fox", width=64, height=64, seed=1).resolve(NANO),
        label=NANO.label,
    )
)

HTML = "<img src=x onerror='window.hacked=1'>"

HOSTILE = {  # what stands in the file, and what is said of it
    "html": (json.dumps(GOOD | {"checkpoint": {"name": HTML, "label": HTML, "sha256": ""}}), HTML),
    "path": (json.dumps(GOOD | {"references": ["../../../../etc/passwd"]}), "something that is no SHA-256"),
    "deep": ("[" * 50_000, "settings of another program"),
    "huge": (json.dumps(GOOD | {"original_prompt": "a" * 2_000_000}), "damaged or incomplete"),
}


def expect_ignored(page: Page, folder: Path, kind: str) -> None:
    """Inspect the hostile picture of that kind, made in `folder`: it is told of, and nothing of it is believed."""
    written, said = HOSTILE[kind]
    info = PngInfo()
    info.add_text("parameters", written, zip=True)
    file = folder / f"{kind}<img src=x onerror=window.hacked=2>.png"
    Image.new("RGB", (64, 64), "teal").save(file, pnginfo=info)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    inspect(page, file)
    expect(page.locator("#inspect-report")).to_contain_text("SHA-256")
    expect(page.locator("#inspect-report")).to_contain_text(sha256)
    expect(page.locator("#inspect")).to_contain_text(said)
    expect(page.locator("#inspect-restore")).to_be_hidden()
    assert page.evaluate("window.hacked === undefined")
    assert page.locator("#inspect img[src=x]").count() == 0
