"""What the studio learns of its own runs: real ones of nano."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from flux2_studio.errors import SaveError
from flux2_studio.events import Notice, Result
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.stages.durations import BatchShape, BatchTiming, DurationModel, RunFeatures
from flux2_studio.stages.estimates import RunEstimate
from flux2_studio.storage.database import Database
from flux2_studio.studio import Studio

TEXT = 32  # tokens that nano reads of a prompt


class Listening(DurationModel):
    """Hears what it is told, beside writing it down."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.heard: list[tuple[RunFeatures, BatchTiming]] = []

    def learn(self, features: RunFeatures, timing: BatchTiming) -> None:
        self.heard.append((features, timing))
        super().learn(features, timing)


@pytest.fixture
def pace(tmp_path: Path) -> Listening:
    return Listening(Database(tmp_path / "studio.sqlite3"))


@pytest.fixture
def studio(pace: Listening, tmp_path: Path) -> Studio:
    return Studio(Settings(home=tmp_path, device="cpu"), durations=pace)


def drawn(studio: Studio, **fields: object) -> tuple[float, Result]:
    """How long a run took, and its result."""
    began = time.monotonic()
    *_, end = studio.generate(Request(**fields))  # type: ignore[arg-type]
    assert isinstance(end, Result)
    return time.monotonic() - began, end


def outlook(studio: Studio, sizes: Sequence[tuple[int, int]] = (), **fields: object) -> RunEstimate:
    """sizes: of the references."""
    return studio.estimate_run(Request(prompt="any", **fields), sizes)  # type: ignore[arg-type]


def test_a_run_is_learnt_without_its_loading(studio: Studio, pace: Listening) -> None:
    before = outlook(studio)
    assert before.seconds is None and before.is_on_disk and not before.is_loaded
    took, _ = drawn(studio, prompt="a fox", seed=1)
    ((way, first),) = pace.heard
    assert first.is_cold and first.setup_seconds is not None
    assert first.batch == BatchShape(text=TEXT, image=64)
    assert 0 < first.setup_seconds + 4 * first.step_seconds + first.picture_seconds < took
    assert way.checkpoint == "nano" and way.device.startswith("cpu") and "float32" in way.how
    after = outlook(studio)
    assert after.is_loaded and after.seconds == pytest.approx(
        first.setup_seconds + 4 * first.step_seconds + first.picture_seconds
    )
    drawn(studio, prompt="an owl", seed=1)
    _, second = pace.heard[-1]
    assert not second.is_cold and second.setup_seconds is not None
    warm = second.setup_seconds + 4 * second.step_seconds + second.picture_seconds
    assert outlook(studio).seconds == pytest.approx(warm), "nothing is loaded any more: it is the run as it is"


def test_what_was_not_read_again_is_not_learnt_as_reading(studio: Studio, pace: Listening) -> None:
    for seed in (1, 2):
        drawn(studio, prompt="a fox", seed=seed)
    first, second = (timed for _, timed in pace.heard)
    assert first.setup_seconds is not None and second.setup_seconds is None


def test_batches_guidance_and_references_are_told_apart(studio: Studio, pace: Listening, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.new("RGB", (96, 64), "teal").save(file)
    drawn(studio, prompt="make it red", references=(file,), count=2, seed=1)
    assert [timed.batch for _, timed in pace.heard] == [BatchShape(text=TEXT, image=24, references=24, pictures=2)]
    drawn(studio, prompt="a fox", checkpoint="nano-base", steps=2, seed=1)
    assert pace.heard[-1][1].batch == BatchShape(text=TEXT, image=64, use_cfg=True)
    several = outlook(studio, [(96, 64), (128, 128)], references=(file, file), count=3)
    assert (several.tokens, several.reference_tokens, several.pictures) == (24, (24, 64), 3)
    assert several.seconds is not None
    single, many = outlook(studio, count=1).seconds, outlook(studio, count=16).seconds
    assert single is not None and many is not None and many > 4 * single
    guided = outlook(studio, checkpoint="nano-base", steps=20)
    assert guided.use_cfg and guided.seconds is not None
    half = outlook(studio, checkpoint="nano-base", steps=10).seconds
    assert half is not None and half < guided.seconds


def test_a_run_of_several_batches_is_learnt_batch_by_batch(studio: Studio, pace: Listening) -> None:
    """A processor draws as many tokens at once as keep it busy."""
    drawn(studio, prompt="a fox", checkpoint="nano-base", steps=1, width=368, height=368, count=2, seed=1)
    assert [(timed.batch.pictures, timed.setup_seconds is None) for _, timed in pace.heard] == [(1, False), (1, True)]


def test_a_run_does_not_fail_where_nothing_can_be_learnt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full(DurationModel):
        def learn(self, way: RunFeatures, timed: BatchTiming) -> None:
            raise SaveError("no space left")

    studio = Studio(Settings(home=tmp_path, device="cpu"), durations=Full(Database(tmp_path / "studio.sqlite3")))
    with caplog.at_level(logging.ERROR):
        events = list(studio.generate(Request(prompt="a fox", seed=1)))
    assert isinstance(events[-1], Result) and "no space left" in caplog.text
    assert not [event for event in events if isinstance(event, Notice) and "space" in event.text]
