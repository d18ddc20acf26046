"""Toy transformers in the quantised layouts that are published, with the values that each stored tensor stands for.

Codes, scales and packing are worked out here from the formats' definitions, value by value; nothing is taken from
`flux2_studio.engine`'s readers. GGUF files are written by the `gguf` package, whose own `dequantize` gives the values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from torch import Tensor

from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.params import TransformerParams

State = dict[str, Tensor]

# Widths in multiples of 256, a block of GGUF's K formats.
PARAMS = TransformerParams(
    in_channels=128,
    context_width=256,
    hidden=256,
    head_width=32,
    mlp=512,
    double_blocks=1,
    single_blocks=1,
    guidance_embedding=False,
)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # code 0..7; the fourth bit is the sign


def toy_state(seed: int = 5) -> State:
    """Random weights in bfloat16 under Black Forest Labs' names (the attributes of our modules); norms about one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(PARAMS)
    state = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        values = 1 + 0.2 * noise if tensor.ndim == 1 else noise / tensor.shape[1] ** 0.5
        state[name] = values.bfloat16()
    return state


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    """What Black Forest Labs' quantised files hold in few bits."""
    return name.startswith(("double_blocks.", "single_blocks.")) and tensor.ndim == 2


@dataclass
class Written:
    """A file to be, and the values that it stands for, under the bare names."""

    tensors: State = field(default_factory=dict)
    values: State = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path, prefix: str = "") -> Path:
        tensors = {prefix + name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, path, metadata={"format": "pt", **self.metadata})
        return path


def save_plain(state: Mapping[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    return path


# fp8


def fp8_codes(weight: Tensor, *, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """Codes in float8_e4m3fn and the scale by which they are to be multiplied."""
    magnitude = weight.float().abs()
    scale = (magnitude.amax(1, keepdim=True) if per_row else magnitude.amax()) / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def _mark(form: str, **more: Any) -> Tensor:
    return torch.tensor(list(json.dumps({"format": form, **more}).encode()), dtype=torch.uint8)


def bfl_fp8(state: State) -> Written:
    """Black Forest Labs: weight_scale and input_scale beside each weight, the formats in the header."""
    out = Written()
    layers = {}
    for name, tensor in state.items():
        out.tensors[name] = out.values[name] = tensor
        if is_block_matrix(name, tensor):
            codes, scale = fp8_codes(tensor)
            layer = name.removesuffix(".weight")
            out.tensors |= {name: codes, f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(0.03)}
            out.values[name] = codes.float() * scale
            layers[layer] = {"format": "float8_e4m3fn"}
    out.metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return out


def comfy_scaled_fp8(state: State) -> Written:
    """ComfyUI's older files: scale_weight and scale_input [1], and an empty tensor that marks the file."""
    out = Written(tensors={"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)})
    for name, tensor in state.items():
        out.tensors[name] = out.values[name] = tensor
        if is_block_matrix(name, tensor):
            codes, scale = fp8_codes(tensor)
            layer = name.removesuffix(".weight")
            out.tensors |= {
                name: codes,
                f"{layer}.scale_weight": scale.reshape(1),
                f"{layer}.scale_input": torch.ones(1),
            }
            out.values[name] = codes.float() * scale
    return out


def comfy_quant_fp8(state: State) -> Written:
    """ComfyUI's newer files: each layer says its own format; some layers stay as they were, range and all."""
    out = Written()
    for name, tensor in state.items():
        out.tensors[name] = out.values[name] = tensor
        layer = name.removesuffix(".weight")
        if ".linear2." in name:
            out.tensors[f"{layer}.input_scale"] = torch.tensor(1.0)
        elif is_block_matrix(name, tensor):
            codes, scale = fp8_codes(tensor)
            mark = _mark("float8_e4m3fn", full_precision_matrix_mult=True)
            out.tensors |= {name: codes, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": mark}
            out.values[name] = codes.float() * scale
    return out


def per_row_fp8(state: State) -> Written:
    """One scale for each row, as [rows, 1]."""
    out = Written()
    for name, tensor in state.items():
        out.tensors[name] = out.values[name] = tensor
        if is_block_matrix(name, tensor):
            codes, scale = fp8_codes(tensor, per_row=True)
            out.tensors |= {name: codes, f"{name}_scale": scale}
            out.values[name] = codes.float() * scale
    return out


def plain_fp8(state: State) -> Written:
    """Everything cast to fp8, norms too, without any scale."""
    cast = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    return Written(tensors=cast, values={name: tensor.float() for name, tensor in cast.items()})


# NVFP4


def nvfp4_codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed codes [rows, cols / 2], block scales as cuBLAS lays them out, the matrix's scale, and the values."""
    rows, cols = weight.shape
    blocks = weight.float().reshape(rows, cols // 16, 16)
    whole = blocks.abs().max() / (6 * 448)
    scales = (blocks.abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    steps = (scales.float() * whole)[:, :, None]
    codes = (blocks / steps.where(steps > 0, torch.ones_like(steps)))[..., None].abs().sub(E2M1).abs().argmin(-1)
    values = (E2M1[codes] * blocks.sign() * steps).reshape(rows, cols)
    codes = (codes + 8 * (blocks < 0)).reshape(rows, cols).to(torch.uint8)
    return codes[:, 0::2] * 16 + codes[:, 1::2], swizzled(scales), whole, values


def swizzled(scales: Tensor) -> Tensor:
    """Scales [rows, blocks] at the places that cuBLAS' manual gives: tiles of 128 rows x 4 blocks, filled up."""
    rows, blocks = scales.shape
    down, across = (rows + 127) // 128, (blocks + 3) // 4
    row, block = torch.arange(rows)[:, None], torch.arange(blocks)[None]
    place = (row // 128 * across + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
    out = torch.zeros(down * across * 512, dtype=torch.uint8)
    out[place] = scales.view(torch.uint8)
    return out.view(torch.float8_e4m3fn).reshape(down * 128, across * 4)


def bfl_nvfp4(state: State) -> Written:
    out = Written()
    for name, tensor in state.items():
        out.tensors[name] = out.values[name] = tensor
        if is_block_matrix(name, tensor):
            codes, scales, whole, values = nvfp4_codes(tensor)
            layer = name.removesuffix(".weight")
            out.tensors |= {
                name: codes,
                f"{layer}.weight_scale": scales,
                f"{layer}.weight_scale_2": whole,
                f"{layer}.input_scale": torch.tensor(0.01),
                f"{layer}.comfy_quant": _mark("nvfp4"),
            }
            out.values[name] = values
    return out


# GGUF


def _float16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16)


def _codes(values: np.ndarray, step: np.ndarray, low: int, high: int) -> np.ndarray:
    quotient = np.divide(values, step, out=np.zeros_like(values), where=np.broadcast_to(step, values.shape) != 0)
    return np.clip(np.round(quotient), low, high)


def _k_scales(blocks: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n, 8, 32] and the first 16 bytes of Q4_K and Q5_K blocks of values [n, 256]."""
    groups = blocks.reshape(-1, 8, 32)
    offsets = np.maximum(-groups.min(2), 0)
    steps = (groups.max(2) + offsets) / levels
    d, dmin = _float16(steps.max(1, keepdims=True) / 63), _float16(offsets.max(1, keepdims=True) / 63)
    six = _codes(steps, d.astype(np.float32), 0, 63).astype(np.uint8)
    six_offsets = _codes(offsets, dmin.astype(np.float32), 0, 63).astype(np.uint8)
    step = d.astype(np.float32) * six
    offset = dmin.astype(np.float32) * six_offsets
    codes = _codes(groups + offset[..., None], step[..., None], 0, levels).astype(np.uint8)
    packed = np.concatenate(
        [
            six[:, :4] | (six[:, 4:] >> 4) << 6,
            six_offsets[:, :4] | (six_offsets[:, 4:] >> 4) << 6,
            (six[:, 4:] & 15) | (six_offsets[:, 4:] & 15) << 4,
        ],
        1,
    )
    return codes, np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed], 1)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    codes, head = _k_scales(blocks, 15)
    return np.concatenate([head, (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(len(blocks), -1)], 1)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    codes, head = _k_scales(blocks, 31)
    high = sum(((codes[:, i] >> 4) << i for i in range(8)), np.zeros_like(codes[:, 0]))
    low = codes & 15
    return np.concatenate([head, high, (low[:, 0::2] | low[:, 1::2] << 4).reshape(len(blocks), -1)], 1)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    groups = blocks.reshape(-1, 16, 16)
    steps = np.abs(groups).max(2) / 31
    d = _float16(steps.max(1, keepdims=True) / 127)
    scales = _codes(steps, d.astype(np.float32), -128, 127).astype(np.int8)
    codes = (_codes(groups, (d.astype(np.float32) * scales)[..., None], -32, 31) + 32).astype(np.uint8)
    quarters = codes.reshape(-1, 2, 4, 32)
    low = (quarters[:, :, :2] & 15) | (quarters[:, :, 2:] & 15) << 4
    high = sum((quarters[:, :, i] >> 4 << 2 * i for i in range(4)), np.zeros_like(quarters[:, :, 0]))
    parts = [low.reshape(len(blocks), 128), high.reshape(len(blocks), 64), scales.view(np.uint8), d.view(np.uint8)]
    return np.concatenate(parts, 1)


_K_FORMATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}


def gguf_blocks(weight: Tensor, kind: str) -> np.ndarray:
    """`weight` [rows, cols] as bytes [rows, ...] of the format `kind`. gguf cannot make the K formats itself."""
    values = weight.float().numpy()
    if kind not in _K_FORMATS:
        return gguf.quants.quantize(values, GGMLQuantizationType[kind])
    return _K_FORMATS[kind](values.reshape(-1, 256)).reshape(len(values), -1)


def gguf_values(blocks: np.ndarray, kind: str) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks, GGMLQuantizationType[kind]))


def write_gguf(
    state: State,
    path: Path,
    kind: str,
    *,
    prefix: str = "",
    quantised: Callable[[str, Tensor], bool] = is_block_matrix,
    plain: str = "BF16",
    fields: Iterable[tuple[str, str]] = (),
) -> State:
    """Write `state`; what is not `quantised` is written as `plain`, vectors as F32. Returns the values."""
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_array("list.of.words", ["one", "two"])
    writer.add_array("list.of.numbers", [1, 2, 3])
    writer.add_bool("general.flag", True)
    for key, value in fields:
        writer.add_string(key, value)
    values = {}
    for name, tensor in state.items():
        form = kind if quantised(name, tensor) else plain if tensor.ndim == 2 else "F32"
        blocks = gguf_blocks(tensor, form)
        raw = form not in ("F32", "F16")
        writer.add_tensor(prefix + name, blocks, raw_dtype=GGMLQuantizationType[form] if raw else None)
        values[name] = gguf_values(blocks, form) if raw else torch.from_numpy(blocks.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
