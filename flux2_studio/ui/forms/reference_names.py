"""Names of reference pictures: written as @name in the instruction, and replaced by "image 2" when it runs.

The picture's caption in the gallery stores its name: "image 2 · @fox". Models do not know names, so requests and saved
settings contain the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from flux2_studio.errors import RequestError
from flux2_studio.ui.gradio_compat.language import translate

MAX_REFERENCE_NAME_CHARS = 24  # per name
MAX_UNKNOWN_LISTED = 5  # per message
# Letters that continue a word. Not Chinese and Japanese ones, because nothing separates words there.
_LETTER = r"[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
_MENTION = re.compile(rf"(?<!{_LETTER})@(\w[\w-]*)")
_CAPTION = re.compile(r"image [0-9]{1,3} · @(\w[\w-]*)")

GalleryItems = Sequence[tuple[str, str | None]]  # a gallery's value: file and caption


def caption(number: int, name: str = "") -> str:
    """The caption of picture `number`."""
    return f"image {number} · @{name}" if name else f"image {number}"


def names_in(items: GalleryItems | None) -> dict[Path, str]:
    """The names in a gallery, by file. The browser sends the captions; any other caption is not a name."""
    found = ((Path(file), _CAPTION.fullmatch(text or "")) for file, text in items or ())
    return {path: match[1][:MAX_REFERENCE_NAME_CHARS] for path, match in found if match}


def parse_name(typed: str) -> str:
    """Convert `typed` to a name: "my fox" becomes my-fox, an empty text removes the name. Raises `RequestError`."""
    words = "-".join(typed.split()).lstrip("@")
    if not words:
        return ""
    if not re.fullmatch(r"\w[\w-]*", words):
        raise RequestError(translate("A name has letters, digits, - and _ only."))
    if len(words) > MAX_REFERENCE_NAME_CHARS:
        raise RequestError(translate("A name has at most {most} characters.", most=MAX_REFERENCE_NAME_CHARS))
    return words


def rename_reference(names: Mapping[Path, str], path: Path, typed: str) -> dict[Path, str]:
    """`names` with `typed` for the picture at `path`. Raises `RequestError` if another picture has this name."""
    name = parse_name(typed)
    others = {other: other_name for other, other_name in names.items() if other != path}
    if name and name.casefold() in map(str.casefold, others.values()):
        raise RequestError(translate("Another picture is called @{name} already.", name=name))
    return {**others, path: name} if name else others


def expand_names(prompt: str, items: GalleryItems | None) -> str:
    """`prompt` for the model: @fox becomes "image 2"."""
    # Longest first: @hat-box is not @hat. One group per name identifies it regardless of case.
    numbered_names = sorted(_numbered(items), key=lambda it: len(it[1]), reverse=True)
    if not numbered_names:
        return prompt
    alternatives = "|".join(f"({re.escape(name)})" for _, name in numbered_names)
    known = re.compile(rf"(?<!{_LETTER})@(?:{alternatives})(?!{_LETTER}|-\w)", re.IGNORECASE)
    return known.sub(lambda found: f"image {numbered_names[(found.lastindex or 1) - 1][0]}", prompt)


def unknown_names(spelled: str) -> list[str]:
    """The first few @names that remain in an instruction after `expand_names`."""
    return [f"@{name}" for name in dict.fromkeys(_MENTION.findall(spelled))][:MAX_UNKNOWN_LISTED]


def _numbered(items: GalleryItems | None) -> list[tuple[int, str]]:
    """(number, name) of the named pictures; for duplicates of a picture, the first number."""
    names = names_in(items)
    files = [Path(file) for file, _ in items or ()]
    return [(files.index(path) + 1, name) for path, name in names.items()]
