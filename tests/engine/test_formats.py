"""Quantised files: every layout that is published reads as the values it stands for, small in memory or not; every
other is refused in words."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.weights.formats import open_checkpoint_contents
from flux2_studio.engine.weights.gguf import GGUFFile
from flux2_studio.engine.weights.loading import WeightStorage, load_transformer, open_transformer
from flux2_studio.engine.weights.quantize import NVFP4Matrix, QuantizedLinear
from flux2_studio.errors import DeviceError, WeightsError
from tests import quantised
from tests.quantised import State, Written

CPU = torch.device("cpu")
LAYOUTS: dict[str, Callable[[State], Written]] = {
    "Black Forest Labs' fp8": quantised.bfl_fp8,
    "ComfyUI's scaled fp8": quantised.comfy_scaled_fp8,
    "ComfyUI's comfy_quant": quantised.comfy_quant_fp8,
    "fp8 with a scale per row": quantised.per_row_fp8,
    "fp8 without scales": quantised.plain_fp8,
    "NVFP4": quantised.bfl_nvfp4,
}
GGUF = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q5_1")
PREFIXES = ("model.diffusion_model.", "diffusion_model.")


@cache
def state() -> State:
    return quantised.toy_state()


def load(path: Path, storage: WeightStorage = "plain", dtype: torch.dtype = torch.float32) -> Transformer:
    return open_transformer(path).load(device=CPU, dtype=dtype, storage=storage)


def velocity(model: Transformer) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    x, ctx = torch.randn(1, 24, 128, generator=generator), torch.randn(1, 7, 256, generator=generator)
    ids = torch.randint(0, 6, (31, 4), generator=generator)
    with torch.no_grad():
        return model(x.to(model.dtype), ctx.to(model.dtype), torch.tensor([0.6]), model.rope(ids)).float()


@cache
def original() -> Tensor:
    """The velocity of the weights before they were quantised."""
    with torch.device("meta"):
        model = Transformer(quantised.PARAMS)
    model.load_state_dict({name: tensor.float() for name, tensor in state().items()}, assign=True)
    return velocity(model)


def error(value: Tensor) -> float:
    return float((value - original()).norm() / original().norm())


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def small_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def block_matrices() -> set[str]:
    return {name.removesuffix(".weight") for name, tensor in state().items() if quantised.is_block_matrix(name, tensor)}


def assert_reads_as(path: Path, values: State) -> Transformer:
    """The file stands for `values`, restored at load or layer by layer. Returns the model that holds what is stored."""
    plain = load(path).state_dict()
    assert plain.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(plain[name], value.float()), name
    for dtype in (torch.float32, torch.bfloat16):
        stored = load(path, "stored", dtype)
        assert stored.dtype is dtype
        assert torch.equal(velocity(stored), velocity(load(path, "plain", dtype)))
    return stored


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_reads_as_its_values(tmp_path: Path, layout: str) -> None:
    written = LAYOUTS[layout](state())
    stored = assert_reads_as(written.save(tmp_path / "small.safetensors"), written.values)
    if layout == "ComfyUI's comfy_quant":  # which leaves some layers in bfloat16
        assert small_layers(stored) == {name for name in block_matrices() if ".linear2" not in name}
    elif layout == "fp8 without scales":  # which are cast, all of them
        matrices = {name.removesuffix(".weight") for name, tensor in state().items() if tensor.ndim == 2}
        assert small_layers(stored) == matrices - {"img_in"}
    else:
        assert small_layers(stored) == block_matrices()


@pytest.mark.parametrize("kind", GGUF)
def test_gguf_reads_as_its_values(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "small.gguf"
    values = quantised.write_gguf(state(), path, kind)
    assert small_layers(assert_reads_as(path, values)) == block_matrices()


@pytest.mark.parametrize("plain", ["BF16", "F16", "F32"])
def test_gguf_with_everything_quantised_and_nothing(tmp_path: Path, plain: str) -> None:
    path = tmp_path / "small.gguf"
    values = quantised.write_gguf(state(), path, "Q8_0", quantised=lambda name, _: "_in" in name, plain=plain)
    stored = assert_reads_as(path, values)
    assert small_layers(stored) == {"txt_in", "time_in.in_layer", "time_in.out_layer"}, "img_in tells the precision"


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["Black Forest Labs' fp8", "ComfyUI's scaled fp8", "NVFP4", "Q8_0"])
def test_prefixes(tmp_path: Path, prefix: str, layout: str) -> None:
    path = tmp_path / "prefixed"
    if layout == "Q8_0":
        values = quantised.write_gguf(state(), path, layout, prefix=prefix)
    else:
        written = LAYOUTS[layout](state())
        values = written.values
        if written.metadata:  # ComfyUI writes the layers' whole names there
            said = json.loads(written.metadata["_quantization_metadata"])
            said["layers"] = {prefix + name: form for name, form in said["layers"].items()}
            written.metadata["_quantization_metadata"] = json.dumps(said)
        written.save(path, prefix)
    plain = load(path).state_dict()
    assert all(torch.equal(plain[name], value.float()) for name, value in values.items())


def test_a_plain_file_may_have_a_prefix_too(tmp_path: Path) -> None:
    prefixed = {PREFIXES[0] + name: tensor for name, tensor in state().items()}
    assert torch.equal(velocity(load(quantised.save_plain(prefixed, tmp_path / "plain.safetensors"))), original())


# How far one evaluation may be from that of the bfloat16 weights, relatively (measured: two thirds of it), and the bits
# per value with its scales (here one float32 for a row of 256 or more).
COST = {
    "Black Forest Labs' fp8": (0.012, 8.0),
    "fp8 with a scale per row": (0.012, 8.108),
    "NVFP4": (0.045, 4.5),
    "Q8_0": (0.0025, 8.5),
    "Q6_K": (0.009, 6.5625),
    "Q5_K": (0.018, 5.5),
    "Q4_K": (0.036, 4.5),
    "fp8": (0.012, 8.108),
    "int8": (0.0033, 8.108),
}


def written_as(kind: str, folder: Path) -> Path:
    if kind in LAYOUTS:
        return LAYOUTS[kind](state()).save(folder / "small.safetensors")
    if kind in GGUF:
        quantised.write_gguf(state(), folder / "small.gguf", kind)
        return folder / "small.gguf"
    return quantised.save_plain(state(), folder / "plain.safetensors")


@pytest.mark.parametrize("kind", COST)
def test_error_and_memory(tmp_path: Path, kind: str) -> None:
    bound, bits = COST[kind]
    storage: WeightStorage = "fp8" if kind == "fp8" else "int8" if kind == "int8" else "stored"
    path = written_as(kind, tmp_path)
    assert bound / 3 < error(velocity(load(path, storage))) < bound
    matrices = sum(t.numel() for name, t in state().items() if quantised.is_block_matrix(name, t))
    others = sum(t.numel() for t in state().values()) - matrices
    model = load(path, storage, torch.bfloat16)
    assert held(model) == pytest.approx(matrices * bits / 8 + 2 * others, rel=1e-3)
    assert small_layers(model) == block_matrices()


@pytest.mark.parametrize("storage", ["plain", "stored"])
def test_a_plain_file_is_not_quantised_unasked(tmp_path: Path, storage: WeightStorage) -> None:
    model = load(quantised.save_plain(state(), tmp_path / "plain.safetensors"), storage)
    assert not small_layers(model)
    assert torch.equal(velocity(model), original())


def test_what_is_quantised_is_not_quantised_again(tmp_path: Path) -> None:
    model = load(quantised.bfl_nvfp4(state()).save(tmp_path / "small.safetensors"), "int8")
    parts = [part for module in model.modules() if isinstance(module, QuantizedLinear) for part in module.parts]
    assert len(parts) == len(block_matrices())
    assert all(isinstance(part, NVFP4Matrix) for part in parts)


@pytest.mark.parametrize(
    ("layout", "storage"), [("bf16", "fp8"), ("fp8", "stored"), ("fp8", "int8"), ("NVFP4", "stored")]
)
def test_no_fp8_on_a_device_that_does_not_know_it(tmp_path: Path, layout: str, storage: WeightStorage) -> None:
    path = tmp_path / "small.safetensors"
    if layout == "bf16":
        quantised.save_plain(state(), path)
    else:
        (quantised.bfl_fp8 if layout == "fp8" else quantised.bfl_nvfp4)(state()).save(path)
    with pytest.raises(DeviceError, match=r"small\.safetensors cannot be kept .* Choose"):
        open_transformer(path).load(device=torch.device("mps"), dtype=torch.float32, storage=storage)


# --- refusals ---


def refusal(path: Path, *, loading: bool = False) -> str:
    with pytest.raises(WeightsError) as caught:
        if loading:
            open_transformer(path).load(device=CPU, dtype=torch.float32, storage="stored")
        else:
            open_transformer(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message and len(message) < 600 and message.endswith(".")
    assert any(words in message for words in ("hoose", "again", "Point to")), "no next move"
    return message


LAYER = "single_blocks.0.linear1"
Break = Callable[[State], object]


def mark(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


FP8_DAMAGE: dict[str, tuple[Break, str]] = {
    "lost scale": (lambda t: t.pop(f"{LAYER}.weight_scale"), "without its scale"),
    "all scales lost": (lambda t: [t.pop(key) for key in list(t) if "weight_scale" in key], "without its scale"),
    "scales for columns": (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(256)}), "was expected"),
    "integer scale": (lambda t: t.update({f"{LAYER}.weight_scale": torch.tensor(1)}), "scale of I64"),
    "two scales": (lambda t: t.update({f"{LAYER}.scale_weight": torch.ones(1)}), "does not belong there"),
    "another format": (
        lambda t: t.update({f"{LAYER}.comfy_quant": mark(b'{"format": "mxfp8"}')}),
        "in the format mxfp8",
    ),
    "a mark that says nothing": (lambda t: t.update({f"{LAYER}.comfy_quant": mark(b"\xff{")}), "names no format"),
    "a mark without end": (lambda t: t.update({f"{LAYER}.comfy_quant": mark(b"[" * 4000)}), "names no format"),
    "a mark of another type": (lambda t: t.update({f"{LAYER}.comfy_quant": torch.ones(3)}), "names no format"),
    "a long mark": (lambda t: t.update({f"{LAYER}.comfy_quant": mark(b" " * 5000)}), "names no format"),
    "int8": (lambda t: t.update({f"{LAYER}.weight": torch.ones(1792, 256, dtype=torch.int8)}), "I8 tensors"),
    "int8 elsewhere": (lambda t: t.update({"txt_in.weight": torch.ones(256, 256, dtype=torch.int8)}), "I8 tensors"),
    "e5m2": (lambda t: t.update({"txt_in.weight": torch.ones(256, 256).to(torch.float8_e5m2)}), "F8_E5M2"),
    "a scale of nothing": (lambda t: t.update({"txt_in.weight_scale": torch.ones(1)}), "does not belong there"),
    "both names": (lambda t: t.update({f"{PREFIXES[0]}img_in.weight": torch.ones(256, 128)}), "has both"),
    "a scaled norm": (
        lambda t: t.update(
            {
                "single_blocks.0.norm.weight": torch.ones(8).to(torch.float8_e4m3fn),
                "single_blocks.0.norm.weight_scale": torch.ones(1),
            }
        ),
        "no matrix",
    ),
    "other rows": (
        lambda t: t.update({f"{LAYER}.weight": torch.ones(64, 256).to(torch.float8_e4m3fn)}),
        "[64, 256] where [1792, 256]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", FP8_DAMAGE)
def test_damaged_fp8(tmp_path: Path, damage: str) -> None:
    change, words = FP8_DAMAGE[damage]
    written = quantised.bfl_fp8(state())
    change(written.tensors)
    assert words in refusal(written.save(tmp_path / "damaged.safetensors"))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_scales_that_cannot_be(tmp_path: Path, scale: float) -> None:
    written = quantised.bfl_fp8(state())
    written.tensors[f"{LAYER}.weight_scale"] = torch.tensor(scale)
    assert f"{LAYER}.weight_scale" in refusal(written.save(tmp_path / "damaged.safetensors"), loading=True)
    written = quantised.bfl_nvfp4(state())
    written.tensors[f"{LAYER}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F  # not a number
    assert f"{LAYER}.weight_scale" in refusal(written.save(tmp_path / "damaged.safetensors"), loading=True)


NVFP4_DAMAGE: dict[str, tuple[Break, str]] = {
    "no scale for all": (lambda t: t.pop(f"{LAYER}.weight_scale_2"), f"without its scale, {LAYER}.weight_scale_2"),
    "no scale for blocks": (lambda t: t.pop(f"{LAYER}.weight_scale"), f"without its scale, {LAYER}.weight_scale"),
    "no scales": (
        lambda t: [t.pop(f"{LAYER}.weight_scale{end}") for end in ("", "_2")],
        f"without its scale, {LAYER}.weight_scale",
    ),
    "fewer scales": (
        lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(1792, 4).to(torch.float8_e4m3fn)}),
        "28672 in fp8 were expected",
    ),
    "float scales": (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(1792, 16)}), "block scales of F32"),
    "a scale per row": (lambda t: t.update({f"{LAYER}.weight_scale_2": torch.ones(1792)}), "not one float number"),
    "odd columns": (
        lambda t: t.update({f"{LAYER}.weight": torch.ones(1792, 124, dtype=torch.uint8)}),
        "in the shape [1792, 124]",
    ),
    "other columns": (
        lambda t: t.update({f"{LAYER}.weight": torch.ones(1792, 120, dtype=torch.uint8)}),
        "[1792, 240] where [1792, 256]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", NVFP4_DAMAGE)
def test_damaged_nvfp4(tmp_path: Path, damage: str) -> None:
    change, words = NVFP4_DAMAGE[damage]
    written = quantised.bfl_nvfp4(state())
    change(written.tensors)
    assert words in refusal(written.save(tmp_path / "damaged.safetensors"))


@pytest.mark.parametrize("text", ["", "[", "[]", '{"layers": 3}', '{"layers": {"img_in": [1]}}', "[" * 100_000])
def test_words_in_the_header_that_say_nothing(tmp_path: Path, text: str) -> None:
    written = quantised.bfl_fp8(state())
    written.metadata["_quantization_metadata"] = text
    open_transformer(written.save(tmp_path / "small.safetensors"))


# GGUF


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    quantised.write_gguf(state(), path, "Q4_K")
    return path.read_bytes()


def header_length(data: bytes) -> int:
    """Where the names and shapes of the tensors end: after the last tensor's name, three numbers and its offset."""
    last = max(data.rfind(name.encode()) + len(name) for name in state())
    return last + 4 + 2 * 8 + 4 + 8


def test_gguf_truncated_anywhere(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole + bytes(64))
    assert "more or less" in refusal(path)
    header, length = header_length(whole), len(whole)
    for end in (length - 1, *range(length - 2, header, -length // 40), *range(header, 3, -61)):
        os.truncate(path, end)
        with pytest.raises(WeightsError, match=r"cut\.gguf is not a whole GGUF file"):
            GGUFFile(path)


def test_gguf_with_a_wrong_byte_in_its_header(tmp_path: Path, whole: bytes) -> None:
    """Whatever it says then, it is read or refused in words; its names decide whether it is the model that is meant."""
    path = tmp_path / "wrong.gguf"
    path.write_bytes(whole)
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for at in range(4, header_length(whole), 23):
            for byte in (0x00, 0x7F, 0xFF):
                file.seek(at)
                file.write(bytes([byte]))
                try:
                    assert len(open_checkpoint_contents(path).entries) <= len(state())
                except WeightsError as refusal:
                    refused += 1
                    assert "wrong.gguf" in str(refusal)
            file.seek(at)
            file.write(whole[at : at + 1])
    assert refused > 50


def text(words: bytes) -> bytes:
    return struct.pack("<Q", len(words)) + words


def gguf_header(
    fields: bytes = b"", tensors: bytes = b"", *, counts: tuple[int, int] = (1, 0), version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + fields + tensors + bytes(4096)


def tensor_info(name: bytes = b"a", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def listing(kind: int, count: int) -> bytes:
    return text(b"list") + struct.pack("<IIQ", 9, kind, count)


HUGE = 2**63
HOSTILE = {
    "tensors without end": gguf_header(counts=(HUGE, 0)),
    "fields without end": gguf_header(counts=(0, HUGE)),
    "a list without end": gguf_header(listing(0, HUGE), counts=(1, 1)),
    "a list of texts without end": gguf_header(listing(8, HUGE), counts=(1, 1)),
    "a list of lists": gguf_header(listing(9, 1), counts=(1, 1)),
    "a field of no type": gguf_header(text(b"x") + struct.pack("<I", 77), counts=(0, 1)),
    "a name without end": gguf_header(struct.pack("<Q", HUGE)),
    "a long name": gguf_header(tensors=tensor_info(b"a" * 2000) * 2, counts=(2, 0)),
    "a list of the rest of the file": gguf_header(listing(0, 4096), counts=(1, 1)),
    "a name that is no text": gguf_header(tensors=tensor_info(b"\xff\xfe")),
    "a name twice": gguf_header(tensors=tensor_info() + tensor_info(offset=32), counts=(2, 0)),
    "dimensions without end": gguf_header(tensors=text(b"a") + struct.pack("<I", 2**31)),
    "a huge shape": gguf_header(tensors=tensor_info(shape=(HUGE, HUGE, HUGE, HUGE))),
    "an empty shape": gguf_header(tensors=tensor_info(shape=(0,))),
    "a far offset": gguf_header(tensors=tensor_info(offset=2**64 - 32)),
    "an odd offset": gguf_header(tensors=tensor_info(offset=4)),
    "overlaps": gguf_header(tensors=tensor_info(b"a", (64,)) + tensor_info(b"b", (64,)), counts=(2, 0)),
    "half a block": gguf_header(tensors=tensor_info(shape=(48,), kind=8)),
    "no alignment": gguf_header(text(b"general.alignment") + struct.pack("<II", 4, 0), tensor_info(), counts=(1, 1)),
    "odd alignment": gguf_header(text(b"general.alignment") + struct.pack("<II", 4, 1), tensor_info(), counts=(1, 1)),
    "an old version": gguf_header(version=1),
    "the other byte order": gguf_header(version=0x03000000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_gguf_headers_that_lie(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name])
    assert "is not a whole GGUF file" in refusal(path)


def test_gguf_types_that_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "two-bits.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("a.weight", np.zeros((2, 84), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q2_K)
    writer.add_tensor("b.weight", np.zeros((2, 54), np.uint8), raw_dtype=gguf.GGMLQuantizationType.TQ1_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(path)
    assert "Q2_K" in message and "type 34" in message and "Q4_K" in message


def test_gguf_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    quantised.write_gguf({name: tensor for name, tensor in state().items() if name != "img_in.weight"}, path, "Q8_0")
    assert "not a FLUX.2 transformer" in refusal(path)


def test_gguf_that_changed_after_it_was_opened(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "changed.gguf"
    path.write_bytes(whole)
    opened = open_transformer(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match=r"changed\.gguf has changed"):
        opened.load(device=CPU, dtype=torch.float32)


def test_loading_is_the_same_by_either_name(tmp_path: Path, whole: bytes) -> None:
    """A GGUF file is known by its first bytes, not by its name."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(whole)
    model = load_transformer(path, device=CPU, dtype=torch.float32)
    assert not small_layers(model)
