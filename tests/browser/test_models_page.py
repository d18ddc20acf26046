"""The Models tab in a real browser: a slow hub on 127.0.0.1, and a studio that knows two toy checkpoints of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.browser.studio import started
from tests.models.fake_hub import CHECKPOINT, OTHER, TOY, FakeHub, serve

PACE = 0.7  # seconds for each 50 kB, of which the toy has sixty: no download ends before a test lets it
# Beside the toy on board, the two of the tests' own hub. The port is the last argument.
PROGRAM = """
import sys
from pathlib import Path
from flux2_studio.checkpoints import NANO
from flux2_studio.settings import Settings
from flux2_studio.ui.app import serve_page
from tests.models.fake_hub import CHECKPOINT, OTHER
_, home, port = sys.argv
settings = Settings(home=Path(home), checkpoints=(NANO, CHECKPOINT, OTHER), device="cpu", preview="off")
serve_page(settings, port=int(port), notes=["x.safetensors is a <b>LoRA</b>."])
"""


@dataclass(frozen=True, kw_only=True)
class Studio:
    url: str
    hub: FakeHub
    home: Path

    def toy(self) -> list[bytes]:
        """The toy's transformer, if it is on disk."""
        return [path.read_bytes() for path in self.home.glob("hub/models--*/snapshots/*/toy.safetensors")]


@pytest.fixture
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    home = tmp_path_factory.mktemp("models")
    known = {name: value for name, value in os.environ.items() if not name.startswith(("FLUX2_", "GRADIO_", "HF_"))}
    with serve() as hub:
        hub.pace = PACE
        hub.refusals["maker/Gated"] = (401, "GatedRepo", "Access to model is restricted. Please log in.")
        environment = {**known, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
        with started(["-c", PROGRAM, str(home / "home")], environment, home / "log") as url:
            yield Studio(url=url, hub=hub, home=home)


def open_tab(page: Page) -> None:
    page.get_by_role("tab", name="Models").click()
    expect(card(page, CHECKPOINT.label)).to_be_visible()


def card(page: Page, label: str) -> Locator:
    return page.locator(".model").filter(has=page.get_by_role("heading", name=label, exact=True))


def button(card: Locator, name: str) -> Locator:
    return card.get_by_role("button", name=re.compile(f"^{name}"))


def test_download_pause_reload_resume_delete_gate_phone_and_a_closed_tab(
    context: BrowserContext, studio: Studio
) -> None:
    page = context.new_page()
    page.goto(studio.url)
    page.locator("#checkpoint input").click()
    page.get_by_role("option", name=CHECKPOINT.label, exact=True).click()
    expect(page.locator("#about")).to_contain_text("first run downloads")
    open_tab(page)
    expect(page.locator("#stage")).to_be_hidden()
    klein = card(page, CHECKPOINT.label)
    expect(klein).to_contain_text("not on disk")
    expect(klein.locator("progress")).to_have_count(0)

    button(klein, "Download 3.0 MB").click()
    bar = klein.locator("progress")
    expect(klein.locator(".bytes")).to_contain_text("MB/s")
    expect(klein.locator(".bytes")).to_contain_text("left")
    expect(klein).to_contain_text("Downloading Toy-4B")
    before = bar.get_attribute("value")
    assert before is not None
    expect(bar).not_to_have_attribute("value", before)

    button(klein, "Pause").click()
    expect(klein).to_contain_text("paused")
    page.reload()
    open_tab(page)
    expect(klein).to_contain_text("paused")
    there = float(bar.get_attribute("value") or 0)
    assert 0 < there < 1 and studio.toy() == []

    studio.hub.sent.clear()
    studio.hub.pace = 0
    button(klein, "Resume").click()
    expect(klein).to_contain_text("on disk")
    expect(button(klein, "Resume")).to_be_hidden()
    assert studio.toy() == [TOY]
    (asked,) = [span for name, span in studio.hub.sent if name == "toy.safetensors"]
    assert asked is not None and not asked.startswith("bytes=0-")

    klein.get_by_role("button", name="Delete…").click()
    expect(klein).to_contain_text("3.0 MB become free")
    button(klein, "Keep").click()
    expect(button(klein, "Keep")).to_be_hidden()
    assert studio.toy() == [TOY]
    klein.get_by_role("button", name="Delete…").click()
    klein.get_by_role("button", name="Delete", exact=True).click()
    expect(klein).to_contain_text("3.0 MB freed.")
    expect(klein).to_contain_text("not on disk")
    assert studio.toy() == []

    # A gate shows its page, and names stay text.
    gated = card(page, OTHER.label)
    button(gated, "Download").click()
    problem = gated.get_by_role("alert")
    expect(problem).to_contain_text("is only for those who have accepted its licence")
    expect(problem.get_by_role("link").first).to_have_attribute("href", f"{studio.hub.url}/maker/Gated")
    expect(page.locator("#others")).to_contain_text("x.safetensors is a <b>LoRA</b>.")

    # It fits a phone.
    page.set_viewport_size({"width": 390, "height": 844})
    expect(button(card(page, CHECKPOINT.label), "Download")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for one in page.locator(".model").all():
        box = one.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390
    for shown in page.locator("#models button:visible").all():
        box = shown.bounding_box()
        assert box is not None and box["height"] >= 40
    page.get_by_role("tab", name="Generate").click()
    expect(page.locator("#stage")).to_be_visible()

    # The choice of a checkpoint knows of a download, and a closed tab loses nothing of it.
    studio.hub.sent.clear()
    studio.hub.pace = PACE
    open_tab(page)
    button(card(page, CHECKPOINT.label), "Download").click()
    expect(card(page, CHECKPOINT.label)).to_contain_text("downloading")
    page.close()
    other = context.new_page()
    other.goto(studio.url)  # and never looks at the Models tab
    other.locator("#checkpoint input").click()
    other.get_by_role("option", name=CHECKPOINT.label, exact=True).click()
    expect(other.locator("#about")).to_contain_text("first run downloads")
    studio.hub.pace = 0
    expect(other.locator("#about")).to_contain_text("on disk")
    assert studio.toy() == [TOY] and [name for name, _ in studio.hub.sent].count("toy.safetensors") == 1
