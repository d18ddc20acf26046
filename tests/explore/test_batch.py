"""Runs from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux2_studio.errors import RequestError
from flux2_studio.explore.batch import read_batch
from flux2_studio.request import Request

BASE = Request(prompt="base", checkpoint="nano-base", seed=5, steps=30, guidance=3.0, count=4)


def rows(tmp_path: Path, name: str, text: str) -> tuple[Request, ...]:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return read_batch(file, BASE)


def test_a_prompt_a_line(tmp_path: Path) -> None:
    found = rows(tmp_path, "a.txt", "a fox\n\n  an owl, at night \n")
    assert [(it.prompt, it.seed, it.count) for it in found] == [("a fox", 5, 1), ("an owl, at night", 5, 1)]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_a_table(tmp_path: Path, name: str, separator: str) -> None:
    text = "\ufeff" + "prompt,seed,guidance,width\n'a, fox',7,1.5,128\nan owl,,,\n".replace(",", separator)
    text = text.replace(f"'a{separator} fox'", '"a, fox"')
    first, second = rows(tmp_path, name, text)
    assert (first.prompt, first.seed, first.guidance, first.width) == ("a, fox", 7, 1.5, 128)
    assert (second.prompt, second.seed, second.guidance, second.width) == ("an owl", 5, 3.0, None)


def test_objects(tmp_path: Path) -> None:
    first, second = rows(tmp_path, "a.jsonl", '{"prompt": "x", "seed": 1}\n\n{"prompt": "y", "checkpoint": "nano"}\n')
    assert (first.seed, first.steps) == (1, 30)
    assert (second.checkpoint, second.steps, second.guidance) == ("nano", None, None)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", '{"prompt": "x", "references": ["/etc/passwd"]}', "Row 1: there is no field 'references'"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": 3}', "Row 2"),
        ("a.jsonl", '{"prompt": "x", "seed": "7"}', "Row 1: seed must be a whole number"),
        ("a.jsonl", "[1]", "write an object"),
        ("a.jsonl", "[" * 100_000, "no JSON"),
        ("a.csv", "text,seed\nx,1\n", "`prompt`"),
        ("a.csv", "prompt,prompt\nx,1\n", "same name"),
        ("a.csv", "prompt,seed\nx,one\n", "Row 2: seed is 'one'"),
        ("a.csv", "prompt,seed\nx,1,2\n", "more cells"),
        ("a.csv", "prompt,mood\nx,good\n", "no field 'mood'"),
        ("a.txt", "\n\n", "nothing in the file"),
        ("a.txt", "x\n" * 401, "401 rows"),
        ("a.txt", "x" * 2_100_000, "2 MB"),
        ("a.exe", "x", "ends in"),
    ],
)
def test_what_is_no_batch(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        rows(tmp_path, name, text)


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RequestError, match="UTF-8"):
        read_batch(tmp_path / "a.txt", BASE)
