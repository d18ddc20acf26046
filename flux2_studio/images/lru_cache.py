"""A cache that is bounded by bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class LRUCache(Generic[KeyT, ValueT]):
    """Maps keys to values of at most `max_bytes` in all. The least recently used leave first. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._entries: OrderedDict[KeyT, tuple[ValueT, int]] = OrderedDict()

    def get(self, key: KeyT) -> ValueT | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: KeyT, value: ValueT, size_bytes: int) -> None:
        """Add `value`, which takes `size_bytes`. A value larger than the whole cache is not kept."""
        if key in self._entries:
            self._size_bytes -= self._entries.pop(key)[1]
        if size_bytes > self._max_bytes:
            return
        self._entries[key] = (value, size_bytes)
        self._size_bytes += size_bytes
        while self._size_bytes > self._max_bytes:
            _, (_, evicted) = self._entries.popitem(last=False)
            self._size_bytes -= evicted
