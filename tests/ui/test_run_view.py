"""What the stage shows of a run that was over, or ended early, before its page looked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

from flux2_studio.checkpoints import NANO
from flux2_studio.events import Failed, Preview, Result, Saved, Stopped
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.jobs.tasks import Job
from flux2_studio.jobs.unfinished import SavedPreview
from flux2_studio.record import Record
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.ui.forms import tabs
from flux2_studio.ui.gradio_compat.language import i18n
from flux2_studio.ui.stage.run_view import RunView


@pytest.fixture
def stage() -> tabs.StagePanel:
    with gr.Blocks():
        return tabs.build_stage()


@pytest.fixture
def panel(tmp_path: Path) -> tabs.UpsamplingPanel:
    with gr.Blocks():
        return tabs._upsampling(Settings(home=tmp_path), with_references=False)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), "teal").save(path)
    return path


def preview(*sketches: str) -> Preview:
    return Preview(step=2, steps=4, images=(), first_index=0, count=1, seconds_left=None, unfinished=sketches)


def test_what_is_compared_with_is_found_when_the_run_is_over(
    stage: tabs.StagePanel, panel: tabs.UpsamplingPanel, picture: Path
) -> None:
    job = Job(Request(prompt="x", references=(picture,)).resolve(NANO, [(64, 64)]), "me")
    job.request = replace(job.request, references=(picture.with_name("gone.png"),))  # the journal's copy, by now
    view = RunView(stage, panel, NANO, PictureCache())
    view.begin(job)
    update = view.update(Result(request=job.request, images=(picture,), seeds=(1,), seconds=1.0))
    assert update[stage.comparison.accordion].visible
    assert update[stage.comparison.original].size == (64, 64)


@pytest.mark.parametrize("end", [Stopped(), Failed(message="the power went")])
@pytest.mark.parametrize(
    "sketches, label", [((), ""), (("a",), i18n("Keep this preview")), (("a", "b"), "Keep these 2 previews")]
)
def test_a_preview_can_be_kept_where_there_is_one(
    stage: tabs.StagePanel,
    panel: tabs.UpsamplingPanel,
    end: Stopped | Failed,
    sketches: tuple[str, ...],
    label: str,
) -> None:
    job = Job(Request(prompt="x").resolve(NANO), "me")
    view = RunView(stage, panel, NANO, PictureCache())
    assert not view.begin(job)[stage.keep_preview].visible
    job.add_event(preview(*sketches))
    job.add_event(end)
    update = view.update(end)
    assert bool(update[stage.keep_preview].visible) is bool(sketches) and update[stage.unfinished_job_id] == job.id
    assert not sketches or update[stage.keep_preview].value == label


def test_a_kept_preview_is_shown_as_what_it_is(
    stage: tabs.StagePanel, panel: tabs.UpsamplingPanel, picture: Path
) -> None:
    request = Request(prompt="as it was enhanced", seed=7).resolve(NANO)
    saved = Saved(index=0, image=picture, seed=7, record=Record(request=request, label="Nano", unfinished=(2, 4)))
    view = RunView(stage, panel, NANO, PictureCache())
    view.begin(Job(replace(request, prompt="x"), "me"))
    update = view.show_kept_previews(SavedPreview(pictures=(saved,), notes=("A <note>.",)))
    assert "Kept an unfinished preview, after step 2 of 4." in update[stage.progress]
    assert "A &lt;note&gt;." in update[stage.notices] and "as it was enhanced" in update[stage.table]
    assert update[stage.result_paths] == [str(picture)] and not update[stage.keep_preview].visible
