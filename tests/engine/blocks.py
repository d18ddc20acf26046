"""A small transformer, and how the sampling loop calls it: for the tests of compiled blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.synthetic import fill
from flux2_studio.engine.flux.latents import sequence_position_ids
from flux2_studio.engine.flux.transformer import ReferenceCache, Transformer
from flux2_studio.engine.params import TransformerParams

CPU = torch.device("cpu")
PARAMS = TransformerParams(
    in_channels=128,
    context_width=96,
    hidden=128,
    head_width=32,
    mlp=384,
    double_blocks=2,
    single_blocks=3,
    guidance_embedding=False,
)


def made(params: TransformerParams = PARAMS) -> Transformer:
    with torch.device("meta"):
        model = Transformer(params)
    fill(model, seed=0, device=CPU, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def velocity(
    model: Transformer,
    side: int,
    references: int = 0,
    batch: int = 1,
    text: int = 24,
    cache: ReferenceCache | None = None,
) -> Tensor:
    """As the loop asks for it, with references in the sequence."""
    latents = [torch.zeros(1, 128, side, side)] * references
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, side * side * (1 + references), 128, generator=generator)
    ctx = torch.randn(batch, text, model.params.context_width, generator=generator)
    filling = (text, x.shape[1], cache.tokens) if cache is not None and not cache.is_filled else None
    modulations = model.modulations(torch.tensor([0.5]), None, filling)
    rope = model.rope(sequence_position_ids(text, side, side, latents))
    return model.velocity(x, ctx, modulations, rope, outputs=side * side, cache=cache)
