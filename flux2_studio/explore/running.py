"""Running explorations: one cell after another through the job queue, so that runs of others come in between.

The state is written after every cell. A stopped exploration resumes when its owner asks for it; one whose studio ended
resumes in the next studio. Several studios may share a folder: the one that runs an exploration holds its lock.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from flux2_studio.errors import RequestError, SaveError, StudioError
from flux2_studio.events import Failed, Saved
from flux2_studio.explore.plan import Cell, ExplorationPlan
from flux2_studio.files.atomic import atomic_write
from flux2_studio.images.contact_sheet import SheetLayout, draw_sheet
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.jobs.tasks import Job
from flux2_studio.request import Request
from flux2_studio.storage.database import acquire_file_lock

log = logging.getLogger(__name__)

ExplorationState = Literal["running", "stopped", "done"]
CELL_THUMBNAIL_PIXELS = 320  # pixels along the longer side
MAX_EXPLORATIONS_PER_OWNER = 20  # explorations kept for one owner
ABANDONED_AFTER_SECONDS = 30 * 24 * 3600  # since the owner's last visit; the pictures stay
MAX_CONSECUTIVE_FAILURES = 3  # then the remaining cells are not tried
FILE_FORMAT_VERSION = 1


@dataclass
class ExplorationProgress:
    """The progress of an exploration. `done` (the picture's file) and `failed` (the error message) are by the cell's
    number in `plan.cells`. `version` rises with every change."""

    state: ExplorationState = "running"
    done: dict[int, Path] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    version: int = 0


class Exploration:
    """One exploration of `owner`. Safe to read from any thread."""

    def __init__(
        self,
        id_: str,
        owner: str,
        plan: ExplorationPlan,
        folder: Path,
        progress: ExplorationProgress | None = None,
        started_at: float | None = None,
    ) -> None:
        self.id = id_
        self.started_at = time.time() if started_at is None else started_at
        self.owner = owner
        self.plan = plan
        self.folder = folder  # for thumbnails and sheets
        self.progress = progress or ExplorationProgress()
        self.stop_requested = threading.Event()
        self.current_cell = 0  # number of the running cell
        self.current_job: Job | None = None  # and its job
        self.was_running = False  # whether it was running when its studio ended
        self.interrupted_cell: tuple[int, str] | None = None  # (cell, job id) that ran then

    def thumbnail(self, number: int) -> Path:
        """Return the path of cell `number`'s thumbnail, which exists once the cell is done."""
        return self.folder / f"{number}.webp"

    @property
    def remaining_cells(self) -> list[int]:
        """The numbers of the cells not done yet, in order."""
        return [number for number in range(len(self.plan.cells)) if number not in self.progress.done]

    def sheet(self, table: int) -> Image.Image:
        """Draw the contact sheet of one table with the pictures so far. Missing files leave blank cells."""
        pictures = {}
        for number, path in list(self.progress.done.items()):
            cell = self.plan.cells[number]
            if cell.table == table:
                try:
                    with Image.open(path) as file:
                        file.draft("RGB", (512, 512))
                        pictures[cell.column, cell.row] = file.convert("RGB")
                except OSError:
                    continue
        return draw_sheet(self.layout(table), pictures)

    def layout(self, table: int) -> SheetLayout:
        plan = self.plan
        columns = 1 + max(cell.column for cell in plan.cells)
        rows = 1 + max(cell.row for cell in plan.cells)
        listed = not plan.rows and rows > 1  # each picture has its own label
        title = f"{plan.titles[2]}: {plan.tables[table]}" if plan.tables else ""
        return SheetLayout(
            columns=columns,
            rows=rows,
            title=title,
            column_labels=() if listed else plan.columns,
            row_labels=plan.rows,
            captions=plan.columns if listed else (),
        )


class ExplorationManager:
    """All explorations of this studio.

    state_folder: for the state files, which are private. pictures_folder: for thumbnails and sheets, which the page
    serves to anyone who knows their names.
    """

    def __init__(self, jobs: JobQueue, state_folder: Path, pictures_folder: Path) -> None:
        self._jobs = jobs
        self._notebooks = state_folder
        self._pictures = pictures_folder
        self._known: dict[str, Exploration] = {}
        self._owners: dict[str, tuple[str, float]] = {}  # exploration id -> (owner, start time)
        self._locks: dict[str, sqlite3.Connection] = {}
        self._lock = threading.Lock()

    def start(self, plan: ExplorationPlan, owner: str) -> Exploration:
        """Start `plan`. Raises `RequestError` while another exploration of `owner` runs, and `SaveError` if nothing can
        be written."""
        with self._lock:
            self._check_none_running(owner)
            id_ = secrets.token_hex(16)
            exploration = Exploration(id_, owner, plan, self._pictures / id_)
            try:
                exploration.folder.mkdir(parents=True)
                self._notebooks.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SaveError(
                    f"{error.filename} cannot be made ({error.strerror}): allow writing there, or set FLUX2_HOME to a "
                    f"folder of your own."
                ) from error
            self._write(exploration)
            self._forget_old(owner)
            self._hold(exploration)
            self._begin(exploration)
        return exploration

    def resume_interrupted(self) -> None:
        """Resume the explorations that ran when their studio ended, and delete abandoned ones.

        Call this once at startup, after the queue has restored its waiting runs.
        """
        with self._lock:
            self._delete_abandoned()
            for path in sorted(self._notebooks.glob("*.json")):
                if (
                    path.stem in self._known
                    or (exploration := self._read(path.stem)) is None
                    or not exploration.was_running
                ):
                    continue
                try:
                    locked = self._hold(exploration)
                except SaveError as error:
                    log.error("the exploration %s cannot go on by itself: %s", path.stem, error)
                    continue
                if locked:
                    exploration.progress.failed.clear()
                    self._begin(exploration)

    def resume(self, id_: str, owner: str) -> Exploration:
        """Run the remaining cells of a stopped exploration. Raises `RequestError`."""
        with self._lock:
            exploration = self._lookup(id_, owner)
            if exploration is None:
                raise RequestError("That exploration is gone: start it again.")
            if exploration.progress.state == "running":
                return exploration
            self._check_none_running(owner)
            if not self._hold(exploration):
                raise RequestError("Another studio on this machine is at this exploration: look for it there.")
            exploration.progress.failed.clear()
            exploration.stop_requested.clear()
            self._begin(exploration)
        return exploration

    def get(self, id_: str, owner: str) -> Exploration | None:
        """Return the exploration with this id if it belongs to `owner`."""
        with self._lock:
            return self._lookup(id_, owner)

    def latest(self, owner: str) -> Exploration | None:
        """Return the exploration that `owner` started last."""
        with self._lock:
            files = self._state_files(owner)
            for path in files:
                with suppress(OSError):
                    os.utime(path)  # the owner's last visit, see `_delete_abandoned`
            return self._lookup(files[-1].stem, owner) if files else None

    def stop(self, exploration: Exploration) -> None:
        """Stop after the current step. Finished cells are kept."""
        exploration.stop_requested.set()
        if (job := exploration.current_job) is not None:
            job.cancel()

    # --- callers hold self._lock -------------------------------------------------------------------------------

    def _check_none_running(self, owner: str) -> None:
        if any(it.owner == owner and it.progress.state == "running" for it in self._known.values()):
            raise RequestError("An exploration of yours is under way: stop it first, or wait for its end.")

    def _begin(self, exploration: Exploration) -> None:
        exploration.progress.state = "running"
        exploration.progress.version += 1
        self._known[exploration.id] = exploration
        threading.Thread(target=self._run, args=(exploration,), name="flux2-exploring", daemon=True).start()

    def _lookup(self, id_: str, owner: str) -> Exploration | None:
        if not re.fullmatch("[0-9a-f]{32}", id_):
            return None
        if id_ not in self._known:
            exploration = self._read(id_)
            if exploration is None:
                return None
            self._known[id_] = exploration
        found = self._known[id_]
        return found if found.owner == owner else None

    def _state_files(self, owner: str) -> list[Path]:
        """Return the state files of `owner`, oldest first."""
        found = []
        for path in self._notebooks.glob("*.json"):
            if path.stem not in self._owners and (exploration := self._read(path.stem)) is not None:
                self._owners[path.stem] = exploration.owner, exploration.started_at
            file_owner, started_at = self._owners.get(path.stem, ("", 0.0))
            if path.stem in self._owners and file_owner == owner:
                found.append((started_at, path))
        return [path for _, path in sorted(found)]

    def _forget_old(self, owner: str) -> None:
        for path in self._state_files(owner)[:-MAX_EXPLORATIONS_PER_OWNER]:
            self._forget(path)

    def _delete_abandoned(self) -> None:
        """Delete explorations that were neither viewed nor resumed for `ABANDONED_AFTER_SECONDS`."""
        for path in self._notebooks.glob("*.json"):
            with suppress(OSError, sqlite3.Error):  # tried again when the studio is opened the next time
                if time.time() - path.stat().st_mtime < ABANDONED_AFTER_SECONDS:
                    continue
                lock = acquire_file_lock(self._lock_of(path.stem))
                if lock is not None:
                    lock.close()
                    self._forget(path)

    def _forget(self, path: Path) -> None:
        """Delete the state, the lock and the thumbnails; the pictures themselves stay."""
        self._known.pop(path.stem, None)
        self._owners.pop(path.stem, None)
        path.unlink(missing_ok=True)
        self._lock_of(path.stem).unlink(missing_ok=True)
        shutil.rmtree(self._pictures / path.stem, ignore_errors=True)

    def _hold(self, exploration: Exploration) -> bool:
        """Lock the exploration for this studio; return False if another studio holds it. Raises `SaveError`."""
        try:
            lock = acquire_file_lock(self._lock_of(exploration.id))
        except sqlite3.Error as error:
            raise SaveError(
                f"The folder {self._notebooks} cannot be used ({error}): allow writing there and free some space."
            ) from error
        if lock is not None:
            self._locks[exploration.id] = lock
        return lock is not None

    def _lock_of(self, id_: str) -> Path:
        return self._notebooks / f"{id_}.lock"

    # --- in the exploration's thread -----------------------------------------------------------------------------

    def _run(self, exploration: Exploration) -> None:
        try:
            self._cells(exploration)
        finally:  # so that no follower waits forever
            with self._lock:
                self._locks.pop(exploration.id).close()
            exploration.progress.state = "stopped" if exploration.remaining_cells else "done"
            if not self._jobs.closed:  # else it stays running, and the next studio resumes it
                self._changed(exploration)

    def _cells(self, exploration: Exploration) -> None:
        consecutive_failures = 0
        for number in exploration.remaining_cells:
            if exploration.stop_requested.is_set() or consecutive_failures == MAX_CONSECUTIVE_FAILURES:
                break
            problem = self._cell(exploration, number)
            if self._jobs.closed and number not in exploration.progress.done:
                break  # the studio is ending; the state file names this cell for the next one
            consecutive_failures = consecutive_failures + 1 if problem else 0
            if problem is not None:
                exploration.progress.failed[number] = problem
            self._changed(exploration)

    def _cell(self, exploration: Exploration, number: int) -> str | None:
        """Draw cell `number`; return an error message, or None. A cancelled cell is neither done nor failed."""
        try:
            job = self._job_of(exploration, number)
        except StudioError as error:
            return str(error)
        exploration.current_cell, exploration.current_job = number, job
        self._note(exploration)
        if exploration.stop_requested.is_set():  # set after the loop's check
            job.cancel()
        problem = None
        for _, event in job.events():
            match event:
                case Saved():
                    problem = _write_thumbnail(event.image, exploration.thumbnail(number))
                    if problem is None:
                        exploration.progress.done[number] = event.image
                case Failed():
                    problem = event.message
        exploration.current_job = None
        self._jobs.mark_seen(job.id)  # the sheet shows its end, also a failure
        return problem

    def _job_of(self, exploration: Exploration, number: int) -> Job:
        """Return the job of cell `number`: one that an earlier studio started, or a new one. Raises `StudioError`."""
        if exploration.interrupted_cell is not None and exploration.interrupted_cell[0] == number:
            (_, id_), exploration.interrupted_cell = exploration.interrupted_cell, None
            job = self._jobs.get(id_, exploration.owner)  # it was waiting and is in the queue again
            if job is not None and (not job.finished or any(isinstance(it, Saved) for _, it in job.events())):
                return job
            self._jobs.discard(id_, exploration.owner)  # it was interrupted: run it again
        return self._jobs.submit(exploration.plan.cells[number].request, exploration.owner)

    def _changed(self, exploration: Exploration) -> None:
        exploration.progress.version += 1
        self._note(exploration)

    def _note(self, exploration: Exploration) -> None:
        """Write the state. If that fails, stop the exploration."""
        try:
            self._write(exploration)
        except SaveError as error:
            exploration.stop_requested.set()
            exploration.progress.failed[exploration.remaining_cells[0] if exploration.remaining_cells else 0] = str(
                error
            )

    def _write(self, exploration: Exploration) -> None:
        plan, progress = exploration.plan, exploration.progress
        state = {
            "version": FILE_FORMAT_VERSION,
            "owner": exploration.owner,
            "began": exploration.started_at,
            "plan": {
                "cells": [{**asdict(cell), "request": cell.request.as_dict()} for cell in plan.cells],
                "columns": plan.columns,
                "rows": plan.rows,
                "tables": plan.tables,
                "titles": plan.titles,
            },
            "done": {str(number): str(path) for number, path in progress.done.items()},
            "failed": {str(number): message for number, message in progress.failed.items()},
            "going": progress.state == "running",
            "job": [exploration.current_cell, exploration.current_job.id]
            if exploration.current_job is not None
            else None,
        }
        target = self._notebooks / f"{exploration.id}.json"
        try:
            with atomic_write(target) as file:
                file.write(json.dumps(state, ensure_ascii=False).encode())
        except OSError as error:
            raise SaveError(
                f"How far the exploration is could not be written to {target} ({error.strerror}): free some space."
            ) from error

    def _read(self, id_: str) -> Exploration | None:
        return _read_exploration(self._notebooks / f"{id_}.json", self._pictures / id_)


def _read_exploration(state_file: Path, folder: Path) -> Exploration | None:
    """Read the exploration that an earlier studio wrote; None if it cannot be read."""
    try:
        state: Mapping[str, Any] = json.loads(state_file.read_text(encoding="utf-8"))
        if state["version"] != FILE_FORMAT_VERSION:
            return None
        plan = state["plan"]
        cells = tuple(
            Cell(
                request=Request.from_dict(cell["request"]),
                column=int(cell["column"]),
                row=int(cell["row"]),
                table=int(cell["table"]),
            )
            for cell in plan["cells"]
        )
        titles = plan["titles"]
        progress = ExplorationProgress(
            state="stopped",
            done={int(number): Path(path) for number, path in state["done"].items() if Path(path).is_file()},
            failed={int(number): str(message) for number, message in state["failed"].items()},
        )
        if len(progress.done) == len(cells):
            progress.state = "done"
        exploration = Exploration(
            state_file.stem,
            str(state["owner"]),
            ExplorationPlan(
                cells=cells,
                columns=tuple(plan["columns"]),
                rows=tuple(plan["rows"]),
                tables=tuple(plan["tables"]),
                titles=(titles[0], titles[1], titles[2]),
            ),
            folder,
            progress,
            started_at=float(state["began"]),
        )
        exploration.was_running = state.get("going") is True and progress.state != "done"
        exploration.interrupted_cell = (int(state["job"][0]), str(state["job"][1])) if state.get("job") else None
        return exploration
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, StudioError):
        return None


def _write_thumbnail(picture: Path, target: Path) -> str | None:
    """Write the thumbnail; return an error message, or None."""
    try:
        with Image.open(picture) as file:
            thumbnail = file.convert("RGB")
            thumbnail.thumbnail((CELL_THUMBNAIL_PIXELS, CELL_THUMBNAIL_PIXELS))
            thumbnail.save(target, "WEBP", quality=85)
    except OSError as error:
        return f"A small picture for the sheet could not be written ({error}): free some space and go on."
    return None
