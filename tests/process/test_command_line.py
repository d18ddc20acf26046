"""The command line in a new process: pictures, Ctrl-C, and pipes that nobody reads."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.command_line import DEADLINE, FOX, ROOT, Home
from tests.models.fake_hub import TOKEN, TOY, FakeHub, serve

PLAIN = ("--no-check", "--no-sign", "--no-watermark")  # what these tests do not look at


def start(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # A shell starts background jobs with SIGINT ignored, and tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def read_until(running: subprocess.Popen[str], text: str) -> None:
    """Reads stderr up to the line that has `text`."""
    assert running.stderr is not None
    seen = ""
    while text not in seen:
        line = running.stderr.readline()
        assert line, f"ended too early: {seen}"
        seen += line


def test_generate(home: Home) -> None:
    out = home.folder / "fox.png"
    done = home.spawn("generate", *FOX, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert "step 4 of 4" in done.stderr and "seed 1" in done.stderr
    assert "\r" not in done.stderr and "\033" not in done.stderr  # not a terminal: plain lines
    with Image.open(out) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (128, 128), "RGB")
        colours = image.resize((3, 3), Image.Resampling.BOX).load()
        assert colours is not None
        red, green, blue = colours[0, 0]  # a corner: the background
        assert red > 200 and blue > 150 and green < 200, "the background should be pink"
    (saved,) = home.outputs
    assert saved.read_bytes() == out.read_bytes()
    assert sorted(path.name for path in home.folder.iterdir()) == ["fox.png", "home"]  # nothing half written


def test_a_users_error_ends_the_process_with_2(home: Home) -> None:
    done = home.spawn("generate", "--prompt", "a fox", "--out", "a.gif")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "flux2-studio: --out must end in .png, .jpg, .jpeg or .webp, not 'a.gif'.\n"


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_between_steps(home: Home) -> None:
    out = home.folder / "fox.png"
    running = start(
        home.command("generate", *FOX, *PLAIN, "--width", "512", "--height", "512", "--count", "16", "--out", out),
        home.environment,
    )
    read_until(running, "step 1 of 4")
    running.send_signal(signal.SIGINT)
    _, rest = running.communicate(timeout=DEADLINE)
    assert running.returncode == 130, rest
    (done,) = re.findall(r"stopped, with (\d+) of 16 done", rest)
    assert int(done) < 16 and "Traceback" not in rest
    assert not out.exists()


SLEEPS = """
import time
from concurrent.futures import ThreadPoolExecutor
from flux2_studio.cli import main as cli
with cli.stop_on_interrupt(), ThreadPoolExecutor(1) as pool:
    print("ready", flush=True)
    pool.submit(time.sleep, 3600).result()
"""


def test_a_second_ctrl_c_waits_for_no_thread() -> None:
    running = start([sys.executable, "-c", SLEEPS])
    assert running.stdout is not None and running.stderr is not None
    assert running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGINT)
    assert running.stderr.readline() == "\n"
    assert "Ctrl-C again stops at once" in running.stderr.readline()
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=DEADLINE) == ("", "\nflux2-studio: stopped\n")
    assert running.returncode == 130


# --- pipes ------------------------------------------------------------------------------------------------------------


def test_nobody_reads_the_names(home: Home, broken_pipe: int) -> None:
    done = subprocess.run(
        home.command("generate", *FOX, *PLAIN, "--count", "2", "--out", home.folder / "fox.png"),
        cwd=ROOT,
        env=home.environment,
        stdout=broken_pipe,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        timeout=DEADLINE,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"flux2-studio: Everything is saved, to {home.folder}/fox-1.png and so on, but the names could not be printed "
        f"(Broken pipe)."
    )
    assert (home.folder / "fox-2.png").is_file()


def test_nobody_reads_anything(home: Home, broken_pipe: int) -> None:
    done = subprocess.run(
        home.command("generate", *FOX, "--out", home.folder / "fox.png"),
        cwd=ROOT,
        env=home.environment,
        stdout=broken_pipe,
        stderr=broken_pipe,
        timeout=DEADLINE,
    )
    assert done.returncode == 141
    assert home.outputs == []


# --- downloads --------------------------------------------------------------------------------------------------------

KLEIN = "black-forest-labs/FLUX.2-klein-4B"
AUTOENCODER = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    """A hub with klein 4B's autoencoder, as large as a toy's, and the previews' decoder."""
    with serve() as server:
        server.repos = {KLEIN: {AUTOENCODER: TOY}, "madebyollin/taef2": {"taef2.safetensors": b"tiny"}}
        yield server


def own_parts(folder: Path) -> dict[str, str]:
    """The larger parts of klein 4B as the user's own files."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "klein.safetensors"):
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
    return {"KLEIN_4B_MODEL_PATH": str(folder / "klein.safetensors"), "QWEN3_4B_MODEL_PATH": str(folder)}


def test_ctrl_c_pauses_a_download(home: Home, fake: FakeHub) -> None:
    home.environment |= {"HF_ENDPOINT": fake.url, "HF_TOKEN": TOKEN} | own_parts(home.folder / "own")
    del home.environment["HF_HUB_OFFLINE"]
    fake.hold_at = 10**6  # of each answer: a busy machine's client may lose its patience, and ask once more
    running = start(home.command("models", "download", "klein-4b"), home.environment)
    read_until(running, "1.0 of 3.0 MB")
    running.send_signal(signal.SIGINT)
    _, rest = running.communicate(timeout=DEADLINE)
    assert running.returncode == 130
    assert rest == (
        "flux2-studio: paused; what has arrived is kept, and `flux2-studio models download klein-4b` goes on from "
        "there\n"
    )
    fake.hold_at = None
    assert home.spawn("models", "download", "klein-4b").returncode == 0
    first, *_, last = [span for name, span in fake.sent if name == AUTOENCODER]
    assert first is None and last in (f"bytes={whole}000000-{len(TOY) - 1}" for whole in (1, 2))
