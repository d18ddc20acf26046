"""Moves weights between their files, main memory and the device. No other code moves them.

A part is loaded onto the device when a stage acquires it. The least recently used parts are evicted to make room: they
are offloaded to main memory within a budget, from where they return quickly, or dropped and read from their files
again. A part may also be streamed: some of its blocks stay in main memory and pass through two buffers
(`engine/runtime/streaming.py`).

Only the bytes of tensors are counted here; `plan.py` accounts for activations.
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
    """One part in memory. host_copies: copies of its tensors in main memory, by owning module and name; kept when the
    part returns to the device, so that offloading it again needs no copy."""

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
    """Parts in memory, by key. Not thread-safe.

    host_budget: bytes of main memory for offloaded parts; 0 if the device has no memory of its own. on_evict: removes
    LoRAs, CUDA graphs and the like from a part's model. Called before the part is moved or dropped, and by every
    `evict_until` for all parts outside `keep`, even if they stay on the device.
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
        """Bytes of all parts on the device."""
        return sum(entry.device_bytes for entry in list(self._entries.values()))

    @property
    def host_bytes(self) -> int:
        """Bytes of all parts and their copies in main memory, apart from the device's memory."""
        return sum(entry.host_bytes for entry in list(self._entries.values()))

    def device_bytes_of(self, key: KeyT) -> int:
        """Returns the bytes of the part `key` that are on the device now."""
        return self._entries[key].device_bytes if key in self._entries else 0

    def is_loaded(self, key: KeyT) -> bool:
        """Returns whether the part `key` is on the device or in main memory."""
        return key in self._entries

    def get_on_device(self, key: KeyT) -> Any | None:
        """Returns the part `key` if it is on the device, otherwise None."""
        entry = self._entries.get(key)
        return entry.model if entry is not None and entry.is_on_device else None

    def offload(self, key: KeyT) -> None:
        """Offloads the part `key` to main memory, or drops it if there is no room. Does nothing if it is not on the
        device."""
        if self.get_on_device(key) is not None:
            self._offload(key)
            empty_cache(self.device)

    def evict_until(self, size: int, limit: int, keep: Collection[KeyT] = ()) -> None:
        """Offloads parts, least recently used first, until `size` more bytes fit within `limit`.

        keep: parts that stay. Does not raise if there is still too little room: the device will run out of memory.
        """
        for key, entry in self._entries.items():
            if key not in keep:  # LoRAs and graphs of unused parts would take memory that is not counted
                self._on_evict(entry.model)
        any_offloaded = False
        for key in [key for key, entry in self._entries.items() if entry.is_on_device and key not in keep]:
            if self.device_bytes + size <= limit:
                break
            self._offload(key)
            any_offloaded = True
        if any_offloaded:
            empty_cache(self.device)

    def acquire(
        self,
        key: KeyT,
        load: Callable[[torch.device], Any],
        get_module: Callable[[Any], nn.Module],
        *,
        get_streamed_blocks: Callable[[Any], Sequence[nn.Module]] | None = None,
    ) -> Any:
        """Returns the part `key` on the device, loading or moving it if necessary. Call `evict_until` first.

        load: reads the part onto a device. get_module: returns the module that holds its weights.
        get_streamed_blocks: if given, returns the blocks to stream.
        """
        entry = self._entries.get(key)
        if entry is not None and entry.is_on_device:
            wanted = len(get_streamed_blocks(entry.model)) if get_streamed_blocks is not None else 0
            if not entry.streamed and wanted:
                self._on_evict(entry.model)
                entry.is_on_device = False  # so that `_move_to_device` moves the streamed blocks to main memory
            # Reload if more blocks must be streamed, or none. Streaming fewer is not worth moving the whole part again.
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
            except BaseException:  # it may be moved only in part, so its size is unknown
                self.drop(key)
                raise
        self._entries.move_to_end(key)
        return entry.model

    def drop(self, key: KeyT) -> bool:
        """Drops the part `key` wherever it is, and returns whether it was loaded. Frees its memory even if the model is
        still referenced."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self._on_evict(entry.model)
        if entry.streaming is not None:
            entry.streaming.close()
        for (owner, name), tensor in _tensors(entry.module).items():
            _set_tensor(owner, name, tensor.to("meta"))
        return True

    def clear(self) -> None:
        """Drops all parts and frees their memory."""
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
            tensors = _tensors(entry.module)
            for (owner, name), tensor in tensors.items():
                _set_tensor(owner, name, tensor.to(self.device, non_blocking=True))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # before the sources of the copies may be freed
        entry.streamed = list(blocks)
        entry.is_on_device = True

    def _offload(self, key: KeyT) -> None:
        """Offloads the part `key` to main memory, or drops it if there is no room."""
        entry = self._entries[key]
        self._on_evict(entry.model)
        if not self._ensure_host_room(entry.size - entry.host_bytes, key):
            self.drop(key)
            return
        if entry.streaming is not None:
            entry.streaming.pause()
        elif entry.host_copies or self._copy_to_host(entry):
            for (owner, name), tensor in entry.host_copies.items():
                _set_tensor(owner, name, tensor)
        else:
            self.drop(key)
            return
        entry.is_on_device = False

    def _copy_to_host(self, entry: _LoadedPart) -> bool:
        """Copies `entry` to main memory. Returns False if the system has no memory left."""
        stream = copy_stream_for(self.device)
        for owner_and_name, tensor in _tensors(entry.module).items():
            buffer = allocate_host_memory(
                tensor.nbytes, stream
            )  # one allocation per tensor, so that each can be freed separately
            if buffer is None:
                entry.host_copies.clear()
                return False
            entry.host_copies[owner_and_name] = buffer.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        return True

    def _ensure_host_room(self, size: int, key: KeyT) -> bool:
        """Evicts parts from main memory and returns whether `size` more bytes fit into the budget."""
        streamed_keys = {other for other, it in self._entries.items() if it.streaming is not None and it.is_on_device}
        fixed_bytes = sum(self._entries[other].host_bytes for other in streamed_keys | {key})
        if fixed_bytes + size > self._host_budget:  # evicting others would not help
            return False
        self._evict_host_until(size, key)
        return self.host_bytes + size <= self._host_budget

    def _evict_host_until(self, size: int, key: KeyT) -> None:
        """Evicts parts and copies from main memory until `size` more bytes fit into the budget or nothing is left to
        evict. key: the part that needs the room; it stays."""
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
    """Runs the garbage collector, then `empty_cache`. Takes 0.2 s, so it is not called at every swap of parts."""
    gc.collect()
    empty_cache(device)


def empty_cache(device: torch.device) -> None:
    """Releases unused memory of torch's allocator to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _tensors(module: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Returns all parameters and buffers, including non-persistent ones, by owning module and name."""
    return {
        (owner, name): tensor
        for owner in module.modules()
        for tensor_dict in (owner._parameters, owner._buffers)
        for name, tensor in tensor_dict.items()
        if tensor is not None
    }


def _set_tensor(owner: nn.Module, name: str, tensor: Tensor) -> None:
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor
