"""The wheel on its own, away from the repository: it draws, lists presets and serves the page with all its files."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 300  # seconds


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else of ours. Its dependencies are this environment's."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for name in ("flux2_studio", "assets", "presets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # From a source distribution, as a package index would build it.
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (archive,) = source.glob("*.tar.gz")
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), str(archive)], check=True
    )
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    return target


@pytest.fixture
def environment(installed: Path, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLUX2_", "GRADIO_"))}
    return {
        **kept,
        "PYTHONPATH": str(installed),
        "FLUX2_HOME": str(tmp_path / "home"),
        "FLUX2_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
    }


def run(environment: dict[str, str], folder: Path, *arguments: str) -> str:
    command = Path(environment["PYTHONPATH"]) / "bin" / "flux2-studio"
    done = subprocess.run(
        [sys.executable, str(command), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_draws_with_nano(environment: dict[str, str], tmp_path: Path) -> None:
    run(environment, tmp_path, "generate", "--model", "nano", "--prompt", "a fox", "--out", "fox.png")
    with Image.open(tmp_path / "fox.png") as picture:
        assert picture.size == (128, 128)


def test_it_lists_presets(environment: dict[str, str], tmp_path: Path) -> None:
    listed = run(environment, tmp_path, "presets")
    missing = [path.stem for path in (ROOT / "presets").glob("*.json") if path.stem not in listed]
    assert not missing


def test_the_page_has_its_scripts_and_languages(environment: dict[str, str], tmp_path: Path, installed: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, str(installed / "bin" / "flux2-studio"), "ui", "--port", str(port)]
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        page, deadline = "", time.monotonic() + DEADLINE
        while not page:
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
                    page = answer.read().decode()
            except OSError:
                time.sleep(0.2)  # it is still starting
    finally:
        server.terminate()
        server.wait(60)
    for script in (ROOT / "assets").glob("*.js"):
        # The page holds scripts with some characters escaped: look for a long line that has none of those.
        plain = [line for line in script.read_text(encoding="utf-8").splitlines() if not set(line) & set("'\"<>&\\`")]
        assert max(plain, key=len) in page, script.name
    for language in (ROOT / "assets" / "languages").glob("*.json"):
        assert (installed / "flux2_studio" / "assets" / "languages" / language.name).is_file()
