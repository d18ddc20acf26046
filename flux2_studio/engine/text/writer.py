"""A text encoder's full language model, used to write: it enhances prompts and answers questions about pictures.

Qwen3 and Mistral3 with all layers, norm and LM head; Mistral3 with its vision tower, which is transformers' own module.
Weights are loaded strictly. Sampling is seeded and uses a KV cache. The weights are held once for both uses:
`Writer.encoder` is a text encoder made of the writer's own first layers. Out of scope: instructions, and what the text
is for.

    pictures [1, 3, H, W] in -1..1; patch: pixels along one side of an image token (28 in Mistral Small 3.2)
    an image is read as rows of [IMG] tokens, each row closed by [IMG_BREAK], the last by [IMG_END]

Pitfalls: special tokens typed by users are removed, because a typed [IMG] has no picture and a typed end mark would end
the message. A character may take several tokens, so text is yielded only up to the last complete character.
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

MIN_CONTEXT_TOKENS = 4096  # attention window that a model must have to be used here
PREFILL_CHUNK_TOKENS = 512  # tokens read at once: bounds memory, and how long a cancel takes
IMAGE_TOKEN = "[IMG]"  # one per picture in the chat template, then replaced by one per image token
# Per-channel mean and deviation that Pixtral's vision tower was trained with: those of CLIP's images.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Name prefixes in files, and those of our modules. The last four are Mistral3's on the hub.
_PREFIX_TO_MODULE = {
    "model.": "body.",
    "lm_head.": "head.",
    "language_model.model.": "body.language_model.",
    "language_model.lm_head.": "head.",
    "vision_tower.": "body.vision_tower.",
    "multi_modal_projector.": "body.multi_modal_projector.",
}


class LanguageModel(nn.Module):
    """body: a `FullTextDecoder`, or transformers' Mistral3 around one, which has vision. tie_embeddings: the
    embedding is the LM head as well.
    """

    def __init__(self, body: Any, *, tie_embeddings: bool) -> None:
        super().__init__()
        self.body = body
        params = self.decoder.params
        self.head = None if tie_embeddings else nn.Linear(params.hidden, params.vocabulary, bias=False)

    @property
    def decoder(self) -> FullTextDecoder:
        """The decoder that reads and writes text."""
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
        """Return rows and columns of the image tokens of a picture of `height` x `width` pixels."""
        return math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)

    def embed(self, ids: Tensor, pixels: Sequence[Tensor]) -> Tensor:
        """Return embeddings [1, L, W] of token ids [1, L]. pixels: normalised pictures [1, 3, H, W], which fill the
        image tokens in order.
        """
        embeddings: Tensor = self.decoder.embed_tokens(ids)
        if pixels:
            features = []
            for image in pixels:  # one by one, to avoid padding to a common size
                output = self.body.get_image_features(image, torch.tensor([image.shape[2:]]), return_dict=True)
                features.append(output.pooler_output[0])
            is_image_token = (ids == self.body.config.image_token_id)[..., None]
            embeddings = embeddings.masked_scatter(is_image_token, torch.cat(features).to(embeddings))
        return embeddings

    def forward(self, embeddings: Tensor, kv_cache: KVCache) -> Tensor:
        """Return the logits [V] after the last of `embeddings` [1, L, W], which follow the tokens in `kv_cache`."""
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
    """A language model with its tokenizer. Build it with `open_writer(...).load(...)`. encoder: a text encoder that
    shares the weights.
    """

    def __init__(self, model: LanguageModel, tokenizer: Any, recipe: TextRecipe, stop_tokens: frozenset[int]) -> None:
        self.model = model
        self.encoder = TextEncoder(model.decoder.truncated_to(recipe.layer_count), tokenizer, recipe)
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._stop_tokens = stop_tokens

    @property
    def has_vision(self) -> bool:
        """Whether the model reads pictures."""
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
        """Yield the answer to `message` in pieces. Returns True if it ended by itself, False after `max_tokens` or a
        cancel.

        images: pictures [1, 3, H, W] in -1..1, placed before the message. temperature: 0 always takes the likeliest
        token. top_p: see `sample_token`. cancelled: checked before each token and prefill chunk. The same seed gives
        the same text on the same device and precision. Raises `DeviceError` if the logits overflow.
        """
        kv_cache = KVCache()
        generator = torch.Generator().manual_seed(seed)
        logits = self._prefill(system, message, images, kv_cache, cancelled)
        if logits is None:
            return False
        written: list[int] = []
        yielded = ""
        for _ in range(max_tokens):
            if cancelled():
                return False
            token = self._sample_token(logits, temperature, top_p, generator)
            if token in self._stop_tokens:
                return True
            written.append(token)
            text = self._tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            complete = text.rstrip("\ufffd")  # an incomplete character
            if len(complete) > len(yielded):
                yield complete[len(yielded) :]
                yielded = complete
            logits = self._step(self._embed([token], []), kv_cache)
        return False

    def next_logits(self, system: str, message: str, images: Sequence[Tensor] = ()) -> Tensor:
        """Return the logits [V], float32 on the CPU, of the first token of an answer, without writing it.

        Arguments and errors as for `write`.
        """
        logits = self._prefill(system, message, images, KVCache(), lambda: False)
        assert logits is not None
        return self._finite_logits(logits)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text`. Special tokens written in it are recognised; no others are added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _prefill(
        self, system: str, message: str, images: Sequence[Tensor], kv_cache: KVCache, cancelled: Callable[[], bool]
    ) -> Tensor | None:
        """Read the conversation into `kv_cache`. Returns the logits [V] of the next token, or None if `cancelled`."""
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
        """Return the token ids of the conversation, and the pictures normalised for the vision tower."""
        assert self.has_vision or not images, "this model reads text only"
        message = remove_special_tokens(message, self._special_tokens)
        pixels, rows = [], []
        for image in images:
            pixels.append(self._normalise_image(image))
            height, width = self.model.image_token_grid(*image.shape[2:])
            rows.append("[IMG_BREAK]".join([IMAGE_TOKEN * width] * height) + "[IMG_END]")
        text = render_conversation(self._tokenizer, system, message, len(images), self._recipe)
        if images:
            # All of these are from the template: the message has none left.
            token_rows = iter(rows)
            text = re.sub(re.escape(IMAGE_TOKEN), lambda _: next(token_rows), text)
        return self.tokenize(text), pixels

    @property
    def _special_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]

    def _normalise_image(self, image: Tensor) -> Tensor:
        """Normalise an image [1, 3, H, W] in -1..1 for the vision tower, its sides resized to the next multiples of
        a patch.
        """
        size = tuple(count * self.model.patch_size for count in self.model.image_token_grid(*image.shape[2:]))
        if size != image.shape[2:]:
            image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)
        mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (_CLIP_MEAN, _CLIP_STD))
        return (image / 2 + 0.5 - mean) / deviation


@dataclass(frozen=True)
class WriterFile:
    """A writer whose files are checked; only the weights remain to be read. text_encoder: its encoder part, as if
    opened alone. has_vision: whether it reads pictures.
    """

    text_encoder: TextEncoderFile
    has_vision: bool
    _model_file: WeightFile[LanguageModel]
    _stop_tokens: frozenset[int]

    @property
    def width(self) -> int:
        """Width of the encoder's context."""
        return self.text_encoder.width

    @property
    def recipe(self) -> TextRecipe:
        return self.text_encoder.recipe

    @property
    def block_prefixes(self) -> tuple[str, ...]:
        """Name prefixes of the decoder's layers, see `weights.loading.WeightFile`."""
        return self._model_file.block_prefixes

    def tensor_bytes(self, *, dtype: torch.dtype, storage: WeightStorage = "plain") -> dict[str, int]:
        """Bytes of memory of each tensor, see `weights.loading.WeightFile.tensor_bytes`."""
        return self._model_file.tensor_bytes(dtype=dtype, storage=storage)

    def activation_bytes(self, *, dtype: torch.dtype, prompts: int, quantized: bool = False) -> int:
        """Return the most bytes alive at the same time while `prompts` prompts are encoded."""
        return self.text_encoder.activation_bytes(dtype=dtype, prompts=prompts, quantized=quantized)

    def writing_bytes(
        self, *, dtype: torch.dtype, tokens: int, pictures: Sequence[tuple[int, int]] = (), quantized: bool = False
    ) -> int:
        """Return the most bytes alive at the same time while it writes, see `footprint.py`.

        tokens: upper bound for the text, including the answer (a text has at most one token per byte). pictures:
        (height, width) in pixels. Measured on two layers, plus the keys and values that all layers store.
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
            kv_cache = KVCache()
            for index in range(len(model.decoder.layers)):
                kv_cache.append(index, torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))
            peak = peak_bytes(lambda: model(chunk, kv_cache), chunk)
            for rows, columns in set(grids):
                size = (rows * model.patch_size, columns * model.patch_size)
                image = torch.empty(1, 3, *size, dtype=dtype)
                encode_image = partial(model.body.vision_tower, image, [size], output_hidden_states=[-1])
                peak = max(peak, peak_bytes(encode_image, image))
        kv_bytes = 2 * layers * params.kv_heads * tokens * params.head_width * dtype.itemsize
        embedding_bytes = tokens * params.hidden * dtype.itemsize  # all embeddings, which are read in chunks
        return peak + kv_bytes + embedding_bytes

    def load(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        storage: WeightStorage = "plain",
        use_mmap: bool = False,
        on_progress: Callable[[float], None] | None = None,
    ) -> Writer:
        """Load the writer. storage: how the layers' matrices are held. For all arguments and errors see
        `weights.loading.WeightFile.load`.
        """
        model = self._model_file.load(
            device=device, dtype=dtype, storage=storage, use_mmap=use_mmap, on_progress=on_progress
        )
        if model.has_vision:
            # Its position table is a buffer that no file contains: rebuild it on the device.
            vision = model.body.vision_tower
            positions = type(vision.patch_positional_embedding)(vision.config)
            vision.patch_positional_embedding = positions.to(device)
        return Writer(model, self.text_encoder.tokenizer, self.text_encoder.recipe, self._stop_tokens)


def open_writer(weights: Path, tokenizer: Path, recipe: TextRecipe) -> WriterFile:
    """Check the language model in folder `weights` and the tokenizer in folder `tokenizer`. Raises `WeightsError`.

    recipe: how the same model reads prompts, for `Writer.encoder`.
    """
    text_encoder = open_text_encoder(weights, tokenizer, recipe)
    fields = read_json(weights / "config.json")
    family = fields.get("model_type")
    if family not in ("qwen3", "mistral", "mistral3"):
        raise WeightsError(
            f"{weights.name} holds a {family!r} model, which cannot write prompts here: choose another one for "
            f"upsampling."
        )
    contents = open_checkpoint_contents(weights, "text_encoder")
    decoder_fields = fields["text_config"] if family == "mistral3" else fields
    try:
        params = text_decoder_params(
            decoder_config(weights, recipe), decoder_fields["num_hidden_layers"], MIN_CONTEXT_TOKENS
        )
        config = _mistral3_config(fields) if family == "mistral3" else None
        # The decoder's own field counts. Mistral3's outer config defaults to tied embeddings if the file lacks the
        # field, as in Mistral Small 3.2, which has a separate head.
        tie_embeddings = decoder_fields.get("tie_word_embeddings") is True

        def build() -> LanguageModel:
            decoder = FullTextDecoder(params)
            return LanguageModel(
                decoder if config is None else _build_mistral3(decoder, config), tie_embeddings=tie_embeddings
            )

        with META:
            meta_model = build()
    except Exception as error:
        # transformers raises many types for invalid fields: its validators' own errors, KeyError, ...
        raise WeightsError(
            f"The config.json in {weights.name} does not describe a language model that can be built. Download it "
            f"again."
        ) from error
    plan = _language_model_plan(contents, tie_embeddings=tie_embeddings)
    if not tie_embeddings and "head.weight" not in plan:
        raise WeightsError(
            f"{weights.name} has no lm_head: it can read prompts, but not write any. Use the whole language model."
        )
    has_vision = config is not None
    block_prefix = "body.language_model.layers." if has_vision else "body.layers."
    model = check_weight_file(build, contents, plan, meta_model=meta_model, block_prefixes=(block_prefix,))
    return WriterFile(
        text_encoder, has_vision, model, _find_stop_tokens(weights, (fields, decoder_fields), text_encoder.tokenizer)
    )


def _mistral3_config(fields: Mapping[str, Any]) -> Any:
    """Build transformers' Mistral3 config. Invalid fields can raise nearly any exception."""
    from transformers import Mistral3Config  # slow import, and only vision models need it

    config = Mistral3Config.from_dict(dict(fields))
    config._attn_implementation = "sdpa"
    return config


def _build_mistral3(decoder: FullTextDecoder, config: Any) -> Any:
    """Build transformers' Mistral3 without a head, with `decoder` in place of its own."""
    from transformers import Mistral3Model

    shallow = copy.deepcopy(config)
    shallow.text_config.num_hidden_layers = 1  # its own decoder is replaced below
    body = Mistral3Model(shallow)
    body.language_model = decoder
    return body


def sample_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Sample a token from `logits` [V]; the likeliest at temperature 0.

    top_p: sample only from the smallest set of likeliest tokens whose probabilities add up to at least `top_p` (nucleus
    sampling, Holtzman et al. 2019).
    """
    if temperature <= 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double() / temperature, -1)
    if top_p >= 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    probabilities, tokens = probabilities.sort(descending=True, stable=True)
    cumulative_before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(cumulative_before < top_p, probabilities, 0)
    # Keep one token even at top_p 0.
    probabilities[0] = probabilities[0].clamp(min=torch.finfo(probabilities.dtype).tiny)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def render_conversation(tokenizer: Any, system: str, message: str, images: int, recipe: TextRecipe) -> str:
    """Render the conversation with the chat template, ready for the answer, with an [IMG] for each picture."""
    content: str | list[dict[str, str]] = message
    if recipe.content_as_parts:
        pictures = [
            part
            for number in range(1, images + 1)
            for part in ({"type": "text", "text": f"Image {number}:"}, {"type": "image"})
        ]
        content = [*pictures, {"type": "text", "text": message}]
    system_content: str | list[dict[str, str]] = (
        [{"type": "text", "text": system}] if recipe.content_as_parts else system
    )
    text: str = tokenizer.apply_chat_template(
        [{"role": "system", "content": system_content}, {"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return text


def _language_model_plan(contents: CheckpointContents, *, tie_embeddings: bool) -> TensorPlan:
    """Plan the file's tensors under our names."""
    plan: TensorPlan = {}
    for key, shape in contents.shapes.items():
        prefix = max((name for name in _PREFIX_TO_MODULE if key.startswith(name)), key=len, default="")
        target = _PREFIX_TO_MODULE.get(prefix, "body.") + key.removeprefix(prefix)
        if tie_embeddings and target == "head.weight":
            continue  # some files store the embedding twice
        add_source(plan, target, TensorSource((key,), shape))
    return plan


def _find_stop_tokens(weights: Path, configs: Sequence[Mapping[str, Any]], tokenizer: Any) -> frozenset[int]:
    """Collect the tokens that end an answer from `configs`, generation_config.json and the tokenizer."""
    declared: list[Any] = [tokenizer.eos_token_id, *(config.get("eos_token_id") for config in configs)]
    with suppress(OSError, ValueError, AttributeError):  # optional file; the tokenizer has the token as well
        declared.append(read_json(weights / "generation_config.json").get("eos_token_id"))
    stop_tokens = {
        token
        for value in declared
        for token in (value if isinstance(value, list) else [value])
        if isinstance(token, int)
    }
    if not stop_tokens:
        raise WeightsError(f"The tokenizer for {weights.name} does not say how a text ends: download it again.")
    return frozenset(stop_tokens)
