"""On a GPU the models compute what they compute on a CPU in float32, which diffusers has been compared with.

In float32 up to rounding. In bfloat16 with an error like that of a CPU in bfloat16: both round the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.synthetic import fill
from flux2_studio.checkpoints import DEV, KLEIN_4B
from flux2_studio.engine.flux.latents import sequence_position_ids
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.engine.flux.transformer import ReferenceCache, Transformer
from flux2_studio.engine.params import TransformerParams
from flux2_studio.engine.text.decoder import TextDecoder, TextDecoderParams, causal_attention_mask
from flux2_studio.engine.text.encoder import load_text_encoder
from flux2_studio.engine.vae.autoencoder import AttnBlock
from flux2_studio.engine.weights.loading import load_autoencoder, load_transformer
from tests.oracle import relative_error
from tests.tiny import Toys

CPU = torch.device("cpu")
ROUNDING = 1e-4  # of a model in float32, in other orders of summing
# klein 4B's widths, two blocks deep.
WIDE = TransformerParams(
    in_channels=128,
    context_width=7680,
    hidden=3072,
    head_width=128,
    mlp=9216,
    double_blocks=1,
    single_blocks=1,
    guidance_embedding=False,
)


def agrees(computed: Callable[[torch.device, torch.dtype], Tensor], gpu: torch.device) -> None:
    """`computed` on the GPU is what it is on the CPU, in both precisions."""
    exact = computed(CPU, torch.float32).cpu()
    # By itself cuDNN rounds what it multiplies in float32 to ten bits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert relative_error(computed(gpu, torch.float32).cpu(), exact) < ROUNDING
    on_cpu, on_gpu = (computed(device, torch.bfloat16).float().cpu() for device in (CPU, gpu))
    assert bool(on_gpu.isfinite().all())
    assert relative_error(on_gpu, exact) < 3 * relative_error(on_cpu, exact)


@torch.inference_mode()
def velocity(model: Transformer, text: int = 9, high: int = 3, wide: int = 4, *, cached: bool = False) -> Tensor:
    """One evaluation, with a reference as large as the picture. cached: of the second, which finds it in the cache."""
    generator = torch.Generator().manual_seed(7)

    def made(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(model.device, model.dtype)

    tokens = high * wide
    x, references, ctx = made(tokens, 128), made(tokens, 128), made(text, model.params.context_width)
    t = torch.tensor([0.5], device=model.device)
    guidance = torch.tensor([4.0], device=model.device) if model.params.guidance_embedding else None
    whole = model.rope(sequence_position_ids(text, high, wide, [torch.empty(1, 1, high, wide)]))
    cache = ReferenceCache(tokens) if cached else None
    out = model(torch.cat((x, references), 1), ctx, t, whole, guidance, outputs=tokens, cache=cache)
    if cached:
        out = model(
            x, ctx, t, model.rope(sequence_position_ids(text, high, wide)), guidance, outputs=tokens, cache=cache
        )
    return out


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["klein", "nine", "dev"])
def test_transformers(toys: Toys, gpu: torch.device, name: str, cached: bool) -> None:
    file: Path = getattr(toys, name).file
    agrees(lambda device, dtype: velocity(load_transformer(file, device=device, dtype=dtype), cached=cached), gpu)


def test_a_whole_loop(toys: Toys, gpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(8)
    noise = torch.randn(1, 128, 3, 4, generator=generator)
    context, negative = torch.randn(2, 1, 9, 96, generator=generator)

    def latents(device: torch.device) -> Tensor:
        model = load_transformer(toys.klein_base.file, device=device, dtype=torch.float32)
        steps = denoise(model, noise, context, steps=4, guidance=3.0, guidance_mode="cfg", negative_context=negative)
        return torch.stack([step.latents.cpu() for step in steps])

    assert relative_error(latents(gpu), latents(CPU)) < 10 * ROUNDING


@pytest.fixture(scope="module")
def wide(gpu: torch.device) -> Transformer:
    with torch.device("meta"):
        model = Transformer(WIDE)
    fill(model, seed=0, device=gpu, dtype=torch.bfloat16)
    return model.eval()


@pytest.mark.parametrize("cached", [False, True])
def test_a_block_of_klein_4b(wide: Transformer, cached: bool) -> None:
    exact = velocity(copy.deepcopy(wide).to(CPU, torch.float32), 64, 16, 16, cached=cached)
    assert relative_error(velocity(wide, 64, 16, 16, cached=cached).float().cpu(), exact) < 0.02
    full = velocity(copy.deepcopy(wide).float(), 64, 16, 16, cached=cached)
    assert relative_error(full.cpu(), exact) < ROUNDING


@pytest.mark.parametrize("name", ["qwen", "mistral"])
def test_text_encoders(toys: Toys, gpu: torch.device, name: str) -> None:
    """Mistral's prompts are padded before their first token, so that whole rows of its mask are empty."""
    folder, recipe = getattr(toys, name).folder, (KLEIN_4B if name == "qwen" else DEV).recipe

    def context(device: torch.device, dtype: torch.dtype) -> Tensor:
        encoder = load_text_encoder(folder, folder, recipe, device=device, dtype=dtype)
        return encoder.encode(["a red house by the river", ""]).context

    agrees(context, gpu)


@pytest.mark.parametrize("rows", [None, 32])
def test_autoencoders(toys: Toys, gpu: torch.device, rows: int | None) -> None:
    """Whole and in strips."""
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(5)) * 2 - 1
    latent = torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(6))

    def decoded(device: torch.device, dtype: torch.dtype) -> Tensor:
        return load_autoencoder(toys.autoencoder.file, device=device, dtype=dtype).decode(latent, rows)

    def encoded(device: torch.device, dtype: torch.dtype) -> Tensor:
        return load_autoencoder(toys.autoencoder.file, device=device, dtype=dtype).encode(pixels, rows)

    agrees(decoded, gpu)
    agrees(encoded, gpu)


# --- which kernels compute attention ---


KERNELS = {
    "flash": "aten::_scaled_dot_product_flash_attention",
    "cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "efficient": "aten::_scaled_dot_product_efficient_attention",
    "math": "aten::_scaled_dot_product_attention_math",
}


def attention_kernels(run: Callable[[], object]) -> set[str]:
    """Which of `KERNELS` PyTorch chose in `run`."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    called = {event.key for event in recorded.key_averages()}
    return {kind for kind, name in KERNELS.items() if name in called}


def test_the_transformer_gets_a_fast_kernel(wide: Transformer) -> None:
    for cached in (False, True):
        chosen = attention_kernels(lambda cached=cached: velocity(wide, 512, 32, 32, cached=cached))
        assert chosen and chosen <= {"flash", "cudnn"}, chosen


def test_the_text_encoder_keeps_no_matrix_of_scores(gpu: torch.device) -> None:
    """Its mask rules out the fastest kernels, but not those that do without the matrix."""
    size = {"hidden": 256, "mlp": 256, "layers": 1, "heads": 32, "kv_heads": 8, "head_width": 128}
    params = TextDecoderParams(vocabulary=16, eps=1e-6, rope_theta=1e6, attention_bias=False, qk_norm=True, **size)  # type: ignore[arg-type]
    with torch.device("meta"):
        tower = TextDecoder(params)
    fill(tower, seed=0, device=gpu, dtype=torch.bfloat16)
    ids, mask = torch.zeros(1, 512, dtype=torch.long, device=gpu), torch.ones(1, 512, device=gpu)
    chosen = attention_kernels(lambda: tower(ids, causal_attention_mask(mask), (1,)))
    assert chosen and "math" not in chosen, chosen


def test_the_autoencoder_keeps_no_matrix_of_scores(gpu: torch.device) -> None:
    block: nn.Module = AttnBlock(512).to(gpu, torch.bfloat16)
    x = torch.randn(1, 512, 64, 64, device=gpu, dtype=torch.bfloat16)
    chosen = attention_kernels(lambda: block(x))
    assert chosen and "math" not in chosen, chosen
