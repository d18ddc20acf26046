"""The tests of *.test.mjs in this folder: scripts of the page, in Chromium, without a studio and without Gradio."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flux2_studio.checkpoints import CHECKPOINTS
from flux2_studio.ui import handlers, inspect_tab
from flux2_studio.ui.forms import reference_panel
from flux2_studio.ui.gradio_compat import shortcuts
from flux2_studio.ui.history import picker
from flux2_studio.ui.history import tab as history_tab
from flux2_studio.ui.stage import compare
from tests.scripts.node import Results, listed_in

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("The tests of the scripts need Chromium: `make chromium` installs it, or put it on the PATH.")
    # The studio's own markup, so that a script is tested with what it finds on the page.
    markup = {
        "history": history_tab.HISTORY_HTML,
        "picker": picker.PICKER_HTML,
        "keys": shortcuts.build_shortcut_help().value,
        "hold": compare.HOLD_HTML,
    }
    # What a press sends along, as the page finds it out: JavaScript that Gradio runs with the event's inputs.
    sends = {
        **{name: getattr(reference_panel, name) for name in ("SELECTED", "CLEARED", "TO_CLEAR")},
        **{name: getattr(reference_panel, name) for name in ("CLEARED_AND_SELECTED", "CLEARED_AND_DRAGGED")},
        "PICKED": handlers.SELECTED_INDEX_JS,
        "SIZES": handlers._sizes(CHECKPOINTS),
        "NOW": inspect_tab.SEND_TIME_JS,
        "ASKED": history_tab.SEND_PICTURE_ID_JS,
    }
    given = {"CHROMIUM": chromium, "MARKUP": json.dumps(markup), "SENDS": json.dumps(sends)}
    yield Results(HERE, given)


@pytest.mark.parametrize("file, name", [pytest.param(*test, id=": ".join(test)) for test in listed_in(HERE)])
def test_script(results: Results, file: str, name: str) -> None:
    results.expect_passed(file, name)
