"""Which texts the page's sources hold: read from the code itself, so that no list of them can be out of date."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = sorted((ROOT / "flux2_studio").rglob("*.py"))
SCRIPTS = sorted((ROOT / "assets").glob("*.js"))
ATTRIBUTES = ("aria-label", "title", "placeholder")
VOID = {"input", "img", "br", "meta", "link"}
_SAY = re.compile(r"studioSay\(\s*'((?:[^'\\]|\\.)*)'")
_JOINED = re.compile(r"'\s*\+\s*'")


def constants() -> Iterator[str]:
    """Every string in the package; of an f-string, its text with {} in the place of what is computed."""
    for path in SOURCES:
        inside: set[int] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                inside |= {id(part) for part in ast.walk(node)}
                parts = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def called(*names: str) -> Iterator[str]:
    """The first argument of every call of one of `names`, where that is written out or one of its module's names."""
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
                first = node.args[0]
                found = named.get(first.id) if isinstance(first, ast.Name) else first
                if isinstance(found, ast.Constant) and isinstance(found.value, str):
                    yield found.value


def in_scripts() -> Iterator[str]:
    """What scripts ask `studioSay` for, in files and in Python's strings."""
    for text in (*(path.read_text(encoding="utf-8") for path in SCRIPTS), *constants()):
        for found in _SAY.finditer(_JOINED.sub("", text)):
            yield found[1].replace("\\'", "'")


def in_html() -> Iterator[str]:
    """The texts of elements that have `data-i18n`, as assets/language.js reads them."""
    for text in constants():
        if "data-i18n" in text and "studioSay" not in text:
            reader = _Marked()
            reader.feed(text)
            reader.close()
            yield from reader.found


class _Marked(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open: list[tuple[bool, list[str], int]] = []  # marked; the pieces of its text; its children so far

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if self._open:
            marked, pieces, children = self._open[-1]
            pieces.append(f"{{{children}}}")
            self._open[-1] = marked, pieces, children + 1
        if "data-i18n" in given:
            self.found += [str(given[name]) for name in ATTRIBUTES if given.get(name)]
        if tag not in VOID:
            self._open.append(("data-i18n" in given, [], 0))

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][1].append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID or not self._open:
            return
        marked, pieces, _ = self._open.pop()
        texts = [piece for piece in pieces if piece.strip() and not re.fullmatch(r"\{\d\}", piece)]
        if marked and texts:
            sentence = "".join(pieces) if len(texts) > 1 else texts[0]
            self.found.append(" ".join(sentence.split()))
