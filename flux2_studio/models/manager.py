"""Checkpoints ready to run: files opened, a plan made to fit the memory, parts brought in as a run's stages ask.

`open` reads nothing but headers and decides how the request will fit; the `Session` that it gives brings each part to
the device when its stage comes. Parts are shared by what they are, so a swap between two checkpoints moves only what
differs, and as much of both stays in memory as fits.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flux2_studio.checkpoints import GB, Checkpoint, LocalWriter
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.lora import adapters as lora
from flux2_studio.engine.runtime.compiling import Compiler, compile_keys_for
from flux2_studio.engine.runtime.graphs import CaptureFn
from flux2_studio.engine.text.decoder import TextDecoder
from flux2_studio.engine.text.encoder import EncodedPrompts, TextEncoder
from flux2_studio.engine.text.writer import Writer, WriterFile
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.vae.preview import AutoencoderPreview, LinearPreview, Previewer, TinyPreview
from flux2_studio.errors import OutOfMemory, StudioError, WeightsError
from flux2_studio.images.tensors import pixels_from_image
from flux2_studio.models.background_compiler import BackgroundCompiler
from flux2_studio.models.checkpoint_files import (
    MAX_CONVERSATION_TOKENS,
    PART_SUBFOLDERS,
    CheckpointFiles,
    CheckpointOpener,
    PartKey,
    decodes_own_previews,
)
from flux2_studio.models.cuda_graphs import CudaGraphPolicy
from flux2_studio.models.hub.fingerprint import WeightHashes
from flux2_studio.models.hub.repositories import Hub, ProgressCallback
from flux2_studio.models.loras import AppliedLora, LoraLibrary
from flux2_studio.models.memory import available as memory
from flux2_studio.models.memory.choices import choose_device
from flux2_studio.models.memory.cpu_quota import limit_torch_threads, read_cpu_quota
from flux2_studio.models.memory.plan import (
    DECODING_STAGE,
    DENOISING_STAGE,
    PROMPT_STAGE,
    REFERENCES_STAGE,
    MemoryPlan,
    RequestShape,
    make_plan,
    reduce_decoding_memory,
    spread_evenly,
)
from flux2_studio.models.memory.residency import Residency, collect_and_empty_cache, empty_cache
from flux2_studio.models.prompt_cache import PromptCache, ReferenceLatentCache
from flux2_studio.models.remote_text import RemoteTextEncoder
from flux2_studio.models.writers import (
    LoadedWriter,
    WriterOffer,
    find_text_encoder_writer,
    list_writer_offers,
    plan_writer,
)
from flux2_studio.request import LoraChoice
from flux2_studio.settings import Settings

CPU_DEVICE = torch.device("cpu")
OUT_OF_MEMORY_REASON = "memory ran out"
HOST_MEMORY_SHARE = 0.5  # of main memory, for weights that have left the device
RETRY_MEMORY_FACTOR = 0.75  # of what a plan was to take that turned out to be too much
_LABELS = {"text": "text encoder", "flow": "transformer", "autoencoder": "autoencoder", "tiny": "preview decoder"}


class ModelManager:
    """Opens checkpoints. One run at a time: sessions are not made for concurrent use; `predict_plan` may be asked any
    time.

    host_budget: bytes of main memory for weights that have left the device. streaming: whether blocks may wait there;
    both by default only where the device has a memory of its own. compiler: torch's by default.
    """

    def __init__(
        self,
        settings: Settings,
        hub: Hub,
        *,
        host_budget: int | None = None,
        streaming: bool | None = None,
        compiler: Compiler | None = None,
        capture: CaptureFn | None = None,
    ) -> None:
        self._settings = settings
        self._hub = hub
        self.device = choose_device(settings.device)
        limit_torch_threads(read_cpu_quota())
        apart = self.device.type == "cuda"
        if host_budget is None:
            host_budget = int(HOST_MEMORY_SHARE * memory.total_memory(CPU_DEVICE)) if apart else 0
        self._streaming = apart if streaming is None else streaming
        self.loras = LoraLibrary(settings)
        self._opener = CheckpointOpener(settings, hub, self.device)
        self._residency: Residency[PartKey] = Residency(self.device, host_budget, on_evict=self._detach_extras)
        self._failed_peak_bytes: dict[
            tuple[str, RequestShape], int
        ] = {}  # peaks of plans that ran out of memory all the same
        self._prompt_cache = PromptCache()
        self._reference_cache = ReferenceLatentCache()
        self.background_compiler = BackgroundCompiler(
            settings.compile, self.device, compiler or Compiler(cache_folder=settings.compile_cache)
        )
        self.cuda_graphs = CudaGraphPolicy(settings.graphs, self.device, capture)
        self._fingerprints = WeightHashes(settings.home / "hashes.json")

    def is_on_disk(self, checkpoint: Checkpoint) -> bool:
        """Whether `checkpoint` can be loaded without a download."""
        return all(self._hub.is_on_disk(part) for part in self._opener.parts(checkpoint))

    def open(
        self,
        checkpoint: Checkpoint,
        shape: RequestShape,
        progress: ProgressCallback,
        *,
        loras: Sequence[LoraChoice] = (),
        failed_plan: MemoryPlan | None = None,
        load_vision_model: bool = False,
    ) -> Session:
        """`checkpoint` for a request of `shape`, from disk or the hub. `progress` may raise to give up.

        failed_plan: the plan that ran out of memory, to be leaner than. load_vision_model: whether to load all of the
        text encoder's language model in place of the encoder where that sees pictures, so that it can be asked about
        them; where that cannot be, the session's notes say so. Without it, too, prompts are read with the whole model
        while it is on the device, having written, unless drawing would be slower for that. So `acquire_writer` goes
        before `open`.

        Raises `WeightsError` for files that are missing, damaged or not of this checkpoint, and LoRAs that are not;
        `OutOfMemory` where no plan fits.
        """
        opened = self._opener.open(checkpoint, progress)
        self.loras.check(loras, checkpoint, opened.flow.params)
        opened, plan = self._choose_text_model(opened, shape, loras, failed_plan, load_vision_model, progress)
        return self._session(opened, plan, shape, loras)

    def predict_plan(
        self,
        checkpoint: Checkpoint,
        shape: RequestShape,
        loras: Sequence[LoraChoice] = (),
        *,
        load_vision_model: bool = False,
    ) -> MemoryPlan:
        """The plan for a request, of a checkpoint that is on disk. Arguments and errors as for `open`."""
        opened = self._opener.open(checkpoint, _ignore_progress, fetch_preview_decoder=False)
        return self._choose_text_model(opened, shape, loras, None, load_vision_model, _ignore_progress)[1]

    def acquire_writer(
        self,
        model: LocalWriter,
        progress: ProgressCallback,
        image_sizes: Sequence[tuple[int, int]] = (),
        *,
        tokens: int = MAX_CONVERSATION_TOKENS,
    ) -> LoadedWriter:
        """`model` on the device, from disk or the hub, with room for what writing takes; other parts leave for it.

        image_sizes: (height, width) in pixels of each that it is to see, as it will be shown. tokens: of the whole
        conversation, the answer included. `progress` may raise to give up. The writer is the device's until another
        part needs its room: have it write before anything else is opened.

        Raises `WeightsError` for files that are missing, damaged or cannot write, `OutOfMemory` where nothing fits.
        """
        opened = self._opener.writer(model, progress)
        place = plan_writer(
            opened,
            self._budget(),
            self.device,
            tokens=tokens,
            image_sizes=image_sizes,
            free_host_bytes=self._free_host_bytes(),
            streaming=self._streaming,
        )
        key, words = opened.key, f"Loading {model.label}"
        _offload_shared_weights(self._residency, key)
        self._residency.evict_until(place.peak - self._residency.device_bytes_of(key), place.limit, keep=[key])
        if not self._residency.device_bytes_of(key):
            progress(words, None)
        writer: Writer = self._residency.acquire(
            key,
            partial(opened.load, on_progress=partial(progress, words)),
            _module_of,
            get_streamed_blocks=_select_streamed_blocks(place.streamed),
        )
        return LoadedWriter(writer=writer, notes=place.make_notes(model.label))

    def list_writers(self, checkpoint: Checkpoint) -> tuple[WriterOffer, ...]:
        """The language models on this machine that may enrich prompts for `checkpoint`, its own first. Uses no network.

        There are none for the toys.
        """
        return list_writer_offers(checkpoint, self._settings, self._hub, self._opener)

    def quick_hash(self, checkpoint: Checkpoint) -> str | None:
        """The SHA-256 of the transformer's weights if it is known or read in a moment, see `compute_hash`; None
        otherwise, and where they are not on this machine. Uses no network. Raises `WeightsError` for files that cannot
        be read.
        """
        if not self._hub.is_on_disk(checkpoint.flow):
            return None
        files = self._hub.find(checkpoint.flow)
        return self._fingerprints.get_quick(files.weights, PART_SUBFOLDERS["flow"]) if files else None

    def compute_hash(self, checkpoint: Checkpoint, progress: ProgressCallback) -> str:
        """The SHA-256 of the transformer's weights; of a folder's, that of its files' lines "name hash", sorted. What
        is not known by now is read whole, once. `progress` may raise to give up. Raises `WeightsError`."""
        files = self._hub.find_or_download(checkpoint.flow, progress)
        return self._fingerprints.compute(files.weights, progress, PART_SUBFOLDERS["flow"])

    def is_loaded(self, checkpoint: Checkpoint) -> bool:
        """Whether the transformer of `checkpoint`, which is on disk, is in memory. Raises `WeightsError`."""
        return self._residency.is_loaded(
            self._opener.open(checkpoint, _ignore_progress, fetch_preview_decoder=False).keys["flow"]
        )

    @property
    def device_name(self) -> str:
        """The device as one tells it from others: how long something takes depends on it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} of {platform.machine()} with {torch.get_num_threads()} threads"

    @property
    def device_label(self) -> str:
        """What the memory belongs to, in words."""
        return "the card" if self.device.type == "cuda" else "this machine"

    @property
    def memory_capacity(self) -> int:
        """Bytes of the device's memory that there are, or that the studio may take."""
        limit = self._settings.memory_limit_gb
        whole = memory.total_memory(self.device)
        return whole if limit is None else min(whole, int(limit * GB))

    def release_unused_memory(self) -> None:
        """Give memory that no weight occupies back to the device, which ran out of it."""
        self.cuda_graphs.disable(OUT_OF_MEMORY_REASON)
        collect_and_empty_cache(self.device)

    def release_all(self) -> None:
        """Forget all weights."""
        self.cuda_graphs.clear()
        self._residency.clear()

    def _choose_text_model(
        self,
        files: CheckpointFiles,
        shape: RequestShape,
        loras: Sequence[LoraChoice],
        failed_plan: MemoryPlan | None,
        load_vision_model: bool,
        progress: ProgressCallback,
    ) -> tuple[CheckpointFiles, MemoryPlan]:
        """The plan, and what to read prompts with: the text encoder, or the whole language model that it is part of.

        The latter where it is asked for and fits. If it just is on the device, it is used as long as drawing is no
        slower for it: to load the encoder beside it would take longer than anything that its size costs the prompt.
        """
        model = find_text_encoder_writer(files.checkpoint) if "text" in files.keys else None
        there = (
            model is not None and self._residency.device_bytes_of(replace(files.keys["text"], is_whole_model=True)) > 0
        )
        wanted = model is not None and model.has_vision and load_vision_model
        if model is None or not (there or wanted):
            return files, self._make_plan(files, shape, loras, failed_plan)
        try:
            entire = self._opener.with_whole_model(files, model, progress)
            plan = self._make_plan(entire, shape, loras, failed_plan)
        except (OutOfMemory, WeightsError) as error:
            plain = self._make_plan(files, shape, loras, failed_plan)  # which raises where that does not fit either
            return replace(
                files, notes=(*files.notes, _vision_model_unavailable_note(model, error))
            ) if wanted else files, plain
        if wanted:
            return entire, plan
        with contextlib.suppress(OutOfMemory):
            plain = self._make_plan(files, shape, loras, failed_plan)
            if not plan.same_after_prompt(plain):
                return files, plain
        return entire, plan

    def _make_plan(
        self, files: CheckpointFiles, shape: RequestShape, loras: Sequence[LoraChoice], failed_plan: MemoryPlan | None
    ) -> MemoryPlan:
        needs = replace(files.footprint, lora_bytes=self.loras.memory_bytes(loras, files.footprint.flow_dtype.itemsize))
        host = self._free_host_bytes()
        asked = files.checkpoint.name, shape
        if failed_plan is not None:
            self._failed_peak_bytes[asked] = failed_plan.peak
            self.cuda_graphs.disable(OUT_OF_MEMORY_REASON)

        def plan(within: int | None) -> MemoryPlan:
            budget = self._budget()
            return make_plan(
                needs, shape, budget, self.device, max_bytes=within, free_host_bytes=host, streaming=self._streaming
            )

        too_much = self._failed_peak_bytes.get(asked)
        if too_much is None:
            return plan(None)
        with contextlib.suppress(OutOfMemory):
            return plan(int(RETRY_MEMORY_FACTOR * too_much))
        return plan(too_much - 1)  # then anything leaner will do

    def _budget(self) -> int:
        """Bytes of the device's memory that weights and activations may take, all in all."""
        held = memory.reclaimable_bytes(self.device, self._residency.device_bytes)
        return min(memory.free_memory(self.device) + held, self.memory_capacity)

    def _free_host_bytes(self) -> int | None:
        """Bytes of main memory for parts whose blocks are streamed; None where the device has no memory of its own."""
        return memory.free_host_memory() + self._residency.host_bytes if self.device.type == "cuda" else None

    def _session(
        self, files: CheckpointFiles, plan: MemoryPlan, shape: RequestShape, loras: Sequence[LoraChoice]
    ) -> Session:
        remote = None
        if files.text is None:
            assert self._settings.text_encoder_url is not None
            remote = RemoteTextEncoder(
                self._settings.text_encoder_url,
                self._settings.text_encoder_token,
                files.checkpoint.recipe,
                files.flow.params.context_width,
                files.checkpoint.label,
            )
        return Session(
            files=files,
            plan=plan,
            shape=shape,
            preview=self._settings.preview,
            loras=self.loras,
            lora_choices=tuple(loras),
            remote_encoder=remote,
            residency=self._residency,
            prompt_cache=self._prompt_cache,
            reference_cache=self._reference_cache,
            background_compiler=self.background_compiler,
            cuda_graphs=self.cuda_graphs,
            streaming=self._streaming,
        )

    def _detach_extras(self, model: Any) -> None:
        """Take off a part that leaves the device what is not its own."""
        self.cuda_graphs.forget(model)
        if isinstance(model, Transformer):
            lora.set_loras(model, [])


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What a picture is drawn with, on the device. `applied_loras`: the LoRAs on the transformer. `previewer` is None
    where previews are off. `background_compiler`: whether the blocks run compiled. `take_notes`: what the user should
    know of that."""

    transformer: Transformer
    previewer: Previewer | None
    applied_loras: tuple[AppliedLora, ...]
    is_compiled: bool
    notes: tuple[str, ...]


class Session:
    """A checkpoint under a plan. Each method brings what it needs to the device, telling `progress`, which may raise
    to give up. Build it with `ModelManager.open`.

    loading_seconds: seconds that went into reading weights from their files so far. used_cache: whether a prompt or a
    reference needed no reading, for it was known.
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
        """The contexts of `prompts`; only those that are not remembered are read."""
        known = True

        def read(missing: Sequence[str]) -> EncodedPrompts:
            nonlocal known
            known = False
            if self._remote_encoder is not None:
                progress("Sending the prompt to the text encoder", None)
                return self._remote_encoder.encode(missing, progress)
            text: TextEncoder | Writer = self._acquire_stage(PROMPT_STAGE, progress)["text"]
            progress("Reading the prompt", None)
            encoder = text.encoder if isinstance(text, Writer) else text
            self._prepare_graphs(encoder.text_decoder)
            return encoder.encode(missing)

        key = self._files.keys.get("text")
        encoded = self._prompt_cache.get_or_encode(key.context_key if key else self._remote_encoder, prompts, read)
        self.used_cache |= known
        return encoded

    def acquire_vision_model(self, progress: ProgressCallback | None = None) -> Writer | None:
        """The language model that the prompts are read with, to be asked about what it sees, with room for that; None
        where it is not whole or has no eyes, or is not on the device.

        progress: brings it to the device as the prompt's stage would, which is worth it before that stage; without,
        nothing is loaded. Nothing else must be computing meanwhile.
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
            brought: Writer = self._acquire_stage(PROMPT_STAGE, progress)["text"]
            return brought
        writer: Writer | None = self._residency.get_on_device(key)
        if writer is not None:
            stage = self.plan.stage(PROMPT_STAGE)
            self._residency.evict_until(stage.activations, self.plan.limit, keep=list(self._files.keys.values()))
        return writer

    def encode_reference(self, image: Image.Image, progress: ProgressCallback) -> Tensor:
        """The latent [1, 128, h, w] of `image`, whose sides are multiples of 16, unless it is remembered."""
        known = True

        def read(picture: Image.Image) -> Tensor:
            nonlocal known
            known = False
            autoencoder: Autoencoder = self._acquire_stage(REFERENCES_STAGE, progress)["autoencoder"]
            stage = self.plan.stage(REFERENCES_STAGE)
            return autoencoder.encode(
                pixels_from_image(picture), stage.strip_height, CPU_DEVICE if stage.offload_activations else None
            )

        latent = self._reference_cache.get_or_encode(self._files.keys["autoencoder"], image, read)
        self.used_cache |= known
        return latent

    def prepare_transformer(self, progress: ProgressCallback, batch_size: int = 1) -> Sampler:
        """Transformer and previews' decoder, and the LoRAs that the request chose on the former. batch_size: how many
        are drawn together."""
        parts = self._acquire_stage(DENOISING_STAGE, progress)
        transformer: Transformer = parts["flow"]
        applied = self._loras.apply_to(transformer, self._lora_choices)
        cached = self.checkpoint.caches_reference_kv and bool(self._shape.references)
        needed = compile_keys_for(batch_size * (2 if self._shape.use_cfg else 1), reference_cache=cached)
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
        """Pixels [1, 3, H, W] of a latent [1, 128, h, w]."""
        autoencoder: Autoencoder = self._acquire_stage(DECODING_STAGE, progress)["autoencoder"]
        progress("Decoding", None)
        stage = self.plan.stage(DECODING_STAGE)
        return autoencoder.decode(latent, stage.strip_height, CPU_DEVICE if stage.offload_activations else None)

    def reduce_decoding_memory(self) -> bool:
        """Have `decode` take less memory from now on, after it ran out. False where it cannot."""
        leaner = reduce_decoding_memory(self.plan, self._shape.height, streaming=self._streaming)
        if leaner is None:
            return False
        self.plan = leaner
        self._cuda_graphs.disable(OUT_OF_MEMORY_REASON)
        collect_and_empty_cache(self._residency.device)
        return True

    def preload(self, progress: ProgressCallback) -> None:
        """Bring in what fits at once: all, or what the first stage needs."""
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
        """The parts of a stage on the device, by kind, and room beside them for what it computes."""
        stage = self.plan.stage(name)
        together = [self._files.keys[kind] for kind in stage.resident_parts]
        for kind in stage.parts:
            _offload_shared_weights(self._residency, self._files.keys[kind])
        there = sum(self._residency.device_bytes_of(key) for key in together)
        self._residency.evict_until(stage.peak - there, self.plan.limit, keep=together)
        found = {}
        for kind in stage.parts:
            key, words = self._files.keys[kind], f"Loading {self.checkpoint.label}: {_LABELS[kind]}"
            if not self._residency.device_bytes_of(key):
                progress(words, None)
            found[kind] = self._residency.acquire(
                key,
                partial(self._load_part, kind, on_progress=partial(progress, words)),
                _module_of,
                get_streamed_blocks=_select_streamed_blocks(stage.streamed) if kind == stage.parts[0] else None,
            )
        return found

    def _load_part(self, kind: str, device: torch.device, on_progress: Callable[[float], None]) -> Any:
        began = time.monotonic()
        try:
            return self._files.load(kind, device, on_progress)
        finally:
            self.loading_seconds += time.monotonic() - began


def _offload_shared_weights(residency: Residency[PartKey], key: PartKey) -> None:
    """Before the part under `key` comes to the device: if it is a text encoder and the whole language model with the
    same weights is there, or the other way round, the latter leaves. No weights are held twice: the whole model
    replaces the encoder wherever that is; it waits in main memory itself, where there is room, to write again."""
    if (twin := key.shared_with) is not None:
        if not key.is_whole_model:
            residency.offload(twin)
        elif residency.drop(twin):
            empty_cache(residency.device)


def _module_of(model: Any) -> nn.Module:
    if isinstance(model, TextEncoder):
        return model.text_decoder
    module: nn.Module = model.model if isinstance(model, Writer) else model
    return module


def _select_streamed_blocks(count: int) -> Callable[[Any], list[nn.Module]] | None:
    """Which blocks of a part are streamed, so many of them; None for none."""
    if not count:
        return None

    def chosen(model: Any) -> list[nn.Module]:
        if isinstance(model, TextEncoder | Writer):
            tower: Any = model.text_decoder if isinstance(model, TextEncoder) else model.model.decoder
            blocks = list(tower.layers)
        else:
            blocks = [*model.double_blocks, *model.single_blocks]
        return [blocks[i] for i in spread_evenly(count, len(blocks))]

    return chosen


def _vision_model_unavailable_note(model: LocalWriter, error: StudioError) -> str:
    return (
        f"{model.label} is not loaded as a whole, so it is not asked about protected characters, logos and public "
        f"figures: {error}"
    )


def _ignore_progress(text: str, fraction: float | None) -> None:
    pass
