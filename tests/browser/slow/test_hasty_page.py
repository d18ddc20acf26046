"""What is done before the server has answered what was done before: seen from a browser to which answers come late."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import APIResponse, BrowserContext, Page, Route, expect

from tests.browser.steps import (
    EXAMPLES,
    expect_finished,
    open_tab,
    press,
    row,
    run,
    run_on,
    set_count,
    settings,
    stop,
    upload,
    write,
)
from tests.browser.studio import App, open_studio

ASKED_AT_ONCE, ASKED_IN_TURN = "**/gradio_api/run/**", "**/gradio_api/queue/join**"
BEFORE_ANY_CLEAR = '{"data":["0",'  # how what is done with references begins

# From `hold()` to `release()` nothing is read of what the server answers in turn, over one of `streams`.
HOLD = """(() => {
  const fetched = window.fetch;
  let free = null;
  window.streams = window.opened = 0;
  window.hold = () => { free = new Promise((done) => { window.release = done; }); };
  window.fetch = async (...given) => {
    const streams = String(given[0].url ?? given[0]).includes('/queue/data');
    window.streams += streams;
    window.opened += streams;
    const response = await fetched(...given);
    if (!streams) return response;
    const held = new TransformStream({
      async transform(chunk, controller) { await free; controller.enqueue(chunk); },
      flush() { window.streams -= 1; },
    });
    return new Response(response.body.pipeThrough(held), {headers: response.headers});
  };
})();"""


class Held:
    """The requests of `page` for `what` that come from now on, until they are let go: those that begin with `data`.
    answered: whether the server has them at once, and only its answer is held."""

    def __init__(self, page: Page, what: str, *, data: str = "", answered: bool = False) -> None:
        self._data = data
        self._answered = answered
        self._held: list[tuple[Route, APIResponse | None]] = []
        self._open = False
        page.route(what, self._take)

    def _take(self, route: Route) -> None:
        if self._open or not (route.request.post_data or "").startswith(self._data):
            route.continue_()
        else:
            self._held.append((route, route.fetch() if self._answered else None))

    def __len__(self) -> int:
        return len(self._held)

    def let_go(self, *, last_first: bool = False) -> None:
        """One after the other."""
        self._open = True
        for route, answer in reversed(self._held) if last_first else self._held:
            route.fulfill(response=answer or route.fetch())


@pytest.fixture
def page(context: BrowserContext, app: App) -> Page:
    opened = context.new_page()
    opened.add_init_script(HOLD)
    open_studio(opened, app.url)
    return opened


def test_a_look_at_the_queue_while_another_is_under_way(page: Page, open_page: Callable[[], Page]) -> None:
    other = open_page()
    page.evaluate("""() => {
      const fetched = window.fetch;
      window.fetch = async (...given) => {
        const answer = await fetched(...given);
        if (String(given[0]).endsWith('queue/state')) window.state = await answer.clone().text();
        return answer;
      };
    }""")
    looks = Held(page, ASKED_AT_ONCE, answered=True)
    run_on(other)
    while not looks:
        page.wait_for_timeout(100)
    stop(other)
    page.wait_for_function("window.state === ''")  # the page has seen that there is nothing any more
    looks.let_go()
    expect(page.locator("#queue")).to_be_hidden()


def test_pictures_that_are_added_while_others_are_checked_stay(page: Page) -> None:
    open_tab(page, "Multi-reference")
    pictures = page.locator("#multi .references .thumbnail-item")
    page.evaluate("hold()")
    upload(page, "multi", EXAMPLES / "rocket.png")
    expect(pictures).to_have_count(1)
    upload(page, "multi", EXAMPLES / "car.png")
    expect(pictures).to_have_count(2)
    page.evaluate("release()")
    expect(page.locator("#multi .references .caption-label")).to_have_text(["image 1", "image 2"])


def test_pictures_that_are_cleared_while_they_are_checked_stay_away(page: Page, tmp_path: Path) -> None:
    large = [tmp_path / f"large-{number}.jpg" for number in range(6)]
    for number, file in enumerate(large):  # the check takes its time
        Image.new("RGB", (5000, 4000), (number * 40, 90, 150)).save(file)
    open_tab(page, "Multi-reference")
    references = page.locator("#multi .references")
    upload(page, "multi", *large)
    references.get_by_role("button", name="Clear").click()
    page.wait_for_function("streams === 0")  # all is answered
    expect(page.locator("#multi")).not_to_contain_text("As image 1:")
    expect(references.locator(".thumbnail-item")).to_have_count(0)


@pytest.mark.parametrize("form, tab", [("edit", "Edit"), ("multi", "Multi-reference")])
def test_pictures_that_are_cleared_before_their_check_was_asked_for_stay_away(page: Page, form: str, tab: str) -> None:
    open_tab(page, tab)
    references = page.locator(f"#{form} .references")
    asked = Held(page, ASKED_IN_TURN, data=BEFORE_ANY_CLEAR)
    upload(page, form, EXAMPLES / "rocket.png")
    references.get_by_role("button", name="Clear").click()
    while not asked:
        page.wait_for_timeout(100)
    page.wait_for_timeout(2000)
    page.wait_for_function("streams === 0")  # all else is answered
    answer_at_last(page, asked)
    expect(references.locator(".thumbnail-item")).to_have_count(0)
    upload(page, form, EXAMPLES / "car.png")  # which nothing clears
    expect(references.locator(".thumbnail-item")).to_have_count(1)
    expect(page.locator(f"#{form}")).to_contain_text("As image 1:")
    references.get_by_role("button", name="Clear").click()
    expect(page.locator(f"#{form}")).not_to_contain_text("As image 1:")
    expect(references.locator(".thumbnail-item")).to_have_count(0)


def test_pictures_that_are_cleared_before_others_were_added_stay_away(page: Page) -> None:
    open_tab(page, "Multi-reference")
    references = page.locator("#multi .references")
    upload(page, "multi", EXAMPLES / "rocket.png")
    expect(page.locator("#multi")).to_contain_text("As image 1:")
    asked = Held(page, ASKED_IN_TURN, data=BEFORE_ANY_CLEAR)
    page.locator("#multi .tools input[type=file]").set_input_files(EXAMPLES / "car.png")
    while not asked:
        page.wait_for_timeout(100)
    references.get_by_role("button", name="Clear").click()
    expect(page.locator("#multi")).not_to_contain_text("As image 1:")  # that was heard
    answer_at_last(page, asked)
    expect(references.locator(".thumbnail-item")).to_have_count(0)


def answer_at_last(page: Page, asked: Held) -> None:
    before = page.evaluate("opened")
    asked.let_go()
    page.wait_for_function(f"opened > {before} && streams === 0")  # it is answered
    page.wait_for_timeout(4000)  # and shown


def test_the_name_is_that_of_the_picture_which_was_selected_last(page: Page) -> None:
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "rocket.png", EXAMPLES / "car.png", EXAMPLES / "fox.png")
    pictures, captions = (page.locator(f"#multi .references .{part}") for part in ("thumbnail-item", "caption-label"))
    expect(captions).to_have_count(3)
    name = page.locator("#multi .name input, #multi .name textarea")
    for number, called in enumerate(("rocket", "car")):
        pictures.nth(number).click()
        expect(name).to_have_value("")
        expect(name).to_be_editable()
        name.fill(called)
        name.press("Enter")
        expect(captions.nth(number)).to_contain_text(called)
    pictures.nth(2).click()
    expect(name).to_have_value("")
    asked = Held(page, ASKED_AT_ONCE)
    pictures.nth(0).click()
    pictures.nth(1).click()
    asked.let_go()
    expect(name).to_have_value("car")


def test_of_two_pictures_to_inspect_the_later_is_told_of(page: Page) -> None:
    open_tab(page, "Inspect")
    field, pictures = page.locator("#inspect input[type=file]"), page.locator("#inspect .references .thumbnail-item")
    expect(page.locator("#inspect-findings")).to_be_visible()
    page.evaluate("hold()")
    for number, file in enumerate(("rocket.png", "car.png"), 1):
        field.set_input_files(EXAMPLES / file)
        expect(pictures).to_have_count(number)
    page.evaluate("release()")
    sha256 = hashlib.sha256((EXAMPLES / "car.png").read_bytes()).hexdigest()
    expect(page.locator("#inspect-report")).to_contain_text(sha256)
    expect(pictures).to_have_count(1)


def test_a_run_at_once_has_the_shape_that_was_chosen(page: Page) -> None:
    write(page, "generate", "a whale")
    asked = Held(page, ASKED_AT_ONCE)
    page.locator("#generate").get_by_text("16:9", exact=True).click()
    run(page, "generate")
    expect_finished(page)
    assert settings(page)["Size"] == "176 x 96"
    assert asked
    asked.let_go()


def test_the_picture_that_was_picked_is_edited_and_offered(page: Page, app: App) -> None:
    write(page, "generate", "a frog")
    set_count(page, "generate", 3)
    run(page, "generate")
    expect_finished(page, 3)
    page.evaluate("hold()")
    page.locator("#gallery .thumbnail-lg").nth(0).click()
    page.locator("#gallery .thumbnail-small").nth(1).click()
    page.evaluate("release()")
    expect(page.locator("#download")).to_have_text("Download picture 2 of 3")
    asked = Held(page, ASKED_IN_TURN)
    page.locator("#gallery .thumbnail-small").nth(2).click()
    page.locator("#use-in-edit").click()
    while len(asked) < 2:
        page.wait_for_timeout(100)
    asked.let_go(last_first=True)  # what was picked is told after the press
    picture = page.locator("#edit .references .thumbnail-item img")
    expect(picture).to_have_attribute("src", re.compile(re.escape(app.pictures()[-1].name) + "$"))


def test_stop_means_the_run_that_is_seen(page: Page, open_page: Callable[[], Page]) -> None:
    run_on(page)
    write(page, "generate", "a lemon")
    run(page, "generate")
    expect(row(page, "a lemon")).to_have_count(1)
    other = open_page()
    page.evaluate("hold()")
    press(other, "a 3D owl", "Take this run off the queue")
    expect(other.locator("#queue li.running")).to_contain_text("a lemon")
    page.wait_for_timeout(1500)  # the server has told of it, in vain
    with page.expect_response(ASKED_AT_ONCE):
        page.locator("#stop").click()
    page.evaluate("release()")
    expect(page.locator("#queue li")).to_have_count(1)
    expect(page.locator("#progress")).to_contain_text("Step")
    stop(page)  # which is there for the lemon
    expect(page.locator("#queue")).to_be_hidden()
