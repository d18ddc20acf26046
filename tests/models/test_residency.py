"""Parts between file, main memory and device: who leaves, what comes back, and how many bytes are where."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from flux2_studio.models.memory.residency import Residency

CPU = torch.device("cpu")
BLOCK = 64 * 64 * 4 + 256  # bytes: a matrix and a bias of 64, aligned as streaming packs them
SIZE = 4 * (64 * 64 * 4 + 64 * 4) + 64 * 4  # of a part: four blocks, and a buffer


class Part(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.register_buffer("shift", torch.randn(64, generator=generator))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x + self.shift


class Shelf:
    """Parts by number: loads them, and says how often it had to."""

    def __init__(self, host_budget: int = 0, leaving: Callable[[Part], None] = lambda _: None) -> None:
        self.residency: Residency[int] = Residency(CPU, host_budget, leaving)
        self.loaded: list[int] = []

    def bring(self, key: int, streamed: Sequence[int] = ()) -> Part:
        def load(device: torch.device) -> Part:
            self.loaded.append(key)
            return Part(key)

        def chosen(part: Part) -> list[nn.Module]:
            return [part.blocks[i] for i in streamed]

        part: Part = self.residency.acquire(key, load, lambda it: it, get_streamed_blocks=chosen if streamed else None)
        expected = Part(key)
        x = torch.linspace(-1, 1, 64)
        assert part(x).equal(expected(x)), "wherever it has been, it is what it was"
        return part

    def room(self, parts: float, limit: float, keep: Sequence[int] = ()) -> None:
        self.residency.evict_until(int(parts * SIZE), int(limit * SIZE), keep)

    @property
    def where(self) -> list[int]:
        return [key for key in range(10) if self.residency.device_bytes_of(key)]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.residency.device_bytes, self.residency.host_bytes


def test_the_least_recently_used_leaves_first() -> None:
    shelf = Shelf()
    for key in (1, 2, 3, 1):
        shelf.bring(key)
    assert shelf.sizes == (3 * SIZE, 0)
    shelf.room(1, 3)
    assert shelf.where == [1, 3]
    shelf.room(0, 2)
    assert shelf.where == [1, 3], "there was room"
    shelf.room(1, 2, keep=[3])
    assert shelf.where == [3] and shelf.sizes == (SIZE, 0)
    shelf.room(9, 1, keep=[3])
    assert shelf.where == [3], "what is to be kept is"
    shelf.bring(1)
    assert shelf.loaded == [1, 2, 3, 1], "without main memory it is read from its file again"


@pytest.mark.parametrize("host_budget", [0, SIZE])
def test_one_part_is_asked_to_leave(host_budget: int) -> None:
    shelf = Shelf(host_budget)
    part = shelf.bring(1)
    other = shelf.bring(2)
    assert shelf.residency.get_on_device(1) is part and shelf.residency.get_on_device(3) is None
    shelf.residency.offload(1)
    assert shelf.residency.get_on_device(1) is None and shelf.residency.get_on_device(2) is other
    assert shelf.sizes == (SIZE, host_budget)
    shelf.residency.offload(1)
    shelf.residency.offload(3)
    assert shelf.sizes == (SIZE, host_budget), "who is not there cannot leave"
    assert shelf.residency.drop(2) and not shelf.residency.drop(2)
    assert shelf.sizes == (0, host_budget)


def test_within_the_budget_parts_wait_in_main_memory() -> None:
    shelf = Shelf(host_budget=2 * SIZE + 1000)
    for key in (1, 2, 3):
        shelf.bring(key)
    shelf.room(2, 3)
    assert shelf.where == [3] and shelf.sizes == (SIZE, 2 * SIZE)
    shelf.room(3, 3)
    assert shelf.sizes == (0, 2 * SIZE), "the one that waited for longest made room"
    shelf.bring(2)
    shelf.bring(3)
    assert shelf.loaded == [1, 2, 3]
    shelf.bring(1)
    assert shelf.loaded == [1, 2, 3, 1]


def test_a_copy_in_main_memory_stays_until_its_room_is_needed() -> None:
    shelf = Shelf(host_budget=SIZE)
    shelf.bring(1)
    shelf.room(1, 1)
    shelf.bring(1)
    assert shelf.sizes == (SIZE, SIZE), "so that to leave again costs nothing"
    shelf.bring(2)
    shelf.room(2, 3, keep=[1])
    assert shelf.sizes == (SIZE, SIZE) and shelf.where == [1]
    shelf.bring(1)
    shelf.bring(2)
    assert shelf.loaded == [1, 2], "the copy of the one went, since the other had nothing else"


def test_what_cannot_wait_drives_out_nobody_who_does() -> None:
    shelf = Shelf(host_budget=SIZE // 2)
    small = shelf.residency
    small.acquire(0, lambda _: nn.Linear(8, 8), lambda it: it)
    small.evict_until(1, 0)
    waiting = small.host_bytes
    assert waiting == 8 * 9 * 4
    shelf.bring(1)
    shelf.room(1, 1)
    assert shelf.sizes == (0, waiting), "the large one was dropped"


def test_streamed_in_and_out() -> None:
    shelf = Shelf(host_budget=3 * SIZE)
    shelf.bring(1, streamed=(1, 3))
    rest = SIZE - 2 * BLOCK
    assert shelf.sizes == (rest + 2 * BLOCK, 2 * BLOCK)
    shelf.bring(1, streamed=(0, 1, 2, 3))
    assert shelf.sizes == (SIZE - 4 * BLOCK + 2 * BLOCK, 4 * BLOCK)
    shelf.bring(1, streamed=(1, 3))
    assert shelf.sizes[1] == 4 * BLOCK, "fewer would do, but are not worth moving all of it"
    shelf.room(1, 1)
    assert shelf.where == [] and shelf.sizes == (0, SIZE)
    shelf.bring(1, streamed=(0, 1, 2, 3))
    assert shelf.sizes[1] == 4 * BLOCK
    shelf.bring(1)
    assert shelf.sizes[0] == SIZE
    shelf.room(1, 1)
    shelf.bring(1, streamed=(2,))
    assert shelf.sizes == (SIZE, BLOCK)
    assert shelf.loaded == [1], "it was read once, and never left memory"
    shelf.residency.clear()
    assert shelf.sizes == (0, 0)


def test_a_streamed_part_that_cannot_wait_is_dropped() -> None:
    shelf = Shelf()
    shelf.bring(1, streamed=(0, 2))
    shelf.room(1, 1)
    assert shelf.sizes == (0, 0)
    shelf.bring(1)
    assert shelf.loaded == [1, 1]


def test_parts_that_were_streamed_make_room_in_main_memory_as_others_do() -> None:
    shelf = Shelf(host_budget=SIZE)
    shelf.bring(1, streamed=(0, 2))
    shelf.room(1, 1)
    shelf.bring(2)
    shelf.room(1, 1)
    assert shelf.sizes == (0, SIZE)
    shelf.bring(2)
    assert shelf.loaded == [1, 2]


def test_what_waits_in_main_memory_makes_room_for_what_is_streamed() -> None:
    shelf = Shelf(host_budget=int(1.2 * SIZE))
    shelf.bring(1)
    shelf.room(1, 1)
    assert shelf.sizes == (0, SIZE)
    shelf.bring(2, streamed=[0, 1, 2, 3])
    assert shelf.sizes[1] == 4 * BLOCK, "the plan counts on what waits there to leave"
    shelf.bring(1)
    assert shelf.loaded == [1, 2, 1]


def test_a_whole_part_begins_to_be_streamed_from_where_it_is() -> None:
    taken_off: list[Part] = []
    shelf = Shelf(host_budget=2 * SIZE, leaving=taken_off.append)
    part = shelf.bring(1)
    assert shelf.bring(1, streamed=[1, 3]) is part and taken_off == [part]
    assert shelf.loaded == [1] and shelf.sizes == (SIZE, 2 * BLOCK), "two slots for two blocks; no copy of the whole"
    assert shelf.bring(1, streamed=[0, 1, 2, 3]) is part
    assert shelf.sizes == (2 * BLOCK + 64 * 4, 4 * BLOCK)
    assert shelf.bring(1) is part and shelf.sizes[0] == SIZE


def test_what_others_put_onto_a_part_is_taken_off_when_it_is_not_used() -> None:
    taken_off: list[Part] = []
    shelf = Shelf(leaving=taken_off.append)
    one, two = shelf.bring(1), shelf.bring(2)
    shelf.room(1, 9, keep=[2])
    assert taken_off == [one] and shelf.where == [1, 2], "it stays, without it"
    shelf.room(1, 9, keep=[1])
    assert taken_off == [one, two]


@pytest.mark.parametrize("host_budget", [0, 2 * SIZE])
def test_what_is_not_a_parts_own_is_taken_off_before_it_leaves(host_budget: int) -> None:
    taken: list[Part] = []
    shelf = Shelf(host_budget, leaving=taken.append)
    first, second = shelf.bring(1), shelf.bring(2, streamed=(0,))
    shelf.room(2, 2)
    assert list(dict.fromkeys(taken)) == [first, second]
    shelf.bring(1)
    shelf.residency.clear()
    assert len(taken) >= 3


def test_clearing_frees_all_even_if_somebody_holds_the_parts() -> None:
    shelf = Shelf(host_budget=9 * SIZE)
    held = [shelf.bring(1), shelf.bring(2, streamed=(1, 2)), shelf.bring(3)]
    shelf.room(2, 2, keep=[1])
    tensors = [weakref.ref(part.blocks[i].weight) for part in held for i in range(4)]
    shelf.residency.clear()
    assert [ref() for ref in tensors] == [None] * 12
    assert shelf.sizes == (0, 0) and all(tensor.is_meta for part in held for tensor in part.parameters())


def test_a_part_that_cannot_be_read_leaves_nothing() -> None:
    alive: list[weakref.ref[Part]] = []

    def failing(device: torch.device) -> Part:
        half = Part(1)
        alive.append(weakref.ref(half))
        raise RuntimeError("the file ends here")

    shelf = Shelf(host_budget=9 * SIZE)
    shelf.bring(2)
    for blocks in (None, lambda part: list(part.blocks)):
        with pytest.raises(RuntimeError, match="ends here"):
            shelf.residency.acquire(1, failing, lambda it: it, get_streamed_blocks=blocks)
    assert shelf.sizes == (SIZE, 0) and shelf.where == [2]
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


class Stubborn(nn.Parameter):
    """A tensor for which there is no room on the device."""

    def to(self, *args: object, **kwargs: object) -> Tensor:
        if args and args[0] == "meta":
            return torch.empty(self.shape, device="meta")
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_part_that_cannot_come_in_leaves_nothing() -> None:
    shelf = Shelf(host_budget=9 * SIZE)
    part = shelf.bring(1)
    shelf.room(1, 1)
    assert shelf.sizes == (0, SIZE)
    part.blocks[2]._parameters["weight"] = Stubborn(part.blocks[2].weight, requires_grad=False)
    gone = weakref.ref(part.blocks[0].weight)
    with pytest.raises(torch.OutOfMemoryError):
        shelf.bring(1)
    assert shelf.sizes == (0, 0) and gone() is None
    shelf.bring(1)
    assert shelf.loaded == [1, 1]

    def no_such_blocks(part: Part) -> list[nn.Module]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        shelf.residency.acquire(2, lambda _: Part(2), lambda it: it, get_streamed_blocks=no_such_blocks)
    assert shelf.sizes[0] == SIZE and shelf.where == [1]
