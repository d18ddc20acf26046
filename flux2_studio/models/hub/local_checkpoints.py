"""Recognises the files of a user's checkpoint folder, safetensors and GGUF, by their headers alone.

A transformer file becomes a checkpoint with its own name and the text encoder and autoencoder of its family. The family
is the set of checkpoints whose text encoder has the width of the file's `txt_in`. No tensor distinguishes its members
(distilled, Base, KV), so the words of the file name decide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux2_studio.checkpoints import Checkpoint, Part
from flux2_studio.errors import WeightsError
from flux2_studio.settings import Settings

if TYPE_CHECKING:
    from flux2_studio.engine.weights.formats import CheckpointContents

LocalFileKind = Literal["transformer", "lora", "autoencoder", "tiny autoencoder", "unknown"]

CHECKPOINT_SUFFIXES = (".safetensors", ".gguf")
# Patterns of tensor names that determine a file's kind. The first match wins.
KIND_PATTERNS: tuple[tuple[str, LocalFileKind], ...] = (
    (r"\.lora[_.](A|B|down|up)\b|\.lokr_|\.hada_|\.dora_scale$|\.diff$", "lora"),
    (r"^(txt_in|context_embedder)\.weight$", "transformer"),
    (r"^(encoder|decoder)\.(mid|mid_block|up|up_blocks)\.", "autoencoder"),
    (r"^decoder\.layers\.\d+\.", "tiny autoencoder"),
)
DTYPE_LABELS = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "fp8",
}  # other names are shown unchanged


@dataclass(frozen=True, kw_only=True)
class LocalFile:
    """One file of the folder. It has a `checkpoint` if it can be chosen, otherwise a `reason` for the user.

    A LoRA has neither, since it is chosen separately, see `models.loras`.
    """

    path: Path
    kind: LocalFileKind
    checkpoint: Checkpoint | None = None
    reason: str = ""


def add_local_checkpoints(settings: Settings) -> tuple[Settings, list[str]]:
    """Returns `settings` with the checkpoints of its folder added, and a sentence for every unusable file.

    Raises `WeightsError` if the folder does not exist, `RequestError` if the default checkpoint is in neither list.
    """
    if settings.checkpoints_dir is None:
        return settings, []
    files = find_local_files(settings.checkpoints_dir, settings.checkpoints)
    added = tuple(file.checkpoint for file in files if file.checkpoint is not None)
    settings = replace(settings, checkpoints=(*settings.checkpoints, *added))
    settings.checkpoint(settings.default_checkpoint)
    return settings, [file.reason for file in files if file.reason]


def find_local_files(folder: Path, known: Sequence[Checkpoint]) -> list[LocalFile]:
    """Recognises every safetensors and GGUF file below `folder`, in path order.

    known: the checkpoints whose text encoders and autoencoders can be used. Raises `WeightsError` if the folder does
    not exist.
    """
    if not folder.is_dir():
        raise WeightsError(
            f"FLUX2_CHECKPOINTS_DIR is {folder}, where there is no folder: make it, or unset the variable."
        )
    local_files = []
    names = {checkpoint.name for checkpoint in known}
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if is_hidden or path.suffix.lower() not in CHECKPOINT_SUFFIXES or not path.is_file():
            continue
        name = next(name for name in _iterate_checkpoint_names(path, folder) if name not in names)
        names.add(name)
        local_files.append(recognise_file(path, name, known))
    return local_files


def recognise_file(path: Path, name: str, known: Sequence[Checkpoint]) -> LocalFile:
    """Recognises the file `path`. An unreadable file gets the kind "unknown" with a reason."""
    if problem := find_name_problem(path):
        return LocalFile(path=path, kind="unknown", reason=problem)
    # Imported late: torch takes seconds to import and is not needed without a checkpoint folder.
    from flux2_studio.engine.weights.formats import COMFYUI_PREFIXES, open_checkpoint_contents

    try:
        size = path.stat().st_size
        contents = open_checkpoint_contents(path, prefixes=COMFYUI_PREFIXES)
    except WeightsError as error:
        return LocalFile(path=path, kind="unknown", reason=make_printable(str(error)))
    except OSError:
        reason = f"{make_printable(path.name)} went while it was looked at: put it back and start again to use it."
        return LocalFile(path=path, kind="unknown", reason=reason)
    shapes = contents.shapes
    kind = detect_file_kind(shapes)
    label = make_printable(path.name)
    if kind == "unknown":
        return LocalFile(
            path=path,
            kind="unknown",
            reason=f"{label} holds neither a FLUX.2 transformer, nor a LoRA or autoencoder.",
        )
    if kind != "transformer":
        reasons = {
            "lora": "",
            "autoencoder": f"{label} is an autoencoder: set AE_MODEL_PATH to it to use it with every checkpoint.",
            "tiny autoencoder": f"{label} draws previews: set TAEF2_MODEL_PATH to it.",
        }
        return LocalFile(path=path, kind=kind, reason=reasons[kind])
    shape = shapes.get("txt_in.weight", shapes.get("context_embedder.weight", ()))
    family = [checkpoint for checkpoint in known if len(shape) == 2 and checkpoint.context_width == shape[1]]
    if not family:
        widths = ", ".join(f"{width}" for width in sorted({checkpoint.context_width for checkpoint in known}))
        return LocalFile(
            path=path,
            kind="transformer",
            reason=f"{label} reads text of width {shape[-1] if shape else 'unknown'}, which no known text encoder "
            f"gives (known: {widths}).",
        )
    closest = _closest_checkpoint(path, family)
    checkpoint = replace(
        closest,
        name=name,
        label=f"{make_printable(path.stem)} ({_shorten_label(closest.label)}, {_main_dtype_label(contents)})",
        good_for=f"Your own file, used as {closest.label}: with its text encoder, steps and limits.",
        flow=Part(kind="flow", repo=None, path=str(path.absolute()), size=size),
        hidden_width=shape[0],
        licence="that of the file's maker",
    )
    return LocalFile(path=path, kind="transformer", checkpoint=checkpoint)


def find_name_problem(path: Path) -> str:
    """Returns the problem of a file name that cannot be encoded as text, "" if there is none."""
    if any(
        "\ud800" <= letter <= "\udfff" for letter in str(path)
    ):  # surrogates stand for bytes that are not valid text
        return f"The name of the file {path.name!a} is no text: rename it."
    return ""


def make_printable(text: str) -> str:
    """Replaces non-printable characters, including line breaks, by underscores."""
    return "".join(letter if letter.isprintable() else "_" for letter in text)


def detect_file_kind(keys: Iterable[str]) -> LocalFileKind:
    """Returns the kind of a file with these tensor names."""
    keys = list(keys)
    return next((kind for pattern, kind in KIND_PATTERNS if any(re.search(pattern, key) for key in keys)), "unknown")


def _iterate_checkpoint_names(path: Path, folder: Path) -> Iterator[str]:
    """Yields candidate names for a checkpoint: the file name, its path in the folder, then numbered variants."""
    yield make_printable(path.stem)
    path_name = make_printable(path.relative_to(folder).with_suffix("").as_posix())
    yield path_name
    number = 2
    while True:
        yield f"{path_name}-{number}"
        number += 1


def _closest_checkpoint(path: Path, family: Sequence[Checkpoint]) -> Checkpoint:
    """Returns the checkpoint of `family` with the most `name_keywords`, all of them words of the file name."""
    words = set(re.split(r"[^a-z0-9]+", path.stem.lower()))
    matches = [checkpoint for checkpoint in family if words.issuperset(checkpoint.name_keywords)]
    return max(matches or family, key=lambda checkpoint: len(checkpoint.name_keywords))


def _main_dtype_label(contents: CheckpointContents) -> str:
    """Returns the dtype label of the largest number of values in the file."""
    count: dict[str, int] = {}
    for entry in contents.entries.values():
        count[entry.dtype] = count.get(entry.dtype, 0) + math.prod(entry.shape)
    most_common = max(count, key=lambda dtype: count[dtype])
    return DTYPE_LABELS.get(most_common, most_common)


def _shorten_label(label: str) -> str:
    return label.removeprefix("FLUX.2 ")
