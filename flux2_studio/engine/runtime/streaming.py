"""Weight streaming for models larger than the device: blocks stay in host memory and use two device buffers in turn.

Packs each block's tensors, of any dtype, into one flat host buffer, and copies every block to a device buffer just
before it runs, while the previous block still computes. Out of scope: which model it is, how much memory there is,
which blocks to stream.

    block i uses device buffer i % 2; its tensors are views into that buffer, made once; a copy is one transfer

When block i has been enqueued, the copy of the next block that uses the same buffer is enqueued behind it. After the
last blocks that is one of the first, because a denoising loop starts again at once. Blocks may run in any order, and a
forward may stop early: if a block's weights are not in its buffer when it runs, they are copied first.

Pitfalls: a buffer holds the weights of its block only while that block runs. Code that reads or changes the weights of
a layer at other times must use `fetch_weights` or `editable_weights`. Do not call `.to()` on a streamed module, not
even while it is paused: `close` it first. Blocks must be called as modules, since hooks do the work. With an odd number
of streamed blocks, the first and the last share a buffer: between forwards, only the computation between these two
hides the copy.
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

# The alignment of CUDA's own allocations, so that kernels run as they do on separately allocated tensors.
BLOCK_ALIGNMENT_BYTES = 256
DEVICE_BUFFER_COUNT = 2
PAGE_BYTES = 4096  # memory is pinned by pages, and no two buffers may share a page
CUDA_HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_STREAM_ATTRIBUTE = "streamed_home"  # on each module inside a streamed block: (StreamedModule, block index)


# --- sizes ---


def packed_bytes(tensor_sizes: Iterable[int]) -> int:
    """Return the bytes of a block whose tensors take `tensor_sizes` bytes, each aligned."""
    return sum(-(-size // BLOCK_ALIGNMENT_BYTES) * BLOCK_ALIGNMENT_BYTES for size in tensor_sizes)


def block_bytes(block: nn.Module) -> int:
    """Return the packed size of `block`, which may be on meta."""
    return packed_bytes(tensor.nbytes for _, _, tensor in _owned_tensors(block))


def streamed_bytes(block_sizes: Sequence[int], rest: int) -> int:
    """Return the bytes on the device while blocks of `block_sizes` packed bytes are streamed. rest: bytes that stay
    there.

    Each of the two buffers is as large as the largest block that uses it.
    """
    return rest + sum(_device_buffer_sizes(block_sizes))


def _device_buffer_sizes(block_sizes: Sequence[int]) -> list[int]:
    return [max(block_sizes[slot::DEVICE_BUFFER_COUNT]) for slot in range(min(DEVICE_BUFFER_COUNT, len(block_sizes)))]


# --- copy streams ---


class CopyStream:
    """Synchronous copies, for devices with one queue of work: the CPU and Apple's GPUs."""

    def pin(self, owner: np.ndarray, address: int, size: int) -> bool:
        """Pin `size` bytes at `address`, which belong to `owner`, until `owner` is freed. Returns False if refused."""
        return True

    def copy(self, buffer_index: int, target: Tensor, source: Tensor) -> None:
        """Copy `source` to `target`, in device buffer `buffer_index`, behind all work enqueued so far."""
        target.copy_(source)

    def wait_for_copy(self, buffer_index: int) -> None:
        """Make work enqueued from now on wait for the last copy into `buffer_index`."""

    def synchronize(self) -> None:
        """Wait until all work is done."""


class CudaCopyStream(CopyStream):
    """Copies on a separate CUDA stream, in parallel with the computation on the current stream.

    cuda: the module torch.cuda.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)
        self._copy_events = [cuda.Event() for _ in range(DEVICE_BUFFER_COUNT)]

    def pin(self, owner: np.ndarray, address: int, size: int) -> bool:
        # Not PyTorch's pinned allocator: it rounds up to powers of two and never returns memory to the system.
        runtime = self._cuda.cudart()
        if int(runtime.cudaHostRegister(address, size, CUDA_HOST_REGISTER_PORTABLE)) != 0:
            # CUDA remembers the error and reports it at the next kernel: launch one that may fail.
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
    """Allocate `size` bytes of host memory for `copy_stream`, pinned on CUDA. It lives as long as any view of it.
    Returns None if the system refuses.
    """
    pages = max(1, -(-size // PAGE_BYTES)) * PAGE_BYTES
    try:
        array = np.empty(pages + PAGE_BYTES, np.uint8)
        start = -array.ctypes.data % PAGE_BYTES
        if not copy_stream.pin(array, array.ctypes.data + start, pages):
            return None
    except MemoryError:
        return None
    return torch.from_numpy(array)[start : start + size]


# --- copy schedule ---


class BlockSchedule:
    """Tracks which block is in which device buffer and starts the copies. host_buffers: one per block."""

    def __init__(
        self, host_buffers: Sequence[Tensor], device_buffers: Sequence[Tensor], copy_stream: CopyStream
    ) -> None:
        self._host_buffers = host_buffers
        self._device_buffers = device_buffers
        self._copy_stream = copy_stream
        self._loaded_blocks: list[int | None] = [None] * len(device_buffers)
        self._running_block: int | None = None

    def start_copy(self, block: int) -> None:
        """Start copying `block` into its device buffer, unless it is there or on its way."""
        buffer_index, host = block % DEVICE_BUFFER_COUNT, self._host_buffers[block]
        if self._loaded_blocks[buffer_index] != block:
            self._loaded_blocks[buffer_index] = None  # in case the copy fails
            self._copy_stream.copy(buffer_index, self._device_buffers[buffer_index][: len(host)], host)
            self._loaded_blocks[buffer_index] = block

    def wait_until_loaded(self, block: int) -> None:
        """Make the work that is enqueued next see `block` in its device buffer."""
        if self._running_block is not None:
            # Its forward failed, and the next one may use another stream, which is not ordered after it.
            self._copy_stream.synchronize()
            self._running_block = None
        self.start_copy(block)
        self._copy_stream.wait_for_copy(block % DEVICE_BUFFER_COUNT)

    def acquire(self, block: int) -> None:
        """Call before `block` is enqueued."""
        self.wait_until_loaded(block)
        self._running_block = block

    def release(self, block: int) -> None:
        """Call after `block` has been enqueued. Starts to copy the next block that uses the same buffer: block + 2, or
        after the last blocks one of the first, for the next forward.
        """
        self._running_block = None
        next_block = block + DEVICE_BUFFER_COUNT
        self.start_copy(next_block if next_block < len(self._host_buffers) else block % DEVICE_BUFFER_COUNT)


# --- streamed modules ---


@dataclass(frozen=True)
class _TensorPlace:
    """One tensor of a block: its owner, and its position in the block's buffer."""

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

    # Tensors made in inference mode cannot be written outside of it. Normal tensors can be written in both modes.
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
        # If nobody calls `close`: running copies must end before their memory is freed.
        self._finalizer = weakref.finalize(self, copy_stream.synchronize)
        self._finalizer.atexit = False
        for block in self._blocks:
            self._pack_block(block)
        self.resume()

    @property
    def host_bytes(self) -> int:
        """Bytes of the blocks in host memory."""
        return sum(host.nbytes for host in self._host_buffers)

    @property
    def device_bytes(self) -> int:
        """Bytes of the module on the device: buffers and everything outside the blocks, LoRAs included."""
        if self._schedule is None:
            return 0
        packed = self._packed_modules()
        rest_bytes = sum(tensor.nbytes for owner, _, tensor in _owned_tensors(self._module) if owner not in packed)
        return rest_bytes + sum(buffer.nbytes for buffer in self._device_buffers)

    @torch.inference_mode(False)
    def pause(self) -> None:
        """Leave the device: the module is complete on the CPU, and its blocks' tensors are views of the host buffers.

        Its LoRAs stay attached. Costs a copy of everything outside the blocks, as does `resume`.
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
        """Stream again. If that fails, the module stays paused."""
        assert self._finalizer.alive, "it was closed"
        if self._schedule is not None:
            return
        try:
            self._start_streaming()
        except BaseException:
            self.pause()
            raise

    def close(self) -> None:
        """`pause` for good. The host buffers are freed with the module's tensors. The module may be moved or
        streamed anew.
        """
        if self._schedule is not None:
            self.pause()
        self._finalizer.detach()
        self._blocks.clear()
        self._host_buffers.clear()
        self._places.clear()

    def fetch_block(self, block: int) -> None:
        """Make the work that is enqueued next see `block` in its device buffer."""
        assert self._schedule is not None
        self._schedule.wait_until_loaded(block)

    def write_back(self, block: int, layer: nn.Module) -> None:
        """Copy the tensors of `layer`, a part of `block`, from its device buffer to host memory."""
        owners = set(layer.modules())
        for place in self._places[block]:
            if place.owner in owners:
                place.view_in(self._host_buffers[block]).copy_(
                    place.view_in(self._device_buffers[block % DEVICE_BUFFER_COUNT])
                )

    def _pack_block(self, block: nn.Module) -> None:
        """Move the tensors of `block` into a host buffer, freeing each before copying the next."""
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
        """Return the modules whose tensors are in the host buffers."""
        return {place.owner for places in self._places for place in places}


def _register_hooks(block: nn.Module, number: int, schedule: BlockSchedule) -> list[Any]:
    def enter_block(_module: nn.Module, _inputs: object) -> None:
        schedule.acquire(number)

    def exit_block(_module: nn.Module, _inputs: object, _output: object) -> None:
        schedule.release(number)

    return [block.register_forward_pre_hook(enter_block), block.register_forward_hook(exit_block)]


def stream_blocks(
    module: nn.Module, blocks: Sequence[nn.Module], device: torch.device, copy_stream: CopyStream | None = None
) -> StreamedModule:
    """Run `module`, which is in host memory, on `device` with only two of `blocks` there at a time.

    blocks: submodules in the order in which a forward runs them; their forwards must not be nested. Other submodules
    stay on the device. copy_stream: how copies are made; None picks one for `device`.

    Tensors move to a block's buffer one by one, so host memory never holds more than one of them twice. On CUDA the
    buffers are pinned as long as any view of them lives. On failure the module is left complete on the CPU. Raises
    `DeviceError` if the system does not pin that much, and PyTorch's own error if device memory runs out.
    """
    return StreamedModule(module, blocks, device, copy_stream or copy_stream_for(device))


def is_streamed(module: nn.Module) -> bool:
    """Return whether `module` is inside a streamed block. Its tensors then hold its weights only while the block
    runs.
    """
    return _STREAM_ATTRIBUTE in vars(module)


def fetch_weights(layer: nn.Module) -> None:
    """Make sure that work enqueued from now on finds the weights of `layer` in its tensors.

    Needed for layers of streamed blocks outside a forward; does nothing for other layers.
    """
    if stream_info := vars(layer).get(_STREAM_ATTRIBUTE):
        streaming, block = stream_info
        streaming.fetch_block(block)


@contextlib.contextmanager
def editable_weights(layer: nn.Module) -> Iterator[None]:
    """Fetch the weights of `layer`. In-place changes made in this context are written back to host memory."""
    fetch_weights(layer)
    yield
    if stream_info := vars(layer).get(_STREAM_ATTRIBUTE):
        streaming, block = stream_info
        streaming.write_back(block, layer)


def _owned_tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield every parameter and buffer in `module`, persistent or not, with its owner and its name there."""
    for owner in module.modules():
        # Copy the names, because the caller may replace tensors meanwhile.
        for tensors in (owner._parameters, owner._buffers):
            for name in list(tensors):
                if (tensor := tensors[name]) is not None:
                    yield owner, name, tensor
