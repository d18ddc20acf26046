"""Blocks compiled for a GPU compute what they do as they are written, within what bfloat16 rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.transformer_arms import held, made
from flux2_studio.engine.flux.latents import initial_noise
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.params import TransformerParams
from flux2_studio.engine.runtime.compiling import Compiler, clone_sharing_weights, compile_keys_for
from tests.oracle import relative_error

# klein 4B's widths, two blocks deep.
WIDE = TransformerParams(
    in_channels=128,
    context_width=7680,
    hidden=3072,
    head_width=128,
    mlp=9216,
    double_blocks=1,
    single_blocks=2,
    guidance_embedding=False,
)
LARGEST = 2.0  # times the error of the blocks as they are written


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture(scope="module")
def model(gpu: torch.device) -> Transformer:
    return made(WIDE, gpu, torch.bfloat16)


def picture(model: Transformer, side: int, batch: int, references: int, *, reference_cache: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(1, 512, WIDE.context_width, generator=generator)
    latents = [torch.randn(1, 128, side // 16, side // 16, generator=generator) for _ in range(references)]
    *_, last = denoise(
        model,
        initial_noise(range(batch), side, side),
        context,
        steps=2,
        guidance=1.0,
        guidance_mode="none",
        references=latents,
        reference_cache=reference_cache,
    )
    return last.latents.cpu()


@pytest.mark.parametrize("kind", [None, "fp8", "int8"])
@pytest.mark.parametrize(
    "side, batch, references, reference_cache",
    [(256, 1, 0, False), (400, 1, 1, False), (256, 3, 0, False), (256, 1, 1, True)],
)
def test_compiled_blocks_err_no_more(
    kind: Any, side: int, batch: int, references: int, reference_cache: bool, model: Transformer, compiler: Compiler
) -> None:
    exact = picture(held(model, "bfloat16", torch.float32), side, batch, references, reference_cache=reference_cache)
    written = model if kind is None else held(model, kind, torch.bfloat16)
    compiled = clone_sharing_weights(written)
    assert isinstance(compiled, Transformer)
    needed = compile_keys_for(batch, reference_cache=reference_cache)
    for variant in needed:
        compiler.compile(compiler.make_job(compiled, variant))
    assert compiler.attach(compiled, *needed)
    of_written, of_compiled = (
        picture(it, side, batch, references, reference_cache=reference_cache) for it in (written, compiled)
    )
    assert bool(of_compiled.isfinite().all())
    assert relative_error(of_compiled, exact) <= LARGEST * relative_error(of_written, exact)
    assert not of_compiled.equal(of_written), "it ran as it is written"
    assert of_compiled.equal(picture(compiled, side, batch, references, reference_cache=reference_cache))
