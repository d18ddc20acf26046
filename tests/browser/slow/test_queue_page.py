"""Runs outlive the tab and the page, and wait their turn: seen from a real browser."""

from __future__ import annotations

import time
from collections.abc import Callable

from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.steps import (
    expect_finished,
    run,
    set_count,
    set_size,
    settings,
    write,
)
from tests.browser.studio import PATIENCE, App


def test_a_run_that_ended_meanwhile_is_shown(open_page: Callable[[], Page], context: BrowserContext, app: App) -> None:
    first = open_page()
    write(first, "generate", "a sunflower")
    set_size(first, "generate", 256, 256)
    set_count(first, "generate", 5)  # it is not over before its page is closed
    run(first, "generate")
    expect(first.locator("#generate .seed input")).not_to_have_value("")  # it has begun
    first.close()
    deadline = time.monotonic() + PATIENCE / 1000
    while context.request.get(f"{app.url}queue/state").text():
        assert time.monotonic() < deadline, "the run does not end"
        time.sleep(0.2)
    second = open_page()
    expect_finished(second, 5)
    expect(second.locator("#notices")).to_contain_text("This run ended while the page was closed.")
    assert settings(second)["Prompt"] == "a sunflower"
    second.reload()
    expect(second.locator("#generate .run")).to_be_enabled()
    expect(second.locator("#preview")).to_contain_text("Your picture will appear here")  # that was news once
