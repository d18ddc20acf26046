"""Prompts to context: a language model's hidden states at a few depths, side by side.

Does: Qwen3 and Mistral3 text towers, through transformers; only the layers that are read are loaded, never the LM
head, the vision tower or the final norm. Does not know: which checkpoint asks; the `TextRecipe` says it all.

    context [B, L, taps * W]: L tokens (padded), W the encoder's width, the taps' hidden states joined per token

Pitfalls: padded tokens are part of the context, so they must be computed, under the padding mask. transformers applies
the final norm to the last hidden state; a tower cut at its last tap must not (its norm is replaced by identity).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2_studio.engine.params import TextRecipe
from flux2_studio.engine.weights import Plan, Source, TensorFiles, fill
from flux2_studio.errors import WeightsError

# Where the decoder's tensors stand: a causal LM's file, Mistral3's old and new spelling, a bare decoder.
_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
# What a checkpoint holds beside the decoder, and conditioning does not need.
_BESIDE = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.|(?:language_model\.)?lm_head\.")


@dataclass(frozen=True)
class Encoded:
    """context: [B, L, taps * W]. cut: for each prompt, how many tokens did not fit into L and were left out."""

    context: Tensor
    cut: tuple[int, ...]


class TextEncoder:
    """A tokenizer and a decoder tower, cut after the last layer that is read. Build it with `load_text_encoder`."""

    def __init__(self, tower: nn.Module, tokenizer: Any, recipe: TextRecipe) -> None:
        self._tower = tower
        self._tokenizer = tokenizer
        self.recipe = recipe

    @property
    def device(self) -> torch.device:
        return next(self._tower.parameters()).device

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Encoded:
        """The context of each prompt, computed as one batch."""
        rows = [self._tokens(prompt) for prompt in prompts]
        ids = torch.tensor([row[0] for row in rows], device=self.device)
        mask = torch.tensor([row[1] for row in rows], device=self.device)
        out = self._tower(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        context = torch.cat([out.hidden_states[tap] for tap in self.recipe.taps], -1)
        return Encoded(context, tuple(row[2] for row in rows))

    def _tokens(self, prompt: str) -> tuple[list[int], list[int], int]:
        """Token ids and mask, both of the recipe's length, and how many tokens were cut from the end."""
        recipe = self.recipe
        for token in recipe.removed:
            prompt = prompt.replace(token, "")
        turns = [("user", prompt)] if recipe.system is None else [("system", recipe.system), ("user", prompt)]
        messages = [
            {"role": role, "content": [{"type": "text", "text": said}] if recipe.content_as_parts else said}
            for role, said in turns
        ]
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=recipe.generation_prompt, enable_thinking=False
        )
        # The template writes every special token itself.
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        kept = ids[: recipe.length]
        pad = recipe.length - len(kept)
        padding, mask = [self._tokenizer.pad_token_id] * pad, [1] * len(kept)
        if recipe.padding_side == "left":
            return padding + kept, [0] * pad + mask, len(ids) - len(kept)
        return kept + padding, mask + [0] * pad, len(ids) - len(kept)


def context_width(weights: Path, recipe: TextRecipe) -> int:
    """The width of the context that the encoder in folder `weights` gives, from its config. Raises `WeightsError`."""
    return int(_config(weights, recipe)["hidden_size"]) * len(recipe.taps)


def load_text_encoder(
    weights: Path, tokenizer: Path, recipe: TextRecipe, *, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """The text encoder in folder `weights` with the tokenizer in folder `tokenizer`. Raises `WeightsError`."""
    # transformers takes seconds to import, and half of this package's users never need it
    from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

    fields = _config(weights, recipe)
    families: dict[str, tuple[Any, Any]] = {
        "qwen3": (Qwen3Config, Qwen3Model),
        "mistral": (MistralConfig, MistralModel),
    }
    config_class, model_class = families[fields["model_type"]]

    def build() -> Any:
        tower = model_class(config)
        tower.norm = nn.Identity()
        return tower

    try:
        config = config_class.from_dict(fields)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            build()
    except Exception as error:
        # Whatever transformers raises for fields that make no model: its validators' own errors, KeyError, ...
        raise WeightsError(
            f"The config.json in {weights.name} does not describe a text encoder that can be built. Download it again."
        ) from error
    words = load_tokenizer(tokenizer)
    if len(words) > config.vocab_size:
        raise WeightsError(
            f"The tokenizer in {tokenizer.name} knows {len(words)} tokens, but the text encoder in {weights.name} only "
            f"{config.vocab_size}: one of them is another checkpoint's. Use the tokenizer that belongs to the encoder."
        )

    files = TensorFiles(weights, "text_encoder")
    tower = fill(build, files, _tower_plan(files, recipe.layers), device=device, dtype=dtype)
    # Its tables are buffers that no file holds: make them anew where they are used.
    tower.rotary_emb = type(tower.rotary_emb)(config=config).to(device)
    return TextEncoder(tower, words, recipe)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, with its chat template. Raises `WeightsError`."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise WeightsError(f"There is no tokenizer folder {folder}. Put the tokenizer's files there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"The tokenizer in {folder.name} cannot be read: tokenizer.json or tokenizer_config.json is missing or "
            f"damaged. Download the folder again."
        ) from error
    if tokenizer.chat_template is None and (folder / "chat_template.json").is_file():
        # Multimodal repositories keep the template beside the tokenizer, for the processor.
        tokenizer.chat_template = json.loads((folder / "chat_template.json").read_text("utf-8"))["chat_template"]
    for what, value in (("chat template", tokenizer.chat_template), ("padding token", tokenizer.pad_token_id)):
        if value is None:
            raise WeightsError(f"The tokenizer in {folder.name} has no {what}: use the checkpoint's own tokenizer.")
    return tokenizer


def _config(weights: Path, recipe: TextRecipe) -> dict[str, Any]:
    """The decoder's fields of config.json, cut to the layers that `recipe` reads."""
    file = weights / "config.json"
    try:
        fields = json.loads(file.read_text("utf-8"))
        fields = {**fields, **fields["text_config"]} if "text_config" in fields else fields
        family, layers, width = fields["model_type"], fields["num_hidden_layers"], fields["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{weights.name} is not a text encoder's folder: its config.json is missing or damaged. Point to the "
            f"folder that holds config.json and the .safetensors files."
        ) from error
    if family not in ("qwen3", "mistral"):
        raise WeightsError(f"{weights.name} holds a {family!r} model; FLUX.2 reads Qwen3 or Mistral text encoders.")
    if not isinstance(layers, int) or not isinstance(width, int) or layers < recipe.layers:
        raise WeightsError(
            f"The text encoder in {weights.name} has {layers} layers of width {width}; this checkpoint reads layer "
            f"{recipe.layers}. It belongs to another checkpoint."
        )
    fields["num_hidden_layers"] = recipe.layers
    if isinstance(fields.get("layer_types"), list):
        fields["layer_types"] = fields["layer_types"][: recipe.layers]
    return fields


def _tower_plan(files: TensorFiles, layers: int) -> Plan:
    """The decoder's tensors under their own names, without the layers and parts that are not read."""
    prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in files.shapes), None)
    if prefix is None:
        raise WeightsError(f"{files.name} holds no text encoder: there is no embed_tokens.weight in its files.")
    plan: Plan = {}
    for key, shape in files.shapes.items():
        name = key.removeprefix(prefix)
        layer = re.match(r"layers\.(\d+)\.", name)
        if _BESIDE.match(key) or name == "norm.weight" or (layer and int(layer[1]) >= layers):
            continue
        plan[name] = Source((key,), shape)
    return plan
