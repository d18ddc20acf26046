"""How long runs will take, by what others took: the fit on times of a known law, and what is remembered."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from flux2_studio.errors import SaveError
from flux2_studio.stages.durations import (
    MAX_TIMINGS_PER_FEATURES,
    BatchShape,
    BatchTiming,
    DurationModel,
    FeatureVector,
    RunFeatures,
    estimate_seconds,
)
from flux2_studio.storage.database import Database

WAY = RunFeatures(device="a card", checkpoint="klein-4b", how="bfloat16")
TEXT = 512


def batch(image: int, pictures: int = 1, references: int = 0, guided: bool = False) -> BatchShape:
    return BatchShape(text=TEXT, image=image, references=references, pictures=pictures, use_cfg=guided)


def law(it: BatchShape) -> float:
    """Seconds of a step on a device that does as it is told."""
    rows, tokens = it.pictures * (1 + it.use_cfg), TEXT + it.image + it.references
    return 0.02 + 3e-5 * rows * tokens + 8e-9 * rows * tokens**2


def timed(it: BatchShape, times: float = 1.0, once: float | None = 0.4, cold: bool = False) -> BatchTiming:
    """What `it` takes by the law, or `times` as long."""
    return BatchTiming(
        batch=it,
        step_seconds=times * law(it),
        picture_seconds=times * it.image * 1e-4,
        setup_seconds=once,
        is_cold=cold,
    )


def run(batches: Sequence[BatchShape], steps: int, once: float = 0.4) -> float:
    return once + sum(steps * law(it) + it.pictures * it.image * 1e-4 for it in batches)


@pytest.fixture
def pace(tmp_path: Path) -> DurationModel:
    made = DurationModel(Database(tmp_path / "studio.sqlite3"))
    made.learn(RunFeatures(device="a card", checkpoint="other", how="bfloat16"), timed(batch(64)))
    made.learn(WAY, timed(batch(64), cold=True))  # the first one, which is slower, is not what the tests look at
    made.learn(WAY, timed(batch(64)))
    return made


def test_without_a_run_nothing_is_said(tmp_path: Path) -> None:
    new = DurationModel(Database(tmp_path / "studio.sqlite3"))
    assert new.predict_seconds(WAY, [batch(1024)], 4) is None
    new.learn(WAY, timed(batch(1024)))
    assert (
        new.predict_seconds(RunFeatures(device="a card", checkpoint="klein-9b", how="bfloat16"), [batch(1024)], 4)
        is None
    )
    assert (
        new.predict_seconds(RunFeatures(device="another", checkpoint="klein-4b", how="bfloat16"), [batch(1024)], 4)
        is None
    )
    assert new.predict_seconds(WAY, [batch(1024)], 4) is not None


def test_a_known_size_takes_what_it_took(pace: DurationModel) -> None:
    pace.learn(WAY, timed(batch(1024)))
    for steps in (4, 50):
        assert pace.predict_seconds(WAY, [batch(1024)], steps) == pytest.approx(run([batch(1024)], steps))


def test_the_newest_time_counts_most(pace: DurationModel) -> None:
    for _ in range(5):
        pace.learn(WAY, timed(batch(1024)))
    pace.learn(WAY, timed(batch(1024), times=3.0))  # another program came in between
    once = run([batch(1024)], 4)
    seconds = pace.predict_seconds(WAY, [batch(1024)], 4)
    assert seconds is not None and 1.5 * once < seconds < 2.5 * once
    for _ in range(3):
        pace.learn(WAY, timed(batch(1024)))
    seconds = pace.predict_seconds(WAY, [batch(1024)], 4)
    assert seconds is not None and seconds < 1.3 * once, "and it is soon forgotten"


def test_a_slow_first_time_counts_until_there_is_another(tmp_path: Path) -> None:
    pace = DurationModel(Database(tmp_path / "studio.sqlite3"))
    pace.learn(WAY, timed(batch(1024), times=5.0))  # the first of its process
    cold = pace.predict_seconds(WAY, [batch(1024)], 4)
    pace.learn(WAY, timed(batch(1024), times=7.0, cold=True))  # loaded once more
    pace.learn(WAY, timed(batch(1024)))
    assert cold == pytest.approx(0.4 + 5 * (run([batch(1024)], 4) - 0.4))
    assert pace.predict_seconds(WAY, [batch(1024)], 4) == pytest.approx(run([batch(1024)], 4))
    again = DurationModel(Database(tmp_path / "studio.sqlite3"))
    again.learn(WAY, timed(batch(1024), times=5.0))  # of a new process
    assert again.predict_seconds(WAY, [batch(1024)], 4) == pytest.approx(run([batch(1024)], 4))


@pytest.mark.parametrize(
    "asked",
    [
        [batch(2304)],
        [batch(16384)],
        [batch(256)],
        [batch(4096, pictures=2, guided=True)],
        [batch(1024, pictures=3), batch(1024, pictures=1)],
        [batch(1024, references=8192)],
    ],
)
def test_an_unseen_size_follows_the_law_of_the_known_ones(pace: DurationModel, asked: list[BatchShape]) -> None:
    for known in (batch(1024), batch(4096), batch(1024, guided=True), batch(1024, references=1024)):
        pace.learn(WAY, timed(known, once=0.4 + known.references * 1e-4))
    once = 0.4 + asked[0].references * 1e-4
    assert pace.predict_seconds(WAY, asked, 20) == pytest.approx(run(asked, 20, once), rel=1e-3)


def test_noise_is_no_law(pace: DurationModel) -> None:
    """Times that vary by a tenth give an estimate that is hardly further off, even at four times the size."""
    for size, times in ((256, 1.1), (1024, 0.9), (1024, 1.0), (2304, 1.1), (4096, 0.95), (256, 0.95)):
        pace.learn(WAY, timed(batch(size), times))
    assert pace.predict_seconds(WAY, [batch(16384)], 20) == pytest.approx(run([batch(16384)], 20), rel=0.3)


def test_one_known_size_is_scaled_by_its_tokens(tmp_path: Path) -> None:
    pace = DurationModel(Database(tmp_path / "studio.sqlite3"))
    pace.learn(WAY, BatchTiming(batch=batch(512), step_seconds=1.0, picture_seconds=0.1, setup_seconds=0.4))
    assert pace.predict_seconds(WAY, [batch(512 + 1024)], 10) == pytest.approx(0.4 + 10 * 2.0 + 0.3)
    assert pace.predict_seconds(WAY, [batch(512, pictures=2)], 10) == pytest.approx(0.4 + 10 * 2.0 + 2 * 0.1)
    assert pace.predict_seconds(WAY, [batch(512, guided=True)], 10) == pytest.approx(0.4 + 10 * 2.0 + 0.1)


def test_a_larger_picture_never_takes_less(pace: DurationModel) -> None:
    """Whatever was measured, smaller sizes slower than larger ones too."""
    for size, times in ((4096, 0.2), (1024, 9.0), (256, 2.0)):
        pace.learn(WAY, timed(batch(size), times))
    told = [pace.predict_seconds(WAY, [batch(size)], 20) or 0.0 for size in (300, 500, 900, 1500, 3000, 5000, 9000)]
    assert told == sorted(told) and told[0] > 0


def test_what_was_remembered_is_no_time_for_the_next_prompt(pace: DurationModel) -> None:
    pace.learn(WAY, timed(batch(1024), once=0.4))
    pace.learn(WAY, timed(batch(1024), once=None))
    assert pace.predict_seconds(WAY, [batch(1024)], 4) == pytest.approx(run([batch(1024)], 4))


def test_what_is_kept_is_bounded(pace: DurationModel, tmp_path: Path) -> None:
    for number in range(MAX_TIMINGS_PER_FEATURES + 20):
        pace.learn(WAY, timed(batch(64 + number)))
    with sqlite3.connect(tmp_path / "studio.sqlite3") as connection:
        rows = connection.execute("SELECT checkpoint, count(*) FROM paces GROUP BY checkpoint ORDER BY 1").fetchall()
        (oldest,) = connection.execute("SELECT min(image) FROM paces WHERE checkpoint = 'klein-4b'").fetchone()
    assert rows == [("klein-4b", MAX_TIMINGS_PER_FEATURES), ("other", 1)] and oldest == 64 + 20


def test_a_notebook_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "studio.sqlite3").write_bytes(b"rubbish " * 1000)
    with pytest.raises(SaveError):
        DurationModel(Database(tmp_path / "studio.sqlite3")).learn(WAY, timed(batch(64)))


@pytest.mark.parametrize("growing, seconds", [(True, 6.0), (False, 2.0)])
def test_a_single_size(growing: bool, seconds: float) -> None:
    known: list[tuple[FeatureVector, float, bool]] = [((1.0, 100.0), 2.0, False)]
    assert estimate_seconds(known, (1.0, 300.0), proportional=growing) == pytest.approx(seconds)
