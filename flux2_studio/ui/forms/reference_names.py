"""Names of reference pictures: given once, written as @name in the instruction, and read as "image 2" when it runs.

A name stands in the caption of its picture in the gallery, which is where it comes back from: "image 2 · @fox". The
model knows no names, so a request, and what is saved of it, has the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from flux2_studio.errors import RequestError
from flux2_studio.ui.gradio_compat.language import translate

MAX_REFERENCE_NAME_CHARS = 24  # characters of a name
MAX_UNKNOWN_LISTED = 5  # names that no picture has, in one message
# Letters that belong to the word before or behind: in Chinese and Japanese nothing stands between two words.
_LETTER = r"[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
_MENTION = re.compile(rf"(?<!{_LETTER})@(\w[\w-]*)")
_CAPTION = re.compile(r"image [0-9]{1,3} · @(\w[\w-]*)")

GalleryItems = Sequence[tuple[str, str | None]]  # a gallery's value: file and caption


def caption(number: int, name: str = "") -> str:
    """What stands under the picture of that `number`."""
    return f"image {number} · @{name}" if name else f"image {number}"


def names_in(items: GalleryItems | None) -> dict[Path, str]:
    """The names in a gallery, by file. What the captions say is the browser's word: anything else is no name."""
    found = ((Path(file), _CAPTION.fullmatch(text or "")) for file, text in items or ())
    return {path: match[1][:MAX_REFERENCE_NAME_CHARS] for path, match in found if match}


def parse_name(typed: str) -> str:
    """`typed` as a name: "my fox" is my-fox, and nothing takes the name away. Raises `RequestError`."""
    words = "-".join(typed.split()).lstrip("@")
    if not words:
        return ""
    if not re.fullmatch(r"\w[\w-]*", words):
        raise RequestError(translate("A name has letters, digits, - and _ only."))
    if len(words) > MAX_REFERENCE_NAME_CHARS:
        raise RequestError(translate("A name has at most {most} characters.", most=MAX_REFERENCE_NAME_CHARS))
    return words


def rename_reference(names: Mapping[Path, str], path: Path, typed: str) -> dict[Path, str]:
    """`names` with the picture at `path` called as `typed`. Raises `RequestError` where another one is called so."""
    name = parse_name(typed)
    others = {other: its for other, its in names.items() if other != path}
    if name and name.casefold() in map(str.casefold, others.values()):
        raise RequestError(translate("Another picture is called @{name} already.", name=name))
    return {**others, path: name} if name else others


def expand_names(prompt: str, items: GalleryItems | None) -> str:
    """`prompt` as the model is to read it: "image 2" for @fox."""
    # The longest first: @hat-box is no @hat. One group for each tells which one it was, however it is spelled.
    called = sorted(_numbered(items), key=lambda it: len(it[1]), reverse=True)
    if not called:
        return prompt
    any_of_them = "|".join(f"({re.escape(name)})" for _, name in called)
    known = re.compile(rf"(?<!{_LETTER})@(?:{any_of_them})(?!{_LETTER}|-\w)", re.IGNORECASE)
    return known.sub(lambda found: f"image {called[(found.lastindex or 1) - 1][0]}", prompt)


def unknown_names(spelled: str) -> list[str]:
    """The first few @names that are left in an instruction once all that are known are spelled out."""
    return [f"@{name}" for name in dict.fromkeys(_MENTION.findall(spelled))][:MAX_UNKNOWN_LISTED]


def _numbered(items: GalleryItems | None) -> list[tuple[int, str]]:
    """(number, name) of the pictures with one. Of the same picture twice, the first is meant."""
    names = names_in(items)
    files = [Path(file) for file, _ in items or ()]
    return [(files.index(path) + 1, name) for path, name in names.items()]
