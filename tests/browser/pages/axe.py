"""axe-core, and what it finds on a tab."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from playwright.sync_api import Page

from tests.browser.steps import settle

AXE = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")

GRAVE = ("serious", "critical")

TABS = ("Generate", "Edit", "Multi-reference", "Explore", "History", "Inspect", "Models")

DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}

UNFOLD = """() => [...document.querySelectorAll('#tabs button.label-wrap')]
  .filter((button) => button.offsetParent && button.getAttribute('aria-expanded') !== 'true'
    && !button.classList.contains('open'))
  .map((button) => button.click()).length"""

ASK = """(rules) => axe.run({resultTypes: ['violations'], ...(rules ? {runOnly: {type: 'rule', values: rules}} : {})})
  .then(({violations}) => violations)"""

DARK = "(dark) => document.body.classList.toggle('dark', dark)"


def violations(page: Page, where: str) -> list[str]:
    """What axe-core finds grave on the page as it is now: all of it on a phone in the dark, and on a desk what depends
    on the colours, in the light. Colours do not depend on the screen, and nothing else on the colours."""
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(AXE)
    page.emulate_media(reduced_motion="reduce")  # no colour fades into another while it is measured
    told = []
    for screen, dark, rules in (
        (PHONE, True, None),
        (DESK, False, ["color-contrast"]),
    ):
        page.set_viewport_size(screen)  # type: ignore[arg-type]
        page.evaluate(DARK, dark)
        settle(page)
        found: list[dict[str, Any]] = page.evaluate(ASK, rules)
        told += [
            f"{where}, {screen['width']} pixels, {'dark' if dark else 'light'}: {rule['id']} at {node['target']}: "
            f"{node['html'][:200]}\n{node['failureSummary']}"
            for rule in found
            if rule["impact"] in GRAVE
            for node in rule["nodes"]
        ]
    return told
