"""A user's own LoRAs: which there are, and those that a run has chosen put onto its transformer.

The folders are looked at anew whenever somebody asks, so files may come, change and go while the studio runs. A file
that is as it was is not opened again and gives the same `Lora`, by which `engine.lora` knows what a transformer
carries already. A name from a request is looked up among the files found, never made into a path.
"""

from __future__ import annotations

import difflib
import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import RequestError, WeightsError
from flux2_studio.models.hub.local_checkpoints import detect_file_kind, find_name_problem
from flux2_studio.request import MAX_NAME, LoraChoice
from flux2_studio.settings import Settings

if TYPE_CHECKING:
    from flux2_studio.engine.flux.transformer import Transformer
    from flux2_studio.engine.lora.adapters import LoraFitReport
    from flux2_studio.engine.lora.file import Lora
    from flux2_studio.engine.params import TransformerParams

LORA_SUFFIX = ".safetensors"
# What PEFT and diffusers call every LoRA that they save: its folder has the name.
GENERIC_FILE_STEMS = ("adapter_model", "pytorch_lora_weights")

LoraFileStamp = tuple[int, ...]  # sizes and times of change; a file with the same stamp is the same


@dataclass(frozen=True, kw_only=True)
class LoraEntry:
    """A LoRA that can be chosen. width: the hidden width of the transformers that it is for, `family` their name."""

    name: str
    kind: str
    width: int
    family: str


@dataclass(frozen=True, kw_only=True)
class AppliedLora:
    """What became of a chosen LoRA: how its tensors fit, and the SHA-256 of its file."""

    report: LoraFitReport
    sha256: str


@dataclass
class _LoraFile:
    """A file as it was when it had this stamp: a LoRA, or a problem to tell of, or neither (a checkpoint, say)."""

    path: Path
    stamp: LoraFileStamp
    lora: Lora | None = None
    problem: str = ""
    sha256: str = ""


class LoraLibrary:
    """The LoRAs below the user's folder for them, and those among their checkpoint files. For any thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._files: dict[Path, _LoraFile] = {}
        self._names: dict[str, _LoraFile] = {}
        self._removed_names: set[str] = set()

    @property
    def folder(self) -> Path:
        """Where LoRAs are put."""
        return self._settings.loras

    def scan(self) -> tuple[list[LoraEntry], list[str]]:
        """The LoRAs there are now, by name, and a sentence about every file that should be one and is not."""
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
        """The chosen LoRAs with their weights; the same `Lora` again until its file changes.

        Raises `RequestError` for a name that no LoRA here has, `WeightsError` for a file that is damaged.
        """
        return [(lora, choice.weight) for choice, (_, lora) in zip(choices, self._find(choices), strict=True)]

    def check(self, choices: Sequence[LoraChoice], checkpoint: Checkpoint, params: TransformerParams | None) -> None:
        """Raises what `load` does, and `WeightsError` for a LoRA that is another model's: before anything is loaded.

        params: of the checkpoint's transformer, None where its file is not on this machine yet; then widths must do.
        """
        if not choices:  # spares whoever uses none the search, and importing torch
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
        """Bytes that the chosen LoRAs will take beside a transformer that computes in numbers of `itemsize` bytes.

        Raises what `load` does.
        """
        if not choices:
            return 0
        from flux2_studio.engine.lora.adapters import added_parameter_count

        return itemsize * sum(added_parameter_count(lora) for lora, weight in self.load(choices) if weight)

    def hash_of(self, choice: LoraChoice) -> str:
        """SHA-256 of the chosen LoRA's file, read once for as long as it stays as it is. Raises what `load` does."""
        ((file, _),) = self._find([choice])
        return _hash_lora_file(file)

    def apply_to(self, transformer: Transformer, choices: Sequence[LoraChoice]) -> list[AppliedLora]:
        """Make the chosen LoRAs exactly those that `transformer` carries; with none chosen, all are taken off.

        Raises what `load` and `engine.lora.set_loras` do; the transformer then carries what it did before.
        """
        from flux2_studio.engine.lora.adapters import set_loras

        found = self._find(choices)
        hashes = [_hash_lora_file(file) for file, _ in found]
        loras = [(lora, choice.weight) for choice, (_, lora) in zip(choices, found, strict=True)]
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
        found = []
        for choice in choices:
            file = names.get(choice.name)
            if file is None:
                raise RequestError(self._unknown_name_message(choice.name, names))
            if file.lora is None:
                raise WeightsError(file.problem)
            found.append((file, file.lora))
        return found

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
        likely = {known: max(_likeness(wanted, it) for it in (known, known.rpartition("/")[2])) for known in usable}
        near = sorted((known for known in usable if likely[known] > 0.6), key=lambda known: -likely[known])
        if near:
            return f"There is no LoRA called {name!r}. Did you mean {' or '.join(near[:3])}?"
        return f"There is no LoRA called {name!r}. Choose one of: {', '.join(usable[:10])}" + (
            "." if len(usable) <= 10 else f" and {len(usable) - 10} more."
        )

    @staticmethod
    def _no_folder(folder: Path) -> str:
        return f"FLUX2_LORAS_DIR is {folder}, where there is no folder: make it, or unset the variable."

    # --- the folders ---

    def _scan_files(self) -> dict[str, _LoraFile]:
        """The files that are LoRAs, or should be, by their names."""
        with self._lock:
            files: dict[Path, _LoraFile] = {}
            names: dict[str, _LoraFile] = {}
            for folder, path, must_be_lora in self._paths():
                if path in files:  # where one folder lies in the other
                    continue
                try:
                    stamp = _stamp(path)
                except OSError:  # it went while we were looking
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
        """(folder, file, whether it must be a LoRA) of every safetensors file, the LoRAs' own folder first."""
        for folder, must_be_lora in ((self._settings.loras, True), (self._settings.checkpoints_dir, False)):
            if folder is None or not folder.is_dir():
                continue
            whole = folder.resolve()
            for path in sorted(whole.rglob("*")):
                hidden = any(part.startswith(".") for part in path.relative_to(whole).parts)
                if path.suffix.lower() == LORA_SUFFIX and not hidden and path.is_file():
                    yield whole, path, must_be_lora


def _stamp(path: Path) -> LoraFileStamp:
    """Of the file, and of the configuration that PEFT writes beside its own."""
    files = [path]
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.is_file():
        files.append(beside)
    return tuple(number for file in files for stat in [file.stat()] for number in (stat.st_size, stat.st_mtime_ns))


def _open_lora_file(path: Path, stamp: LoraFileStamp, must_be_lora: bool) -> _LoraFile:
    if problem := find_name_problem(path):
        return _LoraFile(path, stamp, problem=problem)
    # Torch takes seconds to import, and whoever has no such files does not need it here.
    from flux2_studio.engine.lora.file import open_lora
    from flux2_studio.engine.weights.tensor_files import SafetensorsFiles

    try:
        if not must_be_lora and detect_file_kind(SafetensorsFiles(path).shapes) != "lora":
            return _LoraFile(path, stamp)
    except WeightsError:  # told by `models.own`
        return _LoraFile(path, stamp)
    try:
        return _LoraFile(path, stamp, lora=open_lora(path))
    except WeightsError as error:
        return _LoraFile(path, stamp, problem=str(error))


def _iterate_lora_names(path: Path, folder: Path) -> Iterator[str]:
    """Names for a LoRA, until one is free: its path below the folder, which another file that comes does not change."""
    below = path.relative_to(folder)
    named = below.parent if path.stem in GENERIC_FILE_STEMS and below.parent.name else below.with_suffix("")
    parts = ("".join(it if it.isprintable() and it != "\\" else "_" for it in part).strip(". ") for part in named.parts)
    name = "/".join(part or "_" for part in parts)[: MAX_NAME - 10].strip("/ ")
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _hash_lora_file(file: _LoraFile) -> str:
    """Of the file's bytes; reckoned once. Raises `WeightsError` where it cannot be read, or changed since."""
    if not file.sha256:
        try:
            with file.path.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            changed = _stamp(file.path) != file.stamp
        except OSError as error:
            raise WeightsError(
                f"The LoRA {file.path.name} cannot be read ({error.strerror}): put its file back, or take it off."
            ) from error
        if changed:
            raise WeightsError(f"The LoRA {file.path.name} is being written to: run again when it is whole.")
        file.sha256 = found
    return file.sha256


def _likeness(wanted: str, known: str) -> float:
    return difflib.SequenceMatcher(None, wanted, known.lower()).ratio()
