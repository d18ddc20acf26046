"""Quantised weights: kept in memory as stored, dequantised one layer at a time.

Covers fp8 and int8 with one scale or one per row, NVFP4 (GGUF's blocks are in `gguf.py`), and bfloat16 on devices that
do not compute in it. Includes a linear layer over such weights, which multiplies in 8 bits directly if the device does
that fast, and quantisation of plain weights to fp8 or int8. Out of scope: how files name their scales (`formats.py`),
which layers of a model are quantised (`loading.py`).

    codes: what is stored. values [rows, cols]: what they stand for, as a plain file would hold them; rows are a linear
    layer's outputs, cols its inputs.

Pitfalls: values are computed in float32 and rounded once, so that a layer dequantised on the fly equals one dequantised
at load bit for bit. In Black Forest Labs' and ComfyUI's files, NVFP4 packs the first of two values into the *high* half
of a byte; other makers' files use the low half.
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
EIGHT_BIT_ALIGNMENT = 16  # 8-bit matmuls need matrix sides that are multiples of this
# Outputs per chunk of a compiled 8-bit matmul: its int32 and float32 intermediates take a multiple of the result.
COMPILED_CHUNK_OUTPUTS = 2**13
MAX_DEQUANTIZED_ROWS = 16  # up to this many input rows, int8 kernels do not apply and fp8 gains nothing
# Values dequantised at a time, 64 MiB in float32: the largest layers would take over a gigabyte at once.
CHUNK_VALUES = 2**24
NVFP4_TILE_ROWS = 128  # rows of an NVFP4 scale tile; chunks start at multiples of it
# Values that a CPU dequantises at a time: 8 MiB in float32, which stay in its caches until they are multiplied.
# Dequantising a full layer first takes as long as a matmul with a hundred tokens; in chunks the cost is negligible
# (benchmarks/NOTES.md).
CPU_CHUNK_VALUES = 2**21


class StoredMatrix(nn.Module):
    """One matrix as stored. Its tensors are buffers without gradients.

    `.to(device)` moves them. `.to(dtype)` does not change them, because it means the compute dtype.
    """

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.rows = rows
        self.cols = cols

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Return rows start..stop in float32, [stop - start, cols]; start is a multiple of `NVFP4_TILE_ROWS`."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return all values, [rows, cols], computed in float32 and rounded to `dtype`, one chunk at a time."""
        parts = list(_row_chunks(self.rows, self.cols))
        if len(parts) == 1:
            return self.dequantize_rows(0, self.rows).to(dtype)
        device = next(self.buffers()).device
        out = torch.empty(self.rows, self.cols, dtype=dtype, device=device)
        for start, stop in parts:
            out[start:stop] = self.dequantize_rows(start, stop)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # View as bytes, which a change of dtype leaves alone. Otherwise codes would grow and scales be rounded.
        for name, tensor in self.named_buffers():
            setattr(self, name, fn(tensor.view(torch.uint8)).view(tensor.dtype))
        return self


class BFloat16Matrix(StoredMatrix):
    """value = code. codes: [rows, cols] in bfloat16, for processors that are slow in bfloat16 and compute in
    float32.
    """

    codes: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__(*codes.shape)
        self.register_buffer("codes", codes)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        return self.codes[start:stop].float()


class ScaledMatrix(StoredMatrix):
    """value = code * scale.

    codes: [rows, cols] in float8_e4m3fn or int8. scale: float32, one number or one per row.
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

    codes: uint8 [rows, cols / 2], two per byte, the first in the high half. block_scales: float8_e4m3fn in tiles of 128
    rows x 4 blocks, as in cuBLAS ("1D block scaling factors layout" in its manual). Tiles are ordered row by row; in
    each, the scale of row r and block b is at byte 16 * (r % 32) + 4 * (r // 32) + b. The last tiles are padded. scale:
    float32, one number.
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
        # bits s ee m placed as s 00ee m00 make an e4m3 number 64 times too small: the exponent biases are 1 and 7
        e2m1_values = ((codes & 8) << 4 | (codes & 7) << 2).view(torch.float8_e4m3fn).float()
        return (e2m1_values.unflatten(1, (-1, 16)) * (scales * (64 * self.scale))[..., None]).flatten(1)

    @staticmethod
    def block_scale_count(rows: int, cols: int) -> int:
        """Return how many block scales a matrix of [rows, cols] has, including the padding of tiles."""
        return -(-rows // NVFP4_TILE_ROWS) * NVFP4_TILE_ROWS * -(-cols // 64) * 4


class QuantizedLinear(nn.Module):
    """A linear layer without bias over stored matrices, stacked along rows (q, k, v from three tensors of a file).

    allow_int8_activations: whether inputs may be quantised to int8. That suits inputs of similar magnitudes. Language
    models have a few values a thousand times larger than the others, which int8 would round away.
    """

    allow_int8_activations = False

    def __init__(self, *parts: StoredMatrix) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.in_features = parts[0].cols
        self.out_features = sum(part.rows for part in parts)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out_features, in_features], as `nn.Linear` would hold it."""
        weights = [part.dequantize(dtype) for part in self._stored_matrices]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    @property
    def matmul_kind(self) -> EightBitKind | None:
        """The kind of 8-bit matmul that fits the codes, or None: all parts must have one kind, and sides that the
        kernels support.
        """
        if self.in_features % EIGHT_BIT_ALIGNMENT or any(
            part.rows % EIGHT_BIT_ALIGNMENT for part in self._stored_matrices
        ):
            return None
        kinds = {part.codes.dtype if isinstance(part, ScaledMatrix) else None for part in self._stored_matrices}
        return "fp8" if kinds == {torch.float8_e4m3fn} else "int8" if kinds == {torch.int8} else None

    def multiply_8bit(self, x: Tensor, kind: EightBitKind) -> Tensor:
        """Multiply x [..., in_features], quantised to 8 bits with a scale per row, by the codes: [...,
        out_features].
        """
        rows = x.flatten(0, -2)
        # Not `is_compiling`, which is True in all threads while any thread compiles.
        if torch.compiler.is_dynamo_compiling():  # then quantising is fused into one kernel
            codes, scale = quantize_rows(rows, kind)
            outs = [
                _multiply_8bit(codes, scale, part, kind, start, stop).to(x.dtype)
                for part in self._stored_matrices
                for start, stop in _row_chunks(part.rows, 1, COMPILED_CHUNK_OUTPUTS)
            ]
            return (outs[0] if len(outs) == 1 else torch.cat(outs, -1)).unflatten(0, x.shape[:-1])
        quantized_rows = quantize(rows, kind)
        out = x.new_empty(len(rows), self.out_features)
        first = 0
        for part in self._stored_matrices:
            for start, stop in _row_chunks(part.rows, len(rows)):
                out[:, first + start : first + stop] = _multiply_8bit(
                    quantized_rows.codes, quantized_rows.scale, part, kind, start, stop
                )
            first += part.rows
        return out.unflatten(0, x.shape[:-1])

    def multiply_by_chunks(self, x: Tensor) -> Tensor:
        """Multiply x [..., in_features] by the weight, dequantising a chunk of rows at a time: [..., out_features]."""
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
    """Multiply 8-bit rows [n, cols] with scales [n, 1] by rows start..stop of `part`: [n, stop - start]."""
    assert isinstance(part, ScaledMatrix)
    matrix = part.codes[start:stop].t()
    row_scale = part.scale if len(part.scale) == 1 else part.scale[start:stop]
    column_scale = row_scale.t().expand(1, stop - start)
    if kind == "int8":
        # On processors without VNNI, torch._int_mm adds pairs of products in 16 bits, which overflows.
        product = torch._int_mm(codes, matrix) if codes.is_cuda else codes.int() @ matrix.int()
        return product.float() * scale * column_scale
    # the row-wise kernels only return bfloat16
    return torch._scaled_mm(codes, matrix, scale_a=scale, scale_b=column_scale.contiguous(), out_dtype=torch.bfloat16)


class StoredEmbedding(nn.Module):
    """An embedding held in bfloat16 and looked up in `dtype`. head: the same table as a linear layer, for models
    with tied embeddings.
    """

    def __init__(self, rows: BFloat16Matrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = QuantizedLinear(rows)
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.head.parts[0]
        assert isinstance(rows, BFloat16Matrix)
        return rows.codes[ids].to(self._dtype)


def has_8bit_matmul(device: torch.device, kind: EightBitKind) -> bool:
    """Return whether `device` should multiply weights of `kind` in 8 bits. NVIDIA's GPUs use fp8 from compute
    capability 8.9 on. They use int8 only from 7.5 up to 8.9, because int8 is less exact than fp8. CPUs return False:
    without VNNI, torch's int8 matmul is twenty times slower than float32; CPUs with VNNI were not measured.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability >= (8, 9) if kind == "fp8" else (7, 5) <= capability < (8, 9)


def quantize_rows(values: Tensor, kind: EightBitKind) -> tuple[Tensor, Tensor]:
    """Return codes [rows, cols] and scales [rows, 1] of values [rows, cols], see `quantize`. Has no
    loop and writes nothing in place, so that a compiler can fuse it with the operations before it.
    """
    largest = INT8_MAX if kind == "int8" else FP8_MAX
    values = values.float()
    scale = values.abs().amax(1, keepdim=True) / largest
    scaled = (values / scale.where(scale > 0, torch.ones_like(scale))).clamp(-largest, largest)
    return (scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)), scale


def quantize(weight: Tensor, kind: EightBitKind) -> ScaledMatrix:
    """Quantise `weight` [rows, cols] to 8 bits on its device. Each row's largest magnitude becomes the largest code.

    m is the largest magnitude of a row. int8 (symmetric): the error of a value v is at most m / 254. fp8
    (float8_e4m3fn): at most max(|v|, 2^-6 / 448 * m) / 16. A row that contains NaN or infinity is dequantised as NaN,
    so that such values are noticed.
    """
    rows, cols = weight.shape
    codes = torch.empty(rows, cols, dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(rows, 1, device=weight.device)
    for start, stop in _row_chunks(rows, cols):
        codes[start:stop], scale[start:stop] = quantize_rows(weight[start:stop], kind)
    return ScaledMatrix(codes, scale)


def _row_chunks(rows: int, cols: int, size: int = CHUNK_VALUES) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of runs of rows with about `size` values each."""
    step = max(1, size // cols // NVFP4_TILE_ROWS) * NVFP4_TILE_ROWS
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
