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
from flux2_studio.request import MIN_SIDE, MULTIPLE

Together = Literal["all", "all but the text encoder", "one stage at a time"]
# How an autoencoder may go through a picture, quickest first: whole or in strips of so many pixels' height, and whether
# what is between two layers waits in main memory.
WHOLE = (None, False)
STRIPS: tuple[tuple[int | None, bool], ...] = (
    WHOLE,
    (512, False),
    (256, False),
    (128, False),
    (256, True),
    (128, True),
)
# A processor is busy with this many tokens: a larger batch is no faster there, only later to its previews and to Stop.
CPU_TOKENS = 2048
# What allocators lose to rounding and fragments. On CUDA also the workspaces of cuDNN and cuBLAS.
OVERHEAD = 1.02
CUDA_WORKSPACE = 192 * 2**20


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of one part in memory: of each of its blocks, which can be streamed, and of all the rest."""

    rest: int
    blocks: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.rest + sum(self.blocks)

    def on_device(self, streamed: int) -> int:
        """Bytes on the device when so many blocks are streamed."""
        chosen = set(spread(streamed, len(self.blocks)))
        staying = self.rest + sum(size for i, size in enumerate(self.blocks) if i not in chosen)
        return streamed_bytes([self.blocks[i] for i in sorted(chosen)], staying) if chosen else staying


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a checkpoint brings along, whatever the request. `text` is None where another machine encodes.

    text_activations: bytes, by the number of prompts. tiny: of the previews' small decoder, None where there is none.
    loras: bytes of what lies beside the transformer's weights.
    """

    label: str
    flow: Weights
    transformer: TransformerParams
    flow_dtype: torch.dtype
    flow_quantized: bool
    autoencoder: Weights
    autoencoder_params: AutoencoderParams
    autoencoder_dtype: torch.dtype
    text: Weights | None
    text_activations: Callable[[int], int]
    text_length: int
    tiny: Weights | None
    tiny_dtype: torch.dtype
    previews: bool
    reference_cache: bool
    loras: int = 0

    @property
    def weights(self) -> dict[str, Weights]:
        """Of each part, by kind; LoRAs count as the transformer's."""
        flow = replace(self.flow, rest=self.flow.rest + self.loras)
        parts = {"text": self.text, "flow": flow, "autoencoder": self.autoencoder, "tiny": self.tiny}
        return {kind: weights for kind, weights in parts.items() if weights is not None}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a request asks of the memory. Sizes are (width, height) in pixels. guided: two rows for each picture."""

    width: int
    height: int
    count: int = 1
    guided: bool = False
    references: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        return _tokens((self.width, self.height))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    parts: those that it uses. together: those that are on the device meanwhile. weights, activations: bytes. streamed:
    how many blocks of its first part are. rows: the height of the strips in which it goes through a picture, None for
    the whole; store: whether what is between two layers waits in main memory then.
    """

    name: str
    parts: tuple[str, ...]
    together: tuple[str, ...]
    weights: int
    activations: int
    streamed: int = 0
    rows: int | None = None
    store: bool = False

    @property
    def peak(self) -> int:
        """Bytes on the device at its most."""
        return self.weights + self.activations


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a request is made to fit into `limit` of the `budget` bytes that there are: the rest is the device's own.

    batch: how many pictures are drawn at once. blocks: how many the parts have that can be streamed.
    """

    budget: int
    limit: int
    together: Together
    batch: int
    stages: tuple[Stage, ...]
    blocks: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes on the device at its most."""
        return max(stage.peak for stage in self.stages)

    @property
    def resident(self) -> bool:
        """Whether all parts stay on the device."""
        return self.together == "all"

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def draws_like(self, other: Plan) -> bool:
        """Whether all that comes after the prompt is done as in `other`: as many pictures at once, as many blocks
        streamed, the same strips. That is what makes a run slow; the prompt is read once."""
        after = [
            [(stage.name, stage.streamed, stage.rows, stage.store) for stage in plan.stages if stage.name != PROMPT]
            for plan in (self, other)
        ]
        return self.batch == other.batch and after[0] == after[1]

    def text(self, place: str) -> str:
        """Sentences for the page. place: what the memory belongs to ("the card", "this machine")."""
        ways = {
            "all": f"everything stays in {place}'s memory",
            "all but the text encoder": f"the text encoder leaves {place}'s memory after the prompt",
            "one stage at a time": f"text encoder, transformer and autoencoder take turns in {place}'s memory",
        }
        told = [f"Fits: {gigabytes(self.peak)} of {gigabytes(self.budget)} GB; {ways[self.together]}."]
        for part, streamed in {stage.parts[0]: stage.streamed for stage in self.stages if stage.streamed}.items():
            told.append(
                f"{streamed} of the {_PARTS[part]}'s {self.blocks[part]} blocks wait in main memory and are sent over "
                f"when they are needed, which is slower."
            )
        if any(stage.rows for stage in self.stages):
            told.append("Pictures are read and decoded in strips.")
        return " ".join(told)


def leaner_decoding(plan: Plan, height: int, *, streaming: bool) -> Plan | None:
    """`plan`, for a picture `height` pixels high, with a decoding that takes less memory: first with the autoencoder
    alone on the device, then in lower and lower strips. None where it cannot take less. streaming: as in `make_plan`.
    """
    stage = plan.stage(DECODING)
    alone = replace(stage, together=stage.parts, activations=max(stage.activations, plan.limit - stage.weights))
    if alone == stage:
        ways = _strips(height, apart=streaming)
        lower = ways[ways.index((stage.rows, stage.store)) + 1 :]
        if not lower:
            return None
        alone = replace(stage, rows=lower[0][0], store=lower[0][1])
    return replace(plan, stages=tuple(alone if it is stage else it for it in plan.stages))


ORDER = PROMPT, REFERENCES, DRAWING, DECODING = "prompt", "references", "drawing", "decoding"
_PARTS = {"text": "text encoder", "flow": "transformer", "autoencoder": "autoencoder"}


def make_plan(
    needs: Needs,
    workload: Workload,
    budget: int,
    device: torch.device,
    *,
    within: int | None = None,
    host: int | None = None,
    streaming: bool = True,
) -> Plan:
    """The quickest plan within `budget` bytes of the device's memory.

    within: bytes to do with this time, where that is less. host: bytes of main memory for parts whose blocks are
    streamed, None for no limit. streaming: whether the device has a main memory beside its own. Raises `OutOfMemory`
    where nothing fits, with the nearest request that would.
    """
    limit = usable(min(budget, within or budget), device)

    def planned(asked: Workload) -> Plan | None:
        return _plan(needs, asked, budget, limit, device, host, streaming)

    plan = planned(workload)
    if plan is not None:
        return plan
    can = f"{gigabytes(budget)} GB can be used"
    asked = f"{workload.width} x {workload.height}"
    if count := len(workload.references):
        asked += f" with {count} reference{'s' if count > 1 else ''}"
    least = _least(needs, workload, device, streaming)
    if (words := _nearest(workload, lambda lesser: planned(lesser) is not None)) is not None:
        raise OutOfMemory(
            f"{needs.label} at {asked} needs about {gigabytes(least)} GB of memory, and {can}. "
            f"{words} would fit. A smaller checkpoint needs less, and so do weights in 8 bits (FLUX2_QUANTIZE=int8)."
        )
    raise OutOfMemory(
        f"{needs.label} needs about {gigabytes(least)} GB of memory for this, and {can}: no size "
        f"fits. Choose a smaller checkpoint or one in fewer bits (a GGUF file, or FLUX2_QUANTIZE=int8), close other "
        f"programs, or raise FLUX2_MEMORY if you have set it."
    )


def usable(budget: int, device: torch.device) -> int:
    """What weights and activations may take of `budget` bytes of the device's memory: the rest is its own."""
    return int((budget - _workspace(device)) / OVERHEAD)


def needed_for(size: int, device: torch.device) -> int:
    """The budget of which `size` bytes are usable."""
    return int(size * OVERHEAD) + _workspace(device)


def weights_of(sizes: Mapping[str, int], prefixes: Sequence[str] = ()) -> Weights:
    """`Weights` from bytes by parameter name. prefixes: what the names of blocks begin with, before their number."""
    blocks: dict[tuple[int, int], int] = {}
    rest = 0
    for name, size in sizes.items():
        found = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        if found is None:
            rest += size
        else:
            key = found, int(name.removeprefix(prefixes[found]).partition(".")[0])
            blocks[key] = blocks.get(key, 0) + packed_bytes([size])
    return Weights(rest=rest, blocks=tuple(blocks[key] for key in sorted(blocks)))


def spread(chosen: int, total: int) -> list[int]:
    """Indices of `chosen` of `total` blocks, evenly apart: between two copies the others are computed."""
    return [(2 * i + 1) * total // (2 * chosen) for i in range(chosen)]


@dataclass(frozen=True, kw_only=True)
class _Demand:
    """A stage before it is planned. ways: how it may be done, as in `STRIPS`. activations: the bytes that one takes,
    reckoned only when it is asked for."""

    name: str
    parts: tuple[str, ...]
    activations: Callable[[int | None, bool], int]
    ways: tuple[tuple[int | None, bool], ...] = (WHOLE,)


def _plan(
    needs: Needs,
    workload: Workload,
    budget: int,
    limit: int,
    device: torch.device,
    host: int | None,
    streaming: bool,
) -> Plan | None:
    ways: list[tuple[Together, bool]] = [("all", False), ("all but the text encoder", False)]
    ways += [("all but the text encoder", True)] if streaming else []
    ways += [("one stage at a time", False)]
    ways += [("one stage at a time", True)] if streaming else []
    for together, streams in ways:
        for batch in _batches(workload, device) if not streams else [1]:
            stages: list[Stage] = []
            for group in _groups(_demands(needs, workload, batch, device, streaming), together):
                fitted = _fitted(needs, group, limit, streams)
                if not fitted:
                    break
                stages += fitted
            else:
                if host is None or _waiting(needs, stages) <= host:
                    blocks = {part: len(weights.blocks) for part, weights in needs.weights.items()}
                    return Plan(
                        budget=budget, limit=limit, together=together, batch=batch, stages=tuple(stages), blocks=blocks
                    )
    return None


def _groups(demands: list[_Demand], together: Together) -> list[list[_Demand]]:
    """The stages by whose parts are on the device at the same time."""
    if together == "all":
        return [demands]
    if together == "one stage at a time":
        return [[demand] for demand in demands]
    prompt = [demand for demand in demands if demand.name == PROMPT]
    return [*([prompt] if prompt else []), [demand for demand in demands if demand.name != PROMPT]]


def _fitted(needs: Needs, group: list[_Demand], limit: int, streams: bool) -> list[Stage]:
    """The stages of `group`, with as few blocks streamed as will do; [] where nothing fits."""
    parts = {part for demand in group for part in demand.parts}
    whole = sum(needs.weights[part].total for part in parts)
    kind = next((kind for kind in ("flow", "text") if kind in parts), None)  # whose blocks may be streamed
    passing = needs.weights[kind] if kind else Weights(rest=0)
    for streamed in range(len(passing.blocks) + 1 if streams else 1):
        weights = whole - passing.total + passing.on_device(streamed)
        stages = []
        for demand in group:
            way = next((way for way in demand.ways if weights + demand.activations(*way) <= limit), None)
            if way is None:
                break
            stages.append(
                Stage(
                    name=demand.name,
                    parts=demand.parts,
                    together=tuple(sorted(parts)),
                    weights=weights,
                    activations=demand.activations(*way),
                    streamed=streamed if demand.parts[0] == kind else 0,
                    rows=way[0],
                    store=way[1],
                )
            )
        else:
            return stages
    return []


def _waiting(needs: Needs, stages: Iterable[Stage]) -> int:
    """Bytes of main memory that parts with streamed blocks take: they are read as a whole there."""
    return sum(needs.weights[part].total for part in {stage.parts[0] for stage in stages if stage.streamed})


def _workspace(device: torch.device) -> int:
    return CUDA_WORKSPACE if device.type == "cuda" else 0


def _batches(workload: Workload, device: torch.device) -> list[int]:
    """Numbers of pictures to draw at once that are worth a try, largest first."""
    most = workload.count
    if device.type == "cpu":
        kept = sum(_tokens(size) for size in workload.references)
        most = min(most, max(1, CPU_TOKENS // ((2 if workload.guided else 1) * (workload.tokens + kept))))
    return list(range(most, 0, -1))


def _demands(needs: Needs, workload: Workload, batch: int, device: torch.device, apart: bool) -> list[_Demand]:
    """The stages in their order. apart: whether the device has a main memory beside its own."""
    encode_bytes = partial(footprint.encode_bytes, on_cpu=device.type == "cpu")
    decode_bytes = partial(footprint.decode_bytes, on_cpu=device.type == "cpu")
    found = []
    if needs.text is not None:
        prompts = 2 if workload.guided else 1
        found.append(_Demand(name=PROMPT, parts=("text",), activations=lambda *_: needs.text_activations(prompts)))
    kept = _contexts(needs, workload)
    params, dtype = needs.autoencoder_params, needs.autoencoder_dtype
    if workload.references:
        largest = max(workload.references, key=lambda size: size[0] * size[1])
        found.append(
            _Demand(
                name=REFERENCES,
                parts=("autoencoder",),
                activations=lambda rows, store: kept + encode_bytes(params, dtype, *largest, rows, store),
                ways=_strips(largest[1], apart),
            )
        )
    found.append(_drawing(needs, workload, batch, device, kept))
    size = workload.width, workload.height
    latents = batch * workload.tokens * needs.transformer.in_channels * 4
    found.append(
        _Demand(
            name=DECODING,
            parts=("autoencoder",),
            activations=lambda rows, store: kept + latents + decode_bytes(params, dtype, *size, rows, store),
            ways=_strips(workload.height, apart),
        )
    )
    return found


def _drawing(needs: Needs, workload: Workload, batch: int, device: torch.device, contexts: int) -> _Demand:
    rows = batch * (2 if workload.guided else 1)
    kept = sum(_tokens(size) for size in workload.references)
    # Beside what one evaluation takes: the latents before and after the step, the velocity, the clean estimate.
    state = contexts + 5 * batch * workload.tokens * needs.transformer.in_channels * 4
    size = workload.width, workload.height
    on_cpu = device.type == "cpu"

    def activations(*_: object) -> int:
        evaluation = footprint.transformer_bytes(
            needs.transformer,
            needs.flow_dtype,
            batch=rows,
            tokens=workload.tokens,
            text=needs.text_length,
            references=kept,
            reference_cache=needs.reference_cache,
            quantized=needs.flow_quantized,
            on_cpu=on_cpu,
        )
        if not needs.previews:
            return state + evaluation
        preview = (
            footprint.decode_bytes(needs.autoencoder_params, needs.autoencoder_dtype, *size, None, on_cpu=on_cpu)
            if needs.tiny is None
            else footprint.tiny_decode_bytes(needs.tiny_dtype, 1, *size, on_cpu=on_cpu)
        )
        if needs.reference_cache:
            preview += footprint.kept_bytes(needs.transformer, needs.flow_dtype, rows, kept)
        return state + max(evaluation, preview)

    decoder = () if not needs.previews else ("autoencoder",) if needs.tiny is None else ("tiny",)
    return _Demand(name=DRAWING, parts=("flow", *decoder), activations=activations)


def _contexts(needs: Needs, workload: Workload) -> int:
    """Bytes of what is read once and kept: the prompts' contexts and the references' latents."""
    prompts = needs.text_length * needs.transformer.context_width * needs.flow_dtype.itemsize
    kept = sum(_tokens(size) for size in workload.references) * needs.transformer.in_channels
    return prompts * (2 if workload.guided else 1) + kept * needs.autoencoder_dtype.itemsize


def _strips(height: int, apart: bool) -> tuple[tuple[int | None, bool], ...]:
    return tuple((rows, store) for rows, store in STRIPS if (rows is None or rows < height) and (apart or not store))


def _least(needs: Needs, workload: Workload, device: torch.device, streaming: bool) -> int:
    """Bytes of device memory from which the request fits."""
    peaks = []
    for demand in _demands(needs, workload, 1, device, streaming):
        parts = [needs.weights[part] for part in demand.parts]
        weights = sum(min(part.total, part.on_device(len(part.blocks)) if streaming else part.total) for part in parts)
        peaks.append(weights + min(demand.activations(*way) for way in demand.ways))
    return needed_for(max(peaks), device)


def _nearest(workload: Workload, fits: Callable[[Workload], bool]) -> str | None:
    """The largest size that would fit instead, or else with how many references the request would; None if neither."""
    smaller = [
        replace(workload, width=_scaled(workload.width, scale), height=_scaled(workload.height, scale), count=1)
        for scale in range(1, 16)
    ]
    fitting = bisect_left(smaller, True, key=lambda lesser: not fits(lesser))
    if fitting:
        return f"{smaller[fitting - 1].width} x {smaller[fitting - 1].height}"
    for left in range(len(workload.references) - 1, -1, -1):
        if fits(replace(workload, references=workload.references[:left], count=1)):
            return f"{workload.width} x {workload.height} with {left or 'no'} reference{'s' if left != 1 else ''}"
    return None


def _scaled(side: int, sixteenths: int) -> int:
    return max(MIN_SIDE, round(side * sixteenths / 16 / MULTIPLE) * MULTIPLE)


def _tokens(size: tuple[int, int]) -> int:
    return (size[0] // MULTIPLE) * (size[1] // MULTIPLE)


def gigabytes(size: int) -> str:
    """`size` bytes in GB, without the unit."""
    return f"{size / GB:.1f}" if size >= GB // 10 else f"{size / GB:.2f}"
