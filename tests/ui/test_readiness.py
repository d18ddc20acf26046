"""What stands under the button before a run: whether the request fits into memory."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest
from PIL import Image

from flux2_studio.events import Result
from flux2_studio.images.references import fit_size
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.stages.durations import DurationModel
from flux2_studio.stages.estimates import RunEstimate
from flux2_studio.storage.database import Database
from flux2_studio.studio import Studio
from flux2_studio.ui.forms.readiness import form_estimate_html, wire_estimate
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.gradio_compat.page import StudioBlocks

FORM: dict[str, Any] = {"checkpoint": "nano", "width": 128, "height": 128, "count": 1, "guidance": 1.0}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def test_a_request_that_fits_says_how(settings: Settings) -> None:
    plenty, scarce = (
        form_estimate_html(Studio(settings), **FORM),
        form_estimate_html(Studio(replace(settings, memory_limit_gb=0.062)), **FORM),
    )
    assert plenty.startswith("<p>Fits: ") and "everything stays" in plenty
    assert "the text encoder leaves" in scarce and "of 0.06 GB" in scarce


def test_one_that_does_not_names_the_nearest_that_would(settings: Settings) -> None:
    studio = Studio(replace(settings, memory_limit_gb=0.062))
    told = form_estimate_html(studio, **{**FORM, "width": 512, "height": 512})
    assert 'class="problem"' in told and "512 x 512 needs about" in told
    width, height = (int(side) for side in told.split(" would fit")[0].rpartition(". ")[2].split(" x "))
    assert "Fits" in form_estimate_html(studio, **{**FORM, "width": width, "height": height})


def test_everything_that_takes_memory_is_asked_about(settings: Settings, tmp_path: Path) -> None:
    class Listening(Studio):
        def estimate_run(self, request: Request, references: Sequence[tuple[int, int]] = ()) -> RunEstimate:
            asked.append((request, references))
            return super().estimate_run(replace(request, loras=()), references)

    asked: list[tuple[Request, Sequence[tuple[int, int]]]] = []
    file = tmp_path / "picture.png"
    Image.new("RGB", (600, 300), "teal").save(file)
    values = {**FORM, "checkpoint": "nano-base", "guidance": 3.0, "count": 2, "width": None, "height": None}
    values["steps"] = 30
    told = form_estimate_html(
        Listening(settings), **values, references=[(str(file), None)], loras=[{"name": "ink", "weight": 1}]
    )
    ((request, references),) = asked
    assert "276 image tokens + 276 of the reference · 30 steps, each computed for two prompts · 2 pictures" in told
    assert (request.checkpoint, request.guidance, request.count) == ("nano-base", 3.0, 2)
    assert [choice.name for choice in request.loras] == ["ink"]
    assert references == [fit_size((600, 300), 256 * 256)], "as large as the run will read it"
    form_estimate_html(Listening(settings), **{**FORM, "guidance": 3.0, "steps": 30})
    last = asked[-1][0]
    assert last.guidance is None and last.steps is None, "what the checkpoint fixes was laid out for another one"


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 8},
        {"width": 4096, "height": 4096},
        {"checkpoint": "unknown"},
        {"references": [("nowhere.png", None)]},
        {"loras": [{"name": "unknown", "weight": 1}]},
        {"loras": "rubbish"},
        {"count": 99},
    ],
)
def test_what_cannot_be_run_is_left_to_the_run_to_tell(settings: Settings, changes: dict[str, Any]) -> None:
    assert form_estimate_html(Studio(settings), **{**FORM, **changes}) == ""


def test_of_a_checkpoint_that_is_not_here_only_the_size_is_told(settings: Settings, tmp_path: Path) -> None:
    models = ModelManager(settings, Hub(settings, cache=tmp_path / "empty"))
    told = form_estimate_html(Studio(settings, models), **{**FORM, "checkpoint": "klein-4b"})
    assert "Fits" not in told and "64 image tokens · 4 steps · 1 picture" in told
    assert "The first run will tell how long it takes. Before that: the download, loading the checkpoint." in told


def test_how_long_it_takes_is_learnt_from_a_run(settings: Settings) -> None:
    studio = Studio(settings, durations=DurationModel(Database(settings.database)))
    before = form_estimate_html(studio, **FORM)
    assert "The first run will tell how long it takes. Before that: loading the checkpoint." in before
    assert isinstance(list(studio.generate(Request(prompt="a fox", seed=1)))[-1], Result)
    after = form_estimate_html(studio, **FORM)
    assert re.search(r"<br>About [\d.]+ s, as runs on this machine go\.</p>", after)
    assert form_estimate_html(studio, **{**FORM, "width": 512, "height": 512}) != after
    assert "Before that: enhancing the prompt." in form_estimate_html(studio, **FORM, upsample_by="local")
    assert "The first run will tell" in form_estimate_html(studio, **{**FORM, "checkpoint": "nano-base"}), (
        "it never ran"
    )


def test_forms_that_wait_for_a_checkpoint_leave_threads_for_everybody_else(settings: Settings) -> None:
    reading = threading.Event()

    class Reading(Studio):
        def estimate_run(self, request: Request, references: Sequence[tuple[int, int]] = ()) -> RunEstimate:
            reading.wait(300)
            return super().estimate_run(request, references)

    async def others_are_answered() -> int:
        looks = [asyncio.create_task(tell(**FORM)) for tell in tells]
        try:
            return await asyncio.wait_for(asyncio.to_thread(lambda: 1 + 1), 60)
        finally:
            reading.set()
            assert all("Fits" in told for told in await asyncio.gather(*looks))

    with StudioBlocks() as page:
        turn = asyncio.Lock()
        chosen = gr.Textbox()
        for _ in range(40):  # more than there are threads
            number = {name: gr.Number() for name in ("width", "height", "count", "guidance")}
            form = SimpleNamespace(
                fields={"checkpoint": chosen, **number},
                upsampling=SimpleNamespace(inputs={"upsample_by": gr.Radio()}),
                estimate=gr.HTML(),
            )
            wire_estimate(Reading(settings), cast("Form", form), [], turn)
    tells = [function.fn for function in page.fns.values() if function.name == "tell"]
    assert len(tells) >= 40
    with ThreadPoolExecutor(1) as thread:  # whatever runs in this one
        assert thread.submit(asyncio.run, others_are_answered()).result() == 2
