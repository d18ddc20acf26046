"""The documents as tests read them: sections, links, examples, and the tables that two documents share."""

from __future__ import annotations

import re
from pathlib import Path

from flux2_studio.checkpoints import GB, Checkpoint

ROOT = Path(__file__).resolve().parent.parent


def document(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    (_, found, rest) = text.partition(f"\n## {title}\n")
    assert found, f"there is no section {title!r}"
    return rest.partition("\n## ")[0]


def links(path: Path) -> list[str]:
    """The relative links and pictures of a document, without what stands in code blocks."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:", target)]


def anchors(path: Path) -> set[str]:
    """What a link may name in a document: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_links(path: Path) -> None:
    """Every relative link of a document names a file, or a folder where it ends in a slash, and a heading of it."""
    for link in links(path):
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        there = found.is_dir() if target.endswith("/") else found.is_file()
        assert there, f"{path.name} links to {target}, which does not exist"
        assert found.is_relative_to(ROOT), f"{path.name} links to {target}, outside of the repository"
        assert not anchor or anchor in anchors(found), f"{path.name} links to {link}, which has no such heading"


def example_commands(text: str) -> list[str]:
    """What follows the program's name in each example line, variables set before it left out."""
    return re.findall(r"^(?:[A-Z0-9_]+=\S+ )*\.venv/bin/python -m flux2_studio (.+)$", text, re.MULTILINE)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def checkpoint_rows() -> list[tuple[str, str]]:
    """Name and the other cells of each row of docs/checkpoints-and-memory.md."""
    return re.findall(
        r"^\| `([a-z0-9-]+)` \|(.+)\|$", section(document("checkpoints-and-memory.md"), "Checkpoints"), re.MULTILINE
    )


def size_in_words(checkpoint: Checkpoint) -> str:
    size = sum(part.size for part in checkpoint.parts)
    return "on board" if checkpoint.flow.repo is None else f"{size / GB:.0f} GB"


def licence_problems(checkpoint: Checkpoint, licence: str) -> list[str]:
    """What is wrong with the words of a table for `checkpoint`'s licence."""
    wrong = [] if ("gated" in licence) is checkpoint.gated else ["gated"]
    return wrong if ("non-commercial" in licence) is ("non-commercial" in checkpoint.licence) else [*wrong, "licence"]


def memory_as_published(name: str) -> str:
    """The memory that the table gives for checkpoint `name`, without what follows a colon."""
    return dict(checkpoint_rows())[name].split("|")[3].strip().partition(":")[0]


def pins(path: Path) -> dict[str, str]:
    """Name to version of a requirements file, all of them pinned."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [line.partition("==") for line in lines if line and not line.startswith(("#", "-r "))]
    assert all(sign == "==" for _, sign, _ in found), "every requirement is pinned"
    return {name: pin for name, _, pin in found}


def requirements() -> dict[str, str]:
    return pins(ROOT / "requirements.txt")
