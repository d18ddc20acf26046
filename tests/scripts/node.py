"""Runs tests of assets/*.js, which are written for node's test runner, as tests of pytest.

The node is the one that the `playwright` package brings along, so its version is pinned and nothing is installed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from playwright._impl._driver import compute_driver_executable

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent.parent / "assets"
LIMIT = 30  # seconds that one test may take
LIMIT_OF_ALL = 240
NAME = re.compile(r"""^test\((['"`])(.+?)\1,""", re.MULTILINE)


def listed_in(folder: Path) -> list[tuple[str, str]]:
    """The file and the name of every test in `folder`. A test is a line that begins with `test('name',`."""
    return [(file.name, name) for file in files_in(folder) for _, name in NAME.findall(file.read_text("utf-8"))]


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.test.mjs"))


def driver() -> tuple[Path, Path]:
    """Playwright's node and its package for node."""
    node, command = map(Path, compute_driver_executable())
    if not node.is_file():
        pytest.fail(f"The tests of the scripts need Playwright's node: {node} is missing. Install playwright again.")
    return node, command.parent / "index.mjs"


class Results:
    """What the tests in a folder said. They all run when the first is asked for; one that pytest repeats runs anew."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._unread: dict[tuple[str, str], str] | None = None
        self._broken = ""  # why no test says anything

    def expect_passed(self, file: str, name: str) -> None:
        if self._unread is None:
            self._unread = self._run(files_in(self._folder))
        if (file, name) not in self._unread and not self._broken:
            self._unread |= self._run([self._folder / file])
        error = self._broken or self._unread.pop((file, name))
        if error:
            pytest.fail(error, pytrace=False)

    def _run(self, files: list[Path]) -> dict[tuple[str, str], str]:
        """The error of each test, empty for one that passed."""
        node, package = driver()
        command = [
            str(node),
            "--test",
            "--test-isolation=none",
            f"--test-timeout={LIMIT * 1000}",
            f"--test-reporter={HERE / 'reporter.mjs'}",
            *map(str, files),
        ]
        environment = {**os.environ, "ASSETS": str(ASSETS), "PLAYWRIGHT": package.as_uri(), **self._environment}
        try:
            ended = subprocess.run(
                command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=LIMIT_OF_ALL
            )
        except subprocess.TimeoutExpired as error:
            self._broken = f"The tests of the scripts are not done after {LIMIT_OF_ALL} seconds:\n{error.stdout!r}"
            return {}
        said = [json.loads(line.removeprefix("RESULT ")) for line in ended.stdout.splitlines() if line[:7] == "RESULT "]
        errors = {(Path(one["file"]).name, one["name"]): str(one["error"]) for one in said}
        listed = {test for test in listed_in(self._folder) if test[0] in {file.name for file in files}}
        if set(errors) != listed or len(said) != len(listed):
            self._broken = (
                f"Listed but not run: {sorted(listed - set(errors))}.\n"
                f"Run but not listed: {sorted(set(errors) - listed)}.\n{ended.stdout}\n{ended.stderr}"
            )
        return errors
