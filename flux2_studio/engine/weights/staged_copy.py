"""Bytes of weight files to a device: several reads at a time, through a small ring of staging buffers.

Does: what safetensors' own reader leaves lying idle. Each part of a file is read by a thread of its own into one of a
few buffers, pinned where the device is a GPU, and copied from there in the order of the file, so that disk, processor
and bus work at the same time. Memory beside the tensors themselves is that of the ring. A file that is no longer what
it was when its header was read, or that ends early, is an error; once read, it may become anything.
Does not know: formats of files; what the tensors are for. Files that nobody writes over may be mapped instead
(`tensor_files.py`), where nothing is to be moved.

    part: a run of bytes of one file, at most a buffer long, with the tensors or pieces of tensors that lie in it
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

# As many reads at a time as keep an NVMe disk busy, each long enough for its start not to count: 128 MiB together.
STAGING_BUFFERS = 8
STAGING_BUFFER_BYTES = 2**24
MAX_READ_GAP_BYTES = 2**12  # bytes between two tensors that are read along rather than skipped; GGUF fills up to 32


@dataclass(frozen=True)
class FileSnapshot:
    """A file as it was when its header was read."""

    path: Path
    stat_key: tuple[int, ...]  # inode, length, time of the last change

    @classmethod
    def take(cls, path: Path) -> Self:
        """The file at `path` as it is now. Raises `OSError`."""
        return cls(path, _stat_key(path.stat()))

    @property
    def size(self) -> int:
        return self.stat_key[1]

    @contextmanager
    def open(self) -> Iterator[FileIO]:
        """The file, unbuffered. Raises `WeightsError` if it is another one by now, or cannot be read in the block."""
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


def _stat_key(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor lies: the bytes of `file` from `start` on. meta_tensor: the tensor without its values (on
    meta)."""

    file: FileSnapshot
    start: int
    meta_tensor: Tensor

    @property
    def size(self) -> int:
        return self.meta_tensor.numel() * self.meta_tensor.element_size()


@dataclass
class _TensorPiece:
    key: str
    tensor_offset: int  # in the tensor
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

    buffer_count: how many reads go on at a time, each with a thread and a buffer of `buffer_bytes` bytes. The buffers
    are pinned where the device is a GPU, and gone when `read` has ended.
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
        """(key, tensor on the device) for each of `spans`, in the order of the files.

        on_bytes_read: called with the bytes of each part that has come; what it raises ends the reading and is passed
        on. Close the iterator where it is not read to its end: its threads end with it. On a GPU the copies are queued
        on the stream that is current at each step. Raises `WeightsError`.
        """
        parts = list(_file_ranges(spans, self.buffer_bytes))
        length = max((part.size for part in parts), default=0)
        pinned = self.device.type == "cuda"
        ring = [
            torch.empty(length, dtype=torch.uint8, pin_memory=pinned) for _ in range(min(self.buffer_count, len(parts)))
        ]
        arriving: dict[str, Tensor] = {}
        waiting = iter(parts)
        reading: deque[tuple[_FileRange, Tensor, Future[None]]] = deque()
        threads = ThreadPoolExecutor(max(1, len(ring)), thread_name_prefix="weights")
        try:
            for buffer, part in zip(ring, waiting, strict=False):
                reading.append((part, buffer, threads.submit(_read_into_buffer, part, buffer, None)))
            while reading:
                part, buffer, filled = reading.popleft()
                filled.result()
                whole = self._copy(part, buffer, spans, arriving)
                if (following := next(waiting, None)) is not None:
                    # Its thread waits until the copies have left the buffer; ours goes on.
                    copied = torch.cuda.current_stream(self.device).record_event() if pinned else None
                    reading.append((following, buffer, threads.submit(_read_into_buffer, following, buffer, copied)))
                on_bytes_read(sum(piece.size for piece in part.pieces))
                for key in whole:
                    like = spans[key].meta_tensor
                    yield key, arriving.pop(key).view(like.dtype).reshape(like.shape)
        finally:
            threads.shutdown(cancel_futures=True)

    def _copy(
        self, part: _FileRange, buffer: Tensor, spans: Mapping[str, TensorSpan], arriving: dict[str, Tensor]
    ) -> list[str]:
        """Copy a part's bytes to the tensors they belong to; the keys of those that are whole now."""
        whole = []
        for piece in part.pieces:
            size = spans[piece.key].size
            if piece.tensor_offset == 0:
                arriving[piece.key] = torch.empty(size, dtype=torch.uint8, device=self.device)
            target = arriving[piece.key][piece.tensor_offset : piece.tensor_offset + piece.size]
            target.copy_(buffer[piece.range_offset : piece.range_offset + piece.size], non_blocking=True)
            if piece.tensor_offset + piece.size == size:
                whole.append(piece.key)
        return whole


def _file_ranges(spans: Mapping[str, TensorSpan], max_bytes: int) -> Iterable[_FileRange]:
    """The bytes of all `spans` in parts of at most `buffer_bytes`, file by file and front to back."""
    part: _FileRange | None = None
    for key, span in sorted(spans.items(), key=lambda item: (item[1].file.path, item[1].start)):
        at = 0
        while True:
            start = span.start + at
            if (
                part is None
                or part.file != span.file
                or start - part.stop > MAX_READ_GAP_BYTES
                or start - part.start >= max_bytes
            ):
                if part is not None:
                    yield part
                part = _FileRange(span.file, start, start)
            count = min(span.size - at, part.start + max_bytes - start)
            part.pieces.append(_TensorPiece(key, at, start - part.start, count))
            part.stop = start + count
            at += count
            if at == span.size:
                break
    if part is not None:
        yield part


def _read_into_buffer(part: _FileRange, buffer: Tensor, buffer_free: torch.cuda.Event | None) -> None:
    """Read a part into `buffer` as soon as that is `buffer_free`. Runs in a thread of its own, which holds no lock."""
    if buffer_free is not None:
        buffer_free.synchronize()
    view = buffer.numpy().data[: part.size]
    with part.file.open() as file:
        file.seek(part.start)
        while view:
            count = file.readinto(view)
            if not count:
                raise part.file.changed_error()
            view = view[count:]
