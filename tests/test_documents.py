"""docs/ says what the code does: links, options, variables, tables, figures, the tree, and limits of the tests."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from flux2_studio.checkpoints import CHECKPOINTS
from flux2_studio.cli import main as cli
from flux2_studio.settings import Settings
from tests.conftest import BROWSER_REPEATS, LIMIT, LIMITS, MARKERS
from tests.documents import (
    ROOT,
    check_links,
    checkpoint_rows,
    document,
    example_commands,
    licence_problems,
    make_targets,
    pins,
    requirements,
    section,
    size_in_words,
)
from tests.reporting import MAX_REPEATS

DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
SOURCES = [ROOT / "app.py", *sorted((ROOT / "flux2_studio").rglob("*.py"))]
NUMBERS = {"twice": 2, "three": 3}


DEVELOPMENT = document("development.md")
ARCHITECTURE = document("architecture.md")
COMMAND_LINE = document("command-line.md")
SETTINGS = document("settings.md")
DEPENDENCIES = document("dependencies.md")
INTERNALS = document("internals.md")


# --- every document --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links(path: Path) -> None:
    check_links(path)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_example_commands_of_every_document_can_be_run(path: Path) -> None:
    for line in example_commands(path.read_text(encoding="utf-8")):
        cli.build_parser().parse_args(shlex.split(line))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_make_commands_of_every_document_exist(path: Path) -> None:
    assert set(re.findall(r"`make ([a-z]+(?:-[a-z]+)*)", path.read_text(encoding="utf-8"))) <= make_targets()


# --- command-line.md -------------------------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = [action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


@pytest.mark.parametrize("name", sorted(commands()))
def test_options_are_documented_and_exist(name: str) -> None:
    options = {option for action in commands()[name]._actions for option in action.option_strings}
    documented = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", COMMAND_LINE))
    assert options - {"-h", "--help"} <= documented
    known = {option for parser in commands().values() for action in parser._actions for option in action.option_strings}
    assert documented <= known


def test_options_of_generate_are_rows_of_its_table() -> None:
    options = {option for action in commands()["generate"]._actions for option in action.option_strings}
    first = re.findall(r"^\| (`--.+?) \| ", section(COMMAND_LINE, "generate"), re.MULTILINE)
    assert set(re.findall(r"`(--[a-z-]+)", " ".join(first))) == options - {"-h", "--help"}


def test_commands_are_documented_and_exist() -> None:
    rows = re.findall(r"^\| `([a-z-]+)[` ]", section(COMMAND_LINE, "Other commands"), re.MULTILINE)
    assert set(rows) | {"generate"} == set(commands())


def test_commands_for_models_are_documented_and_exist() -> None:
    (nested,) = [it for it in commands()["models"]._actions if isinstance(it, argparse._SubParsersAction)]
    assert set(re.findall(r"^\| `models (\w+)", COMMAND_LINE, re.MULTILINE)) == set(nested.choices)


def test_example_commands_can_be_run() -> None:
    lines = example_commands(COMMAND_LINE)
    assert len(lines) >= 4
    for line in lines:
        options = cli.build_parser().parse_args(shlex.split(line))
        if options.run is cli.run_generate:
            Settings(home=ROOT).checkpoint(options.model)


# --- settings.md -----------------------------------------------------------------------------------------------------


def settings_source() -> str:
    return (ROOT / "flux2_studio" / "settings.py").read_text(encoding="utf-8")


def own_variables() -> set[str]:
    return set(re.findall(r'"((?:FLUX2|OPENROUTER)_[A-Z0-9_]+)"', settings_source()))


def local_copy_variables() -> set[str]:
    return {
        part.path_variable
        for checkpoint in CHECKPOINTS
        for part in (*checkpoint.parts, checkpoint.tiny_autoencoder)
        if part.path_variable
    }


def test_variables_are_documented_and_exist() -> None:
    documented = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", SETTINGS))
    own = own_variables()
    assert own
    of_others = set(re.findall(r'setdefault\("(\w+)"', settings_source())) | {"SPACE_ID"}
    assert all(f'"{name}"' in settings_source() for name in of_others)
    values = {"PASSIVE"}
    hub = {"HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT"}
    assert documented - values == own | local_copy_variables() | of_others | hub


def test_each_variable_is_a_row_of_its_table() -> None:
    def rows(title: str) -> list[str]:
        cells = re.findall(r"^\| (`.+?) \| ", section(SETTINGS, title), re.MULTILINE)
        return re.findall(r"`([A-Z0-9_]+)`", " ".join(cells))

    for title, expected in (("Settings of the studio", own_variables()), ("Local copies", local_copy_variables())):
        assert len(rows(title)) == len(set(rows(title)))
        assert set(rows(title)) == expected


def test_defaults_of_variables() -> None:
    """The default column, for each variable whose default is a word."""
    table = section(SETTINGS, "Settings of the studio")
    documented = {name: cell.strip() for name, cell in re.findall(r"^\| `(\w+)` \|(.*?)\| ", table, re.MULTILINE)}
    settings = Settings(home=ROOT)
    fields = {
        "FLUX2_CHECKPOINT": settings.default_checkpoint,
        "FLUX2_DEVICE": settings.device,
        "FLUX2_DTYPE": settings.dtype,
        "FLUX2_QUANTIZE": settings.quantize,
        "FLUX2_COMPILE": settings.compile,
        "FLUX2_GRAPHS": settings.graphs,
        "FLUX2_PREVIEW": settings.preview,
        "FLUX2_TEXT_ENCODER_FOR": settings.text_encoder_for,
        "FLUX2_UPSAMPLE": settings.upsample,
        "FLUX2_OPENROUTER_URL": settings.openrouter_url,
        "FLUX2_SAFETY": settings.safety,
    }
    assert {name: documented[name] for name in fields} == fields


# --- checkpoints-and-memory.md ---------------------------------------------------------------------------------------


def test_checkpoint_table() -> None:
    rows = checkpoint_rows()
    assert [name for name, _ in rows] == [checkpoint.name for checkpoint in CHECKPOINTS]
    for checkpoint, (_, row) in zip(CHECKPOINTS, rows, strict=True):
        _, steps, download, _, licence = (cell.strip() for cell in row.split("|"))
        fixed = f"{checkpoint.steps}, fixed"
        assert steps == (fixed if checkpoint.steps_fixed else f"{checkpoint.steps}, {checkpoint.guidance:.1f}")
        assert download == size_in_words(checkpoint)
        assert not licence_problems(checkpoint, licence)


# --- dependencies.md -------------------------------------------------------------------------------------------------


def dependency_rows(text: str) -> list[tuple[str, list[str]]]:
    rows = re.findall(r"^\| \[([A-Za-z0-9_-]+)\]\(https://\S+\) \| (.+) \|$", text, re.MULTILINE)
    return [(name, cells.split(" | ")) for name, cells in rows]


def test_dependencies_are_those_that_are_installed() -> None:
    studio, _, tests = DEPENDENCIES.partition("\n## What the tests need\n")
    for text, file in ((studio, "requirements.txt"), (tests, "tests/requirements.txt")):
        rows = dependency_rows(text)
        assert sorted(name for name, _ in rows) == sorted(pins(ROOT / file))
        assert all(len(cells) == 2 and all(cells) for _, cells in rows), "a reason and a licence"


# --- benchmarks.md ---------------------------------------------------------------------------------------------------

FIGURES = {  # row -> where its report has it
    "Live: last key to the picture": ("last keystroke to picture",),
    "a picture of 128 x 128": ("seconds", "128 x 128"),
    "an edit of 128 x 128": ("seconds", "edit, 128 x 128"),
    "a picture of 512 x 512": ("seconds", "512 x 512"),
    "opening History": ("seconds", "opening"),
    "a search that finds many": ("seconds", "a search that finds many"),
    "the watermark of 1024 x 1024": ("seconds, 1024 x 1024, verified",),
    "NudeNet on 1024 x 1024": ("seconds", "NudeNet, both looks"),
}


def test_figures_are_those_of_the_reports() -> None:
    table = section(document("benchmarks.md"), "Figures")
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| `(.+?)` \| \[.+?\]\((.+?)\) \|$", table, re.MULTILINE)
    assert len(rows) == len(FIGURES)
    for (what, figure, _, target), (start, place) in zip(rows, FIGURES.items(), strict=True):
        assert what.startswith(start)
        report: Any = json.loads((ROOT / "docs" / target).read_text(encoding="utf-8"))
        assert report["machine"]["cores"] == 2
        median = reduce(lambda found, key: found[key], place, report)["median"]
        digits = len(figure.partition(".")[2])
        assert f"{median:.{digits}f}" == figure, what


def test_the_watermark_survives_and_takes_what_is_written() -> None:
    text = document("provenance-and-safety.md")
    report = json.loads((ROOT / "benchmarks" / "results" / "watermark.json").read_text(encoding="utf-8"))
    (seconds,) = re.findall(r"takes ([\d.]+) s for 1024 x 1024 on two cores", text)
    assert f"{report['seconds, 1024 x 1024, verified']['median']:.1f}" == seconds
    (quality,) = re.findall(r"survives JPEG at quality (\d+) on photographs", text)
    assert report["groups"]["photographs"]["match"][f"JPEG {quality}"] == [1.0, 1.0]


def test_benchmarks_that_are_named_exist() -> None:
    named = set(re.findall(r"`python -m ([a-z.]+)", document("benchmarks.md")))
    assert len(named) > 4
    for name in named:
        assert ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file(), name


# --- using.md --------------------------------------------------------------------------------------------------------


def test_the_example_preset_is_one(tmp_path: Path) -> None:
    from flux2_studio.storage.presets import PRESET_FIELDS, read_preset

    text = section(document("using.md"), "Presets")
    file = tmp_path / "example.json"
    file.write_text(text.split("```json\n")[1].partition("```")[0], encoding="utf-8")
    assert read_preset(file).takes_subject
    (fields,) = re.findall(r"`request` may\nhold these fields: (.+?)\. It", text, re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", fields)) == PRESET_FIELDS


# --- internals.md ----------------------------------------------------------------------------------------------------

INNER_MODULES = ("gradio", "huggingface_hub")  # whose modules below the top are listed, except these
PUBLIC_MODULES = ("gradio.themes", "gradio.components", "huggingface_hub.errors")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(path: Path) -> Iterator[str]:
    """What `path` uses of libraries that is private by its name, or stands in a module that is not the top one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("flux2_studio"):
            inner = node.module.split(".")[0] in INNER_MODULES and "." in node.module
            for name in (alias.name for alias in node.names):
                if inner and not node.module.startswith(PUBLIC_MODULES):
                    yield name
                yield from (part for part in (*node.module.split("."), name) if is_private(part))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                continue
            yield node.attr


def internals_rows() -> list[tuple[str, str, str]]:
    """What, where and tests of each row."""
    rows = [line.strip("| ").split(" | ") for line in INTERNALS.splitlines() if line.startswith("| ")]
    assert all(len(row) == 4 for row in rows)
    return [(what, where, tests) for what, where, _, tests in rows if where != "where"]


def test_private_names_of_libraries_are_listed() -> None:
    listed: dict[str, set[str]] = {}
    for what, where, _ in internals_rows():
        for path in re.findall(r"`([\w/.]+)`", where):
            listed.setdefault(path, set()).update(re.findall(r"\w+", what))
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        missing = set(private_names(path)) - listed.get(name, set())
        assert not missing, f"docs/internals.md does not list {sorted(missing)} of {name}"


def test_everything_that_is_listed_exists() -> None:
    rows = internals_rows()
    assert len(rows) > 30
    for what, where, tests in rows:
        paths = re.findall(r"`([\w/.]+)`", where)
        assert paths, what
        text = ""
        for path in paths:
            text += (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", what))):
            if is_private(name):
                assert name in text, f"{name} is in none of {paths}"
        for file, named in re.findall(r"`(tests/[\w/.]+)`(?: \((.+?)\))?", tests):
            source = (ROOT / file).read_text(encoding="utf-8")
            for test in re.findall(r"`(test_\w+)`", named):
                assert f"def {test}(" in source, f"{file} has no {test}"


def test_every_file_that_leans_on_gradio_is_listed() -> None:
    folder = ROOT / "flux2_studio" / "ui" / "gradio_compat"
    for path in sorted(folder.glob("*.py")):
        assert path.name == "__init__.py" or f"`{path.relative_to(ROOT).as_posix()}`" in INTERNALS, path.name


def test_internals_were_read_in_the_pinned_versions() -> None:
    read = dict(re.findall(r"^## ([a-z_]+) ([\d.]+)$", INTERNALS, re.MULTILINE))
    assert set(read) == {"gradio", "torch", "huggingface_hub", "transformers"}
    assert read == {name: requirements()[name] for name in read}


# --- development.md --------------------------------------------------------------------------------------------------


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
    named = set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", DEVELOPMENT))
    assert {"test", "test-all", "test-processors", "test-times", "lint"} <= named <= make_targets()


def test_links_and_folders_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", DEVELOPMENT + ARCHITECTURE):
        assert (ROOT / "docs" / target).resolve().is_file(), target
    for name in MARKERS:
        assert any(folder.is_dir() for folder in (ROOT / "tests").rglob(name)), name


# --- architecture.md -------------------------------------------------------------------------------------------------


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
