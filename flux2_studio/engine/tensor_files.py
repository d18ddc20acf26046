"""Tensors in safetensors files: one file, or a folder's file or shards, by name, shape and type, read one at a time.

Does not know: what the tensors are for, or whether their numbers are values or codes (`formats.py` does).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux2_studio.errors import WeightsError

Shape = tuple[int, ...]
AGAIN = "the file is damaged or belongs to another model; download it again or choose another file."
MARKER = "scaled_fp8"  # ComfyUI marks its older fp8 files with a tensor of this name, which may be empty


class TensorFiles:
    """The tensors of one safetensors file, or of a folder's file or shards.

    path: a file, or a folder with one .safetensors file or an index (*.safetensors.index.json). Where the folder has a
    `subfolder` with such files (a whole repository in diffusers' layout), that is meant. Raises `WeightsError` for
    anything that cannot be read; the safetensors library checks headers, offsets and lengths.

    metadata: the headers' own words, all files' together.
    """

    def __init__(self, path: Path, subfolder: str = "") -> None:
        self.path = path
        self.name = path.name
        self._of: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        for file in self._files(subfolder):
            try:
                with safe_open(file, framework="pt") as opened:
                    self.metadata |= opened.metadata() or {}
                    for key in opened.keys():  # noqa: SIM118 - not a dict
                        tensor = opened.get_slice(key)
                        self._of[key] = file
                        self.shapes[key] = tuple(tensor.get_shape())
                        self.dtypes[key] = tensor.get_dtype()
                        if 0 in self.shapes[key] and key.rpartition(".")[2] != MARKER:
                            raise WeightsError(f"{file.name} has an empty tensor, {key}: {AGAIN}")
            except (SafetensorError, OSError) as error:
                raise WeightsError(
                    f"{file.name} is not a whole safetensors file ({error}). Download it again; files in other "
                    f"formats (.ckpt, .pt, .bin) are not read."
                ) from error

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
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            # A shard is a plain name beside its index; anything else in a foreign index must not lead us elsewhere.
            files = [index.parent / Path(str(name)).name for name in sorted(names)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index.name} in {self.name} is not a valid index. Download it again.") from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise WeightsError(
                f"The folder {self.name} lacks {listed(missing)}, which its index names. Download the folder again."
            )
        return files

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) on the CPU for each of `keys`, shard by shard; tensors may be views of the mapped file."""
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._of[key], []).append(key)
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in wanted:
                        yield key, opened.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file.name} could not be read to its end ({error}). Download it again.") from error


def listed(names: Sequence[str], shown: int = 3) -> str:
    """'a, b, c and 12 more'."""
    text = ", ".join(names[:shown])
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"
