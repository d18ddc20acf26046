"""What a stage is predicted to take of memory is what it takes, within 15 %: every allocation of a real run counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flux2_studio.checkpoints import DEV, KLEIN_4B
from flux2_studio.engine.flux.transformer import ReferenceCache, Rope, Transformer
from flux2_studio.engine.params import AutoencoderParams, TransformerParams
from flux2_studio.engine.runtime import footprint
from flux2_studio.engine.runtime.processor import has_bfloat16
from flux2_studio.engine.text.encoder import open_text_encoder
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.vae.tiny_autoencoder import TinyDecoder
from flux2_studio.engine.weights.gguf import BLOCK_FORMATS, GGUFMatrix
from flux2_studio.engine.weights.loading import WeightStorage
from flux2_studio.engine.weights.quantize import CHUNK_VALUES, QuantizedLinear, quantize
from tests.tiny import Toys

CPU = torch.device("cpu")
KLEIN = TransformerParams(
    in_channels=128,
    context_width=192,
    hidden=128,
    head_width=32,
    mlp=384,
    double_blocks=3,
    single_blocks=4,
    guidance_embedding=False,
)
GUIDED = replace(KLEIN, head_width=16, double_blocks=1, single_blocks=5, guidance_embedding=True)
WIDE = replace(KLEIN, hidden=512, head_width=64, mlp=1536)  # a layer's restored weight is more than its activations
NANO_AUTOENCODER = AutoencoderParams(
    encoder_channels=(32, 32, 32, 32),
    decoder_channels=(32, 32, 32, 32),
    encoder_blocks=0,
    decoder_blocks=1,
    latent_channels=32,
)
DEEP = AutoencoderParams(
    encoder_channels=(32, 64, 96, 96),
    decoder_channels=(32, 64, 96, 128),
    encoder_blocks=2,
    decoder_blocks=3,
    latent_channels=32,
)


def measured(run: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once during `run`, beside what was there before."""
    run()  # what a first run leaves behind for later ones is not its own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def agree(predicted: int, found: int) -> None:
    assert 0.85 * found <= predicted <= 1.15 * found, f"predicted {predicted / found:.2f} of {found} bytes"


def filled(model: Any) -> Any:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def hold(model: Transformer, kind: str) -> None:
    """The blocks' weights in few bits."""
    for blocks in (model.double_blocks, model.single_blocks):
        for name, layer in list(blocks.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                rows, cols = layer.weight.shape
                if kind in ("int8", "fp8"):
                    matrix: Any = quantize(layer.weight, kind)  # type: ignore[arg-type]
                else:
                    block = BLOCK_FORMATS[kind]
                    matrix = GGUFMatrix(
                        torch.zeros(rows, cols // block.values_per_block * block.bytes_per_block, dtype=torch.uint8),
                        kind,
                    )
                blocks.set_submodule(name, QuantizedLinear(matrix))


def evaluated(
    params: TransformerParams,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    text: int,
    references: int,
    reference_cache: bool,
    held: str,
) -> int:
    """What one evaluation of a transformer with random weights takes, its inputs included."""
    model: Transformer = filled(Transformer(params).to(dtype))
    if held:
        hold(model, held)

    @torch.inference_mode()
    def run() -> Any:
        length = text + tokens + references
        x = torch.randn(batch, tokens + references, params.in_channels, dtype=dtype)
        context = torch.randn(batch, text, params.context_width, dtype=dtype)
        angles = (torch.randn(length, params.head_width // 2) for _ in range(2))
        guidance = torch.ones(batch) if params.guidance_embedding else None
        cache = ReferenceCache(references) if reference_cache else None
        return model(x, context, torch.ones(batch), Rope(*angles), guidance, outputs=tokens, cache=cache), cache

    return measured(run)


FULL, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("params", "dtype", "batch", "tokens", "references", "reference_cache", "held"),
    [
        (KLEIN, FULL, 1, 64, 0, False, ""),
        (KLEIN, FULL, 1, 1024, 0, False, ""),
        (KLEIN, FULL, 3, 256, 0, False, ""),
        (KLEIN, HALF, 2, 512, 0, False, ""),
        (KLEIN, FULL, 1, 256, 700, False, ""),
        (KLEIN, FULL, 1, 256, 700, True, ""),
        (KLEIN, HALF, 2, 256, 700, True, ""),
        (GUIDED, FULL, 1, 512, 0, False, ""),
        (GUIDED, HALF, 2, 128, 512, False, ""),
        (KLEIN, FULL, 1, 128, 0, False, "int8"),
        (WIDE, FULL, 1, 16, 0, False, "int8"),
        (WIDE, HALF, 1, 16, 0, False, "int8"),
        (WIDE, HALF, 1, 16, 0, False, "fp8"),
        (WIDE, HALF, 1, 256, 0, False, "fp8"),
        (WIDE, HALF, 1, 128, 0, False, "Q4_K"),
        (WIDE, HALF, 1, 128, 0, False, "Q8_0"),
    ],
)
def test_the_transformer(
    params: TransformerParams,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    references: int,
    reference_cache: bool,
    held: str,
) -> None:
    predicted = footprint.transformer_bytes(
        params,
        dtype,
        batch=batch,
        image_tokens=tokens,
        text_tokens=64,
        reference_tokens=references,
        reference_cache=reference_cache,
        quantized=bool(held),
        on_cpu=True,
    )
    agree(predicted, evaluated(params, dtype, batch, tokens, 64, references, reference_cache, held))


def test_what_the_thirstiest_format_takes_beyond_the_one_that_stands_for_all() -> None:
    """Under 2.5 bytes for each value that is restored at a time: beside a real model's activations, next to nothing."""
    predicted = footprint.transformer_bytes(
        WIDE, HALF, batch=1, image_tokens=128, text_tokens=64, quantized=True, on_cpu=True
    )
    found = evaluated(WIDE, HALF, 1, 128, 64, 0, False, "Q6_K")
    restored = WIDE.hidden * (3 * WIDE.hidden + 2 * WIDE.mlp)
    assert restored < CHUNK_VALUES and 0 < found - predicted < 2.5 * restored
    assert 2.5 * CHUNK_VALUES < 42 * 10**6


def test_what_a_reference_cache_keeps() -> None:
    cache = ReferenceCache(300)
    with torch.inference_mode():
        filled(Transformer(KLEIN))(
            torch.randn(2, 316, 128),
            torch.randn(2, 8, 192),
            torch.ones(2),
            Rope(torch.randn(324, 16), torch.randn(324, 16)),
            outputs=16,
            cache=cache,
        )
    kept = sum(tensor.nbytes for pair in cache.blocks for tensor in pair)
    assert footprint.reference_cache_bytes(KLEIN, FULL, 2, 300) == kept


@pytest.mark.parametrize("params", [NANO_AUTOENCODER, DEEP], ids=["nano", "deep"])
@pytest.mark.parametrize(
    ("dtype", "width", "height", "rows"),
    [
        (FULL, 128, 128, None),
        (FULL, 192, 128, None),
        (HALF, 128, 128, None),
        (FULL, 64, 256, 64),
        (HALF, 64, 256, 64),
    ],
)
def test_the_autoencoder(
    params: AutoencoderParams, dtype: torch.dtype, width: int, height: int, rows: int | None
) -> None:
    if not has_bfloat16():
        dtype = FULL  # in which such a processor runs them, see `choose_dtype`
    model: Autoencoder = filled(Autoencoder(params).to(dtype))
    decoded = measured(lambda: model.decode(torch.randn(1, 128, height // 16, width // 16), rows))
    agree(footprint.decode_bytes(params, dtype, width, height, rows, on_cpu=True), decoded)
    encoded = measured(lambda: model.encode(torch.randn(1, 3, height, width, dtype=dtype), rows))
    agree(footprint.encode_bytes(params, dtype, width, height, rows, on_cpu=True), encoded)
    if rows:
        assert decoded < measured(lambda: model.decode(torch.randn(1, 128, height // 16, width // 16)))


def test_the_autoencoder_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch is built without it: torch writes out the input once for each position of a kernel."""
    monkeypatch.setattr(footprint, "_channel_block", lambda _dtype: None)
    model: Autoencoder = filled(Autoencoder(NANO_AUTOENCODER))
    predicted = footprint.decode_bytes.__wrapped__(NANO_AUTOENCODER, FULL, 64, 64, None, on_cpu=True)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    agree(predicted, measured(lambda: model.decode(torch.randn(1, 128, 4, 4))))


@pytest.mark.parametrize(("batch", "size"), [(1, 128), (1, 256), (2, 128)])
def test_the_tiny_decoder(batch: int, size: int) -> None:
    model: TinyDecoder = filled(TinyDecoder())

    @torch.inference_mode()
    def run() -> Tensor:
        return model(torch.randn(batch, 32, size // 8, size // 8)).float()

    agree(footprint.tiny_decode_bytes(FULL, batch, size, size, on_cpu=True), measured(run))


@pytest.mark.parametrize("storage", ["plain", "int8", "fp8"])
@pytest.mark.parametrize("prompts", [1, 2])
def test_text_towers(toys: Toys, storage: WeightStorage, prompts: int) -> None:
    for text, recipe in ((toys.qwen, KLEIN_4B.recipe), (toys.mistral, DEV.recipe)):
        opened = open_text_encoder(text.folder, text.folder, recipe)
        encoder = opened.load(device=CPU, dtype=FULL, storage=storage)
        predicted = opened.activation_bytes(dtype=FULL, prompts=prompts, quantized=storage != "plain")
        agree(predicted, measured(lambda: encoder.encode(["a fox"] * prompts)))  # noqa: B023 - run at once


def test_nothing_is_allocated_to_predict() -> None:
    """All of klein 4B at its largest, which would be gigabytes."""
    params = TransformerParams(
        in_channels=128,
        context_width=7680,
        hidden=3072,
        head_width=128,
        mlp=9216,
        double_blocks=5,
        single_blocks=20,
        guidance_embedding=False,
    )
    footprint.transformer_bytes.cache_clear()
    taken = measured(lambda: footprint.transformer_bytes(params, HALF, batch=4, image_tokens=16384, text_tokens=512))
    assert taken < 2**20 < footprint.transformer_bytes(params, HALF, batch=4, image_tokens=16384, text_tokens=512)
