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

from flux2_studio.checkpoints import PART_LABELS, Checkpoint, Part
from flux2_studio.errors import StudioError, WeightsError
from flux2_studio.models.hub.hub_errors import format_size
from flux2_studio.models.hub.repositories import DownloadProgress, Hub, RemovalResult, list_parts
from flux2_studio.settings import Settings

log = logging.getLogger(__name__)

CheckpointState = Literal["absent", "downloading", "paused", "failed", "complete"]

DOWNLOAD_DEFECT_MESSAGE = (
    "Something went wrong inside the studio; its log has the details. Try again: what has arrived is kept."
)


@dataclass(frozen=True, kw_only=True)
class SharedPart:
    """A part that a checkpoint has in common with others."""

    kind: str  # as users call it
    others: tuple[Checkpoint, ...]


@dataclass(frozen=True, kw_only=True)
class CheckpointStatus:
    """One checkpoint, as it is now. Sizes are in bytes.

    total_bytes: all that it consists of. bytes_on_disk: what was downloaded of it, unfinished files too.
    remaining_bytes: what is still to download. removable_bytes: what deleting it would free. doing and per_second: of
    its download; None as long as it is too early to tell. fetching_kinds: kinds of parts that a run, or another
    checkpoint's download, is fetching. failure: the sentence that ended the last download, or why what is here cannot
    be used.
    """

    checkpoint: Checkpoint
    state: CheckpointState
    total_bytes: int
    bytes_on_disk: int
    remaining_bytes: int
    removable_bytes: int
    is_bundled: bool  # ships with the studio
    is_local_file: bool  # a file of the user's own folder
    shared: tuple[SharedPart, ...]
    licence_urls: tuple[str, ...]  # where the licences of its gated parts are accepted
    activity: str = ""
    bytes_per_second: float | None = None
    fetching_kinds: tuple[str, ...] = ()
    failure: str = ""

    @property
    def fraction(self) -> float:
        """How much of what must be downloaded is here (0..1)."""
        whole = self.bytes_on_disk + self.remaining_bytes
        return self.bytes_on_disk / whole if whole else 1.0

    @property
    def seconds_left(self) -> float | None:
        return self.remaining_bytes / self.bytes_per_second if self.bytes_per_second else None


class DownloadPaused(Exception):
    """The user wants the download to wait."""


@dataclass
class DownloadTask:
    """A download that somebody asked for. Written by its own thread; `is_pausing` by whoever pauses it."""

    is_running: bool = True
    is_pausing: bool = False
    activity: str = "Starting"
    failure: str = ""

    def on_progress(self, text: str, fraction: float | None) -> None:
        self.activity = text
        if self.is_pausing:
            raise DownloadPaused


@dataclass(frozen=True, kw_only=True)
class PartStatus:
    """What is here of a part."""

    is_complete: bool
    bytes_on_disk: int
    total: int
    progress: DownloadProgress | None
    problem: str


class CheckpointLibrary:
    """The checkpoints of `settings`, on the hub and in the cache of `hub`. Callable from several threads.

    `hub` should be the one that loads checkpoints too: then a run that needs one on its way joins the download.
    local_file_problems: a sentence about each file of the user's own folder that is no checkpoint.
    """

    def __init__(self, settings: Settings, hub: Hub, local_file_problems: Sequence[str] = ()) -> None:
        self.local_file_problems = tuple(local_file_problems)
        self.checkpoints = settings.checkpoints
        self._settings = settings
        self._hub = hub
        self._tasks: dict[str, DownloadTask] = {}  # by checkpoint, the last of each
        self._lock = threading.Lock()  # held by what starts or deletes: neither must begin while the other is at it

    def list_statuses(self) -> list[CheckpointStatus]:
        """Every checkpoint, in the order of the list. Never uses the network, and waits for nobody."""
        tasks = dict(self._tasks)  # at one stroke, so without the lock, which a deletion may hold for seconds
        parts = {part for checkpoint in self.checkpoints for part in list_parts(checkpoint)}
        looks = {part: self._inspect_part(part) for part in parts}
        return [self._make_status(checkpoint, looks, tasks) for checkpoint in self.checkpoints]

    def get_status(self, name: str) -> CheckpointStatus:
        """The checkpoint called `name`. Raises `RequestError` for an unknown one."""
        checkpoint = self._settings.checkpoint(name)
        return next(entry for entry in self.list_statuses() if entry.checkpoint == checkpoint)

    def free_space(self) -> tuple[str, int]:
        """The folder where downloads go, and the bytes that are free there."""
        folder, free = self._hub.free_space()
        return str(folder), free

    def download(self, name: str) -> None:
        """Start the download of `name`, or go on with it; one that is running already is shared.

        What goes wrong is the entry's `failure`. Raises `RequestError` for an unknown name.
        """
        checkpoint = self._settings.checkpoint(name)
        with self._lock:
            task = self._tasks.get(name)
            if task and task.is_running and not task.is_pausing:
                return
            task = self._tasks[name] = DownloadTask()
        threading.Thread(target=self._run, args=(checkpoint, task), name=f"flux2-shelf-{name}", daemon=True).start()

    def pause(self, name: str) -> None:
        """Let the download of `name` wait until it is asked for again. What others are waiting for still comes."""
        with self._lock:
            task = self._tasks.get(name)
            if task and task.is_running:
                task.is_pausing = True

    def remove(self, name: str) -> str:
        """Delete what was downloaded of `name`, except what others need. Returns what was done, for the user to read.

        Others are those that are complete, and those whose downloads are running, paused or failed. A user's own files
        stay. Raises `WeightsError` while `name` is being downloaded or where files cannot be deleted.
        """
        checkpoint = self._settings.checkpoint(name)
        with self._lock:
            task = self._tasks.get(name)
            if task and task.is_running and not task.is_pausing:
                raise WeightsError(f"{checkpoint.label} is being downloaded: pause that first.")
            wanted = [self._settings.checkpoint(other) for other in self._tasks if other != name]
            removed = self._hub.remove(checkpoint, wanted)
            self._tasks.pop(name, None)
        return _removal(checkpoint, removed)

    def _run(self, checkpoint: Checkpoint, task: DownloadTask) -> None:
        try:
            self._hub.download(checkpoint, self._parts_to_download(checkpoint), task.on_progress)
        except DownloadPaused:
            return
        except StudioError as error:
            task.failure = str(error)
        except Exception:
            log.exception("the download of %s failed", checkpoint.name)
            task.failure = DOWNLOAD_DEFECT_MESSAGE
        finally:
            task.is_running = False
        with self._lock:
            if not task.failure and self._tasks.get(checkpoint.name) is task:
                del self._tasks[checkpoint.name]

    def _parts_to_download(self, checkpoint: Checkpoint) -> tuple[Part, ...]:
        """What to download for `checkpoint`: with the previews' decoder, where previews use it."""
        preview = (checkpoint.tiny_autoencoder,) if self._settings.preview == "tiny" else ()
        return tuple(dict.fromkeys((*checkpoint.parts, *preview)))

    def _inspect_part(self, part: Part) -> PartStatus:
        complete, problem = False, ""
        try:
            complete = self._hub.find(part) is not None
        except WeightsError as error:
            problem = str(error)
        here, reached = self._hub.size_on_disk(part), self._hub.download_progress(part)
        if complete:
            total = here or part.size
        elif reached and reached.total:
            here, total = reached.done, reached.total
        else:  # by the table, which is about right
            total = max(part.size, here)
        return PartStatus(is_complete=complete, bytes_on_disk=here, total=total, progress=reached, problem=problem)

    def _make_status(
        self, checkpoint: Checkpoint, part_statuses: Mapping[Part, PartStatus], tasks: Mapping[str, DownloadTask]
    ) -> CheckpointStatus:
        parts = {part: part_statuses[part] for part in self._parts_to_download(checkpoint)}
        missing = {part: look for part, look in parts.items() if not look.is_complete}
        problem = next((look.problem for look in missing.values() if look.problem), "")
        own = checkpoint.flow.repo is None and Path(checkpoint.flow.path).is_absolute()
        task = tasks.get(checkpoint.name)
        downloading = task is not None and task.is_running and not task.is_pausing
        state: CheckpointState = "absent"
        if downloading:
            state = "downloading"
        elif all(part_statuses[part].is_complete for part in checkpoint.parts):
            state = "complete"
        elif problem or (task and task.failure):
            state = "failed"
        elif task or any(look.bytes_on_disk for look in missing.values()):
            state = "paused"
        moving = [(part, look.progress) for part, look in missing.items() if look.progress]
        rates = [reached.bytes_per_second for _, reached in moving if reached.bytes_per_second]
        return CheckpointStatus(
            checkpoint=checkpoint,
            state=state,
            total_bytes=sum(look.total for look in parts.values()),
            bytes_on_disk=sum(look.bytes_on_disk for look in parts.values()),
            remaining_bytes=sum(
                look.total - look.bytes_on_disk for part, look in missing.items() if self._hub.is_from_hub(part)
            ),
            removable_bytes=self._removable(checkpoint, part_statuses, tasks),
            is_bundled=all(part.repo is None for part in checkpoint.parts) and not own,
            is_local_file=own,
            shared=self._shared(checkpoint),
            licence_urls=tuple(
                self._hub.repository_url(part) for part in parts if part.gated and self._hub.is_from_hub(part)
            ),
            activity=_doing(task, moving) if task and downloading else "",
            bytes_per_second=sum(rates) if downloading and rates else None,
            fetching_kinds=() if task and task.is_running else tuple(PART_LABELS[part.kind] for part, _ in moving),
            failure=problem or (task.failure if task and missing else ""),
        )

    def _removable(
        self, checkpoint: Checkpoint, part_statuses: Mapping[Part, PartStatus], tasks: Mapping[str, DownloadTask]
    ) -> int:
        """As `Hub.remove` will have it."""
        needed = {
            part
            for other in self.checkpoints
            if other != checkpoint
            and (other.name in tasks or all(part_statuses[part].is_complete for part in other.parts))
            for part in list_parts(other)
        }
        return sum(part_statuses[part].bytes_on_disk for part in list_parts(checkpoint) if part not in needed)

    def _shared(self, checkpoint: Checkpoint) -> tuple[SharedPart, ...]:
        found = []
        for part in checkpoint.parts:
            others = tuple(other for other in self.checkpoints if other != checkpoint and part in other.parts)
            if others:
                found.append(SharedPart(kind=PART_LABELS[part.kind], others=others))
        return tuple(found)


def _doing(task: DownloadTask, moving: Sequence[tuple[Part, DownloadProgress]]) -> str:
    """What a download is doing, in words; the checkpoint's own numbers stand elsewhere."""
    for _, reached in moving:
        return reached.status[0] if reached.verified_bytes else reached.label
    return task.activity


def _removal(checkpoint: Checkpoint, removed: RemovalResult) -> str:
    sentences = [
        f"{format_size(removed.freed_bytes)} freed."
        if removed.freed_bytes
        else f"There is nothing to delete of {checkpoint.label} alone."
    ]
    kept: dict[tuple[Checkpoint, ...], list[str]] = {}
    for part, others in removed.kept_parts:
        kept.setdefault(others, []).append(f"the {PART_LABELS[part.kind]}")
    for others, kinds in kept.items():
        what = f"{_join_words(kinds)} {'stays' if len(kinds) == 1 else 'stay'}"
        sentences.append(f"{what[0].upper()}{what[1:]}, for {_join_words([other.label for other in others])}.")
    return " ".join(sentences)


def _join_words(words: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
