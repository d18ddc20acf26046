"""Sizes and constants that describe one model. Plain data: no torch, nothing about files.

Widths and depths are read from a checkpoint's own tensors (`loading.py` builds these), so a checkpoint of any size
takes the same path. `TextRecipe` is what a file cannot tell: how its text encoder was used in training.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TransformerParams:
    """The flow transformer's sizes."""

    in_channels: int  # of one packed latent token (128)
    context_width: int  # of one text token
    hidden: int
    head_width: int
    mlp: int  # inner width of the SwiGLU MLP (3 x hidden in every published checkpoint)
    double_blocks: int
    single_blocks: int
    guidance_embedding: bool
    time_channels: int = 256  # width of the sinusoidal embedding of t

    @property
    def heads(self) -> int:
        return self.hidden // self.head_width


@dataclass(frozen=True, kw_only=True)
class AutoencoderParams:
    """The autoencoder's sizes. Channels run from full resolution to the latent's, one entry per level."""

    encoder_channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    encoder_blocks: int  # residual blocks per level
    decoder_blocks: int
    latent_channels: int  # before packing (32)

    @property
    def patch(self) -> int:
        """Pixels along one side of a packed latent token: 2x2 packing over the levels' downsampling."""
        return 2 * 2 ** (len(self.encoder_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """How a prompt becomes the context: chat template, padding, and the hidden states that are read.

    `hidden_layers` index hidden states as transformers counts them: 0 is the token embedding, n the output of layer n.
    """

    hidden_layers: tuple[int, ...]
    length: int  # tokens, padded; every one of them takes part in attention
    padding_side: str  # "left" | "right"
    generation_prompt: bool  # add_generation_prompt of the chat template
    system_prompt: str | None = None
    content_as_parts: bool = False  # the template expects [{"type": "text", ...}] instead of a string
    removed_tokens: tuple[str, ...] = ()  # special tokens a user could type and the encoder must not see

    @property
    def layer_count(self) -> int:
        """How many decoder layers the taps need."""
        return max(self.hidden_layers)
