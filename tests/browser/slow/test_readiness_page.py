"""What the page shows before a run: whether it fits, and the chosen checkpoint being loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.steps import EXAMPLES, choose_checkpoint, expect_finished, run, set_size, write
from tests.browser.studio import environment, open_studio, started
from tests.tiny import Toys


@pytest.fixture(scope="module")
def fresh(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a studio in which each checkpoint is used by one test only: to it, nothing of that is loaded or
    learnt yet."""
    home = tmp_path_factory.mktemp("home")
    with started(["app.py", "--port"], environment(home, toys), home / "app.log") as url:
        yield url


def test_whether_it_fits_stands_under_the_button(page: Page) -> None:
    line = page.locator("#generate .fit").first
    expect(line).to_have_text(re.compile(r"Fits: 0\.\d+ of [\d.]+ GB; everything stays"))
    before = line.inner_text()
    set_size(page, "generate", 512, 512)
    expect(line).not_to_have_text(before)
    expect(line).to_have_text(re.compile(r"Fits: 0\.\d"))


def test_a_chosen_checkpoint_is_loaded_at_once(context: BrowserContext, fresh: str) -> None:
    page = context.new_page()
    open_studio(page, fresh)
    page.evaluate(
        """() => {
          window.told = [];
          const loading = document.getElementById('loading');
          new MutationObserver(() => window.told.push(loading.innerText.trim()))
            .observe(loading, {childList: true, subtree: true, characterData: true});
        }"""
    )
    choose_checkpoint(page, "FLUX.2 klein 4B")
    page.wait_for_function("() => window.told.some((text) => text.includes('FLUX.2 klein 4B'))")
    expect(page.locator("#loading")).to_be_hidden()
    set_size(page, "generate", 64, 64)
    write(page, "generate", "a fox")
    run(page, "generate")
    expect_finished(page)


def test_how_long_a_run_takes_is_told_once_one_is_done(context: BrowserContext, fresh: str) -> None:
    page = context.new_page()
    open_studio(page, fresh)
    line = page.locator("#generate .pace")
    expect(line).to_contain_text("64 image tokens · 4 steps · 1 picture")
    expect(line).to_contain_text("The first run will tell how long it takes. Before that: loading the checkpoint.")
    write(page, "generate", "a fox")
    run(page, "generate")
    expect_finished(page)
    about = re.compile(r"1 pictureAbout (?:\d+ min \d+ s|[\d.]+ s), as runs on this machine go\.$")
    expect(line).to_have_text(about)  # by itself, and it is loaded now
    before = line.inner_text().partition("About")[2]
    set_size(page, "generate", 512, 512)
    expect(line).to_have_text(about)
    expect(line).to_contain_text("1,024 image tokens")
    assert line.inner_text().partition("About")[2] != before
    page.locator("#generate .count input[type=number]").fill("2")
    expect(line).to_contain_text("2 pictures")
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit .references input[type=file]").set_input_files(EXAMPLES / "fox.png")
    expect(page.locator("#edit .pace")).to_contain_text("64 image tokens + 64 of the reference · 4 steps")
