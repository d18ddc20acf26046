"""LoRA files for toy transformers, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

NANO_WIDTH = 256


def write_lora(
    path: Path, width: int = NANO_WIDTH, *, strength: float = 0.2, seed: int = 0, odd: bool = False, rank: int = 4
) -> Path:
    """A LoRA for transformers of hidden width `width`: four layers of the first two double blocks.

    odd: with tensors for a block that no toy has, too.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for block in (0, 1, *([99] if odd else [])):
        for layer, rows in (("img_attn.proj", width), ("img_attn.qkv", 3 * width)):
            key = f"diffusion_model.double_blocks.{block}.{layer}"
            state[f"{key}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
            state[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * strength
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path
