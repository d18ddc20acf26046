"""The memory plan: before anything is loaded, what a request will take at each stage, and how it is made to fit.

Does: predicts each stage's peak (weights from the files' headers, activations from the engine's `footprint.py`) and
takes the quickest way that stays within a budget. Does not know: how memory is moved (`residency.py`), how much there
is (`available.py`).

From quick to slow: all parts stay on the device; the text encoder leaves after the prompt and the rest stays; the same
with blocks streamed, that is, with as many as must be waiting in main memory and passing through two buffers at every
step; each stage has the device to itself; that with blocks streamed. Beside that, pictures are read and decoded in
strips where the whole does not fit, and fewer pictures are drawn at once.
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
# How an autoencoder may go through a picture, quickest first: whole or in strips of so many pixels' height, and whether
# what is between two layers waits in main memory.
WHOLE_IMAGE = (None, False)
STRIP_CANDIDATES: tuple[tuple[int | None, bool], ...] = (
    WHOLE_IMAGE,
    (512, False),
    (256, False),
    (128, False),
    (256, True),
    (128, True),
)
# A processor is busy with this many tokens: a larger batch is no faster there, only later to its previews and to Stop.
CPU_BATCH_TOKENS = 2048
# What allocators lose to rounding and fragments. On CUDA also the workspaces of cuDNN and cuBLAS.
ALLOCATOR_OVERHEAD = 1.02
CUDA_WORKSPACE_BYTES = 192 * 2**20


@dataclass(frozen=True, kw_only=True)
class PartWeightBytes:
    """Bytes of one part in memory: of each of its blocks, which can be streamed, and of all the rest."""

    non_block_bytes: int
    bytes_per_block: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.non_block_bytes + sum(self.bytes_per_block)

    def device_bytes(self, streamed: int) -> int:
        """Bytes on the device when so many blocks are streamed."""
        chosen = set(spread_evenly(streamed, len(self.bytes_per_block)))
        staying = self.non_block_bytes + sum(size for i, size in enumerate(self.bytes_per_block) if i not in chosen)
        return streamed_bytes([self.bytes_per_block[i] for i in sorted(chosen)], staying) if chosen else staying


@dataclass(frozen=True, kw_only=True)
class ModelFootprint:
    """What a checkpoint brings along, whatever the request. `describe` is None where another machine encodes.

    text_activations: bytes, by the number of prompts. tiny: of the previews' small decoder, None where there is none.
    lora_bytes: bytes of what lies beside the transformer's weights.
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
        """Of each part, by kind; LoRAs count as the transformer's."""
        flow = replace(self.flow, non_block_bytes=self.flow.non_block_bytes + self.lora_bytes)
        parts = {"text": self.text, "flow": flow, "autoencoder": self.autoencoder, "tiny": self.tiny}
        return {kind: weights for kind, weights in parts.items() if weights is not None}


@dataclass(frozen=True, kw_only=True)
class RequestShape:
    """What a request asks of the memory. Sizes are (width, height) in pixels. use_cfg: two rows for each picture."""

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

    parts: those that it uses. resident_parts: those that are on the device meanwhile. weights, activations: bytes.
    streamed: how many blocks of its first part are. strip_height: the height of the strips in which it goes through a
    picture, None for the whole; offload_activations: whether what is between two layers waits in main memory then.
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
        """Bytes on the device at its most."""
        return self.weights + self.activations


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a request is made to fit into `limit` of the `budget` bytes that there are: the rest is the device's own.

    batch_size: how many pictures are drawn at once. block_counts: how many the parts have that can be streamed.
    """

    budget: int
    limit: int
    resident_parts: ResidentParts
    batch_size: int
    stages: tuple[PlannedStage, ...]
    block_counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes on the device at its most."""
        return max(stage.peak for stage in self.stages)

    @property
    def is_resident(self) -> bool:
        """Whether all parts stay on the device."""
        return self.resident_parts == "all"

    def stage(self, name: str) -> PlannedStage:
        return next(stage for stage in self.stages if stage.name == name)

    def same_after_prompt(self, other: MemoryPlan) -> bool:
        """Whether all that comes after the prompt is done as in `other`: as many pictures at once, as many blocks
        streamed, the same strips. That is what makes a run slow; the prompt is read once."""
        after = [
            [
                (stage.name, stage.streamed, stage.strip_height, stage.offload_activations)
                for stage in plan.stages
                if stage.name != PROMPT_STAGE
            ]
            for plan in (self, other)
        ]
        return self.batch_size == other.batch_size and after[0] == after[1]

    def describe(self, device_label: str) -> str:
        """Sentences for the page. device_label: what the memory belongs to ("the card", "this machine")."""
        ways = {
            "all": f"everything stays in {device_label}'s memory",
            "all but the text encoder": f"the text encoder leaves {device_label}'s memory after the prompt",
            "one stage at a time": f"text encoder, transformer and autoencoder take turns in {device_label}'s memory",
        }
        told = [
            f"Fits: {format_gigabytes(self.peak)} of {format_gigabytes(self.budget)} GB; {ways[self.resident_parts]}."
        ]
        for part, streamed in {stage.parts[0]: stage.streamed for stage in self.stages if stage.streamed}.items():
            told.append(
                f"{streamed} of the {_PART_LABELS[part]}'s {self.block_counts[part]} blocks wait in main memory and "
                "are sent over "
                f"when they are needed, which is slower."
            )
        if any(stage.strip_height for stage in self.stages):
            told.append("Pictures are read and decoded in strips.")
        return " ".join(told)


def reduce_decoding_memory(plan: MemoryPlan, height: int, *, streaming: bool) -> MemoryPlan | None:
    """`plan`, for a picture `height` pixels high, with a decoding that takes less memory: first with the autoencoder
    alone on the device, then in lower and lower strips. None where it cannot take less. streaming: as in `make_plan`.
    """
    stage = plan.stage(DECODING_STAGE)
    alone = replace(stage, resident_parts=stage.parts, activations=max(stage.activations, plan.limit - stage.weights))
    if alone == stage:
        ways = _strip_candidates(height, has_host_memory=streaming)
        lower = ways[ways.index((stage.strip_height, stage.offload_activations)) + 1 :]
        if not lower:
            return None
        alone = replace(stage, strip_height=lower[0][0], offload_activations=lower[0][1])
    return replace(plan, stages=tuple(alone if it is stage else it for it in plan.stages))


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
    """The quickest plan within `budget` bytes of the device's memory.

    max_bytes: bytes to do with this time, where that is less. free_host_bytes: bytes of main memory for parts whose
    blocks are streamed, None for no limit. streaming: whether the device has a main memory beside its own. Raises
    `OutOfMemory` where nothing fits, with the nearest request that would.
    """
    limit = usable_bytes(min(budget, max_bytes or budget), device)

    def planned(asked: RequestShape) -> MemoryPlan | None:
        return _find_plan(model, asked, budget, limit, device, free_host_bytes, streaming)

    plan = planned(shape)
    if plan is not None:
        return plan
    can = f"{format_gigabytes(budget)} GB can be used"
    asked = f"{shape.width} x {shape.height}"
    if count := len(shape.references):
        asked += f" with {count} reference{'s' if count > 1 else ''}"
    least = _min_budget(model, shape, device, streaming)
    if (words := _describe_nearest_fit(shape, lambda lesser: planned(lesser) is not None)) is not None:
        raise OutOfMemory(
            f"{model.label} at {asked} needs about {format_gigabytes(least)} GB of memory, and {can}. "
            f"{words} would fit. A smaller checkpoint needs less, and so do weights in 8 bits (FLUX2_QUANTIZE=int8)."
        )
    raise OutOfMemory(
        f"{model.label} needs about {format_gigabytes(least)} GB of memory for this, and {can}: no size "
        f"fits. Choose a smaller checkpoint or one in fewer bits (a GGUF file, or FLUX2_QUANTIZE=int8), close other "
        f"programs, or raise FLUX2_MEMORY if you have set it."
    )


def usable_bytes(budget: int, device: torch.device) -> int:
    """What weights and activations may take of `budget` bytes of the device's memory: the rest is its own."""
    return int((budget - _workspace(device)) / ALLOCATOR_OVERHEAD)


def required_budget(size: int, device: torch.device) -> int:
    """The budget of which `size` bytes are usable."""
    return int(size * ALLOCATOR_OVERHEAD) + _workspace(device)


def count_weight_bytes(sizes: Mapping[str, int], prefixes: Sequence[str] = ()) -> PartWeightBytes:
    """`PartWeightBytes` from bytes by parameter name. prefixes: what the names of blocks begin with, before their
    number."""
    blocks: dict[tuple[int, int], int] = {}
    rest = 0
    for name, size in sizes.items():
        found = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        if found is None:
            rest += size
        else:
            key = found, int(name.removeprefix(prefixes[found]).partition(".")[0])
            blocks[key] = blocks.get(key, 0) + packed_bytes([size])
    return PartWeightBytes(non_block_bytes=rest, bytes_per_block=tuple(blocks[key] for key in sorted(blocks)))


def spread_evenly(chosen: int, total: int) -> list[int]:
    """Indices of `chosen` of `total` blocks, evenly apart: between two copies the others are computed."""
    return [(2 * i + 1) * total // (2 * chosen) for i in range(chosen)]


@dataclass(frozen=True, kw_only=True)
class _StageMemory:
    """A stage before it is planned. candidates: how it may be done, as in `STRIP_CANDIDATES`. activations: the bytes
    that one takes, reckoned only when it is asked for."""

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
    ways: list[tuple[ResidentParts, bool]] = [("all", False), ("all but the text encoder", False)]
    ways += [("all but the text encoder", True)] if streaming else []
    ways += [("one stage at a time", False)]
    ways += [("one stage at a time", True)] if streaming else []
    for together, streams in ways:
        for batch in _batch_candidates(shape, device) if not streams else [1]:
            stages: list[PlannedStage] = []
            for group in _group_stages(_list_stage_memory(model, shape, batch, device, streaming), together):
                fitted = _fit_stages(model, group, limit, streams)
                if not fitted:
                    break
                stages += fitted
            else:
                if free_host_bytes is None or _count_host_bytes(model, stages) <= free_host_bytes:
                    blocks = {part: len(weights.bytes_per_block) for part, weights in model.weights.items()}
                    return MemoryPlan(
                        budget=budget,
                        limit=limit,
                        resident_parts=together,
                        batch_size=batch,
                        stages=tuple(stages),
                        block_counts=blocks,
                    )
    return None


def _group_stages(demands: list[_StageMemory], resident_parts: ResidentParts) -> list[list[_StageMemory]]:
    """The stages by whose parts are on the device at the same time."""
    if resident_parts == "all":
        return [demands]
    if resident_parts == "one stage at a time":
        return [[demand] for demand in demands]
    prompt = [demand for demand in demands if demand.name == PROMPT_STAGE]
    return [*([prompt] if prompt else []), [demand for demand in demands if demand.name != PROMPT_STAGE]]


def _fit_stages(model: ModelFootprint, group: list[_StageMemory], limit: int, streams: bool) -> list[PlannedStage]:
    """The stages of `group`, with as few blocks streamed as will do; [] where nothing fits."""
    parts = {part for demand in group for part in demand.parts}
    whole = sum(model.weights[part].total for part in parts)
    kind = next((kind for kind in ("flow", "text") if kind in parts), None)  # whose blocks may be streamed
    passing = model.weights[kind] if kind else PartWeightBytes(non_block_bytes=0)
    for streamed in range(len(passing.bytes_per_block) + 1 if streams else 1):
        weights = whole - passing.total + passing.device_bytes(streamed)
        stages = []
        for demand in group:
            way = next((way for way in demand.candidates if weights + demand.activations(*way) <= limit), None)
            if way is None:
                break
            stages.append(
                PlannedStage(
                    name=demand.name,
                    parts=demand.parts,
                    resident_parts=tuple(sorted(parts)),
                    weights=weights,
                    activations=demand.activations(*way),
                    streamed=streamed if demand.parts[0] == kind else 0,
                    strip_height=way[0],
                    offload_activations=way[1],
                )
            )
        else:
            return stages
    return []


def _count_host_bytes(model: ModelFootprint, stages: Iterable[PlannedStage]) -> int:
    """Bytes of main memory that parts with streamed blocks take: they are read as a whole there."""
    return sum(model.weights[part].total for part in {stage.parts[0] for stage in stages if stage.streamed})


def _workspace(device: torch.device) -> int:
    return CUDA_WORKSPACE_BYTES if device.type == "cuda" else 0


def _batch_candidates(shape: RequestShape, device: torch.device) -> list[int]:
    """Numbers of pictures to draw at once that are worth a try, largest first."""
    most = shape.count
    if device.type == "cpu":
        kept = sum(_tokens(size) for size in shape.references)
        most = min(most, max(1, CPU_BATCH_TOKENS // ((2 if shape.use_cfg else 1) * (shape.tokens + kept))))
    return list(range(most, 0, -1))


def _list_stage_memory(
    model: ModelFootprint, shape: RequestShape, batch: int, device: torch.device, has_host_memory: bool
) -> list[_StageMemory]:
    """The stages in their order. has_host_memory: whether the device has a main memory beside its own."""
    encode_bytes = partial(footprint.encode_bytes, on_cpu=device.type == "cpu")
    decode_bytes = partial(footprint.decode_bytes, on_cpu=device.type == "cpu")
    found = []
    if model.text is not None:
        prompts = 2 if shape.use_cfg else 1
        found.append(
            _StageMemory(name=PROMPT_STAGE, parts=("text",), activations=lambda *_: model.text_activations(prompts))
        )
    kept = _conditioning_bytes(model, shape)
    params, dtype = model.autoencoder_params, model.autoencoder_dtype
    if shape.references:
        largest = max(shape.references, key=lambda size: size[0] * size[1])
        found.append(
            _StageMemory(
                name=REFERENCES_STAGE,
                parts=("autoencoder",),
                activations=lambda rows, store: kept + encode_bytes(params, dtype, *largest, rows, store),
                candidates=_strip_candidates(largest[1], has_host_memory),
            )
        )
    found.append(_denoising_memory(model, shape, batch, device, kept))
    size = shape.width, shape.height
    latents = batch * shape.tokens * model.transformer_params.in_channels * 4
    found.append(
        _StageMemory(
            name=DECODING_STAGE,
            parts=("autoencoder",),
            activations=lambda rows, store: kept + latents + decode_bytes(params, dtype, *size, rows, store),
            candidates=_strip_candidates(shape.height, has_host_memory),
        )
    )
    return found


def _denoising_memory(
    model: ModelFootprint, shape: RequestShape, batch: int, device: torch.device, conditioning_bytes: int
) -> _StageMemory:
    rows = batch * (2 if shape.use_cfg else 1)
    kept = sum(_tokens(size) for size in shape.references)
    # Beside what one evaluation takes: the latents before and after the step, the velocity, the clean estimate.
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
            reference_tokens=kept,
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
            preview += footprint.reference_cache_bytes(model.transformer_params, model.flow_dtype, rows, kept)
        return state + max(evaluation, preview)

    decoder = () if not model.decodes_previews else ("autoencoder",) if model.tiny is None else ("tiny",)
    return _StageMemory(name=DENOISING_STAGE, parts=("flow", *decoder), activations=activations)


def _conditioning_bytes(model: ModelFootprint, shape: RequestShape) -> int:
    """Bytes of what is read once and kept: the prompts' contexts and the references' latents."""
    prompts = model.text_length * model.transformer_params.context_width * model.flow_dtype.itemsize
    kept = sum(_tokens(size) for size in shape.references) * model.transformer_params.in_channels
    return prompts * (2 if shape.use_cfg else 1) + kept * model.autoencoder_dtype.itemsize


def _strip_candidates(height: int, has_host_memory: bool) -> tuple[tuple[int | None, bool], ...]:
    return tuple(
        (rows, store)
        for rows, store in STRIP_CANDIDATES
        if (rows is None or rows < height) and (has_host_memory or not store)
    )


def _min_budget(model: ModelFootprint, shape: RequestShape, device: torch.device, streaming: bool) -> int:
    """Bytes of device memory from which the request fits."""
    peaks = []
    for demand in _list_stage_memory(model, shape, 1, device, streaming):
        parts = [model.weights[part] for part in demand.parts]
        weights = sum(
            min(part.total, part.device_bytes(len(part.bytes_per_block)) if streaming else part.total) for part in parts
        )
        peaks.append(weights + min(demand.activations(*way) for way in demand.candidates))
    return required_budget(max(peaks), device)


def _describe_nearest_fit(shape: RequestShape, fits: Callable[[RequestShape], bool]) -> str | None:
    """The largest size that would fit instead, or else with how many references the request would; None if neither."""
    smaller = [
        replace(shape, width=_scaled(shape.width, scale), height=_scaled(shape.height, scale), count=1)
        for scale in range(1, 16)
    ]
    fitting = bisect_left(smaller, True, key=lambda lesser: not fits(lesser))
    if fitting:
        return f"{smaller[fitting - 1].width} x {smaller[fitting - 1].height}"
    for left in range(len(shape.references) - 1, -1, -1):
        if fits(replace(shape, references=shape.references[:left], count=1)):
            return f"{shape.width} x {shape.height} with {left or 'no'} reference{'s' if left != 1 else ''}"
    return None


def _scaled(side: int, sixteenths: int) -> int:
    return max(MIN_SIDE, round(side * sixteenths / 16 / SIZE_MULTIPLE) * SIZE_MULTIPLE)


def _tokens(size: tuple[int, int]) -> int:
    return (size[0] // SIZE_MULTIPLE) * (size[1] // SIZE_MULTIPLE)


def format_gigabytes(size: int) -> str:
    """`size` bytes in GB, without the unit."""
    return f"{size / GB:.1f}" if size >= GB // 10 else f"{size / GB:.2f}"
