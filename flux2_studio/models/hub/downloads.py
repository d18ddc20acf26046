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
from flux2_studio.models.hub.cache import Cache, RemoteFile
from flux2_studio.models.hub.hub_errors import Refusals, amount, or_a_local_copy
from flux2_studio.models.hub.part_files import picks
from flux2_studio.models.hub.transfer import CHECKING, DOWNLOADING, RETRYING, WAITING, Stopped, Transfer

Progress = Callable[[str, float | None], None]  # what is being done, and how much of it (0..1) where that is known

MARGIN = 500 * MB  # left free on the drive: a full one makes other programs fail
WORDS = {
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
        cache: Cache,
        transfer: Transfer,
        refusals: Refusals,
        free_space: Callable[[Path], int] | None = None,
        interval: float = 0.5,
    ) -> None:
        self._cache = cache
        self._transfer = transfer
        self._refusals = refusals
        self._free_space = free_space or (lambda folder: shutil.disk_usage(folder).free)
        self._interval = interval
        self._running: dict[Part, Running] = {}
        self._lock = threading.Lock()

    def download(self, part: Part, progress: Progress) -> None:
        """Have `part` in the cache. What `progress` raises ends the waiting, and is passed on.

        Raises `DownloadError`.
        """
        progress(f"Downloading {_name(part)}", None)
        running = self._join(part)
        try:
            told: tuple[str, float | None] | None = None
            while not wait([running.ended], self._interval).done:
                told = running.reached().told  # even if it is the same: only when told can `progress` end the waiting
                progress(*told)
            error = running.ended.exception()
            if isinstance(error, DownloadError):
                raise DownloadError(str(error)) from error  # its own one for each of those who wait
            if error is not None:
                raise error
            if running.reached().told != told:
                progress(*running.reached().told)
        finally:
            self._leave(part, running)

    def reached(self, part: Part) -> Reached | None:
        """How far `part` is; None unless somebody in this program is downloading it."""
        with self._lock:
            running = self._running.get(part)
        return running.reached() if running else None

    def check_room(self, what: str, needed: int, or_else: str = "") -> None:
        """Raise `DownloadError` unless there is room for `needed` bytes more, besides what is on its way already."""
        free = self.free()
        if needed and needed + MARGIN > free:
            raise DownloadError(self._refusals.no_room(what, needed, free, MARGIN, or_else))

    def free(self) -> int:
        """Bytes that are free where downloads go."""
        folder = self._cache.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return self._free_space(folder)

    def _join(self, part: Part) -> Running:
        with self._lock:
            running = self._running.get(part)
            if running is None or running.ended.done():
                running = self._running[part] = Running(_name(part))
                threading.Thread(target=self._run, args=(part, running), name="flux2-download", daemon=True).start()
            running.waiting += 1
            return running

    def _leave(self, part: Part, running: Running) -> None:
        with self._lock:
            running.waiting -= 1
            if running.waiting == 0:
                running.stop.set()
                if self._running.get(part) is running:
                    del self._running[part]

    def _run(self, part: Part, running: Running) -> None:
        try:
            self._fetch(part, running)
            running.ended.set_result(None)
        except BaseException as error:  # noqa: BLE001 -- whoever waits gets it
            running.ended.set_exception(error)

    def _fetch(self, part: Part, running: Running) -> None:
        files = []
        for pick in picks(part):
            with self._in_words(part, pick.repo, pick.what):
                found = self._transfer.listing(pick)
            if not found:
                raise DownloadError(self._refusals.missing(part))
            files += found
        running.plan({file: self._cache.arrived(file) for file in files})
        if running.to_come:
            with self._lock:
                everything = {running, *self._running.values()}
            needed = sum(one.to_come for one in everything)
            self.check_room(f"{part.repo}/{part.path}".rstrip("/"), needed, or_a_local_copy(part))
        for file in files:
            with self._in_words(part, file.repo, file.what):
                self._transfer.fetch(file, running.stop, partial(running.report, file))
            running.report(file, DOWNLOADING, file.size)

    @contextmanager
    def _in_words(self, part: Part, repo: str, what: str) -> Iterator[None]:
        """Makes a `DownloadError` of whatever the hub, huggingface_hub, its client or the file system raises."""
        try:
            yield
        except (StudioError, Stopped):
            raise
        except Exception as error:
            raise DownloadError(self._refusals.explain(error, part, repo, what)) from error


@dataclass(frozen=True, kw_only=True)
class Reached:
    """How far a download is.

    done, total: bytes; a total of 0 is not known yet. checked: while what is here is read again, how many bytes of how
    many have been. per_second: bytes, while they come in and as soon as it can be told.
    """

    words: str  # "Downloading FLUX.2-klein-4B text encoder"
    done: int
    total: int
    checked: tuple[int, int] | None = None
    per_second: float | None = None

    @property
    def told(self) -> tuple[str, float | None]:
        """What is being done, in words, and how much of it."""
        if self.checked:
            read, there = self.checked
            return f"{self.words}: {amount(there, read)}", read / max(there, read, 1)
        if not self.total:
            return self.words, None
        text = f"{self.words}: {amount(self.total, self.done)}"
        to_come = self.total - self.done
        if self.per_second and to_come:
            text += f", {self.per_second / MB:.1f} MB/s, {duration(to_come / self.per_second)} left"
        return text, self.done / self.total


class Running:
    """A download on its way. Written by its own thread, read by those who wait."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.waiting = 0  # how many wait for it
        self.stop = threading.Event()
        self.ended: Future[None] = Future()
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._arrived: dict[RemoteFile, int] = {}  # bytes
        self._total = 0
        self._done = 0
        self._checked: tuple[int, int] | None = None  # how much of what is read again has been read
        self._doing = DOWNLOADING
        self._speed: Speed | None = None

    @property
    def to_come(self) -> int:
        """Bytes that are not on disk yet, as far as is known."""
        return self._total - self._done

    def plan(self, arrived: dict[RemoteFile, int]) -> None:
        """The files to fetch, and how much of each is there."""
        with self._lock:
            self._arrived = dict(arrived)
            self._total = sum(file.size for file in arrived)
            self._done = sum(arrived.values())

    def report(self, file: RemoteFile, doing: str, reached: int) -> None:
        with self._lock:
            self._doing = doing
            self._checked = (reached, self._arrived[file]) if doing == CHECKING else None
            if doing == CHECKING:
                return
            new = reached - self._arrived[file]
            self._arrived[file] = reached
            self._done += new
            if doing == DOWNLOADING:
                self._speed = self._speed or Speed(self._clock)
                self._speed.add(max(new, 0))

    def reached(self) -> Reached:
        with self._lock:
            return Reached(
                words=WORDS[self._doing].format(self._name),
                done=self._done,
                total=self._total,
                checked=self._checked,
                per_second=self._speed.per_second() if self._speed and self._doing == DOWNLOADING else None,
            )


class Speed:
    """How fast bytes come in: the mean of the last ten seconds, so that it neither jumps nor lags."""

    WINDOW = 10.0  # seconds
    GRAIN = 0.25  # seconds between two notes
    LEAST = 1.0  # second, before which nothing is known

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bytes = 0
        self._notes = deque([(clock(), 0)])  # when, and how many bytes there were by then

    def add(self, more: int) -> None:
        self._bytes += more
        now = self._clock()
        if now - self._notes[-1][0] >= self.GRAIN:
            self._notes.append((now, self._bytes))

    def per_second(self) -> float | None:
        """Bytes per second; None as long as it is too early to tell."""
        now = self._clock()
        while len(self._notes) > 1 and self._notes[1][0] <= now - self.WINDOW:
            self._notes.popleft()
        then, before = self._notes[0]
        return (self._bytes - before) / (now - then) if now - then >= self.LEAST else None


def duration(seconds: float) -> str:
    """'45 s', '9 min', '2 h 5 min'."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _name(part: Part) -> str:
    assert part.repo is not None
    name = part.repo.rpartition("/")[2]
    return {"autoencoder": f"{name} autoencoder", "text": f"{name} text encoder"}.get(part.kind, name)
