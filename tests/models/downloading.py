"""What the tests of downloads share: a download in a thread of its own, and what has arrived of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from flux2_studio.checkpoints import GB
from flux2_studio.models.hub.cache import HubCache
from flux2_studio.models.hub.downloads import Downloads
from flux2_studio.models.hub.hub_errors import HubErrorMessages
from flux2_studio.models.hub.transfer import Transfer
from tests.models.fake_hub import FLOW, MB, TOY, FakeHub, etag

ETAG = etag("toy.safetensors", TOY)
LAST = 3 * MB - 1
PATIENCE = 300  # seconds that nothing here takes unless it hangs
HELD = 2 * MB  # bytes after which the hub holds back, where it does


class Enough(Exception):
    pass


def downloads(fake: FakeHub, tmp_path: Path, stretch: int = GB, patience: float = PATIENCE) -> Downloads:
    """As `Hub` makes them, but without pauses before new attempts."""
    cache = HubCache(tmp_path / "cache", lock_timeout=0.05)
    transfer = Transfer(fake.url, cache, timeout=patience, retry_delays=(0.0, 0.0), range_bytes=stretch)
    return Downloads(cache, transfer, HubErrorMessages(fake.url, cache.root), interval=0.02)


def blobs(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--maker--Toy-4B" / "blobs"


def partial(tmp_path: Path, content: bytes | None = None) -> Path:
    """What has arrived of the toy's file; `content` is put there."""
    path = blobs(tmp_path) / f"{ETAG}.incomplete"
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "this never came true"
        time.sleep(0.01)


def arrived(tmp_path: Path) -> int:
    path = partial(tmp_path)
    return path.stat().st_size if path.exists() else 0


def toy(tmp_path: Path) -> bytes:
    return (blobs(tmp_path) / ETAG).read_bytes()


class Waiting:
    """Somebody who waits for a download in a thread of their own. `give_up` makes them leave."""

    def __init__(self, ours: Downloads) -> None:
        self.told: list[tuple[str, float | None]] = []
        self.give_up = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._wait, args=(ours,), daemon=True)
        self._thread.start()

    def _wait(self, ours: Downloads) -> None:
        try:
            ours.download(FLOW, self._progress)
        except BaseException as error:  # noqa: BLE001 -- looked at by the test
            self.error = error

    def _progress(self, text: str, fraction: float | None) -> None:
        self.told.append((text, fraction))
        if self.give_up.is_set():
            raise Enough

    def sees(self, words: str) -> bool:
        return any(words in text for text, _ in list(self.told))

    def end(self) -> BaseException | None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.error
