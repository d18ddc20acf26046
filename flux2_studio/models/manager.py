"""Opens checkpoints, plans their memory and loads their parts stage by stage.

`ModelManager.open` reads only file headers and makes the memory plan. The `Session` that it returns moves each part to
the device when its stage needs it. Parts with equal keys are shared, so switching between checkpoints only moves the
parts that differ, and as much of both stays in memory as fits.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from flux2_studio.checkpoints import GB, Checkpoint, LocalWriter
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.lora import adapters as lora
from flux2_studio.engine.runtime.compiling import Compiler
from flux2_studio.engine.runtime.graphs import CaptureFn
from flux2_studio.engine.text.writer import Writer
from flux2_studio.errors import OutOfMemory, StudioError, WeightsError
from flux2_studio.models.background_compiler import BackgroundCompiler
from flux2_studio.models.checkpoint_files import (
    MAX_CONVERSATION_TOKENS,
    PART_SUBFOLDERS,
    CheckpointFiles,
    CheckpointOpener,
    PartKey,
)
from flux2_studio.models.cuda_graphs import CudaGraphPolicy
from flux2_studio.models.hub.downloads import ignore_progress
from flux2_studio.models.hub.fingerprint import WeightHashes
from flux2_studio.models.hub.repositories import Hub, ProgressCallback
from flux2_studio.models.loras import LoraLibrary
from flux2_studio.models.memory import available as memory
from flux2_studio.models.memory.choices import choose_device
from flux2_studio.models.memory.cpu_quota import limit_torch_threads, read_cpu_quota
from flux2_studio.models.memory.plan import (
    MemoryPlan,
    RequestShape,
    make_plan,
)
from flux2_studio.models.memory.residency import Residency, collect_and_empty_cache
from flux2_studio.models.prompt_cache import PromptCache, ReferenceLatentCache
from flux2_studio.models.remote_text import RemoteTextEncoder
from flux2_studio.models.session import (
    CPU_DEVICE,
    OUT_OF_MEMORY_REASON,
    Session,
    module_of,
    offload_shared_weights,
    select_streamed_blocks,
)
from flux2_studio.models.writers import (
    LoadedWriter,
    WriterOffer,
    find_text_encoder_writer,
    list_writer_offers,
    plan_writer,
)
from flux2_studio.request import LoraChoice
from flux2_studio.settings import Settings

HOST_MEMORY_SHARE = 0.5  # share of main memory for offloaded weights
RETRY_MEMORY_FACTOR = 0.75  # a retry may use this share of the peak that ran out of memory


class ModelManager:
    """Opens checkpoints and owns the loaded weights.

    Sessions are not for concurrent use, so only one run at a time; `predict_plan` may be called at any time.

    host_budget: bytes of main memory for offloaded weights. streaming: whether blocks may be streamed from main memory.
    Both are used by default only on CUDA. compiler: torch.compile by default.
    capture: captures CUDA graphs, by default with `CudaGraphCapture`.
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
        has_own_memory = self.device.type == "cuda"
        if host_budget is None:
            host_budget = int(HOST_MEMORY_SHARE * memory.total_memory(CPU_DEVICE)) if has_own_memory else 0
        self._streaming = has_own_memory if streaming is None else streaming
        self.loras = LoraLibrary(settings)
        self._opener = CheckpointOpener(settings, hub, self.device)
        self._residency: Residency[PartKey] = Residency(self.device, host_budget, on_evict=self._detach_extras)
        # Planned peaks, by checkpoint name and shape, of runs that still ran out of memory.
        self._failed_peak_bytes: dict[tuple[str, RequestShape], int] = {}
        self._prompt_cache = PromptCache()
        self._reference_cache = ReferenceLatentCache()
        self.background_compiler = BackgroundCompiler(
            settings.compile, self.device, compiler or Compiler(cache_folder=settings.compile_cache)
        )
        self.cuda_graphs = CudaGraphPolicy(settings.graphs, self.device, capture)
        self._fingerprints = WeightHashes(settings.home / "hashes.json")

    def is_on_disk(self, checkpoint: Checkpoint) -> bool:
        """Returns whether `checkpoint` can be loaded without a download."""
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
        """Opens `checkpoint` for a request of `shape`, from disk or the hub. `progress` may raise to cancel.

        failed_plan: a plan that ran out of memory; the new one takes less. load_vision_model: load the complete
        language model instead of the text encoder, if it has vision, so that it can be asked about pictures. If that is
        not possible, the session's notes say why. If False, the complete model still encodes the prompts if an
        earlier `acquire_writer` left it on the device and it does not slow down drawing. So call `acquire_writer`
        first.

        Raises `WeightsError` for files that are missing, damaged or do not belong to this checkpoint, including LoRAs;
        `RequestError` for an unknown LoRA; `OutOfMemory` if no plan fits.
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
        """Returns the memory plan for a request; the checkpoint must be on disk. Arguments and errors as for `open`."""
        opened = self._opener.open(checkpoint, ignore_progress, fetch_preview_decoder=False)
        return self._choose_text_model(opened, shape, loras, None, load_vision_model, ignore_progress)[1]

    def acquire_writer(
        self,
        model: LocalWriter,
        progress: ProgressCallback,
        image_sizes: Sequence[tuple[int, int]] = (),
        *,
        tokens: int = MAX_CONVERSATION_TOKENS,
    ) -> LoadedWriter:
        """Loads `model` onto the device, from disk or the hub, and evicts other parts until its activations fit too.

        image_sizes: (height, width) in pixels of each picture that it will see, after scaling. tokens: of the whole
        conversation, including the answer. `progress` may raise to cancel. The writer stays on the device until another
        part needs its memory, so let it write before opening anything else.

        Raises `WeightsError` for files that are missing, damaged or of a model that cannot write; `OutOfMemory` if no
        plan fits.
        """
        opened = self._opener.writer(model, progress)
        plan = plan_writer(
            opened,
            self._budget(),
            self.device,
            tokens=tokens,
            image_sizes=image_sizes,
            free_host_bytes=self._free_host_bytes(),
            streaming=self._streaming,
        )
        key, status = opened.key, f"Loading {model.label}"
        offload_shared_weights(self._residency, key)
        self._residency.evict_until(plan.peak - self._residency.device_bytes_of(key), plan.limit, keep=[key])
        if not self._residency.device_bytes_of(key):
            progress(status, None)
        writer: Writer = self._residency.acquire(
            key,
            partial(opened.load, on_progress=partial(progress, status)),
            module_of,
            get_streamed_blocks=select_streamed_blocks(plan.streamed),
        )
        return LoadedWriter(writer=writer, notes=plan.make_notes(model.label))

    def list_writers(self, checkpoint: Checkpoint) -> tuple[WriterOffer, ...]:
        """Lists the local language models that can enhance prompts for `checkpoint`, its own text encoder first.

        Uses no network. The list is empty for toy checkpoints.
        """
        return list_writer_offers(checkpoint, self._settings, self._hub, self._opener)

    def quick_hash(self, checkpoint: Checkpoint) -> str | None:
        """Returns the SHA-256 of the transformer's weights (see `compute_hash`) if it is cached or quick to compute.

        Returns None otherwise, or if the files are not on this machine. Uses no network. Raises `WeightsError` for
        files that cannot be read.
        """
        if not self._hub.is_on_disk(checkpoint.flow):
            return None
        files = self._hub.find(checkpoint.flow)
        return self._fingerprints.get_quick(files.weights, PART_SUBFOLDERS["flow"]) if files else None

    def compute_hash(self, checkpoint: Checkpoint, progress: ProgressCallback) -> str:
        """Returns the SHA-256 of the transformer's weights. For a folder, this is the SHA-256 of a sorted list with a
        line "name hash" for each file. Each file is read once; its hash is cached. `progress` may raise to cancel.
        Raises `WeightsError`."""
        files = self._hub.find_or_download(checkpoint.flow, progress)
        return self._fingerprints.compute(files.weights, progress, PART_SUBFOLDERS["flow"])

    def is_loaded(self, checkpoint: Checkpoint) -> bool:
        """Returns whether `checkpoint`'s transformer is in memory. It must be on disk. Raises `WeightsError`."""
        return self._residency.is_loaded(
            self._opener.open(checkpoint, ignore_progress, fetch_preview_decoder=False).keys["flow"]
        )

    @property
    def device_name(self) -> str:
        """A name that identifies the device, since run times depend on it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} of {platform.machine()} with {torch.get_num_threads()} threads"

    @property
    def device_label(self) -> str:
        """What messages call the device: "the card" or "this machine"."""
        return "the card" if self.device.type == "cuda" else "this machine"

    @property
    def memory_capacity(self) -> int:
        """Bytes of device memory that the studio may use: all of it, or the configured limit."""
        limit = self._settings.memory_limit_gb
        total = memory.total_memory(self.device)
        return total if limit is None else min(total, int(limit * GB))

    def release_unused_memory(self) -> None:
        """Frees unused device memory and disables CUDA graphs, after the device ran out of memory."""
        self.cuda_graphs.disable(OUT_OF_MEMORY_REASON)
        collect_and_empty_cache(self.device)

    def release_all(self) -> None:
        """Drops all weights and CUDA graphs."""
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
        """Makes the plan and chooses what encodes prompts: the text encoder, or its complete language model.

        The complete model is chosen if it is requested and fits. If it is not requested but already on the device, it
        is chosen if the stages after the prompt stay as fast: encoding with it is faster than loading the encoder.
        """
        model = find_text_encoder_writer(files.checkpoint) if "text" in files.keys else None
        on_device = (
            model is not None and self._residency.device_bytes_of(replace(files.keys["text"], is_whole_model=True)) > 0
        )
        wanted = model is not None and model.has_vision and load_vision_model
        if model is None or not (on_device or wanted):
            return files, self._make_plan(files, shape, loras, failed_plan)
        try:
            whole_files = self._opener.with_whole_model(files, model, progress)
            plan = self._make_plan(whole_files, shape, loras, failed_plan)
        except (OutOfMemory, WeightsError) as error:
            encoder_plan = self._make_plan(files, shape, loras, failed_plan)  # raises if this does not fit either
            return replace(
                files, notes=(*files.notes, _vision_model_unavailable_note(model, error))
            ) if wanted else files, encoder_plan
        if wanted:
            return whole_files, plan
        with contextlib.suppress(OutOfMemory):
            encoder_plan = self._make_plan(files, shape, loras, failed_plan)
            if not plan.same_after_prompt(encoder_plan):
                return files, encoder_plan
        return whole_files, plan

    def _make_plan(
        self, files: CheckpointFiles, shape: RequestShape, loras: Sequence[LoraChoice], failed_plan: MemoryPlan | None
    ) -> MemoryPlan:
        footprint = replace(
            files.footprint, lora_bytes=self.loras.memory_bytes(loras, files.footprint.flow_dtype.itemsize)
        )
        free_host_bytes = self._free_host_bytes()
        request_key = files.checkpoint.name, shape
        if failed_plan is not None:
            self._failed_peak_bytes[request_key] = failed_plan.peak
            self.cuda_graphs.disable(OUT_OF_MEMORY_REASON)

        def plan(max_bytes: int | None) -> MemoryPlan:
            budget = self._budget()
            return make_plan(
                footprint,
                shape,
                budget,
                self.device,
                max_bytes=max_bytes,
                free_host_bytes=free_host_bytes,
                streaming=self._streaming,
            )

        failed_peak = self._failed_peak_bytes.get(request_key)
        if failed_peak is None:
            return plan(None)
        with contextlib.suppress(OutOfMemory):
            return plan(int(RETRY_MEMORY_FACTOR * failed_peak))
        return plan(failed_peak - 1)  # accepts any plan that takes less

    def _budget(self) -> int:
        """Returns the bytes of device memory that weights and activations may take together."""
        reclaimable = memory.reclaimable_bytes(self.device, self._residency.device_bytes)
        return min(memory.free_memory(self.device) + reclaimable, self.memory_capacity)

    def _free_host_bytes(self) -> int | None:
        """Returns the bytes of main memory available for streamed parts, None if the device is not CUDA."""
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
        """Removes LoRAs and CUDA graphs from a part that is about to leave the device."""
        self.cuda_graphs.forget(model)
        if isinstance(model, Transformer):
            lora.set_loras(model, [])


def _vision_model_unavailable_note(model: LocalWriter, error: StudioError) -> str:
    return (
        f"{model.label} is not loaded as a whole, so it is not asked about protected characters, logos and public "
        f"figures: {error}"
    )
