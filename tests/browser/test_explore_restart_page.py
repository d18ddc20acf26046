"""An exploration whose studio is killed goes on in the next one, and nobody need click for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import BrowserContext, expect

from tests.browser.test_explore_page import expect_done, explore, pictures
from tests.browser.test_page import choose_checkpoint, open_tab, set_number, write
from tests.browser.test_queue_page import restartable

__all__ = ["restartable"]  # a fixture


def test_it_goes_on_by_itself(
    context: BrowserContext, restartable: tuple[str, Callable[[], None], Callable[[], None], Path], tmp_path: Path
) -> None:
    url, start, kill, home = restartable
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#generate .run")).to_be_enabled()
    choose_checkpoint(page, "Nano Base (a toy, on board)")
    expect(page.locator("#generate .steps input[type=number]")).to_have_value("20")
    write(page, "generate", "a lemon")
    open_tab(page, "Explore")
    set_number(page.locator("#explore-seeds input[type=number]"), 4)
    explore(page)
    expect(pictures(page)).not_to_have_count(0)
    page.close()
    kill()
    (notebook,) = (home / "explorations").glob("*.json")
    before = json.loads(notebook.read_text())
    assert before["going"] and 0 < len(before["done"]) < 4
    start()
    page = context.new_page()
    page.goto(url)
    open_tab(page, "Explore")
    expect_done(page, 4)
    expect(page.locator("#explore-more")).to_be_hidden()
    expect(page.locator("#queue li")).to_have_count(0)  # nothing of it is left over, to be run again
    after = json.loads(notebook.read_text())
    assert before["done"].items() <= after["done"].items() and not after["going"]
    assert len(list((home / "outputs").glob("20*/*.png"))) == 4, "none was made twice"
    assert "Traceback" not in (tmp_path / "app.log").read_text()
