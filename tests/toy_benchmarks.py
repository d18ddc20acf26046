"""Sizes at which the benchmarks take seconds."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.ceilings import ATTENTION, FP8, LINEAR
from benchmarks.pair import Size
from benchmarks.synthetic import FlowSize, TextSize
from flux2_studio.checkpoints import KLEIN_4B, KLEIN_9B, Checkpoint
from flux2_studio.engine.params import AutoencoderParams

TEXT = TextSize(width=32, mlp=64, heads=2, key_heads=1, head_width=16, layers=28, vocabulary=3072)


def short(checkpoint: Checkpoint) -> Checkpoint:
    """The same with short prompts and two steps."""
    return replace(checkpoint, recipe=replace(checkpoint.recipe, length=32), steps=2)


PAIR = Size(
    first=FlowSize(double_blocks=2, single_blocks=8, heads=4, head_width=64, text=TEXT),
    second=FlowSize(double_blocks=2, single_blocks=8, heads=5, head_width=64, text=replace(TEXT, width=48, tied=False)),
    autoencoder=AutoencoderParams(
        encoder_channels=(32, 32, 32, 32),
        decoder_channels=(32, 32, 32, 32),
        encoder_blocks=1,
        decoder_blocks=1,
        latent_channels=32,
    ),
    side=64,
    budget=None,
    rounds=1,
    runs=1,
    warmups=0,
    checkpoints=(short(KLEIN_4B), short(KLEIN_9B)),
)


FLOW = FlowSize(double_blocks=1, single_blocks=2, heads=2, head_width=32, text=TEXT)


AUTOENCODER = AutoencoderParams(
    encoder_channels=(32, 32, 32, 64),
    decoder_channels=(32, 32, 32, 64),
    encoder_blocks=1,
    decoder_blocks=2,
    latent_channels=32,
)


RATES = {LINEAR: 1e11, ATTENTION: 1e10, FP8: 2e11}
