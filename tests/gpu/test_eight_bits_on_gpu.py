"""Products with weights of 8 bits, as the GPU makes them, against the values that the codes stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flux2_studio.engine.weights.quantize import QuantizedLinear, ScaledMatrix, has_8bit_matmul, quantize
from tests.oracle import relative_error

ROWS, COLS, TOKENS = 9216, 3072, 777  # of a klein 4B block; a number of tokens that nothing divides


@pytest.fixture
def weight(gpu: torch.device) -> Tensor:
    return made(ROWS, COLS, gpu, seed=1) / COLS**0.5


def made(rows: int, cols: int, gpu: torch.device, seed: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator(gpu).manual_seed(seed), device=gpu)


def needs_fp8(gpu: torch.device) -> None:
    if not has_8bit_matmul(gpu, "fp8"):
        pytest.skip("this GPU multiplies no fp8")


def product(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """In float32, with the restored weights."""
    return x.float() @ layer.dequantize(torch.float32).t()


@torch.inference_mode()
def test_codes_are_those_of_a_cpu(gpu: torch.device, weight: Tensor) -> None:
    for to in ("fp8", "int8"):
        here, there = quantize(weight, to), quantize(weight.cpu(), to)  # type: ignore[arg-type]
        torch.testing.assert_close(here.scale.cpu(), there.scale, rtol=1e-6, atol=0)
        # A quotient that lies between two codes may be rounded to either.
        assert float((here.dequantize(torch.float32).cpu() != there.dequantize(torch.float32)).float().mean()) < 1e-3


@torch.inference_mode()
def test_fp8_products_are_those_of_the_codes(gpu: torch.device, weight: Tensor) -> None:
    """Parts with one scale and with one for each row; what is multiplied is rounded to fp8, too."""
    needs_fp8(gpu)
    one = ScaledMatrix(quantize(weight, "fp8").codes, torch.tensor(0.001)).to(gpu)
    layer = QuantizedLinear(one, quantize(weight, "fp8"))
    x = made(TOKENS, COLS, gpu, seed=2).bfloat16()
    x[3] = 0
    out = layer(x)
    rounded = quantize(x, "fp8").dequantize(torch.float32)
    assert out.shape == (TOKENS, 2 * ROWS) and out.dtype is torch.bfloat16
    assert not out[3].any()
    for part in (slice(0, ROWS), slice(ROWS, None)):
        found = out[:, part].float()
        assert relative_error(found, product(rounded, layer)[:, part]) < 4e-3  # one rounding to bfloat16
        assert 0.002 < relative_error(found, product(x, layer)[:, part]) < 0.04  # fp8 has three bits after the point


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_int8_products_are_near_those_of_the_values(gpu: torch.device, weight: Tensor, dtype: torch.dtype) -> None:
    """Whether the product is made of restored values or of codes: those of activations err by 1/254 of their row's
    largest at most."""
    layer = QuantizedLinear(quantize(weight, "int8"))
    x = made(TOKENS, COLS, gpu, seed=3).to(dtype)
    out = layer(x)
    assert out.shape == (TOKENS, ROWS) and out.dtype is dtype
    assert relative_error(out.float(), product(x, layer)) < 0.02
