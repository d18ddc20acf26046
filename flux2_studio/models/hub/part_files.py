"""Lists which files make up a part, in a repository or a user's folder, and checks whether they are complete.

Includes only files that the studio reads: safetensors, never pickles, and only one copy from repositories that contain
the weights twice (Mistral's `consolidated.safetensors`). Uses no network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from flux2_studio.checkpoints import Part
from flux2_studio.errors import WeightsError

WEIGHT_FILES = ("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "config.json",  # transformers derives the tokenizer class from it
)
VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))  # a tokenizer needs one


@dataclass(frozen=True, kw_only=True)
class PartFiles:
    """A part on disk: `weights` is a file or a folder; `tokenizer` is the folder of a text part's tokenizer."""

    weights: Path
    tokenizer: Path | None


@dataclass(frozen=True, kw_only=True)
class RepoSelection:
    """Files of one repository. path: a file or a folder ("" for the root). patterns: match paths in the repository."""

    repo: str
    path: str
    patterns: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.repo}/{self.path}".rstrip("/")

    def filter_names(self, names: Iterable[str]) -> list[str]:
        """Returns those of `names` (paths in the repository) that belong to the selection."""
        return [name for name in names if any(_matches(name, pattern) for pattern in self.patterns)]


def select_repo_files(part: Part) -> tuple[RepoSelection, ...]:
    """Returns the hub files of `part`. A text part has two selections: weights, then tokenizer."""
    assert part.repo is not None
    if part.kind != "text":
        return (RepoSelection(repo=part.repo, path=part.path, patterns=(part.path,)),)
    repo, folder = part.tokenizer or (None, part.path)
    return (
        _select_from_folder(part.repo, part.path, WEIGHT_FILES),
        _select_from_folder(repo or part.repo, folder, TOKENIZER_FILES),
    )


def _select_from_folder(repo: str, folder: str, files: tuple[str, ...]) -> RepoSelection:
    return RepoSelection(
        repo=repo, path=folder, patterns=tuple(f"{folder}/{file}" if folder else file for file in files)
    )


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def has_weights(folder: Path) -> bool:
    """Returns whether all shards are in `folder`. The index lists even those that an unfinished download lacks."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return bool(shards) and all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() and any(
        all((folder / name).is_file() for name in files) for files in VOCABULARIES
    )


def find_local_copy(part: Part, path: Path) -> PartFiles:
    """Returns the user's copy of `part` at `path`, the value of its `path_variable`. Raises `WeightsError`."""
    assert part.path_variable is not None
    return (
        _find_local_text_encoder(part.path_variable, path)
        if part.kind == "text"
        else _find_local_weights(part.path_variable, path)
    )


def _find_local_weights(variable: str, path: Path) -> PartFiles:
    if not path.exists():
        raise WeightsError(
            f"{variable} points to {path}, where there is nothing: set it to a .safetensors file or to the folder that "
            f"holds it, or unset it."
        )
    return PartFiles(weights=path, tokenizer=None)


def _find_local_text_encoder(variable: str, path: Path) -> PartFiles:
    """Accepts a text encoder's folder with the tokenizer in it or next to it, or a folder with both as subfolders.

    Tries the subfolder text_encoder first, because a FLUX.2 repository has the transformer's safetensors at its root.
    """
    if not path.is_dir():
        raise WeightsError(
            f"{variable} points to {path}, where there is no folder: set it to the folder that holds the text "
            f"encoder's config.json, .safetensors files and tokenizer, or unset it."
        )
    candidates = (path / "text_encoder", path)
    weights = next(
        (folder for folder in candidates if (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))),
        None,
    )
    if weights is None:
        raise WeightsError(
            f"{variable} points to {path}, where there is no config.json with .safetensors files beside it, nor in "
            f"text_encoder/ in it: set it to the text encoder's folder, or unset it."
        )
    tokenizer_candidates = (weights, weights / "tokenizer", weights.parent / "tokenizer")
    tokenizer = next((folder for folder in tokenizer_candidates if has_tokenizer(folder)), None)
    if tokenizer is None:
        raise WeightsError(
            f"{variable} points to {path}, which has no tokenizer: put its tokenizer.json and tokenizer_config.json "
            f"into {weights}, or into a folder called tokenizer beside it."
        )
    return PartFiles(weights=weights, tokenizer=tokenizer)
