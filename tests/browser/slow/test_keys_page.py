"""The keyboard, and pictures that are pasted or dropped anywhere, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.steps import EXAMPLES, expect_finished, hand_over, open_tab, run, run_for_long, upload, write
from tests.browser.studio import PATIENCE, App


def told(page: Page) -> Locator:
    return page.locator("#told")


def prompt(page: Page, form: str = "generate") -> Locator:
    return page.locator(f"#{form} .prompt textarea")


def give(page: Page, event: str, *files: tuple[str, str]) -> None:
    """Paste or drop files of (name, type) that are no pictures beyond their names."""
    page.evaluate(
        """([event, files]) => {
          const carrier = new DataTransfer();
          for (const [name, type] of files) carrier.items.add(new File(['words'], name, {type}));
          const carried = {clipboardData: carrier, dataTransfer: carrier, bubbles: true, cancelable: true};
          document.body.dispatchEvent(new (event === 'paste' ? ClipboardEvent : DragEvent)(event, carried));
        }""",
        [event, [list(file) for file in files]],
    )


def test_escape_stops_the_run_but_not_while_it_closes_something(page: Page) -> None:
    run_for_long(page)
    expect(page.locator("#preview img")).to_be_visible()
    page.locator("#checkpoint input").click()
    expect(page.get_by_role("option").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("option")).to_have_count(0)
    page.locator("#keys").click()
    page.keyboard.press("Escape")
    expect(page.locator("#keys-help")).to_be_hidden()
    expect(page.locator("#stop")).to_have_text("Stop")
    prompt(page).press("Escape")
    expect(told(page)).to_contain_text("Stopping the run")
    expect(page.locator("#progress")).to_contain_text("Stopped")
    expect(page.locator("#stop")).to_be_hidden()


def test_older_prompts_come_back_and_the_draft_is_not_lost(page: Page, open_page: Callable[[], Page]) -> None:
    field = prompt(page)
    field.press("Control+ArrowUp")
    expect(told(page)).to_contain_text("No prompt was run here yet")
    for text in ("a red fox", "a blue owl", "a red fox"):  # the third time it only moves to the front
        write(page, "generate", text)
        field.press("Control+Enter")
        expect(page.locator("#settings tr", has_text="Prompt")).to_contain_text(text)
        expect_finished(page)
    page.reload()
    expect(page.locator("#generate .run")).to_be_enabled()
    field.fill("half a th")
    field.press("Control+ArrowUp")
    expect(field).to_have_value("a red fox")
    field.press("Control+ArrowUp")
    expect(field).to_have_value("a blue owl")
    expect(told(page)).to_contain_text("Prompt 2 of 2")
    field.press("Control+ArrowUp")
    expect(told(page)).to_contain_text("oldest")
    field.press("Control+ArrowDown")
    field.press("Control+ArrowDown")
    expect(field).to_have_value("half a th")
    # One that was changed on the way is not lost either, and it is what runs.
    field.press("Control+ArrowUp")
    field.fill("a red fox in the snow")
    field.press("Control+ArrowUp")
    expect(field).to_have_value("a red fox")
    field.press("Control+ArrowDown")
    expect(field).to_have_value("a red fox in the snow")
    field.press("Control+Enter")
    expect(page.locator("#settings")).to_contain_text("a red fox in the snow")
    # Each form has its own.
    open_tab(page, "Edit")
    prompt(page, "edit").press("Control+ArrowUp")
    expect(prompt(page, "edit")).to_have_value("")
    # And they can be forgotten.
    page.locator("#look").focus()
    page.keyboard.press("?")
    page.get_by_role("button", name="Forget these prompts").click()
    other = open_page()
    prompt(other).press("Control+ArrowUp")
    expect(told(other)).to_contain_text("No prompt was run here yet")


def test_the_keys_are_listed(page: Page) -> None:
    prompt(page).press("?")
    expect(prompt(page)).to_have_value("?")
    expect(page.locator("#keys-help")).to_be_hidden()
    page.locator("#keys").focus()
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keys")
    for word in ("Run the form", "Stop the run", "An older prompt", "Favourite"):
        expect(dialog).to_contain_text(word)
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()


def test_a_picture_lands_where_it_is_of_use(page: Page) -> None:
    hand_over(page, "paste", "pasted.png")
    expect(page.get_by_role("tab", name="Edit")).to_have_attribute("aria-selected", "true")
    expect(told(page)).to_contain_text("Sent to Edit, as the picture to edit")
    expect(page.locator("#edit")).to_contain_text("As image 1: 96 x 64 pixels")
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "fox.png")
    captions = page.locator("#multi .references .caption-label")
    expect(captions).to_have_text(["image 1"])
    hand_over(page, "drop", "dropped.png")
    expect(captions).to_have_text(["image 1", "image 2"])
    expect(page.locator("#multi .references img").nth(1)).to_have_attribute("src", re.compile("dropped.png$"))
    open_tab(page, "Inspect")
    hand_over(page, "paste", "unknown.png")
    expect(page.locator("#inspect .references img")).to_have_attribute("src", re.compile("unknown.png$"))
    open_tab(page, "Models")
    hand_over(page, "drop", "late.png")
    expect(page.get_by_role("tab", name="Edit")).to_have_attribute("aria-selected", "true")
    expect(page.locator('#edit .references img[src$="pasted.png"]')).to_have_count(0)  # it was replaced
    expect(page.locator("#edit .references img")).to_have_attribute("src", re.compile("late.png$"))


def test_what_is_no_picture_is_told(page: Page) -> None:
    give(page, "drop", ("notes.pdf", "application/pdf"))
    expect(told(page)).to_contain_text("notes.pdf is no picture")
    expect(page.get_by_role("tab", name="Generate")).to_have_attribute("aria-selected", "true")
    give(page, "paste")
    expect(told(page)).to_contain_text("There is no picture in the clipboard")
    give(page, "paste", ("rubbish.png", "image/png"), ("notes.txt", "text/plain"))
    expect(told(page)).to_contain_text("notes.txt was left out")
    expect(page.locator("#edit .block.refused")).to_contain_text("rubbish.png is not a picture")


def test_one_picture_too_many_is_told(page: Page) -> None:
    open_tab(page, "Inspect")
    give(page, "drop", ("first.png", "image/png"), ("second.png", "image/png"))
    expect(told(page)).to_contain_text("Inspect looks at one picture at a time: first.png")
    open_tab(page, "Edit")
    give(page, "drop", ("first.png", "image/png"), ("second.png", "image/png"))
    expect(told(page)).to_contain_text("Edit takes one picture: first.png")


def test_text_is_pasted_where_one_writes(page: Page) -> None:
    prompt(page).focus()
    page.evaluate("""() => {
      const carrier = new DataTransfer();
      carrier.setData('text/plain', 'a fox');
      carrier.items.add(new File(['x'], 'table.png', {type: 'image/png'}));
      const event = new ClipboardEvent('paste', {clipboardData: carrier, bubbles: true, cancelable: true});
      window.left = document.activeElement.dispatchEvent(event);
    }""")
    assert page.evaluate("window.left"), "the browser itself pastes the words"
    expect(page.get_by_role("tab", name="Generate")).to_have_attribute("aria-selected", "true")


def test_the_keyboard_opens_the_file_chooser_of_a_filled_gallery(page: Page, app: App, tmp_path: Path) -> None:
    open_tab(page, "Edit")
    upload(page, "edit", EXAMPLES / "fox.png")
    expect(page.locator("#edit")).to_contain_text("As image 1: 128 x 128 pixels")
    expect(page.locator("#edit .references .upload-container[inert]")).to_be_attached()  # Gradio's markup is mended
    button = page.locator('#edit .references .icon-button[aria-label="Click to Upload"]')
    with page.expect_file_chooser() as chooser:
        button.press("Enter")
    assert not chooser.value.is_multiple()
    chooser.value.set_files(EXAMPLES / "car.png")
    expect(page.locator('#edit .references img[src$="fox.png"]')).to_have_count(0)
    expect(page.locator("#edit .references img")).to_have_attribute("src", re.compile("car.png$"))
    run(page, "edit")
    expect(page.locator("#message .problem")).to_contain_text("Write a prompt first")


def pictures(page: Page) -> list[str]:
    """The file names of the references, in their order."""
    addresses: list[str] = page.locator("#multi .references img").evaluate_all("(all) => all.map((it) => it.src)")
    return [address.rpartition("/")[2] for address in addresses]


def middle(item: Locator) -> tuple[float, float]:
    box = item.bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_references_are_dragged_into_another_order(page: Page) -> None:
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "rocket.png", EXAMPLES / "car.png", EXAMPLES / "fox.png")
    captions = page.locator("#multi .references .caption-label")
    expect(captions).to_have_text(["image 1", "image 2", "image 3"])
    items = page.locator("#multi .references .gallery-item")
    page.mouse.move(*middle(items.nth(2)))
    page.mouse.down()
    page.mouse.move(*middle(items.nth(0)), steps=5)
    page.mouse.up()
    expect(items.first.locator("img")).to_have_attribute("src", re.compile("fox.png$"))
    expect(captions).to_have_text(["image 1", "image 2", "image 3"])
    assert pictures(page) == ["fox.png", "rocket.png", "car.png"]
    expect(page.locator("#multi .references .selected")).to_have_count(0)  # it was no click
    write(page, "multi", "the object of image 1 on the background of image 3")
    run(page, "multi")
    expect(page.locator("#settings tr", has_text="References")).to_contain_text("fox.png, rocket.png, car.png")


def test_a_finger_that_rests_first_drags_and_one_that_does_not_scrolls(browser: Browser, app: App) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(app.url)
    expect(page.locator("#generate .run")).to_be_enabled()
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "rocket.png", EXAMPLES / "car.png", EXAMPLES / "fox.png")
    captions = page.locator("#multi .references .caption-label")
    expect(captions).to_have_text(["image 1", "image 2", "image 3"])
    items = page.locator("#multi .references .gallery-item")
    items.first.scroll_into_view_if_needed()
    fingers = context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})

    start, end = middle(items.nth(0)), middle(items.nth(2))
    touch("touchStart", start)
    touch("touchMove", (start[0], start[1] - 40))
    touch("touchMove", (start[0], start[1] - 80))
    touch("touchEnd")
    page.wait_for_timeout(500)  # as long as it would have had to rest
    expect(page.locator("#multi .gallery-item.dragged")).to_have_count(0)
    assert pictures(page) == ["rocket.png", "car.png", "fox.png"]
    items.first.scroll_into_view_if_needed()
    start, end = middle(items.nth(0)), middle(items.nth(2))
    touch("touchStart", start)
    expect(page.locator("#multi .gallery-item.dragged")).to_have_count(1)
    touch("touchMove", (start[0] + 20, start[1]))
    touch("touchMove", end)
    touch("touchEnd")
    expect(items.nth(2).locator("img")).to_have_attribute("src", re.compile("rocket.png$"))
    assert pictures(page) == ["car.png", "fox.png", "rocket.png"]
    context.close()
