"""Nothing on the page moves by itself while a run goes on, and what is touched is large enough for a thumb."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser.steps import expect_finished, open_tab, run, set_count, set_size, settle, write

# Every layout shift from now on, with the elements that moved; those that follow a click or a key are not counted by
# the browser as anybody's fault, but here they are: a run goes on for longer than half a second.
WATCH = """() => {
  window.shifts = [];
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) window.shifts.push({
      value: entry.value,
      moved: entry.sources.map(({node, previousRect: from, currentRect: to}) =>
        `${node?.id || node?.className || node?.nodeName}: ${from.y} -> ${to.y}, ${from.height} -> ${to.height}`),
    });
  }).observe({type: 'layout-shift'});
}"""
LARGEST = 0.05  # of the window's area, times the part of its height by which that moved; up to 0.1 is called good
ON_THE_STAGE = re.compile(r"^(mat|preview|gallery|running|progress|stop)\b|thumbnail|IMG")
SMALL = """(least) => [...document.querySelectorAll('a, button, input, select, textarea, summary, [role=tab]')]
  .filter((it) => it.checkVisibility({opacityProperty: true, visibilityProperty: true}) && !it.closest('[inert]'))
  .map((it) => {
    const label = ['checkbox', 'radio'].includes(it.type) ? it.closest('label') ?? it
      : it.getAttribute('role') === 'combobox' || it.closest('.wrap-inner') ? it.closest('.wrap') ?? it : it;
    const {width, height} = label.getBoundingClientRect();
    return {what: `${it.tagName} ${it.ariaLabel ?? it.innerText ?? ''} ${it.id} ${it.className}`, width, height,
      words: it.tagName === 'A' && getComputedStyle(it).display === 'inline'};
  })
  .filter(({width, height, words}) => width > 0 && height > 0 && !words && (width < least || height < least))
  .map(({what, width, height}) => `${what}: ${Math.round(width)} x ${Math.round(height)}`)"""


@pytest.mark.parametrize("width, height", [(1440, 900), (390, 844)])
def test_nothing_jumps_while_a_run_goes_on(page: Page, width: int, height: int) -> None:
    page.set_viewport_size({"width": width, "height": height})
    write(page, "generate", "a flat fox on a pink background")
    set_size(page, "generate", 256, 256)
    set_count(page, "generate", 4)
    page.locator("#mat").scroll_into_view_if_needed()
    settle(page)
    page.evaluate(WATCH)
    page.evaluate("document.querySelector('#generate .run').click()")  # from where one looks at the mat
    expect(page.locator("#preview img")).to_be_visible()
    expect_finished(page, 4)
    for picture in page.locator("#gallery img").all():
        expect(picture).to_have_js_property("complete", True)
    settle(page)
    shifts: list[dict[str, Any]] = page.evaluate("window.shifts")
    total = sum(shift["value"] for shift in shifts)
    assert not [moved for shift in shifts for moved in shift["moved"] if ON_THE_STAGE.search(moved)]
    assert total <= LARGEST, shifts


def test_a_thumb_hits_what_it_means(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    write(page, "generate", "a fox")
    run(page, "generate")
    expect_finished(page)
    small = {}
    for tab in ("Generate", "Edit", "Multi-reference", "Explore", "History", "Inspect", "Models"):
        open_tab(page, tab)
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        if tab == "History":
            expect(page.locator("#history .tile").first).to_be_visible()
        small[tab] = page.evaluate(SMALL, 24)
    assert not any(small.values()), small
