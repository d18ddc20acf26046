"""Prompts that expand to many: `a {red|green} fox in __place__`.

`{a|b}` is each of its parts, which may be empty and may be nested. Braces without `|` have no meaning, so that JSON
prompts are unchanged. `__name__` is each line of the file `name.txt` in the wildcards folder, if that exists. A
backslash escapes `{`, `|`, `}`, `_` and itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from flux2_studio.errors import RequestError

MAX_CELLS = 400  # limit of the pictures of an exploration, and of the prompts of a text
MAX_WILDCARD_FILE_BYTES = 1_000_000  # of one file
MAX_BRACE_DEPTH = 20  # nested braces

_TOKEN = re.compile(r"\\[{}|_\\]|[{}|]|__[\w-]+(?:/[\w-]+)*__|[^\\{}|_]+|.", re.DOTALL)
Choices = list[tuple[str, ...]]  # the alternatives of each part of a text, in order


class Wildcards:
    """The lists in `folder`, with one entry per line: `animal.txt`, or `animals/cat.txt` for `__animals/cat__`.

    Blank lines and lines that start with `#` are skipped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Return the names of all lists, sorted."""
        files = (path for path in self.folder.rglob("*.txt") if path.is_file())
        return sorted(path.relative_to(self.folder).with_suffix("").as_posix() for path in files)

    def entries(self, name: str) -> tuple[str, ...] | None:
        """Return the entries of list `name`, or None if there is none. Raises `RequestError` for an invalid file."""
        if not re.fullmatch(r"[\w-]+(/[\w-]+)*", name):
            return None
        path = self.folder / f"{name}.txt"
        try:
            if not path.is_file():
                return None
            if path.stat().st_size > MAX_WILDCARD_FILE_BYTES:
                raise RequestError(f"The wildcards file {name}.txt is larger than 1 MB: shorten it.")
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"The wildcards file {name}.txt cannot be read as UTF-8 text: save it so.") from error
        entries = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
        if not entries:
            raise RequestError(f"The wildcards file {name}.txt is empty: write an entry a line.")
        return entries


def expand_prompt(text: str, wildcards: Wildcards, most: int = MAX_CELLS) -> tuple[str, ...]:
    """Return all prompts that `text` stands for, the last part varying fastest; `text` alone if nothing expands.

    Entries of wildcards are not expanded further. Raises `RequestError` for more than `most` prompts.
    """
    tokens = _TOKEN.findall(text)
    options, position = _alternatives(tokens, 0, wildcards, most, depth=0)
    while position < len(tokens):  # an unmatched }
        rest, position = _alternatives(tokens, position + 1, wildcards, most, depth=0)
        options = _combine([options, ("}",), rest], most)
    return tuple(dict.fromkeys(options))


def _alternatives(
    tokens: Sequence[str], position: int, wildcards: Wildcards, most: int, depth: int
) -> tuple[tuple[str, ...], int]:
    """Expand the tokens from `position` to the `}` of this depth, or to the end; return the texts and the index of that
    end."""
    if depth > MAX_BRACE_DEPTH:
        raise RequestError(f"The prompt has more than {MAX_BRACE_DEPTH} braces inside each other: take some out.")
    branches: list[Choices] = [[]]
    while position < len(tokens) and tokens[position] != "}":
        token = tokens[position]
        position += 1
        if token == "|":
            if depth:
                branches.append([])
            else:
                branches[-1].append(("|",))
        elif token == "{":
            nested, end = _alternatives(tokens, position, wildcards, most, depth + 1)
            if end < len(tokens):
                branches[-1].append(nested)
                position = end + 1
            elif _has_choice(tokens[position:]):
                raise RequestError("The prompt opens a { that it does not close: close it, or write \\{ for a brace.")
            else:
                branches[-1].append(("{",))
        elif len(token) == 2 and token[0] == "\\":
            branches[-1].append((token[1],))
        elif token.startswith("__") and len(token) > 4 and (entries := wildcards.entries(token[2:-2])):
            branches[-1].append(entries)
        else:
            branches[-1].append((token,))
    texts = tuple(text for branch in branches for text in _combine(branch, most))
    if depth and len(branches) == 1:  # braces without | are literal
        texts = tuple(f"{{{text}}}" for text in texts)
    if len(texts) > most:
        raise _too_many(most)
    return texts, position


def _has_choice(tokens: Sequence[str]) -> bool:
    """Return whether the text after an unclosed { has a | at the same depth."""
    depth = 0
    for token in tokens:
        depth += {"{": 1, "}": -1}.get(token, 0)
        if token == "|" and depth == 0:
            return True
    return False


def _combine(parts: Choices, most: int) -> tuple[str, ...]:
    count = 1
    for part in parts:
        count *= len(part)
        if count > most:
            raise _too_many(most)
    return tuple("".join(chosen) for chosen in itertools.product(*parts))


def _too_many(most: int) -> RequestError:
    return RequestError(f"The prompt stands for more than {most} prompts: take some choices out of it.")
