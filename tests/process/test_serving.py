"""The two servers in processes of their own: from their start to SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flux2_studio.models.remote_text import RemoteTextEncoder
from flux2_studio.settings import Settings
from tests.command_line import DEADLINE, ROOT, Home

TOKEN = "secret-abcdefghijklmnop"


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
        _, errors = page.communicate(timeout=DEADLINE)
        assert page.returncode == 0
        assert "Traceback" not in errors
    finally:
        page.kill()


def test_the_command_from_its_start_to_sigterm(home: Home) -> None:
    command = home.command("encode-server", "--model", "nano", "--port", "0")
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=home.environment | {"FLUX2_ENCODE_TOKEN": TOKEN, "FLUX2_DEVICE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"the text encoder of Nano .* is open at (http://127\.0\.0\.1:\d+/)\n", said)
        if not found:
            pytest.fail(f"{said!r}: {process.communicate()[1]}")
        nano = Settings(home=home.folder).checkpoint("nano")
        remote = RemoteTextEncoder(found[1], TOKEN, nano.recipe, nano.context_width, nano.label)
        assert remote.encode(["a fox"]).context.shape == (1, 32, 576)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (0, "")
    assert err.endswith("POST 200\nstopping\n") and "Traceback" not in err and TOKEN not in err
