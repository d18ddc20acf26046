"""What the tensors of a file stand for: plain values, or codes with the scales that dequantise them.

Supports fp8 as Black Forest Labs and ComfyUI store it, with one scale, one per row or none; NVFP4; GGUF's blocks; and
the prefixes that ComfyUI puts before names. Every tensor is listed under its own name with the shape of its *values*,
so plans (`layouts.py`) need no knowledge of formats; scales and markers are no longer separate tensors. Out of scope:
which tensors a model needs.

    X.weight    F8_E4M3 [rows, cols]     value = weight * scale
                U8 [rows, cols / 2]      NVFP4 if X.weight_scale_2 exists; see `quantize.NVFP4Matrix`
    X.weight_scale or X.scale_weight     fp8: float, one number or one per row; NVFP4: F8_E4M3, one per 16 values
    X.weight_scale_2                     NVFP4: float, one number
    X.input_scale or X.scale_input       the range of the layer's inputs, for fp8 matmuls of other programs: ignored
    X.comfy_quant                        U8: JSON {"format": ...}; `_quantization_metadata` in the header has the same
                                         for all layers at once
    scaled_fp8                           a marker in ComfyUI's older files: their fp8 weights have scales

Pitfall: fp8 without any scale or marker is a plain cast, so a lost scale can only be detected if the file has scales or
markers at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2_studio.engine.weights.gguf import BLOCK_FORMATS, GGUF_MAGIC, GGUFFile, GGUFMatrix
from flux2_studio.engine.weights.quantize import NVFP4Matrix, ScaledMatrix, StoredMatrix
from flux2_studio.engine.weights.tensor_files import (
    DOWNLOAD_AGAIN_ADVICE,
    SCALED_FP8_MARKER,
    SafetensorsFiles,
    Shape,
    printable_text,
)
from flux2_studio.errors import WeightsError

PLAIN_TYPES = ("F32", "F16", "BF16")
FP8, NVFP4 = "F8_E4M3", "NVFP4"
DECLARED_FORMATS = {"float8_e4m3fn": FP8, "nvfp4": NVFP4}  # by their names in comfy_quant and the header's metadata
COMFYUI_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_UNUSED_LAYER_FIELDS = ("input_scale", "scale_input", "comfy_quant")  # of a layer, for all types of weights
_MAX_MARK_BYTES = 4096  # of one comfy_quant


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: the shape of its values, and where they come from.

    keys: names in the file; the first is that of the values or codes. make_matrix: makes a matrix from the keys'
    tensors; None for plain values. problem: why it cannot be read, worded as the end of a sentence.
    """

    shape: Shape
    dtype: str
    keys: tuple[str, ...]
    make_matrix: Callable[..., StoredMatrix] | None = None
    problem: str = ""

    @property
    def has_float8(self) -> bool:
        """Whether the stored form needs a device that supports float8_e4m3fn."""
        return self.dtype in (FP8, NVFP4)

    def restore(self, tensors: Sequence[Tensor]) -> Tensor | StoredMatrix:
        """Return the tensor, or the stored matrix, made of the tensors of `keys`."""
        return tensors[0] if self.make_matrix is None else self.make_matrix(*tensors)

    @property
    def is_readable(self) -> bool:
        return self.make_matrix is not None or self.dtype in (*PLAIN_TYPES, FP8)


class CheckpointContents:
    """The tensors of a file or folder. entries: by name, without the prefixes that names may have in the file."""

    def __init__(self, files: SafetensorsFiles | GGUFFile, entries: Mapping[str, TensorEntry]) -> None:
        self.files = files
        self.name = files.name
        self.entries = dict(entries)
        self.shapes: dict[str, Shape] = {name: entry.shape for name, entry in entries.items()}

    def restore(self, name: str, tensors: Sequence[Tensor]) -> Tensor | StoredMatrix:
        """Return the tensor or stored matrix `name`, made of its keys' `tensors`. Raises `WeightsError` for invalid
        scales.
        """
        entry = self.entries[name]
        for key, scale in zip(entry.keys[1:], tensors[1:], strict=True):
            values = scale.view(torch.float8_e4m3fn) if scale.dtype is torch.uint8 else scale
            if not bool(((values.float() >= 0) & values.float().isfinite()).all()):
                raise WeightsError(
                    f"{self.name} has a scale, {printable_text(key)}, that is negative or no number: "
                    f"{DOWNLOAD_AGAIN_ADVICE}"
                )
        return entry.restore(tensors)


def open_checkpoint_contents(path: Path, subfolder: str = "", prefixes: Sequence[str] = ()) -> CheckpointContents:
    """List the tensors in `path`: a safetensors or GGUF file, or a folder (see `SafetensorsFiles`).

    prefixes: optional prefixes of names, which are stripped. Raises `WeightsError`.
    """
    files = GGUFFile(path) if _is_gguf(path) else SafetensorsFiles(path, subfolder)
    names: dict[str, str] = {}
    for key in files.shapes:
        name = key
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        if name in names:
            raise WeightsError(
                f"{files.name} has both {printable_text(names[name])} and {printable_text(key)}: "
                f"{DOWNLOAD_AGAIN_ADVICE}"
            )
        names[name] = key
    return CheckpointContents(files, _FormatDetector(files, names, prefixes).entries())


def _is_gguf(path: Path) -> bool:
    if not path.is_file():  # a folder, a pipe or a missing path: `SafetensorsFiles` has the error message
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


class _FormatDetector:
    """Finds, for one file, which tensors belong together. names: the file's key by name."""

    def __init__(self, files: SafetensorsFiles | GGUFFile, names: Mapping[str, str], prefixes: Sequence[str]) -> None:
        self._files = files
        self._keys = names
        self._shapes = {name: files.shapes[key] for name, key in names.items()}
        self._dtypes = {name: files.dtypes[key] for name, key in names.items()}
        self._declared_formats = self._read_declarations(prefixes)
        self._has_scales = SCALED_FP8_MARKER in names or any(
            name.endswith((".weight_scale", ".scale_weight")) for name in names
        )
        self._used_names = {SCALED_FP8_MARKER} & names.keys()

    def entries(self) -> dict[str, TensorEntry]:
        entries_by_name = {name: self._entry(name) for name in self._keys}
        return {name: entry for name, entry in entries_by_name.items() if name not in self._used_names}

    def _entry(self, name: str) -> TensorEntry:
        layer, _, parameter = name.rpartition(".")
        dtype, shape = self._dtypes[name], self._shapes[name]
        entry = TensorEntry(shape, dtype, (self._keys[name],))
        if parameter == "weight":
            self._used_names |= {
                unused for field in _UNUSED_LAYER_FIELDS if (unused := f"{layer}.{field}") in self._keys
            }
            declared = self._declared_formats.get(layer)
            if declared is not None and declared not in DECLARED_FORMATS and dtype not in PLAIN_TYPES:
                return replace(
                    entry, problem=f"{printable_text(name)} in the format {printable_text(declared)}, which is not read"
                )
            if dtype == FP8:
                return self._fp8(entry, name, layer, declared)
            if dtype == "U8":
                return self._nvfp4(entry, name, layer, declared)
        if dtype in BLOCK_FORMATS:
            if len(shape) != 2:
                return replace(entry, problem=f"{printable_text(name)}, which is no matrix, in {dtype}")
            return replace(entry, make_matrix=lambda blocks: GGUFMatrix(blocks, dtype))
        return entry

    def _fp8(self, entry: TensorEntry, name: str, layer: str, declared: str | None) -> TensorEntry:
        scale = next(
            (candidate for candidate in (f"{layer}.weight_scale", f"{layer}.scale_weight") if candidate in self._keys),
            None,
        )
        if len(entry.shape) != 2:
            return (
                entry
                if scale is None
                else replace(entry, problem=f"{printable_text(name)}, no matrix, in fp8 with a scale")
            )
        if scale is None:
            if self._has_scales or declared is not None:
                return replace(
                    entry,
                    problem=f"{printable_text(name)} in fp8 without its scale, {printable_text(layer)}.weight_scale",
                )
            return replace(entry, make_matrix=lambda codes: ScaledMatrix(codes, torch.ones(1)))
        self._used_names.add(scale)
        rows, dtype = entry.shape[0], self._dtypes[scale]
        if dtype not in PLAIN_TYPES or self._shapes[scale] not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            return replace(
                entry,
                problem=f"{printable_text(name)} in fp8 with a scale of {dtype} {list(self._shapes[scale])}; one float "
                f"number, or one for each of its {rows} rows, was expected",
            )
        return replace(entry, keys=(*entry.keys, self._keys[scale]), make_matrix=ScaledMatrix)

    def _nvfp4(self, entry: TensorEntry, name: str, layer: str, declared: str | None) -> TensorEntry:
        block_scale, tensor_scale = f"{layer}.weight_scale", f"{layer}.weight_scale_2"
        present = {block_scale, tensor_scale} & self._keys.keys()
        if not present and declared is None:
            return entry  # bytes of unknown meaning
        self._used_names |= present
        if missing := sorted({block_scale, tensor_scale} - present):
            return replace(
                entry, problem=f"{printable_text(name)} in NVFP4 without its scale, {printable_text(missing[0])}"
            )
        if len(entry.shape) != 2 or entry.shape[1] % 8:
            return replace(entry, problem=f"{printable_text(name)} in NVFP4 in the shape {list(entry.shape)}")
        rows, cols = entry.shape[0], 2 * entry.shape[1]
        expected = NVFP4Matrix.block_scale_count(rows, cols)
        if math.prod(self._shapes[tensor_scale]) != 1 or self._dtypes[tensor_scale] not in PLAIN_TYPES:
            return replace(
                entry,
                problem=f"{printable_text(name)} in NVFP4 with a {printable_text(tensor_scale)} that is not one float "
                f"number",
            )
        if math.prod(self._shapes[block_scale]) != expected or self._dtypes[block_scale] not in (FP8, "U8"):
            return replace(
                entry,
                problem=f"{printable_text(name)} in NVFP4 with block scales of {self._dtypes[block_scale]} "
                f"{list(self._shapes[block_scale])}; {expected} in fp8 were expected",
            )
        keys = (*entry.keys, self._keys[block_scale], self._keys[tensor_scale])
        return TensorEntry((rows, cols), NVFP4, keys, make_matrix=NVFP4Matrix)

    def _read_declarations(self, prefixes: Sequence[str]) -> dict[str, str]:
        """Return the format of each layer for which the file declares one."""
        declared = _layer_formats(self._files.metadata.get("_quantization_metadata", "{}"), prefixes)
        layer_by_key = {
            key: name.removesuffix(".comfy_quant") for name, key in self._keys.items() if name.endswith(".comfy_quant")
        }
        files = self._files
        small_keys = {
            key for key in layer_by_key if files.dtypes[key] == "U8" and math.prod(files.shapes[key]) <= _MAX_MARK_BYTES
        }
        format_by_key = {
            key: _format_name(_parse_json(bytes(tensor.flatten().tolist()))) for key, tensor in files.read(small_keys)
        }
        for key, layer in layer_by_key.items():
            if (format_name := format_by_key.get(key)) is None:
                raise WeightsError(
                    f"{files.name} has a {printable_text(key)} that names no format: {DOWNLOAD_AGAIN_ADVICE}"
                )
            declared[layer] = format_name
        return declared


def _layer_formats(text: str, prefixes: Sequence[str]) -> dict[str, str]:
    """Parse {"layers": {name: {"format": ...}}} to format by name. Anything of another form is ignored."""
    parsed = _parse_json(text)
    layers = parsed.get("layers") if isinstance(parsed, dict) else None
    formats = {}
    for name, declaration in layers.items() if isinstance(layers, dict) else ():
        format_name = _format_name(declaration)
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        if format_name is not None:
            formats[name] = format_name
    return formats


def _format_name(declaration: Any) -> str | None:
    format_name = declaration.get("format") if isinstance(declaration, dict) else declaration
    return format_name if isinstance(format_name, str) else None


def _parse_json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
