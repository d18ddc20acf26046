"""Sizes of what is measured: the published models', and those of small ones for any machine."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.synthetic import FlowSize, TextSize
from flux2_studio.engine.params import AutoencoderParams, TransformerParams

SMALL = FlowSize(
    double_blocks=5,
    single_blocks=20,
    heads=2,
    text=TextSize(width=192, mlp=512, heads=4, key_heads=2, head_width=64, vocabulary=4096),
)
SMALL_WIDE = FlowSize(
    double_blocks=8,
    single_blocks=24,
    heads=3,
    text=TextSize(width=256, mlp=768, heads=4, key_heads=2, head_width=64, vocabulary=4096),
)
KLEIN_4B = FlowSize(
    double_blocks=5,
    single_blocks=20,
    heads=24,
    text=TextSize(width=2560, mlp=9728, heads=32, key_heads=8, head_width=128),
)
KLEIN_9B = FlowSize(
    double_blocks=8,
    single_blocks=24,
    heads=32,
    text=TextSize(width=4096, mlp=12_288, heads=32, key_heads=8, head_width=128, tied=False),
)
DEV = TransformerParams(
    in_channels=128,
    context_width=15_360,
    hidden=6144,
    head_width=128,
    mlp=18_432,
    double_blocks=8,
    single_blocks=48,
    guidance_embedding=True,
)
SMALL_AUTOENCODER = AutoencoderParams(
    encoder_channels=(32, 64, 64, 64),
    decoder_channels=(32, 64, 64, 64),
    encoder_blocks=1,
    decoder_blocks=2,
    latent_channels=32,
)
AUTOENCODER = AutoencoderParams(
    encoder_channels=(128, 256, 512, 512),
    decoder_channels=(128, 256, 512, 512),
    encoder_blocks=2,
    decoder_blocks=3,
    latent_channels=32,
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """All parts of one checkpoint. text: None where it is no Qwen3."""

    flow: TransformerParams
    text: TextSize | None
    autoencoder: AutoencoderParams


MODELS = {
    "small": Model(flow=SMALL.params, text=SMALL.text, autoencoder=SMALL_AUTOENCODER),
    "klein-4b": Model(flow=KLEIN_4B.params, text=KLEIN_4B.text, autoencoder=AUTOENCODER),
    "klein-9b": Model(flow=KLEIN_9B.params, text=KLEIN_9B.text, autoencoder=AUTOENCODER),
    "dev": Model(flow=DEV, text=None, autoencoder=AUTOENCODER),
}
