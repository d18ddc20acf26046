"""Content credentials across processes: the limits of the one that reads strangers' files, one identity for several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flux2_studio.provenance.c2pa.credentials import ManifestReader, Signer
from flux2_studio.provenance.identity import load_identity
from tests.command_line import DEADLINE, ROOT


def test_a_missing_library_is_told(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['c2pa'] = None; from pathlib import Path; "
        "from flux2_studio.errors import CredentialsError; "
        "from flux2_studio.provenance.c2pa import credentials, reader\n"
        "try: credentials.Signer(Path(sys.argv[1])).identity\n"
        "except CredentialsError as error: print(error)\n"
        "print(reader.read_manifest(b'', {}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=DEADLINE)
    said, read = done.stdout.splitlines()
    assert "install c2pa-python anew" in said
    assert "cannot be loaded here" in read


@pytest.mark.parametrize(
    ("script", "seconds", "said"),
    [
        ("import os; os.abort()", 100, "they made the reader fail"),
        ("import sys; sys.exit(3)", 100, "they made the reader fail"),
        ("import time; time.sleep(3600)", 1, "reading them takes too long"),
    ],
)
def test_a_reader_that_dies_or_hangs_is_told(tmp_path: Path, script: str, seconds: int, said: str) -> None:
    path = tmp_path / "reader.py"
    path.write_text(f"import sys\nsys.stdin.buffer.read()\n{script}\n")
    signer = Signer(tmp_path, reader=ManifestReader(path, seconds=seconds))
    assert said in signer.read(b"\xff\xd8\xff c2pa").summary


@pytest.mark.skipif(sys.platform != "linux", reason="other systems bound the time only")
@pytest.mark.parametrize(
    ("work", "outcome"), [("while True: pass", -9), ("bytearray(1 << 30)", 1)], ids=["time", "memory"]
)
def test_the_reading_process_is_bounded(work: str, outcome: int) -> None:
    code = f"from flux2_studio.provenance.c2pa.reader import limit_process; limit_process(1 << 29, 1)\n{work}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    assert done.returncode == outcome, done.stderr
    assert ("MemoryError" in done.stderr) == (outcome == 1)


def test_processes_that_start_at_once_agree(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flux2_studio.provenance.identity import load_identity; "
        "import cryptography.x509; print('ready', flush=True); sys.stdin.readline(); "
        "print(load_identity(Path(sys.argv[1])).serial)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "identity")]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    serials = {process.communicate(timeout=DEADLINE)[0].strip() for process in started}
    assert serials == {load_identity(tmp_path / "identity").serial}
    assert [it.name for it in (tmp_path / "identity").iterdir()] == ["identity.pem"]
