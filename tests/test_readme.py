"""The README says what is so: front matter, links, the table of cards, commands and sizes are compared with the code.

What the documents under docs/ say is compared in test_documents.py.
"""

from __future__ import annotations

import re
import shlex

from flux2_studio.checkpoints import CHECKPOINTS, GB, MB
from flux2_studio.cli import main as cli
from flux2_studio.settings import Settings
from tests.documents import (
    ROOT,
    check_links,
    example_commands,
    licence_problems,
    make_targets,
    memory_as_published,
    requirements,
    section,
    size_in_words,
)

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_BYTES = 10_000


def test_size() -> None:
    assert len(README.encode()) <= MAX_BYTES


def test_space_front_matter() -> None:
    start, matter, _ = README.split("---\n", 2)
    assert start == ""
    fields = dict(line.split(": ", 1) for line in matter.splitlines())
    assert fields["sdk"] == "gradio"
    assert fields["sdk_version"] == requirements()["gradio"]
    assert (ROOT / fields["app_file"]).is_file()
    assert fields["python_version"] == '"3.11"'
    assert fields["license"] == "apache-2.0"
    assert fields["suggested_hardware"]
    assert len(fields["short_description"]) <= 60
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {fields["colorFrom"], fields["colorTo"]} <= colours


def test_links() -> None:
    check_links(ROOT / "README.md")


def test_every_document_is_linked() -> None:
    linked = set(re.findall(r"\]\(docs/([a-z-]+\.md)\)", section(README, "Documents")))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_table_of_cards() -> None:
    rows = re.findall(r"^\| (.+) \|$", section(README, "Which checkpoint for my card"), re.MULTILINE)[1:]
    assert len(rows) == 5
    named: set[str] = set()
    for row in rows:
        _, choice, download, memory, licence = row.split(" | ")
        names = re.findall(r"`([a-z0-9-]+)`", choice)
        assert names
        named.update(names)
        for name in names:
            checkpoint = Settings(home=ROOT).checkpoint(name)
            assert download == size_in_words(checkpoint)
            assert not licence_problems(checkpoint, licence)
        assert memory in ("no figure", memory_as_published(names[0]))
    assert named == {checkpoint.name for checkpoint in CHECKPOINTS}


def test_size_of_nano() -> None:
    size = sum(path.stat().st_size for path in (ROOT / "assets" / "nano").rglob("*") if path.is_file())
    assert re.findall(r"\((\d+) MB\)", section(README, "State")) == [f"{size / MB:.0f}"]
    assert GB == 1000 * MB


def test_time_of_the_tests_is_the_one_measured() -> None:
    (time,) = re.findall(r"The tests took (\d+ min \d+ s) on two cores", README)
    measured = (ROOT / "benchmarks" / "results" / "tests.md").read_text(encoding="utf-8")
    assert f"{time} on 2 workers" in section(measured, "`make test`")


def test_commands_are_targets_of_the_makefile() -> None:
    commands = set(re.findall(r"`make ([a-z]+(?:-[a-z]+)*)", README))
    assert {"run", "test"} <= commands <= make_targets()


def test_example_commands_can_be_run() -> None:
    lines = example_commands(section(README, "Command line"))
    assert len(lines) >= 4
    for line in lines:
        options = cli.build_parser().parse_args(shlex.split(line))
        if options.run is cli.run_generate:
            Settings(home=ROOT).checkpoint(options.model)


def test_variables_exist() -> None:
    settings = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:FLUX2|HF|OPENROUTER)_[A-Z0-9_]+)", README))
    assert named and all(f"`{name}`" in settings for name in named)
