"""Manages checkpoints for the user: status, sizes, and downloads that can be paused and resumed.

A download belongs to the server, not to the client that started it: it continues in its own thread when nobody watches,
and further requests join it. The status is read from disk every time, so an interrupted download of a killed server
appears as paused, and files downloaded by a run or another program appear too.
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
    """A part that a checkpoint shares with other checkpoints."""

    kind: str  # the label for users, see `PART_LABELS`
    others: tuple[Checkpoint, ...]


@dataclass(frozen=True, kw_only=True)
class CheckpointStatus:
    """The current status of a checkpoint. Sizes are in bytes.

    total_bytes: size of all its parts. bytes_on_disk: downloaded bytes, including unfinished files.
    remaining_bytes: bytes still to download. removable_bytes: bytes that deleting it would free.
    activity, bytes_per_second: of its download; the speed is None while unknown.
    fetching_kinds: labels of parts that a run or another checkpoint's download is fetching.
    failure: the error of the last download, or why the local files cannot be used.
    """

    checkpoint: Checkpoint
    state: CheckpointState
    total_bytes: int
    bytes_on_disk: int
    remaining_bytes: int
    removable_bytes: int
    is_bundled: bool  # ships with the studio
    is_local_file: bool  # a file of the user's own checkpoint folder
    shared: tuple[SharedPart, ...]
    licence_urls: tuple[str, ...]  # where the licences of its gated parts are accepted
    activity: str = ""
    bytes_per_second: float | None = None
    fetching_kinds: tuple[str, ...] = ()
    failure: str = ""

    @property
    def fraction(self) -> float:
        """The downloaded fraction (0..1)."""
        total = self.bytes_on_disk + self.remaining_bytes
        return self.bytes_on_disk / total if total else 1.0

    @property
    def seconds_left(self) -> float | None:
        return self.remaining_bytes / self.bytes_per_second if self.bytes_per_second else None


class DownloadPaused(Exception):
    """The user has paused the download."""


@dataclass
class DownloadTask:
    """A requested download. Its own thread writes it, except `is_pausing`, which the pausing thread sets."""

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
    """The current status of a part. Sizes are in bytes."""

    is_complete: bool
    bytes_on_disk: int
    total: int
    progress: DownloadProgress | None
    problem: str


class CheckpointLibrary:
    """The checkpoints of `settings`, on the hub and in the cache of `hub`. Thread-safe.

    `hub` should be the instance that also loads checkpoints, so that a run joins a download in progress.
    local_file_problems: a sentence for each file of the user's own folder that cannot be used as a checkpoint.
    """

    def __init__(self, settings: Settings, hub: Hub, local_file_problems: Sequence[str] = ()) -> None:
        self.local_file_problems = tuple(local_file_problems)
        self.checkpoints = settings.checkpoints
        self._settings = settings
        self._hub = hub
        self._tasks: dict[str, DownloadTask] = {}  # the latest, by checkpoint name
        self._lock = threading.Lock()  # no download may start during a deletion, and vice versa

    def list_statuses(self) -> list[CheckpointStatus]:
        """Returns the status of every checkpoint in the order of `checkpoints`. Uses no network and never blocks."""
        tasks = dict(self._tasks)  # an atomic copy, without the lock, which a deletion may hold for seconds
        parts = {part for checkpoint in self.checkpoints for part in list_parts(checkpoint)}
        part_statuses = {part: self._inspect_part(part) for part in parts}
        return [self._make_status(checkpoint, part_statuses, tasks) for checkpoint in self.checkpoints]

    def get_status(self, name: str) -> CheckpointStatus:
        """Returns the status of checkpoint `name`. Raises `RequestError` for an unknown name."""
        checkpoint = self._settings.checkpoint(name)
        return next(entry for entry in self.list_statuses() if entry.checkpoint == checkpoint)

    def free_space(self) -> tuple[str, int]:
        """Returns the download folder and its free bytes."""
        folder, free = self._hub.free_space()
        return str(folder), free

    def download(self, name: str) -> None:
        """Starts or resumes the download of `name`; does nothing if it is running already.

        Errors appear as the status's `failure`. Raises `RequestError` for an unknown name.
        """
        checkpoint = self._settings.checkpoint(name)
        with self._lock:
            task = self._tasks.get(name)
            if task and task.is_running and not task.is_pausing:
                return
            task = self._tasks[name] = DownloadTask()
        threading.Thread(target=self._run, args=(checkpoint, task), name=f"flux2-shelf-{name}", daemon=True).start()

    def pause(self, name: str) -> None:
        """Pauses the download of `name`. Parts that others are waiting for continue."""
        with self._lock:
            task = self._tasks.get(name)
            if task and task.is_running:
                task.is_pausing = True

    def remove(self, name: str) -> str:
        """Deletes the downloaded files of `name`, except those that other checkpoints need. Returns a message.

        Other checkpoints are those that are complete, and those whose downloads are running, paused or failed. The
        user's own files stay. Raises `WeightsError` if `name` is being downloaded or files cannot be deleted.
        """
        checkpoint = self._settings.checkpoint(name)
        with self._lock:
            task = self._tasks.get(name)
            if task and task.is_running and not task.is_pausing:
                raise WeightsError(f"{checkpoint.label} is being downloaded: pause that first.")
            wanted = [self._settings.checkpoint(other) for other in self._tasks if other != name]
            removed = self._hub.remove(checkpoint, wanted)
            self._tasks.pop(name, None)
        return _describe_removal(checkpoint, removed)

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
        """Returns the parts to download for `checkpoint`, with the preview decoder if the settings use it."""
        preview = (checkpoint.tiny_autoencoder,) if self._settings.preview == "tiny" else ()
        return tuple(dict.fromkeys((*checkpoint.parts, *preview)))

    def _inspect_part(self, part: Part) -> PartStatus:
        complete, problem = False, ""
        try:
            complete = self._hub.find(part) is not None
        except WeightsError as error:
            problem = str(error)
        bytes_on_disk, progress = self._hub.size_on_disk(part), self._hub.download_progress(part)
        if complete:
            total = bytes_on_disk or part.size
        elif progress and progress.total:
            bytes_on_disk, total = progress.done, progress.total
        else:  # `part.size` is approximate
            total = max(part.size, bytes_on_disk)
        return PartStatus(
            is_complete=complete, bytes_on_disk=bytes_on_disk, total=total, progress=progress, problem=problem
        )

    def _make_status(
        self, checkpoint: Checkpoint, part_statuses: Mapping[Part, PartStatus], tasks: Mapping[str, DownloadTask]
    ) -> CheckpointStatus:
        parts = {part: part_statuses[part] for part in self._parts_to_download(checkpoint)}
        missing = {part: status for part, status in parts.items() if not status.is_complete}
        problem = next((status.problem for status in missing.values() if status.problem), "")
        is_local = checkpoint.flow.repo is None and Path(checkpoint.flow.path).is_absolute()
        task = tasks.get(checkpoint.name)
        downloading = task is not None and task.is_running and not task.is_pausing
        state: CheckpointState = "absent"
        if downloading:
            state = "downloading"
        elif all(part_statuses[part].is_complete for part in checkpoint.parts):
            state = "complete"
        elif problem or (task and task.failure):
            state = "failed"
        elif task or any(status.bytes_on_disk for status in missing.values()):
            state = "paused"
        active_parts = [(part, status.progress) for part, status in missing.items() if status.progress]
        speeds = [progress.bytes_per_second for _, progress in active_parts if progress.bytes_per_second]
        return CheckpointStatus(
            checkpoint=checkpoint,
            state=state,
            total_bytes=sum(status.total for status in parts.values()),
            bytes_on_disk=sum(status.bytes_on_disk for status in parts.values()),
            remaining_bytes=sum(
                status.total - status.bytes_on_disk for part, status in missing.items() if self._hub.is_from_hub(part)
            ),
            removable_bytes=self._removable(checkpoint, part_statuses, tasks),
            is_bundled=all(part.repo is None for part in checkpoint.parts) and not is_local,
            is_local_file=is_local,
            shared=self._shared(checkpoint),
            licence_urls=tuple(
                self._hub.repository_url(part) for part in parts if part.gated and self._hub.is_from_hub(part)
            ),
            activity=_describe_activity(task, active_parts) if task and downloading else "",
            bytes_per_second=sum(speeds) if downloading and speeds else None,
            fetching_kinds=()
            if task and task.is_running
            else tuple(PART_LABELS[part.kind] for part, _ in active_parts),
            failure=problem or (task.failure if task and missing else ""),
        )

    def _removable(
        self, checkpoint: Checkpoint, part_statuses: Mapping[Part, PartStatus], tasks: Mapping[str, DownloadTask]
    ) -> int:
        """Returns the bytes that `Hub.remove` would free."""
        needed = {
            part
            for other in self.checkpoints
            if other != checkpoint
            and (other.name in tasks or all(part_statuses[part].is_complete for part in other.parts))
            for part in list_parts(other)
        }
        return sum(part_statuses[part].bytes_on_disk for part in list_parts(checkpoint) if part not in needed)

    def _shared(self, checkpoint: Checkpoint) -> tuple[SharedPart, ...]:
        shared = []
        for part in checkpoint.parts:
            others = tuple(other for other in self.checkpoints if other != checkpoint and part in other.parts)
            if others:
                shared.append(SharedPart(kind=PART_LABELS[part.kind], others=others))
        return tuple(shared)


def _describe_activity(task: DownloadTask, moving: Sequence[tuple[Part, DownloadProgress]]) -> str:
    """Returns the activity text of a download, without numbers unless a partial file is being verified."""
    for _, progress in moving:
        return progress.status[0] if progress.verified_bytes else progress.label
    return task.activity


def _describe_removal(checkpoint: Checkpoint, removed: RemovalResult) -> str:
    sentences = [
        f"{format_size(removed.freed_bytes)} freed."
        if removed.freed_bytes
        else f"There is nothing to delete of {checkpoint.label} alone."
    ]
    kept: dict[tuple[Checkpoint, ...], list[str]] = {}
    for part, others in removed.kept_parts:
        kept.setdefault(others, []).append(f"the {PART_LABELS[part.kind]}")
    for others, kinds in kept.items():
        kept_text = f"{_join_words(kinds)} {'stays' if len(kinds) == 1 else 'stay'}"
        sentences.append(
            f"{kept_text[0].upper()}{kept_text[1:]}, for {_join_words([other.label for other in others])}."
        )
    return " ".join(sentences)


def _join_words(words: Sequence[str]) -> str:
    """Joins words as 'a', 'a and b' or 'a, b and c'."""
    *first_words, last = words
    return f"{', '.join(first_words)} and {last}" if first_words else last
