"""Chooses the device, the compute dtype and the weight storage of parts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flux2_studio.checkpoints import Checkpoint, Part
from flux2_studio.engine.runtime.processor import has_bfloat16
from flux2_studio.engine.weights.loading import WeightStorage
from flux2_studio.errors import DeviceError

# A part counts as large from this `Part.size` on: a billion parameters in bfloat16, more in a quantised file. Large
# parts stay in bfloat16 on a CPU, and are quantised and compiled if so configured.
LARGE_MODEL_BYTES = 2 * 10**9


def choose_device(name: str) -> torch.device:
    """Returns the device `name`, for "auto" the first of cuda, mps and cpu that is available. Raises `DeviceError`."""
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
    """Returns the compute dtype of `part`, a part of `checkpoint`.

    A text encoder's dtype does not depend on the checkpoint, because several checkpoints and the writer share it.

    "auto" is bfloat16, or float16 on a CUDA device without bfloat16. On a CPU float32 for small checkpoints, which are
    as fast that way and exact, and for all on CPUs without bfloat16, where `choose_storage` keeps the weights small.
    float16 only applies to the transformer, which guards its range: text encoders and autoencoders were trained in
    bfloat16 and would overflow. The tiny autoencoder is published in float16. On a CPU without bfloat16, autoencoders
    always use float32: bfloat16 is 100 times slower there and takes several times the memory.
    """
    if part.kind == "tiny autoencoder":
        return torch.float32 if device.type == "cpu" else torch.float16
    if part.kind == "autoencoder" and device.type == "cpu" and not has_bfloat16():
        return torch.float32
    if name == "auto":
        deciding_part = part if part.kind == "text" or checkpoint is None else checkpoint.flow
        if device.type == "cpu" and (deciding_part.size < LARGE_MODEL_BYTES or not has_bfloat16()):
            name = "float32"
        elif device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = "float16"
        else:
            name = "bfloat16"
    if name == "float16" and part.kind != "flow":
        name = "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def choose_storage(quantize: str, dtype: str, device: torch.device, part: Part) -> WeightStorage:
    """Returns how the weights of `part` are stored in memory. dtype: the configured precision, as in `choose_dtype`.

    Large transformers and text encoders are quantised as configured. Other large parts stay in the file's format, so
    that an 8-bit or 4-bit file takes no more memory than disk space. Small parts are dequantised, because they are
    faster then. On Apple's GPUs all parts that are not quantised as configured are dequantised, because these GPUs have
    no 8-bit floats. A CPU without bfloat16 computes in float32 but stores large parts in bfloat16: that takes no more
    memory than computing in bfloat16, and matmuls are five times as fast (benchmarks/NOTES.md).
    """
    if part.kind in ("flow", "text") and quantize != "off" and part.size >= LARGE_MODEL_BYTES:
        return "fp8" if quantize == "fp8" else "int8"
    if part.kind in ("flow", "text") and part.size >= LARGE_MODEL_BYTES and device.type == "cpu" and dtype == "auto":
        return "stored" if has_bfloat16() else "bfloat16"
    return "plain" if device.type == "mps" or part.size < LARGE_MODEL_BYTES else "stored"
