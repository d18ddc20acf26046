"""Files that are cut off, damaged or made to do harm: a sentence that helps, or exactly the model that was written.

Two kinds of damage no reader can tell, and so they are left out here: numbers that are other numbers (the files carry
no checksums; downloads are checked against the hub's), and a header that lies with nothing to show it: two tensors of
one shape that have changed names, or a type that has become another of the same size (F16 for BF16; `TWINS`).
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from flux2_studio.engine.lora.file import open_lora
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.weights.gguf import GGUFFile
from flux2_studio.engine.weights.loading import WeightStorage, open_autoencoder, open_transformer
from flux2_studio.errors import StudioError
from tests import quantised
from tests.engine.damaged import AUTOENCODER, lora_state, randomised, transformer_state

CPU = torch.device("cpu")
TWINS = ({"F16", "BF16"}, {"Q4_0", "Q4_K"}, {"Q5_0", "Q5_K"})
LENGTH = 8  # bytes of a safetensors file that say how long its header is
Loaded = dict[str, Any]
file_checks = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


# --- what is damaged ---


def loaded(path: Path, storage: WeightStorage) -> Loaded:
    return dict(open_transformer(path).load(device=CPU, dtype=torch.float32, storage=storage).state_dict())


def loaded_autoencoder(path: Path) -> Loaded:
    return dict(open_autoencoder(path).load(device=CPU, dtype=torch.float32).state_dict())


def loaded_lora(path: Path) -> Loaded:
    lora = open_lora(path)
    found: Loaded = {"left out": sorted(lora.ignored_keys)}
    for change, tensors in lora.read(lora.changes).items():
        found |= {f"{change.target} {field}": tensor for field, tensor in tensors.items()}
        found[f"{change.target} scale"] = torch.tensor(change.scale)
    return found


@dataclass(frozen=True)
class Kind:
    """A way to write weights: the whole file's bytes, how it is loaded, and what that gives."""

    name: str
    data: bytes
    load: Callable[[Path], Loaded]
    whole: Loaded

    @property
    def is_gguf(self) -> bool:
        return self.data.startswith(b"GGUF")

    @property
    def header(self) -> int:
        """Bytes that are no tensor's."""
        if not self.is_gguf:
            return LENGTH + int.from_bytes(self.data[:LENGTH], "little")
        last = max(self.data.rfind(name.encode()) + len(name) for name in transformer_state())
        return last + 4 + 2 * 8 + 4 + 8


KINDS = ("bfloat16", "BFL's fp8", "comfy_quant", "NVFP4", "GGUF Q8_0", "GGUF Q4_0", "autoencoder", "LoRA")
SAFETENSORS = tuple(kind for kind in KINDS if "GGUF" not in kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def kinds(folder: Path) -> dict[str, Kind]:
    def made(name: str) -> Kind:
        load: Callable[[Path], Loaded] = lambda path: loaded(path, "stored")  # noqa: E731
        path = folder / "whole"
        layouts = {
            "BFL's fp8": quantised.bfl_fp8,
            "comfy_quant": quantised.comfy_quant_fp8,
            "NVFP4": quantised.bfl_nvfp4,
        }
        if name.startswith("GGUF"):
            quantised.write_gguf(transformer_state(), path, name.removeprefix("GGUF "))
        elif name in layouts:
            layouts[name](transformer_state()).save(path)
        elif name == "bfloat16":
            path.write_bytes(save(transformer_state(), {"format": "pt"}))
        elif name == "autoencoder":
            with torch.device("meta"):
                state = randomised(Autoencoder(AUTOENCODER))
            path.write_bytes(save(state))
            load = loaded_autoencoder
        else:
            path.write_bytes(save(lora_state(), {"format": "pt", "ss_network_dim": "4"}))
            load = loaded_lora
        return Kind(name, path.read_bytes(), load, copy.deepcopy(load(path)))

    return {name: made(name) for name in KINDS}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        as_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*as_bytes)
    return bool(one == other)


def refused(kind: Kind, data: bytes, folder: Path) -> bool:
    """Whether the file is refused, in words. One that is not must be what it was, or say what it leaves out."""
    path = folder / "damaged.safetensors"
    path.write_bytes(data)
    try:
        found = kind.load(path)
    except StudioError as error:
        assert_helpful(str(error))
        assert path.name in str(error)
        return True
    if kind.is_gguf and (twins := retyped(kind, path)):
        assert all(any(pair <= both for both in TWINS) for pair in twins)
        return False
    if found.get("left out", []) == kind.whole.get("left out", []):
        assert found.keys() == kind.whole.keys()
        assert [key for key in found if not same(found[key], kind.whole[key])] == []
    return False


def retyped(kind: Kind, path: Path) -> list[set[str]]:
    """The types before and after of tensors whose type is another one."""
    found = GGUFFile(path).dtypes
    path.write_bytes(kind.data)
    return [{found[key], dtype} for key, dtype in GGUFFile(path).dtypes.items() if found.get(key, dtype) != dtype]


def assert_helpful(message: str) -> None:
    assert message.endswith(".") and message.isprintable() and len(message) < 800, message
    assert any(words in message for words in ("hoose", "again", "oint to")), f"no next move: {message}"


# --- accidents ---


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_file_is_read(kinds: dict[str, Kind], folder: Path, name: str) -> None:
    """Otherwise all that follows would mean nothing."""
    assert not refused(kinds[name], kinds[name].data, folder)
    assert len(kinds[name].whole) >= 6


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@file_checks
def test_cut_off_anywhere(kinds: dict[str, Kind], folder: Path, name: str, data: st.DataObject) -> None:
    kind = kinds[name]
    end = data.draw(st.one_of(st.integers(0, kind.header + 64), st.integers(0, len(kind.data) - 1)))
    assert refused(kind, kind.data[:end], folder)


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@file_checks
def test_a_wrong_byte_in_the_header(kinds: dict[str, Kind], folder: Path, name: str, data: st.DataObject) -> None:
    kind = kinds[name]
    at = data.draw(st.integers(0, kind.header - 1))
    flipped = st.integers(0, 7).map(lambda bit: kind.data[at] ^ 1 << bit)
    byte = data.draw(st.one_of(flipped, st.integers(0, 255)))
    refused(kind, kind.data[:at] + bytes([byte]) + kind.data[at + 1 :], folder)


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@file_checks
def test_bytes_lost_or_added(kinds: dict[str, Kind], folder: Path, name: str, data: st.DataObject) -> None:
    """In the middle: everything behind is in the wrong place."""
    kind = kinds[name]
    at = data.draw(st.integers(0, len(kind.data) - 1))
    count = data.draw(st.integers(1, 100))
    assume(at + count < len(kind.data))
    assert refused(kind, kind.data[:at] + kind.data[at + count :], folder)
    assert refused(kind, kind.data[:at] + bytes(count) + kind.data[at:], folder)


@given(data=st.data())
@file_checks
def test_a_wrong_number_in_a_gguf_header(kinds: dict[str, Kind], folder: Path, data: st.DataObject) -> None:
    kind = kinds["GGUF Q8_0"]
    at = data.draw(st.integers(4, kind.header - 8))
    layout = data.draw(st.sampled_from(["<I", "<Q"]))
    extremes = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
    number = data.draw(st.one_of(st.integers(0, 300), extremes))
    number = struct.pack(layout, number % 2 ** (8 * struct.calcsize(layout)))
    refused(kind, kind.data[:at] + number + kind.data[at + len(number) :], folder)


# --- headers that lie ---

DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "F8_E4M3", "F8_E5M2",
    "F8_E8M0", "F8_E4M3FNUZ", "F6_E2M3", "F6_E3M2", "F4", "C64", "f32", "", "NVFP4", None, 3, ["F32"],
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(0, 300),
    st.sampled_from(
        [-1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64 - 1, 2**64, 10**40, 1.0, 1e300, "1", None, True, [1]]
    ),
)
SHAPES = st.one_of(
    st.lists(NUMBERS, max_size=6), st.sampled_from([[1] * 30, [0], [0, 2**63], [2**32, 2**32], [2**62, 4, 0], 3, None])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
NAMES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            *("", "\0", "\ud800", "\x1b[31m", "x" * 100_000, "diffusion_model.", "__metadata__", "scaled_fp8"),
            *("img_in.weight", "x_embedder.weight", "double_blocks.0.x", f"double_blocks.{'9' * 5000}.x", "norm_out"),
            *("txt_in.comfy_quant", "txt_in.weight_scale", "decoder.up_blocks." + "9" * 5000 + ".resnets.0.x"),
            *("single_blocks.0.linear1.lora_A.weight", "alpha", ".alpha", "decoder.up.٣.block.0.x"),
        ]
    ),
)


def header_of(kind: Kind) -> dict[str, Any]:
    return dict(json.loads(kind.data[LENGTH : kind.header]))


def with_header(kind: Kind, header: str | bytes) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + kind.data[kind.header :]


@pytest.mark.parametrize("name", SAFETENSORS)
@given(data=st.data())
@file_checks
def test_a_header_that_says_something_else(
    kinds: dict[str, Kind], folder: Path, name: str, data: st.DataObject
) -> None:
    kind = kinds[name]
    header = header_of(kind)
    key = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    said = header[key]
    match data.draw(st.sampled_from(["dtype", "shape", "turned", "offsets", "name", "new", "lost", "metadata", "any"])):
        case "dtype":
            before, said["dtype"] = said["dtype"], data.draw(st.sampled_from(DTYPES))
            assume({before, str(said["dtype"])} not in TWINS)
        case "shape":
            said["shape"] = data.draw(SHAPES)
        case "turned":
            said["shape"] = data.draw(st.permutations(said["shape"]))
        case "offsets":
            moved = st.tuples(*(st.integers(-200, 200).map(lambda by, at=at: at + by) for at in said["data_offsets"]))
            said["data_offsets"] = data.draw(st.one_of(moved, st.lists(NUMBERS, max_size=3)))
        case "name":
            header[data.draw(NAMES)] = header.pop(key)
        case "new":  # the bytes of a tensor twice, or none at all
            end = said["data_offsets"][1]
            empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
            header[data.draw(NAMES)] = data.draw(st.sampled_from([said, empty]))
        case "lost":
            lost, field = data.draw(st.sampled_from([(header, key), *((said, field) for field in said)]))
            del lost[field]
        case "metadata":
            header["__metadata__"] = data.draw(st.one_of(JSON, st.dictionaries(st.text(max_size=8), st.text())))
        case _:
            header[key] = data.draw(JSON)
    refused(kind, with_header(kind, json.dumps(header)), folder)


def twice(kind: Kind, key: str) -> str:
    """A header that says two things about `key`. Where one reader takes the first and another the last, they differ."""
    header = header_of(kind)
    said = header.pop(key)
    other = {**said, "shape": [*said["shape"], 1]}
    return (
        json.dumps({"#": said, **header, "##": other}).replace('"##"', json.dumps(key)).replace('"#"', json.dumps(key))
    )


def test_the_same_name_twice(kinds: dict[str, Kind], folder: Path) -> None:
    for name in SAFETENSORS:
        for key in sorted(header_of(kinds[name]).keys() - {"__metadata__"}):
            assert refused(kinds[name], with_header(kinds[name], twice(kinds[name], key)), folder)


@pytest.mark.parametrize("depth", [1000, 1_000_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_a_header_without_end(kinds: dict[str, Kind], folder: Path, depth: int, opening: str) -> None:
    kind = kinds["bfloat16"]
    inner = opening * depth
    for header in (inner, f'{{"__metadata__": {inner}', f'{{"img_in.weight": {inner}'):
        assert refused(kind, with_header(kind, header), folder)


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 10**8, 2**31, 2**62, 2**63, 2**64 - 1, -1, -8])
def test_a_header_of_another_length(kinds: dict[str, Kind], folder: Path, length: int) -> None:
    for name in SAFETENSORS:
        kind = kinds[name]
        said = length if length >= 0 else kind.header - LENGTH + length
        assert refused(kind, struct.pack("<Q", said) + kind.data[LENGTH:], folder)


def test_rubbish_behind_the_header(kinds: dict[str, Kind], folder: Path) -> None:
    kind = kinds["bfloat16"]
    text = kind.data[LENGTH : kind.header].decode()
    assert not refused(kind, with_header(kind, text + " " * 100), folder), "spaces fill it up"
    for end in ("x", "{}", "\0", ","):
        assert refused(kind, with_header(kind, text + end), folder)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "integers": lambda tensor: tensor.float().to(torch.int8),
    "booleans": lambda tensor: tensor > 0,
    "doubles": lambda tensor: tensor.double(),
    "complex": lambda tensor: tensor.float().to(torch.complex64),
    "e5m2": lambda tensor: tensor.to(torch.float8_e5m2),
    "one row less": lambda tensor: tensor[1:],
    "turned": lambda tensor: tensor.T if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1] else tensor[:-1],
    "flat": lambda tensor: tensor.flatten() if tensor.ndim > 1 else tensor[None],
    "one more dimension": lambda tensor: tensor[..., None],
    "one number": lambda tensor: tensor.flatten()[0],
    "nothing": lambda tensor: tensor.flatten()[:0],
}


@pytest.mark.parametrize("wrong", WRONG)
@given(data=st.data())
@file_checks
def test_a_tensor_of_another_type_or_shape(
    kinds: dict[str, Kind], folder: Path, wrong: str, data: st.DataObject
) -> None:
    state = dict(transformer_state())
    key = data.draw(st.sampled_from(sorted(state)))
    state[key] = WRONG[wrong](state[key]).contiguous()
    assert refused(kinds["bfloat16"], save(state), folder)


def test_two_names_for_one_layer(kinds: dict[str, Kind], folder: Path) -> None:
    """Neither is believed: it would be chance which one is taken."""
    state = transformer_state()
    for theirs, ours in (
        ("x_embedder.weight", "img_in.weight"),
        ("transformer_blocks.0.ff.linear_in.weight", "double_blocks.0.img_mlp.0.weight"),
        ("single_transformer_blocks.1.attn.to_out.weight", "single_blocks.1.linear2.weight"),
    ):
        for doubled in ({theirs: state[ours] + 1, **state}, {**state, theirs: state[ours] + 1}):
            assert refused(kinds["bfloat16"], save(doubled), folder)


# --- folders ---


@pytest.fixture(scope="module")
def sharded(folder: Path) -> Path:
    """The transformer in two files, with the index still to be written."""
    shards = folder / "sharded"
    shards.mkdir()
    state = sorted(transformer_state().items())
    for number, part in enumerate((state[::2], state[1::2])):
        (shards / f"part-{number}.safetensors").write_bytes(save(dict(part)))
    return shards


def read_folder(shards: Path, index: str | bytes) -> Loaded | None:
    raw = index if isinstance(index, bytes) else index.encode("utf-8", "surrogatepass")
    (shards / "model.safetensors.index.json").write_bytes(raw)
    try:
        return loaded(shards, "plain")
    except StudioError as error:
        assert_helpful(str(error))
        return None


PLACES = (
    "../part-0.safetensors",
    "/etc/passwd",
    "..",
    "",
    ".",
    "part-0.safetensors\0",
    "a" * 5000,
    "\ud800",
    "sharded",
)


@given(
    index=st.one_of(
        JSON,
        st.fixed_dictionaries({"weight_map": JSON}),
        st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=5), st.sampled_from(PLACES))}),
    )
)
@file_checks
def test_a_hostile_index(sharded: Path, index: Any) -> None:
    assert read_folder(sharded, json.dumps(index)) is None


def test_other_indexes(kinds: dict[str, Kind], sharded: Path, tmp_path: Path) -> None:
    names = ["part-0.safetensors", "part-1.safetensors"]
    whole = read_folder(sharded, json.dumps({"weight_map": dict(enumerate(names))}))
    assert whole is not None and all(same(whole[key], value) for key, value in kinds["bfloat16"].whole.items())
    assert read_folder(sharded, json.dumps({"weight_map": {"a": names[0]}})) is None, "half of the model"
    for text in ("[" * 100_000, '{"weight_map":' * 100_000, b"\xff\xfe", '{"weight_map": {"a": 1e999}}'):
        assert read_folder(sharded, text) is None
    (sharded / "part-2.safetensors").write_bytes((sharded / names[0]).read_bytes())
    doubled = {"weight_map": dict(enumerate([*names, "part-2.safetensors"]))}
    assert read_folder(sharded, json.dumps(doubled)) is None, "the same tensors in two files"
