"""Downloads of parts, shared: whoever asks for a part that is on its way joins in, and sees how it goes.

Each download runs in a thread of its own. Those who wait for it look at it twice a second and tell their own
`progress`, in their own threads; one that gives up (its `progress` raises) leaves, and the last to leave pauses the
download, which goes on from there when it is asked for again, in this program or another.
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

ProgressCallback = Callable[
    [str, float | None], None
]  # what is being done, and how much of it (0..1) where that is known

MIN_FREE_DISK_BYTES = 500 * MB  # left free on the drive: a full one makes other programs fail
STATUS_TEMPLATES = {
    DOWNLOADING: "Downloading {}",
    CHECKING: "Checking what is here of {}",
    WAITING: "Waiting for another program that downloads {}",
    RETRYING: "The connection broke: trying again to download {}",
}


class Downloads:
    """Fetches parts into `cache`, each once however many ask for it. Callable from several threads.

    free_space: how many bytes are free in a folder. interval: seconds between two words to `progress`.
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
        """Have `part` in the cache. What `progress` raises ends the waiting, and is passed on.

        Raises `DownloadError`.
        """
        progress(f"Downloading {_name(part)}", None)
        running = self._join(part)
        try:
            told: tuple[str, float | None] | None = None
            while not wait([running.future], self._interval).done:
                told = (
                    running.progress().status
                )  # even if it is the same: only when told can `progress` end the waiting
                progress(*told)
            error = running.future.exception()
            if isinstance(error, DownloadError):
                raise DownloadError(str(error)) from error  # its own one for each of those who wait
            if error is not None:
                raise error
            if running.progress().status != told:
                progress(*running.progress().status)
        finally:
            self._leave(part, running)

    def progress_of(self, part: Part) -> DownloadProgress | None:
        """How far `part` is; None unless somebody in this program is downloading it."""
        with self._lock:
            running = self._active.get(part)
        return running.progress() if running else None

    def check_free_space(self, what: str, needed: int, or_else: str = "") -> None:
        """Raise `DownloadError` unless there is room for `needed` bytes more, besides what is on its way already."""
        free = self.free_bytes()
        if needed and needed + MIN_FREE_DISK_BYTES > free:
            raise DownloadError(self._error_messages.no_space_message(what, needed, free, MIN_FREE_DISK_BYTES, or_else))

    def free_bytes(self) -> int:
        """Bytes that are free where downloads go."""
        folder = self._cache.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return self._free_space(folder)

    def _join(self, part: Part) -> ActiveDownload:
        with self._lock:
            running = self._active.get(part)
            if running is None or running.future.done():
                running = self._active[part] = ActiveDownload(_name(part))
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
        except BaseException as error:  # noqa: BLE001 -- whoever waits gets it
            running.future.set_exception(error)

    def _fetch(self, part: Part, running: ActiveDownload) -> None:
        files = []
        for pick in select_repo_files(part):
            with self._explain_errors(part, pick.repo, pick.label):
                found = self._transfer.list_files(pick)
            if not found:
                raise DownloadError(self._error_messages.missing_file_message(part))
            files += found
        running.set_files({file: self._cache.bytes_on_disk(file) for file in files})
        if running.remaining_bytes:
            with self._lock:
                everything = {running, *self._active.values()}
            needed = sum(one.remaining_bytes for one in everything)
            self.check_free_space(f"{part.repo}/{part.path}".rstrip("/"), needed, local_copy_hint(part))
        for file in files:
            with self._explain_errors(part, file.repo, file.label):
                self._transfer.fetch(file, running.stop_event, partial(running.update, file))
            running.update(file, DOWNLOADING, file.size)

    @contextmanager
    def _explain_errors(self, part: Part, repo: str, what: str) -> Iterator[None]:
        """Makes a `DownloadError` of whatever the hub, huggingface_hub, its client or the file system raises."""
        try:
            yield
        except (StudioError, DownloadStopped):
            raise
        except Exception as error:
            raise DownloadError(self._error_messages.explain(error, part, repo, what)) from error


@dataclass(frozen=True, kw_only=True)
class DownloadProgress:
    """How far a download is.

    done, total: bytes; a total of 0 is not known yet. verified_bytes: while what is here is read again, how many bytes
    of how many have been. bytes_per_second: bytes, while they come in and as soon as it can be told.
    """

    label: str  # "Downloading FLUX.2-klein-4B text encoder"
    done: int
    total: int
    verified_bytes: tuple[int, int] | None = None
    bytes_per_second: float | None = None

    @property
    def status(self) -> tuple[str, float | None]:
        """What is being done, in words, and how much of it."""
        if self.verified_bytes:
            read, there = self.verified_bytes
            return f"{self.label}: {format_size(there, read)}", read / max(there, read, 1)
        if not self.total:
            return self.label, None
        text = f"{self.label}: {format_size(self.total, self.done)}"
        to_come = self.total - self.done
        if self.bytes_per_second and to_come:
            text += f", {self.bytes_per_second / MB:.1f} MB/s, {format_time_left(to_come / self.bytes_per_second)} left"
        return text, self.done / self.total


class ActiveDownload:
    """A download on its way. Written by its own thread, read by those who wait."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.waiter_count = 0  # how many wait for it
        self.stop_event = threading.Event()
        self.future: Future[None] = Future()
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._arrived: dict[RemoteFile, int] = {}  # bytes
        self._total = 0
        self._done = 0
        self._checked: tuple[int, int] | None = None  # how much of what is read again has been read
        self._doing = DOWNLOADING
        self._speed: DownloadSpeed | None = None

    @property
    def remaining_bytes(self) -> int:
        """Bytes that are not on disk yet, as far as is known."""
        return self._total - self._done

    def set_files(self, arrived: dict[RemoteFile, int]) -> None:
        """The files to fetch, and how much of each is there."""
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
    """How fast bytes come in: the mean of the last ten seconds, so that it neither jumps nor lags."""

    WINDOW_SECONDS = 10.0  # seconds
    SAMPLE_SECONDS = 0.25  # seconds between two notes
    MIN_SECONDS = 1.0  # second, before which nothing is known

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bytes = 0
        self._samples = deque([(clock(), 0)])  # when, and how many bytes there were by then

    def add(self, more: int) -> None:
        self._bytes += more
        now = self._clock()
        if now - self._samples[-1][0] >= self.SAMPLE_SECONDS:
            self._samples.append((now, self._bytes))

    def bytes_per_second(self) -> float | None:
        """Bytes per second; None as long as it is too early to tell."""
        now = self._clock()
        while len(self._samples) > 1 and self._samples[1][0] <= now - self.WINDOW_SECONDS:
            self._samples.popleft()
        then, before = self._samples[0]
        return (self._bytes - before) / (now - then) if now - then >= self.MIN_SECONDS else None


def format_time_left(seconds: float) -> str:
    """'45 s', '9 min', '2 h 5 min'."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _name(part: Part) -> str:
    assert part.repo is not None
    name = part.repo.rpartition("/")[2]
    return {"autoencoder": f"{name} autoencoder", "text": f"{name} text encoder"}.get(part.kind, name)
