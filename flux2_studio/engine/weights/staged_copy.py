"""Copies tensors from weight files to a device: parallel reads through a small ring of staging buffers.

Faster than safetensors' own reader: each range of a file is read by its own thread into one of a few buffers, pinned if
the device is a GPU, and copied from there in file order, so disk, processor and bus work in parallel. Extra memory is
that of the ring only. A file that has changed since its header was read, or that ends early, is an error; after
reading, it may change. Out of scope: file formats, and what the tensors are for. Files that nobody overwrites may be
mapped instead (`tensor_files.py`) if the tensors stay in host memory.

    range: bytes of one file, at most one buffer long, with the tensors or pieces of tensors in it
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from flux2_studio.errors import WeightsError

# Enough parallel reads to keep an NVMe disk busy, each long enough to hide its latency: 128 MiB together.
STAGING_BUFFERS = 8
STAGING_BUFFER_BYTES = 2**24
MAX_READ_GAP_BYTES = 2**12  # a gap between tensors up to this is read, not skipped; GGUF pads to 32


@dataclass(frozen=True)
class FileSnapshot:
    """A file as it was when its header was read."""

    path: Path
    stat_key: tuple[int, ...]  # inode, size, modification time in ns

    @classmethod
    def take(cls, path: Path) -> Self:
        """Take a snapshot of the file at `path`. Raises `OSError`."""
        return cls(path, _stat_key(path.stat()))

    @property
    def size(self) -> int:
        return self.stat_key[1]

    @contextmanager
    def open(self) -> Iterator[FileIO]:
        """Open the file, unbuffered. Raises `WeightsError` if it has changed, or if reading in the block fails."""
        try:
            with FileIO(self.path) as file:
                if _stat_key(os.fstat(file.fileno())) != self.stat_key:
                    raise self.changed_error()
                yield file
        except OSError as error:
            raise WeightsError(
                f"{self.path.name} could not be read ({error.strerror or error}). Check the disk, or download it again."
            ) from error

    def changed_error(self) -> WeightsError:
        return WeightsError(f"{self.path.name} has changed since it was opened. Wait until it is whole and try again.")


def _stat_key(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor lies: bytes of `file` from `start` on. meta_tensor: its dtype and shape, on meta."""

    file: FileSnapshot
    start: int
    meta_tensor: Tensor

    @property
    def size(self) -> int:
        return self.meta_tensor.numel() * self.meta_tensor.element_size()


@dataclass
class _TensorPiece:
    key: str
    tensor_offset: int
    range_offset: int
    size: int


@dataclass
class _FileRange:
    file: FileSnapshot
    start: int
    stop: int
    pieces: list[_TensorPiece] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.stop - self.start


class StagedReader:
    """Reads tensors to `device`.

    buffer_count: number of parallel reads, each with a thread and a buffer of `buffer_bytes` bytes. The buffers are
    pinned if the device is a GPU, and freed when `read` ends.
    """

    def __init__(
        self, device: torch.device, *, buffer_count: int = STAGING_BUFFERS, buffer_bytes: int = STAGING_BUFFER_BYTES
    ) -> None:
        if buffer_count < 1 or buffer_bytes < 1:
            raise ValueError("a reader needs at least one buffer of at least one byte")
        self.device = device
        self.buffer_count = buffer_count
        self.buffer_bytes = buffer_bytes

    def read(
        self, spans: Mapping[str, TensorSpan], on_bytes_read: Callable[[int], None] = lambda size: None
    ) -> Generator[tuple[str, Tensor], None, None]:
        """Yield (key, tensor on the device) for each of `spans`, in file order.

        on_bytes_read: called with the size of each range after it was read; an exception that it raises aborts the read
        and is passed on. Close the iterator if you stop early, which ends its threads. On a GPU the copies are queued
        on the stream that is current at each step. Raises `WeightsError`.
        """
        ranges = list(_file_ranges(spans, self.buffer_bytes))
        buffer_length = max((file_range.size for file_range in ranges), default=0)
        pinned = self.device.type == "cuda"
        ring = [
            torch.empty(buffer_length, dtype=torch.uint8, pin_memory=pinned)
            for _ in range(min(self.buffer_count, len(ranges)))
        ]
        incomplete: dict[str, Tensor] = {}
        remaining = iter(ranges)
        reads: deque[tuple[_FileRange, Tensor, Future[None]]] = deque()
        threads = ThreadPoolExecutor(max(1, len(ring)), thread_name_prefix="weights")
        try:
            for buffer, file_range in zip(ring, remaining, strict=False):
                reads.append((file_range, buffer, threads.submit(_read_into_buffer, file_range, buffer, None)))
            while reads:
                file_range, buffer, read_done = reads.popleft()
                read_done.result()
                complete_keys = self._copy(file_range, buffer, spans, incomplete)
                if (next_range := next(remaining, None)) is not None:
                    # The reading thread waits until the copies from the buffer are done; this thread continues.
                    copied = torch.cuda.current_stream(self.device).record_event() if pinned else None
                    reads.append((next_range, buffer, threads.submit(_read_into_buffer, next_range, buffer, copied)))
                on_bytes_read(sum(piece.size for piece in file_range.pieces))
                for key in complete_keys:
                    meta_tensor = spans[key].meta_tensor
                    yield key, incomplete.pop(key).view(meta_tensor.dtype).reshape(meta_tensor.shape)
        finally:
            threads.shutdown(cancel_futures=True)

    def _copy(
        self, file_range: _FileRange, buffer: Tensor, spans: Mapping[str, TensorSpan], incomplete: dict[str, Tensor]
    ) -> list[str]:
        """Copy a range's bytes to their tensors. Returns the keys of tensors that are now complete."""
        complete_keys = []
        for piece in file_range.pieces:
            size = spans[piece.key].size
            if piece.tensor_offset == 0:
                incomplete[piece.key] = torch.empty(size, dtype=torch.uint8, device=self.device)
            target = incomplete[piece.key][piece.tensor_offset : piece.tensor_offset + piece.size]
            target.copy_(buffer[piece.range_offset : piece.range_offset + piece.size], non_blocking=True)
            if piece.tensor_offset + piece.size == size:
                complete_keys.append(piece.key)
        return complete_keys


def _file_ranges(spans: Mapping[str, TensorSpan], max_bytes: int) -> Iterable[_FileRange]:
    """Split the bytes of all `spans` into ranges of at most `max_bytes`, file by file and front to back."""
    file_range: _FileRange | None = None
    for key, span in sorted(spans.items(), key=lambda item: (item[1].file.path, item[1].start)):
        offset = 0
        while True:
            start = span.start + offset
            if (
                file_range is None
                or file_range.file != span.file
                or start - file_range.stop > MAX_READ_GAP_BYTES
                or start - file_range.start >= max_bytes
            ):
                if file_range is not None:
                    yield file_range
                file_range = _FileRange(span.file, start, start)
            count = min(span.size - offset, file_range.start + max_bytes - start)
            file_range.pieces.append(_TensorPiece(key, offset, start - file_range.start, count))
            file_range.stop = start + count
            offset += count
            if offset == span.size:
                break
    if file_range is not None:
        yield file_range


def _read_into_buffer(file_range: _FileRange, buffer: Tensor, buffer_free: torch.cuda.Event | None) -> None:
    """Read a range into `buffer` once `buffer_free` has completed. Runs in a thread of its own; reading releases the
    GIL.
    """
    if buffer_free is not None:
        buffer_free.synchronize()
    view = buffer.numpy().data[: file_range.size]
    with file_range.file.open() as file:
        file.seek(file_range.start)
        while view:
            count = file.readinto(view)
            if not count:
                raise file_range.file.changed_error()
            view = view[count:]
