"""Starting the page: what goes wrong there is one line and exit code 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def start(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "app.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "FLUX2_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_wrong_setting_is_told_in_one_line(tmp_path: Path) -> None:
    done = start(tmp_path, FLUX2_PREVIEW="huge")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["FLUX2_PREVIEW is 'huge'; set it to one of: tiny, linear, off."]


def test_a_busy_port_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = start(tmp_path, "--port", str(port))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"Port {port} at 127.0.0.1 cannot be used: choose another with --port."]


def test_an_impossible_port_is_told_in_one_line(tmp_path: Path) -> None:
    done = start(tmp_path, "--port", "99999")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["There is no port 99999: choose one from 1 to 65535."]


def test_a_foreign_host_is_told_in_one_line(tmp_path: Path) -> None:
    done = start(tmp_path, "--host", "192.0.2.1")
    assert done.returncode == 2
    assert done.stderr.startswith("192.0.2.1 is not an address of this machine")
    assert len(done.stderr.splitlines()) == 1


def test_sigterm_ends_the_page_cleanly_and_old_uploads_go_at_the_start(tmp_path: Path) -> None:
    old, new = tmp_path / "uploads" / "a" / "old.png", tmp_path / "uploads" / "b" / "new.png"
    for file in (old, new):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"picture")
    os.utime(old, (0, 0))
    page = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
        | {"FLUX2_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert page.stdout
        assert "is open at" in page.stdout.readline()
        assert not old.parent.exists()
        assert new.exists()
        page.terminate()
        _, errors = page.communicate(timeout=60)
        assert page.returncode == 0
        assert "Traceback" not in errors
    finally:
        page.kill()


def test_uploads_kept_elsewhere_are_left_alone(tmp_path: Path) -> None:
    old = tmp_path / "uploads" / "old.png"
    old.parent.mkdir()
    old.write_bytes(b"picture")
    os.utime(old, (0, 0))
    with socket.socket() as taken:  # where the start ends, after the uploads' turn
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        start(tmp_path, "--port", str(taken.getsockname()[1]), GRADIO_TEMP_DIR=str(tmp_path / "elsewhere"))
    assert old.exists()


def test_help_names_the_options(tmp_path: Path) -> None:
    done = start(tmp_path, "--help")
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--host", "--port", "--share"))
