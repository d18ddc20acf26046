"""The GPU's memory: streamed models are the very same, what leaves gives its bytes back, stages take what was said."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.sizes import AUTOENCODER
from benchmarks.synthetic import fill
from benchmarks.transformer_arms import held
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.params import TransformerParams
from flux2_studio.engine.runtime import footprint
from flux2_studio.engine.runtime.streaming import stream_blocks
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.models.memory.plan import ALLOCATOR_OVERHEAD, CUDA_WORKSPACE_BYTES
from flux2_studio.models.memory.residency import Residency, collect_and_empty_cache

CPU = torch.device("cpu")
HALF = torch.bfloat16
# Blocks of 25 to 55 MB, whose copies take as long as their products.
DEEP = TransformerParams(
    in_channels=128,
    context_width=256,
    hidden=1024,
    head_width=128,
    mlp=3072,
    double_blocks=2,
    single_blocks=5,
    guidance_embedding=False,
)
WIDE = replace(DEEP, context_width=7680, hidden=3072, mlp=9216, double_blocks=2, single_blocks=2)
SIDE = 1024
MARGIN = 1.15  # of a prediction


def made(params: TransformerParams, gpu: torch.device) -> Transformer:
    with torch.device("meta"):
        model = Transformer(params)
    fill(model, seed=0, device=gpu, dtype=HALF)
    return model.eval()


def drawn(model: Transformer) -> Tensor:
    """The latents of three steps, with one reference."""
    generator = torch.Generator().manual_seed(3)
    noise, reference = (torch.randn(1, 128, 16, 16, generator=generator) for _ in range(2))
    context = torch.randn(1, 64, model.params.context_width, generator=generator)
    steps = denoise(model, noise, context, steps=3, guidance=1.0, guidance_mode="none", references=[reference])
    return torch.stack([step.latents for step in steps]).cpu()


# --- streaming ---


@pytest.mark.parametrize("how", ["plain", "fp8", "int8"])
def test_a_streamed_transformer_draws_the_same(gpu: torch.device, how: str) -> None:
    """Run after run, without a pause between them, and again after it was away."""
    model = made(DEEP, gpu)
    if how != "plain":
        model = held(model, how, HALF)
    expected = drawn(model)
    model.to(CPU)
    before = torch.cuda.memory_allocated(gpu)
    streaming = stream_blocks(model, [*model.double_blocks, *model.single_blocks], gpu)
    assert torch.cuda.memory_allocated(gpu) - before <= 1.01 * streaming.device_bytes
    assert streaming.device_bytes < streaming.host_bytes
    for _ in range(3):
        assert torch.equal(drawn(model), expected)
    streaming.pause()
    streaming.resume()
    assert torch.equal(drawn(model), expected)
    streaming.close()
    assert model.device.type == "cpu"
    del streaming
    assert torch.cuda.memory_allocated(gpu) <= before


# --- what leaves ---


def test_memory_comes_back(gpu: torch.device) -> None:
    """When a part leaves, even if somebody still holds it, and from where it was kept it comes back the same."""
    collect_and_empty_cache(gpu)
    allocated, reserved = torch.cuda.memory_allocated(gpu), torch.cuda.memory_reserved(gpu)
    size = 4 * 8192**2
    parts: Residency[str] = Residency(gpu, host_budget=2 * size)

    def bring(key: str) -> nn.Module:
        module: nn.Module = parts.acquire(
            key, lambda device: nn.Linear(8192, 8192, bias=False, device=device).requires_grad_(False), lambda it: it
        )
        return module

    def taken() -> int:
        return torch.cuda.memory_allocated(gpu) - allocated

    first = bring("a")
    values = first.weight.clone().cpu()
    assert taken() == size
    parts.offload("a")
    assert taken() == 0 and parts.get_on_device("a") is None and first.weight.device.type == "cpu"
    assert torch.equal(bring("a").weight.cpu(), values)
    assert taken() == size
    bring("b")
    assert taken() == 2 * size
    parts.evict_until(size, limit=2 * size)  # the one that was not used for longest goes
    assert taken() == size and parts.get_on_device("a") is None
    parts.drop("b")
    assert taken() == 0
    parts.clear()
    assert torch.cuda.memory_reserved(gpu) <= reserved


def test_a_streamed_part_gives_its_memory_back(gpu: torch.device) -> None:
    """All of it: after the second time as much is taken as after the first, which leaves the libraries' workspaces."""
    parts: Residency[str] = Residency(gpu, host_budget=0)
    left = []
    for _ in range(2):
        model: Any = parts.acquire(
            "a",
            lambda device: made(DEEP, gpu).to(device),
            lambda it: it,
            get_streamed_blocks=lambda it: [*it.double_blocks, *it.single_blocks],
        )
        assert model.device.type == "cuda"
        drawn(model)
        parts.drop("a")
        gc.collect()
        left.append(torch.cuda.memory_allocated(gpu))
    assert left[1] <= left[0]


# --- what stages take ---


def taken(run: Callable[[], object], gpu: torch.device) -> int:
    """The most bytes that `run` allocates beside what is there, once it has been warmed up."""
    with torch.inference_mode():
        run()
        torch.cuda.synchronize(gpu)
        before = torch.cuda.memory_allocated(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        run()
        torch.cuda.synchronize(gpu)
    return torch.cuda.max_memory_allocated(gpu) - before


def test_an_evaluation_takes_what_is_planned(gpu: torch.device) -> None:
    model, tokens, text = made(WIDE, gpu), (SIDE // 16) ** 2, 512

    def run() -> object:
        x = torch.randn(1, tokens, 128, device=gpu, dtype=HALF)
        ctx = torch.randn(1, text, WIDE.context_width, device=gpu, dtype=HALF)
        t = torch.full((1,), 0.5, device=gpu)
        return model(x, ctx, t, model.rope(torch.zeros(text + tokens, 4)), outputs=tokens)

    planned = footprint.transformer_bytes(WIDE, HALF, batch=1, image_tokens=tokens, text_tokens=text)
    assert taken(run, gpu) <= MARGIN * planned + ALLOCATOR_OVERHEAD * CUDA_WORKSPACE_BYTES


def test_decoding_takes_what_is_planned(gpu: torch.device) -> None:
    with torch.device("meta"):
        model = Autoencoder(AUTOENCODER)
    fill(model, seed=0, device=gpu, dtype=HALF)
    model.bn.float()
    latent = torch.randn(1, 128, SIDE // 16, SIDE // 16)
    planned = footprint.decode_bytes(AUTOENCODER, HALF, SIDE, SIDE, None)
    assert taken(lambda: model.decode(latent), gpu) <= MARGIN * planned + ALLOCATOR_OVERHEAD * CUDA_WORKSPACE_BYTES
