"""Runs long work in a worker thread, with progress events and cancellation."""

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
    """The run was cancelled by its owner."""


def in_worker_thread(work: Callable[[ProgressCallback], T], cancelled: Callable[[], bool]) -> Generator[Event, None, T]:
    """Runs `work` in a worker thread and yields its progress as `Status` events. Returns its result.

    If `cancelled` returns True, the next progress call of `work` raises `Cancelled`.
    """
    statuses: queue.SimpleQueue[Status | None] = queue.SimpleQueue()
    abandoned = threading.Event()

    def progress(text: str, fraction: float | None) -> None:
        if abandoned.is_set() or cancelled():
            raise Cancelled
        statuses.put(Status(text=text, fraction=fraction))

    with ThreadPoolExecutor(1, thread_name_prefix="flux2-loader") as pool:
        future = pool.submit(work, progress)
        future.add_done_callback(lambda _: statuses.put(None))
        try:
            while (status := statuses.get()) is not None:
                yield status
        finally:
            abandoned.set()  # a consumer that stops early must not leave a download running
        try:
            return future.result()
        finally:
            # Breaks the cycle between this frame, the future and the exception's traceback, which would keep partly
            # loaded weights alive.
            del future


def raise_if_cancelled(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled
