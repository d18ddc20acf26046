"""Prompts that stand for many."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux2_studio.errors import RequestError
from flux2_studio.explore.variants import Wildcards, expand_prompt


@pytest.fixture
def lists(tmp_path: Path) -> Wildcards:
    (tmp_path / "cats").mkdir()
    (tmp_path / "animal.txt").write_text("# those that live here\nfox\n\n  owl \n", encoding="utf-8")
    (tmp_path / "cats" / "big.txt").write_text("a {lion}\ntiger|puma", encoding="utf-8")
    return Wildcards(tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a fox", ["a fox"]),
        ("a {red|green} fox", ["a red fox", "a green fox"]),
        ("{a|b}{c|d}", ["ac", "ad", "bc", "bd"]),
        ("a {big |}fox", ["a big fox", "a fox"]),
        ("{a|{b|c} d}", ["a", "b d", "c d"]),
        ("{a|a}", ["a"]),
        ("{subject} in snow", ["{subject} in snow"]),
        ('{"scene": {"colour": "{red|blue}"}}', ['{"scene": {"colour": "red"}}', '{"scene": {"colour": "blue"}}']),
        ("this | that", ["this | that"]),
        (r"\{a\|b\} \_\_animal\_\_", ["{a|b} __animal__"]),
        ("a } b {x|y}", ["a } b x", "a } b y"]),
        ("a { b", ["a { b"]),
        ("an __animal__", ["an fox", "an owl"]),
        ("__cats/big__", ["a {lion}", "tiger|puma"]),
        ("{one|__animal__}", ["one", "fox", "owl"]),
        ("__nothing__ and ____ and __", ["__nothing__ and ____ and __"]),
        ("snake_case __", ["snake_case __"]),
        ("狐 {赤|白}\n{é|ü}", ["狐 赤\né", "狐 赤\nü", "狐 白\né", "狐 白\nü"]),
    ],
)
def test_what_a_prompt_stands_for(lists: Wildcards, text: str, found: list[str]) -> None:
    assert list(expand_prompt(text, lists)) == found


def test_an_open_brace_that_chooses_is_told(lists: Wildcards) -> None:
    with pytest.raises(RequestError, match="does not close"):
        expand_prompt("a {red|green fox", lists)


@pytest.mark.parametrize("text", ["{a|b}" * 9, "{" + "|".join(map(str, range(401))) + "}", "{a|b}" * 5000])
def test_too_many_are_told_before_they_are_made(lists: Wildcards, text: str) -> None:
    with pytest.raises(RequestError, match="more than 400"):
        expand_prompt(text, lists)


def test_braces_without_end(lists: Wildcards) -> None:
    with pytest.raises(RequestError, match="inside each other"):
        expand_prompt("{" * 3000 + "a|b" + "}" * 3000, lists)


def test_lists_are_listed(lists: Wildcards) -> None:
    assert lists.names() == ["animal", "cats/big"]


@pytest.mark.parametrize("name", ["../animal", "/etc/passwd", "cats/../animal", "", "animal.txt"])
def test_names_that_lead_elsewhere(lists: Wildcards, name: str) -> None:
    assert lists.entries(name) is None


def test_lists_that_are_none(lists: Wildcards) -> None:
    (lists.folder / "empty.txt").write_text("# nothing\n")
    (lists.folder / "odd.txt").write_bytes(b"\xff\xfe\x00")
    (lists.folder / "huge.txt").write_text("x\n" * 600_000)
    for name, told in (("empty", "is empty"), ("odd", "UTF-8"), ("huge", "1 MB")):
        with pytest.raises(RequestError, match=told):
            expand_prompt(f"__{name}__", lists)
