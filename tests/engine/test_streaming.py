"""Streamed models against the same models held whole: bit by bit, whatever the copies' timing."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux2_studio.checkpoints import DEV, KLEIN_4B
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.lora import adapters as lora
from flux2_studio.engine.lora.file import Lora, open_lora
from flux2_studio.engine.lora.layers import AdaptedLinear
from flux2_studio.engine.runtime.streaming import (
    BLOCK_ALIGNMENT_BYTES,
    CopyStream,
    CudaCopyStream,
    StreamedModule,
    block_bytes,
    editable_weights,
    packed_bytes,
    stream_blocks,
    streamed_bytes,
)
from flux2_studio.engine.text.encoder import load_text_encoder
from flux2_studio.engine.weights.loading import WeightStorage, load_transformer, open_transformer
from flux2_studio.errors import DeviceError
from tests import quantised
from tests.tiny import Toys

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
RUNS: dict[str, dict[str, Any]] = {
    "klein": {"guidance": 1.0, "guidance_mode": "none"},
    "nine": {"guidance": 1.0, "guidance_mode": "none", "reference_cache": True},
    "dev": {"guidance": 4.0, "guidance_mode": "embedded"},
}


def run(model: Transformer, **how: Any) -> Tensor:
    """The latents after each of three steps, with one reference."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 128, 3, 4, generator=generator)
    context = torch.randn(1, 9, model.params.context_width, generator=generator)
    references = (torch.randn(1, 128, 2, 3, generator=generator),)
    how = {"guidance": 1.0, "guidance_mode": "none", **how}
    steps = denoise(model, noise, context, steps=3, references=references, **how)
    return torch.stack([step.latents.cpu() for step in steps])


def blocks_of(model: Transformer) -> list[nn.Module]:
    return [*model.double_blocks, *model.single_blocks]


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@pytest.fixture
def load(toys: Toys) -> Callable[[], Transformer]:
    """klein's toy, of five blocks, anew at each call."""
    return lambda: load_transformer(toys.klein.file, device=CPU, dtype=torch.float32)


class LateLane(CopyStream):
    """Copies as late as may be: what is copied into a slot is rubbish until somebody waits for it."""

    def __init__(self) -> None:
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.copies = 0
        self.settled = 0

    def copy(self, buffer_index: int, target: Tensor, source: Tensor) -> None:
        target.fill_(0xFF)  # not-a-number in all types of float
        self.pending[buffer_index] = (target, source)
        self.copies += 1

    def wait_for_copy(self, buffer_index: int) -> None:
        if buffer_index in self.pending:
            target, source = self.pending.pop(buffer_index)
            target.copy_(source)

    def synchronize(self) -> None:
        self.settled += 1
        for slot in list(self.pending):
            self.wait_for_copy(slot)


# --- the same numbers ---


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_a_streamed_transformer_draws_the_same(toys: Toys, name: str, device: torch.device) -> None:
    """Over several steps and runs, with references, with and without their cache."""
    file = getattr(toys, name).file
    expected = run(load_transformer(file, device=device, dtype=torch.float32), **RUNS[name])
    model = load_transformer(file, device=CPU, dtype=torch.float32)
    stream_blocks(model, blocks_of(model), device)
    assert model.device.type == device.type
    for _ in range(2):
        assert torch.equal(run(model, **RUNS[name]), expected)


@pytest.mark.parametrize("streamed", range(6))
def test_any_number_of_the_blocks_can_be_streamed(load: Callable[[], Transformer], streamed: int) -> None:
    expected = run(load())
    model = load()
    lane = LateLane()
    streaming = stream_blocks(model, blocks_of(model)[5 - streamed :], CPU, lane)
    assert streaming.host_bytes == sum(block_bytes(block) for block in blocks_of(model)[5 - streamed :])
    for _ in range(2):
        assert torch.equal(run(model), expected)
    # Two blocks stay where they are; of an odd number the one in the middle has a slot with nobody to share it.
    forwards = 2 * 3
    each_forward = {0: 0, 1: 0, 2: 0, 3: 2, 4: 4, 5: 5}[streamed]
    assert lane.copies == min(2, streamed) + forwards * each_forward
    assert not lane.settled, "nobody waits for the device"


def deep_state() -> quantised.State:
    """Two double and three single blocks in widths that every format can hold."""
    state: quantised.State = {}
    for number in range(3):
        for name, tensor in quantised.toy_state(seed=number).items():
            if name.startswith("single_blocks.") or (name.startswith("double_blocks.") and number < 2):
                state[name.replace(".0.", f".{number}.", 1)] = tensor
            elif number == 0:
                state[name] = tensor
    return state


WRITERS: dict[str, Callable[[Path], Path]] = {
    "BFL's fp8": lambda folder: quantised.bfl_fp8(deep_state()).save(folder / "weights.safetensors"),
    "NVFP4": lambda folder: quantised.bfl_nvfp4(deep_state()).save(folder / "weights.safetensors"),
    "GGUF": lambda folder: _gguf(folder / "weights.gguf"),
}


def _gguf(path: Path) -> Path:
    quantised.write_gguf(deep_state(), path, "Q4_K")
    return path


@pytest.mark.parametrize("kind", WRITERS)
def test_quantised_files(tmp_path: Path, kind: str) -> None:
    file = WRITERS[kind](tmp_path)
    plain, model = (open_transformer(file).load(device=CPU, dtype=torch.bfloat16, storage="stored") for _ in range(2))
    types = {tensor.dtype for block in blocks_of(model) for tensor in tensors_of(block)}
    assert types & {torch.uint8, torch.float8_e4m3fn}
    stream_blocks(model, blocks_of(model), CPU, LateLane())
    assert {tensor.dtype for block in blocks_of(model) for tensor in tensors_of(block)} == types
    assert torch.equal(run(model), run(plain))


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_quantised_on_loading(toys: Toys, storage: WeightStorage) -> None:
    opened = open_transformer(toys.dev.file)
    plain, model = (opened.load(device=CPU, dtype=torch.float32, storage=storage) for _ in range(2))
    stream_blocks(model, blocks_of(model), CPU, LateLane())
    assert torch.equal(run(model, **RUNS["dev"]), run(plain, **RUNS["dev"]))


@pytest.mark.parametrize("name", ["qwen", "mistral"])
def test_text_encoders(toys: Toys, name: str) -> None:
    text = getattr(toys, name)
    recipe = KLEIN_4B.recipe if name == "qwen" else DEV.recipe
    prompts = ("a red house by the river", "")
    plain, encoder = (
        load_text_encoder(text.folder, text.folder, recipe, device=CPU, dtype=torch.float32) for _ in range(2)
    )
    lane = LateLane()
    streaming = stream_blocks(encoder.text_decoder, list(encoder.text_decoder.layers), CPU, lane)
    for _ in range(2):
        assert torch.equal(encoder.encode(prompts).context, plain.encode(prompts).context)
    assert lane.copies > recipe.layer_count
    streaming.close()
    assert torch.equal(encoder.encode(prompts).context, plain.encode(prompts).context)


@pytest.mark.parametrize("loading", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("running", [False, True])
def test_inference_mode_may_begin_and_end_anywhere(
    load: Callable[[], Transformer], loading: bool, streaming: bool, running: bool
) -> None:
    def forward() -> Tensor:
        generator = torch.Generator().manual_seed(4)
        x, ctx = torch.randn(1, 6, 128, generator=generator), torch.randn(1, 5, 96, generator=generator)
        return model(x, ctx, torch.tensor([0.5]), model.rope(torch.zeros(11, 4)))

    with torch.inference_mode(loading):
        model = load()
    with torch.no_grad():
        expected = forward()
    with torch.inference_mode(streaming):
        handle = stream_blocks(model, blocks_of(model), CPU)
    with torch.no_grad(), torch.inference_mode(running):
        assert torch.equal(forward(), expected)
    with torch.no_grad(), torch.inference_mode(not running):
        assert torch.equal(forward(), expected)
        handle.pause()
    with torch.inference_mode(streaming):
        handle.resume()
    with torch.no_grad(), torch.inference_mode(running):
        assert torch.equal(forward(), expected)
    layer = model.single_blocks[1].linear1
    with torch.no_grad(), editable_weights(layer):
        layer.weight.mul_(1)
    with torch.no_grad(), torch.inference_mode(running):
        handle.close()
    with torch.no_grad():
        assert torch.equal(forward(), expected)
        model.double_blocks[0].img_mlp[0].weight.mul_(1)  # not frozen for ever


# --- memory ---


def test_sizes_are_known_beforehand(load: Callable[[], Transformer]) -> None:
    assert packed_bytes([]) == 0
    assert packed_bytes([1, BLOCK_ALIGNMENT_BYTES, BLOCK_ALIGNMENT_BYTES + 1]) == 4 * BLOCK_ALIGNMENT_BYTES
    assert streamed_bytes([], 7) == 7
    assert streamed_bytes([5], 7) == 12
    assert streamed_bytes([5, 3, 6, 2], 7) == 7 + 6 + 3
    model = load()
    sizes = [block_bytes(block) for block in blocks_of(model)]
    with torch.device("meta"):
        assert [block_bytes(block) for block in blocks_of(Transformer(model.params))] == sizes
    inside = sum(tensor.nbytes for block in blocks_of(model) for tensor in tensors_of(block))
    rest = sum(tensor.nbytes for tensor in tensors_of(model)) - inside
    streaming = stream_blocks(model, blocks_of(model), CPU)
    assert streaming.device_bytes == streamed_bytes(sizes, rest)
    assert streaming.host_bytes == sum(sizes)
    assert inside <= sum(sizes) < inside + 300 * BLOCK_ALIGNMENT_BYTES


def test_the_device_holds_two_slots_and_no_more_of_the_blocks(load: Callable[[], Transformer]) -> None:
    model = load()
    sizes = [block_bytes(block) for block in blocks_of(model)]
    streaming = stream_blocks(model, blocks_of(model), CPU)

    def storages(blocks: list[nn.Module]) -> dict[int, int]:
        found = [tensor.untyped_storage() for block in blocks for tensor in tensors_of(block)]
        return {storage.data_ptr(): storage.nbytes() for storage in found}

    before = storages(blocks_of(model))
    assert sorted(before.values()) == sorted([max(sizes[0::2]), max(sizes[1::2])])
    even, odd = storages(blocks_of(model)[0::2]), storages(blocks_of(model)[1::2])
    assert len(even) == len(odd) == 1
    assert even != odd
    pointers = [tensor.data_ptr() for tensor in tensors_of(model)]
    run(model)
    assert storages(blocks_of(model)) == before
    assert [tensor.data_ptr() for tensor in tensors_of(model)] == pointers, "views are made once"
    slots = [weakref.ref(slot) for slot in streaming._device_buffers]
    streaming.close()
    assert all(slot() is None for slot in slots)
    assert len(storages(blocks_of(model))) == 5, "one flat for each block"


def test_tensors_in_a_block_are_aligned(load: Callable[[], Transformer]) -> None:
    model = load()
    stream_blocks(model, blocks_of(model), CPU)
    offsets = [
        tensor.storage_offset() * tensor.element_size() for block in blocks_of(model) for tensor in tensors_of(block)
    ]
    assert all(offset % BLOCK_ALIGNMENT_BYTES == 0 for offset in offsets)
    assert any(tensor.nbytes % BLOCK_ALIGNMENT_BYTES for tensor in tensors_of(blocks_of(model)[0])), (
        "or this proves little"
    )


@pytest.mark.parametrize("trained", [False, True])
def test_what_was_packed_is_freed_before_the_next_block_is(load: Callable[[], Transformer], trained: bool) -> None:
    model = load().requires_grad_(trained)
    originals = [[weakref.ref(tensor) for tensor in tensors_of(block)] for block in blocks_of(model)]
    alive: list[int] = []

    class Watching(CopyStream):
        def pin(self, owner: np.ndarray, address: int, size: int) -> bool:
            alive.append(sum(any(tensor() is not None for tensor in block) for block in originals))
            return True

    stream_blocks(model, blocks_of(model), CPU, Watching())
    assert alive == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_close_gives_every_bit_back(load: Callable[[], Transformer], device: torch.device) -> None:
    model = load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = run(model)
    streaming = stream_blocks(model, blocks_of(model), device, LateLane())
    run(model)
    for _ in range(2):
        streaming.close()
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks_of(model))
    assert torch.equal(run(model), expected)
    again = stream_blocks(model, blocks_of(model)[:4], CPU, LateLane())
    assert torch.equal(run(model), expected)
    again.close()
    assert torch.equal(run(model), expected)


def test_a_pause_gives_up_the_device_and_copies_no_block(load: Callable[[], Transformer], tmp_path: Path) -> None:
    plain, model = load(), load()
    expected = run(plain)
    streaming = stream_blocks(model, blocks_of(model), CPU, LateLane())
    held = streaming.host_bytes
    run(model)
    slots = [weakref.ref(slot) for slot in streaming._device_buffers]
    streaming.pause()
    assert all(slot() is None for slot in slots)
    assert streaming.device_bytes == 0
    assert torch.equal(run(model), expected)
    flats = [tensor.data_ptr() for block in blocks_of(model) for tensor in tensors_of(block)]
    for _ in range(2):
        streaming.resume()
    assert all(len(block._forward_hooks) == 1 for block in blocks_of(model))
    assert streaming.host_bytes == held
    assert streaming.device_bytes > 0
    assert torch.equal(run(model), expected)
    streaming.pause()
    assert [tensor.data_ptr() for block in blocks_of(model) for tensor in tensors_of(block)] == flats
    for fused in (False, True):  # put on while it pauses
        for transformer in (plain, model):
            lora.set_loras(transformer, [(lora_file(plain, tmp_path, dora=True), 1.0)], fused=fused)
        streaming.resume()
        assert torch.equal(run(model), run(plain))
        streaming.pause()
        assert torch.equal(run(model), run(plain))
    streaming.close()
    with pytest.raises(AssertionError, match="closed"):
        streaming.resume()
    lora.set_loras(model, [])
    assert torch.equal(run(model), expected)


def test_what_was_being_trained_is_frozen(load: Callable[[], Transformer]) -> None:
    model = load().requires_grad_(True)
    streaming = stream_blocks(model, blocks_of(model), CPU)
    run(model)
    streaming.close()
    assert not any(tensor.requires_grad for block in blocks_of(model) for tensor in tensors_of(block))


# --- what goes wrong ---


class Died(Exception):
    pass


def last_layer(block: nn.Module) -> nn.Module:
    """Of the linear layers in `block` the last: the first of the very last block is not always called as a module."""
    return [part for part in block.modules() if isinstance(part, nn.Linear)][-1]


@contextlib.contextmanager
def dying(module: nn.Module) -> Iterator[None]:
    def die(*_: object) -> None:
        raise Died

    hook = module.register_forward_hook(die)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("inside", [True, False], ids=["inside a block", "after a block"])
@pytest.mark.parametrize("block", range(5))
def test_a_forward_that_died_does_no_harm(load: Callable[[], Transformer], block: int, inside: bool) -> None:
    expected = run(load())
    model = load()
    stream_blocks(model, blocks_of(model), CPU, LateLane())
    module = blocks_of(model)[block]
    where = last_layer(module) if inside else module
    with dying(where), pytest.raises(Died):
        run(model)
    assert torch.equal(run(model), expected)
    run(model)
    with dying(where), pytest.raises(Died):
        run(model)
    assert torch.equal(run(model), expected)


def test_a_run_that_is_given_up_between_two_steps_does_no_harm(load: Callable[[], Transformer]) -> None:
    expected = run(load())
    model = load()
    stream_blocks(model, blocks_of(model), CPU, LateLane())
    noise, context = torch.zeros(1, 128, 2, 2), torch.zeros(1, 3, model.params.context_width)
    next(denoise(model, noise, context, steps=4, guidance=1.0, guidance_mode="none"))
    assert torch.equal(run(model), expected)


def test_a_copy_that_failed_half_way_is_made_again(load: Callable[[], Transformer]) -> None:
    class Failing(CopyStream):
        copies = 0

        def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
            self.copies += 1
            half = len(target) // 2 if self.copies == 4 else len(target)
            target[:half] = source[:half]
            if self.copies == 4:
                raise Died

    expected = run(load())
    model = load()
    stream_blocks(model, blocks_of(model)[:4], CPU, Failing())
    with pytest.raises(Died):
        run(model)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("allowed", [0, 3])
def test_memory_that_cannot_be_pinned(load: Callable[[], Transformer], allowed: int) -> None:
    class Refusing(CopyStream):
        granted = 0

        def pin(self, owner: np.ndarray, address: int, size: int) -> bool:
            self.granted += 1
            return self.granted <= allowed

    model = load()
    expected = run(model)
    with pytest.raises(DeviceError, match="Close other programs"):
        stream_blocks(model, blocks_of(model), CPU, Refusing())
    assert torch.equal(run(model), expected)


def test_a_device_that_has_no_room_leaves_the_module_whole(load: Callable[[], Transformer]) -> None:
    class Full(CopyStream):
        def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
            raise torch.OutOfMemoryError

    model = load()
    expected = run(model)
    with pytest.raises(torch.OutOfMemoryError):
        stream_blocks(model, blocks_of(model), CPU, Full())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks_of(model))
    assert torch.equal(run(model), expected)


def test_no_room_after_a_pause_can_be_tried_again(load: Callable[[], Transformer]) -> None:
    class Full(CopyStream):
        full = False

        def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
            if self.full:
                raise torch.OutOfMemoryError
            target.copy_(source)

    model = load()
    expected = run(model)
    lane = Full()
    streaming = stream_blocks(model, blocks_of(model), CPU, lane)
    streaming.pause()
    lane.full = True
    with pytest.raises(torch.OutOfMemoryError):
        streaming.resume()
    assert torch.equal(run(model), expected)
    lane.full = False
    streaming.resume()
    assert streaming.device_bytes > 0
    assert torch.equal(run(model), expected)


# --- LoRAs ---


def lora_file(model: Transformer, folder: Path, *, dora: bool, seed: int = 6) -> Lora:
    """A LoRA for every linear layer."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in lora.linear_layers_of(model).items():
        rows, columns = layer.out_features, layer.in_features
        state[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
        state[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
        if dora:
            state[f"{name}.dora_scale"] = 0.5 + torch.rand(rows, 1, generator=generator)
    path = folder / f"{seed}.safetensors"
    save_file(state, path)
    return open_lora(path)


@pytest.mark.parametrize("fused", [False, True], ids=["on the fly", "fused"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_loras_come_and_go_on_a_streamed_transformer(
    load: Callable[[], Transformer], tmp_path: Path, dora: bool, fused: bool
) -> None:
    plain = load()
    one, two = (lora_file(plain, tmp_path, dora=dora, seed=seed) for seed in (6, 7))
    bare = run(plain)
    model = load()
    streaming = stream_blocks(model, blocks_of(model), CPU, LateLane())
    assert torch.equal(run(model), bare)
    for loras in ([(one, 1.0)], [(one, 0.5), (two, 0.8)], [(two, 1.0)], []):
        lora.set_loras(plain, loras, fused=fused)
        lora.set_loras(model, loras, fused=fused)
        expected = run(plain)
        assert torch.equal(expected, bare) == (not loras)
        assert torch.equal(run(model), expected)
        assert torch.equal(run(model), expected)
    lora.set_loras(plain, [(one, 1.0)], fused=fused)
    lora.set_loras(model, [(one, 1.0)], fused=fused)
    with_one = run(plain)
    streaming.close()
    assert torch.equal(run(model), with_one), "LoRAs stay on"
    again = stream_blocks(model, blocks_of(model), CPU, LateLane())
    assert torch.equal(run(model), with_one)
    lora.set_loras(model, [])
    assert torch.equal(run(model), bare), "put on before, taken off while streamed"
    again.close()
    assert torch.equal(run(model), bare)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_doras_on_quantised_weights_that_are_streamed(toys: Toys, tmp_path: Path, storage: WeightStorage) -> None:
    opened = open_transformer(toys.klein.file)
    plain, model = (opened.load(device=CPU, dtype=torch.float32, storage=storage) for _ in range(2))
    dora = lora_file(plain, tmp_path, dora=True)
    stream_blocks(model, blocks_of(model), CPU, LateLane())
    for transformer in (plain, model):
        lora.set_loras(transformer, [(dora, 1.0)])
    assert torch.equal(run(model), run(plain))


def test_loras_count_among_what_the_device_holds(load: Callable[[], Transformer], tmp_path: Path) -> None:
    model = load()
    streaming = stream_blocks(model, blocks_of(model), CPU)
    bare = streaming.device_bytes
    lora.set_loras(model, [(lora_file(model, tmp_path, dora=False), 1.0)])
    layers = lora.linear_layers_of(model).values()
    added = sum(4 * 4 * (layer.in_features + layer.out_features) for layer in layers)
    assert streaming.device_bytes == bare + added


# --- the order of work on CUDA ---


class FakeStream:
    """Knows all the work that is sure to be done before what is enqueued on it next."""

    def __init__(self) -> None:
        self.past: set[int] = set()

    def wait_stream(self, other: FakeStream) -> None:
        self.past |= other.past

    def wait_event(self, event: FakeEvent) -> None:
        self.past |= event.past


class FakeEvent:
    def __init__(self) -> None:
        self.past: set[int] = set()

    def record(self, stream: FakeStream) -> None:
        self.past = set(stream.past)


class FakeCuda:
    """As much of torch.cuda as the lane uses, with streams that know their past, and memory that can be pinned."""

    Event = FakeEvent

    def __init__(self, refusing: bool = False) -> None:
        self.refusing = refusing
        self.streams: list[FakeStream] = []
        self.current = self.Stream()
        self.work = 0
        self.pinned: dict[int, int] = {}
        self.on_copy: Callable[[FakeStream], None] = lambda _: None

    def Stream(self, _device: object = None) -> FakeStream:
        self.streams.append(FakeStream())
        return self.streams[-1]

    def current_stream(self, _device: object) -> FakeStream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.on_copy(stream)
        yield

    def synchronize(self, _device: object) -> None:
        for each in self.streams:
            each.past = set(range(1, self.work + 1))

    def enqueue(self, stream: FakeStream) -> int:
        self.work += 1
        stream.past.add(self.work)
        return self.work

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, address: int, size: int, _flags: int) -> int:
        assert address % 4096 == 0
        assert size % 4096 == 0
        if not self.refusing:
            self.pinned[address] = size
        return 2 if self.refusing else 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


class Watched(CudaCopyStream):
    """Asserts that no copy into a slot may begin before the block that used it last is done, and no block before the
    copy into its slot is."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__(CPU, cuda)
        self.cuda = cuda
        self.slot = 0
        self.copied: dict[int, int] = {}
        self.computed: dict[int, set[int]] = {0: set(), 1: set()}
        cuda.on_copy = self.begin_copy

    def copy(self, buffer_index: int, target: Tensor, source: Tensor) -> None:
        self.slot = buffer_index
        super().copy(buffer_index, target, source)

    def begin_copy(self, stream: FakeStream) -> None:
        assert stream is not self.cuda.current, "beside the computation, not in it"
        assert self.computed[self.slot] <= stream.past
        self.copied[self.slot] = self.cuda.enqueue(stream)

    def watch(self, blocks: list[nn.Module]) -> None:
        """Of `blocks`, all streamed; the last linear layer in each tells that it computes."""
        for number, block in enumerate(blocks):
            layer = last_layer(block)
            layer.register_forward_pre_hook(lambda *_, slot=number % 2: self.compute(slot))

    def compute(self, slot: int) -> None:
        assert self.copied[slot] in self.cuda.current.past
        self.computed[slot].add(self.cuda.enqueue(self.cuda.current))


@pytest.mark.parametrize("streamed", range(1, 6))
def test_copies_and_blocks_take_turns_in_a_slot(load: Callable[[], Transformer], streamed: int) -> None:
    expected = run(load())
    model = load()
    cuda = FakeCuda()
    lane = Watched(cuda)
    blocks = blocks_of(model)[:streamed]
    stream_blocks(model, blocks, CPU, lane)
    lane.watch(blocks)
    assert torch.equal(run(model), expected)
    last = blocks[-1]
    inside = last_layer(last)
    for where in (inside, last):
        with dying(where), pytest.raises(Died):
            run(model)
        cuda.current = cuda.Stream()  # the next caller knows nothing of the one that died
        assert torch.equal(run(model), expected)
    assert sum(len(done) for done in lane.computed.values()) == (3 * 3 + 2) * streamed


def test_the_next_copy_overlaps_with_the_block_before(load: Callable[[], Transformer]) -> None:
    """A copy waits for the block that had its slot, not for the one that is computing."""
    model = load()
    cuda = FakeCuda()
    lane = Watched(cuda)
    stream_blocks(model, blocks_of(model), CPU, lane)
    lane.watch(blocks_of(model))
    order: list[str] = []
    watched = cuda.on_copy

    def note(stream: FakeStream) -> None:
        order.append("copy")
        watched(stream)

    cuda.on_copy = note
    for number, block in enumerate(blocks_of(model)):
        block.register_forward_pre_hook(lambda *_, number=number: order.append(str(number)))
    run(model)
    one_forward = ["0", "copy", "1", "copy", "2", "copy", "3", "copy", "4", "copy"]
    assert order == 3 * one_forward


def test_memory_is_pinned_as_long_as_anyone_holds_it(load: Callable[[], Transformer]) -> None:
    model = load()
    cuda = FakeCuda()
    blocks = blocks_of(model)
    sizes = [block_bytes(block) for block in blocks]
    streaming = stream_blocks(model, blocks, CPU, CudaCopyStream(CPU, cuda))
    assert [-(-size // 4096) * 4096 for size in sizes] == list(cuda.pinned.values())
    streaming.close()
    for block in blocks:
        for tensor in tensors_of(block):
            assert any(start <= tensor.data_ptr() < start + size for start, size in cuda.pinned.items())
    kept = model.single_blocks[0].linear1.weight
    del model, streaming, block, blocks, tensor
    gc.collect()
    assert len(cuda.pinned) == 1
    del kept
    assert not cuda.pinned


def test_dropped_without_being_closed(load: Callable[[], Transformer]) -> None:
    """Whatever is under way ends before the memory goes."""

    class Settling(CudaCopyStream):
        pinned_then = 0

        def synchronize(self) -> None:
            Settling.pinned_then = len(cuda.pinned)

    cuda = FakeCuda()
    model = load()
    handle: StreamedModule | None = stream_blocks(model, blocks_of(model), CPU, Settling(CPU, cuda))
    del model, handle
    gc.collect()
    assert Settling.pinned_then == 5
    assert not cuda.pinned


def test_cuda_refuses_to_pin(load: Callable[[], Transformer]) -> None:
    model = load()
    expected = run(model)
    with pytest.raises(DeviceError, match="main memory"):
        stream_blocks(model, blocks_of(model), CPU, CudaCopyStream(CPU, FakeCuda(refusing=True)))
    assert torch.equal(run(model), expected)
