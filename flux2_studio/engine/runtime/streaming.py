"""Models larger than the device: blocks wait in host memory and pass through two slots on the device in turn.

Does: packs each block's tensors, of whatever type, into one flat piece of host memory, and runs the module with every
block copied into a slot just before it computes, while the block before it still does. Does not know: which model it
is, how much memory there is, which of the blocks had better be streamed.

    block i uses slot i % 2 and its tensors are views into that slot, made once; a copy is one transfer of one flat

When block i has been enqueued, the copy of the next block that shares its slot is enqueued behind it, and after the
last blocks that is one of the first: a denoising loop comes back at once. Nothing depends on blocks being run in order,
or to the end: whoever finds another block in its slot has its own copied first.

Pitfalls: a slot holds the weights of its block only while that block runs. Who reads or changes the weights of a layer
at other times says so by `fetch` or `writing`. Do not call `.to()` on a streamed module, not even while it pauses:
`close` it first. Blocks must be called as modules, since hooks do the work. An odd number of streamed blocks has the
first and the last in one slot: nothing but what runs between these two hides the copy from one forward to the next.
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

ALIGNMENT = 256  # bytes; what CUDA's own allocations are aligned to, so kernels run as they do on tensors of their own
SLOTS = 2
PAGE = 4096  # bytes; memory is pinned by pages, and no two pieces may share one
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_HOME = "streamed_home"  # the attribute by which a module inside a streamed block is found


# --- sizes, known before anything is loaded ---


def packed_bytes(tensor_sizes: Iterable[int]) -> int:
    """Bytes of a block whose tensors take `tensor_sizes` bytes, each of them aligned."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in tensor_sizes)


def block_bytes(block: nn.Module) -> int:
    """Bytes of `block` when packed. It may be on meta."""
    return packed_bytes(tensor.nbytes for _, _, tensor in _tensors(block))


def streamed_bytes(block_sizes: Sequence[int], rest: int) -> int:
    """Bytes on the device while blocks of `block_sizes` packed bytes are streamed, `rest` being all that stays there.

    Each of the two slots is as large as the largest block that uses it.
    """
    return rest + sum(_slot_sizes(block_sizes))


def _slot_sizes(block_sizes: Sequence[int]) -> list[int]:
    return [max(block_sizes[slot::SLOTS]) for slot in range(min(SLOTS, len(block_sizes)))]


# --- where copies run ---


class Lane:
    """Copies where there is one queue of work: each is done when its call returns. For the CPU and for Apple's GPUs."""

    def pin(self, owner: np.ndarray, address: int, size: int) -> bool:
        """Lock `size` bytes at `address` to their place until `owner`, whose they are, is freed; False if refused."""
        return True

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        """Copy into `slot` behind all the work that has been enqueued so far."""
        target.copy_(source)

    def wait(self, slot: int) -> None:
        """Let the work that is enqueued from now on wait for the last copy into `slot`."""

    def settle(self) -> None:
        """Return when all work is done."""


class CudaLane(Lane):
    """Copies on a stream of their own, beside the computation on whatever stream is current.

    cuda: PyTorch's module of that name.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)
        self._copied = [cuda.Event() for _ in range(SLOTS)]

    def pin(self, owner: np.ndarray, address: int, size: int) -> bool:
        # Not PyTorch's own pinned memory: that is rounded up to powers of two and never given back to the system.
        runtime = self._cuda.cudart()
        if int(runtime.cudaHostRegister(address, size, PORTABLE)) != 0:
            # CUDA keeps the refusal and would blame the next kernel for it: have one that may fail.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self._device)
            return False
        weakref.finalize(owner, runtime.cudaHostUnregister, address).atexit = False
        return True

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._copied[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        self._cuda.current_stream(self._device).wait_event(self._copied[slot])

    def settle(self) -> None:
        self._cuda.synchronize(self._device)


def lane_for(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else Lane()


def host_memory(size: int, lane: Lane) -> Tensor | None:
    """`size` bytes of main memory from which `lane` copies best: pinned where that makes a difference, for as long as
    anything holds a view of them. None where the system does not give so much."""
    pages = max(1, -(-size // PAGE)) * PAGE
    try:
        array = np.empty(pages + PAGE, np.uint8)
        start = -array.ctypes.data % PAGE
        if not lane.pin(array, array.ctypes.data + start, pages):
            return None
    except MemoryError:
        return None
    return torch.from_numpy(array)[start : start + size]


# --- when copies run ---


class Schedule:
    """Which block is in which slot, and which comes next. hosts: each block's flat. slots: flats on the device."""

    def __init__(self, hosts: Sequence[Tensor], slots: Sequence[Tensor], lane: Lane) -> None:
        self._hosts = hosts
        self._slots = slots
        self._lane = lane
        self._held: list[int | None] = [None] * len(slots)
        self._running: int | None = None

    def load(self, block: int) -> None:
        """Have `block` copied into its slot, unless it is there or on its way."""
        slot, host = block % SLOTS, self._hosts[block]
        if self._held[slot] != block:
            self._held[slot] = None  # in case the copy fails
            self._lane.copy(slot, self._slots[slot][: len(host)], host)
            self._held[slot] = block

    def fetch(self, block: int) -> None:
        """Have `block` in its slot for the work that is enqueued next."""
        if self._running is not None:
            # Its forward died, and the next one may come from another stream, which knows nothing of its work.
            self._lane.settle()
            self._running = None
        self.load(block)
        self._lane.wait(block % SLOTS)

    def enter(self, block: int) -> None:
        """`block` is about to be enqueued."""
        self.fetch(block)
        self._running = block

    def leave(self, block: int) -> None:
        """`block` has been enqueued: its slot goes to the next one, or to the next forward's first."""
        self._running = None
        following = block + SLOTS
        self.load(following if following < len(self._hosts) else block % SLOTS)


# --- the module ---


@dataclass(frozen=True)
class _Place:
    """One tensor of a block: whose it is, and where it stands in the block's flat."""

    owner: nn.Module
    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def within(self, flat: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return flat[self.offset : self.offset + size].view(self.dtype).view(self.shape)

    def bind(self, flat: Tensor) -> None:
        """Make the owner's tensor a view into `flat`."""
        view = self.within(flat)
        if self.name in self.owner._parameters:
            self.owner._parameters[self.name] = nn.Parameter(view, requires_grad=False)
        else:
            self.owner._buffers[self.name] = view


class Streaming:
    """A streamed module; see `stream`. Close it before the module is dropped or moved."""

    # Tensors made in inference mode could not be written to outside of it; others can, from both sides.
    @torch.inference_mode(False)
    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], device: torch.device, lane: Lane) -> None:
        self._module = module
        self._blocks = list(blocks)
        self._device = device
        self._lane = lane
        self._hosts: list[Tensor] = []
        self._places: list[list[_Place]] = []
        self._slots: list[Tensor] = []
        self._schedule: Schedule | None = None  # None while the module is on the CPU
        self._hooks: list[Any] = []
        # Should nobody close it: copies under way must end before their memory is freed.
        self._settling = weakref.finalize(self, lane.settle)
        self._settling.atexit = False
        for block in self._blocks:
            self._pack(block)
        self.resume()

    @property
    def host_bytes(self) -> int:
        """What the blocks take in host memory."""
        return sum(host.nbytes for host in self._hosts)

    @property
    def device_bytes(self) -> int:
        """What the module takes on the device: slots, and all that is outside of the blocks, LoRAs included."""
        if self._schedule is None:
            return 0
        packed = self._packed()
        rest = sum(tensor.nbytes for owner, _, tensor in _tensors(self._module) if owner not in packed)
        return rest + sum(slot.nbytes for slot in self._slots)

    @torch.inference_mode(False)
    def pause(self) -> None:
        """Leave the device: the module is whole on the CPU, its blocks' tensors being views of their flats.

        LoRAs that it carries stay on it. Costs a copy of what is outside of the blocks, and so does `resume`.
        """
        self._lane.settle()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for block in self._blocks:
            for owner in block.modules():
                vars(owner).pop(_HOME, None)
        for host, places in zip(self._hosts, self._places, strict=True):
            for place in places:
                place.bind(host)
        self._schedule = None
        self._slots = []
        self._module.to("cpu")

    @torch.inference_mode(False)
    def resume(self) -> None:
        """Be streamed again. If that fails, the module stays as `pause` leaves it."""
        assert self._settling.alive, "it was closed"
        if self._schedule is not None:
            return
        try:
            self._start()
        except BaseException:
            self.pause()
            raise

    def close(self) -> None:
        """`pause` for good. The flats are freed when the module's tensors are; it may be streamed anew, and moved."""
        if self._schedule is not None:
            self.pause()
        self._settling.detach()
        self._blocks.clear()
        self._hosts.clear()
        self._places.clear()

    def fetch(self, block: int) -> None:
        """Have `block` in its slot for the work that is enqueued next."""
        assert self._schedule is not None
        self._schedule.fetch(block)

    def write_back(self, block: int, layer: nn.Module) -> None:
        """Copy the tensors of `layer`, which is part of `block`, from its slot to host memory."""
        owners = set(layer.modules())
        for place in self._places[block]:
            if place.owner in owners:
                place.within(self._hosts[block]).copy_(place.within(self._slots[block % SLOTS]))

    def _pack(self, block: nn.Module) -> None:
        """Move the tensors of `block` into a flat, each being freed before the next is copied."""
        host = self._host_memory(block_bytes(block))
        places: list[_Place] = []
        offset = 0
        for owner, name, tensor in _tensors(block):
            place = _Place(owner, name, offset, tensor.shape, tensor.dtype)
            place.within(host).copy_(tensor.detach())
            place.bind(host)
            places.append(place)
            offset += packed_bytes([tensor.nbytes])
        self._hosts.append(host)
        self._places.append(places)

    def _host_memory(self, size: int) -> Tensor:
        memory = host_memory(size, self._lane)
        if memory is None:
            needed = sum(map(block_bytes, self._blocks)) / 1e9
            raise DeviceError(
                f"Streaming this model takes {needed:.1f} GB of main memory that is locked to its place, and the "
                f"system does not give so much. Close other programs, or choose an 8-bit or 4-bit file of the model."
            )
        return memory

    def _start(self) -> None:
        sizes = [host.nbytes for host in self._hosts]
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in _slot_sizes(sizes)]
        packed = self._packed()
        for owner in self._module.modules():
            if owner not in packed:
                owner._apply(lambda tensor: tensor.to(self._device), recurse=False)
        schedule = self._schedule = Schedule(self._hosts, self._slots, self._lane)
        for number, (block, places) in enumerate(zip(self._blocks, self._places, strict=True)):
            for place in places:
                place.bind(self._slots[number % SLOTS])
            for owner in block.modules():
                setattr(owner, _HOME, (self, number))
            self._hooks += _hooks(block, number, schedule)
        for number in range(len(self._slots)):
            schedule.load(number)

    def _packed(self) -> set[nn.Module]:
        """The modules whose tensors are in the flats."""
        return {place.owner for places in self._places for place in places}


def _hooks(block: nn.Module, number: int, schedule: Schedule) -> list[Any]:
    def enter(_module: nn.Module, _inputs: object) -> None:
        schedule.enter(number)

    def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
        schedule.leave(number)

    return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]


def stream(module: nn.Module, blocks: Sequence[nn.Module], device: torch.device, lane: Lane | None = None) -> Streaming:
    """Let `module`, which is in host memory, run on `device` with only two of `blocks` there at a time.

    blocks: modules inside it, in the order in which a forward runs them, whose forwards are not nested. They need not
    be all that it has: the others stay on the device with the rest. lane: how copies are made; None: as fits `device`.

    The tensors of a block are moved to one flat as they come, so that host memory holds no more than one of them twice.
    On CUDA the flats are pinned, for as long as anything holds a view of them. Whatever goes wrong, the module is left
    whole on the CPU. Raises `DeviceError` if the system does not pin that much, PyTorch's own error if the device's
    memory does not suffice.
    """
    return Streaming(module, blocks, device, lane or lane_for(device))


def is_streamed(module: nn.Module) -> bool:
    """Whether `module` is inside a streamed block: its tensors are somewhere else in every run."""
    return _HOME in vars(module)


def fetch(layer: nn.Module) -> None:
    """Have the weights of `layer` where its tensors point, for the work that is enqueued next.

    Needed for layers of streamed blocks outside of a forward; does nothing for others.
    """
    if home := vars(layer).get(_HOME):
        streaming, block = home
        streaming.fetch(block)


@contextlib.contextmanager
def writing(layer: nn.Module) -> Iterator[None]:
    """`fetch` the weights of `layer`; what is changed of them in place, in this context, lasts."""
    fetch(layer)
    yield
    if home := vars(layer).get(_HOME):
        streaming, block = home
        streaming.write_back(block, layer)


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter and buffer in `module`, persistent or not, with its owner and its name there."""
    for owner in module.modules():
        # The names first: the caller may put another tensor in a tensor's place.
        for tensors in (owner._parameters, owner._buffers):
            for name in list(tensors):
                if (tensor := tensors[name]) is not None:
                    yield owner, name, tensor
