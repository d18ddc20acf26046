"""How many pictures are denoised at once: a guess from the device's free memory, kept on the safe side.

A wrong guess costs nothing but time: a batch that does not fit is halved by the studio, which says so.
"""

from __future__ import annotations

import os

import torch

from flux2_studio.engine.params import TransformerParams

SHARE = 0.6  # of the free memory that a batch may take; the rest is for decoding and for what others allocate
# Activations alive at once per token, in units of the hidden width: both streams, qkv in float32, the MLP's inner
# width twice, and the joined input of linear2.
ACTIVATIONS = 40
# A processor is busy with this many tokens: a larger batch is no faster there, only later to its previews and to Stop.
CPU_TOKENS = 2048
UNKNOWN = 4 * 2**30  # assumed to be free where the system does not tell


def batch_size(
    count: int, tokens: int, kept: int, params: TransformerParams, dtype: torch.dtype, device: torch.device
) -> int:
    """How many of `count` pictures to make at once, at least one.

    tokens: what one picture sends through the transformer. kept: of these, how many have their keys and values kept
    in every block (the reference cache).
    """
    blocks = params.double_blocks + params.single_blocks
    one = (tokens * ACTIVATIONS + kept * 2 * blocks) * params.hidden * dtype.itemsize
    fitting = int(SHARE * free_memory(device) / one)
    useful = CPU_TOKENS // tokens if device.type == "cpu" else count
    return max(1, min(count, fitting, useful))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no sysconf (Windows), or not this name (macOS)
        return UNKNOWN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device's memory is used up; only CUDA has an exception of its own for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
