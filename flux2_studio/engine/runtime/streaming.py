"""Models larger than the device: blocks wait in host memory and pass through two slots on the device in turn.

Does: packs each block's tensors, of whatever type, into one flat piece of host memory, and runs the module with every
block copied into a slot just before it computes, while the block before it still does. Does not know: which model it
is, how much memory there is, which of the blocks had better be streamed.

    block i uses slot i % 2 and its tensors are views into that slot, made once; a copy is one transfer of one flat

When block i has been enqueued, the copy of the next block that shares its slot is enqueued behind it, and after the
last blocks that is one of the first: a denoising loop comes back at once. Nothing depends on blocks being run in order,
or to the end: whoever finds another block in its slot has its own copied first.

Pitfalls: a slot holds the weights of its block only while that block runs. Who reads or changes the weights of a layer
at other times says so by `wait_until_loaded` or `editable_weights`. Do not call `.to()` on a streamed module, not even
while it pauses: `close` it first. Blocks must be called as modules, since hooks do the work. An odd number of streamed
blocks has the first and the last in one slot: nothing but what runs between these two hides the copy from one forward
to the next.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flux2_studio.errors import DeviceError

BLOCK_ALIGNMENT_BYTES = (
    256  # bytes; what CUDA's own allocations are aligned to, so kernels run as they do on tensors of their own
)
DEVICE_BUFFER_COUNT = 2
PAGE_BYTES = 4096  # bytes; memory is pinned by pages, and no two pieces may share one
CUDA_HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_STREAM_ATTRIBUTE = "streamed_home"  # the attribute by which a module inside a streamed block is found


# --- sizes, known before anything is loaded ---


def packed_bytes(tensor_sizes: Iterable[int]) -> int:
    """Bytes of a block whose tensors take `tensor_sizes` bytes, each of them aligned."""
    return sum(-(-size // BLOCK_ALIGNMENT_BYTES) * BLOCK_ALIGNMENT_BYTES for size in tensor_sizes)


def block_bytes(block: nn.Module) -> int:
    """Bytes of `block` when packed. It may be on meta."""
    return packed_bytes(tensor.nbytes for _, _, tensor in _owned_tensors(block))


def streamed_bytes(block_sizes: Sequence[int], rest: int) -> int:
    """Bytes on the device while blocks of `block_sizes` packed bytes are streamed, `rest` being all that stays there.

    Each of the two slots is as large as the largest block that uses it.
    """
    return rest + sum(_device_buffer_sizes(block_sizes))


def _device_buffer_sizes(block_sizes: Sequence[int]) -> list[int]:
    return [max(block_sizes[slot::DEVICE_BUFFER_COUNT]) for slot in range(min(DEVICE_BUFFER_COUNT, len(block_sizes)))]


# --- where copies run ---


class CopyStream:
    """Copies where there is one queue of work: each is done when its call returns. For the CPU and for Apple's GPUs."""

    def pin(self, owner: np.ndarray, address: int, size: int) -> bool:
        """Lock `size` bytes at `address` to their place until `owner`, whose they are, is freed; False if refused."""
        return True

    def copy(self, buffer_index: int, target: Tensor, source: Tensor) -> None:
        """Copy into `buffer_index` behind all the work that has been enqueued so far."""
        target.copy_(source)

    def wait_for_copy(self, buffer_index: int) -> None:
        """Let the work that is enqueued from now on wait for the last copy into `buffer_index`."""

    def synchronize(self) -> None:
        """Return when all work is done."""


class CudaCopyStream(CopyStream):
    """Copies on a stream of their own, beside the computation on whatever stream is current.

    cuda: PyTorch's module of that name.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)
        self._copy_events = [cuda.Event() for _ in range(DEVICE_BUFFER_COUNT)]

    def pin(self, owner: np.ndarray, address: int, size: int) -> bool:
        # Not PyTorch's own pinned memory: that is rounded up to powers of two and never given back to the system.
        runtime = self._cuda.cudart()
        if int(runtime.cudaHostRegister(address, size, CUDA_HOST_REGISTER_PORTABLE)) != 0:
            # CUDA keeps the refusal and would blame the next kernel for it: have one that may fail.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self._device)
            return False
        weakref.finalize(owner, runtime.cudaHostUnregister, address).atexit = False
        return True

    def copy(self, buffer_index: int, target: Tensor, source: Tensor) -> None:
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._copy_events[buffer_index].record(self._stream)

    def wait_for_copy(self, buffer_index: int) -> None:
        self._cuda.current_stream(self._device).wait_event(self._copy_events[buffer_index])

    def synchronize(self) -> None:
        self._cuda.synchronize(self._device)


def copy_stream_for(device: torch.device) -> CopyStream:
    return CudaCopyStream(device) if device.type == "cuda" else CopyStream()


def allocate_host_memory(size: int, copy_stream: CopyStream) -> Tensor | None:
    """`size` bytes of main memory from which `copy_stream` copies best: pinned where that makes a difference, for as
    long as anything holds a view of them. None where the system does not give so much."""
    pages = max(1, -(-size // PAGE_BYTES)) * PAGE_BYTES
    try:
        array = np.empty(pages + PAGE_BYTES, np.uint8)
        start = -array.ctypes.data % PAGE_BYTES
        if not copy_stream.pin(array, array.ctypes.data + start, pages):
            return None
    except MemoryError:
        return None
    return torch.from_numpy(array)[start : start + size]


# --- when copies run ---


class BlockSchedule:
    """Which block is in which slot, and which comes next. hosts: each block's flat. slots: flats on the device."""

    def __init__(
        self, host_buffers: Sequence[Tensor], device_buffers: Sequence[Tensor], copy_stream: CopyStream
    ) -> None:
        self._host_buffers = host_buffers
        self._device_buffers = device_buffers
        self._copy_stream = copy_stream
        self._loaded_blocks: list[int | None] = [None] * len(device_buffers)
        self._running_block: int | None = None

    def start_copy(self, block: int) -> None:
        """Have `block` copied into its slot, unless it is there or on its way."""
        slot, host = block % DEVICE_BUFFER_COUNT, self._host_buffers[block]
        if self._loaded_blocks[slot] != block:
            self._loaded_blocks[slot] = None  # in case the copy fails
            self._copy_stream.copy(slot, self._device_buffers[slot][: len(host)], host)
            self._loaded_blocks[slot] = block

    def wait_until_loaded(self, block: int) -> None:
        """Have `block` in its slot for the work that is enqueued next."""
        if self._running_block is not None:
            # Its forward died, and the next one may come from another stream, which knows nothing of its work.
            self._copy_stream.synchronize()
            self._running_block = None
        self.start_copy(block)
        self._copy_stream.wait_for_copy(block % DEVICE_BUFFER_COUNT)

    def acquire(self, block: int) -> None:
        """`block` is about to be enqueued."""
        self.wait_until_loaded(block)
        self._running_block = block

    def release(self, block: int) -> None:
        """`block` has been enqueued: its slot goes to the next one, or to the next forward's first."""
        self._running_block = None
        following = block + DEVICE_BUFFER_COUNT
        self.start_copy(following if following < len(self._host_buffers) else block % DEVICE_BUFFER_COUNT)


# --- the module ---


@dataclass(frozen=True)
class _TensorPlace:
    """One tensor of a block: whose it is, and where it stands in the block's flat."""

    owner: nn.Module
    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def view_in(self, flat: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return flat[self.offset : self.offset + size].view(self.dtype).view(self.shape)

    def bind(self, flat: Tensor) -> None:
        """Make the owner's tensor a view into `flat`."""
        view = self.view_in(flat)
        if self.name in self.owner._parameters:
            self.owner._parameters[self.name] = nn.Parameter(view, requires_grad=False)
        else:
            self.owner._buffers[self.name] = view


class StreamedModule:
    """A streamed module; see `stream_blocks`. Close it before the module is dropped or moved."""

    # Tensors made in inference mode could not be written to outside of it; others can, from both sides.
    @torch.inference_mode(False)
    def __init__(
        self, module: nn.Module, blocks: Sequence[nn.Module], device: torch.device, copy_stream: CopyStream
    ) -> None:
        self._module = module
        self._blocks = list(blocks)
        self._device = device
        self._copy_stream = copy_stream
        self._host_buffers: list[Tensor] = []
        self._places: list[list[_TensorPlace]] = []
        self._device_buffers: list[Tensor] = []
        self._schedule: BlockSchedule | None = None  # None while the module is on the CPU
        self._hooks: list[Any] = []
        # Should nobody close it: copies under way must end before their memory is freed.
        self._finalizer = weakref.finalize(self, copy_stream.synchronize)
        self._finalizer.atexit = False
        for block in self._blocks:
            self._pack_block(block)
        self.resume()

    @property
    def host_bytes(self) -> int:
        """What the blocks take in host memory."""
        return sum(host.nbytes for host in self._host_buffers)

    @property
    def device_bytes(self) -> int:
        """What the module takes on the device: slots, and all that is outside of the blocks, LoRAs included."""
        if self._schedule is None:
            return 0
        packed = self._packed_modules()
        rest = sum(tensor.nbytes for owner, _, tensor in _owned_tensors(self._module) if owner not in packed)
        return rest + sum(slot.nbytes for slot in self._device_buffers)

    @torch.inference_mode(False)
    def pause(self) -> None:
        """Leave the device: the module is whole on the CPU, its blocks' tensors being views of their flats.

        LoRAs that it carries stay on it. Costs a copy of what is outside of the blocks, and so does `resume`.
        """
        self._copy_stream.synchronize()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for block in self._blocks:
            for owner in block.modules():
                vars(owner).pop(_STREAM_ATTRIBUTE, None)
        for host, places in zip(self._host_buffers, self._places, strict=True):
            for place in places:
                place.bind(host)
        self._schedule = None
        self._device_buffers = []
        self._module.to("cpu")

    @torch.inference_mode(False)
    def resume(self) -> None:
        """Be streamed again. If that fails, the module stays as `pause` leaves it."""
        assert self._finalizer.alive, "it was closed"
        if self._schedule is not None:
            return
        try:
            self._start_streaming()
        except BaseException:
            self.pause()
            raise

    def close(self) -> None:
        """`pause` for good. The flats are freed when the module's tensors are; it may be streamed anew, and moved."""
        if self._schedule is not None:
            self.pause()
        self._finalizer.detach()
        self._blocks.clear()
        self._host_buffers.clear()
        self._places.clear()

    def fetch_block(self, block: int) -> None:
        """Have `block` in its slot for the work that is enqueued next."""
        assert self._schedule is not None
        self._schedule.wait_until_loaded(block)

    def write_back(self, block: int, layer: nn.Module) -> None:
        """Copy the tensors of `layer`, which is part of `block`, from its slot to host memory."""
        owners = set(layer.modules())
        for place in self._places[block]:
            if place.owner in owners:
                place.view_in(self._host_buffers[block]).copy_(
                    place.view_in(self._device_buffers[block % DEVICE_BUFFER_COUNT])
                )

    def _pack_block(self, block: nn.Module) -> None:
        """Move the tensors of `block` into a flat, each being freed before the next is copied."""
        host = self._allocate_host_buffer(block_bytes(block))
        places: list[_TensorPlace] = []
        offset = 0
        for owner, name, tensor in _owned_tensors(block):
            place = _TensorPlace(owner, name, offset, tensor.shape, tensor.dtype)
            place.view_in(host).copy_(tensor.detach())
            place.bind(host)
            places.append(place)
            offset += packed_bytes([tensor.nbytes])
        self._host_buffers.append(host)
        self._places.append(places)

    def _allocate_host_buffer(self, size: int) -> Tensor:
        memory = allocate_host_memory(size, self._copy_stream)
        if memory is None:
            needed = sum(map(block_bytes, self._blocks)) / 1e9
            raise DeviceError(
                f"Streaming this model takes {needed:.1f} GB of main memory that is locked to its place, and the "
                f"system does not give so much. Close other programs, or choose an 8-bit or 4-bit file of the model."
            )
        return memory

    def _start_streaming(self) -> None:
        sizes = [host.nbytes for host in self._host_buffers]
        self._device_buffers = [
            torch.empty(size, dtype=torch.uint8, device=self._device) for size in _device_buffer_sizes(sizes)
        ]
        packed = self._packed_modules()
        for owner in self._module.modules():
            if owner not in packed:
                owner._apply(lambda tensor: tensor.to(self._device), recurse=False)
        schedule = self._schedule = BlockSchedule(self._host_buffers, self._device_buffers, self._copy_stream)
        for number, (block, places) in enumerate(zip(self._blocks, self._places, strict=True)):
            for place in places:
                place.bind(self._device_buffers[number % DEVICE_BUFFER_COUNT])
            for owner in block.modules():
                setattr(owner, _STREAM_ATTRIBUTE, (self, number))
            self._hooks += _register_hooks(block, number, schedule)
        for number in range(len(self._device_buffers)):
            schedule.start_copy(number)

    def _packed_modules(self) -> set[nn.Module]:
        """The modules whose tensors are in the flats."""
        return {place.owner for places in self._places for place in places}


def _register_hooks(block: nn.Module, number: int, schedule: BlockSchedule) -> list[Any]:
    def enter(_module: nn.Module, _inputs: object) -> None:
        schedule.acquire(number)

    def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
        schedule.release(number)

    return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]


def stream_blocks(
    module: nn.Module, blocks: Sequence[nn.Module], device: torch.device, copy_stream: CopyStream | None = None
) -> StreamedModule:
    """Let `module`, which is in host memory, run on `device` with only two of `blocks` there at a time.

    blocks: modules inside it, in the order in which a forward runs them, whose forwards are not nested. They need not
    be all that it has: the others stay on the device with the rest. copy_stream: how copies are made; None: as fits
    `device`.

    The tensors of a block are moved to one flat as they come, so that host memory holds no more than one of them twice.
    On CUDA the flats are pinned, for as long as anything holds a view of them. Whatever goes wrong, the module is left
    whole on the CPU. Raises `DeviceError` if the system does not pin that much, PyTorch's own error if the device's
    memory does not suffice.
    """
    return StreamedModule(module, blocks, device, copy_stream or copy_stream_for(device))


def is_streamed(module: nn.Module) -> bool:
    """Whether `module` is inside a streamed block: its tensors are somewhere else in every run."""
    return _STREAM_ATTRIBUTE in vars(module)


def fetch_weights(layer: nn.Module) -> None:
    """Have the weights of `layer` where its tensors point, for the work that is enqueued next.

    Needed for layers of streamed blocks outside of a forward; does nothing for others.
    """
    if home := vars(layer).get(_STREAM_ATTRIBUTE):
        streaming, block = home
        streaming.fetch_block(block)


@contextlib.contextmanager
def editable_weights(layer: nn.Module) -> Iterator[None]:
    """`wait_until_loaded` the weights of `layer`; what is changed of them in place, in this context, lasts."""
    fetch_weights(layer)
    yield
    if home := vars(layer).get(_STREAM_ATTRIBUTE):
        streaming, block = home
        streaming.write_back(block, layer)


def _owned_tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter and buffer in `module`, persistent or not, with its owner and its name there."""
    for owner in module.modules():
        # The names first: the caller may put another tensor in a tensor's place.
        for tensors in (owner._parameters, owner._buffers):
            for name in list(tensors):
                if (tensor := tensors[name]) is not None:
                    yield owner, name, tensor
