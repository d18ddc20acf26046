"""Where weights are: on the device, in main memory, or only in their files. The only code that moves them.

A part comes to the device when a stage asks for it. What has not been used for longest makes room: it goes to main
memory within a budget, from where it comes back quickly, else it is dropped and read from its file again. A part may
also be streamed: some of its blocks stay in main memory and pass through two buffers (`engine/runtime/streaming.py`).

Bytes are counted as the tensors take them; what activations need is the plan's business (`plan.py`).
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from flux2_studio.engine.runtime.streaming import StreamedModule, allocate_host_memory, copy_stream_for, stream_blocks

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(kw_only=True)
class _LoadedPart:
    """One part in memory. `host_copies`: a copy of each tensor in main memory, by where the tensor hangs; kept when the
    part comes back to the device, so that leaving again costs nothing."""

    model: Any
    module: nn.Module
    size: int  # bytes
    is_on_device: bool
    host_copies: dict[tuple[nn.Module, str], Tensor] = field(default_factory=dict)
    streaming: StreamedModule | None = None
    streamed: list[nn.Module] = field(default_factory=list)

    @property
    def device_bytes(self) -> int:
        if self.streaming is not None:
            return self.streaming.device_bytes
        return self.size if self.is_on_device else 0

    @property
    def host_bytes(self) -> int:
        if self.streaming is not None and self.is_on_device:
            return self.streaming.host_bytes
        return self.size if self.host_copies or self.streaming is not None else 0


class Residency(Generic[KeyT]):
    """Parts in memory, by key. Not for several threads at once.

    host_budget: bytes of main memory for parts that left the device; 0 where the device has no memory of its own.
    leaving: called with a part's model before it is moved or dropped, to take off what is not its own.
    """

    def __init__(
        self, device: torch.device, host_budget: int, on_evict: Callable[[Any], None] = lambda _: None
    ) -> None:
        self.device = device
        self._host_budget = host_budget
        self._on_evict = on_evict
        self._entries: OrderedDict[KeyT, _LoadedPart] = OrderedDict()  # least recently used first

    @property
    def device_bytes(self) -> int:
        """What all parts take on the device."""
        return sum(entry.device_bytes for entry in list(self._entries.values()))

    @property
    def host_bytes(self) -> int:
        """What parts, or copies of them, take in main memory beside the device's."""
        return sum(entry.host_bytes for entry in list(self._entries.values()))

    def device_bytes_of(self, key: KeyT) -> int:
        """Bytes that the part under `key` takes on the device at the moment."""
        return self._entries[key].device_bytes if key in self._entries else 0

    def is_loaded(self, key: KeyT) -> bool:
        """Whether the part under `key` is in memory, the device's or main memory."""
        return key in self._entries

    def get_on_device(self, key: KeyT) -> Any | None:
        """The part under `key` if it is on the device."""
        entry = self._entries.get(key)
        return entry.model if entry is not None and entry.is_on_device else None

    def offload(self, key: KeyT) -> None:
        """Have the part under `key` leave the device, if it is there: to main memory, or altogether."""
        if self.get_on_device(key) is not None:
            self._offload(key)
            empty_cache(self.device)

    def evict_until(self, size: int, limit: int, keep: Collection[KeyT] = ()) -> None:
        """Have parts leave, least recently used first, until `size` more bytes stay within `limit`.

        keep: those that must not. If even then it is too little, nothing is said: the device will.
        """
        for key, entry in self._entries.items():
            if key not in keep:  # what others put onto it would take room that is not counted
                self._on_evict(entry.model)
        left = False
        for key in [key for key, entry in self._entries.items() if entry.is_on_device and key not in keep]:
            if self.device_bytes + size <= limit:
                break
            self._offload(key)
            left = True
        if left:
            empty_cache(self.device)

    def acquire(
        self,
        key: KeyT,
        load: Callable[[torch.device], Any],
        get_module: Callable[[Any], nn.Module],
        *,
        get_streamed_blocks: Callable[[Any], Sequence[nn.Module]] | None = None,
    ) -> Any:
        """The part under `key`, on the device; room must have been made.

        load: reads it onto a device. get_module: its weights. get_streamed_blocks: if given, the blocks of it to
        stream.
        """
        entry = self._entries.get(key)
        if entry is not None and entry.is_on_device:
            wanted = len(get_streamed_blocks(entry.model)) if get_streamed_blocks is not None else 0
            if not entry.streamed and wanted:
                self._on_evict(entry.model)
                entry.is_on_device = False  # in part: what is streamed leaves, block by block
            # More than are streamed would not fit; fewer would, but are not worth moving all of it again.
            elif wanted > len(entry.streamed) or (entry.streamed and not wanted):
                self._offload(key)
                entry = self._entries.get(key)
        if entry is None:
            model = load(torch.device("cpu") if get_streamed_blocks is not None else self.device)
            module = get_module(model)
            size = sum(tensor.nbytes for tensor in _tensors(module).values())
            entry = _LoadedPart(model=model, module=module, size=size, is_on_device=get_streamed_blocks is None)
            self._entries[key] = entry
        if not entry.is_on_device:
            try:
                self._move_to_device(
                    key, entry, get_streamed_blocks(entry.model) if get_streamed_blocks is not None else ()
                )
            except BaseException:  # half of it may be there: nobody could say how much it takes
                self.drop(key)
                raise
        self._entries.move_to_end(key)
        return entry.model

    def drop(self, key: KeyT) -> bool:
        """Forget the part under `key`, wherever it is; whether there was one. Its memory is freed, even if somebody
        still holds the model."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self._on_evict(entry.model)
        if entry.streaming is not None:
            entry.streaming.close()
        for (owner, name), tensor in _tensors(entry.module).items():
            _put(owner, name, tensor.to("meta"))
        return True

    def clear(self) -> None:
        """Forget all parts and give their memory back."""
        for key in list(self._entries):
            self.drop(key)
        collect_and_empty_cache(self.device)

    def _move_to_device(self, key: KeyT, entry: _LoadedPart, blocks: Sequence[nn.Module]) -> None:
        if entry.streaming is not None and list(blocks) != entry.streamed:
            entry.streaming.close()
            entry.streaming = None
        if entry.streaming is not None:
            entry.streaming.resume()
        elif blocks:
            entry.host_copies.clear()
            self._evict_host_until(entry.size, key)
            entry.streaming = stream_blocks(entry.module, blocks, self.device)
        else:
            before = _tensors(entry.module)
            for (owner, name), tensor in before.items():
                _put(owner, name, tensor.to(self.device, non_blocking=True))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # before what is copied from may be freed
        entry.streamed = list(blocks)
        entry.is_on_device = True

    def _offload(self, key: KeyT) -> None:
        """Off the device: to main memory where that has room, else out of memory."""
        entry = self._entries[key]
        self._on_evict(entry.model)
        if not self._ensure_host_room(entry.size - entry.host_bytes, key):
            self.drop(key)
            return
        if entry.streaming is not None:
            entry.streaming.pause()
        elif entry.host_copies or self._copy_to_host(entry):
            for (owner, name), tensor in entry.host_copies.items():
                _put(owner, name, tensor)
        else:
            self.drop(key)
            return
        entry.is_on_device = False

    def _copy_to_host(self, entry: _LoadedPart) -> bool:
        """Give `entry` its copy in main memory; False where the system has none left."""
        lane = copy_stream_for(self.device)
        for place, tensor in _tensors(entry.module).items():
            flat = allocate_host_memory(tensor.nbytes, lane)  # one for each, so that each can be freed for itself
            if flat is None:
                entry.host_copies.clear()
                return False
            entry.host_copies[place] = flat.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        return True

    def _ensure_host_room(self, size: int, key: KeyT) -> bool:
        """Whether `size` more bytes fit into the budget, once parts that are only kept there have made room."""
        streamed = {other for other, it in self._entries.items() if it.streaming is not None and it.is_on_device}
        bound = sum(self._entries[other].host_bytes for other in streamed | {key})
        if bound + size > self._host_budget:  # then nobody need leave for it
            return False
        self._evict_host_until(size, key)
        return self.host_bytes + size <= self._host_budget

    def _evict_host_until(self, size: int, key: KeyT) -> None:
        """Have what is only kept in main memory leave it, until `size` more bytes fit into the budget or nothing is
        left that could. key: whom it is for."""
        for other, entry in list(self._entries.items()):
            if self.host_bytes + size <= self._host_budget:
                break
            if other == key or (entry.streaming is not None and entry.is_on_device):
                continue
            if entry.is_on_device:
                entry.host_copies.clear()
            else:
                self.drop(other)


def collect_and_empty_cache(device: torch.device) -> None:
    """Give all memory back to the device that nothing occupies, what only the garbage collector finds included: that
    takes a fifth of a second, so not at every swap."""
    gc.collect()
    empty_cache(device)


def empty_cache(device: torch.device) -> None:
    """Give memory that nothing occupies back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _tensors(module: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """All parameters and buffers, those too that no file holds, by the module and name where each hangs."""
    return {
        (owner, name): tensor
        for owner in module.modules()
        for held in (owner._parameters, owner._buffers)
        for name, tensor in held.items()
        if tensor is not None
    }


def _put(owner: nn.Module, name: str, tensor: Tensor) -> None:
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor
