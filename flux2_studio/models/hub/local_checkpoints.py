"""A user's own folder of checkpoint files, safetensors and GGUF: each recognised by its header, none read further.

A transformer becomes a checkpoint of its family, under its own name, with the family's text encoder and autoencoder.
The family is the one whose text encoder has the width that the file's `txt_in` reads; which of the family (distilled,
Base, KV) no tensor tells, so the words of the file's name decide.
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
# What tells a file's kind, first match first: a pattern, and what a file with such a key is.
KIND_PATTERNS: tuple[tuple[str, LocalFileKind], ...] = (
    (r"\.lora[_.](A|B|down|up)\b|\.lokr_|\.hada_|\.dora_scale$|\.diff$", "lora"),
    (r"^(txt_in|context_embedder)\.weight$", "transformer"),
    (r"^(encoder|decoder)\.(mid|mid_block|up|up_blocks)\.", "autoencoder"),
    (r"^decoder\.layers\.\d+\.", "tiny autoencoder"),
)
DTYPE_LABELS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "fp8"}  # others as they are


@dataclass(frozen=True, kw_only=True)
class LocalFile:
    """One file of the folder. `checkpoint` where it can be chosen; otherwise `reason` says in words why it cannot.

    A LoRA has neither: it can be chosen beside a checkpoint, see `models.loras`.
    """

    path: Path
    kind: LocalFileKind
    checkpoint: Checkpoint | None = None
    reason: str = ""


def add_local_checkpoints(settings: Settings) -> tuple[Settings, list[str]]:
    """`settings` with the checkpoints of its folder, and a sentence about every file there that is none.

    Raises `WeightsError` if the folder is not there, `RequestError` if the default checkpoint is in neither list.
    """
    if settings.checkpoints_dir is None:
        return settings, []
    files = find_local_files(settings.checkpoints_dir, settings.checkpoints)
    added = tuple(file.checkpoint for file in files if file.checkpoint is not None)
    settings = replace(settings, checkpoints=(*settings.checkpoints, *added))
    settings.checkpoint(settings.default_checkpoint)
    return settings, [file.reason for file in files if file.reason]


def find_local_files(folder: Path, known: Sequence[Checkpoint]) -> list[LocalFile]:
    """Every safetensors and GGUF file below `folder`, recognised, by name. Raises `WeightsError` for no such folder.

    known: the checkpoints that lend their text encoders and autoencoders.
    """
    if not folder.is_dir():
        raise WeightsError(
            f"FLUX2_CHECKPOINTS_DIR is {folder}, where there is no folder: make it, or unset the variable."
        )
    found = []
    names = {checkpoint.name for checkpoint in known}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in CHECKPOINT_SUFFIXES or not path.is_file():
            continue
        name = next(name for name in _iterate_checkpoint_names(path, folder) if name not in names)
        names.add(name)
        found.append(recognise_file(path, name, known))
    return found


def recognise_file(path: Path, name: str, known: Sequence[Checkpoint]) -> LocalFile:
    """What `path` is. A file that cannot be read is an unknown one, with the reason."""
    if problem := find_name_problem(path):
        return LocalFile(path=path, kind="unknown", reason=problem)
    # Torch takes seconds to import, and whoever has no folder of their own does not need it here.
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
    called = make_printable(path.name)
    if kind == "unknown":
        return LocalFile(
            path=path,
            kind="unknown",
            reason=f"{called} holds neither a FLUX.2 transformer, nor a LoRA or autoencoder.",
        )
    if kind != "transformer":
        reasons = {
            "lora": "",
            "autoencoder": f"{called} is an autoencoder: set AE_MODEL_PATH to it to use it with every checkpoint.",
            "tiny autoencoder": f"{called} draws previews: set TAEF2_MODEL_PATH to it.",
        }
        return LocalFile(path=path, kind=kind, reason=reasons[kind])
    shape = shapes.get("txt_in.weight", shapes.get("context_embedder.weight", ()))
    family = [checkpoint for checkpoint in known if len(shape) == 2 and checkpoint.context_width == shape[1]]
    if not family:
        widths = ", ".join(f"{width}" for width in sorted({checkpoint.context_width for checkpoint in known}))
        return LocalFile(
            path=path,
            kind="transformer",
            reason=f"{called} reads text of width {shape[-1] if shape else 'unknown'}, which no known text encoder "
            f"gives (known: {widths}).",
        )
    like = _closest_checkpoint(path, family)
    checkpoint = replace(
        like,
        name=name,
        label=f"{make_printable(path.stem)} ({_short(like.label)}, {_numbers(contents)})",
        good_for=f"Your own file, used as {like.label}: with its text encoder, steps and limits.",
        flow=Part(kind="flow", repo=None, path=str(path.absolute()), size=size),
        hidden_width=shape[0],
        licence="that of the file's maker",
    )
    return LocalFile(path=path, kind="transformer", checkpoint=checkpoint)


def find_name_problem(path: Path) -> str:
    """What is wrong with the name of a file that no page and no picture could tell of; empty where nothing is."""
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):  # bytes that are no text
        return f"The name of the file {path.name!a} is no text: rename it."
    return ""


def make_printable(text: str) -> str:
    """`text` in one line, whatever a file is called."""
    return "".join(letter if letter.isprintable() else "_" for letter in text)


def detect_file_kind(keys: Iterable[str]) -> LocalFileKind:
    """What a file with such keys is."""
    keys = list(keys)
    return next((kind for sign, kind in KIND_PATTERNS if any(re.search(sign, key) for key in keys)), "unknown")


def _iterate_checkpoint_names(path: Path, folder: Path) -> Iterator[str]:
    """Names for a checkpoint, until one is free: the file's, with its folders, with a number."""
    yield make_printable(path.stem)
    whole = make_printable(path.relative_to(folder).with_suffix("").as_posix())
    yield whole
    number = 2
    while True:
        yield f"{whole}-{number}"
        number += 1


def _closest_checkpoint(path: Path, family: Sequence[Checkpoint]) -> Checkpoint:
    """The one of `family` whose marks are all words of the file's name; the one with most marks, then the first."""
    words = set(re.split(r"[^a-z0-9]+", path.stem.lower()))
    fitting = [checkpoint for checkpoint in family if words.issuperset(checkpoint.name_keywords)]
    return max(fitting or family, key=lambda checkpoint: len(checkpoint.name_keywords))


def _numbers(contents: CheckpointContents) -> str:
    """The number format that most of the file's values are in."""
    count: dict[str, int] = {}
    for entry in contents.entries.values():
        count[entry.dtype] = count.get(entry.dtype, 0) + math.prod(entry.shape)
    most = max(count, key=lambda dtype: count[dtype])
    return DTYPE_LABELS.get(most, most)


def _short(label: str) -> str:
    return label.removeprefix("FLUX.2 ")
