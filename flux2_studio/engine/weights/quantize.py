"""Weights that stay small: kept in memory as they are stored, restored one layer at a time.

Does: fp8 and int8 with one scale or one per row, NVFP4 (GGUF's blocks are in `gguf.py`), and bfloat16 where it is not
computed in; a linear layer over such weights, which multiplies 8 bits as they are where the device does that quickly;
making fp8 or int8 of plain weights.
Does not know: how files spell their scales (`formats.py`), which layers of which model are meant (`loading.py`).

    codes: what is stored. values [rows, cols]: what they stand for, as a plain file would hold them; rows are a linear
    layer's outputs, cols its inputs.

Pitfalls: values are computed in float32 and rounded once, so that a layer restored on the fly equals one restored at
load bit for bit. NVFP4 packs the first of two values into the *high* half of a byte, in Black Forest Labs' and
ComfyUI's files; other makers' files have it in the low half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EightBitKind = Literal["fp8", "int8"]
FP8_MAX = 448.0  # of float8_e4m3fn
INT8_MAX = 127.0
EIGHT_BIT_ALIGNMENT = 16  # of which both sides of a matrix must be multiples for products in 8 bits
COMPILED_CHUNK_OUTPUTS = (
    2**13
)  # outputs of a compiled product at a time: int32 and float32 ones take a multiple of the result's
MAX_DEQUANTIZED_ROWS = 16  # rows of inputs that the kernels for int8 products do not take, and that gain nothing by fp8
# Values restored at a time, 64 MiB of them in float32: the largest layers would take over a gigabyte at once.
CHUNK_VALUES = 2**24
NVFP4_TILE_ROWS = 128  # rows of an NVFP4 scale tile, so chunks begin at multiples of it
# Values that a CPU restores at a time: 8 MiB in float32, which its caches hold until they are multiplied. Restoring all
# of a layer first takes as long as a product with a hundred tokens; this way it is not felt (benchmarks/NOTES.md).
CPU_CHUNK_VALUES = 2**21


class StoredMatrix(nn.Module):
    """One matrix as it is stored. Its tensors are buffers; none has a gradient.

    `.to(device)` moves them. `.to(dtype)` means the precision of computation and leaves them as they are.
    """

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.rows = rows
        self.cols = cols

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop in float32, [stop - start, cols]; start is a multiple of `NVFP4_TILE_ROWS`."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """All values, [rows, cols], computed in float32 and rounded to `dtype`, a part at a time."""
        parts = list(_row_chunks(self.rows, self.cols))
        if len(parts) == 1:
            return self.dequantize_rows(0, self.rows).to(dtype)
        device = next(self.buffers()).device
        out = torch.empty(self.rows, self.cols, dtype=dtype, device=device)
        for start, stop in parts:
            out[start:stop] = self.dequantize_rows(start, stop)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # As bytes the tensors pass through a change of dtype unharmed; codes would grow, scales be rounded.
        for name, tensor in self.named_buffers():
            setattr(self, name, fn(tensor.view(torch.uint8)).view(tensor.dtype))
        return self


class BFloat16Matrix(StoredMatrix):
    """value = code. codes: [rows, cols] in bfloat16, for processors that are slow in it and compute in float32."""

    codes: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__(*codes.shape)
        self.register_buffer("codes", codes)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        return self.codes[start:stop].float()


class ScaledMatrix(StoredMatrix):
    """value = code * scale.

    codes: [rows, cols] in float8_e4m3fn or int8. scale: float32, one number or one for each row.
    """

    codes: Tensor
    scale: Tensor  # [1, 1] or [rows, 1]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__(*codes.shape)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.float().reshape(-1, 1))

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        scale = self.scale if len(self.scale) == 1 else self.scale[start:stop]
        return self.codes[start:stop].float() * scale


class NVFP4Matrix(StoredMatrix):
    """value = e2m1 code * the scale of its block of 16 in a row * the matrix's scale.

    codes: uint8 [rows, cols / 2], two to a byte, the first in the high half. block_scales: float8_e4m3fn in tiles of
    128 rows x 4 blocks, as cuBLAS wants them ("1D block scaling factors layout" in its manual): the tiles of a row of
    tiles one after the other, in each the scale of row r and block b at byte 16 * (r % 32) + 4 * (r // 32) + b. The
    last tiles are filled up. scale: float32, one number.
    """

    codes: Tensor
    block_scales: Tensor  # [row tiles, block tiles, 32, 4, 4]
    scale: Tensor  # [1]

    def __init__(self, codes: Tensor, block_scales: Tensor, scale: Tensor) -> None:
        rows, packed = codes.shape
        super().__init__(rows, 2 * packed)
        tiles = block_scales.reshape(-(-rows // NVFP4_TILE_ROWS), -1, 32, 4, 4).view(torch.float8_e4m3fn)
        self.register_buffer("codes", codes)
        self.register_buffer("block_scales", tiles)
        self.register_buffer("scale", scale.float().reshape(1))

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        tiles = self.block_scales[start // NVFP4_TILE_ROWS : -(-stop // NVFP4_TILE_ROWS)].float()
        scales = tiles.permute(0, 3, 2, 1, 4).flatten(3).flatten(0, 2)[: stop - start, : self.cols // 16]
        bytes_ = self.codes[start:stop]
        codes = torch.stack((bytes_ >> 4, bytes_ & 15), -1).flatten(1)
        # s ee m as s 00ee m00 is an e4m3 number, 64 times too small: the exponents' biases are 1 and 7
        small = ((codes & 8) << 4 | (codes & 7) << 2).view(torch.float8_e4m3fn).float()
        return (small.unflatten(1, (-1, 16)) * (scales * (64 * self.scale))[..., None]).flatten(1)

    @staticmethod
    def block_scale_count(rows: int, cols: int) -> int:
        """How many block scales a matrix of [rows, cols] has, with those that fill up the tiles."""
        return -(-rows // NVFP4_TILE_ROWS) * NVFP4_TILE_ROWS * -(-cols // 64) * 4


class QuantizedLinear(nn.Module):
    """A linear layer without bias over stored matrices, one under the other (q, k, v from three tensors of a file).

    allow_int8_activations: whether its inputs may be brought to int8, which is for values of like sizes: language
    models have a few that are a thousand times the others, and would lose the rest.
    """

    allow_int8_activations = False

    def __init__(self, *parts: StoredMatrix) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.in_features = parts[0].cols
        self.out_features = sum(part.rows for part in parts)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out_features, in_features], as `nn.Linear` would hold it."""
        weights = [part.dequantize(dtype) for part in self._stored_matrices]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    @property
    def matmul_kind(self) -> EightBitKind | None:
        """As what the codes can be multiplied as they are: all of one kind, with sides that the kernels take."""
        if self.in_features % EIGHT_BIT_ALIGNMENT or any(
            part.rows % EIGHT_BIT_ALIGNMENT for part in self._stored_matrices
        ):
            return None
        kinds = {part.codes.dtype if isinstance(part, ScaledMatrix) else None for part in self._stored_matrices}
        return "fp8" if kinds == {torch.float8_e4m3fn} else "int8" if kinds == {torch.int8} else None

    def multiply_8bit(self, x: Tensor, kind: EightBitKind) -> Tensor:
        """x [..., in_features], brought to 8 bits with a scale for each row, times the codes: [..., out_features]."""
        rows = x.flatten(0, -2)
        # Not `is_compiling`, which is True in all threads while any of them compiles.
        if torch.compiler.is_dynamo_compiling():  # makes one kernel of what would be written and read several times
            codes, scale = quantize_rows(rows, kind)
            outs = [
                _multiply_8bit(codes, scale, part, kind, start, stop).to(x.dtype)
                for part in self._stored_matrices
                for start, stop in _row_chunks(part.rows, 1, COMPILED_CHUNK_OUTPUTS)
            ]
            return (outs[0] if len(outs) == 1 else torch.cat(outs, -1)).unflatten(0, x.shape[:-1])
        small = quantize(rows, kind)
        out = x.new_empty(len(rows), self.out_features)
        first = 0
        for part in self._stored_matrices:
            for start, stop in _row_chunks(part.rows, len(rows)):
                out[:, first + start : first + stop] = _multiply_8bit(small.codes, small.scale, part, kind, start, stop)
            first += part.rows
        return out.unflatten(0, x.shape[:-1])

    def multiply_by_chunks(self, x: Tensor) -> Tensor:
        """x [..., in_features] times the weight, so many rows of which are restored at a time: [..., out_features]."""
        rows = x.reshape(-1, self.in_features)
        out = x.new_empty(len(rows), self.out_features)
        first = 0
        for part in self._stored_matrices:
            for start, stop in _row_chunks(part.rows, part.cols, CPU_CHUNK_VALUES):
                out[:, first + start : first + stop] = F.linear(rows, part.dequantize_rows(start, stop).to(x.dtype))
            first += part.rows
        return out.reshape(*x.shape[:-1], self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        kind = self.matmul_kind if x.numel() > MAX_DEQUANTIZED_ROWS * self.in_features else None
        if kind is not None and (kind == "fp8" or self.allow_int8_activations) and has_8bit_matmul(x.device, kind):
            return self.multiply_8bit(x, kind)
        if x.device.type == "cpu":
            return self.multiply_by_chunks(x)
        return F.linear(x, self.dequantize(x.dtype))

    @property
    def _stored_matrices(self) -> list[StoredMatrix]:
        return [part for part in self.parts if isinstance(part, StoredMatrix)]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _multiply_8bit(
    codes: Tensor, scale: Tensor, part: StoredMatrix, kind: EightBitKind, start: int, stop: int
) -> Tensor:
    """Rows of 8 bits [n, cols] with their scales [n, 1], times rows start..stop of `part`: [n, stop - start]."""
    assert isinstance(part, ScaledMatrix)
    matrix = part.codes[start:stop].t()
    of_outputs = part.scale if len(part.scale) == 1 else part.scale[start:stop]
    columns = of_outputs.t().expand(1, stop - start)
    if kind == "int8":
        # On a processor without VNNI, torch._int_mm adds pairs of products in 16 bits, which overflow.
        product = torch._int_mm(codes, matrix) if codes.is_cuda else codes.int() @ matrix.int()
        return product.float() * scale * columns
    # bfloat16 is the only result that the row-wise kernels give
    return torch._scaled_mm(codes, matrix, scale_a=scale, scale_b=columns.contiguous(), out_dtype=torch.bfloat16)


class StoredEmbedding(nn.Module):
    """An embedding whose rows are held in bfloat16 and looked up in `dtype`. head: the same table as a linear layer,
    for models whose head it is."""

    def __init__(self, rows: BFloat16Matrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = QuantizedLinear(rows)
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.head.parts[0]
        assert isinstance(rows, BFloat16Matrix)
        return rows.codes[ids].to(self._dtype)


def has_8bit_matmul(device: torch.device, kind: EightBitKind) -> bool:
    """Whether products of `kind` are the fastest that `device` has for such weights: NVIDIA's fp8 from compute
    capability 8.9 on; int8 from 7.5 on, where there is no fp8: it is the coarser of the two. Processors are not known
    to: torch's int8 product runs at a twentieth of float32's rate without VNNI, and with it was not measured yet."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability >= (8, 9) if kind == "fp8" else (7, 5) <= capability < (8, 9)


def quantize_rows(values: Tensor, kind: EightBitKind) -> tuple[Tensor, Tensor]:
    """Codes [rows, cols] and scales [rows, 1] of values [rows, cols], see `quantize`. Written as one expression: a
    compiler makes one kernel of it and what precedes it."""
    largest = INT8_MAX if kind == "int8" else FP8_MAX
    values = values.float()
    scale = values.abs().amax(1, keepdim=True) / largest
    scaled = (values / scale.where(scale > 0, torch.ones_like(scale))).clamp(-largest, largest)
    return (scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)), scale


def quantize(weight: Tensor, kind: EightBitKind) -> ScaledMatrix:
    """`weight` [rows, cols] in 8 bits, where it lies; each row's largest magnitude becomes the largest code.

    int8 (symmetric): no value errs by more than 1/254 of its row's largest. fp8 (float8_e4m3fn): by more than 1/16 of
    itself, or of 2^-6/448 of its row's largest where that is more. Not-a-number and infinity stay visible: a row that
    holds one is restored as not-a-number.
    """
    rows, cols = weight.shape
    codes = torch.empty(rows, cols, dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(rows, 1, device=weight.device)
    for start, stop in _row_chunks(rows, cols):
        codes[start:stop], scale[start:stop] = quantize_rows(weight[start:stop], kind)
    return ScaledMatrix(codes, scale)


def _row_chunks(rows: int, cols: int, size: int = CHUNK_VALUES) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of rows that hold about `size` values each."""
    step = max(1, size // cols // NVFP4_TILE_ROWS) * NVFP4_TILE_ROWS
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
