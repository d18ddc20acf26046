"""How long runs take on this machine, learnt from the runs that it has done, and what that says of the next one.

A run of B batches takes

    once + sum over its batches of (steps * step(batch) + pictures * each)

once: reading prompt and references. step: one denoising step of a batch. each: decoding, checking, marking and saving
one picture. What is loaded or downloaded meanwhile is no part of any of them.

With N tokens in the sequence (prompt, picture and references) and R rows (pictures, twice as many where every step is
computed for two prompts),

    step = a + b * R * N + c * R * N^2        what is done for every token, and attention
    each = a + b * (the picture's tokens)
    once = a + b * (the references' tokens)

The coefficients a, b, c >= 0 minimise the squared relative error over the sizes that were timed. If the requested size
was timed itself, nothing is fitted: the estimate is the mean of its times, where each time weighs half as much as the
next newer one. If only one size was timed, step and each are scaled in proportion to the tokens, and once is kept. If
none was, there is no estimate.

The first batch of a kind in a process, and every batch of a run that had to load weights, may be slower than later ones
("cold"). A cold time is used only while there is no other time of the same size.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from sqlite3 import Row

import numpy as np

from flux2_studio.storage.database import Database

MAX_TIMINGS_PER_FEATURES = 60  # timings kept for each `RunFeatures`
MAX_TIMINGS = 3000  # timings kept in all
TIMING_DECAY = 0.5  # weight of a time, relative to the next newer one of the same size
SIZE_DECAY = 0.8  # weight of a size in the fit, relative to the next newer size

FeatureVector = tuple[float, ...]

CREATE_PACES_TABLE = """
CREATE TABLE IF NOT EXISTS paces (
    id INTEGER PRIMARY KEY,
    device TEXT NOT NULL,
    checkpoint TEXT NOT NULL,
    how TEXT NOT NULL,
    text INTEGER NOT NULL,         -- this and the next two: tokens
    image INTEGER NOT NULL,
    refs INTEGER NOT NULL,
    pictures INTEGER NOT NULL,
    guided INTEGER NOT NULL,
    step REAL NOT NULL,            -- this and the next two: seconds
    each REAL NOT NULL,
    once REAL,
    cold INTEGER NOT NULL
)
"""
CREATE_PACES_INDEX = "CREATE INDEX IF NOT EXISTS paces_of_way ON paces (device, checkpoint, how)"


@dataclass(frozen=True, kw_only=True)
class RunFeatures:
    """What a time is good for: the device, the checkpoint, and how that is computed (precision, placement, ...)."""

    device: str
    checkpoint: str
    how: str


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Pictures that are drawn together. text, image, references: tokens of each. use_cfg: every step for two
    prompts."""

    text: int
    image: int
    references: int = 0
    pictures: int = 1
    use_cfg: bool = False

    @property
    def features(self) -> FeatureVector:
        rows = self.pictures * (2 if self.use_cfg else 1)
        tokens = self.text + self.image + self.references
        return 1.0, float(rows * tokens), float(rows * tokens * tokens)


@dataclass(frozen=True, kw_only=True)
class BatchTiming:
    """How long one batch took. is_cold: the next batch of this kind may be faster.

    step_seconds: for each step. picture_seconds: for each picture after the last step. setup_seconds: before the first
    step; None if a cache was used, or if this was not the first batch of its run.
    """

    batch: BatchShape
    step_seconds: float
    picture_seconds: float
    setup_seconds: float | None = None
    is_cold: bool = False


class DurationModel:
    """Times in the studio's notebook. Safe to use from any thread; raises `SaveError` where that cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._drawn: set[RunFeatures] = set()  # in this process
        self._tables_created = threading.Event()

    def learn(self, features: RunFeatures, timing: BatchTiming) -> None:
        """Remember what a batch took, and forget what is too old to matter."""
        batch, cold = timing.batch, timing.is_cold or features not in self._drawn
        self._drawn.add(features)
        mine = features.device, features.checkpoint, features.how
        with self._database.transaction() as connection:
            connection.execute(CREATE_PACES_TABLE)
            connection.execute(CREATE_PACES_INDEX)
            connection.execute(
                "INSERT INTO paces (device, checkpoint, how, text, image, refs, pictures, guided, step, each, once, "
                "cold) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *mine,
                    batch.text,
                    batch.image,
                    batch.references,
                    batch.pictures,
                    batch.use_cfg,
                    timing.step_seconds,
                    timing.picture_seconds,
                    timing.setup_seconds,
                    cold,
                ),
            )
            connection.execute(
                "DELETE FROM paces WHERE device = ? AND checkpoint = ? AND how = ? AND id NOT IN "
                "(SELECT id FROM paces WHERE device = ? AND checkpoint = ? AND how = ? ORDER BY id DESC LIMIT ?)",
                (*mine, *mine, MAX_TIMINGS_PER_FEATURES),
            )
            connection.execute("DELETE FROM paces WHERE id <= (SELECT max(id) FROM paces) - ?", (MAX_TIMINGS,))
        self._tables_created.set()

    def predict_seconds(self, features: RunFeatures, batches: Sequence[BatchShape], steps: int) -> float | None:
        """How long a run of `batches` will take, each in so many steps; None where nothing like it was ever timed."""
        known = self._load_timings(features)
        if not known:
            return None
        step = [(it.batch.features, it.step_seconds, it.is_cold) for it in known]
        each = [(_of_picture(it.batch), it.picture_seconds, it.is_cold) for it in known]
        once = [
            (_of_references(it.batch), it.setup_seconds, it.is_cold) for it in known if it.setup_seconds is not None
        ]
        total = estimate_seconds(once, _of_references(batches[0]), proportional=False) if once else 0.0
        for batch in batches:
            total += steps * estimate_seconds(step, batch.features)
            total += batch.pictures * estimate_seconds(each, _of_picture(batch))
        return total

    def _load_timings(self, features: RunFeatures) -> list[BatchTiming]:
        """What was timed of `features`, newest first."""
        if not self._tables_created.is_set():
            with self._database.transaction() as connection:
                connection.execute(CREATE_PACES_TABLE)
            self._tables_created.set()
        with self._database.read_transaction() as connection:
            rows = connection.execute(
                "SELECT * FROM paces WHERE device = ? AND checkpoint = ? AND how = ? ORDER BY id DESC",
                (features.device, features.checkpoint, features.how),
            ).fetchall()
        return [_timed(row) for row in rows]


def estimate_seconds(
    known: Sequence[tuple[FeatureVector, float, bool]], asked: FeatureVector, *, proportional: bool = True
) -> float:
    """Return the seconds that a size with the features `asked` will take. See the module docstring for the formula.

    known: (features, seconds, whether the time is cold) of each timing, newest first. The first feature is always 1.
    proportional: if only one size is known, scale its time by the second feature; otherwise return its time unchanged.
    """
    sizes = _by_size(known)
    if asked in sizes:
        return sizes[asked]
    if len(sizes) == 1:
        ((features, seconds),) = sizes.items()
        return seconds * asked[1] / features[1] if proportional else seconds
    return float(np.dot(_fit(list(sizes), list(sizes.values())), asked))


def _by_size(known: Iterable[tuple[FeatureVector, float, bool]]) -> dict[FeatureVector, float]:
    """The seconds of each size, the sizes newest first."""
    times: dict[FeatureVector, list[tuple[float, bool]]] = {}
    for features, seconds, cold in known:
        times.setdefault(features, []).append((seconds, cold))
    found = {}
    for features, all_of_it in times.items():
        warm = [seconds for seconds, cold in all_of_it if not cold] or [seconds for seconds, _ in all_of_it]
        weights = [TIMING_DECAY**age for age in range(len(warm))]
        found[features] = sum(weight * it for weight, it in zip(weights, warm, strict=True)) / sum(weights)
    return found


def _fit(sizes: Sequence[FeatureVector], seconds: Sequence[float]) -> np.ndarray:
    """Fit non-negative coefficients of the features to `seconds`, minimising the squared relative error.

    `sizes` and `seconds` are newest first; newer sizes weigh more. Non-negative least squares is ordinary least squares
    over the best subset of features, and there are few enough subsets to try them all. If two subsets fit equally well,
    which happens with two sizes, the one with the higher powers wins: it predicts more time for larger pictures.
    """
    rows, times = np.array(sizes), np.maximum(np.array(seconds), 1e-9)
    weights = np.sqrt(SIZE_DECAY ** np.arange(len(sizes)))
    scale = rows.max(0)
    scale[scale == 0] = 1.0
    target, matrix = weights, rows / scale / times[:, None] * weights[:, None]
    features = rows.shape[1]
    choices = [
        list(chosen)
        for size in range(1, min(features, len(sizes)) + 1)
        for chosen in itertools.combinations(range(features), size)
    ]
    best, least = np.zeros(features), np.inf
    for chosen in choices:
        found = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
        if (found < 0).any():
            continue
        error = float(((matrix[:, chosen] @ found - target) ** 2).sum())
        if error <= least + 1e-12:
            best, least = np.zeros(features), min(error, least)
            best[chosen] = found / scale[chosen]
    return best


def _of_picture(batch: BatchShape) -> FeatureVector:
    return 1.0, float(batch.image)


def _of_references(batch: BatchShape) -> FeatureVector:
    return 1.0, float(batch.references)


def _timed(row: Row) -> BatchTiming:
    batch = BatchShape(
        text=row["text"],
        image=row["image"],
        references=row["refs"],
        pictures=row["pictures"],
        use_cfg=bool(row["guided"]),
    )
    return BatchTiming(
        batch=batch,
        step_seconds=row["step"],
        picture_seconds=row["each"],
        setup_seconds=row["once"],
        is_cold=bool(row["cold"]),
    )
