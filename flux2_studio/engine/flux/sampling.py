"""From noise to a clean latent: the schedule and the Euler loop, for the three ways of guiding.

Does not know: text, pictures, previews. `denoise` yields after every step; the caller may stop asking at any time.

    x_t = (1 - t) * clean + t * noise,  v = d x_t / dt = noise - clean,  so  clean = x_t - t * v
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from flux2_studio.engine.flux.inpaint import InpaintMask, blend_known_region
from flux2_studio.engine.flux.latents import from_tokens, sequence_position_ids, to_tokens
from flux2_studio.engine.flux.transformer import ReferenceCache, Transformer


@dataclass(frozen=True, kw_only=True)
class DenoisingStep:
    """After step `index` (0-based) of `steps`. latents and clean: [B, 128, h, w] in float32, normalised.

    `known_latent` is the estimate of the finished latent that this step's velocity gives; after the last step it is
    `latents`.
    """

    index: int
    steps: int
    latents: Tensor
    clean: Tensor


def empirical_mu(tokens: int, steps: int) -> float:
    """The shift's exponent, as Black Forest Labs fitted it over image tokens and steps (constants of their sampler)."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope


def timestep_schedule(tokens: int, steps: int) -> list[float]:
    """steps + 1 times from 1 to 0 for an image of `tokens` latent tokens: a uniform grid, shifted towards 1."""
    e = math.exp(empirical_mu(tokens, steps))
    grid = [1 - i / steps for i in range(steps + 1)]
    return [e / (e + (1 / t - 1)) if t > 0 else 0.0 for t in grid]


@torch.inference_mode()
def denoise(
    model: Transformer,
    noise: Tensor,
    context: Tensor,
    *,
    steps: int,
    guidance: float,
    guidance_mode: Literal["none", "cfg", "embedded"],
    negative_context: Tensor | None = None,
    references: Sequence[Tensor] = (),
    reference_cache: bool = False,
    inpaint: InpaintMask | None = None,
) -> Iterator[DenoisingStep]:
    """Yield a `DenoisingStep` after each of `steps` Euler steps.

    noise: [B, 128, h, w]. context, negative_context: [1 or B, L, C]; the latter is what "cfg" steers away from, in one
    batch with the former: v = v_negative + guidance * (v - v_negative). "embedded" feeds `guidance` to the model.
    references: latents [1, 128, rh, rw], in the order in which the prompt counts them. reference_cache: compute their
    keys and values once, at the first step (for checkpoints trained that way). inpaint: what must stay of a picture.
    """
    batch, _, h, w = noise.shape
    device, dtype = model.device, model.dtype
    doubled = guidance_mode == "cfg" and guidance != 1.0
    if doubled and negative_context is None:
        raise ValueError("cfg needs a negative context: encode an empty prompt if there is none")

    def entering(tensor: Tensor) -> Tensor:
        """`tensor` where and how the model computes, clipped to what its precision can hold."""
        limit = torch.finfo(dtype).max
        return tensor.to(device).float().clamp(-limit, limit).to(dtype)

    # Contiguous, for an expanded one is multiplied by another kernel, with other rounding, than its copy.
    ctx = entering(context).expand(batch, -1, -1).contiguous()
    if doubled:
        assert negative_context is not None
        ctx = torch.cat((ctx, entering(negative_context).expand(batch, -1, -1)))
    rows = ctx.shape[0]
    refs = [entering(to_tokens(latent)).expand(rows, -1, -1) for latent in references]
    rope = model.rope(sequence_position_ids(ctx.shape[1], h, w, references))
    cache = ReferenceCache(tokens=sum(ref.shape[1] for ref in refs)) if reference_cache and refs else None

    x = start = to_tokens(noise).to(device, torch.float32)
    change = inpaint.editable.flatten().to(device) if inpaint else None
    kept = to_tokens(inpaint.known_latent).to(device, torch.float32) if inpaint else None
    tokens = x.shape[1]
    times = timestep_schedule(tokens, steps)
    moments = torch.tensor(times[:-1], device=device)
    embedded = torch.full((steps,), guidance, device=device) if guidance_mode == "embedded" else None
    modulations = model.modulations(moments, embedded)
    for index, (t, t_next) in enumerate(pairwise(times)):
        inputs = x.to(dtype).repeat(rows // batch, 1, 1)
        modulation = modulations.at_step(index)
        if refs and not (cache and cache.is_filled):
            inputs = torch.cat((inputs, *refs), 1)
        elif cache and index == 1:
            rope = rope.slice(0, ctx.shape[1] + tokens)  # the references, its end, no longer stand in the sequence
        if cache and not cache.is_filled:
            filling = (ctx.shape[1], inputs.shape[1], cache.tokens)
            modulation = model.modulations(moments[:1], embedded if embedded is None else embedded[:1], filling)
        v = model.velocity(inputs, ctx, modulation, rope, outputs=tokens, cache=cache).float()
        if doubled:
            v, negative = v.chunk(2)
            v = negative + guidance * (v - negative)
        clean = x - t * v
        x = x + (t_next - t) * v
        if change is not None and kept is not None:
            x, clean = (
                blend_known_region(x, change, kept, start, t_next),
                blend_known_region(clean, change, kept, start, 0.0),
            )
        yield DenoisingStep(index=index, steps=steps, latents=from_tokens(x, h, w), clean=from_tokens(clean, h, w))
