"""The memory plan: each way is taken exactly where no quicker one fits, and what is taken fits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flux2_studio.checkpoints import GB
from flux2_studio.engine.params import AutoencoderParams, TransformerParams
from flux2_studio.engine.runtime.footprint import reference_cache_bytes
from flux2_studio.engine.runtime.streaming import streamed_bytes
from flux2_studio.errors import OutOfMemory
from flux2_studio.models.memory.plan import (
    ALLOCATOR_OVERHEAD,
    CPU_BATCH_TOKENS,
    CUDA_WORKSPACE_BYTES,
    DECODING_STAGE,
    DENOISING_STAGE,
    PROMPT_STAGE,
    REFERENCES_STAGE,
    MemoryPlan,
    ModelFootprint,
    PartWeightBytes,
    RequestShape,
    count_weight_bytes,
    make_plan,
    spread_evenly,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MB = 10**6
AUTOENCODER = AutoencoderParams(
    encoder_channels=(32, 32, 32, 32),
    decoder_channels=(32, 32, 32, 32),
    encoder_blocks=0,
    decoder_blocks=1,
    latent_channels=32,
)
FLOW = TransformerParams(
    in_channels=128,
    context_width=96,
    hidden=64,
    head_width=32,
    mlp=192,
    double_blocks=2,
    single_blocks=3,
    guidance_embedding=False,
)
# Weights that tower over activations, so that each way has a range of budgets of its own.
TOY = ModelFootprint(
    label="Toy",
    flow=PartWeightBytes(non_block_bytes=20 * MB, bytes_per_block=(60 * MB, 60 * MB, 30 * MB, 30 * MB, 30 * MB)),
    transformer_params=FLOW,
    flow_dtype=torch.float32,
    flow_quantized=False,
    autoencoder=PartWeightBytes(non_block_bytes=12 * MB),
    autoencoder_params=AUTOENCODER,
    autoencoder_dtype=torch.float32,
    text=PartWeightBytes(non_block_bytes=40 * MB, bytes_per_block=(40 * MB,) * 6),
    text_activations=lambda prompts: prompts * 3 * MB,
    text_length=32,
    tiny=PartWeightBytes(non_block_bytes=5 * MB),
    tiny_dtype=torch.float32,
    decodes_previews=True,
    caches_reference_kv=False,
)
SMALL = RequestShape(width=64, height=64)
LARGE = RequestShape(width=320, height=256)
QUICKEST_FIRST = ("all", "all but the text encoder", "one stage at a time")


def plan(needs: ModelFootprint, workload: RequestShape, budget: float, **fields: object) -> MemoryPlan | None:
    try:
        return make_plan(needs, workload, int(budget), CUDA, **fields)  # type: ignore[arg-type]
    except OutOfMemory:
        return None


def slowness(found: MemoryPlan | None) -> tuple[int, int, int, int, int]:
    """A plan's place from quick to slow; within a way, smaller batches, more blocks and lower strips are slower."""
    if found is None:
        return len(QUICKEST_FIRST), 0, 0, 0, 0
    streams = int(any(stage.streamed for stage in found.stages))
    way = QUICKEST_FIRST.index(found.resident_parts)
    return way, streams, -found.batch_size, sum(stage.streamed for stage in found.stages), 0


def needed(needs: ModelFootprint, workload: RequestShape, fits: Callable[[MemoryPlan], bool], **fields: object) -> int:
    """The least budget at which there is a plan that `fits`, to the byte."""
    low, high = 0, 10**12
    while high - low > 1:
        middle = (low + high) // 2
        found = plan(needs, workload, middle, **fields)
        low, high = (low, middle) if found is not None and fits(found) else (middle, high)
    return high


@pytest.mark.parametrize("workload", [SMALL, LARGE, replace(SMALL, references=((256, 256), (512, 256)))])
@pytest.mark.parametrize("streaming", [True, False])
def test_less_memory_never_gives_a_quicker_way_nor_more_than_there_is(workload: RequestShape, streaming: bool) -> None:
    before: MemoryPlan | None = None
    ways = set()
    for budget in range(1200 * MB, 0, -7 * MB):
        found = plan(TOY, workload, budget, streaming=streaming)
        if before is None and found is None and budget < 1000 * MB:
            continue
        assert slowness(found) >= slowness(before) or before is None
        before = found
        if found is not None:
            ways.add(slowness(found)[:2])
            assert ALLOCATOR_OVERHEAD * found.peak + CUDA_WORKSPACE_BYTES <= budget + 2
            assert found.budget == budget
            for stage in found.stages:
                assert set(stage.parts) <= set(stage.resident_parts)
                held = TOY.weights[stage.parts[0]]
                expected = sum(TOY.weights[part].total for part in stage.resident_parts) - held.total
                assert stage.weights <= expected + held.total
                if not stage.streamed and not any(other.streamed for other in found.stages):
                    assert stage.weights == expected + held.total
    assert before is None, "in the end nothing fits"
    assert ways >= {(0, 0), (1, 0)}
    assert not streaming or ways & {(1, 1), (2, 1)}


def test_each_way_begins_where_the_one_before_ends() -> None:
    """With the bytes of each: what is on the device together, beside what its stage takes."""
    whole = needed(TOY, SMALL, lambda it: it.resident_parts == "all")
    apart = needed(TOY, SMALL, lambda it: it.resident_parts != "one stage at a time" and not slowness(it)[1])
    assert 535 * MB < whole - CUDA_WORKSPACE_BYTES < 550 * MB
    assert 280 * MB < apart - CUDA_WORKSPACE_BYTES < 295 * MB, "the text encoder alone, which is the larger"
    at, below = plan(TOY, SMALL, whole), plan(TOY, SMALL, whole - 1)
    assert at is not None and below is not None
    assert (at.resident_parts, below.resident_parts) == ("all", "all but the text encoder")
    below = plan(TOY, SMALL, apart - 1)
    assert below is not None and below.resident_parts == "all but the text encoder"
    assert below.stage(PROMPT_STAGE).streamed == 3 and below.stage(DENOISING_STAGE).streamed == 0
    below = plan(TOY, SMALL, apart - 1, streaming=False)
    assert below is None, "one at a time is no help: the text encoder is the largest"
    least = needed(TOY, SMALL, lambda _: True)
    assert plan(TOY, SMALL, least) is not None and plan(TOY, SMALL, least - 1) is None


def test_as_few_blocks_are_streamed_as_will_do() -> None:
    remote = replace(TOY, text=None)
    seen = set()
    for budget in range(480 * MB, 190 * MB, -5 * MB):
        found = plan(remote, SMALL, budget)
        if found is None or found.resident_parts != "all but the text encoder":
            continue
        stage = found.stage(DENOISING_STAGE)
        seen.add(stage.streamed)
        usable = (budget - CUDA_WORKSPACE_BYTES) / ALLOCATOR_OVERHEAD
        rest = TOY.tiny.total + TOY.autoencoder.total  # type: ignore[union-attr]
        for fewer in range(stage.streamed):
            assert rest + TOY.flow.device_bytes(fewer) + stage.activations > usable, "one less would not do"
    assert len(seen) >= 3


def test_weights_on_the_device_while_blocks_are_streamed() -> None:
    weights = PartWeightBytes(non_block_bytes=5, bytes_per_block=(1, 2, 3, 4, 50))
    assert weights.total == weights.device_bytes(0) == 65
    chosen = spread_evenly(2, 5)
    assert chosen == [1, 3]
    assert weights.device_bytes(2) == 5 + 1 + 3 + 50 + streamed_bytes([2, 4], 0) == 65
    assert weights.device_bytes(5) == streamed_bytes([1, 2, 3, 4, 50], 5) == 5 + 50 + 4
    assert PartWeightBytes(non_block_bytes=7).device_bytes(0) == 7


@pytest.mark.parametrize("total", [1, 2, 5, 25, 56])
def test_blocks_that_are_streamed_lie_evenly_apart(total: int) -> None:
    for chosen in range(1, total + 1):
        found = spread_evenly(chosen, total)
        assert len(set(found)) == chosen and found == sorted(found) and found[0] >= 0 and found[-1] < total
        gaps = [b - a for a, b in itertools.pairwise(found)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_weights_from_names() -> None:
    sizes = {"img_in.weight": 100, "double_blocks.0.a": 300, "double_blocks.0.b": 1, "single_blocks.10.a": 256}
    sizes |= {"single_blocks.9.a": 512, "final_layer.a": 7}
    found = count_weight_bytes(sizes, ("double_blocks.", "single_blocks."))
    assert found == PartWeightBytes(non_block_bytes=107, bytes_per_block=(512 + 256, 512, 256)), (
        "aligned, and in the order in which they run"
    )
    assert count_weight_bytes(sizes) == PartWeightBytes(non_block_bytes=sum(sizes.values()))


def test_waiting_blocks_need_main_memory() -> None:
    least = needed(TOY, SMALL, lambda _: True)
    assert plan(TOY, SMALL, least, free_host_bytes=5000 * MB) is not None
    assert plan(TOY, SMALL, least, free_host_bytes=100 * MB) is None
    assert plan(TOY, SMALL, least, streaming=False) is None
    some = least + 50 * MB
    found = plan(TOY, SMALL, some, free_host_bytes=5000 * MB)
    assert found is not None
    # the part is read there as a whole, before the blocks that stay on the device leave
    waiting = sum(TOY.weights[part].total for part in {stage.parts[0] for stage in found.stages if stage.streamed})
    assert waiting
    assert plan(TOY, SMALL, some, free_host_bytes=waiting) == found
    fewer = plan(TOY, SMALL, some, free_host_bytes=waiting - 1)
    assert fewer is None or fewer.resident_parts == "one stage at a time"


def test_a_batch_is_what_memory_allows() -> None:
    many = RequestShape(width=256, height=256, count=6)
    needs = replace(TOY, transformer_params=replace(FLOW, hidden=1024, mlp=3072), tiny=None, decodes_previews=False)
    plans = [plan(needs, many, budget) for budget in range(1100 * MB, 730 * MB, -10 * MB)]
    batches = [found.batch_size for found in plans if found is not None and found.resident_parts == "all"]
    assert batches == sorted(batches, reverse=True) and batches[0] == 6 and len(set(batches)) >= 3
    one, two = (make_plan(needs, replace(many, count=count), 10**12, CUDA) for count in (1, 2))
    assert two.stage(DENOISING_STAGE).activations > 1.5 * one.stage(DENOISING_STAGE).activations
    guided = make_plan(needs, replace(many, count=1, use_cfg=True), 10**12, CUDA)
    rows, doubled = (it.stage(DENOISING_STAGE).activations for it in (one, guided))
    assert 1.5 * rows < doubled <= two.stage(DENOISING_STAGE).activations, "two rows for each picture"
    assert guided.stage(PROMPT_STAGE).activations == 2 * one.stage(PROMPT_STAGE).activations, "and two prompts"


@pytest.mark.parametrize(
    ("workload", "batch"),
    [
        (RequestShape(width=256, height=256, count=20), CPU_BATCH_TOKENS // 256),
        (RequestShape(width=256, height=256, count=20, use_cfg=True), CPU_BATCH_TOKENS // 512),
        (RequestShape(width=256, height=256, count=20, references=((256, 256),)), CPU_BATCH_TOKENS // 512),
        (RequestShape(width=256, height=256, count=3), 3),
        (RequestShape(width=1024, height=1024, count=3), 1),
    ],
)
def test_a_processor_draws_no_more_at_once_than_keeps_it_busy(workload: RequestShape, batch: int) -> None:
    assert make_plan(TOY, workload, 10**12, CPU, streaming=False).batch_size == batch


def test_references_count() -> None:
    none, one, two = (
        make_plan(TOY, replace(SMALL, references=((512, 512),) * count), 10**12, CUDA) for count in range(3)
    )
    assert [stage.name for stage in none.stages] == [PROMPT_STAGE, DENOISING_STAGE, DECODING_STAGE]
    assert [stage.name for stage in one.stages] == [PROMPT_STAGE, REFERENCES_STAGE, DENOISING_STAGE, DECODING_STAGE]
    drawing = [it.stage(DENOISING_STAGE).activations for it in (none, one, two)]
    assert drawing[0] < drawing[1] < drawing[2]
    cached = make_plan(
        replace(TOY, caches_reference_kv=True), replace(SMALL, references=((512, 512),) * 2), 10**12, CUDA
    )
    assert cached.stage(DENOISING_STAGE).activations > reference_cache_bytes(FLOW, torch.float32, 1, 2048)


def test_pictures_go_in_strips_where_the_whole_does_not_fit() -> None:
    tall = RequestShape(width=128, height=1024, references=((128, 1024),))
    heavy = replace(
        TOY, tiny=None, decodes_previews=False, autoencoder_params=replace(AUTOENCODER, decoder_channels=(64,) * 4)
    )
    whole = needed(heavy, tall, lambda it: it.is_resident and not any(stage.strip_height for stage in it.stages))
    below = plan(heavy, tall, whole - 1)
    assert below is not None and below.resident_parts == "all", "strips are quicker than moving weights"
    heights = {stage.name: stage.strip_height for stage in below.stages}
    assert heights[DECODING_STAGE] == 512 and heights[PROMPT_STAGE] is None and heights[DENOISING_STAGE] is None
    assert "strips" in below.describe("the card")


def test_plans_that_draw_alike_differ_in_the_prompt_at_most() -> None:
    whole = make_plan(TOY, SMALL, 10**12, CUDA)
    larger = make_plan(
        replace(TOY, text=PartWeightBytes(non_block_bytes=10**9), text_activations=lambda _: 10**9), SMALL, 10**12, CUDA
    )
    assert whole.same_after_prompt(larger) and larger.same_after_prompt(whole)
    apart = plan(TOY, SMALL, needed(TOY, SMALL, lambda it: it.is_resident) - 1)
    assert apart is not None and apart.resident_parts != whole.resident_parts and whole.same_after_prompt(apart)
    least = plan(TOY, SMALL, needed(TOY, SMALL, lambda _: True))
    assert least is not None and least.stage(DENOISING_STAGE).streamed and not whole.same_after_prompt(least)
    two, one = (make_plan(TOY, replace(SMALL, count=count), 10**12, CUDA) for count in (2, 1))
    assert not two.same_after_prompt(one)


def test_parts_that_are_not_there_are_not_counted() -> None:
    whole = make_plan(TOY, SMALL, 10**12, CUDA)
    remote = make_plan(replace(TOY, text=None), SMALL, 10**12, CUDA)
    assert [stage.name for stage in remote.stages] == [DENOISING_STAGE, DECODING_STAGE]
    assert whole.stage(DENOISING_STAGE).weights - remote.stage(DENOISING_STAGE).weights == 280 * MB
    rough = make_plan(replace(TOY, tiny=None, decodes_previews=False), SMALL, 10**12, CUDA)
    assert whole.stage(DENOISING_STAGE).weights - rough.stage(DENOISING_STAGE).weights == 5 * MB
    own = make_plan(replace(TOY, tiny=None), SMALL, 10**12, CUDA).stage(DENOISING_STAGE)
    assert own.parts == ("flow", "autoencoder")


def test_loras_count_where_the_transformer_is() -> None:
    bare, laden = (make_plan(replace(TOY, lora_bytes=size), SMALL, 10**12, CUDA) for size in (0, 70 * MB))
    for before, after in zip(bare.stages, laden.stages, strict=True):
        assert after.weights - before.weights == 70 * MB
    budget = needed(TOY, SMALL, lambda it: it.resident_parts == "all")
    pushed = plan(replace(TOY, lora_bytes=70 * MB), SMALL, budget)
    assert pushed is not None and pushed.resident_parts == "all but the text encoder"
    assert pushed.stage(PROMPT_STAGE).weights == 280 * MB, "they are not beside the text encoder"


@pytest.mark.parametrize(
    "workload",
    [RequestShape(width=1024, height=512), RequestShape(width=64, height=64, references=((256, 512),) * 6)],
)
def test_a_refusal_names_a_request_that_fits(workload: RequestShape) -> None:
    needs = replace(TOY, text=None)
    least = needed(needs, workload, lambda _: True)
    seen = set()
    for budget in (least - 1, least - 10 * MB, least - 40 * MB, needed(needs, SMALL, lambda _: True) + MB):
        with pytest.raises(OutOfMemory) as refused:
            make_plan(needs, workload, budget, CUDA)
        said = str(refused.value)
        if found := re.search(r"(\d+) x (\d+)(?: with (\w+) references?)? would fit", said):
            offered = replace(workload, width=int(found[1]), height=int(found[2]), count=1)
            if found[3]:
                left = 0 if found[3] == "no" else int(found[3])
                offered = replace(offered, references=workload.references[:left])
            assert plan(needs, offered, budget) is not None
            assert offered != replace(workload, count=1)
            seen.add(offered)
        claimed = float(re.search(r"needs about ([\d.]+) GB", said)[1]) * GB  # type: ignore[index]
        assert plan(needs, replace(workload, count=1), claimed * 1.1) is not None, "with so much it would fit"
    assert seen


def test_where_no_request_fits_it_says_what_else_can_be_done() -> None:
    with pytest.raises(OutOfMemory, match=r"no size fits.*smaller checkpoint.*FLUX2_QUANTIZE.*FLUX2_MEMORY"):
        make_plan(TOY, SMALL, 10 * MB, CUDA)
    with pytest.raises(OutOfMemory, match="no size"):
        make_plan(TOY, SMALL, 0, CPU, streaming=False)


def test_what_the_page_says() -> None:
    whole = make_plan(TOY, SMALL, 10**9, CUDA)
    assert re.fullmatch(r"Fits: 0\.\d of 1\.0 GB; everything stays in the card's memory\.", whole.describe("the card"))
    apart = plan(TOY, SMALL, needed(TOY, SMALL, lambda it: it.is_resident) - 1)
    assert apart is not None and "the text encoder leaves the card's memory after the prompt" in apart.describe(
        "the card"
    )
    least = plan(TOY, SMALL, needed(TOY, SMALL, lambda _: True))
    assert least is not None
    said = least.describe("the card")
    assert "take turns" in said or "leaves" in said
    for part, blocks in (("text encoder", 6), ("transformer", 5)):
        streamed = re.search(rf"(\d) of the {part}'s {blocks} blocks wait in main memory", said)
        assert streamed and 0 < int(streamed[1]) <= blocks
