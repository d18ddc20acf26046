"""Prompts enhanced on the page: beside the original or straight into the run, and what happens when that fails."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.pages.enhancing import RICH, panel, unfold
from tests.browser.steps import choose_checkpoint, expect_finished, problem, run, settings, write
from tests.browser.studio import App
from tests.fake_openai import FakeOpenAI, refuses, says, silent


def test_what_the_model_writes_is_seen_as_it_comes_and_can_be_stopped(page: Page, model: FakeOpenAI) -> None:
    model.replies[:] = [silent("A red ", "apple")]
    write(page, "generate", "apple")
    here = unfold(page, "OpenRouter or your server")
    here.get_by_role("button", name="Enhance now").click()
    expect(here.locator(".written textarea")).to_have_value("A red apple")
    here.get_by_role("button", name="Stop").click()
    expect(here.get_by_text("Stopped.")).to_be_visible()
    expect(here.locator(".written textarea")).to_be_hidden()
    expect(here.get_by_role("button", name="Enhance now")).to_be_enabled()
    expect(page.locator("#generate .prompt textarea")).to_have_value("apple")


def test_a_failure_is_seen_and_leaves_nothing_that_could_be_used(page: Page, model: FakeOpenAI) -> None:
    model.replies[:] = [says(RICH), says("I'm sorry, but I can't help with that request."), refuses(401)]
    write(page, "generate", "apple")
    here = unfold(page, "OpenRouter or your server")
    for said in ("", "The language model refused", "asks for an API key"):
        here.get_by_role("button", name="Enhance now").click()
        if said:
            expect(here.locator(".problem")).to_contain_text(said)
            expect(here.locator(".problem")).to_be_visible()
            expect(here.locator(".written textarea")).to_be_hidden()
            expect(here.get_by_role("button", name="Use as prompt")).to_be_hidden()
        else:
            expect(here.get_by_role("button", name="Use as prompt")).to_be_visible()


def test_a_failure_stops_the_run_and_one_click_goes_without(page: Page, model: FakeOpenAI, app: App) -> None:
    model.replies[:] = [refuses(402)]
    before = len(app.pictures())
    write(page, "generate", "a flat owl")
    unfold(page, "OpenRouter or your server")
    run(page, "generate")
    expect(problem(page)).to_contain_text("no credit left")
    assert len(app.pictures()) == before
    without = page.get_by_role("button", name="Generate without enhancing")
    write(page, "generate", "a flat fox")
    without.click()
    expect_finished(page)
    expect(without).to_be_hidden()
    assert settings(page)["Prompt"] == "a flat fox"
    assert len(app.pictures()) == before + 1


def test_what_each_choice_costs_is_said_before(page: Page) -> None:
    here = unfold(page, "On this machine")
    expect(here).to_contain_text("has no language model on this machine")
    expect(here.get_by_role("button", name="Enhance now")).to_be_hidden()
    expect(here.get_by_label("API key")).to_be_hidden()
    choose_checkpoint(page, "FLUX.2 klein 4B")
    expect(here).to_contain_text("own text encoder")
    expect(here.locator(".local-model")).to_be_visible()
    here.get_by_label("OpenRouter or your server").check()
    expect(here).to_contain_text("go to 127.0.0.1")
    expect(here.get_by_label("API key")).to_have_attribute("type", "password")
    here.get_by_label("Off").check()
    expect(here.get_by_role("button", name="Enhance now")).to_be_hidden()


def test_enhancing_is_off_until_it_is_wanted(page: Page) -> None:
    for form, tab, told in (
        ("generate", "Generate", "draws what it reads"),
        ("edit", "Edit", "changes pictures"),
        ("multi", "Multi-reference", "changes pictures"),
    ):
        page.get_by_role("tab", name=tab).click()
        panel(page, form).locator(".label-wrap").first.click()
        expect(panel(page, form).get_by_label("Off")).to_be_checked()
        panel(page, form).get_by_text("What the language model is told").click()
        expect(panel(page, form)).to_contain_text(told)
