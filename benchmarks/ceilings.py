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


def matrices(tokens: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations (a product and a sum are two) per second of a linear layer over `tokens`, the best of several tries;
    on CUDA in 8 bits, too."""
    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    operations = 2 * tokens * weight.numel()
    rates = {LINEAR: operations / best(lambda: F.linear(x, weight), device)}
    if device.type != "cuda":
        return rates
    if torch.cuda.get_device_capability(device) >= (8, 9):
        a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn).t()
        rows, columns = torch.ones(tokens, 1, device=device), torch.ones(1, outputs, device=device)

        def fp8() -> Tensor:
            return torch._scaled_mm(a, b, scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16)

        rates[FP8] = operations / best(fp8, device)
    codes, matrix = x.clamp(-1, 1).mul(127).to(torch.int8), weight.clamp(-1, 1).mul(127).to(torch.int8).t()
    return {**rates, INT8: operations / best(lambda: torch._int_mm(codes, matrix), device)}


def attention(tokens: int, heads: int, head_width: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations per second of `tokens` looking at each other."""
    q = torch.randn(1, heads, tokens, head_width, device=device, dtype=dtype)
    operations = 4 * tokens**2 * heads * head_width
    return {ATTENTION: operations / best(lambda: F.scaled_dot_product_attention(q, q, q), device)}


def copies(device: torch.device) -> dict[str, float]:
    """Bytes per second: within the device's memory, read and written; on CUDA also from the host's pinned memory."""
    large = torch.empty(2**28, dtype=torch.uint8, device=device)
    into = torch.empty_like(large)
    rates = {COPY: 2 * large.nbytes / best(lambda: into.copy_(large), device)}
    if device.type == "cuda":
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        rates[HOST] = host.nbytes / best(lambda: into.copy_(host, non_blocking=True), device)
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
