"""Prompts enhanced on the page: beside the original or straight into the run, and what happens when that fails."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.pages.enhancing import KEY, RICH, unfold
from tests.browser.steps import expect_finished, run, settings, write
from tests.browser.studio import App
from tests.fake_openai import FakeOpenAI


def test_a_prompt_is_enhanced_beside_the_original_and_straight_into_the_run(
    page: Page, model: FakeOpenAI, app: App
) -> None:
    write(page, "generate", "apple")
    here = unfold(page, "OpenRouter or your server")
    here.get_by_label("API key").fill(KEY)
    here.get_by_role("button", name="Enhance now").click()
    written = here.locator(".written textarea")
    expect(written).to_have_value(RICH)
    prompt = page.locator("#generate .prompt textarea")
    expect(prompt).to_have_value("apple")
    (asked,) = model.asked
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    written.fill(f"{RICH}, please")
    here.get_by_role("button", name="Use as prompt").click()
    expect(prompt).to_have_value(f"{RICH}, please")
    expect(here.locator(".sampling").first).to_be_hidden()
    expect(here.get_by_label("Off")).to_be_checked()  # what was accepted is not enhanced once more
    expect(written).to_be_hidden()
    here.get_by_role("button", name="Undo").click()
    expect(prompt).to_have_value("apple")
    expect(here.get_by_label("OpenRouter or your server")).to_be_checked()
    expect(here.get_by_role("button", name="Undo")).to_be_hidden()

    # Straight into the run.
    run(page, "generate")
    expect_finished(page)
    expect(here.locator(".written textarea")).to_have_value(RICH)
    expect(page.locator("#generate .prompt textarea")).to_have_value("apple")
    table = settings(page)
    assert (table["Prompt"], table["Original prompt"]) == (RICH, "apple")
    assert KEY not in page.content()
    files = [path for path in app.home.rglob("*") if path.is_file()]
    assert app.pictures()[-1] in files
    for file in (*files, app.log):
        assert KEY.encode() not in file.read_bytes(), file
