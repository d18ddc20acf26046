"""What the server answers reaches the page, whatever the order in which its connections bring it."""

from __future__ import annotations

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.steps import preset_button as button
from tests.browser.steps import preset_part as part
from tests.browser.steps import run_for_long
from tests.browser.steps import unfold_presets as unfold
from tests.browser.studio import App, open_studio

# What `slow` names comes late, as it may where connections are slow: the word that a stream of answers ends, which is
# held until `release()`, or the confirmation that something was asked. `streams` are those that are open, `ending`
# those of which the server thinks that they have ended, `joins` how often something was asked.
SLOW = """(() => {
  const fetched = window.fetch;
  Object.assign(window, {streams: 0, ending: 0, joins: 0, slow: ''});
  window.fetch = async (...given) => {
    const streams = String(given[0].url ?? given[0]).includes('/queue/data');
    window.streams += streams;
    const response = await fetched(...given);
    window.joins += response.url.includes('/queue/join');
    const late = window.slow === 'confirmation' && response.url.includes('/queue/join');
    if (late) await new Promise((done) => setTimeout(done, 2000));
    if (!streams) return response;
    const end = 'data: {"msg":"close_stream"';
    const stream = new TransformStream({
      async transform(chunk, controller) {
        controller.enqueue(new TextEncoder().encode(': a proxy says that it is there\\n\\n'));
        const text = new TextDecoder().decode(chunk);
        const at = text.indexOf(end);
        if (at < 0 || window.slow !== 'end') { controller.enqueue(chunk); return; }
        controller.enqueue(new TextEncoder().encode(text.slice(0, at)));
        window.ending += 1;
        await new Promise((done) => { window.release = done; });
        window.ending -= 1;
        controller.enqueue(new TextEncoder().encode(text.slice(at)));
      },
      flush() { window.streams -= 1; },
    });
    return new Response(response.body.pipeThrough(stream), {headers: response.headers});
  };
})();"""


@pytest.fixture
def page(context: BrowserContext, app: App) -> Page:
    opened = context.new_page()
    opened.add_init_script(SLOW)
    open_studio(opened, app.url)
    return opened


def test_what_is_asked_as_a_stream_ends_is_answered(page: Page) -> None:
    unfold(page)
    page.wait_for_function("streams === 0")
    page.evaluate("slow = 'end'")
    button(page, "save").click()  # without a name
    expect(part(page, "told").locator(".problem")).to_be_visible()
    page.wait_for_function("ending === 1")
    page.locator("#generate .preset-name").get_by_label("Name").fill("At the end")
    page.locator("#generate .prompt textarea").fill("a fox")
    asked = page.evaluate("joins")
    button(page, "save").click()
    page.wait_for_function("asked => joins === asked + 1", arg=asked)
    page.evaluate("slow = ''; release()")
    expect(part(page, "told")).to_contain_text("Saved as At the end.")
    assert page.evaluate("joins") == asked + 1, "nothing else was asked that would have brought the answer"


def test_a_page_at_rest_holds_no_stream(page: Page) -> None:
    """A browser has six connections to a studio for all its tabs."""
    page.wait_for_function("streams === 0")
    unfold(page)
    for _ in range(3):
        button(page, "save").click()
        expect(part(page, "told").locator(".problem")).to_be_visible()
        page.wait_for_function("streams === 0")


def test_what_is_answered_before_it_is_confirmed_is_not_waited_for(page: Page) -> None:
    unfold(page)
    run_for_long(page)
    page.evaluate("slow = 'confirmation'")
    button(page, "save").click()
    expect(part(page, "told").locator(".problem")).to_be_visible()
    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped")
    page.wait_for_function("streams === 0")
