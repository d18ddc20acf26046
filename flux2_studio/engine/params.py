"""Sizes and constants that describe one model. Plain data: no torch, no files.

`weights/layouts.py` derives widths and depths from the tensors of a checkpoint, so all sizes share one code path.
`TextRecipe` holds what a weight file does not contain: how the text encoder was used in training.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TransformerParams:
    """Sizes of the flow transformer."""

    in_channels: int  # channels of one packed latent token (128)
    context_width: int  # width of one text token
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
    """Sizes of the autoencoder. Channel tuples have one entry per level, from full resolution down to the latent's."""

    encoder_channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    encoder_blocks: int  # residual blocks per level
    decoder_blocks: int
    latent_channels: int  # before packing (32)

    @property
    def patch(self) -> int:
        """Pixels along one side of a packed latent token: the downsampling of all levels, times 2 for 2x2 packing."""
        return 2 * 2 ** (len(self.encoder_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """How a prompt becomes the context: chat template, padding and hidden states.

    `hidden_layers` numbers the hidden states as transformers does: 0 is the token embedding, n the output of layer n.
    """

    hidden_layers: tuple[int, ...]
    length: int  # in tokens, padded; the flow transformer attends to padding too
    padding_side: str  # "left" | "right"
    generation_prompt: bool  # the chat template's add_generation_prompt
    system_prompt: str | None = None
    content_as_parts: bool = False  # the template expects [{"type": "text", ...}] instead of a string
    removed_tokens: tuple[str, ...] = ()  # special tokens to remove from the user's prompt

    @property
    def layer_count(self) -> int:
        """Number of decoder layers needed to compute `hidden_layers`."""
        return max(self.hidden_layers)
