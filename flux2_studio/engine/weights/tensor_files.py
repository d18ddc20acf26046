"""Tensors in safetensors files: one file, or a folder's file or shards, by name, shape and type, read one at a time.

Does not know: what the tensors are for, or whether their numbers are values or codes (`formats.py` does).
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
# The types of tensor that are read, by their names in a header. What else there is, is refused before it is read.
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8,
}  # fmt: skip
# Bounds that every file of FLUX.2 keeps by far, and that keep a hostile one from taking time and memory.
MAX_HEADER_BYTES = 2**24  # bytes; trainers write megabytes of remarks into a LoRA's
MAX_TENSORS = 20_000
MAX_TENSOR_SIDE = 2**24
SCALED_FP8_MARKER = "scaled_fp8"  # ComfyUI marks its older fp8 files with a tensor of this name, which may be empty


class SafetensorsFiles:
    """The tensors of one safetensors file, or of a folder's file or shards.

    path: a file, or a folder with one .safetensors file or an index (*.safetensors.index.json). Where the folder has a
    `subfolder` with such files (a whole repository in diffusers' layout), that is meant. Raises `WeightsError` for
    anything that cannot be read; the safetensors library checks headers, offsets and lengths.

    metadata: the headers' own words, all files' together.
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
            for key, said in header.items():
                shape = tuple(said["shape"])
                if key in self.shapes:
                    raise WeightsError(
                        f"{self._file_by_key[key].path.name} and {shard.name} both have {printable_text(key)}: "
                        f"{DOWNLOAD_AGAIN_ADVICE}"
                    )
                if (0 in shape and key.rpartition(".")[2] != SCALED_FP8_MARKER) or is_impossible_shape(shape):
                    what = (
                        f"of shape {printable_text(str(list(shape)))}"
                        if is_impossible_shape(shape)
                        else "which is empty"
                    )
                    raise WeightsError(
                        f"{shard.name} has a tensor, {printable_text(key)}, {what}: {DOWNLOAD_AGAIN_ADVICE}"
                    )
                self._file_by_key[key], self._offsets[key] = file, data + said["data_offsets"][0]
                self.shapes[key], self.dtypes[key] = shape, said["dtype"]

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
        # A shard is a plain name beside its index; nothing in a foreign index leads us elsewhere.
        beside = {file.name: file for file in index.parent.glob("*.safetensors") if file.is_file()}
        if missing := sorted(names - beside.keys()):
            raise WeightsError(
                f"The folder {self.name} lacks {printable_list(missing)}, which its index names. Download the folder "
                "again."
            )
        return [beside[name] for name in sorted(names)]

    @property
    def files(self) -> list[Path]:
        """The files that the tensors are in, by name."""
        return sorted({file.path for file in self._file_by_key.values()})

    def meta_tensor(self, key: str) -> Tensor:
        """A tensor of the type and shape that `read` gives, without values (on meta)."""
        return torch.empty(self.shapes[key], dtype=SAFETENSORS_DTYPES[self.dtypes[key]], device="meta")

    def spans(self, keys: Iterable[str]) -> dict[str, TensorSpan]:
        """Where each of `keys` lies, for a `StagedReader`."""
        return {key: TensorSpan(self._file_by_key[key], self._offsets[key], self.meta_tensor(key)) for key in keys}

    def read(self, keys: Iterable[str]) -> Generator[tuple[str, Tensor], None, None]:
        """(key, tensor) on the CPU for each of `keys`, in the order of the files."""
        return StagedReader(torch.device("cpu")).read(self.spans(keys))

    def read_mapped(self, keys: Iterable[str]) -> Generator[tuple[str, Tensor], None, None]:
        """As `read` does, but tensors are views of the mapped files, which costs neither time nor memory.

        Only for files that nobody writes over for as long as a tensor is in use: it would change with its file, and
        where the file has become shorter the system ends the process (SIGBUS).
        """
        by_file: dict[FileSnapshot, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._file_by_key[key], []).append(key)
        for file, wanted in by_file.items():
            try:
                with file.open(), safe_open(file.path, framework="pt") as opened:
                    for key in wanted:
                        yield key, opened.get_tensor(key)
            except SafetensorError as error:
                raise WeightsError(
                    f"{file.path.name} could not be read to its end ({printable_text(str(error))}). Download it again."
                ) from error


class _SafetensorsHeaderError(ValueError):
    """What is wrong with a header, as the end of a sentence about the file."""


def _read_header(file: FileSnapshot) -> tuple[dict[str, Any], int]:
    """What a safetensors file's header says, and where the data begin. Raises `_SafetensorsHeaderError`,
    `WeightsError`, `OSError`."""
    with file.open() as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > file.size - 8:
            raise _SafetensorsHeaderError("its header ends too early")
        if length > MAX_HEADER_BYTES:
            raise _SafetensorsHeaderError(f"its header is said to have {length} bytes")
        text = opened.read(length)
    try:
        # The library knows the format's rules: every shape fits its bytes, and these fill the file without a gap.
        with safe_open(file.path, framework="pt"):
            return json.loads(text, object_pairs_hook=_reject_duplicate_keys), 8 + length
    except (SafetensorError, ValueError, RecursionError) as error:
        raise _SafetensorsHeaderError(str(error)) from error


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header. Readers differ on which of two entries of one name they take; we take neither."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _SafetensorsHeaderError("its header says the same thing twice")
    return found


def is_impossible_shape(shape: Shape) -> bool:
    """Whether no model has a tensor of this shape. The numbers that are derived from others stay small."""
    return len(shape) > 8 or any(size > MAX_TENSOR_SIDE for size in shape)


def read_json(file: Path) -> Any:
    """What a small JSON file beside weights says. Raises `OSError`, and `ValueError` for anything that is none."""
    if file.stat().st_size > MAX_HEADER_BYTES:
        raise ValueError(f"{file.name} is far too long")
    try:
        return json.loads(file.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{file.name} is nested too deeply") from error


def printable_text(text: str, max_length: int = 100) -> str:
    """A name or a message from a foreign file, fit to stand in a sentence of ours."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:max_length])
    return printable if len(text) <= max_length else f"{printable}..."


def printable_list(names: Sequence[str], max_names: int = 3) -> str:
    """'a, b, c and 12 more', each fit to be shown."""
    text = ", ".join(printable_text(name) for name in names[:max_names])
    return text if len(names) <= max_names else f"{text} and {len(names) - max_names} more"
