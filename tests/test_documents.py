"""docs/ says what the code does: limits and commands of the tests, the tree, the files to edit."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import BROWSER_REPEATS, LIMIT, LIMITS, MARKERS
from tests.reporting import MAX_REPEATS

ROOT = Path(__file__).resolve().parent.parent
DEVELOPMENT = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NUMBERS = {"twice": 2, "three": 3}


def test_folders_and_limits() -> None:
    rows = re.findall(r"^\| (`\w+`|others) \| .+ \| (\d+) min \|$", DEVELOPMENT, re.MULTILINE)
    documented = {name.strip("`"): 60 * int(minutes) for name, minutes in rows}
    assert documented == {name: LIMITS.get(name, LIMIT) for name in MARKERS} | {"others": LIMIT}


def test_repeats() -> None:
    repeats = re.search(r"repeated, (\w+) at most", DEVELOPMENT)
    most = re.search(r"more than (\w+) in one run fail it", DEVELOPMENT)
    assert repeats and NUMBERS[repeats[1]] == BROWSER_REPEATS
    assert most and NUMBERS[most[1]] == MAX_REPEATS


def test_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", DEVELOPMENT))
    assert {"test", "test-all", "test-processors", "test-times", "lint"} <= commands <= targets


def test_links_and_folders_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", DEVELOPMENT + ARCHITECTURE):
        assert (ROOT / "docs" / target).resolve().is_file(), target
    for name in MARKERS:
        assert any(folder.is_dir() for folder in (ROOT / "tests").rglob(name)), name


def tree() -> list[str]:
    """The modules that the tree names, by their paths."""
    folders: list[str] = []
    found = []
    for line in filter(str.strip, ARCHITECTURE.split("```")[1].splitlines()):
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name.rstrip("/")]
        if name.endswith(".py"):
            found.append("/".join(folders))
    return found


def test_the_tree_names_every_module_once() -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flux2_studio").rglob("*.py")}
    listed = tree()
    assert len(listed) == len(set(listed))
    assert set(listed) == {path for path in modules if not path.split("/")[-1].startswith("__")} | {"app.py"}


def test_files_to_edit_exist() -> None:
    table = ARCHITECTURE.split("| to change | edit |")[1]
    names = re.findall(r"`([a-z0-9_/]+\.(?:py|css))`", table)
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).is_file() or (ROOT / "flux2_studio" / name).is_file(), name
