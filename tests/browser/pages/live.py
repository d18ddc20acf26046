"""Live: the picture that follows what is typed."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from flux2_studio.provenance import metadata
from tests.browser.studio import App

PROMPT = "a 3D owl on a green background"


def go_live(page: Page, form: str = "generate") -> None:
    page.locator(f"#{form} .live input").check()
    expect(page.locator(f"#{form} .lock input")).to_be_checked()


def live(page: Page, prompt: str) -> Locator:
    return page.locator(f'#preview img[alt="Live picture: {prompt}"]')


def seen(page: Page) -> np.ndarray:
    """The picture on the mat."""
    source = page.locator("#preview img").get_attribute("src") or ""
    data = base64.b64decode(source.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def made(app: App, prompt: str) -> list[Path]:
    """The saved pictures of `prompt`, oldest first: a run of another test may still go on."""
    records = ((path, metadata.read_settings(path.read_bytes()).record) for path in app.pictures())
    return [path for path, record in records if record is not None and record.request.prompt == prompt]


def saved(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)
