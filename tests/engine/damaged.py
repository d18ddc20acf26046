"""Tiny models and a LoRA whose files the tests damage."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.params import AutoencoderParams, TransformerParams
from tests.quantised import State

PARAMS = TransformerParams(
    in_channels=8, context_width=32, hidden=64, head_width=16, mlp=32, double_blocks=1, single_blocks=2,
    guidance_embedding=False, time_channels=16,
)  # fmt: skip
AUTOENCODER = AutoencoderParams(
    encoder_channels=(32, 64), decoder_channels=(32, 32), encoder_blocks=1, decoder_blocks=1, latent_channels=2
)


def randomised(module: nn.Module) -> State:
    generator = torch.Generator().manual_seed(3)
    return {
        name: (1 + 0.2 * torch.randn(tensor.shape, generator=generator, device="cpu")).bfloat16()
        for name, tensor in module.state_dict().items()
    }


@cache
def transformer_state() -> State:
    with torch.device("meta"):
        return randomised(Transformer(PARAMS))


def lora_state() -> State:
    generator = torch.Generator().manual_seed(4)

    def factors(layer: str, rows: int, columns: int) -> State:
        return {
            f"{layer}.lora_A.weight": torch.randn(4, columns, generator=generator).half(),
            f"{layer}.lora_B.weight": torch.randn(rows, 4, generator=generator).half(),
        }

    return {
        **factors("diffusion_model.double_blocks.0.img_attn.qkv", 192, 64),
        "diffusion_model.double_blocks.0.img_attn.qkv.alpha": torch.tensor(2.0).half(),
        "diffusion_model.double_blocks.0.img_attn.qkv.dora_scale": torch.ones(192, 1),
        **factors("diffusion_model.single_blocks.1.linear2", 64, 96),
        "diffusion_model.single_blocks.1.linear2.alpha": torch.tensor(8),
    }
