"""The checkpoints as a user manages them: what each takes, what is here of it, and its download, paused and resumed.

A download belongs to the server, not to who asked for it: it goes on in a thread of its own when nobody looks, and
whoever asks for a checkpoint that is on its way joins in. What is here is read from the disk every time, so a download
that a killed server left behind shows as a paused one, and what a run or another program fetched shows too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux2_studio.checkpoints import KIND_NAMES, Checkpoint, Part
from flux2_studio.errors import StudioError, WeightsError
from flux2_studio.models.hub.hub_errors import amount
from flux2_studio.models.hub.repositories import Hub, Reached, Removed, parts_of
from flux2_studio.settings import Settings

log = logging.getLogger(__name__)

State = Literal["absent", "downloading", "paused", "failed", "complete"]

DEFECT = "Something went wrong inside the studio; its log has the details. Try again: what has arrived is kept."


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A part that a checkpoint has in common with others."""

    kind: str  # as users call it
    others: tuple[Checkpoint, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checkpoint, as it is now. Sizes are in bytes.

    size: all that it consists of. here: what was downloaded of it, unfinished files too. to_come: what is still to
    download. removable: what deleting it would free. doing and per_second: of its download; None as long as it is too
    early to tell. on_its_way: kinds of parts that a run, or another checkpoint's download, is fetching. failure: the
    sentence that ended the last download, or why what is here cannot be used.
    """

    checkpoint: Checkpoint
    state: State
    size: int
    here: int
    to_come: int
    removable: int
    on_board: bool  # ships with the studio
    own: bool  # a file of the user's own folder
    shared: tuple[Shared, ...]
    pages: tuple[str, ...]  # where the licences of its gated parts are accepted
    doing: str = ""
    per_second: float | None = None
    on_its_way: tuple[str, ...] = ()
    failure: str = ""

    @property
    def fraction(self) -> float:
        """How much of what must be downloaded is here (0..1)."""
        whole = self.here + self.to_come
        return self.here / whole if whole else 1.0

    @property
    def seconds_left(self) -> float | None:
        return self.to_come / self.per_second if self.per_second else None


class Paused(Exception):
    """The user wants the download to wait."""


@dataclass
class Task:
    """A download that somebody asked for. Written by its own thread; `pause` by whoever pauses it."""

    running: bool = True
    pause: bool = False
    doing: str = "Starting"
    failure: str = ""

    def progress(self, text: str, fraction: float | None) -> None:
        self.doing = text
        if self.pause:
            raise Paused


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is here of a part."""

    complete: bool
    here: int
    total: int
    reached: Reached | None
    problem: str


class Shelf:
    """The checkpoints of `settings`, on the hub and in the cache of `hub`. Callable from several threads.

    `hub` should be the one that loads checkpoints too: then a run that needs one on its way joins the download.
    others: a sentence about each file of the user's own folder that is no checkpoint.
    """

    def __init__(self, settings: Settings, hub: Hub, others: Sequence[str] = ()) -> None:
        self.others = tuple(others)
        self.checkpoints = settings.checkpoints
        self._settings = settings
        self._hub = hub
        self._tasks: dict[str, Task] = {}  # by checkpoint, the last of each
        self._lock = threading.Lock()  # held by what starts or deletes: neither must begin while the other is at it

    def entries(self) -> list[Entry]:
        """Every checkpoint, in the order of the list. Never uses the network, and waits for nobody."""
        tasks = dict(self._tasks)  # at one stroke, so without the lock, which a deletion may hold for seconds
        parts = {part for checkpoint in self.checkpoints for part in parts_of(checkpoint)}
        looks = {part: self._look(part) for part in parts}
        return [self._entry(checkpoint, looks, tasks) for checkpoint in self.checkpoints]

    def entry(self, name: str) -> Entry:
        """The checkpoint called `name`. Raises `RequestError` for an unknown one."""
        checkpoint = self._settings.checkpoint(name)
        return next(entry for entry in self.entries() if entry.checkpoint == checkpoint)

    def room(self) -> tuple[str, int]:
        """The folder where downloads go, and the bytes that are free there."""
        folder, free = self._hub.room()
        return str(folder), free

    def download(self, name: str) -> None:
        """Start the download of `name`, or go on with it; one that is running already is shared.

        What goes wrong is the entry's `failure`. Raises `RequestError` for an unknown name.
        """
        checkpoint = self._settings.checkpoint(name)
        with self._lock:
            task = self._tasks.get(name)
            if task and task.running and not task.pause:
                return
            task = self._tasks[name] = Task()
        threading.Thread(target=self._run, args=(checkpoint, task), name=f"flux2-shelf-{name}", daemon=True).start()

    def pause(self, name: str) -> None:
        """Let the download of `name` wait until it is asked for again. What others are waiting for still comes."""
        with self._lock:
            task = self._tasks.get(name)
            if task and task.running:
                task.pause = True

    def remove(self, name: str) -> str:
        """Delete what was downloaded of `name`, except what others need. Returns what was done, for the user to read.

        Others are those that are complete, and those whose downloads are running, paused or failed. A user's own files
        stay. Raises `WeightsError` while `name` is being downloaded or where files cannot be deleted.
        """
        checkpoint = self._settings.checkpoint(name)
        with self._lock:
            task = self._tasks.get(name)
            if task and task.running and not task.pause:
                raise WeightsError(f"{checkpoint.label} is being downloaded: pause that first.")
            wanted = [self._settings.checkpoint(other) for other in self._tasks if other != name]
            removed = self._hub.remove(checkpoint, wanted)
            self._tasks.pop(name, None)
        return _removal(checkpoint, removed)

    def _run(self, checkpoint: Checkpoint, task: Task) -> None:
        try:
            self._hub.download(checkpoint, self._wanted(checkpoint), task.progress)
        except Paused:
            return
        except StudioError as error:
            task.failure = str(error)
        except Exception:
            log.exception("the download of %s failed", checkpoint.name)
            task.failure = DEFECT
        finally:
            task.running = False
        with self._lock:
            if not task.failure and self._tasks.get(checkpoint.name) is task:
                del self._tasks[checkpoint.name]

    def _wanted(self, checkpoint: Checkpoint) -> tuple[Part, ...]:
        """What to download for `checkpoint`: with the previews' decoder, where previews use it."""
        preview = (checkpoint.tiny_autoencoder,) if self._settings.preview == "tiny" else ()
        return tuple(dict.fromkeys((*checkpoint.parts, *preview)))

    def _look(self, part: Part) -> Look:
        complete, problem = False, ""
        try:
            complete = self._hub.find(part) is not None
        except WeightsError as error:
            problem = str(error)
        here, reached = self._hub.size_on_disk(part), self._hub.reached(part)
        if complete:
            total = here or part.size
        elif reached and reached.total:
            here, total = reached.done, reached.total
        else:  # by the table, which is about right
            total = max(part.size, here)
        return Look(complete=complete, here=here, total=total, reached=reached, problem=problem)

    def _entry(self, checkpoint: Checkpoint, looks: Mapping[Part, Look], tasks: Mapping[str, Task]) -> Entry:
        parts = {part: looks[part] for part in self._wanted(checkpoint)}
        missing = {part: look for part, look in parts.items() if not look.complete}
        problem = next((look.problem for look in missing.values() if look.problem), "")
        own = checkpoint.flow.repo is None and Path(checkpoint.flow.path).is_absolute()
        task = tasks.get(checkpoint.name)
        downloading = task is not None and task.running and not task.pause
        state: State = "absent"
        if downloading:
            state = "downloading"
        elif all(looks[part].complete for part in checkpoint.parts):
            state = "complete"
        elif problem or (task and task.failure):
            state = "failed"
        elif task or any(look.here for look in missing.values()):
            state = "paused"
        moving = [(part, look.reached) for part, look in missing.items() if look.reached]
        rates = [reached.per_second for _, reached in moving if reached.per_second]
        return Entry(
            checkpoint=checkpoint,
            state=state,
            size=sum(look.total for look in parts.values()),
            here=sum(look.here for look in parts.values()),
            to_come=sum(look.total - look.here for part, look in missing.items() if self._hub.from_hub(part)),
            removable=self._removable(checkpoint, looks, tasks),
            on_board=all(part.repo is None for part in checkpoint.parts) and not own,
            own=own,
            shared=self._shared(checkpoint),
            pages=tuple(self._hub.page(part) for part in parts if part.gated and self._hub.from_hub(part)),
            doing=_doing(task, moving) if task and downloading else "",
            per_second=sum(rates) if downloading and rates else None,
            on_its_way=() if task and task.running else tuple(KIND_NAMES[part.kind] for part, _ in moving),
            failure=problem or (task.failure if task and missing else ""),
        )

    def _removable(self, checkpoint: Checkpoint, looks: Mapping[Part, Look], tasks: Mapping[str, Task]) -> int:
        """As `Hub.remove` will have it."""
        needed = {
            part
            for other in self.checkpoints
            if other != checkpoint and (other.name in tasks or all(looks[part].complete for part in other.parts))
            for part in parts_of(other)
        }
        return sum(looks[part].here for part in parts_of(checkpoint) if part not in needed)

    def _shared(self, checkpoint: Checkpoint) -> tuple[Shared, ...]:
        found = []
        for part in checkpoint.parts:
            others = tuple(other for other in self.checkpoints if other != checkpoint and part in other.parts)
            if others:
                found.append(Shared(kind=KIND_NAMES[part.kind], others=others))
        return tuple(found)


def _doing(task: Task, moving: Sequence[tuple[Part, Reached]]) -> str:
    """What a download is doing, in words; the checkpoint's own numbers stand elsewhere."""
    for _, reached in moving:
        return reached.told[0] if reached.checked else reached.words
    return task.doing


def _removal(checkpoint: Checkpoint, removed: Removed) -> str:
    sentences = [
        f"{amount(removed.freed)} freed."
        if removed.freed
        else f"There is nothing to delete of {checkpoint.label} alone."
    ]
    kept: dict[tuple[Checkpoint, ...], list[str]] = {}
    for part, others in removed.kept:
        kept.setdefault(others, []).append(f"the {KIND_NAMES[part.kind]}")
    for others, kinds in kept.items():
        what = f"{_and(kinds)} {'stays' if len(kinds) == 1 else 'stay'}"
        sentences.append(f"{what[0].upper()}{what[1:]}, for {_and([other.label for other in others])}.")
    return " ".join(sentences)


def _and(words: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
