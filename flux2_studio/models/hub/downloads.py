"""Downloads parts. Concurrent requests for the same part share one download.

Each download runs in its own thread. Each waiting caller polls it twice a second and reports to its own `progress` in
its own thread. A caller cancels when its `progress` raises. When the last caller cancels, the download pauses; the next
request resumes it, even from another program.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flux2_studio.checkpoints import MB, Part
from flux2_studio.errors import DownloadError, StudioError
from flux2_studio.models.hub.cache import HubCache, RemoteFile
from flux2_studio.models.hub.hub_errors import HubErrorMessages, format_size, local_copy_hint
from flux2_studio.models.hub.part_files import select_repo_files
from flux2_studio.models.hub.transfer import CHECKING, DOWNLOADING, RETRYING, WAITING, DownloadStopped, Transfer

ProgressCallback = Callable[[str, float | None], None]  # the status text, and the fraction done (0..1) if known

MIN_FREE_DISK_BYTES = 500 * MB  # kept free, because a full drive makes other programs fail
STATUS_TEMPLATES = {
    DOWNLOADING: "Downloading {}",
    CHECKING: "Checking what is here of {}",
    WAITING: "Waiting for another program that downloads {}",
    RETRYING: "The connection broke: trying again to download {}",
}


def ignore_progress(text: str, fraction: float | None) -> None:
    """A `ProgressCallback` for callers that show none."""


class Downloads:
    """Downloads parts into `cache`. Thread-safe; callers that need the same part share its download.

    free_space: returns the free bytes of a folder. interval: seconds between two `progress` calls.
    """

    def __init__(
        self,
        cache: HubCache,
        transfer: Transfer,
        error_messages: HubErrorMessages,
        free_space: Callable[[Path], int] | None = None,
        interval: float = 0.5,
    ) -> None:
        self._cache = cache
        self._transfer = transfer
        self._error_messages = error_messages
        self._free_space = free_space or (lambda folder: shutil.disk_usage(folder).free)
        self._interval = interval
        self._active: dict[Part, ActiveDownload] = {}
        self._lock = threading.Lock()

    def download(self, part: Part, progress: ProgressCallback) -> None:
        """Downloads `part`, or joins its running download, and waits. Exceptions from `progress` end the waiting.

        Raises `DownloadError`.
        """
        progress(f"Downloading {_part_label(part)}", None)
        running = self._join(part)
        try:
            last_status: tuple[str, float | None] | None = None
            while not wait([running.future], self._interval).done:
                # Reported even if unchanged, because the waiting can only be cancelled in `progress`.
                last_status = running.progress().status
                progress(*last_status)
            error = running.future.exception()
            if isinstance(error, DownloadError):
                raise DownloadError(str(error)) from error  # a separate exception for each waiting caller
            if error is not None:
                raise error
            if running.progress().status != last_status:
                progress(*running.progress().status)
        finally:
            self._leave(part, running)

    def progress_of(self, part: Part) -> DownloadProgress | None:
        """Returns the progress of `part`, None if this process is not downloading it."""
        with self._lock:
            running = self._active.get(part)
        return running.progress() if running else None

    def check_free_space(self, what: str, needed: int, or_else: str = "") -> None:
        """Raises `DownloadError` unless `needed` bytes and the reserve are free. or_else: added to the message."""
        free = self.free_bytes()
        if needed and needed + MIN_FREE_DISK_BYTES > free:
            raise DownloadError(self._error_messages.no_space_message(what, needed, free, MIN_FREE_DISK_BYTES, or_else))

    def free_bytes(self) -> int:
        """Returns the free bytes of the download folder's drive."""
        folder = self._cache.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return self._free_space(folder)

    def _join(self, part: Part) -> ActiveDownload:
        with self._lock:
            running = self._active.get(part)
            if running is None or running.future.done():
                running = self._active[part] = ActiveDownload(_part_label(part))
                threading.Thread(target=self._run, args=(part, running), name="flux2-download", daemon=True).start()
            running.waiter_count += 1
            return running

    def _leave(self, part: Part, running: ActiveDownload) -> None:
        with self._lock:
            running.waiter_count -= 1
            if running.waiter_count == 0:
                running.stop_event.set()
                if self._active.get(part) is running:
                    del self._active[part]

    def _run(self, part: Part, running: ActiveDownload) -> None:
        try:
            self._fetch(part, running)
            running.future.set_result(None)
        except BaseException as error:  # noqa: BLE001 -- passed to the waiting callers
            running.future.set_exception(error)

    def _fetch(self, part: Part, running: ActiveDownload) -> None:
        files = []
        for pick in select_repo_files(part):
            with self._explain_errors(part, pick.repo, pick.label):
                remote_files = self._transfer.list_files(pick)
            if not remote_files:
                raise DownloadError(self._error_messages.missing_file_message(part))
            files += remote_files
        running.set_files({file: self._cache.bytes_on_disk(file) for file in files})
        if running.remaining_bytes:
            with self._lock:
                active_downloads = {running, *self._active.values()}
            needed = sum(download.remaining_bytes for download in active_downloads)
            self.check_free_space(f"{part.repo}/{part.path}".rstrip("/"), needed, local_copy_hint(part))
        for file in files:
            with self._explain_errors(part, file.repo, file.label):
                self._transfer.fetch(file, running.stop_event, partial(running.update, file))
            running.update(file, DOWNLOADING, file.size)

    @contextmanager
    def _explain_errors(self, part: Part, repo: str, what: str) -> Iterator[None]:
        """Turns errors of the hub, huggingface_hub, its client and the file system into `DownloadError`."""
        try:
            yield
        except (StudioError, DownloadStopped):
            raise
        except Exception as error:
            raise DownloadError(self._error_messages.explain(error, part, repo, what)) from error


@dataclass(frozen=True, kw_only=True)
class DownloadProgress:
    """The progress of a download.

    done, total: bytes; total is 0 while unknown. verified_bytes: (read, total) bytes while a partial file is hashed
    before a resume, otherwise None. bytes_per_second: None while nothing is received or the speed is not known yet.
    """

    label: str  # "Downloading FLUX.2-klein-4B text encoder"
    done: int
    total: int
    verified_bytes: tuple[int, int] | None = None
    bytes_per_second: float | None = None

    @property
    def status(self) -> tuple[str, float | None]:
        """The status text and the fraction done, as for `ProgressCallback`."""
        if self.verified_bytes:
            read, to_verify = self.verified_bytes
            return f"{self.label}: {format_size(to_verify, read)}", read / max(to_verify, read, 1)
        if not self.total:
            return self.label, None
        text = f"{self.label}: {format_size(self.total, self.done)}"
        remaining = self.total - self.done
        if self.bytes_per_second and remaining:
            text += (
                f", {self.bytes_per_second / MB:.1f} MB/s, {format_time_left(remaining / self.bytes_per_second)} left"
            )
        return text, self.done / self.total


class ActiveDownload:
    """A running download. Written by its own thread, read by the waiting callers."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.waiter_count = 0
        self.stop_event = threading.Event()
        self.future: Future[None] = Future()
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._arrived: dict[RemoteFile, int] = {}  # bytes on disk
        self._total = 0
        self._done = 0
        self._checked: tuple[int, int] | None = None  # (read, total) bytes while a partial file is hashed
        self._doing = DOWNLOADING
        self._speed: DownloadSpeed | None = None

    @property
    def remaining_bytes(self) -> int:
        """Bytes that are not on disk yet; 0 until the files are known."""
        return self._total - self._done

    def set_files(self, arrived: dict[RemoteFile, int]) -> None:
        """Sets the files to download and the bytes of each that are already on disk."""
        with self._lock:
            self._arrived = dict(arrived)
            self._total = sum(file.size for file in arrived)
            self._done = sum(arrived.values())

    def update(self, file: RemoteFile, activity: str, byte_count: int) -> None:
        with self._lock:
            self._doing = activity
            self._checked = (byte_count, self._arrived[file]) if activity == CHECKING else None
            if activity == CHECKING:
                return
            new = byte_count - self._arrived[file]
            self._arrived[file] = byte_count
            self._done += new
            if activity == DOWNLOADING:
                self._speed = self._speed or DownloadSpeed(self._clock)
                self._speed.add(max(new, 0))

    def progress(self) -> DownloadProgress:
        with self._lock:
            return DownloadProgress(
                label=STATUS_TEMPLATES[self._doing].format(self._name),
                done=self._done,
                total=self._total,
                verified_bytes=self._checked,
                bytes_per_second=self._speed.bytes_per_second() if self._speed and self._doing == DOWNLOADING else None,
            )


class DownloadSpeed:
    """The download speed, averaged over the last ten seconds."""

    WINDOW_SECONDS = 10.0
    SAMPLE_SECONDS = 0.25  # minimum time between two samples
    MIN_SECONDS = 1.0  # no result before this

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bytes = 0
        self._samples = deque([(clock(), 0)])  # (time, bytes received until then)

    def add(self, more: int) -> None:
        self._bytes += more
        now = self._clock()
        if now - self._samples[-1][0] >= self.SAMPLE_SECONDS:
            self._samples.append((now, self._bytes))

    def bytes_per_second(self) -> float | None:
        """Returns the speed, None during the first `MIN_SECONDS`."""
        now = self._clock()
        while len(self._samples) > 1 and self._samples[1][0] <= now - self.WINDOW_SECONDS:
            self._samples.popleft()
        window_start, bytes_at_start = self._samples[0]
        return (self._bytes - bytes_at_start) / (now - window_start) if now - window_start >= self.MIN_SECONDS else None


def format_time_left(seconds: float) -> str:
    """Formats seconds as '45 s', '9 min' or '2 h 5 min'."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _part_label(part: Part) -> str:
    assert part.repo is not None
    name = part.repo.rpartition("/")[2]
    return {"autoencoder": f"{name} autoencoder", "text": f"{name} text encoder"}.get(part.kind, name)
