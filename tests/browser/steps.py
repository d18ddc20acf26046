"""What a person does with the page, step by step: shared by the tests of the browser."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, TimeoutError, expect

from tests.browser.studio import PATIENCE, ROOT

EXAMPLES = ROOT / "assets" / "examples"

# Collects every picture that the preview shows, from now on.
WATCH = """() => {
  window.previews = new Set();
  new MutationObserver(() => {
    const image = document.querySelector('#preview img');
    if (image) window.previews.add(image.src);
  }).observe(document.body, {childList: true, subtree: true, attributes: true});
}"""


def wait_until(page: Page, condition: str, arg: Any = None) -> None:
    """Wait until the script `condition` is true. expect() looks once a second, after the first; this ten times."""
    page.wait_for_function(condition, arg=arg, polling=100, timeout=PATIENCE)


def settle(page: Page) -> None:
    """Wait until nothing on the page moves and all that was changed is laid out."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    wait_until(
        page,
        """() => document.getAnimations().every((it) =>
          it.playState !== 'running' || it.effect.getComputedTiming().iterations === Infinity)""",
    )


def write(page: Page, form: str, prompt: str) -> None:
    page.locator(f"#{form} .prompt textarea").fill(prompt)


def run(page: Page, form: str) -> None:
    """Press the button. What an earlier run said last is marked first, for it stays until this one has begun."""
    page.evaluate("document.querySelector('#progress p')?.setAttribute('data-earlier', '')")
    page.locator(f"#{form} .run").click()


def set_number(field: Locator, value: int) -> None:
    field.fill(str(value))
    field.press("Tab")


def set_size(page: Page, form: str, width: int, height: int) -> None:
    set_number(page.locator(f"#{form}").get_by_label("Width"), width)
    set_number(page.locator(f"#{form}").get_by_label("Height"), height)


def set_count(page: Page, form: str, count: int) -> None:
    set_number(page.locator(f"#{form} .count input[type=number]"), count)


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def upload(page: Page, form: str, *files: Path) -> None:
    page.locator(f"#{form} .references input[type=file]").set_input_files([str(file) for file in files])


def choose_checkpoint(page: Page, label: str) -> None:
    page.locator("#checkpoint input").click()
    page.get_by_role("option", name=label, exact=True).click()


def run_for_long(page: Page) -> None:
    """Start a run of many quick steps: on no machine is it over before there was time to stop it."""
    choose_checkpoint(page, "Nano Base (a toy, on board)")
    steps = page.locator("#generate .steps input[type=number]")
    expect(steps).to_have_value("20")  # the form is laid out for it
    set_number(steps, 100)
    write(page, "generate", "a 3D owl")
    set_size(page, "generate", 256, 256)
    set_count(page, "generate", 16)
    run(page, "generate")


def hand_over(page: Page, event: str, name: str) -> None:
    """Paste or drop a picture of 96 x 64, anywhere on the page."""
    page.evaluate(
        """async ([event, name]) => {
          const canvas = Object.assign(document.createElement('canvas'), {width: 96, height: 64});
          const blob = await new Promise((done) => canvas.toBlob(done, 'image/png'));
          const carrier = new DataTransfer();
          carrier.items.add(new File([blob], name, {type: 'image/png'}));
          const carried = {clipboardData: carrier, dataTransfer: carrier, bubbles: true, cancelable: true};
          const Kind = event === 'paste' ? ClipboardEvent : DragEvent;
          if (document.body.dispatchEvent(new Kind(event, carried))) throw new Error(`nobody took the ${event}`);
        }""",
        [event, name],
    )


def result(page: Page) -> Locator:
    return page.locator("#gallery img").first


def settings(page: Page) -> dict[str, str]:
    """The table of what was run."""
    rows = page.locator("#settings tr")
    expect(rows.first).to_be_visible()
    return {row.locator("th").inner_text(): row.locator("td").inner_text() for row in rows.all()}


def problem(page: Page) -> Locator:
    return page.locator("#message .problem")


def told_json(page: Page) -> Any:
    """The settings as the page has them as JSON; on the screen are only those lines that there is room for."""
    text = page.locator("#json .cm-content").evaluate(
        "(it) => (it.cmTile ?? it.cmView).view.state.doc.toString()",
    )
    return json.loads(text)


def expect_finished(page: Page, pictures: int = 1) -> None:
    """Wait for the end of the run that `run` began, not of one before it."""
    word = "1 picture in" if pictures == 1 else f"{pictures} pictures in"
    told = "#progress p:not([data-earlier])"
    with suppress(TimeoutError):  # expect() says it in better words
        wait_until(page, "([told, word]) => document.querySelector(told)?.textContent.includes(word)", [told, word])
    expect(page.locator(told)).to_contain_text(word, timeout=5_000)
    expect(result(page)).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()


def ends_with(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name) + "$")


def run_on(page: Page, count: int = 16) -> None:
    """Start a run of so many small steps that it goes on until it is stopped."""
    choose_checkpoint(page, "Nano Base (a toy, on board)")
    steps = page.locator("#generate .steps input[type=number]")
    expect(steps).to_have_value("20")  # the form is laid out for it
    set_number(steps, 100)
    write(page, "generate", "a 3D owl")
    set_count(page, "generate", count)
    run(page, "generate")
    expect(page.locator("#preview img")).to_be_visible()


def queue_one(page: Page, prompt: str) -> None:
    write(page, "generate", prompt)
    run(page, "generate")
    expect(row(page, prompt)).to_have_count(1)


def row(page: Page, prompt: str) -> Locator:
    return page.locator("#queue li", has_text=prompt)


def press(page: Page, prompt: str, name: str) -> None:
    row(page, prompt).get_by_role("button", name=name).click()


def stop(page: Page) -> None:
    page.locator("#stop").click()
    expect(page.locator("#stop")).to_be_hidden()


def end_runs(page: Page) -> None:
    """Take all runs of this browser off the queue."""
    off = page.locator("#queue").get_by_role("button", name="Take this run off the queue")
    while off.count():
        off.last.click()
        page.wait_for_timeout(200)
    expect(page.locator("#queue")).to_be_hidden()


def explore(page: Page) -> None:
    page.locator("#explore-start").click()


def explored_pictures(page: Page) -> Locator:
    return page.locator("#explore-sheet td img")


def expect_explored(page: Page, count: int) -> None:
    expect(page.locator("#explore-progress")).to_contain_text(f"{count} of {count} pictures")
    expect(explored_pictures(page)).to_have_count(count)
    expect(page.locator("#explore-stop")).to_be_hidden()


def preset_part(page: Page, name: str, form: str = "generate") -> Locator:
    return page.locator(f"#{form} .block.preset-{name}")


def preset_button(page: Page, name: str, form: str = "generate") -> Locator:
    return page.locator(f"#{form} button.preset-{name}")


def unfold_presets(page: Page, form: str = "generate") -> None:
    page.locator(f"#{form} .preset-own").get_by_role("button", name="Save and share presets").click()
    expect(preset_button(page, "save", form)).to_be_visible()
