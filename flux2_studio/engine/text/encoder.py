"""Prompts to context: a language model's hidden states at several depths, concatenated.

Uses the text decoders of Qwen3 and Mistral3. Only the layers that are needed are loaded, never the LM head, the vision
tower or the final norm. Out of scope: which checkpoint the encoder belongs to; a `TextRecipe` describes everything.

    context [B, L, S * W]: L tokens (padded), W the encoder's width, S hidden states concatenated per token

Pitfalls: padding tokens are part of the context, so they must be computed, with the padding mask. transformers applies
the final norm to the last hidden state; a decoder truncated at the last needed layer must not.
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

TEXT_ENCODER_FOLDER = "text_encoder"  # its folder in a repository in diffusers' layout
# Prefixes of the decoder's tensors: Mistral3's new and old names, a causal LM, a bare decoder.
_DECODER_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
# Tensors outside the decoder, which conditioning does not need.
_UNUSED_TENSORS = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.|(?:language_model\.)?lm_head\.")


@dataclass(frozen=True)
class EncodedPrompts:
    """context: [B, L, S * W], see the module's header. truncated_tokens: how many tokens of each prompt did not fit
    into L.
    """

    context: Tensor
    truncated_tokens: tuple[int, ...]


class TextEncoder:
    """A tokenizer and a decoder truncated after the last needed layer. Build it with `load_text_encoder`.

    text_decoder: has the call signature of `decoder.TextDecoder.forward`.
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
        """Encode `prompts` as one batch."""
        rows = [self._tokenize(prompt) for prompt in prompts]
        ids = torch.tensor([row[0] for row in rows], device=self.device)
        mask = torch.tensor([row[1] for row in rows], device=self.device)
        return EncodedPrompts(
            self.text_decoder(ids, causal_attention_mask(mask), self.recipe.hidden_layers),
            tuple(row[2] for row in rows),
        )

    def _tokenize(self, prompt: str) -> tuple[list[int], list[int], int]:
        """Return token ids and mask, both of the recipe's length, and the number of truncated prompt tokens."""
        recipe = self.recipe
        prompt = remove_special_tokens(prompt, recipe.removed_tokens)
        text = render_prompt(self._tokenizer, prompt, recipe)
        # The template already contains every special token.
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        kept_ids = ids[: recipe.length]
        padding_count = recipe.length - len(kept_ids)
        # Truncated tokens of the template's end do not count as lost.
        rendered_prompt = prompt if prompt in text else prompt.strip()  # some templates strip the prompt
        template_end = text.rpartition(rendered_prompt)[2] if rendered_prompt and rendered_prompt in text else ""
        truncated = max(
            0, len(ids) - len(kept_ids) - len(self._tokenizer(template_end, add_special_tokens=False)["input_ids"])
        )
        padding, mask = [self._tokenizer.pad_token_id] * padding_count, [1] * len(kept_ids)
        if recipe.padding_side == "left":
            return padding + kept_ids, [0] * padding_count + mask, truncated
        return kept_ids + padding, mask + [0] * padding_count, truncated


@dataclass(frozen=True)
class TextEncoderFile:
    """A text encoder whose files are checked; only the weights remain to be read. width: of the context (S * W)."""

    width: int
    recipe: TextRecipe
    _decoder_file: WeightFile[TextDecoder]
    tokenizer: Any

    def tensor_bytes(self, *, dtype: torch.dtype, storage: WeightStorage = "plain") -> dict[str, int]:
        """Bytes of memory of each of the decoder's tensors, see `weights.loading.WeightFile.tensor_bytes`."""
        return self._decoder_file.tensor_bytes(dtype=dtype, storage=storage)

    @property
    def block_prefixes(self) -> tuple[str, ...]:
        """Name prefixes of the decoder's layers, see `weights.loading.WeightFile`."""
        return self._decoder_file.block_prefixes

    def activation_bytes(self, *, dtype: torch.dtype, prompts: int, quantized: bool = False) -> int:
        """Return the most bytes alive at the same time while `prompts` prompts are encoded, see `footprint.py`.

        Two layers stand for all. The others only add the hidden states that are kept for the context.
        """
        hidden_layers, length = self.recipe.hidden_layers, self.recipe.length
        depth = min(2, self.recipe.layer_count)
        with META:
            decoder = self._decoder_file.build().to(dtype)
            decoder.layers = decoder.layers[:depth]
            if quantized:
                quantize_linear_layers(decoder.layers)
            ids = torch.empty(prompts, length, dtype=torch.long)
            mask = torch.empty(prompts, 1, length, length, dtype=torch.bool)
        peak = peak_bytes(lambda: decoder(ids, mask, (depth,) * len(hidden_layers)), ids, mask)
        return peak + prompts * length * (self.width // len(hidden_layers)) * dtype.itemsize * (
            len(set(hidden_layers)) - 1
        )

    def load(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        storage: WeightStorage = "plain",
        use_mmap: bool = False,
        on_progress: Callable[[float], None] | None = None,
    ) -> TextEncoder:
        """Load the encoder. storage: how the layers' matrices are held. For all arguments and errors see
        `weights.loading.WeightFile.load`.
        """
        decoder = self._decoder_file.load(
            device=device, dtype=dtype, storage=storage, use_mmap=use_mmap, on_progress=on_progress
        )
        return TextEncoder(decoder, self.tokenizer, self.recipe)


def open_text_encoder(weights: Path, tokenizer: Path, recipe: TextRecipe) -> TextEncoderFile:
    """Check the text encoder in folder `weights` and the tokenizer in folder `tokenizer`. Raises `WeightsError`."""
    try:
        params = text_decoder_params(decoder_config(weights, recipe), recipe.layer_count, recipe.length)
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"The config.json in {weights.name} does not describe a text encoder that can be built ({error}). Download "
            f"it again."
        ) from error
    loaded_tokenizer = load_tokenizer(tokenizer, recipe)
    if len(loaded_tokenizer) > params.vocabulary:
        raise WeightsError(
            f"The tokenizer in {tokenizer.name} knows {len(loaded_tokenizer)} tokens, but the text encoder in "
            f"{weights.name} only {params.vocabulary}: one of them is another checkpoint's. Use the tokenizer that "
            f"belongs to the encoder."
        )
    contents = open_checkpoint_contents(weights, TEXT_ENCODER_FOLDER)
    decoder_file = check_weight_file(
        lambda: TextDecoder(params), contents, _decoder_plan(contents, recipe.layer_count), block_prefixes=("layers.",)
    )
    return TextEncoderFile(params.hidden * len(recipe.hidden_layers), recipe, decoder_file, loaded_tokenizer)


def load_text_encoder(
    weights: Path, tokenizer: Path, recipe: TextRecipe, *, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """`open_text_encoder` and `load` in one call."""
    return open_text_encoder(weights, tokenizer, recipe).load(device=device, dtype=dtype)


def load_tokenizer(folder: Path, recipe: TextRecipe) -> Any:
    """Load the tokenizer in `folder`, and test its chat template with `recipe`. Raises `WeightsError`."""
    # imported here because transformers takes seconds to import, and many callers never need it
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise WeightsError(f"There is no tokenizer folder {folder}. Put the tokenizer's files there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        template_file = folder / "chat_template.json"
        if tokenizer.chat_template is None and template_file.is_file():
            # Multimodal repositories store the template in a separate file, for the processor.
            tokenizer.chat_template = json.loads(template_file.read_text("utf-8"))["chat_template"]
        if tokenizer.chat_template is not None:
            render_prompt(tokenizer, "a prompt", recipe)
    except Exception as error:
        # A damaged tokenizer can raise nearly anything: from JSON, tokenizers, the template's sandbox.
        raise WeightsError(
            f"The tokenizer in {folder.name} cannot be used: tokenizer.json, tokenizer_config.json or its chat "
            f"template is missing or damaged. Download the folder again."
        ) from error
    for missing, value in (("chat template", tokenizer.chat_template), ("padding token", tokenizer.pad_token_id)):
        if value is None:
            raise WeightsError(f"The tokenizer in {folder.name} has no {missing}: use the checkpoint's own tokenizer.")
    return tokenizer


def render_prompt(tokenizer: Any, prompt: str, recipe: TextRecipe) -> str:
    """Render `prompt` with the chat template, as the encoder reads it."""
    turns = [("user", prompt)] if recipe.system_prompt is None else [("system", recipe.system_prompt), ("user", prompt)]
    messages = [
        {"role": role, "content": [{"type": "text", "text": content}] if recipe.content_as_parts else content}
        for role, content in turns
    ]
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=recipe.generation_prompt, enable_thinking=False
    )
    return text


def decoder_config(weights: Path, recipe: TextRecipe) -> dict[str, Any]:
    """Read the decoder's fields of config.json, and check that it has the layers that `recipe` reads. Raises
    `WeightsError`.
    """
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
    """Plan the decoder's tensors: names without the file's prefix, only the first `layers` layers, no LM head, vision
    tower or final norm.
    """
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
