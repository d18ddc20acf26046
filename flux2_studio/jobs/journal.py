"""The journal of runs: requests, progress and results, written as they happen, so that a killed studio loses none.

A run's references and mask are copied here until the run ends, because uploads are deleted sooner. API keys are never
written: a waiting run that needs one cannot continue in another process, and its owner gets a message.

Several studios may share a database. Each holds a lock while it lives, and a new studio takes over only the runs of
studios whose lock is free.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from flux2_studio.errors import RequestError, SaveError
from flux2_studio.events import Event, Failed, PromptEnhanced, Result, Saved, Stopped, Withheld
from flux2_studio.request import Request, Upsampling
from flux2_studio.storage.database import Database, acquire_file_lock

log = logging.getLogger(__name__)

JournalState = Literal["queued", "running", "done", "stopped", "failed", "interrupted"]
MAX_FINISHED_RUNS = 1000  # ended runs that can still be looked up
HOUR = 3600.0  # seconds
INTERRUPTED_RUN_SECONDS = 30 * 24 * HOUR  # seconds until an interrupted run is deleted, with its references

KEY_LOST = (
    "The studio ended before it was done, and the key that was typed for it is kept nowhere: run it without enhancing, "
    "or start it anew from its form, with the key."
)
INTERRUPTED_MESSAGE = "The studio ended before it was done: run it again."
UNFINISHED_STATES_SQL = "('queued', 'running', 'interrupted')"  # states that still need the references

CREATE_RUNS_TABLE = """
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    studio TEXT NOT NULL,      -- whose queue it is in
    state TEXT NOT NULL,
    place INTEGER NOT NULL,    -- its turn among those that wait
    request TEXT NOT NULL,     -- JSON, resolved
    keyed INTEGER NOT NULL,    -- whether it needs a key that is not written here
    submitted REAL NOT NULL,   -- this and the next two: seconds since 1970
    started REAL,
    ended REAL,
    seconds REAL,              -- that a finished run took
    message TEXT NOT NULL DEFAULT '',
    drawn INTEGER NOT NULL DEFAULT 0,           -- pictures, those that were withheld included
    pictures TEXT NOT NULL DEFAULT '[]',        -- JSON: [path, seed] of each saved one
    upsampled TEXT,                             -- JSON, as the event has it
    provenance TEXT NOT NULL DEFAULT '[]',      -- JSON, as a Result has it
    seen INTEGER NOT NULL DEFAULT 0             -- whether its end was shown to its owner
)
"""
CREATE_RUNS_INDEX = "CREATE INDEX IF NOT EXISTS runs_of_owner ON runs (owner, state)"


@dataclass(frozen=True, kw_only=True)
class JournalEntry:
    """One run in the journal. `pictures` were saved with `seeds`; `drawn` also counts withheld pictures.

    `keyed`: whether the run was submitted with its owner's key. `seen`: whether its end was shown to its owner.
    """

    id: str
    owner: str
    state: JournalState
    request: Request
    keyed: bool
    seconds: float
    message: str
    drawn: int
    pictures: tuple[Path, ...]
    seeds: tuple[int, ...]
    upsampled: PromptEnhanced | None
    provenance: tuple[str, ...]
    seen: bool

    @property
    def needs_key(self) -> bool:
        """Whether its prompt still has to be enhanced with a key that only its owner has."""
        return self.keyed and self.upsampled is None

    @property
    def effective_request(self) -> Request:
        """The request as it is drawn: with the enhanced prompt, if there is one, and no further enhancement."""
        if self.upsampled is not None:
            return replace(self.request, prompt=self.upsampled.prompt, upsampling=Upsampling())
        return self.request

    def remaining_request(self) -> Request:
        """Return a request for the pictures not drawn yet, with the same prompt as the others; without prompt
        enhancement if its key is gone."""
        request = replace(self.request, upsampling=Upsampling()) if self.needs_key else self.effective_request
        if self.drawn < request.count:
            assert request.seed is not None, "a run is resolved before it is written down"
            request = replace(request, seed=request.seed + self.drawn, count=request.count - self.drawn)
        return request

    def final_events(self) -> tuple[Event, ...]:
        """Return how the run ended, as events for a follower. Pictures whose files are gone are left out."""
        existing = [(path, seed) for path, seed in zip(self.pictures, self.seeds, strict=True) if path.is_file()]
        images, seeds = tuple(path for path, _ in existing), tuple(seed for _, seed in existing)
        enhanced: list[Event] = [] if self.upsampled is None else [self.upsampled]
        match self.state:
            case "done" if images:
                result = Result(
                    request=self.effective_request,
                    images=images,
                    seeds=seeds,
                    seconds=self.seconds,
                    provenance=self.provenance,
                )
                return (*enhanced, result)
            case "failed":
                stopped = [Stopped(images=images, seeds=seeds)] if images else []
                return (*enhanced, *stopped, Failed(message=self.message))
            case "stopped":
                return (*enhanced, Stopped(images=images, seeds=seeds))
            case _:
                return ()


class Journal:
    """The runs of all studios that share `database`; `folder` holds copies of their references and the studios' locks.

    now: seconds since 1970. Safe to use from any thread. Every method raises `SaveError` if the database or the folder
    cannot be used. After `close`, or the end of the process, the next studio takes over the runs.
    """

    def __init__(self, database: Database, folder: Path, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._folder = folder
        self._now = now
        self._id = uuid.uuid4().hex
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = acquire_file_lock(self._lock_of(self._id))
        except (OSError, sqlite3.Error) as error:
            raise self._trouble(error) from error
        assert lock is not None, "a new name is nobody else's"
        self._lock = lock
        with database.transaction() as connection:
            connection.execute(CREATE_RUNS_TABLE)
            connection.execute(CREATE_RUNS_INDEX)

    def close(self) -> None:
        self._lock.close()
        with suppress(OSError):
            self._lock_of(self._id).unlink()

    # --- recording --------------------------------------------------------------------------------------------

    def add(self, id_: str, owner: str, request: Request, *, keyed: bool = False) -> Request:
        """Record that `request` (resolved) waits as run `id_`; `keyed`: with its owner's key. Returns the request with
        paths to copies of its references and mask that stay until the run ends."""
        files = self._copy_inputs(id_, [*request.references, *([request.mask] if request.mask else [])])
        count = len(request.references)
        stored = replace(request, references=files[:count], mask=files[count] if request.mask else None)
        with self._database.transaction() as connection:
            (last,) = connection.execute("SELECT coalesce(max(place), 0) FROM runs").fetchone()
            connection.execute(
                "INSERT INTO runs (id, owner, studio, state, place, request, keyed, submitted) "
                "VALUES (?, ?, ?, 'queued', ?, ?, ?, ?)",
                (id_, owner, self._id, last + 1, json.dumps(stored.as_dict()), keyed, self._now()),
            )
        return stored

    def start(self, id_: str) -> None:
        """Record that run `id_` has started."""
        self._set(id_, state="running", started=self._now())

    def record_event(self, id_: str, event: Event) -> None:
        """Record the parts of `event` of run `id_` that must survive a restart."""
        match event:
            case Saved(image=image, seed=seed):
                with self._database.transaction() as connection:
                    connection.execute(
                        "UPDATE runs SET drawn = drawn + 1, ended = ?, "
                        "pictures = json_insert(pictures, '$[#]', json(?)) WHERE id = ?",
                        (self._now(), json.dumps([str(image), seed]), id_),
                    )
            case Withheld():
                with self._database.transaction() as connection:
                    connection.execute("UPDATE runs SET drawn = drawn + 1 WHERE id = ?", (id_,))
            case PromptEnhanced():
                self._set(id_, upsampled=json.dumps(asdict(event)))
            case Result(seconds=seconds, provenance=provenance):
                self._end(id_, "done", seconds=seconds, provenance=json.dumps(provenance))
            case Stopped():
                self._end(id_, "stopped")
            case Failed(message=message):
                self._end(id_, "failed", message=message)
            case _:
                pass

    def reorder(self, ids: Sequence[str]) -> None:
        """Record the order in which a later studio takes the waiting runs `ids`."""
        with self._database.transaction() as connection:
            marks = ", ".join("?" * len(ids))
            rows = connection.execute(f"SELECT place FROM runs WHERE id IN ({marks}) ORDER BY place", ids).fetchall()
            places = [row["place"] for row in rows]
            connection.executemany("UPDATE runs SET place = ? WHERE id = ?", list(zip(places, ids, strict=True)))

    def mark_seen(self, id_: str) -> None:
        """Record that the owner of run `id_` was shown how it ended."""
        self._set(id_, seen=1)

    def discard(self, id_: str) -> None:
        """Delete run `id_` from the journal. The pictures that it saved stay."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM runs WHERE id = ?", (id_,))
        self._delete_inputs(id_)

    def discard_interrupted(self, owner: str) -> None:
        """Delete the interrupted runs of `owner` from the journal. The pictures that they saved stay."""
        for entry in self.interrupted(owner):
            self.discard(entry.id)

    # --- reading ----------------------------------------------------------------------------------------------

    def entry(self, id_: str, owner: str) -> JournalEntry | None:
        """Return run `id_` if it belongs to `owner` and is still in the journal."""
        entries = self._select("WHERE id = ? AND owner = ?", id_, owner)
        return entries[0] if entries else None

    def interrupted(self, owner: str) -> tuple[JournalEntry, ...]:
        """Return the runs of `owner` that an earlier studio did not finish, oldest first."""
        return self._select("WHERE owner = ? AND state = 'interrupted' ORDER BY place", owner)

    def latest_unseen(self, owner: str) -> JournalEntry | None:
        """Return the run of `owner` that was done or failed last, unless its end was shown already."""
        entries = self._select("WHERE owner = ? AND state IN ('done', 'failed') ORDER BY ended DESC LIMIT 1", owner)
        return entries[0] if entries and not entries[0].seen else None

    def _select(self, where: str, *values: str) -> tuple[JournalEntry, ...]:
        with self._database.read_transaction() as connection:
            rows = connection.execute(f"SELECT * FROM runs {where}", values).fetchall()
        entries = []
        for row in rows:
            try:
                entries.append(_entry_from_row(row))
            except RequestError:  # written by another version of the studio
                log.warning("run %s in %s cannot be read, and is left out", row["id"], self._database.path)
        return tuple(entries)

    # --- takeover ---------------------------------------------------------------------------------------------

    def take_over_orphaned(self) -> tuple[JournalEntry, ...]:
        """Take over the runs of studios that have ended; return those that waited, in their order.

        Runs that had started become interrupted, and so do waiting runs that need a key.
        """
        with self._database.transaction() as connection:
            studios = [
                row["studio"]
                for row in connection.execute(
                    "SELECT DISTINCT studio FROM runs WHERE state IN ('queued', 'running') AND studio != ?", (self._id,)
                )
            ]
            now = self._now()
            for studio in filter(self._is_gone, studios):
                # Everything was drawn; only the final event is missing.
                connection.execute(
                    "UPDATE runs SET state = 'done', seconds = ended - started WHERE studio = ? AND "
                    "state = 'running' AND pictures != '[]' AND drawn >= json_extract(request, '$.count')",
                    (studio,),
                )
                connection.execute(
                    "UPDATE runs SET state = 'interrupted', ended = ?, message = ? WHERE studio = ? AND "
                    "state IN ('queued', 'running') AND keyed AND upsampled IS NULL",
                    (now, KEY_LOST, studio),
                )
                connection.execute(
                    "UPDATE runs SET state = 'interrupted', ended = ?, message = ? WHERE studio = ? AND "
                    "state = 'running'",
                    (now, INTERRUPTED_MESSAGE, studio),
                )
                connection.execute(
                    "UPDATE runs SET studio = ? WHERE studio = ? AND state = 'queued'", (self._id, studio)
                )
            connection.execute(
                "DELETE FROM runs WHERE state = 'interrupted' AND ended < ?", (now - INTERRUPTED_RUN_SECONDS,)
            )
            known = {
                row["id"] for row in connection.execute("SELECT id FROM runs WHERE state IN " + UNFINISHED_STATES_SQL)
            }
        self._sweep(known)
        return self._select("WHERE studio = ? AND state = 'queued' ORDER BY place", self._id)

    def _is_gone(self, studio: str) -> bool:
        try:
            if (lock := acquire_file_lock(self._lock_of(studio))) is not None:
                lock.close()
        except sqlite3.Error as error:
            raise self._trouble(error) from error
        return lock is not None

    def _sweep(self, known: AbstractSet[str]) -> None:
        """Delete abandoned locks, and the references of runs that are not in `known`."""
        for path in self._folder.iterdir():
            with suppress(OSError):
                if self._now() - path.stat().st_mtime < HOUR:  # another studio may be just starting
                    continue
                if path.suffix == ".lock" and self._is_gone(path.stem):
                    path.unlink()
                elif path.is_dir() and path.name not in known:
                    shutil.rmtree(path)

    # --- rows and files ---------------------------------------------------------------------------------------

    def _set(self, id_: str, **values: str | float) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._database.transaction() as connection:
            connection.execute(f"UPDATE runs SET {columns} WHERE id = ?", (*values.values(), id_))

    def _end(self, id_: str, state: JournalState, **values: str | float) -> None:
        self._set(id_, state=state, ended=self._now(), **values)
        with self._database.transaction() as connection:
            rows = connection.execute(
                f"SELECT id FROM runs WHERE state NOT IN {UNFINISHED_STATES_SQL} ORDER BY ended DESC LIMIT -1 OFFSET ?",
                (MAX_FINISHED_RUNS,),
            ).fetchall()
            connection.executemany("DELETE FROM runs WHERE id = ?", [(row["id"],) for row in rows])
        self._delete_inputs(id_)

    def _copy_inputs(self, id_: str, files: Sequence[Path]) -> tuple[Path, ...]:
        """Return copies of `files`, with the file names that their owner knows."""
        copies = []
        try:
            for number, path in enumerate(files):
                folder = self._folder / id_ / str(number)
                folder.mkdir(parents=True)
                try:
                    os.link(path, folder / path.name)  # instant and takes no space, if both are on one drive
                except OSError:
                    shutil.copyfile(path, folder / path.name)
                copies.append(folder / path.name)
        except OSError as error:
            self._delete_inputs(id_)
            raise self._trouble(error) from error
        return tuple(copies)

    def _delete_inputs(self, id_: str) -> None:
        # Files that cannot be deleted now, because they are in use, are left to the sweep of a later studio.
        shutil.rmtree(self._folder / id_, ignore_errors=True)

    def _lock_of(self, studio: str) -> Path:
        return self._folder / f"{studio}.lock"

    def _trouble(self, error: Exception) -> SaveError:
        return SaveError(
            f"The folder {self._folder}, where runs wait, cannot be used ({error}): allow writing there and free some "
            f"space, or set FLUX2_HOME to a folder of your own."
        )


def _entry_from_row(row: sqlite3.Row) -> JournalEntry:
    """Read a row. Raises `RequestError` for a run that this version cannot read."""
    pictures = json.loads(row["pictures"])
    return JournalEntry(
        id=row["id"],
        owner=row["owner"],
        state=row["state"],
        request=Request.from_dict(json.loads(row["request"])),
        keyed=bool(row["keyed"]),
        seconds=row["seconds"] or 0.0,
        message=row["message"],
        drawn=row["drawn"],
        pictures=tuple(Path(path) for path, _ in pictures),
        seeds=tuple(seed for _, seed in pictures),
        upsampled=PromptEnhanced(**json.loads(row["upsampled"])) if row["upsampled"] else None,
        provenance=tuple(json.loads(row["provenance"])),
        seen=bool(row["seen"]),
    )
