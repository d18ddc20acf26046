"""A text encoder's whole language model, which writes: it enriches prompts and answers questions about pictures.

Does: Qwen3 and Mistral3 with all layers, norm and LM head, Mistral3 with its vision tower, which is transformers' own
module; weights are loaded strictly; seeded sampling with a cache of keys and values. The weights are held once
for both uses: `Writer.encoder` is a text encoder made of the writer's own first layers. Does not know: what it is told
to write, and what for.

    pictures [1, 3, H, W] in -1..1; patch: pixels along one side of an image token (28 in Mistral Small 3.2)
    an image is read as rows of [IMG] tokens, each row closed by [IMG_BREAK], the last by [IMG_END]

Pitfalls: what users type must not turn into special tokens (a typed [IMG] has no picture, a typed end mark ends the
message), so these are taken out. A character may take several tokens: text is only told as far as it is whole.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2_studio.engine.params import TextRecipe
from flux2_studio.engine.runtime.footprint import META, peak_bytes, quantize_linear_layers
from flux2_studio.engine.text.decoder import FullTextDecoder, KVCache, text_decoder_params
from flux2_studio.engine.text.encoder import TextEncoder, TextEncoderFile, decoder_config, open_text_encoder
from flux2_studio.engine.text.special_tokens import remove_special_tokens
from flux2_studio.engine.weights.formats import CheckpointContents, open_checkpoint_contents
from flux2_studio.engine.weights.layouts import TensorPlan, TensorSource, add_source
from flux2_studio.engine.weights.loading import WeightFile, WeightStorage, check_weight_file
from flux2_studio.engine.weights.quantize import StoredEmbedding
from flux2_studio.engine.weights.tensor_files import read_json
from flux2_studio.errors import DeviceError, WeightsError

MIN_CONTEXT_TOKENS = 4096  # tokens that a model must see at once to be used here
PREFILL_CHUNK_TOKENS = 512  # tokens read at once: bounds what is alive, and how long stopping takes
IMAGE_TOKEN = "[IMG]"  # in the chat template, where a picture is; then one for each of its tokens
# What Pixtral's vision tower was trained on: mean and deviation of CLIP's images, per channel.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# How a file's names begin, and what our module calls the same. The last four are Mistral3's spelling on the hub.
_PREFIX_TO_MODULE = {
    "model.": "body.",
    "lm_head.": "head.",
    "language_model.model.": "body.language_model.",
    "language_model.lm_head.": "head.",
    "vision_tower.": "body.vision_tower.",
    "multi_modal_projector.": "body.multi_modal_projector.",
}


class LanguageModel(nn.Module):
    """body: a `FullTextDecoder`, or transformers' Mistral3 around one, to see with. tied: whether the embedding is the
    head as well."""

    def __init__(self, body: Any, *, tie_embeddings: bool) -> None:
        super().__init__()
        self.body = body
        params = self.decoder.params
        self.head = None if tie_embeddings else nn.Linear(params.hidden, params.vocabulary, bias=False)

    @property
    def decoder(self) -> FullTextDecoder:
        """The tower that reads and writes text."""
        decoder: FullTextDecoder = self.body.language_model if self.has_vision else self.body
        return decoder

    @property
    def has_vision(self) -> bool:
        return hasattr(self.body, "vision_tower")

    @property
    def patch_size(self) -> int:
        """Pixels along one side of an image token."""
        config = self.body.config
        return int(config.vision_config.patch_size * config.spatial_merge_size)

    def image_token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the image tokens of a picture of that many pixels."""
        return math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)

    def embed(self, ids: Tensor, pixels: Sequence[Tensor]) -> Tensor:
        """[1, L, W] of token ids [1, L]; pixels: normalised pictures [1, 3, H, W], for the image tokens in order."""
        embeddings: Tensor = self.decoder.embed_tokens(ids)
        if pixels:
            features = []
            for image in pixels:  # one by one: none is padded to the size of another
                seen = self.body.get_image_features(image, torch.tensor([image.shape[2:]]), return_dict=True)
                features.append(seen.pooler_output[0])
            where = (ids == self.body.config.image_token_id)[..., None]
            embeddings = embeddings.masked_scatter(where, torch.cat(features).to(embeddings))
        return embeddings

    def forward(self, embeddings: Tensor, kv_cache: KVCache) -> Tensor:
        """Logits [V] after the last of `embeddings` [1, L, W], which follow what is in `kv_cache`."""
        last = self.decoder.forward_cached(embeddings, kv_cache)[0, -1]
        logits: Tensor = self._output_head(last)
        return logits

    @property
    def _output_head(self) -> Callable[[Tensor], Tensor]:
        if self.head is not None:
            return self.head
        embedding: nn.Embedding | StoredEmbedding = self.decoder.embed_tokens
        return embedding.head if isinstance(embedding, StoredEmbedding) else partial(F.linear, weight=embedding.weight)


class Writer:
    """A language model with its tokenizer. Build it with `open_writer`. encoder: reads prompts, on the same weights."""

    def __init__(self, model: LanguageModel, tokenizer: Any, recipe: TextRecipe, stop_tokens: frozenset[int]) -> None:
        self.model = model
        self.encoder = TextEncoder(model.decoder.truncated_to(recipe.layer_count), tokenizer, recipe)
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._stop_tokens = stop_tokens

    @property
    def has_vision(self) -> bool:
        """Whether it looks at pictures."""
        return self.model.has_vision

    def write(
        self,
        system: str,
        message: str,
        images: Sequence[Tensor] = (),
        *,
        seed: int,
        max_tokens: int,
        temperature: float = 0.15,
        top_p: float = 1.0,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generator[str, None, bool]:
        """Yields the answer to `message` in pieces; returns whether it came to its end, which it does not where
        `max_tokens` run out or it is `cancelled`, seen between two tokens.

        images: pictures [1, 3, H, W] in -1..1 that go before the message. temperature 0 takes the likeliest token each
        time; top_p: see `sample_token`. The same seed gives the same text on the same device and precision. Raises
        `DeviceError` where the numbers ran out of range.
        """
        past = KVCache()
        generator = torch.Generator().manual_seed(seed)
        logits = self._prefill(system, message, images, past, cancelled)
        if logits is None:
            return False
        written: list[int] = []
        told = ""
        for _ in range(max_tokens):
            if cancelled():
                return False
            token = self._sample_token(logits, temperature, top_p, generator)
            if token in self._stop_tokens:
                return True
            written.append(token)
            text = self._tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            whole = text.rstrip("\ufffd")  # the rest of a character is still to come
            if len(whole) > len(told):
                yield whole[len(told) :]
                told = whole
            logits = self._step(self._embed([token], []), past)
        return False

    def next_logits(self, system: str, message: str, images: Sequence[Tensor] = ()) -> Tensor:
        """The logits [V], float32 on the CPU, of the first token of an answer, of which nothing is written.

        Arguments and errors as for `write`.
        """
        logits = self._prefill(system, message, images, KVCache(), lambda: False)
        assert logits is not None
        return self._finite_logits(logits)

    def tokenize(self, text: str) -> list[int]:
        """`text_encoder` as tokens, none of them special unless it spells one out."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _prefill(
        self, system: str, message: str, images: Sequence[Tensor], kv_cache: KVCache, cancelled: Callable[[], bool]
    ) -> Tensor | None:
        """Read the conversation into `kv_cache`: the logits [V] of what follows, None once `cancelled`."""
        ids, pixels = self._prepare_inputs(system, message, images)
        logits: Tensor | None = None
        for chunk in self._embed(ids, pixels).split(PREFILL_CHUNK_TOKENS, 1):
            if cancelled():
                return None
            logits = self._step(chunk, kv_cache)
        return logits

    @torch.inference_mode()
    def _embed(self, ids: Sequence[int], pixels: Sequence[Tensor]) -> Tensor:
        device = self.encoder.device
        return self.model.embed(torch.tensor([ids], device=device), [image.to(device) for image in pixels])

    @torch.inference_mode()
    def _step(self, embeddings: Tensor, kv_cache: KVCache) -> Tensor:
        logits: Tensor = self.model(embeddings, kv_cache)
        return logits

    def _sample_token(self, logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
        return sample_token(self._finite_logits(logits), temperature, top_p, generator)

    @staticmethod
    def _finite_logits(logits: Tensor) -> Tensor:
        values = logits.float().cpu()
        if not bool(torch.isfinite(values).all()):
            raise DeviceError(
                f"The language model ran out of the range of {logits.dtype}. Set the precision to bfloat16 or float32 "
                f"(FLUX2_DTYPE, or --dtype)."
            )
        return values

    def _prepare_inputs(self, system: str, message: str, images: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
        """Token ids of the whole conversation, and the pictures as the vision tower takes them."""
        assert self.has_vision or not images, "this model reads text only"
        message = remove_special_tokens(message, self._special_tokens)
        pixels, rows = [], []
        for image in images:
            pixels.append(self._normalise_image(image))
            height, width = self.model.image_token_grid(*image.shape[2:])
            rows.append("[IMG_BREAK]".join([IMAGE_TOKEN * width] * height) + "[IMG_END]")
        text = render_conversation(self._tokenizer, system, message, len(images), self._recipe)
        if images:
            # Ours alone: none is left in the message.
            marks = iter(rows)
            text = re.sub(re.escape(IMAGE_TOKEN), lambda _: next(marks), text)
        return self.tokenize(text), pixels

    @property
    def _special_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]

    def _normalise_image(self, image: Tensor) -> Tensor:
        """[1, 3, H, W] in -1..1 as the vision tower takes it, its sides the next multiples of a patch."""
        size = tuple(count * self.model.patch_size for count in self.model.image_token_grid(*image.shape[2:]))
        if size != image.shape[2:]:
            image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)
        mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (_CLIP_MEAN, _CLIP_STD))
        return (image / 2 + 0.5 - mean) / deviation


@dataclass(frozen=True)
class WriterFile:
    """A writer whose files fit: all that is left is to read the weights. text_encoder: its encoder's part, as if alone.
    sees: whether it looks at pictures."""

    text_encoder: TextEncoderFile
    has_vision: bool
    _model_file: WeightFile[LanguageModel]
    _stop_tokens: frozenset[int]

    @property
    def width(self) -> int:
        """Of the encoder's context."""
        return self.text_encoder.width

    @property
    def recipe(self) -> TextRecipe:
        return self.text_encoder.recipe

    @property
    def block_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the names of the decoder's layers, see `weights.WeightFile`."""
        return self._model_file.block_prefixes

    def tensor_bytes(self, *, dtype: torch.dtype, storage: WeightStorage = "plain") -> dict[str, int]:
        """Bytes of memory of each tensor, see `weights.WeightFile.tensor_bytes`."""
        return self._model_file.tensor_bytes(dtype=dtype, storage=storage)

    def activation_bytes(self, *, dtype: torch.dtype, prompts: int, quantized: bool = False) -> int:
        """Bytes alive at once, at most, while so many prompts are encoded."""
        return self.text_encoder.activation_bytes(dtype=dtype, prompts=prompts, quantized=quantized)

    def writing_bytes(
        self, *, dtype: torch.dtype, tokens: int, pictures: Sequence[tuple[int, int]] = (), quantized: bool = False
    ) -> int:
        """Bytes alive at once, at most, while it writes, see `footprint.py`.

        tokens: of text, the answer included; no text has more than characters. pictures: height and width of each, in
        pixels. Two layers stand for all, beside the keys and values that each keeps.
        """
        with META:
            model = self._model_file.build().to(dtype)
            params, layers = model.decoder.params, len(model.decoder.layers)
            model.decoder.layers = model.decoder.layers[:2]
            if quantized:
                quantize_linear_layers(model.decoder.layers)
            grids = [model.image_token_grid(*size) for size in pictures]
            tokens += sum(rows * (columns + 1) for rows, columns in grids)
            chunk = torch.empty(1, min(PREFILL_CHUNK_TOKENS, tokens), params.hidden, dtype=dtype)
            shape = (1, params.kv_heads, max(0, tokens - PREFILL_CHUNK_TOKENS), params.head_width)
            past = KVCache()
            for index in range(len(model.decoder.layers)):
                past.append(index, torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))
            peak = peak_bytes(lambda: model(chunk, past), chunk)
            for rows, columns in set(grids):
                size = (rows * model.patch_size, columns * model.patch_size)
                image = torch.empty(1, 3, *size, dtype=dtype)
                look = partial(model.body.vision_tower, image, [size], output_hidden_states=[-1])
                peak = max(peak, peak_bytes(look, image))
        kept = 2 * layers * params.kv_heads * tokens * params.head_width * dtype.itemsize
        everything = tokens * params.hidden * dtype.itemsize  # the embeddings, while chunks of them are read
        return peak + kept + everything

    def load(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        storage: WeightStorage = "plain",
        use_mmap: bool = False,
        on_progress: Callable[[float], None] | None = None,
    ) -> Writer:
        """storage: how the layers' matrices are held; for all arguments and errors see `weights.WeightFile.load`."""
        model = self._model_file.load(
            device=device, dtype=dtype, storage=storage, use_mmap=use_mmap, on_progress=on_progress
        )
        if model.has_vision:
            # Its table is a buffer that no file holds: make it anew where it is used.
            vision = model.body.vision_tower
            positions = type(vision.patch_positional_embedding)(vision.config)
            vision.patch_positional_embedding = positions.to(device)
        return Writer(model, self.text_encoder.tokenizer, self.text_encoder.recipe, self._stop_tokens)


def open_writer(weights: Path, tokenizer: Path, recipe: TextRecipe) -> WriterFile:
    """The whole model in folder `weights`, with the tokenizer in folder `tokenizer`. Raises `WeightsError`.

    recipe: how the same model reads prompts, for `Writer.encoder`.
    """
    text = open_text_encoder(weights, tokenizer, recipe)
    fields = read_json(weights / "config.json")
    family = fields.get("model_type")
    if family not in ("qwen3", "mistral", "mistral3"):
        raise WeightsError(
            f"{weights.name} holds a {family!r} model, which cannot write prompts here: choose another one for "
            f"upsampling."
        )
    contents = open_checkpoint_contents(weights, "text_encoder")
    own = fields["text_config"] if family == "mistral3" else fields
    try:
        params = text_decoder_params(decoder_config(weights, recipe), own["num_hidden_layers"], MIN_CONTEXT_TOKENS)
        config = _mistral3_config(fields) if family == "mistral3" else None
        # The decoder's own word. Mistral3's outer config takes the head for tied where the file says nothing, as that
        # of Mistral Small 3.2 does, which has one of its own.
        tied = own.get("tie_word_embeddings") is True

        def build() -> LanguageModel:
            decoder = FullTextDecoder(params)
            return LanguageModel(decoder if config is None else _mistral3_around(decoder, config), tie_embeddings=tied)

        with META:
            blank = build()
    except Exception as error:
        # Whatever transformers raises for fields that make no model: its validators' own errors, KeyError, ...
        raise WeightsError(
            f"The config.json in {weights.name} does not describe a language model that can be built. Download it "
            f"again."
        ) from error
    plan = _language_model_plan(contents, tie_embeddings=tied)
    if not tied and "head.weight" not in plan:
        raise WeightsError(
            f"{weights.name} has no lm_head: it can read prompts, but not write any. Use the whole language model."
        )
    sees = config is not None
    blocks = "body.language_model.layers." if sees else "body.layers."
    model = check_weight_file(build, contents, plan, meta_model=blank, block_prefixes=(blocks,))
    return WriterFile(text, sees, model, _find_stop_tokens(weights, (fields, own), text.tokenizer))


def _mistral3_config(fields: Mapping[str, Any]) -> Any:
    """The config of a Mistral3 as transformers reads it, which raises nearly anything for fields that make none."""
    from transformers import Mistral3Config  # here: it takes seconds, and most writers see nothing

    config = Mistral3Config.from_dict(dict(fields))
    config._attn_implementation = "sdpa"
    return config


def _mistral3_around(decoder: FullTextDecoder, config: Any) -> Any:
    """transformers' Mistral3 without a head, with `decoder` in the place of its own."""
    from transformers import Mistral3Model

    shallow = copy.deepcopy(config)
    shallow.text_config.num_hidden_layers = 1  # its own decoder is not kept
    body = Mistral3Model(shallow)
    body.language_model = decoder
    return body


def sample_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token of `logits` [V]: the likeliest at temperature 0, else by chance.

    top_p: only the fewest likeliest tokens that together have so much of the probability are left (nucleus sampling,
    Holtzman et al. 2019).
    """
    if temperature <= 0:
        return int(logits.argmax())
    chances = torch.softmax(logits.double() / temperature, -1)
    if top_p >= 1:
        return int(torch.multinomial(chances, 1, generator=generator))
    chances, tokens = chances.sort(descending=True, stable=True)
    before = chances.cumsum(-1) - chances
    chances = torch.where(before < top_p, chances, 0)
    chances[0] = chances[0].clamp(min=torch.finfo(chances.dtype).tiny)  # top_p 0: one is always left
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])


def render_conversation(tokenizer: Any, system: str, message: str, images: int, recipe: TextRecipe) -> str:
    """The conversation in the chat template, ready for the answer, with an [IMG] for each picture."""
    content: str | list[dict[str, str]] = message
    if recipe.content_as_parts:
        pictures = [
            part
            for number in range(1, images + 1)
            for part in ({"type": "text", "text": f"Image {number}:"}, {"type": "image"})
        ]
        content = [*pictures, {"type": "text", "text": message}]
    told: str | list[dict[str, str]] = [{"type": "text", "text": system}] if recipe.content_as_parts else system
    text: str = tokenizer.apply_chat_template(
        [{"role": "system", "content": told}, {"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return text


def _language_model_plan(contents: CheckpointContents, *, tie_embeddings: bool) -> TensorPlan:
    """The file's tensors under our names."""
    plan: TensorPlan = {}
    for key, shape in contents.shapes.items():
        beginning = max((name for name in _PREFIX_TO_MODULE if key.startswith(name)), key=len, default="")
        target = _PREFIX_TO_MODULE.get(beginning, "body.") + key.removeprefix(beginning)
        if tie_embeddings and target == "head.weight":
            continue  # some files have the embedding twice
        add_source(plan, target, TensorSource((key,), shape))
    return plan


def _find_stop_tokens(weights: Path, configs: Sequence[Mapping[str, Any]], tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: whatever `configs`, the files beside the weights and the tokenizer call so."""
    named: list[Any] = [tokenizer.eos_token_id, *(it.get("eos_token_id") for it in configs)]
    with suppress(OSError, ValueError, AttributeError):  # not every repository has it, and the tokenizer knows as well
        named.append(read_json(weights / "generation_config.json").get("eos_token_id"))
    found = {
        token for value in named for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)
    }
    if not found:
        raise WeightsError(f"The tokenizer for {weights.name} does not say how a text ends: download it again.")
    return frozenset(found)
