"""GGUF files and their block formats: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K; also F32, F16 and BF16.

Parses the header, and checks every count, size and offset against the file before anything is mapped. Dequantises
blocks in torch, on any device. Format: docs/gguf.md and ggml-common.h of ggml-org/ggml. Out of scope: what the tensors
are for. Other header fields (architecture, tokenizer) are skipped.

A block stores `values_per_block` adjacent values of a row in `bytes_per_block` bytes. In the K formats a block of 256
values consists of sub-blocks with their own small scales, which are multiples of the block's scale.

    blocks: uint8 [n, bytes_per_block] -> float32 [n, values_per_block]
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flux2_studio.engine.weights.quantize import StoredMatrix
from flux2_studio.engine.weights.staged_copy import FileSnapshot, StagedReader, TensorSpan
from flux2_studio.engine.weights.tensor_files import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Shape,
    is_impossible_shape,
    printable_list,
    printable_text,
)
from flux2_studio.errors import WeightsError

GGUF_MAGIC = b"GGUF"
GGUF_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT_BYTES = 32  # of the tensor data, unless the header has another value
MAX_NAME_BYTES = 256  # ggml's tensor names have 64 at most; ComfyUI derives field names from them
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes of scalar header fields by type number; and three type numbers with special handling.
SCALAR_FIELD_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
FIELD_UINT32, FIELD_STRING, FIELD_ARRAY = 4, 8, 9
# ggml's tensor types by number
TENSOR_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16",
}  # fmt: skip


# --- block formats ---


def _float16_at(blocks: Tensor, offset: int) -> Tensor:
    """Read the float16 number at byte `offset` of each block, [n, 1] in float32."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Return the low halves of bytes [..., m], then the high ones: [..., 2, m]."""
    return torch.stack((packed & 15, packed >> 4), -2)


def _unpack_bits(packed: Tensor, bit_width: int) -> Tensor:
    """Split bytes [..., m] into groups of `bit_width` bits, lowest first: [..., m, 8 / bit_width]."""
    shifts = torch.arange(0, 8, bit_width, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts) & (2**bit_width - 1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _float16_at(blocks, 0) * (_nibbles(blocks[:, 2:]).flatten(1).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _float16_at(blocks, 0) * _nibbles(blocks[:, 4:]).flatten(1) + _float16_at(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    fifth = _unpack_bits(blocks[:, 2:6], 1).flatten(1)
    return _float16_at(blocks, 0) * ((_nibbles(blocks[:, 6:]).flatten(1) | fifth << 4).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    fifth = _unpack_bits(blocks[:, 4:8], 1).flatten(1)
    return _float16_at(blocks, 0) * (_nibbles(blocks[:, 8:]).flatten(1) | fifth << 4) + _float16_at(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _float16_at(blocks, 0) * blocks[:, 2:].view(torch.int8)


def _scaled_and_shifted(blocks: Tensor, codes: Tensor) -> Tensor:
    """Dequantise Q4_K and Q5_K: codes [n, 8, 32] times their sub-block's scale, minus its offset.

    Scales and offsets have six bits each, packed into bytes 4..15: four bytes with the first four scales, four with the
    first four offsets, and four with the low halves of the other four of both. The top bits of the latter are in the
    top bits of the first eight bytes.
    """
    first_scales, first_offsets, low = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat((first_scales & 63, (low & 15) | (first_scales >> 6) << 4), 1)
    offsets = torch.cat((first_offsets & 63, (low >> 4) | (first_offsets >> 6) << 4), 1)
    scales, offsets = _float16_at(blocks, 0) * scales, _float16_at(blocks, 2) * offsets
    return (scales[..., None] * codes - offsets[..., None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled_and_shifted(blocks, _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1, 2))


def _q5_k(blocks: Tensor) -> Tensor:
    fifth = _unpack_bits(blocks[:, 16:48], 1).transpose(1, 2)  # bit i of byte j belongs to value j of sub-block i
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1, 2)
    return _scaled_and_shifted(blocks, low | fifth << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).reshape(-1, 2, 4, 32)
    high = _unpack_bits(blocks[:, 128:192].unflatten(1, (2, 32)), 2).transpose(2, 3)
    codes = (low | high << 4).float() - 32
    scales = _float16_at(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return (scales[..., None] * codes.reshape(-1, 16, 16)).flatten(1)


@dataclass(frozen=True)
class BlockFormat:
    values_per_block: int
    bytes_per_block: int
    dequantize: Callable[[Tensor], Tensor]


BLOCK_FORMATS = {
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q5_K": BlockFormat(256, 176, _q5_k),
    "Q6_K": BlockFormat(256, 210, _q6_k),
}


class GGUFMatrix(StoredMatrix):
    """A matrix stored as blocks: uint8 [rows, bytes per row], in the format `type_name`."""

    blocks: Tensor

    def __init__(self, blocks: Tensor, type_name: str) -> None:
        self.type_name = type_name
        self._format = BLOCK_FORMATS[type_name]
        rows, length = blocks.shape
        super().__init__(rows, length // self._format.bytes_per_block * self._format.values_per_block)
        self.register_buffer("blocks", blocks)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        blocks = self.blocks[start:stop].reshape(-1, self._format.bytes_per_block)
        return self._format.dequantize(blocks).reshape(-1, self.cols)


# --- files ---


class GGUFFile:
    """The tensors of a GGUF file, with the interface of `SafetensorsFiles`. Shapes are those of the values.

    Raises `WeightsError` if the file is truncated, damaged, or has unsupported tensor types.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        try:
            self._file = FileSnapshot.take(path)
            with self._file.open() as file:
                self._index(_HeaderReader(file.read(MAX_HEADER_BYTES)))
        except (_GGUFHeaderError, OSError) as error:
            raise WeightsError(
                f"{self.name} is not a whole GGUF file ({printable_text(str(error))}). Download it again."
            ) from error

    def _index(self, header: _HeaderReader) -> None:
        tensors, alignment = header.tensors()
        if unsupported := sorted(
            {kind for _, kind, _ in tensors.values()} - BLOCK_FORMATS.keys() - PLAIN_DTYPES.keys()
        ):
            raise WeightsError(
                f"{self.name} holds {printable_list(unsupported)} tensors; of GGUF's formats "
                f"{', '.join(BLOCK_FORMATS)}, F16, BF16 and F32 are read. Choose the checkpoint's "
                f"Q4_K, Q5_K, Q6_K or Q8_0 file."
            )
        data = _align_up(header.offset, alignment)
        end = data
        for key, (shape, kind, offset) in sorted(tensors.items(), key=lambda item: item[1][2]):
            values, size = (
                (1, PLAIN_DTYPES[kind].itemsize)
                if kind in PLAIN_DTYPES
                else (BLOCK_FORMATS[kind].values_per_block, BLOCK_FORMATS[kind].bytes_per_block)
            )
            if not shape or 0 in shape or is_impossible_shape(shape) or shape[-1] % values:
                raise _GGUFHeaderError(f"{key} has the shape {list(shape)}, which {kind} cannot have")
            # Overlaps would let a small file claim a model of any size; gaps would hide damaged shapes.
            if data + offset != _align_up(end, alignment):
                raise _GGUFHeaderError(f"{key} begins where it should not")
            end = data + offset + math.prod(shape) // values * size
            if end > self._file.size:
                raise _GGUFHeaderError(f"it ends inside {key}")
            self.shapes[key], self.dtypes[key] = shape, kind
            self._offsets[key] = data + offset
        if self._file.size not in (end, _align_up(end, alignment)):
            raise _GGUFHeaderError("there is more or less in it than its header says")

    def meta_tensor(self, key: str) -> Tensor:
        """Return a tensor on meta with the dtype and shape that `read` returns."""
        shape, kind = self.shapes[key], self.dtypes[key]
        if kind in PLAIN_DTYPES:
            return torch.empty(shape, dtype=PLAIN_DTYPES[kind], device="meta")
        block = BLOCK_FORMATS[kind]
        return torch.empty(
            *shape[:-1], shape[-1] // block.values_per_block * block.bytes_per_block, dtype=torch.uint8, device="meta"
        )

    def spans(self, keys: Iterable[str]) -> dict[str, TensorSpan]:
        """Return where each of `keys` lies, for a `StagedReader`."""
        return {key: TensorSpan(self._file, self._offsets[key], self.meta_tensor(key)) for key in keys}

    def read(self, keys: Iterable[str]) -> Generator[tuple[str, Tensor], None, None]:
        """Yield (key, tensor) on the CPU for each of `keys`: plain values in their shape, blocks as uint8 [rows,
        bytes per row].
        """
        return StagedReader(torch.device("cpu")).read(self.spans(keys))

    def read_mapped(self, keys: Iterable[str]) -> Generator[tuple[str, Tensor], None, None]:
        """Same as `read`, but tensors are views of the mapped file, see `SafetensorsFiles.read_mapped`."""
        with self._file.open():
            data = np.memmap(self.path, np.uint8, mode="c")
        for key, span in self.spans(keys).items():
            tensor = torch.from_numpy(data[span.start : span.start + span.size])
            yield key, tensor.view(span.meta_tensor.dtype).reshape(span.meta_tensor.shape)


class _GGUFHeaderError(ValueError):
    """What is wrong with a header, worded as the end of a sentence about the file."""


class _HeaderReader:
    """Parses a header. It never reads beyond the given bytes, so it terminates on any input."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.offset = 0

    def tensors(self) -> tuple[dict[str, tuple[Shape, str, int]], int]:
        """Return shape, type and offset of every tensor, and the alignment of the data."""
        if self._read_bytes(4) != GGUF_MAGIC:
            raise _GGUFHeaderError("it does not begin as one")
        if (version := self._read_number("<I")) not in GGUF_VERSIONS:
            raise _GGUFHeaderError(f"its version is {version}; 2 and 3 are read")
        count, fields = self._read_number("<Q"), self._read_number("<Q")
        if max(count, fields) > MAX_TENSORS:
            raise _GGUFHeaderError(f"it is said to have {count} tensors and {fields} other fields")
        alignment = DEFAULT_ALIGNMENT_BYTES
        for _ in range(fields):
            name, kind = self._read_string(), self._read_number("<I")
            if name == "general.alignment" and kind == FIELD_UINT32:
                alignment = self._read_number("<I")
            else:
                self._skip_field(kind)
        if not alignment or alignment % 8:
            raise _GGUFHeaderError(f"its data are aligned to {alignment} bytes")
        tensor_infos: dict[str, tuple[Shape, str, int]] = {}
        for _ in range(count):
            name, dimensions = self._read_string(), self._read_number("<I")
            if name in tensor_infos or dimensions > 4:
                raise _GGUFHeaderError(f"{name} is there twice, or has {dimensions} dimensions")
            shape = tuple(self._read_number("<Q") for _ in range(dimensions))[::-1]
            kind = self._read_number("<I")
            tensor_infos[name] = (shape, TENSOR_TYPE_NAMES.get(kind, f"type {kind}"), self._read_number("<Q"))
        return tensor_infos, alignment

    def _skip_field(self, kind: int) -> None:
        if kind == FIELD_STRING:
            self._read_bytes(self._read_number("<Q"))
        elif kind in SCALAR_FIELD_BYTES:
            self._read_bytes(SCALAR_FIELD_BYTES[kind])
        elif kind == FIELD_ARRAY:
            inner, count = self._read_number("<I"), self._read_number("<Q")
            if inner in SCALAR_FIELD_BYTES:
                self._read_bytes(count * SCALAR_FIELD_BYTES[inner])
            elif inner == FIELD_STRING:
                for _ in range(count):
                    self._read_bytes(self._read_number("<Q"))
            else:
                raise _GGUFHeaderError(f"its header has a list of type {inner}")
        else:
            raise _GGUFHeaderError(f"its header has a field of type {kind}")

    def _read_string(self) -> str:
        if (length := self._read_number("<Q")) > MAX_NAME_BYTES:
            raise _GGUFHeaderError(f"its header has a name of {length} bytes")
        try:
            return self._read_bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _GGUFHeaderError("its header has a name that is no text") from error

    def _read_number(self, layout: str) -> int:
        number: int = struct.unpack(layout, self._read_bytes(struct.calcsize(layout)))[0]
        return number

    def _read_bytes(self, count: int) -> bytes:
        if count > len(self._data) - self.offset:
            raise _GGUFHeaderError("its header ends too early or is far too long")
        self.offset += count
        return self._data[self.offset - count : self.offset]


def _align_up(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
