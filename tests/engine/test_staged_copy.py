"""Reading by several threads through a ring of buffers: bit for bit what the safetensors library reads, in bounded
memory, and nothing left behind, whatever becomes of the files or of whoever waits."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2_studio.engine.weights.gguf import GGUFFile
from flux2_studio.engine.weights.loading import LOAD_PROGRESS_SECONDS, WeightStorage, _LoadProgress, open_transformer
from flux2_studio.engine.weights.staged_copy import StagedReader
from flux2_studio.engine.weights.tensor_files import SAFETENSORS_DTYPES, SafetensorsFiles
from flux2_studio.errors import WeightsError
from tests import quantised
from tests.tiny import Toys

CPU = torch.device("cpu")


def read(files: SafetensorsFiles | GGUFFile, reader: StagedReader) -> dict[str, Tensor]:
    return dict(reader.read(files.spans(files.shapes)))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert found[key].flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8)), key


def mixed() -> dict[str, Tensor]:
    """Every type, scalars and empty tensors, at odd offsets."""
    generator = torch.Generator().manual_seed(2)
    state = {f"odd.{number}": torch.arange(2 * number + 1, dtype=torch.uint8) for number in range(9)}
    for name, dtype in SAFETENSORS_DTYPES.items():
        shapes = ((), (1,), (7, 3), (41, 1, 5))
        for number, shape in enumerate(shapes):
            state[f"{name}.{number}"] = (20 * torch.randn(shape, generator=generator)).to(dtype)
    return state | {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn), "large": torch.randn(300, 50)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "mixed.safetensors"
    save_file(mixed(), path)
    return path


def weight_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("weights")]


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 2**24])
@pytest.mark.parametrize("buffers", [1, 2, 5])
def test_it_reads_what_the_library_reads(file: Path, buffers: int, size: int) -> None:
    """Whether a buffer holds many tensors or a tensor takes many buffers."""
    if size == 1:  # a thread's turn for each byte: the first tensors are enough
        files = SafetensorsFiles(file)
        keys = [key for key in files.shapes if not key.startswith("large")]
        assert_same(
            dict(StagedReader(CPU, buffer_count=buffers, buffer_bytes=1).read(files.spans(keys))),
            {key: tensor for key, tensor in load_file(file).items() if key in keys},
        )
    else:
        assert_same(
            read(SafetensorsFiles(file), StagedReader(CPU, buffer_count=buffers, buffer_bytes=size)), load_file(file)
        )


def test_a_header_that_leaves_the_data_unaligned(tmp_path: Path, file: Path) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path = tmp_path / "unaligned.safetensors"
    path.write_bytes((length + 3).to_bytes(8, "little") + raw[8 : 8 + length] + b"   " + raw[8 + length :])
    assert_same(read(SafetensorsFiles(path), StagedReader(CPU, buffer_bytes=99)), load_file(file))


def test_some_tensors_alone_and_in_the_order_of_the_file(file: Path) -> None:
    files = SafetensorsFiles(file)
    chosen = {"large", "F16.3", "BF16.0", "odd.8"}
    spans = files.spans(sorted(chosen))
    found = list(StagedReader(CPU, buffer_bytes=500).read(spans))
    assert [key for key, _ in found] == sorted(chosen, key=lambda key: spans[key].start)
    assert_same(dict(found), {key: tensor for key, tensor in load_file(file).items() if key in chosen})
    assert list(StagedReader(CPU).read({})) == []


def test_shards_and_gguf(toys: Toys, tmp_path: Path) -> None:
    files = SafetensorsFiles(toys.klein.sharded)
    expected: dict[str, Tensor] = {}
    for shard in toys.klein.sharded.glob("*.safetensors"):
        expected |= load_file(shard)
    assert_same(read(files, StagedReader(CPU, buffer_bytes=10_000)), expected)
    quantised.write_gguf(quantised.toy_state(), tmp_path / "small.gguf", "Q5_K")
    blocks = GGUFFile(tmp_path / "small.gguf")
    assert_same(read(blocks, StagedReader(CPU, buffer_bytes=10_000)), dict(blocks.read_mapped(blocks.shapes)))


@pytest.mark.parametrize("storage", ["plain", "stored", "int8"])
def test_a_model_is_the_same_by_either_way(tmp_path: Path, storage: WeightStorage) -> None:
    opened = open_transformer(quantised.bfl_nvfp4(quantised.toy_state()).save(tmp_path / "small.safetensors"))

    def state(reader: StagedReader | None) -> dict[str, Any]:
        how = {"use_mmap": True} if reader is None else {"reader": reader}
        return opened.load(device=CPU, dtype=torch.bfloat16, storage=storage, **how).state_dict()

    assert_same(state(StagedReader(CPU, buffer_count=3, buffer_bytes=5000)), state(None))
    assert weight_threads() == []


# --- what is left behind ---


def test_no_thread_stays(file: Path) -> None:
    files = SafetensorsFiles(file)
    reader = StagedReader(CPU, buffer_count=3, buffer_bytes=100)
    read(files, reader)
    assert weight_threads() == []
    half_way = reader.read(files.spans(files.shapes))
    next(half_way)
    assert weight_threads()
    half_way.close()
    assert weight_threads() == []


def test_no_thread_stays_of_a_reading_that_is_forgotten(file: Path) -> None:
    files = SafetensorsFiles(file)
    forgotten = StagedReader(CPU, buffer_count=3, buffer_bytes=100).read(files.spans(files.shapes))
    next(forgotten)
    del forgotten
    gc.collect()
    assert weight_threads() == []


def test_no_thread_stays_of_a_load_that_fails(tmp_path: Path) -> None:
    written = quantised.bfl_fp8(quantised.toy_state())
    written.tensors["single_blocks.0.linear1.weight_scale"] = torch.tensor(float("nan"))
    opened = open_transformer(written.save(tmp_path / "damaged.safetensors"))
    with pytest.raises(WeightsError, match="negative or no number") as kept:
        opened.load(device=CPU, dtype=torch.bfloat16, reader=StagedReader(CPU, buffer_count=4, buffer_bytes=1000))
    assert weight_threads() == [], f"while {kept.type} is being handled"


# --- how far it is, and giving up ---


def test_every_byte_is_told_once(file: Path) -> None:
    files = SafetensorsFiles(file)
    spans = files.spans(files.shapes)
    sizes: list[int] = []
    for _ in StagedReader(CPU, buffer_count=3, buffer_bytes=100).read(spans, sizes.append):
        pass
    assert sum(sizes) == sum(span.size for span in spans.values()) and max(sizes) <= 100


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_a_load_tells_how_far_it_is(tmp_path: Path, storage: WeightStorage, mapped: bool) -> None:
    opened = open_transformer(quantised.bfl_nvfp4(quantised.toy_state()).save(tmp_path / "small.safetensors"))
    shares: list[float] = []

    def slow(share: float) -> None:
        shares.append(share)
        time.sleep(LOAD_PROGRESS_SECONDS)  # so that there is something to say again

    way: dict[str, Any] = (
        {"use_mmap": True} if mapped else {"reader": StagedReader(CPU, buffer_count=2, buffer_bytes=400_000)}
    )
    opened.load(device=CPU, dtype=torch.bfloat16, storage=storage, on_progress=slow, **way)
    assert len(shares) > 3 and shares == sorted(set(shares)) and shares[0] > 0 and shares[-1] == 1.0


def test_it_does_not_tell_of_every_piece() -> None:
    shares: list[float] = []
    arrived, pieces = _LoadProgress(shares.append, 10**12), 0
    while len(shares) < 3:
        arrived(1)
        pieces += 1
    assert pieces > 100 and shares[0] == 1e-12


@pytest.mark.parametrize("mapped", [False, True])
def test_giving_up_in_the_middle_leaves_nothing(tmp_path: Path, mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_transformer(quantised.bfl_fp8(quantised.toy_state()).save(tmp_path / "small.safetensors"))
    made: list[weakref.ref[Tensor]] = []
    empty = torch.empty

    def watched(*size: Any, **how: Any) -> Tensor:
        tensor = empty(*size, **how)
        if not tensor.is_meta:
            made.append(weakref.ref(tensor))
        return tensor

    def give_up(share: float) -> None:
        assert 0 < share < 1 and (mapped or (weight_threads() and made))
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "empty", watched)
    way: dict[str, Any] = (
        {"use_mmap": True} if mapped else {"reader": StagedReader(CPU, buffer_count=3, buffer_bytes=1000)}
    )
    with pytest.raises(KeyboardInterrupt) as kept:
        opened.load(device=CPU, dtype=torch.bfloat16, on_progress=give_up, **way)
    assert weight_threads() == [], f"while {kept.type} is being handled"
    del kept
    gc.collect()
    assert not any(tensor() is not None for tensor in made)
    assert opened.load(device=CPU, dtype=torch.bfloat16, **way).params == opened.params


def test_memory_is_that_of_the_ring(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the tensors themselves nothing is made but the buffers, and no part goes beyond them."""
    made: list[int] = []
    empty = torch.empty

    def counted(*size: Any, **how: Any) -> Tensor:
        tensor = empty(*size, **how)
        if not tensor.is_meta:
            made.append(tensor.numel() * tensor.element_size())
        return tensor

    files = SafetensorsFiles(file)
    spans = files.spans(files.shapes)
    monkeypatch.setattr(torch, "empty", counted)
    for _ in StagedReader(CPU, buffer_count=3, buffer_bytes=128).read(spans):
        pass
    assert sum(made) == 3 * 128 + sum(span.size for span in spans.values())
    made.clear()
    for _ in StagedReader(CPU).read(files.spans(["odd.1"])):
        pass
    assert made == [3, 3], "a small file takes small buffers"


@pytest.mark.parametrize("wrong", [{"buffer_count": 0}, {"buffer_bytes": 0}])
def test_a_reader_needs_a_buffer(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        StagedReader(CPU, **wrong)


# --- files that change ---


def ways(files: SafetensorsFiles | GGUFFile) -> Iterator[Iterator[tuple[str, Tensor]]]:
    yield StagedReader(CPU, buffer_count=2, buffer_bytes=64).read(files.spans(files.shapes))
    yield files.read(files.shapes)
    yield files.read_mapped(files.shapes)


@pytest.mark.parametrize("change", ["shorter", "longer", "another", "gone"])
@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_a_file_that_is_another_one_by_now(tmp_path: Path, file: Path, form: str, change: str) -> None:
    path = tmp_path / f"model.{form}"
    if form == "gguf":
        quantised.write_gguf({"a.weight": torch.ones(4, 32)}, path, "Q8_0", quantised=lambda *_: True)
    else:
        path.write_bytes(file.read_bytes())
    files = GGUFFile(path) if form == "gguf" else SafetensorsFiles(path)
    if change == "shorter":
        os.truncate(path, path.stat().st_size - 1)
    elif change == "longer":
        os.truncate(path, path.stat().st_size + 1)
    else:
        data = path.read_bytes()
        path.rename(tmp_path / "old")
        if change == "another":
            path.write_bytes(data)
    for way in ways(files):
        with pytest.raises(WeightsError, match=rf"model\.{form} (has changed since|could not be read).*again\."):
            list(way)
    assert weight_threads() == []


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "shrinking.safetensors"
    path.write_bytes(file.read_bytes())
    files = SafetensorsFiles(path)
    reading = StagedReader(CPU, buffer_count=2, buffer_bytes=64).read(files.spans(files.shapes))
    next(reading)
    os.truncate(path, 3000)
    with pytest.raises(WeightsError, match=r"shrinking\.safetensors has changed"):
        list(reading)
    assert weight_threads() == []


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_what_was_read_stays_when_its_file_is_written_over(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"small.{form}"
    if form == "gguf":
        quantised.write_gguf(quantised.toy_state(), path, "Q8_0")
    else:
        save_file(quantised.toy_state(), path)
    opened = open_transformer(path)
    before = open_transformer(path).load(device=CPU, dtype=torch.bfloat16, storage="stored").state_dict()
    expected = {key: tensor.clone() for key, tensor in before.items()}
    views = opened.load(device=CPU, dtype=torch.bfloat16, storage="stored", use_mmap=True).state_dict()
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(before, expected)
    assert any(not views[key].equal(tensor) for key, tensor in expected.items()), "what is mapped does change"
