"""Finds the user's LoRAs and applies those that a run has chosen to its transformer.

Every call scans the folders again, so files may be added, changed and removed while the studio runs. An unchanged file
is not reopened and yields the same `Lora` object, by which `engine.lora` recognises what a transformer already has.
Names from requests are looked up among the files found and never turned into paths.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import RequestError, WeightsError
from flux2_studio.files.hashing import hash_file
from flux2_studio.models.hub.local_checkpoints import detect_file_kind, find_name_problem
from flux2_studio.request import MAX_NAME, LoraChoice
from flux2_studio.settings import Settings

if TYPE_CHECKING:
    from flux2_studio.engine.flux.transformer import Transformer
    from flux2_studio.engine.lora.adapters import LoraFitReport
    from flux2_studio.engine.lora.file import Lora
    from flux2_studio.engine.params import TransformerParams

LORA_SUFFIX = ".safetensors"
# PEFT and diffusers save every LoRA under these names; the folder has the actual name.
GENERIC_FILE_STEMS = ("adapter_model", "pytorch_lora_weights")

LoraFileStamp = tuple[int, ...]  # sizes and modification times; an equal stamp means an unchanged file


@dataclass(frozen=True, kw_only=True)
class LoraEntry:
    """A LoRA that can be chosen. width: hidden width of the transformers that it fits. family: their name."""

    name: str
    kind: str
    width: int
    family: str


@dataclass(frozen=True, kw_only=True)
class AppliedLora:
    """An applied LoRA: how its tensors fit, and the SHA-256 of its file."""

    report: LoraFitReport
    sha256: str


@dataclass
class _LoraFile:
    """The cached result of opening a file: a LoRA, or a problem to report, or neither (for example a checkpoint)."""

    path: Path
    stamp: LoraFileStamp
    lora: Lora | None = None
    problem: str = ""
    sha256: str = ""


class LoraLibrary:
    """The LoRAs in the LoRA folder and among the user's checkpoint files, searched recursively. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._files: dict[Path, _LoraFile] = {}
        self._names: dict[str, _LoraFile] = {}
        self._removed_names: set[str] = set()

    @property
    def folder(self) -> Path:
        """The LoRA folder."""
        return self._settings.loras

    def scan(self) -> tuple[list[LoraEntry], list[str]]:
        """Returns the current LoRAs sorted by name, and a sentence for every file that should be a LoRA but is not."""
        names = self._scan_files()
        entries = [
            LoraEntry(name=name, kind=file.lora.kind, width=file.lora.width, family=self._family(file.lora.width))
            for name, file in names.items()
            if file.lora
        ]
        folder = self._settings.loras_dir
        missing = [] if folder is None or folder.is_dir() else [self._no_folder(folder)]
        return entries, missing + [file.problem for file in names.values() if file.problem]

    def load(self, choices: Sequence[LoraChoice]) -> list[tuple[Lora, float]]:
        """Returns the chosen LoRAs with their weights. A LoRA is the same object until its file changes.

        Raises `RequestError` for an unknown name, `WeightsError` for a damaged file.
        """
        return [(lora, choice.weight) for choice, (_, lora) in zip(choices, self._find(choices), strict=True)]

    def check(self, choices: Sequence[LoraChoice], checkpoint: Checkpoint, params: TransformerParams | None) -> None:
        """Checks the chosen LoRAs before any weights are loaded.

        params: of the checkpoint's transformer; None if its file is not on this machine yet, then only the hidden
        widths are compared. Raises what `load` raises, and `WeightsError` for a LoRA of another model.
        """
        if not choices:  # skips the scan and the import of torch
            return
        from flux2_studio.engine.lora.adapters import check_lora_for_params

        for _, lora in self._find(choices):
            if params is not None:
                check_lora_for_params(lora, params)
            elif lora.width != checkpoint.hidden_width:
                raise WeightsError(
                    f"{lora.name} is a LoRA for {self._family(lora.width)}, not for {checkpoint.label}: choose a "
                    f"LoRA that was made for this checkpoint, or the checkpoint that it was made for."
                )

    def memory_bytes(self, choices: Sequence[LoraChoice], itemsize: int) -> int:
        """Returns the bytes that the chosen LoRAs add to a transformer whose compute dtype has `itemsize` bytes.

        Raises what `load` raises.
        """
        if not choices:
            return 0
        from flux2_studio.engine.lora.adapters import added_parameter_count

        return itemsize * sum(added_parameter_count(lora) for lora, weight in self.load(choices) if weight)

    def hash_of(self, choice: LoraChoice) -> str:
        """Returns the SHA-256 of the chosen LoRA's file, cached until the file changes. Raises what `load` raises."""
        ((file, _),) = self._find([choice])
        return _hash_lora_file(file)

    def apply_to(self, transformer: Transformer, choices: Sequence[LoraChoice]) -> list[AppliedLora]:
        """Sets the LoRAs of `transformer` to exactly the chosen ones; an empty list removes all.

        Raises what `load` and `engine.lora.adapters.set_loras` raise; the transformer then keeps its previous LoRAs.
        """
        from flux2_studio.engine.lora.adapters import set_loras

        matches = self._find(choices)
        hashes = [_hash_lora_file(file) for file, _ in matches]
        loras = [(lora, choice.weight) for choice, (_, lora) in zip(choices, matches, strict=True)]
        reports = set_loras(transformer, loras)
        return [AppliedLora(report=report, sha256=sha256) for report, sha256 in zip(reports, hashes, strict=True)]

    def _family(self, width: int) -> str:
        for checkpoint in self._settings.checkpoints:
            if checkpoint.hidden_width == width:
                return checkpoint.label.removeprefix("FLUX.2 ")
        return f"a transformer of width {width}"

    def _find(self, choices: Sequence[LoraChoice]) -> list[tuple[_LoraFile, Lora]]:
        if not choices:
            return []
        names = self._scan_files()
        matches = []
        for choice in choices:
            file = names.get(choice.name)
            if file is None:
                raise RequestError(self._unknown_name_message(choice.name, names))
            if file.lora is None:
                raise WeightsError(file.problem)
            matches.append((file, file.lora))
        return matches

    def _unknown_name_message(self, name: str, names: dict[str, _LoraFile]) -> str:
        folder = self._settings.loras_dir
        if folder is not None and not folder.is_dir():
            return f"There is no LoRA called {name!r}. {self._no_folder(folder)}"
        if name in self._removed_names:
            return f"The LoRA {name!r} is not in its folder any more: put its file back, or take it off."
        usable = [known for known, file in names.items() if file.lora]
        if not usable:
            return f"There is no LoRA called {name!r}, nor any other: put LoRA files into {self.folder}."
        wanted = name.lower().removesuffix(LORA_SUFFIX)
        similarity = {
            known: max(_similarity_ratio(wanted, it) for it in (known, known.rpartition("/")[2])) for known in usable
        }
        suggestions = sorted(
            (known for known in usable if similarity[known] > 0.6), key=lambda known: -similarity[known]
        )
        if suggestions:
            return f"There is no LoRA called {name!r}. Did you mean {' or '.join(suggestions[:3])}?"
        return f"There is no LoRA called {name!r}. Choose one of: {', '.join(usable[:10])}" + (
            "." if len(usable) <= 10 else f" and {len(usable) - 10} more."
        )

    @staticmethod
    def _no_folder(folder: Path) -> str:
        return f"FLUX2_LORAS_DIR is {folder}, where there is no folder: make it, or unset the variable."

    # --- scanning the folders ---

    def _scan_files(self) -> dict[str, _LoraFile]:
        """Returns the files that are or should be LoRAs, by LoRA name."""
        with self._lock:
            files: dict[Path, _LoraFile] = {}
            names: dict[str, _LoraFile] = {}
            for folder, path, must_be_lora in self._paths():
                if path in files:  # one folder is inside the other
                    continue
                try:
                    stamp = _stamp(path)
                except OSError:  # deleted during the scan
                    continue
                file = self._files.get(path)
                if file is None or file.stamp != stamp:
                    file = _open_lora_file(path, stamp, must_be_lora)
                files[path] = file
                if file.lora or file.problem:
                    names[next(name for name in _iterate_lora_names(path, folder) if name not in names)] = file
            self._removed_names = (self._removed_names | self._names.keys()) - names.keys()
            self._files, self._names = files, dict(sorted(names.items(), key=lambda item: item[0].lower()))
            return self._names

    def _paths(self) -> Iterator[tuple[Path, Path, bool]]:
        """Yields (folder, file, whether it must be a LoRA) for every safetensors file, the LoRA folder first."""
        for folder, must_be_lora in ((self._settings.loras, True), (self._settings.checkpoints_dir, False)):
            if folder is None or not folder.is_dir():
                continue
            resolved = folder.resolve()
            for path in sorted(resolved.rglob("*")):
                is_hidden = any(part.startswith(".") for part in path.relative_to(resolved).parts)
                if path.suffix.lower() == LORA_SUFFIX and not is_hidden and path.is_file():
                    yield resolved, path, must_be_lora


def _stamp(path: Path) -> LoraFileStamp:
    """Returns the stamp of `path`, including the adapter_config.json that PEFT writes next to it."""
    files = [path]
    config = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and config.is_file():
        files.append(config)
    return tuple(number for file in files for stat in [file.stat()] for number in (stat.st_size, stat.st_mtime_ns))


def _open_lora_file(path: Path, stamp: LoraFileStamp, must_be_lora: bool) -> _LoraFile:
    if problem := find_name_problem(path):
        return _LoraFile(path, stamp, problem=problem)
    # Imported late: torch takes seconds to import and is not needed if there are no LoRA files.
    from flux2_studio.engine.lora.file import open_lora
    from flux2_studio.engine.weights.tensor_files import SafetensorsFiles

    try:
        if not must_be_lora and detect_file_kind(SafetensorsFiles(path).shapes) != "lora":
            return _LoraFile(path, stamp)
    except WeightsError:  # `local_checkpoints` reports it
        return _LoraFile(path, stamp)
    try:
        return _LoraFile(path, stamp, lora=open_lora(path))
    except WeightsError as error:
        return _LoraFile(path, stamp, problem=str(error))


def _iterate_lora_names(path: Path, folder: Path) -> Iterator[str]:
    """Yields candidate names for a LoRA: its path in the folder, which other new files do not change, then numbered
    variants of it."""
    relative_path = path.relative_to(folder)
    name_path = (
        relative_path.parent
        if path.stem in GENERIC_FILE_STEMS and relative_path.parent.name
        else relative_path.with_suffix("")
    )
    parts = (
        "".join(char if char.isprintable() and char != "\\" else "_" for char in part).strip(". ")
        for part in name_path.parts
    )
    name = "/".join(part or "_" for part in parts)[: MAX_NAME - 10].strip("/ ")
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _hash_lora_file(file: _LoraFile) -> str:
    """Returns the SHA-256 of the file, computed once. Raises `WeightsError` if it cannot be read or has changed."""
    if not file.sha256:
        try:
            sha256 = hash_file(file.path)
            changed = _stamp(file.path) != file.stamp
        except OSError as error:
            raise WeightsError(
                f"The LoRA {file.path.name} cannot be read ({error.strerror}): put its file back, or take it off."
            ) from error
        if changed:
            raise WeightsError(f"The LoRA {file.path.name} is being written to: run again when it is whole.")
        file.sha256 = sha256
    return file.sha256


def _similarity_ratio(wanted: str, known: str) -> float:
    return difflib.SequenceMatcher(None, wanted, known.lower()).ratio()
