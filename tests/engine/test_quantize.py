"""The arithmetic of stored weights, against each format's definition, and the layer that holds them."""

from __future__ import annotations

import copy
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flux2_studio.engine.weights.gguf import BLOCK_FORMATS, GGUFMatrix
from flux2_studio.engine.weights.quantize import (
    CHUNK_VALUES,
    EightBitKind,
    NVFP4Matrix,
    QuantizedLinear,
    ScaledMatrix,
    StoredMatrix,
    has_8bit_matmul,
    quantize,
)
from tests import quantised

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weight(rows: int, cols: int, seed: int = 3) -> Tensor:
    """Rows of different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    values[rows // 2] = 0
    return values


def nvfp4(values: Tensor) -> NVFP4Matrix:
    codes, scales, whole, _ = quantised.nvfp4_codes(values)
    return NVFP4Matrix(codes, scales, whole)


# fp8 and int8


def e4m3(byte: int) -> float:
    """The number that a byte stands for in float8_e4m3fn: one sign, four exponent and three mantissa bits, bias 7."""
    sign = -1 if byte & 0x80 else 1
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


def test_every_fp8_code_times_its_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    expected = torch.tensor([e4m3(byte) for byte in range(256)]).reshape(2, 128)
    stored = codes.view(torch.float8_e4m3fn)
    torch.testing.assert_close(
        ScaledMatrix(stored, torch.tensor(0.37)).dequantize(torch.float32),
        expected * 0.37,
        equal_nan=True,
        rtol=1e-7,
        atol=0,
    )
    rows = ScaledMatrix(stored, torch.tensor([0.37, 2.5])).dequantize(torch.float32)
    expected = expected * torch.tensor([[0.37], [2.5]])
    torch.testing.assert_close(rows, expected, equal_nan=True, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_errs_by_at_most_half_a_step(dtype: torch.dtype) -> None:
    values = weight(37, 96).to(dtype)
    matrix = quantize(values, "int8")
    largest = values.float().abs().amax(1, keepdim=True)
    error = (matrix.dequantize(torch.float32) - values.float()).abs()
    assert bool((error <= largest / 254 * (1 + 1e-5)).all())
    assert matrix.codes.dtype is torch.int8
    assert torch.equal(matrix.codes.abs().amax(1), torch.where(largest[:, 0] > 0, 127, 0)), "all of it used"
    assert 0 < relative_error(matrix, values) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_errs_by_at_most_a_sixteenth(dtype: torch.dtype) -> None:
    values = weight(37, 96).to(dtype)
    matrix = quantize(values, "fp8")
    largest = values.float().abs().amax(1, keepdim=True)
    error = (matrix.dequantize(torch.float32) - values.float()).abs()
    assert bool((error <= torch.maximum(values.float().abs(), largest * 2**-6 / 448) / 16 * (1 + 1e-5)).all())
    assert matrix.codes.dtype is torch.float8_e4m3fn
    assert float(matrix.codes.float().abs().max()) == 448
    assert 0 < relative_error(matrix, values) < 0.03


def relative_error(matrix: StoredMatrix, values: Tensor) -> float:
    return float((matrix.dequantize(torch.float32) - values.float()).norm() / values.float().norm())


@pytest.mark.parametrize("to", ["fp8", "int8"])
def test_what_is_no_number_stays_visible(to: EightBitKind) -> None:
    for bad in (float("nan"), float("inf")):
        values = weight(4, 32)
        values[1, 5] = bad
        restored = quantize(values, to).dequantize(torch.float32)
        assert bool(restored[1, 5].isnan())
        assert bool(restored[[0, 2, 3]].isfinite().all())


# NVFP4


def test_nvfp4_byte_by_byte() -> None:
    """Every code, scales where cuBLAS' manual says that they stand, rows and blocks that do not fill a tile."""
    rows, cols = 133, 80
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 256, (rows, cols // 2), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(rows, cols // 16, generator=generator) * 400).to(torch.float8_e4m3fn)
    tiles = torch.zeros(256 * 8, dtype=torch.uint8)
    expected = torch.empty(rows, cols)
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    for row in range(rows):
        for block in range(cols // 16):
            place = (row // 128 * 2 + block // 4) * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4
            tiles[place] = scales[row, block].view(torch.uint8)
        for col in range(cols):
            byte = int(codes[row, col // 2])
            code = byte >> 4 if col % 2 == 0 else byte & 15  # the first of two in the high half
            value = magnitudes[code & 7] * (-1 if code & 8 else 1)
            expected[row, col] = value * float(scales[row, col // 16]) * 0.125
    matrix = NVFP4Matrix(codes, tiles.view(torch.float8_e4m3fn).reshape(256, 8), torch.tensor(0.125))
    assert torch.equal(matrix.dequantize(torch.float32), expected)
    assert NVFP4Matrix.block_scale_count(rows, cols) == len(tiles)


def test_nvfp4_of_real_values() -> None:
    values = weight(130, 96)
    codes, scales, whole, expected = quantised.nvfp4_codes(values)
    restored = NVFP4Matrix(codes, scales, whole).dequantize(torch.float32)
    torch.testing.assert_close(restored, expected, rtol=1e-6, atol=0)
    assert 0.05 < float((restored - values).norm() / values.norm()) < 0.12


# GGUF


def random_blocks(kind: str, rows: int = 5) -> np.ndarray:
    """Blocks of random bytes, three to a row, whose float16 numbers (scales and offsets) are numbers."""
    generator = np.random.default_rng(len(kind) + ord(kind[1]))
    blocks = generator.integers(0, 256, (3 * rows, BLOCK_FORMATS[kind].bytes_per_block), dtype=np.uint8)
    for at in {"Q6_K": [208], "Q8_0": [0], "Q4_0": [0], "Q5_0": [0]}.get(kind, [0, 2]):
        blocks[:, at : at + 2] = generator.normal(size=(3 * rows, 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_gguf_blocks_equal_the_reference(kind: str) -> None:
    blocks = random_blocks(kind)
    matrix = GGUFMatrix(torch.from_numpy(blocks), kind)
    expected = quantised.gguf_values(blocks, kind)
    assert (matrix.rows, matrix.cols) == expected.shape
    assert torch.equal(matrix.dequantize(torch.float32), expected)


# error of normally distributed weights; the K formats by the plain encoder of these tests
GGUF_ERRORS = {
    "Q8_0": 0.006, "Q6_K": 0.025, "Q5_K": 0.05, "Q5_1": 0.05, "Q5_0": 0.06, "Q4_K": 0.1, "Q4_1": 0.1, "Q4_0": 0.12,
}  # fmt: skip


@pytest.mark.parametrize("kind", GGUF_ERRORS)
def test_gguf_of_real_values(kind: str) -> None:
    values = torch.randn(6, 512, generator=torch.Generator().manual_seed(1))
    matrix = GGUFMatrix(torch.from_numpy(quantised.gguf_blocks(values, kind)), kind)
    assert GGUF_ERRORS[kind] / 3 < relative_error(matrix, values) < GGUF_ERRORS[kind]


# The layer


def matrices() -> dict[str, StoredMatrix]:
    values = weight(40, 256)
    made: dict[str, StoredMatrix] = {
        "fp8": quantize(values, "fp8"),
        "int8": quantize(values, "int8"),
        "NVFP4": nvfp4(values),
    }
    for kind in ("Q4_K", "Q8_0"):
        made[kind] = GGUFMatrix(torch.from_numpy(quantised.gguf_blocks(values, kind)), kind)
    return made


@pytest.mark.parametrize("kind", matrices())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_layer_equals_a_linear_layer_over_the_restored_values(kind: str, dtype: torch.dtype) -> None:
    matrix = matrices()[kind]
    layer = QuantizedLinear(matrix)
    plain = nn.Linear(256, 40, bias=False, dtype=dtype)
    plain.weight.data = matrix.dequantize(torch.float32).to(dtype)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.dequantize(dtype), plain.weight)
    assert (layer.in_features, layer.out_features) == (256, 40)


def test_parts_stand_one_under_the_other() -> None:
    parts = [quantize(weight(8, 32, seed), to) for seed, to in ((1, "fp8"), (2, "int8"))]
    layer = QuantizedLinear(*parts)
    assert layer.out_features == 16
    assert torch.equal(layer.dequantize(torch.float32), torch.cat([part.dequantize(torch.float32) for part in parts]))


@pytest.mark.parametrize("kind", matrices())
def test_a_change_of_precision_leaves_what_is_stored(kind: str) -> None:
    layer = QuantizedLinear(matrices()[kind])
    before = layer.dequantize(torch.float32)
    types = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert not list(layer.parameters())
    layer.to(torch.bfloat16).half().float().double()
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == types
    assert torch.equal(layer.dequantize(torch.float32), before)


@pytest.mark.parametrize("kind", matrices())
def test_a_move_takes_everything_along(kind: str) -> None:
    layer = QuantizedLinear(matrices()[kind])
    moved = copy.deepcopy(layer).to("meta")
    assert {tensor.device.type for tensor in moved.buffers()} == {"meta"}
    assert [(t.shape, t.dtype) for t in moved.buffers()] == [(t.shape, t.dtype) for t in layer.buffers()]
    moved.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(moved.dequantize(torch.float32), layer.dequantize(torch.float32))


ROWS, COLS = 290, 65536  # too large to be restored at once


def test_several_chunks_of_scaled_rows() -> None:
    assert ROWS * COLS > CHUNK_VALUES
    some = weight(ROWS, 128)
    restored = quantize(some.repeat(1, COLS // 128), "fp8").dequantize(torch.bfloat16)
    alone = quantize(some, "fp8").dequantize(torch.bfloat16)
    assert torch.equal(restored[:, :128], alone)
    assert torch.equal(restored[:, -128:], alone)


def test_several_chunks_of_nvfp4() -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 256, (ROWS, COLS // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, 120, (ROWS, COLS // 16), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
    restored = NVFP4Matrix(codes, quantised.swizzled(scales), torch.tensor(0.5)).dequantize(torch.bfloat16)
    for columns in (slice(0, 128), slice(COLS - 128, COLS)):
        some = codes[:, columns.start // 2 : columns.stop // 2].long()
        first_and_second = torch.stack((some // 16, some % 16), -1).flatten(1)
        values = quantised.E2M1[first_and_second % 8] * (1 - 2 * (first_and_second // 8))
        steps = scales[:, columns.start // 16 : columns.stop // 16].float().repeat_interleave(16, 1) * 0.5
        assert torch.equal(restored[:, columns], (values * steps).bfloat16())


# 8 bits multiplied as they are


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_product_of_codes_is_that_of_what_they_stand_for(kind: EightBitKind) -> None:
    """Parts with one scale and with one for each row, as q, k and v may come from three tensors of a file."""
    one = ScaledMatrix(quantize(weight(32, 64), kind).codes, torch.tensor(0.02))
    layer = QuantizedLinear(one, quantize(weight(48, 64, seed=4), kind))
    x = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[0, 1] = 0
    out = layer.multiply_8bit(x, kind)
    rows = quantize(x.flatten(0, -2), kind).dequantize(torch.float32)
    expected = (rows @ layer.dequantize(torch.float32).t()).unflatten(0, (2, 10))
    assert layer.matmul_kind == kind and out.shape == (2, 10, 80) and out.dtype is torch.bfloat16
    assert not out[0, 1].any()
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-4)  # one rounding to bfloat16


def test_a_product_of_codes_by_parts_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear(quantize(weight(384, 64), "int8"))
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    whole = layer.multiply_8bit(x, "int8")
    monkeypatch.setattr("flux2_studio.engine.weights.quantize._row_chunks.__defaults__", (128 * 20,))
    assert layer.multiply_8bit(x, "int8").equal(whole)


@pytest.mark.parametrize("kind, least, most", [("fp8", 0.002, 0.04), ("int8", 0.002, 0.02)])
def test_activations_in_8_bits_cost_a_few_percent(kind: EightBitKind, least: float, most: float) -> None:
    layer = QuantizedLinear(quantize(weight(64, 512), kind))
    x = torch.randn(20, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = x.float() @ layer.dequantize(torch.float32).t()
    error = (layer.multiply_8bit(x, kind).float() - exact).norm() / exact.norm()
    assert least < error < most


@pytest.mark.parametrize("kind, another", [("fp8", "int8"), ("int8", "fp8")])
def test_codes_that_the_kernels_do_not_take(kind: EightBitKind, another: EightBitKind) -> None:
    whole = QuantizedLinear(quantize(weight(32, 64), kind))
    assert whole.matmul_kind == kind
    for other in (quantize(weight(24, 64), kind), nvfp4(weight(128, 64))):
        assert QuantizedLinear(other).matmul_kind is None
        assert QuantizedLinear(*whole.parts, other).matmul_kind is None  # type: ignore[arg-type]
    assert QuantizedLinear(*whole.parts, quantize(weight(32, 64), another)).matmul_kind is None  # type: ignore[arg-type]
    assert QuantizedLinear(quantize(weight(32, 40), kind)).matmul_kind is None


def test_where_products_of_codes_are_not_quick_the_values_are_restored() -> None:
    for kind in get_args(EightBitKind):
        assert not has_8bit_matmul(torch.device("cpu"), kind) and not has_8bit_matmul(torch.device("mps"), kind)
    layer = QuantizedLinear(quantize(weight(32, 64), "fp8"))
    x = torch.randn(30, 64)
    assert layer(x).equal(torch.nn.functional.linear(x, layer.dequantize(x.dtype)))


@pytest.mark.parametrize("rows, expected", [(16, "restored"), (17, "codes")])
def test_products_of_codes_where_they_are_quick(rows: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for so few rows that the kernels do not take them."""
    monkeypatch.setattr("flux2_studio.engine.weights.quantize.has_8bit_matmul", lambda _device, kind: kind == "int8")
    layer = QuantizedLinear(quantize(weight(32, 64), "int8"))
    x = torch.randn(rows, 64)
    assert layer(x).equal(torch.nn.functional.linear(x, layer.dequantize(x.dtype)))  # unless it is allowed
    layer.allow_int8_activations = True
    found = layer(x)
    restored = torch.nn.functional.linear(x, layer.dequantize(x.dtype))
    assert found.equal(layer.multiply_8bit(x, "int8") if expected == "codes" else restored)
    assert found.equal(restored) == (expected == "restored")
