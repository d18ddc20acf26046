"""Where and how parts are computed and held: device, precision, storage."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flux2_studio.checkpoints import Checkpoint, Part
from flux2_studio.engine.runtime.processor import has_bfloat16
from flux2_studio.engine.weights.loading import WeightStorage
from flux2_studio.errors import DeviceError

LARGE_MODEL_BYTES = (
    2 * 10**9
)  # bytes of bfloat16 weights (a billion parameters) from which a CPU had better stay at bfloat16


def choose_device(name: str) -> torch.device:
    """The device called `name`; for "auto" the fastest there is. Raises `DeviceError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"There is no device called {name!r}. Choose auto, cuda, cuda:1, mps or cpu.") from error
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if device.type not in available:
        raise DeviceError(f"{name!r} cannot be used. Choose auto, cuda, mps or cpu.")
    if not available[device.type]():
        raise DeviceError(f"This machine has no usable {device.type} device. Choose cpu, or leave the choice at auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"There is no {name}: this machine has {torch.cuda.device_count()} CUDA device(s).")
    return device


def choose_dtype(name: str, device: torch.device, checkpoint: Checkpoint | None, part: Part) -> torch.dtype:
    """The precision of `part`, a part of `checkpoint`; a text encoder's depends on itself alone, as many checkpoints
    and writing share it.

    auto: bfloat16, or float16 on a CUDA device without it. On a CPU float32 for small checkpoints, which are as quick
    and exact so, and for all where the processor has no bfloat16: weights stay small there, see `choose_storage`.
    float16 is kept to the transformer, which guards its range: text encoders and autoencoders were
    trained in bfloat16 and would overflow. The tiny autoencoder is published in float16. A processor without
    bfloat16 gets autoencoders in float32, whatever was asked for: the way round is 100 times slower there, and takes
    several times the memory.
    """
    if part.kind == "tiny autoencoder":
        return torch.float32 if device.type == "cpu" else torch.float16
    if part.kind == "autoencoder" and device.type == "cpu" and not has_bfloat16():
        return torch.float32
    if name == "auto":
        whole = part if part.kind == "text" or checkpoint is None else checkpoint.flow
        if device.type == "cpu" and (whole.size < LARGE_MODEL_BYTES or not has_bfloat16()):
            name = "float32"
        elif device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = "float16"
        else:
            name = "bfloat16"
    if name == "float16" and part.kind != "flow":
        name = "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def choose_storage(quantize: str, dtype: str, device: torch.device, part: Part) -> WeightStorage:
    """How the weights of `part` are held in memory. dtype: the precision that was asked for, see `choose_dtype`.

    As the user set it, for the two parts that are large. Otherwise as the file has them, so that an 8-bit or 4-bit
    file takes no more memory than disk; but restored where that costs little (a toy on a CPU, which is quicker so) and
    where 8-bit floats cannot be held (Apple). A processor without bfloat16 that computes in float32 for that reason
    holds them in bfloat16: its products are five times as fast so, and take no more memory (benchmarks/NOTES.md).
    """
    if part.kind in ("flow", "text") and quantize != "off" and part.size >= LARGE_MODEL_BYTES:
        return "fp8" if quantize == "fp8" else "int8"
    if part.kind in ("flow", "text") and part.size >= LARGE_MODEL_BYTES and device.type == "cpu" and dtype == "auto":
        return "stored" if has_bfloat16() else "bfloat16"
    return "plain" if device.type == "mps" or part.size < LARGE_MODEL_BYTES else "stored"
