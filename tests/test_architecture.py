"""The house's import rules, read from the source: imports point down, and each outside library has one room.

That light modules load nothing heavy is tested in tests/process/test_imports.py.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "flux2_studio"
SOURCES = [ROOT / "app.py", *sorted((ROOT / PACKAGE).rglob("*.py"))]

# Anyone may import these; they import only each other, and the plain sizes in engine/params.
FOUNDATION = {"__init__", "errors", "events", "record", "request", "checkpoints", "settings"}
# The folders, and the modules beside them, from the bottom up: each imports only what stands before it, or itself.
ORDER = [
    "files",
    "engine",
    "images",
    "provenance",
    "storage",
    "models",
    "safety",
    "prompting",
    "remote",
    "stages",
    "studio",
    "jobs",
    "explore",
    "ui",
    "cli",
    "__main__",
    "app",
]
MODULES_IN_A_FOLDER = 13  # more have more than one subject


def module_of(path: Path) -> str:
    """ "app", "flux2_studio.engine.flux.latents", "flux2_studio.ui.app" for its __init__.py, and so on."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def room_of(module: str) -> str:
    """The first name under the package: the module, or the folder it stands in."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return parts[0]
    return parts[1] if len(parts) > 1 else "__init__"


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, anywhere in it; `from a.b import c` is a.b.c where that is a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import: write it in full"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if is_module(full) else node.module


def importers(library: str) -> set[str]:
    return {module_of(path) for path in SOURCES if any(name.split(".")[0] == library for name in imports(path))}


def place(room: str) -> int:
    assert room in ORDER, f"{room} has no place in ORDER: decide what it may import, and add it"
    return ORDER.index(room)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    here = room_of(module_of(path))
    for name in imports(path):
        if name.split(".")[0] not in (PACKAGE, "app"):
            continue
        there = room_of(name)
        if here in FOUNDATION:
            assert there in FOUNDATION or name == f"{PACKAGE}.engine.params", f"{here} must not import {name}"
        elif there not in FOUNDATION and there != here:
            assert place(there) < place(here), f"{here} must not import {name}"


def test_gradio_only_in_the_page() -> None:
    assert {room_of(module) for module in importers("gradio")} <= {"ui", "app"}
    assert importers("gradio"), "the test looks at the wrong files"


def test_no_torch_in_the_page() -> None:
    assert not {module for module in importers("torch") if room_of(module) in ("ui", "app")}


def test_hub_only_in_models() -> None:
    assert {room_of(module) for module in importers("huggingface_hub")} == {"models"}


def test_openai_only_where_prompts_are_enhanced() -> None:
    assert importers("openai") == {f"{PACKAGE}.prompting.openai_server"}


def test_c2pa_only_where_pictures_are_signed_and_read() -> None:
    rooms = {f"{PACKAGE}.provenance.c2pa.credentials", f"{PACKAGE}.provenance.c2pa.reader"}
    assert importers("c2pa") == rooms, "untrusted pictures are parsed in a process of their own"


def test_onnxruntime_only_in_safety() -> None:
    assert importers("onnxruntime") == {f"{PACKAGE}.safety.nudity"}
    assert not importers("nudenet"), "only its model is used"


def test_engine_is_pure() -> None:
    allowed = {f"{PACKAGE}.errors"}
    for path in SOURCES:
        module = module_of(path)
        if room_of(module) != "engine":
            continue
        for name in imports(path):
            assert name.split(".")[0] not in ("gradio", "huggingface_hub", "platformdirs", "openai"), (module, name)
            if name.startswith(PACKAGE) and room_of(name) != "engine":
                assert name in allowed, f"{module} must not import {name}"


def test_environment_only_in_settings() -> None:
    readers = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            attribute = isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "os.environ",
                "os.getenv",
                "os.putenv",
            )
            name = isinstance(node, ast.ImportFrom) and node.module == "os"
            if attribute or (name and {"environ", "getenv", "putenv"} & {alias.name for alias in node.names}):
                readers.add(module_of(path))
    assert readers == {f"{PACKAGE}.settings"}


def test_a_name_is_one_thing() -> None:
    """No two public classes, functions or constants of different modules share a name."""
    modules: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else []
            if isinstance(node, ast.Assign) and not is_type_variable(node.value):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            for name in names:
                if not name.startswith("_"):
                    modules.setdefault(name, []).append(module_of(path))
    shared = {name: found for name, found in modules.items() if len(found) > 1}
    # Each program has its `main`, and each module that logs its own logger.
    assert shared.keys() == {"main", "log"}, shared


def is_type_variable(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "TypeVar"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_docstrings_name_parameters_that_exist(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            described = re.findall(r"(?:^|\. |\n\s*)([a-z_]\w*(?:, [a-z_]\w*)*): ", ast.get_docstring(node) or "")
            unknown = {name for names in described for name in names.split(", ")} - names_in(node)
            assert not unknown, f"{module_of(path)}.{node.name} has no {', '.join(unknown)}"


def names_in(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Parameters of a function; of a class its fields, methods and attributes, and the parameters of __init__."""
    if not isinstance(node, ast.ClassDef):
        return {found.arg for found in ast.walk(node.args) if isinstance(found, ast.arg)}
    names = set()
    for part in node.body:
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            names |= {part.name} | (names_in(part) if part.name == "__init__" else set())
        elif isinstance(part, ast.Assign | ast.AnnAssign):
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names | {found.attr for found in ast.walk(node) if isinstance(found, ast.Attribute)}


def test_folders_are_small() -> None:
    counts = Counter(path.parent for path in SOURCES if path.stem != "__init__")
    beside = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert beside == FOUNDATION | {"studio", "__main__"}
    assert {folder.name: count for folder, count in counts.items() if count > MODULES_IN_A_FOLDER} == {}


def test_no_room_for_odds_and_ends() -> None:
    names = {path.stem for path in SOURCES}
    assert not names & {"utils", "helpers", "misc", "common"}
