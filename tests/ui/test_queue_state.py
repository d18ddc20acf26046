"""What the queue panel asks aside: a word that changes with an owner's queue, and tells strangers nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest
from gradio.routes import App
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from flux2_studio.jobs.queue import JobQueue
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.ui.gradio_compat.page import StudioBlocks
from flux2_studio.ui.gradio_compat.visitors import VISITOR_COOKIE, VisitorCookieMiddleware
from flux2_studio.ui.stage import queue_panel
from tests.scripted_studio import PATIENCE, Gate, ScriptedStudio, four_steps

MINE, YOURS = "m" * 43, "y" * 43
SITE = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[JobQueue, Gate, App]]:
    gate = Gate()
    jobs = JobQueue(ScriptedStudio(gate=gate, quick=four_steps))
    settings = cast(Any, SimpleNamespace(settings=Settings(home=tmp_path)))
    with gr.Blocks() as page:
        gr.Textbox()
    routes = queue_panel.queue_routes(settings, jobs)
    yield (
        jobs,
        gate,
        App.create_app(page, app_kwargs={"middleware": [Middleware(VisitorCookieMiddleware)], "routes": routes}),
    )
    gate.go.set()
    jobs.close()


def test_the_word_changes_with_ones_own_queue_alone(opened: tuple[JobQueue, Gate, App]) -> None:
    jobs, gate, app = opened
    me, you = (TestClient(app, cookies={VISITOR_COOKIE: token}) for token in (MINE, YOURS))

    def word(client: TestClient) -> str:
        answer = client.get("/queue/state", headers=SITE)
        assert answer.status_code == 200 and answer.headers["cache-control"] == "private, no-store"
        return answer.text

    assert word(me) == word(you) == ""
    running = jobs.submit(Request(prompt="gate"), f"browser:{MINE}")
    assert gate.begun.wait(PATIENCE)
    first = word(me)
    assert first and word(me) == first, "nothing happened"
    assert word(you) == ""
    last = jobs.submit(Request(prompt="quick"), f"browser:{MINE}")
    assert word(me) not in ("", first)
    assert "gate" not in first and running.id not in first
    gate.go.set()
    for job in (running, last):
        list(job.events(timeout=PATIENCE))
    assert word(me) == ""


def test_strangers_and_other_sites_get_none(opened: tuple[JobQueue, Gate, App]) -> None:
    *_, app = opened
    assert TestClient(app).get("/queue/state", headers=SITE).status_code == 404
    mine = TestClient(app, cookies={VISITOR_COOKIE: MINE})
    assert mine.get("/queue/state", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_the_state_of_every_event_is_noted_in_one_place() -> None:
    with StudioBlocks() as page:
        title = gr.HTML("title")
        first, second = gr.Textbox(), gr.Textbox()
        first.change(lambda text: text, first, second).then(lambda: "", None, first)
        page.show_status_only_at(title)
    noted = [it["show_progress_on"] for it in page.get_config_file()["dependencies"]]
    assert noted == [[title._id]] * 2
