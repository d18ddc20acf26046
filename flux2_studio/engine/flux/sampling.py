"""From noise to a clean latent: the timestep schedule and the Euler loop.

Guidance is off, classifier-free ("cfg") or embedded. `denoise` yields after every step, and the caller may stop
iterating at any time. Out of scope: text, pictures, previews.

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
    """State after step `index` (0-based) of `steps`. latents, clean: [B, 128, h, w] in float32, normalised.

    `clean` is the finished latent as this step's velocity predicts it; after the last step it equals `latents`.
    """

    index: int
    steps: int
    latents: Tensor
    clean: Tensor


def empirical_mu(tokens: int, steps: int) -> float:
    """Return mu, the logarithm of the schedule's time shift. The formula and its constants are those of Black Forest
    Labs' sampler, which fitted them to the number of image tokens and of steps.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope


def timestep_schedule(tokens: int, steps: int) -> list[float]:
    """Return steps + 1 times from 1 to 0 for an image of `tokens` latent tokens: a uniform grid, shifted towards 1."""
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

    noise: [B, 128, h, w]. context, negative_context: [1 or B, L, C]. "cfg" evaluates both in one batch: v = v_negative
    + guidance * (v - v_negative). "embedded" feeds `guidance` to the model. references: latents [1, 128, rh, rw], in
    the order in which the prompt counts them. reference_cache: compute their keys and values once, at the first step
    (for checkpoints trained that way). inpaint: the region that may change, and the latent that the rest keeps.

    Raises `ValueError` if cfg has no negative context.
    """
    batch, _, h, w = noise.shape
    device, dtype = model.device, model.dtype
    use_cfg = guidance_mode == "cfg" and guidance != 1.0
    if use_cfg and negative_context is None:
        raise ValueError("cfg needs a negative context: encode an empty prompt if there is none")

    def to_model(tensor: Tensor) -> Tensor:
        """Move `tensor` to the model's device and dtype, clipped to the range of that dtype."""
        limit = torch.finfo(dtype).max
        return tensor.to(device).float().clamp(-limit, limit).to(dtype)

    # Contiguous, because matmul picks another kernel for an expanded tensor, which rounds differently.
    ctx = to_model(context).expand(batch, -1, -1).contiguous()
    if use_cfg:
        assert negative_context is not None
        ctx = torch.cat((ctx, to_model(negative_context).expand(batch, -1, -1)))
    rows = ctx.shape[0]
    refs = [to_model(to_tokens(latent)).expand(rows, -1, -1) for latent in references]
    rope = model.rope(sequence_position_ids(ctx.shape[1], h, w, references))
    cache = ReferenceCache(tokens=sum(ref.shape[1] for ref in refs)) if reference_cache and refs else None

    x = initial = to_tokens(noise).to(device, torch.float32)
    editable = inpaint.editable.flatten().to(device) if inpaint else None
    known = to_tokens(inpaint.known_latent).to(device, torch.float32) if inpaint else None
    tokens = x.shape[1]
    times = timestep_schedule(tokens, steps)
    timesteps = torch.tensor(times[:-1], device=device)
    embedded_guidance = torch.full((steps,), guidance, device=device) if guidance_mode == "embedded" else None
    modulations = model.modulations(timesteps, embedded_guidance)
    for index, (t, t_next) in enumerate(pairwise(times)):
        inputs = x.to(dtype).repeat(rows // batch, 1, 1)
        modulation = modulations.at_step(index)
        if refs and not (cache and cache.is_filled):
            inputs = torch.cat((inputs, *refs), 1)
        elif cache and index == 1:
            rope = rope.slice(0, ctx.shape[1] + tokens)  # the sequence no longer ends with the references
        if cache and not cache.is_filled:
            cache_fill = (ctx.shape[1], inputs.shape[1], cache.tokens)
            modulation = model.modulations(
                timesteps[:1], embedded_guidance if embedded_guidance is None else embedded_guidance[:1], cache_fill
            )
        v = model.velocity(inputs, ctx, modulation, rope, outputs=tokens, cache=cache).float()
        if use_cfg:
            v, negative = v.chunk(2)
            v = negative + guidance * (v - negative)
        clean = x - t * v
        x = x + (t_next - t) * v
        if editable is not None and known is not None:
            x, clean = (
                blend_known_region(x, editable, known, initial, t_next),
                blend_known_region(clean, editable, known, initial, 0.0),
            )
        yield DenoisingStep(index=index, steps=steps, latents=from_tokens(x, h, w), clean=from_tokens(clean, h, w))
