"""Plans the memory of a request before anything is loaded.

Predicts the peak of each stage (weights from the file headers, activations from the engine's `footprint.py`) and
chooses the fastest plan within a budget. `residency.py` moves the weights; `available.py` measures free memory.

Candidates from fast to slow:
1. All parts stay on the device.
2. The text encoder is offloaded after the prompt; the rest stays.
3. As 2, with blocks streamed: as many as necessary stay in main memory and pass through two buffers at every step.
4. Only the parts of one stage are on the device at a time.
5. As 4, with blocks streamed.
In each case pictures are encoded and decoded in strips if the whole does not fit, and fewer are drawn at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

from flux2_studio.checkpoints import GB
from flux2_studio.engine.params import AutoencoderParams, TransformerParams
from flux2_studio.engine.runtime import footprint
from flux2_studio.engine.runtime.streaming import packed_bytes, streamed_bytes
from flux2_studio.errors import OutOfMemory
from flux2_studio.request import MIN_SIDE, SIZE_MULTIPLE

ResidentParts = Literal["all", "all but the text encoder", "one stage at a time"]
# How an autoencoder may process a picture, fastest first: (strip height in pixels or None for the whole picture,
# whether activations between layers are offloaded to main memory).
WHOLE_IMAGE = (None, False)
STRIP_CANDIDATES: tuple[tuple[int | None, bool], ...] = (
    WHOLE_IMAGE,
    (512, False),
    (256, False),
    (128, False),
    (256, True),
    (128, True),
)
# This many tokens saturate a CPU: a larger batch is no faster there and only delays previews and Stop.
CPU_BATCH_TOKENS = 2048
# Allocator losses from rounding and fragmentation; on CUDA also the workspaces of cuDNN and cuBLAS.
ALLOCATOR_OVERHEAD = 1.02
CUDA_WORKSPACE_BYTES = 192 * 2**20


@dataclass(frozen=True, kw_only=True)
class PartWeightBytes:
    """Bytes of one part in memory: of each block, which can be streamed, and of the rest."""

    non_block_bytes: int
    bytes_per_block: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.non_block_bytes + sum(self.bytes_per_block)

    def device_bytes(self, streamed: int) -> int:
        """Returns the bytes on the device if `streamed` blocks are streamed, including the device buffers."""
        streamed_indices = set(spread_evenly(streamed, len(self.bytes_per_block)))
        resident = self.non_block_bytes + sum(
            size for i, size in enumerate(self.bytes_per_block) if i not in streamed_indices
        )
        return (
            streamed_bytes([self.bytes_per_block[i] for i in sorted(streamed_indices)], resident)
            if streamed_indices
            else resident
        )


@dataclass(frozen=True, kw_only=True)
class ModelFootprint:
    """The memory properties of a checkpoint that do not depend on the request.

    text: None if another machine encodes prompts. text_activations: returns bytes for a number of prompts. tiny: the
    small preview decoder, None if there is none. lora_bytes: bytes that LoRAs add to the transformer.
    """

    label: str
    flow: PartWeightBytes
    transformer_params: TransformerParams
    flow_dtype: torch.dtype
    flow_quantized: bool
    autoencoder: PartWeightBytes
    autoencoder_params: AutoencoderParams
    autoencoder_dtype: torch.dtype
    text: PartWeightBytes | None
    text_activations: Callable[[int], int]
    text_length: int
    tiny: PartWeightBytes | None
    tiny_dtype: torch.dtype
    decodes_previews: bool
    caches_reference_kv: bool
    lora_bytes: int = 0

    @property
    def weights(self) -> dict[str, PartWeightBytes]:
        """Weights by kind of part; LoRAs count as part of the transformer."""
        flow = replace(self.flow, non_block_bytes=self.flow.non_block_bytes + self.lora_bytes)
        parts = {"text": self.text, "flow": flow, "autoencoder": self.autoencoder, "tiny": self.tiny}
        return {kind: weights for kind, weights in parts.items() if weights is not None}


@dataclass(frozen=True, kw_only=True)
class RequestShape:
    """The properties of a request that determine its memory.

    references: (width, height) of each in pixels. use_cfg: two rows per picture.
    """

    width: int
    height: int
    count: int = 1
    use_cfg: bool = False
    references: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        return _tokens((self.width, self.height))


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage of a run.

    parts: the parts that it uses. resident_parts: all parts on the device during the stage. weights, activations:
    bytes. streamed: number of streamed blocks of its first part. strip_height: in pixels, None for the whole picture.
    offload_activations: whether activations between layers are offloaded to main memory.
    """

    name: str
    parts: tuple[str, ...]
    resident_parts: tuple[str, ...]
    weights: int
    activations: int
    streamed: int = 0
    strip_height: int | None = None
    offload_activations: bool = False

    @property
    def peak(self) -> int:
        """Peak bytes on the device."""
        return self.weights + self.activations


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """A plan that fits a request into `limit` bytes: the usable part of `budget`, without the device's own overhead.

    batch_size: how many pictures are drawn at once. block_counts: number of streamable blocks, by kind of part.
    """

    budget: int
    limit: int
    resident_parts: ResidentParts
    batch_size: int
    stages: tuple[PlannedStage, ...]
    block_counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Peak bytes on the device."""
        return max(stage.peak for stage in self.stages)

    @property
    def is_resident(self) -> bool:
        """Whether all parts stay on the device."""
        return self.resident_parts == "all"

    def stage(self, name: str) -> PlannedStage:
        return next(stage for stage in self.stages if stage.name == name)

    def same_after_prompt(self, other: MemoryPlan) -> bool:
        """Returns whether all stages after the prompt are as in `other`: batch size, streamed blocks and strips.

        These determine the speed of a run, since the prompt is encoded only once.
        """
        later_stages = [
            [
                (stage.name, stage.streamed, stage.strip_height, stage.offload_activations)
                for stage in plan.stages
                if stage.name != PROMPT_STAGE
            ]
            for plan in (self, other)
        ]
        return self.batch_size == other.batch_size and later_stages[0] == later_stages[1]

    def describe(self, device_label: str) -> str:
        """Describes the plan in sentences. device_label: the owner of the memory ("the card", "this machine")."""
        texts = {
            "all": f"everything stays in {device_label}'s memory",
            "all but the text encoder": f"the text encoder leaves {device_label}'s memory after the prompt",
            "one stage at a time": f"text encoder, transformer and autoencoder take turns in {device_label}'s memory",
        }
        sentences = [
            f"Fits: {format_gigabytes(self.peak)} of {format_gigabytes(self.budget)} GB; {texts[self.resident_parts]}."
        ]
        for part, streamed in {stage.parts[0]: stage.streamed for stage in self.stages if stage.streamed}.items():
            sentences.append(
                f"{streamed} of the {_PART_LABELS[part]}'s {self.block_counts[part]} blocks wait in main memory and "
                "are sent over "
                f"when they are needed, which is slower."
            )
        if any(stage.strip_height for stage in self.stages):
            sentences.append("Pictures are read and decoded in strips.")
        return " ".join(sentences)


def reduce_decoding_memory(plan: MemoryPlan, height: int, *, streaming: bool) -> MemoryPlan | None:
    """Returns `plan` with a decoding stage that takes less memory, None if that is not possible.

    First the autoencoder is alone on the device; further calls use lower and lower strips. height: of the picture in
    pixels. streaming: as in `make_plan`.
    """
    stage = plan.stage(DECODING_STAGE)
    leaner = replace(stage, resident_parts=stage.parts, activations=max(stage.activations, plan.limit - stage.weights))
    if leaner == stage:
        candidates = _strip_candidates(height, has_host_memory=streaming)
        lower = candidates[candidates.index((stage.strip_height, stage.offload_activations)) + 1 :]
        if not lower:
            return None
        leaner = replace(stage, strip_height=lower[0][0], offload_activations=lower[0][1])
    return replace(plan, stages=tuple(leaner if it is stage else it for it in plan.stages))


STAGE_ORDER = PROMPT_STAGE, REFERENCES_STAGE, DENOISING_STAGE, DECODING_STAGE = (
    "prompt",
    "references",
    "drawing",
    "decoding",
)
_PART_LABELS = {"text": "text encoder", "flow": "transformer", "autoencoder": "autoencoder"}


def make_plan(
    model: ModelFootprint,
    shape: RequestShape,
    budget: int,
    device: torch.device,
    *,
    max_bytes: int | None = None,
    free_host_bytes: int | None = None,
    streaming: bool = True,
) -> MemoryPlan:
    """Returns the fastest plan within `budget` bytes of device memory.

    max_bytes: a cap below `budget` for this plan only, None for no further cap. free_host_bytes: bytes of main memory
    for parts with streamed blocks, None for no limit. streaming: whether blocks may be streamed from main memory.

    Raises `OutOfMemory` if no plan fits; the message names the nearest request that would fit.
    """
    limit = usable_bytes(min(budget, max_bytes or budget), device)

    def find_plan(candidate: RequestShape) -> MemoryPlan | None:
        return _find_plan(model, candidate, budget, limit, device, free_host_bytes, streaming)

    plan = find_plan(shape)
    if plan is not None:
        return plan
    available = f"{format_gigabytes(budget)} GB can be used"
    request = f"{shape.width} x {shape.height}"
    if count := len(shape.references):
        request += f" with {count} reference{'s' if count > 1 else ''}"
    needed = _min_budget(model, shape, device, streaming)
    if (nearest := _describe_nearest_fit(shape, lambda smaller: find_plan(smaller) is not None)) is not None:
        raise OutOfMemory(
            f"{model.label} at {request} needs about {format_gigabytes(needed)} GB of memory, and {available}. "
            f"{nearest} would fit. A smaller checkpoint needs less, and so do weights in 8 bits (FLUX2_QUANTIZE=int8)."
        )
    raise OutOfMemory(
        f"{model.label} needs about {format_gigabytes(needed)} GB of memory for this, and {available}: no size "
        f"fits. Choose a smaller checkpoint or one in fewer bits (a GGUF file, or FLUX2_QUANTIZE=int8), close other "
        f"programs, or raise FLUX2_MEMORY if you have set it."
    )


def usable_bytes(budget: int, device: torch.device) -> int:
    """Returns how many of `budget` bytes weights and activations may take; the rest is allocator overhead."""
    return int((budget - _workspace(device)) / ALLOCATOR_OVERHEAD)


def required_budget(size: int, device: torch.device) -> int:
    """Returns the budget of which `size` bytes are usable: the inverse of `usable_bytes`."""
    return int(size * ALLOCATOR_OVERHEAD) + _workspace(device)


def count_weight_bytes(sizes: Mapping[str, int], prefixes: Sequence[str] = ()) -> PartWeightBytes:
    """Returns `PartWeightBytes` from bytes by parameter name. prefixes: name prefixes of blocks, before the block
    number."""
    blocks: dict[tuple[int, int], int] = {}
    rest = 0
    for name, size in sizes.items():
        index = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        if index is None:
            rest += size
        else:
            key = index, int(name.removeprefix(prefixes[index]).partition(".")[0])
            blocks[key] = blocks.get(key, 0) + packed_bytes([size])
    return PartWeightBytes(non_block_bytes=rest, bytes_per_block=tuple(blocks[key] for key in sorted(blocks)))


def spread_evenly(chosen: int, total: int) -> list[int]:
    """Returns the indices of `chosen` of `total` blocks, evenly spread, so that other blocks compute during copies."""
    return [(2 * i + 1) * total // (2 * chosen) for i in range(chosen)]


@dataclass(frozen=True, kw_only=True)
class _StageMemory:
    """A stage before planning. candidates: as in `STRIP_CANDIDATES`. activations: returns the bytes of one
    candidate, computed lazily."""

    name: str
    parts: tuple[str, ...]
    activations: Callable[[int | None, bool], int]
    candidates: tuple[tuple[int | None, bool], ...] = (WHOLE_IMAGE,)


def _find_plan(
    model: ModelFootprint,
    shape: RequestShape,
    budget: int,
    limit: int,
    device: torch.device,
    free_host_bytes: int | None,
    streaming: bool,
) -> MemoryPlan | None:
    candidates: list[tuple[ResidentParts, bool]] = [("all", False), ("all but the text encoder", False)]
    candidates += [("all but the text encoder", True)] if streaming else []
    candidates += [("one stage at a time", False)]
    candidates += [("one stage at a time", True)] if streaming else []
    for resident_parts, use_streaming in candidates:
        for batch in _batch_candidates(shape, device) if not use_streaming else [1]:
            stages: list[PlannedStage] = []
            for group in _group_stages(_list_stage_memory(model, shape, batch, device, streaming), resident_parts):
                fitted = _fit_stages(model, group, limit, use_streaming)
                if not fitted:
                    break
                stages += fitted
            else:
                if free_host_bytes is None or _count_host_bytes(model, stages) <= free_host_bytes:
                    blocks = {part: len(weights.bytes_per_block) for part, weights in model.weights.items()}
                    return MemoryPlan(
                        budget=budget,
                        limit=limit,
                        resident_parts=resident_parts,
                        batch_size=batch,
                        stages=tuple(stages),
                        block_counts=blocks,
                    )
    return None


def _group_stages(stages: list[_StageMemory], resident_parts: ResidentParts) -> list[list[_StageMemory]]:
    """Groups the stages whose parts are on the device at the same time."""
    if resident_parts == "all":
        return [stages]
    if resident_parts == "one stage at a time":
        return [[stage] for stage in stages]
    prompt = [stage for stage in stages if stage.name == PROMPT_STAGE]
    return [*([prompt] if prompt else []), [stage for stage in stages if stage.name != PROMPT_STAGE]]


def _fit_stages(model: ModelFootprint, group: list[_StageMemory], limit: int, streams: bool) -> list[PlannedStage]:
    """Plans the stages of `group` with as few streamed blocks as possible; [] if nothing fits."""
    parts = {part for stage in group for part in stage.parts}
    all_weights = sum(model.weights[part].total for part in parts)
    kind = next((kind for kind in ("flow", "text") if kind in parts), None)  # the part with streamable blocks
    streamable = model.weights[kind] if kind else PartWeightBytes(non_block_bytes=0)
    for streamed in range(len(streamable.bytes_per_block) + 1 if streams else 1):
        weights = all_weights - streamable.total + streamable.device_bytes(streamed)
        stages = []
        for stage in group:
            candidate = next(
                (candidate for candidate in stage.candidates if weights + stage.activations(*candidate) <= limit), None
            )
            if candidate is None:
                break
            stages.append(
                PlannedStage(
                    name=stage.name,
                    parts=stage.parts,
                    resident_parts=tuple(sorted(parts)),
                    weights=weights,
                    activations=stage.activations(*candidate),
                    streamed=streamed if stage.parts[0] == kind else 0,
                    strip_height=candidate[0],
                    offload_activations=candidate[1],
                )
            )
        else:
            return stages
    return []


def _count_host_bytes(model: ModelFootprint, stages: Iterable[PlannedStage]) -> int:
    """Returns the bytes of main memory for parts with streamed blocks, which are loaded there completely."""
    return sum(model.weights[part].total for part in {stage.parts[0] for stage in stages if stage.streamed})


def _workspace(device: torch.device) -> int:
    return CUDA_WORKSPACE_BYTES if device.type == "cuda" else 0


def _batch_candidates(shape: RequestShape, device: torch.device) -> list[int]:
    """Returns the batch sizes to try, largest first."""
    max_batch = shape.count
    if device.type == "cpu":
        reference_tokens = sum(_tokens(size) for size in shape.references)
        max_batch = min(
            max_batch, max(1, CPU_BATCH_TOKENS // ((2 if shape.use_cfg else 1) * (shape.tokens + reference_tokens)))
        )
    return list(range(max_batch, 0, -1))


def _list_stage_memory(
    model: ModelFootprint, shape: RequestShape, batch: int, device: torch.device, has_host_memory: bool
) -> list[_StageMemory]:
    """Lists the stages in order. has_host_memory: whether there is main memory apart from the device's."""
    encode_bytes = partial(footprint.encode_bytes, on_cpu=device.type == "cpu")
    decode_bytes = partial(footprint.decode_bytes, on_cpu=device.type == "cpu")
    stages = []
    if model.text is not None:
        prompts = 2 if shape.use_cfg else 1
        stages.append(
            _StageMemory(name=PROMPT_STAGE, parts=("text",), activations=lambda *_: model.text_activations(prompts))
        )
    conditioning_bytes = _conditioning_bytes(model, shape)
    params, dtype = model.autoencoder_params, model.autoencoder_dtype
    if shape.references:
        largest = max(shape.references, key=lambda size: size[0] * size[1])
        stages.append(
            _StageMemory(
                name=REFERENCES_STAGE,
                parts=("autoencoder",),
                activations=lambda rows, store: conditioning_bytes + encode_bytes(params, dtype, *largest, rows, store),
                candidates=_strip_candidates(largest[1], has_host_memory),
            )
        )
    stages.append(_denoising_memory(model, shape, batch, device, conditioning_bytes))
    size = shape.width, shape.height
    latents = batch * shape.tokens * model.transformer_params.in_channels * 4
    stages.append(
        _StageMemory(
            name=DECODING_STAGE,
            parts=("autoencoder",),
            activations=lambda rows, store: (
                conditioning_bytes + latents + decode_bytes(params, dtype, *size, rows, store)
            ),
            candidates=_strip_candidates(shape.height, has_host_memory),
        )
    )
    return stages


def _denoising_memory(
    model: ModelFootprint, shape: RequestShape, batch: int, device: torch.device, conditioning_bytes: int
) -> _StageMemory:
    rows = batch * (2 if shape.use_cfg else 1)
    reference_tokens = sum(_tokens(size) for size in shape.references)
    # In addition to one evaluation: the latents before and after the step, the velocity, the clean estimate.
    state = conditioning_bytes + 5 * batch * shape.tokens * model.transformer_params.in_channels * 4
    size = shape.width, shape.height
    on_cpu = device.type == "cpu"

    def activations(*_: object) -> int:
        evaluation = footprint.transformer_bytes(
            model.transformer_params,
            model.flow_dtype,
            batch=rows,
            image_tokens=shape.tokens,
            text_tokens=model.text_length,
            reference_tokens=reference_tokens,
            reference_cache=model.caches_reference_kv,
            quantized=model.flow_quantized,
            on_cpu=on_cpu,
        )
        if not model.decodes_previews:
            return state + evaluation
        preview = (
            footprint.decode_bytes(model.autoencoder_params, model.autoencoder_dtype, *size, None, on_cpu=on_cpu)
            if model.tiny is None
            else footprint.tiny_decode_bytes(model.tiny_dtype, 1, *size, on_cpu=on_cpu)
        )
        if model.caches_reference_kv:
            preview += footprint.reference_cache_bytes(
                model.transformer_params, model.flow_dtype, rows, reference_tokens
            )
        return state + max(evaluation, preview)

    decoder = () if not model.decodes_previews else ("autoencoder",) if model.tiny is None else ("tiny",)
    return _StageMemory(name=DENOISING_STAGE, parts=("flow", *decoder), activations=activations)


def _conditioning_bytes(model: ModelFootprint, shape: RequestShape) -> int:
    """Returns the bytes of prompt contexts and reference latents, computed once and kept."""
    context_bytes = model.text_length * model.transformer_params.context_width * model.flow_dtype.itemsize
    latent_values = sum(_tokens(size) for size in shape.references) * model.transformer_params.in_channels
    return context_bytes * (2 if shape.use_cfg else 1) + latent_values * model.autoencoder_dtype.itemsize


def _strip_candidates(height: int, has_host_memory: bool) -> tuple[tuple[int | None, bool], ...]:
    return tuple(
        (rows, store)
        for rows, store in STRIP_CANDIDATES
        if (rows is None or rows < height) and (has_host_memory or not store)
    )


def _min_budget(model: ModelFootprint, shape: RequestShape, device: torch.device, streaming: bool) -> int:
    """Returns the smallest budget that fits the request."""
    peaks = []
    for stage in _list_stage_memory(model, shape, 1, device, streaming):
        parts = [model.weights[part] for part in stage.parts]
        weights = sum(
            min(part.total, part.device_bytes(len(part.bytes_per_block)) if streaming else part.total) for part in parts
        )
        peaks.append(weights + min(stage.activations(*candidate) for candidate in stage.candidates))
    return required_budget(max(peaks), device)


def _describe_nearest_fit(shape: RequestShape, fits: Callable[[RequestShape], bool]) -> str | None:
    """Returns the largest size that fits, or else the same size with fewer references; None if neither fits."""
    smaller = [
        replace(shape, width=_scaled(shape.width, scale), height=_scaled(shape.height, scale), count=1)
        for scale in range(1, 16)
    ]
    fit_count = bisect_left(smaller, True, key=lambda candidate: not fits(candidate))
    if fit_count:
        return f"{smaller[fit_count - 1].width} x {smaller[fit_count - 1].height}"
    for fewer in range(len(shape.references) - 1, -1, -1):
        if fits(replace(shape, references=shape.references[:fewer], count=1)):
            return f"{shape.width} x {shape.height} with {fewer or 'no'} reference{'s' if fewer != 1 else ''}"
    return None


def _scaled(side: int, sixteenths: int) -> int:
    return max(MIN_SIDE, round(side * sixteenths / 16 / SIZE_MULTIPLE) * SIZE_MULTIPLE)


def _tokens(size: tuple[int, int]) -> int:
    return (size[0] // SIZE_MULTIPLE) * (size[1] // SIZE_MULTIPLE)


def format_gigabytes(size: int) -> str:
    """Formats bytes as GB, without the unit."""
    return f"{size / GB:.1f}" if size >= GB // 10 else f"{size / GB:.2f}"
