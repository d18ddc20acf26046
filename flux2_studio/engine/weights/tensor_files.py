"""Tensors in safetensors files: a single file, or a folder's file or shards. By name, shape and type, read one at a
time.

Out of scope: what the tensors are for, and whether they hold values or codes (`formats.py`).
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux2_studio.engine.weights.staged_copy import FileSnapshot, StagedReader, TensorSpan
from flux2_studio.errors import WeightsError

Shape = tuple[int, ...]
DOWNLOAD_AGAIN_ADVICE = "the file is damaged or belongs to another model; download it again or choose another file."
# Supported dtypes by their names in a header. Files with other dtypes are rejected before their data is read.
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8,
}  # fmt: skip
# Limits far above any FLUX.2 file, which keep malicious files from taking time and memory.
MAX_HEADER_BYTES = 2**24  # trainers write megabytes of metadata into LoRA headers
MAX_TENSORS = 20_000
MAX_TENSOR_SIDE = 2**24
SCALED_FP8_MARKER = "scaled_fp8"  # a tensor, possibly empty, that marks ComfyUI's older fp8 files


class SafetensorsFiles:
    """The tensors of one safetensors file, or of a folder's file or shards.

    path: a file, or a folder with one .safetensors file or an index (*.safetensors.index.json). If the folder has a
    `subfolder` with such files (a full repository in diffusers' layout), that is used. metadata: of all files' headers
    together. Raises `WeightsError` for anything unreadable; the safetensors library checks headers, offsets and
    lengths.
    """

    def __init__(self, path: Path, subfolder: str = "") -> None:
        self.path = path
        self.name = path.name
        self._file_by_key: dict[str, FileSnapshot] = {}
        self._offsets: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        for shard in self._files(subfolder):
            try:
                file = FileSnapshot.take(shard)
                header, data = _read_header(file)
            except (_SafetensorsHeaderError, OSError) as error:
                raise WeightsError(
                    f"{shard.name} is not a whole safetensors file ({printable_text(str(error))}). Download it "
                    "again; files in "
                    f"other formats (.ckpt, .pt, .bin) are not read."
                ) from error
            self.metadata |= header.pop("__metadata__", None) or {}
            if len(self.shapes) + len(header) > MAX_TENSORS:
                raise WeightsError(
                    f"{self.name} has more than {MAX_TENSORS} tensors, which no model has: {DOWNLOAD_AGAIN_ADVICE}"
                )
            for key, entry in header.items():
                shape = tuple(entry["shape"])
                if key in self.shapes:
                    raise WeightsError(
                        f"{self._file_by_key[key].path.name} and {shard.name} both have {printable_text(key)}: "
                        f"{DOWNLOAD_AGAIN_ADVICE}"
                    )
                if (0 in shape and key.rpartition(".")[2] != SCALED_FP8_MARKER) or is_impossible_shape(shape):
                    problem = (
                        f"of shape {printable_text(str(list(shape)))}"
                        if is_impossible_shape(shape)
                        else "which is empty"
                    )
                    raise WeightsError(
                        f"{shard.name} has a tensor, {printable_text(key)}, {problem}: {DOWNLOAD_AGAIN_ADVICE}"
                    )
                self._file_by_key[key], self._offsets[key] = file, data + entry["data_offsets"][0]
                self.shapes[key], self.dtypes[key] = shape, entry["dtype"]

    def _files(self, subfolder: str) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise WeightsError(f"There is no file or folder {self.path}: check the path, or download it again.")
        for folder in (self.path / subfolder, self.path):
            indexes = sorted(folder.glob("*.safetensors.index.json"))
            if indexes:
                return self._shards(indexes[0])
            files = sorted(folder.glob("*.safetensors"))
            if len(files) == 1:
                return files
            if files:
                names = ", ".join(file.name for file in files)
                raise WeightsError(f"The folder {self.name} holds several weight files ({names}): name one of them.")
        raise WeightsError(f"The folder {self.name} holds no .safetensors file: point to one that does.")

    def _shards(self, index: Path) -> list[Path]:
        try:
            names = {str(name) for name in read_json(index)["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index.name} in {self.name} is not a valid index. Download it again.") from error
        # A shard must be a file in its index's folder, so an index cannot point elsewhere.
        shards = {file.name: file for file in index.parent.glob("*.safetensors") if file.is_file()}
        if missing := sorted(names - shards.keys()):
            raise WeightsError(
                f"The folder {self.name} lacks {printable_list(missing)}, which its index names. Download the folder "
                "again."
            )
        return [shards[name] for name in sorted(names)]

    @property
    def files(self) -> list[Path]:
        """The files that contain the tensors, sorted by path."""
        return sorted({file.path for file in self._file_by_key.values()})

    def meta_tensor(self, key: str) -> Tensor:
        """Return a tensor on meta with the dtype and shape that `read` returns."""
        return torch.empty(self.shapes[key], dtype=SAFETENSORS_DTYPES[self.dtypes[key]], device="meta")

    def spans(self, keys: Iterable[str]) -> dict[str, TensorSpan]:
        """Return where each of `keys` lies, for a `StagedReader`."""
        return {key: TensorSpan(self._file_by_key[key], self._offsets[key], self.meta_tensor(key)) for key in keys}

    def read(self, keys: Iterable[str]) -> Generator[tuple[str, Tensor], None, None]:
        """Yield (key, tensor) on the CPU for each of `keys`, in file order."""
        return StagedReader(torch.device("cpu")).read(self.spans(keys))

    def read_mapped(self, keys: Iterable[str]) -> Generator[tuple[str, Tensor], None, None]:
        """Same as `read`, but tensors are views of the mapped files, which costs neither time nor memory.

        Use it only for files that nobody overwrites while a tensor is in use: the tensor would change with its file,
        and if the file became shorter the system would kill the process (SIGBUS).
        """
        keys_by_file: dict[FileSnapshot, list[str]] = {}
        for key in keys:
            keys_by_file.setdefault(self._file_by_key[key], []).append(key)
        for file, file_keys in keys_by_file.items():
            try:
                with file.open(), safe_open(file.path, framework="pt") as opened:
                    for key in file_keys:
                        yield key, opened.get_tensor(key)
            except SafetensorError as error:
                raise WeightsError(
                    f"{file.path.name} could not be read to its end ({printable_text(str(error))}). Download it again."
                ) from error


class _SafetensorsHeaderError(ValueError):
    """What is wrong with a header, worded as the end of a sentence about the file."""


def _read_header(file: FileSnapshot) -> tuple[dict[str, Any], int]:
    """Return a safetensors file's parsed header and the offset of its data. Raises `_SafetensorsHeaderError`,
    `WeightsError`, `OSError`.
    """
    with file.open() as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > file.size - 8:
            raise _SafetensorsHeaderError("its header ends too early")
        if length > MAX_HEADER_BYTES:
            raise _SafetensorsHeaderError(f"its header is said to have {length} bytes")
        text = opened.read(length)
    try:
        # The library checks the format's rules: every shape fits its bytes, and the bytes fill the file without gaps.
        with safe_open(file.path, framework="pt"):
            return json.loads(text, object_pairs_hook=_reject_duplicate_keys), 8 + length
    except (SafetensorError, ValueError, RecursionError) as error:
        raise _SafetensorsHeaderError(str(error)) from error


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of a header. Readers differ on which of two entries of the same name they take, so duplicates
    are rejected.
    """
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise _SafetensorsHeaderError("its header says the same thing twice")
    return entries


def is_impossible_shape(shape: Shape) -> bool:
    """Return whether no model has a tensor of this shape. Keeps numbers that are derived from shapes small."""
    return len(shape) > 8 or any(size > MAX_TENSOR_SIDE for size in shape)


def read_json(file: Path) -> Any:
    """Read a small JSON file beside weights. Raises `OSError`, and `ValueError` if it is not valid JSON or too
    large.
    """
    if file.stat().st_size > MAX_HEADER_BYTES:
        raise ValueError(f"{file.name} is far too long")
    try:
        return json.loads(file.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{file.name} is nested too deeply") from error


def printable_text(text: str, max_length: int = 100) -> str:
    """Make a name or message from a foreign file safe to show: shortened, with unprintable characters replaced."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:max_length])
    return printable if len(text) <= max_length else f"{printable}..."


def printable_list(names: Sequence[str], max_names: int = 3) -> str:
    """Return 'a, b, c and 12 more', each made safe to show."""
    text = ", ".join(printable_text(name) for name in names[:max_names])
    return text if len(names) <= max_names else f"{text} and {len(names) - max_names} more"
