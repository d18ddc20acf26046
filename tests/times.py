"""Prints, as a table in Markdown, where a run of the tests spent its time: `python -m tests.times [FOLDER]`.

FOLDER is where the run kept its times; without it, that of the last run but those of `make test-all`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from tests.reporting import RESULTS, file_of, minutes, seconds_by_file

LONG = 10.0  # seconds from which a file has a line of its own


def table(tests: dict[str, float]) -> str:
    """Seconds by folder of tests/, with the files that take longest; `tests` is seconds by test."""
    files = seconds_by_file(tests)
    folders: dict[str, Counter[str]] = {}
    for file, seconds in files.items():
        folder, _, name = file.removeprefix("tests/").rpartition("/")
        folders.setdefault(folder or "(top)", Counter())[name] = seconds  # type: ignore[assignment]
    count = Counter(file.removeprefix("tests/").rpartition("/")[0] or "(top)" for file in map(file_of, tests))
    lines = ["| folder | tests | seconds | files of 10 s and more |", "|---|---:|---:|---|"]
    for folder in sorted(folders, key=lambda it: -sum(folders[it].values())):
        long = [f"{name} {took:.0f}" for name, took in folders[folder].most_common() if took >= LONG]
        lines.append(f"| {folder} | {count[folder]} | {sum(folders[folder].values()):.0f} | {', '.join(long)} |")
    lines.append(f"| **all** | {len(tests)} | {sum(files.values()):.0f} | |")
    return "\n".join(lines)


def main() -> None:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else RESULTS) / "times.json"
    if not file.is_file():
        sys.exit(f"{file} is not there: run the tests first.")
    run = json.loads(file.read_text(encoding="utf-8"))
    print(table(run["tests"]))
    print(f"\n{minutes(run['wall'])} on {run['workers']} workers.")


if __name__ == "__main__":
    main()
