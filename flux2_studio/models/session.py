"""One run's view of the models: it moves each part to the device when its stage needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.runtime.compiling import compile_keys_for
from flux2_studio.engine.text.decoder import TextDecoder
from flux2_studio.engine.text.encoder import EncodedPrompts, TextEncoder
from flux2_studio.engine.text.writer import Writer, WriterFile
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.vae.preview import AutoencoderPreview, LinearPreview, Previewer, TinyPreview
from flux2_studio.images.tensors import pixels_from_image
from flux2_studio.models.background_compiler import BackgroundCompiler
from flux2_studio.models.checkpoint_files import (
    CheckpointFiles,
    PartKey,
    decodes_own_previews,
)
from flux2_studio.models.cuda_graphs import CudaGraphPolicy
from flux2_studio.models.hub.repositories import ProgressCallback
from flux2_studio.models.loras import AppliedLora, LoraLibrary
from flux2_studio.models.memory.plan import (
    DECODING_STAGE,
    DENOISING_STAGE,
    PROMPT_STAGE,
    REFERENCES_STAGE,
    MemoryPlan,
    RequestShape,
    reduce_decoding_memory,
    spread_evenly,
)
from flux2_studio.models.memory.residency import Residency, collect_and_empty_cache, empty_cache
from flux2_studio.models.prompt_cache import PromptCache, ReferenceLatentCache
from flux2_studio.models.remote_text import RemoteTextEncoder
from flux2_studio.request import LoraChoice

OUT_OF_MEMORY_REASON = "memory ran out"
CPU_DEVICE = torch.device("cpu")
_LABELS = {"text": "text encoder", "flow": "transformer", "autoencoder": "autoencoder", "tiny": "preview decoder"}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The transformer and previewer on the device, ready to draw.

    `previewer` is None if previews are off. `applied_loras`: the LoRAs on the transformer. `is_compiled`: whether its
    blocks run compiled. `notes`: messages for the user about compilation and CUDA graphs.
    """

    transformer: Transformer
    previewer: Previewer | None
    applied_loras: tuple[AppliedLora, ...]
    is_compiled: bool
    notes: tuple[str, ...]


class Session:
    """A checkpoint with its memory plan. Each method moves the parts that it needs to the device and reports to
    `progress`, which may raise to cancel. Build it with `ModelManager.open`.

    loading_seconds: seconds spent so far on reading weights from files. used_cache: whether prompts or a reference came
    from the cache.
    """

    def __init__(
        self,
        *,
        files: CheckpointFiles,
        plan: MemoryPlan,
        shape: RequestShape,
        preview: str,
        loras: LoraLibrary,
        lora_choices: Sequence[LoraChoice],
        remote_encoder: RemoteTextEncoder | None,
        residency: Residency[PartKey],
        prompt_cache: PromptCache,
        reference_cache: ReferenceLatentCache,
        background_compiler: BackgroundCompiler,
        cuda_graphs: CudaGraphPolicy,
        streaming: bool,
    ) -> None:
        self.checkpoint = files.checkpoint
        self.plan = plan
        self.notes = files.notes
        self.loading_seconds = 0.0
        self.used_cache = False
        self._files = files
        self._preview = preview
        self._loras = loras
        self._lora_choices = lora_choices
        self._remote_encoder = remote_encoder
        self._residency = residency
        self._prompt_cache = prompt_cache
        self._reference_cache = reference_cache
        self._shape = shape
        self._background_compiler = background_compiler
        self._cuda_graphs = cuda_graphs
        self._streaming = streaming

    def encode_prompts(self, prompts: Sequence[str], progress: ProgressCallback) -> EncodedPrompts:
        """Returns the contexts of `prompts`, from the cache where possible."""
        all_cached = True

        def encode_missing(missing: Sequence[str]) -> EncodedPrompts:
            nonlocal all_cached
            all_cached = False
            if self._remote_encoder is not None:
                progress("Sending the prompt to the text encoder", None)
                return self._remote_encoder.encode(missing, progress)
            text: TextEncoder | Writer = self._acquire_stage(PROMPT_STAGE, progress)["text"]
            progress("Reading the prompt", None)
            encoder = text.encoder if isinstance(text, Writer) else text
            self._prepare_graphs(encoder.text_decoder)
            return encoder.encode(missing)

        key = self._files.keys.get("text")
        encoded = self._prompt_cache.get_or_encode(
            key.context_key if key else self._remote_encoder, prompts, encode_missing
        )
        self.used_cache |= all_cached
        return encoded

    def acquire_vision_model(self, progress: ProgressCallback | None = None) -> Writer | None:
        """Returns the language model that encodes the prompts, with room for asking it about pictures. None if only
        the text encoder is used, if the model has no vision, or if it is not on the device.

        progress: if given, the prompt stage's parts are loaded now; use this only before that stage. If None, nothing
        is loaded. No other model may run at the same time.
        """
        key = self._files.keys.get("text")
        if (
            key is None
            or not key.is_whole_model
            or not isinstance(text := self._files.text, WriterFile)
            or not text.has_vision
        ):
            return None
        if progress is not None:
            loaded: Writer = self._acquire_stage(PROMPT_STAGE, progress)["text"]
            return loaded
        writer: Writer | None = self._residency.get_on_device(key)
        if writer is not None:
            stage = self.plan.stage(PROMPT_STAGE)
            self._residency.evict_until(stage.activations, self.plan.limit, keep=list(self._files.keys.values()))
        return writer

    def encode_reference(self, image: Image.Image, progress: ProgressCallback) -> Tensor:
        """Returns the latent [1, 128, h, w] of `image`, from the cache if possible. Its sides are multiples of 16."""
        all_cached = True

        def encode_missing(picture: Image.Image) -> Tensor:
            nonlocal all_cached
            all_cached = False
            autoencoder: Autoencoder = self._acquire_stage(REFERENCES_STAGE, progress)["autoencoder"]
            stage = self.plan.stage(REFERENCES_STAGE)
            return autoencoder.encode(
                pixels_from_image(picture), stage.strip_height, CPU_DEVICE if stage.offload_activations else None
            )

        latent = self._reference_cache.get_or_encode(self._files.keys["autoencoder"], image, encode_missing)
        self.used_cache |= all_cached
        return latent

    def prepare_transformer(self, progress: ProgressCallback, batch_size: int = 1) -> Sampler:
        """Loads the transformer and the preview decoder and applies the request's LoRAs. batch_size: how many pictures
        are drawn at once."""
        parts = self._acquire_stage(DENOISING_STAGE, progress)
        transformer: Transformer = parts["flow"]
        applied = self._loras.apply_to(transformer, self._lora_choices)
        uses_reference_cache = self.checkpoint.caches_reference_kv and bool(self._shape.references)
        needed = compile_keys_for(batch_size * (2 if self._shape.use_cfg else 1), reference_cache=uses_reference_cache)
        compiled = self._background_compiler.try_use(transformer, self.checkpoint.flow.size, needed)
        self._prepare_graphs(transformer)
        return Sampler(
            transformer=transformer,
            previewer=self._previewer(parts),
            applied_loras=tuple(applied),
            is_compiled=compiled,
            notes=(*self._background_compiler.take_notes(), *self._cuda_graphs.take_notes()),
        )

    def _prepare_graphs(self, model: Transformer | TextDecoder) -> None:
        self._cuda_graphs.prepare(
            model, resident=self.plan.is_resident, compiling=self._background_compiler.is_compiling
        )

    def decode(self, latent: Tensor, progress: ProgressCallback) -> Tensor:
        """Decodes a latent [1, 128, h, w] to pixels [1, 3, H, W]."""
        autoencoder: Autoencoder = self._acquire_stage(DECODING_STAGE, progress)["autoencoder"]
        progress("Decoding", None)
        stage = self.plan.stage(DECODING_STAGE)
        return autoencoder.decode(latent, stage.strip_height, CPU_DEVICE if stage.offload_activations else None)

    def reduce_decoding_memory(self) -> bool:
        """Makes `decode` take less memory from now on, after it ran out. Returns False if that is not possible."""
        leaner = reduce_decoding_memory(self.plan, self._shape.height, streaming=self._streaming)
        if leaner is None:
            return False
        self.plan = leaner
        self._cuda_graphs.disable(OUT_OF_MEMORY_REASON)
        collect_and_empty_cache(self._residency.device)
        return True

    def preload(self, progress: ProgressCallback) -> None:
        """Loads all parts if they fit together, otherwise those of the first stage."""
        for stage in self.plan.stages if self.plan.is_resident else self.plan.stages[:1]:
            if stage.name != REFERENCES_STAGE:
                self._acquire_stage(stage.name, progress)

    def _previewer(self, parts: dict[str, Any]) -> Previewer | None:
        if self._preview == "off":
            return None
        if decodes_own_previews(self.checkpoint):
            return AutoencoderPreview(parts["autoencoder"])
        return TinyPreview(parts["tiny"]) if "tiny" in parts else LinearPreview()

    def _acquire_stage(self, name: str, progress: ProgressCallback) -> dict[str, Any]:
        """Loads the parts of a stage and makes room for its activations. Returns the parts by kind."""
        stage = self.plan.stage(name)
        resident_keys = [self._files.keys[kind] for kind in stage.resident_parts]
        for kind in stage.parts:
            offload_shared_weights(self._residency, self._files.keys[kind])
        resident_bytes = sum(self._residency.device_bytes_of(key) for key in resident_keys)
        self._residency.evict_until(stage.peak - resident_bytes, self.plan.limit, keep=resident_keys)
        acquired = {}
        for kind in stage.parts:
            key, status = self._files.keys[kind], f"Loading {self.checkpoint.label}: {_LABELS[kind]}"
            if not self._residency.device_bytes_of(key):
                progress(status, None)
            acquired[kind] = self._residency.acquire(
                key,
                partial(self._load_part, kind, on_progress=partial(progress, status)),
                module_of,
                get_streamed_blocks=select_streamed_blocks(stage.streamed) if kind == stage.parts[0] else None,
            )
        return acquired

    def _load_part(self, kind: str, device: torch.device, on_progress: Callable[[float], None]) -> Any:
        began = time.monotonic()
        try:
            return self._files.load(kind, device, on_progress)
        finally:
            self.loading_seconds += time.monotonic() - began


def offload_shared_weights(residency: Residency[PartKey], key: PartKey) -> None:
    """Prevents a text encoder and its complete language model from holding the same weights on the device twice.

    Call it before the part `key` is acquired. For a text encoder, the complete model is offloaded to main memory, from
    where it can return to write again. For a complete model, the text encoder is dropped.
    """
    if (twin := key.shared_with) is not None:
        if not key.is_whole_model:
            residency.offload(twin)
        elif residency.drop(twin):
            empty_cache(residency.device)


def module_of(model: Any) -> nn.Module:
    if isinstance(model, TextEncoder):
        return model.text_decoder
    module: nn.Module = model.model if isinstance(model, Writer) else model
    return module


def select_streamed_blocks(count: int) -> Callable[[Any], list[nn.Module]] | None:
    """Returns a function that selects `count` evenly spread blocks of a part for streaming; None if `count` is 0."""
    if not count:
        return None

    def select(model: Any) -> list[nn.Module]:
        if isinstance(model, TextEncoder | Writer):
            decoder: Any = model.text_decoder if isinstance(model, TextEncoder) else model.model.decoder
            blocks = list(decoder.layers)
        else:
            blocks = [*model.double_blocks, *model.single_blocks]
        return [blocks[i] for i in spread_evenly(count, len(blocks))]

    return select
