"""Long work in a thread of its own, which tells how far it is and can be given up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from flux2_studio.events import Event, Status
from flux2_studio.models.hub.repositories import ProgressCallback

T = TypeVar("T")


class Cancelled(Exception):
    """The owner wants no more of this run."""


def in_worker_thread(work: Callable[[ProgressCallback], T], cancelled: Callable[[], bool]) -> Generator[Event, None, T]:
    """Run `work` in a thread of its own, yielding what it tells as Status; cancelling ends it at its next word."""
    told: queue.SimpleQueue[Status | None] = queue.SimpleQueue()
    abandoned = threading.Event()

    def progress(text: str, fraction: float | None) -> None:
        if abandoned.is_set() or cancelled():
            raise Cancelled
        told.put(Status(text=text, fraction=fraction))

    with ThreadPoolExecutor(1, thread_name_prefix="flux2-loader") as pool:
        future = pool.submit(work, progress)
        future.add_done_callback(lambda _: told.put(None))
        try:
            while (status := told.get()) is not None:
                yield status
        finally:
            abandoned.set()  # whoever stops listening must not leave a download running
        try:
            return future.result()
        finally:
            # An exception's traceback holds this frame, and the future holds the exception: together they would keep
            # alive whatever was half loaded.
            del future


def raise_if_cancelled(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled
