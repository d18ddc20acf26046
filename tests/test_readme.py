"""The README says what is so: options, variables, files, versions and sizes are compared with the code."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from flux2_studio.checkpoints import CHECKPOINTS, GB
from flux2_studio.cli import main as cli
from flux2_studio.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    (_, found, text) = README.partition(f"\n## {title}\n")
    assert found, f"README has no section {title!r}"
    return text.partition("\n## ")[0]


def requirements() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(sign == "==" for _, sign, _ in pins), "every requirement is pinned"
    return {name: pin for name, _, pin in pins}


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = [action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


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


def test_links_to_files() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).is_file(), target


@pytest.mark.parametrize("name", ["generate", "ui"])
def test_options_are_documented_and_exist(name: str) -> None:
    options = {option for action in commands()[name]._actions for option in action.option_strings}
    text = section("Command line")
    documented = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", text))
    assert options - {"-h", "--help"} <= documented
    known = {option for parser in commands().values() for action in parser._actions for option in action.option_strings}
    assert documented <= known


def test_commands_for_models_are_documented_and_exist() -> None:
    (nested,) = [it for it in commands()["models"]._actions if isinstance(it, argparse._SubParsersAction)]
    assert set(re.findall(r"^\| `models (\w+)", section("Command line"), re.MULTILINE)) == set(nested.choices)


def test_example_commands_can_be_run() -> None:
    lines = re.findall(r"^\.venv/bin/python -m flux2_studio (.+)$", section("Command line"), re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        options = cli.build_parser().parse_args(shlex.split(line))
        if options.run is cli.run_generate:
            Settings(home=ROOT).checkpoint(options.model)


def test_variables_are_documented_and_exist() -> None:
    text = section("Settings")
    documented = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", text))
    overrides = {
        part.path_variable
        for checkpoint in CHECKPOINTS
        for part in (*checkpoint.parts, checkpoint.tiny_autoencoder)
        if part.path_variable
    }
    source = (ROOT / "flux2_studio" / "settings.py").read_text(encoding="utf-8")
    own = set(re.findall(r'"((?:FLUX2|OPENROUTER)_[A-Z0-9_]+)"', source))
    assert own
    assert {name for name in documented if not name.startswith("HF_")} == overrides | own


def test_checkpoint_table() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|(.+)\|$", section("Checkpoints and hardware"), re.MULTILINE)
    assert [name for name, _ in rows] == [checkpoint.name for checkpoint in CHECKPOINTS]
    for checkpoint, (_, row) in zip(CHECKPOINTS, rows, strict=True):
        _, steps, download, _, licence = (cell.strip() for cell in row.split("|"))
        fixed = f"{checkpoint.steps}, fixed"
        assert steps == (fixed if checkpoint.steps_fixed else f"{checkpoint.steps}, {checkpoint.guidance:.1f}")
        size = sum(part.size for part in checkpoint.parts)
        assert download == ("on board" if checkpoint.flow.repo is None else f"{size / GB:.0f} GB")
        assert ("gated" in licence) is checkpoint.gated


def test_dependencies_are_those_that_are_installed() -> None:
    listed = re.findall(r"^\| \[([A-Za-z0-9_-]+)\]", section("Dependencies"), re.MULTILINE)
    assert sorted(listed) == sorted(requirements())
