"""Prompts to context: a language model's hidden states at a few depths, side by side.

Does: Qwen3 and Mistral3 text towers; only the layers that are read are loaded, never the LM head, the vision tower or
the final norm. Does not know: which checkpoint asks; the `TextRecipe` says it all.

    context [B, L, taps * W]: L tokens (padded), W the encoder's width, the taps' hidden states joined per token

Pitfalls: padded tokens are part of the context, so they must be computed, under the padding mask. transformers applies
the final norm to the last hidden state; a tower cut at its last tap must not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2_studio.engine.params import TextRecipe
from flux2_studio.engine.runtime.footprint import META, peak_bytes, quantize_linear_layers
from flux2_studio.engine.text.decoder import TextDecoder, causal_attention_mask, text_decoder_params
from flux2_studio.engine.text.special_tokens import remove_special_tokens
from flux2_studio.engine.weights.formats import CheckpointContents, open_checkpoint_contents
from flux2_studio.engine.weights.layouts import TensorPlan, TensorSource, add_source
from flux2_studio.engine.weights.loading import WeightFile, WeightStorage, check_weight_file
from flux2_studio.engine.weights.tensor_files import read_json
from flux2_studio.errors import WeightsError

TEXT_ENCODER_FOLDER = "text_encoder"  # where a repository in diffusers' layout has the files
# Where the decoder's tensors stand: a causal LM's file, Mistral3's old and new spelling, a bare decoder.
_DECODER_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
# What a checkpoint holds beside the decoder, and conditioning does not need.
_UNUSED_TENSORS = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.|(?:language_model\.)?lm_head\.")


@dataclass(frozen=True)
class EncodedPrompts:
    """context: [B, L, taps * W]. truncated_tokens: for each prompt, how many tokens did not fit into L and were left
    out."""

    context: Tensor
    truncated_tokens: tuple[int, ...]


class TextEncoder:
    """A tokenizer and a decoder tower, cut after the last layer that is read. Build it with `load_text_encoder`.

    text_decoder: is called as `text_decoder.TextDecoder.forward` is.
    """

    def __init__(self, text_decoder: Any, tokenizer: Any, recipe: TextRecipe) -> None:
        self.text_decoder = text_decoder
        self._tokenizer = tokenizer
        self.recipe = recipe

    @property
    def device(self) -> torch.device:
        return next(self.text_decoder.parameters()).device

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> EncodedPrompts:
        """The context of each prompt, computed as one batch."""
        rows = [self._tokenize(prompt) for prompt in prompts]
        ids = torch.tensor([row[0] for row in rows], device=self.device)
        mask = torch.tensor([row[1] for row in rows], device=self.device)
        return EncodedPrompts(
            self.text_decoder(ids, causal_attention_mask(mask), self.recipe.hidden_layers),
            tuple(row[2] for row in rows),
        )

    def _tokenize(self, prompt: str) -> tuple[list[int], list[int], int]:
        """Token ids and mask, both of the recipe's length, and how many tokens of the prompt were cut."""
        recipe = self.recipe
        prompt = remove_special_tokens(prompt, recipe.removed_tokens)
        text = render_prompt(self._tokenizer, prompt, recipe)
        # The template writes every special token itself.
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        kept = ids[: recipe.length]
        pad = recipe.length - len(kept)
        # What the template writes after the prompt is no loss to the user.
        said = prompt if prompt in text else prompt.strip()  # some templates trim it
        ending = text.rpartition(said)[2] if said and said in text else ""
        cut = max(0, len(ids) - len(kept) - len(self._tokenizer(ending, add_special_tokens=False)["input_ids"]))
        padding, mask = [self._tokenizer.pad_token_id] * pad, [1] * len(kept)
        if recipe.padding_side == "left":
            return padding + kept, [0] * pad + mask, cut
        return kept + padding, mask + [0] * pad, cut


@dataclass(frozen=True)
class TextEncoderFile:
    """A text encoder whose files fit: all that is left is to read the weights. `width` is that of its context."""

    width: int
    recipe: TextRecipe
    _decoder_file: WeightFile[TextDecoder]
    tokenizer: Any

    def tensor_bytes(self, *, dtype: torch.dtype, storage: WeightStorage = "plain") -> dict[str, int]:
        """Bytes of memory of each of the tower's tensors, see `weights.WeightFile.tensor_bytes`."""
        return self._decoder_file.tensor_bytes(dtype=dtype, storage=storage)

    @property
    def block_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the names of the tower's layers, see `weights.WeightFile`."""
        return self._decoder_file.block_prefixes

    def activation_bytes(self, *, dtype: torch.dtype, prompts: int, quantized: bool = False) -> int:
        """Bytes alive at once, at most, while so many prompts are encoded, see `footprint.py`.

        Two layers stand for all: what the others add is the hidden states that are read, kept until all of them are.
        """
        taps, length = self.recipe.hidden_layers, self.recipe.length
        depth = min(2, self.recipe.layer_count)
        with META:
            tower = self._decoder_file.build().to(dtype)
            tower.layers = tower.layers[:depth]
            if quantized:
                quantize_linear_layers(tower.layers)
            ids = torch.empty(prompts, length, dtype=torch.long)
            mask = torch.empty(prompts, 1, length, length, dtype=torch.bool)
        peak = peak_bytes(lambda: tower(ids, mask, (depth,) * len(taps)), ids, mask)
        return peak + prompts * length * (self.width // len(taps)) * dtype.itemsize * (len(set(taps)) - 1)

    def load(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        storage: WeightStorage = "plain",
        use_mmap: bool = False,
        on_progress: Callable[[float], None] | None = None,
    ) -> TextEncoder:
        """storage: how the layers' matrices are held; for all arguments and errors see `weights.WeightFile.load`."""
        tower = self._decoder_file.load(
            device=device, dtype=dtype, storage=storage, use_mmap=use_mmap, on_progress=on_progress
        )
        return TextEncoder(tower, self.tokenizer, self.recipe)


def open_text_encoder(weights: Path, tokenizer: Path, recipe: TextRecipe) -> TextEncoderFile:
    """The text encoder in folder `weights` with the tokenizer in folder `tokenizer`. Raises `WeightsError`."""
    try:
        params = text_decoder_params(decoder_config(weights, recipe), recipe.layer_count, recipe.length)
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"The config.json in {weights.name} does not describe a text encoder that can be built ({error}). Download "
            f"it again."
        ) from error
    words = load_tokenizer(tokenizer, recipe)
    if len(words) > params.vocabulary:
        raise WeightsError(
            f"The tokenizer in {tokenizer.name} knows {len(words)} tokens, but the text encoder in {weights.name} only "
            f"{params.vocabulary}: one of them is another checkpoint's. Use the tokenizer that belongs to the encoder."
        )
    contents = open_checkpoint_contents(weights, TEXT_ENCODER_FOLDER)
    tower = check_weight_file(
        lambda: TextDecoder(params), contents, _decoder_plan(contents, recipe.layer_count), block_prefixes=("layers.",)
    )
    return TextEncoderFile(params.hidden * len(recipe.hidden_layers), recipe, tower, words)


def load_text_encoder(
    weights: Path, tokenizer: Path, recipe: TextRecipe, *, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """`open_text_encoder` and `load` in one."""
    return open_text_encoder(weights, tokenizer, recipe).load(device=device, dtype=dtype)


def load_tokenizer(folder: Path, recipe: TextRecipe) -> Any:
    """The tokenizer in `folder`, whose chat template has been tried as `recipe` uses it. Raises `WeightsError`."""
    # transformers takes seconds to import, and half of this package's users never need it
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise WeightsError(f"There is no tokenizer folder {folder}. Put the tokenizer's files there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        beside = folder / "chat_template.json"
        if tokenizer.chat_template is None and beside.is_file():
            # Multimodal repositories keep the template beside the tokenizer, for the processor.
            tokenizer.chat_template = json.loads(beside.read_text("utf-8"))["chat_template"]
        if tokenizer.chat_template is not None:
            render_prompt(tokenizer, "a prompt", recipe)
    except Exception as error:
        # A damaged or foreign tokenizer raises nearly anything: from JSON, tokenizers, the template's sandbox.
        raise WeightsError(
            f"The tokenizer in {folder.name} cannot be used: tokenizer.json, tokenizer_config.json or its chat "
            f"template is missing or damaged. Download the folder again."
        ) from error
    for what, value in (("chat template", tokenizer.chat_template), ("padding token", tokenizer.pad_token_id)):
        if value is None:
            raise WeightsError(f"The tokenizer in {folder.name} has no {what}: use the checkpoint's own tokenizer.")
    return tokenizer


def render_prompt(tokenizer: Any, prompt: str, recipe: TextRecipe) -> str:
    """`prompt` in the chat template, as the encoder reads it."""
    turns = [("user", prompt)] if recipe.system_prompt is None else [("system", recipe.system_prompt), ("user", prompt)]
    messages = [
        {"role": role, "content": [{"type": "text", "text": said}] if recipe.content_as_parts else said}
        for role, said in turns
    ]
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=recipe.generation_prompt, enable_thinking=False
    )
    return text


def decoder_config(weights: Path, recipe: TextRecipe) -> dict[str, Any]:
    """The decoder's fields of config.json, which has the layers that `recipe` reads. Raises `WeightsError`."""
    file = weights / "config.json"
    try:
        fields = read_json(file)
        fields = {**fields, **fields["text_config"]} if "text_config" in fields else fields
        family, layers, width = fields["model_type"], fields["num_hidden_layers"], fields["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{weights.name} is not a text encoder's folder: its config.json is missing or damaged. Point to the "
            f"folder that holds config.json and the .safetensors files."
        ) from error
    if family not in ("qwen3", "mistral"):
        raise WeightsError(f"{weights.name} holds a {family!r} model; FLUX.2 reads Qwen3 or Mistral text encoders.")
    if not isinstance(layers, int) or not isinstance(width, int) or layers < recipe.layer_count:
        raise WeightsError(
            f"The text encoder in {weights.name} has {layers} layers of width {width}; this checkpoint reads layer "
            f"{recipe.layer_count}. It belongs to another checkpoint."
        )
    return fields


def _decoder_plan(contents: CheckpointContents, layers: int) -> TensorPlan:
    """The decoder's tensors under their own names, without the layers and parts that are not read."""
    prefix = next((p for p in _DECODER_PREFIXES if f"{p}embed_tokens.weight" in contents.shapes), None)
    if prefix is None:
        raise WeightsError(f"{contents.name} holds no text encoder: there is no embed_tokens.weight in its files.")
    plan: TensorPlan = {}
    for key, shape in contents.shapes.items():
        name = key.removeprefix(prefix)
        layer = re.match(r"layers\.(\d{1,4})\.", name)
        if _UNUSED_TENSORS.match(key) or name == "norm.weight" or (layer and int(layer[1]) >= layers):
            continue
        add_source(plan, name, TensorSource((key,), shape))
    return plan
