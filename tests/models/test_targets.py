"""The published checkpoints' sizes on the cards that they are meant for. All on meta: nothing is allocated."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

from flux2_studio.checkpoints import GB
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.params import AutoencoderParams, TransformerParams
from flux2_studio.engine.runtime.footprint import META
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.vae.tiny_autoencoder import TinyDecoder
from flux2_studio.models.memory.plan import (
    DENOISING_STAGE,
    PROMPT_STAGE,
    MemoryPlan,
    ModelFootprint,
    PartWeightBytes,
    RequestShape,
    count_weight_bytes,
    make_plan,
)

CUDA = torch.device("cuda")
BLOCKS = ("double_blocks.", "single_blocks.", "layers.")
PICTURE = RequestShape(width=1024, height=1024)
AUTOENCODER = AutoencoderParams(
    encoder_channels=(128, 256, 512, 512),
    decoder_channels=(128, 256, 512, 512),
    encoder_blocks=2,
    decoder_blocks=3,
    latent_channels=32,
)
# hidden, double and single blocks, context width
FLOWS = {"klein 4B": (3072, 5, 20, 7680), "klein 9B": (4096, 8, 24, 12288), "dev": (6144, 8, 48, 15360)}
# family, hidden, inner, layers that are read, vocabulary: as in the published config.json
TEXTS: dict[str, tuple[Any, Any, int, int, int, int]] = {
    "klein 4B": (Qwen3Config, Qwen3Model, 2560, 9728, 27, 151936),
    "klein 9B": (Qwen3Config, Qwen3Model, 4096, 12288, 27, 151936),
    "dev": (MistralConfig, MistralModel, 5120, 32768, 30, 131072),
}


def weights(model: nn.Module, bits: float) -> PartWeightBytes:
    """With matrices of the blocks in so many bits, and all else in 16."""
    sizes = {
        name: int(it.numel() * (bits if it.ndim == 2 and name.startswith(BLOCKS) else 16) / 8)
        for name, it in model.named_parameters()
    }
    return count_weight_bytes(sizes, [prefix for prefix in BLOCKS if any(name.startswith(prefix) for name in sizes)])


@lru_cache
def needs(name: str, flow_bits: float = 16, text_bits: float = 16) -> ModelFootprint:
    hidden, double, single, context = FLOWS[name]
    params = TransformerParams(
        in_channels=128,
        context_width=context,
        hidden=hidden,
        head_width=128,
        mlp=3 * hidden,
        double_blocks=double,
        single_blocks=single,
        guidance_embedding=name == "dev",
    )
    config, tower, width, inner, layers, vocabulary = TEXTS[name]
    fields = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    with META:
        text = tower(config(**fields, **heads))
        models = [Transformer(params), Autoencoder(AUTOENCODER), TinyDecoder()]
    flow, autoencoder, tiny = models
    return ModelFootprint(
        label=name,
        flow=weights(flow, flow_bits),
        transformer_params=params,
        flow_dtype=torch.bfloat16,
        flow_quantized=flow_bits < 16,
        autoencoder=weights(autoencoder, 16),
        autoencoder_params=AUTOENCODER,
        autoencoder_dtype=torch.bfloat16,
        text=weights(text, text_bits),
        text_activations=lambda prompts: prompts * 700 * 10**6,  # more than any of the three takes
        text_length=512,
        tiny=weights(tiny, 16),
        tiny_dtype=torch.float16,
        decodes_previews=True,
        caches_reference_kv=False,
    )


def plan(wanted: ModelFootprint, gigabytes: float) -> MemoryPlan:
    return make_plan(wanted, PICTURE, int(gigabytes * GB), CUDA)


def test_the_sizes_are_those_that_were_published() -> None:
    found = {name: needs(name) for name in FLOWS}
    assert [round(it.flow.total / GB, 2) for it in found.values()] == [7.75, 18.16, 64.45]
    assert found["dev"].text is not None and 33 < found["dev"].text.total / GB < 36


def test_klein_4b_in_8_gb() -> None:
    found = plan(needs("klein 4B"), 8)
    assert found.resident_parts == "all but the text encoder"
    assert found.stage(PROMPT_STAGE).streamed == 0 and 0 < found.stage(DENOISING_STAGE).streamed <= 12, (
        "half of it stays"
    )
    small = plan(needs("klein 4B", 8, 8), 8)
    assert small.resident_parts == "all but the text encoder"
    assert not any(stage.streamed or stage.strip_height for stage in small.stages), "nothing waits, nothing is cut"


@pytest.mark.parametrize(("bits", "streamed"), [(16, True), (8, False)])
def test_klein_9b_in_16_gb(bits: int, streamed: bool) -> None:
    found = plan(needs("klein 9B", bits, bits), 16)
    assert (
        found.resident_parts == "all but the text encoder" and bool(found.stage(DENOISING_STAGE).streamed) == streamed
    )


def test_dev_with_a_4_bit_file_in_24_gb() -> None:
    streamed = plan(needs("dev", 4.5), 24)
    assert streamed.resident_parts == "all but the text encoder"
    assert streamed.stage(PROMPT_STAGE).streamed and not streamed.stage(DENOISING_STAGE).streamed
    in_turn = plan(needs("dev", 4.5, 8), 24)
    assert in_turn.resident_parts == "all but the text encoder" and not any(stage.streamed for stage in in_turn.stages)
    assert plan(replace(needs("dev", 4.5), text=None), 24).is_resident, "with the text encoder on another machine"


def test_dev_in_fp8_in_54_gb() -> None:
    found = plan(needs("dev", 8), 54)
    assert found.resident_parts == "all but the text encoder" and not any(stage.streamed for stage in found.stages)
    assert plan(needs("dev", 8, 8), 55).is_resident, "with the text encoder in 8 bits, too"


def test_all_of_dev_in_bfloat16_in_141_gb() -> None:
    found = plan(needs("dev"), 141)
    assert found.is_resident and found.peak < 105 * GB
