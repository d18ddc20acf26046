"""Starting the page: what goes wrong there is one line and exit code 2."""

from __future__ import annotations

import asyncio
import io
import os
import socket
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gradio as gr
import pytest
from gradio.state_holder import SessionState

import app
from flux2_studio.ui.gradio_compat.page import StudioBlocks
from tests.command_line import Done


def start(tmp_path: Path, *arguments: str, **environment: str) -> Done:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("FLUX2_", "GRADIO_"))}
    known |= {"FLUX2_HOME": str(tmp_path), **environment}
    out, err = io.StringIO(), io.StringIO()
    with patch.dict(os.environ, known, clear=True), redirect_stdout(out), redirect_stderr(err):
        try:
            code = app.main(arguments)
        except SystemExit as end:  # argparse's way to end
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


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


def received(values: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """In a thread of its own: the one of the tests may have an event loop already."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, values).result()


def test_a_choice_that_the_server_took_back_reaches_the_handler() -> None:
    """The browser may show older choices: not yet updated, or those of a studio that was restarted."""
    with StudioBlocks() as page:
        changing, fixed = gr.Dropdown([]), gr.Dropdown(["a"])
        gr.Button().click(lambda *_: None, [changing, fixed])
    (function,) = page.fns.values()
    state = SessionState(page)
    with pytest.raises(gr.Error, match="not in the list of choices"):  # else this is not needed any more
        received(page.preprocess_data(function, ["b", "a"], state))
    page.accept_any_text(changing)
    for value in ("b", "c", None):
        assert received(page.preprocess_data(function, [value, "a"], state)) == [value, "a"]
    assert changing.choices == [], "nothing of one visitor's reaches the others"
    with pytest.raises(gr.Error, match="not in the list of choices"):
        received(page.preprocess_data(function, ["b", "z"], state))
