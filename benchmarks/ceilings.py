"""What a machine reaches at the shapes that occur: products of matrices, attention, copies. Floors divide by these."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import wait

LINEAR, ATTENTION, COPY = "linear layers, operations/s", "attention, operations/s", "copy, bytes/s"
FP8, INT8 = "fp8, operations/s", "int8, operations/s"
HOST = "host to device, bytes/s"
IN_A_ROW = 0.02  # seconds, at least, of what is timed on a GPU at a time


def ceilings(
    tokens: int, inputs: int, outputs: int, heads: int, head_width: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Operations (a product and a sum are two) or bytes per second, the best of several tries each: of a linear layer
    from `inputs` to `outputs` over `tokens`, and of attention among them."""
    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    q = torch.randn(1, heads, tokens, head_width, device=device, dtype=dtype)
    large = torch.empty(2**28, dtype=torch.uint8, device=device)
    into = torch.empty_like(large)
    operations = 2 * tokens * weight.numel()
    among = 4 * tokens**2 * heads * head_width
    measured = {
        LINEAR: operations / best(lambda: F.linear(x, weight), device),
        ATTENTION: among / best(lambda: F.scaled_dot_product_attention(q, q, q), device),
        COPY: 2 * large.nbytes / best(lambda: into.copy_(large), device),
    }
    if device.type == "cuda":
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        measured[HOST] = host.nbytes / best(lambda: into.copy_(host, non_blocking=True), device)
        measured |= _eight_bit(x, weight, operations)
    return measured


def _eight_bit(x: Tensor, weight: Tensor, operations: int) -> dict[str, float]:
    """Rates of the products in 8 bits that the GPU has."""
    rates = {}
    if torch.cuda.get_device_capability(x.device) >= (8, 9):
        a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn).t()
        rows, columns = torch.ones(len(x), 1, device=x.device), torch.ones(1, len(weight), device=x.device)

        def fp8() -> Tensor:
            return torch._scaled_mm(a, b, scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16)

        rates[FP8] = operations / best(fp8, x.device)
    codes, matrix = x.clamp(-1, 1).mul(127).to(torch.int8), weight.clamp(-1, 1).mul(127).to(torch.int8).t()
    rates[INT8] = operations / best(lambda: torch._int_mm(codes, matrix), x.device)
    return rates


def best(work: Callable[[], Any], device: torch.device, tries: int = 10) -> float:
    """Seconds of the fastest of `tries`, after three that do not count. A GPU gets so many in a row that what the host
    takes to begin and to wait is nothing to them."""

    def run(times: int) -> float:
        wait(device)
        began = time.perf_counter()
        for _ in range(times):
            work()
        wait(device)
        return (time.perf_counter() - began) / times

    once = min(run(1) for _ in range(3))
    times = 1 if device.type == "cpu" else max(1, int(IN_A_ROW / once))
    return min(run(times) for _ in range(tries))
