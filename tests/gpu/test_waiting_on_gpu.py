"""The denoising loop never waits for the GPU: the host stays ahead, and kernels follow each other without a gap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from flux2_studio.engine.flux.inpaint import InpaintMask
from flux2_studio.engine.flux.latents import sequence_position_ids
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.engine.flux.transformer import ReferenceCache, Transformer
from flux2_studio.engine.runtime.streaming import stream_blocks
from flux2_studio.engine.weights.loading import WeightStorage, load_transformer, open_transformer
from tests.tiny import Toys

HIGH, WIDE, TEXT = 3, 4, 9


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def made(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_waiting_is_noticed(gpu: torch.device) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones(1, device=gpu).item()


def loop(model: Transformer, **how: Any) -> Iterator[object]:
    """Five steps."""
    how = {"guidance": 1.0, "guidance_mode": "none", **how}
    return denoise(
        model, made(1, 128, HIGH, WIDE, seed=1), made(1, TEXT, model.params.context_width, seed=2), steps=5, **how
    )


REFERENCES = (made(1, 128, 2, 3, seed=4),)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("klein", {}),
    "references": ("klein", {"references": REFERENCES}),
    "embedded guidance": ("dev", {"guidance": 4.0, "guidance_mode": "embedded"}),
    "two contexts": (
        "klein_base",
        {"guidance": 4.0, "guidance_mode": "cfg", "negative_context": made(1, TEXT, 96, seed=3)},
    ),
    "a mask": (
        "klein",
        {"keep": InpaintMask(known_latent=made(1, 128, HIGH, WIDE, seed=5), editable=torch.eye(HIGH, WIDE).bool())},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_steps(toys: Toys, gpu: torch.device, name: str) -> None:
    """All but the first, before which inputs come to the GPU."""
    toy, how = RUNS[name]
    model = load_transformer(getattr(toys, toy).file, device=gpu, dtype=torch.bfloat16)
    steps = loop(model, **how)
    next(steps)
    with no_waiting():
        assert len(list(steps)) == 4


def test_steps_with_a_reference_cache(toys: Toys, gpu: torch.device) -> None:
    model = load_transformer(toys.nine.file, device=gpu, dtype=torch.bfloat16)
    steps = loop(model, references=REFERENCES, reference_cache=True)
    next(steps)
    with no_waiting():
        assert len(list(steps)) == 4


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_steps_in_eight_bits(toys: Toys, gpu: torch.device, storage: WeightStorage) -> None:
    model = open_transformer(toys.klein.file).load(device=gpu, dtype=torch.bfloat16, storage=storage)
    steps = loop(model)
    next(steps)
    with no_waiting():
        assert len(list(steps)) == 4


def test_steps_of_a_streamed_model(toys: Toys, gpu: torch.device) -> None:
    model = load_transformer(toys.klein.file, device=torch.device("cpu"), dtype=torch.bfloat16)
    streaming = stream_blocks(model, [*model.double_blocks, *model.single_blocks], gpu)
    steps = loop(model)
    next(steps)
    with no_waiting():
        assert len(list(steps)) == 4
    streaming.close()


@torch.inference_mode()
def test_an_evaluation_that_fills_a_cache(toys: Toys, gpu: torch.device) -> None:
    """The work of a first step, its inputs being there."""
    model = load_transformer(toys.nine.file, device=gpu, dtype=torch.bfloat16)
    tokens, others = HIGH * WIDE, 6
    x = made(1, tokens + others, 128, seed=1).to(gpu, torch.bfloat16)
    ctx = made(1, TEXT, model.params.context_width, seed=2).to(gpu, torch.bfloat16)
    rope = model.rope(sequence_position_ids(TEXT, HIGH, WIDE, REFERENCES))
    t = torch.ones(1, device=gpu)
    with no_waiting():
        model(x, ctx, t, rope, outputs=tokens, cache=ReferenceCache(others))
