"""The page in a browser that prefers another language: everything fixed on it, and what a run says."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page

from tests.browser.pages.languages import expect_a_page_and_a_run_in


def test_a_page_and_a_run_in_german(opened_in: Callable[..., Page]) -> None:
    expect_a_page_and_a_run_in(opened_in, "de-DE")
