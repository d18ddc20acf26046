"""What the server makes of events about references that come late, twice, or in another order than they were sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from flux2_studio.checkpoints import NANO
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.settings import Settings
from flux2_studio.ui.forms import fields, reference_panel, tabs
from flux2_studio.ui.forms.examples import Examples

Items = list[tuple[str, str | None]]


class Page:
    """One form with references, laid out and wired, and its events as functions."""

    def __init__(self, settings: Settings, layout: Callable[..., tabs.Form]) -> None:
        with gr.Blocks() as self.blocks:
            chosen = fields.checkpoint(settings.checkpoints, "nano")
            with gr.Tabs():
                self.form = layout(chosen, NANO, Examples.load(settings.assets / "examples"), settings)
            assert self.form.reference_panel is not None
            self.panel = self.form.reference_panel
            studio: Any = SimpleNamespace(settings=settings, pictures=PictureCache())
            reference_panel.wire_references(studio, chosen, self.form, self.panel)
        self.gallery = self.form.fields["references"]

    def wired(self, component: Any, event: str) -> Any:
        """What is connected to `event`, besides what waits for nothing."""
        (only,) = [fn for fn in self.blocks.fns.values() if (component._id, event) in fn.targets and fn.queue]
        return only

    def hear(self, component: Any, event: str, *given: Any) -> Any:
        return self.wired(component, event).fn(*given)

    def check(self, sent: str, heard: int, items: Items) -> Any:
        """A look at the pictures that was asked for after `sent` clears, of which the server has heard `heard`."""
        return self.hear(self.gallery, "upload", sent, heard, items, "nano")

    def clear(self, sent: str, heard: int) -> Any:
        return self.hear(self.gallery, "change", sent, heard, "nano")

    def shown(self, update: Any) -> list[str]:
        """The names of the files that are in the gallery after `update`."""
        return [Path(item["image"]["path"]).name for item in update[self.gallery].value or []]


# Laid out once: a page holds nothing of what was done with it.
@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    return {name: Page(settings, getattr(tabs, name)) for name in ("edit", "multi")}


@pytest.fixture(params=["edit", "multi"])
def page(pages: dict[str, Page], request: pytest.FixtureRequest) -> Page:
    return pages[request.param]


@pytest.fixture
def multi(pages: dict[str, Page]) -> Page:
    return pages["multi"]


@pytest.fixture
def items(tmp_path: Path) -> Items:
    files = [tmp_path / f"{name}.png" for name in ("fox", "owl", "car")]
    for file in files:
        Image.new("RGB", (64, 64)).save(file)
    return [(str(file), None) for file in files]


def test_a_clear_empties_the_gallery_once(page: Page) -> None:
    update = page.clear("1", 0)
    assert page.shown(update) == []
    assert update[page.panel.clear_count] == 1
    assert page.clear("1", 1) == gr.skip(), "the same one again"
    assert page.clear("2", 1)[page.panel.clear_count] == 2


@pytest.mark.parametrize("sent", ["", None, "0", "-1", "1.5", "9" * 7, "<b>"])
def test_a_change_that_was_no_clear_changes_nothing(page: Page, sent: Any) -> None:
    assert page.clear(sent, 0) == gr.skip()


def test_pictures_that_were_cleared_while_they_were_checked_stay_away(page: Page, items: Items) -> None:
    assert page.shown(page.check("0", 0, items[:1])) == ["fox.png"]
    assert page.shown(page.clear("1", 0)) == [], "it is heard after the answer, which has filled the gallery again"


def test_pictures_that_were_cleared_before_their_check_is_heard_stay_away(page: Page, items: Items) -> None:
    heard = page.clear("1", 0)[page.panel.clear_count]
    assert page.check("0", heard, items) == gr.skip()
    assert page.shown(page.check("1", heard, items[:1])) == ["fox.png"], "those that came after it stay"


def test_a_clear_that_comes_after_newer_pictures_leaves_them(page: Page, items: Items) -> None:
    heard = page.check("1", 0, items[:1])[page.panel.clear_count]
    assert heard == 1
    assert page.clear("1", heard) == gr.skip()


def test_whatever_was_done_before_a_clear_is_void_after_it(multi: Page, items: Items) -> None:
    tools = multi.panel.tools
    assert tools is not None
    rest: tuple[Any, ...] = ("nano", items, "", "")
    presses = [
        (tools.drag_button, "click", "2,0", ["car.png", "fox.png", "owl.png"]),
        (tools.add, "upload", [items[0][0]], ["fox.png", "owl.png", "car.png", "fox.png"]),
        (tools.earlier, "click", "1", ["owl.png", "fox.png", "car.png"]),
        (tools.later, "click", "1", ["fox.png", "car.png", "owl.png"]),
        (tools.remove, "click", "1", ["fox.png", "car.png"]),
    ]
    for component, event, what, expected in presses:
        update = multi.hear(component, event, "3", 3, what, *rest)
        assert multi.shown(update) == expected
        assert update[multi.panel.clear_count] == 3
        assert multi.hear(component, event, "2", 3, what, *rest) == gr.skip()
    assert multi.hear(tools.drag_button, "click", "3", 3, "0,9", *rest) == gr.skip(), "no move that can be made"


def test_a_press_is_about_the_picture_that_was_selected_then(multi: Page, items: Items) -> None:
    tools = multi.panel.tools
    assert tools is not None
    rest: tuple[Any, ...] = ("nano", items, "", "")
    assert multi.shown(multi.hear(tools.remove, "click", "0", 0, "", *rest)) == ["fox.png", "owl.png", "car.png"]
    earlier = multi.hear(tools.earlier, "click", "0", 0, "2", *rest)
    assert earlier[multi.gallery].selected_index == 1, "it stays selected where it went"


def test_what_is_heard_of_references_is_heard_each_time_and_in_turn(page: Page) -> None:
    """Gradio drops an event that comes while the last of its kind is answered, unless it is told not to."""
    for event in ("upload", "delete", "change"):
        assert page.wired(page.gallery, event).trigger_mode == "multiple"
    presses = [page.wired(page.gallery, "upload"), page.wired(page.gallery, "change")]
    if page.panel.tools is not None:
        tools = page.panel.tools
        presses += [
            page.wired(button, "click") for button in (tools.drag_button, tools.earlier, tools.later, tools.remove)
        ]
        presses.append(page.wired(tools.add, "upload"))
        (chosen,) = [fn for fn in page.blocks.fns.values() if (page.gallery._id, "select") in fn.targets]
        assert chosen.trigger_mode == "multiple", "of two selections the last is the one"
    assert {fn.concurrency_id for fn in presses} == {f"references of {page.form.name}"}
    for fn in presses:
        assert fn.inputs[:2] == [page.panel.client_state, page.panel.clear_count], "what the page's script puts first"
        assert page.panel.clear_count in fn.outputs
