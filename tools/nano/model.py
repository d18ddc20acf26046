"""The two networks that are trained together, as the engine builds them, with gradients.

A run starts from a checkpoint folder in nano's layout. Where that folder holds no transformer, one is made at random
in the sizes that the recipe gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2_studio.checkpoints import NANO
from flux2_studio.engine.flux.transformer import FinalLayer, Modulation, RMSScale, Transformer
from flux2_studio.engine.params import TransformerParams
from flux2_studio.engine.text.decoder import causal_attention_mask
from flux2_studio.engine.text.encoder import open_text_encoder, render_prompt
from flux2_studio.engine.weights.loading import load_transformer
from tools.nano.recipe import Recipe


class Text(nn.Module):
    """Prompts to context [B, L, taps * W], as `engine.text.TextEncoder` computes it, but with gradients."""

    def __init__(self, text_decoder: nn.Module, tokenizer: Any, taps: tuple[int, ...], length: int) -> None:
        super().__init__()
        self.text_decoder = text_decoder
        self._tokenizer = tokenizer
        self._taps = taps
        self._length = length
        self._known: dict[str, list[int]] = {}

    def forward(self, prompts: list[str]) -> Tensor:
        rows = [self._tokens(prompt) for prompt in prompts]
        device = next(self.text_decoder.parameters()).device
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (self._length - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (self._length - len(row)) for row in rows], device=device)
        context: Tensor = self.text_decoder(ids, causal_attention_mask(mask), self._taps)
        return context

    def _tokens(self, prompt: str) -> list[int]:
        if prompt not in self._known:
            text = render_prompt(self._tokenizer, prompt, NANO.recipe)
            self._known[prompt] = self._tokenizer(text, add_special_tokens=False)["input_ids"][: self._length]
        return self._known[prompt]


def initial_text(init: Path, recipe: Recipe) -> Text:
    folder = init / "text_encoder"
    checked = open_text_encoder(folder, folder, NANO.recipe)
    encoder = checked.load(device=torch.device("cpu"), dtype=torch.float32)
    text_decoder = encoder.text_decoder.train().requires_grad_(True)
    return Text(text_decoder, encoder._tokenizer, NANO.recipe.hidden_layers, recipe.text_length)


def initial_transformer(init: Path, recipe: Recipe) -> Transformer:
    # The undistilled one where there are two: guidance that was burnt in is no place to learn from.
    files = (init / "transformer-base.safetensors", init / "transformer.safetensors")
    file = next((file for file in files if file.exists()), None)
    if file is not None:
        return load_transformer(file, device=torch.device("cpu"), dtype=torch.float32).requires_grad_(True)
    model = Transformer(TransformerParams(guidance_embedding=False, in_channels=128, **recipe.transformer))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, RMSScale):
            nn.init.ones_(module.scale)
    # Every block begins as the identity, and the whole as zero (adaLN-zero).
    for module in model.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.lin.weight)
        elif isinstance(module, FinalLayer):
            nn.init.zeros_(module.adaLN_modulation.get_parameter("1.weight"))
            nn.init.zeros_(module.linear.weight)
    return model
