"""A disk that is full: a new process whose files may not grow stands for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import DEADLINE, ROOT

PROGRAM = """
import resource, sys
from pathlib import Path
from flux2_studio.errors import SaveError
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.storage.library import OutputLibrary
from flux2_studio.request import Request

folder, most = Path(sys.argv[1]), int(sys.argv[2])
request = Request(prompt="a fox", checkpoint="klein-4b", width=256, height=256, steps=4, guidance=1.0, seed=6)
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
try:
    CALL
except SaveError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    print(error)
"""


@pytest.mark.parametrize(
    ("call", "most", "what"),
    [
        ("OutputLibrary(folder).save(bytes(300_000), request)", 0, "save the picture"),
        ("OutputLibrary(folder).check_writable()", 0, "save the picture"),
        ("ReferenceStore(folder).save(bytes(100_000))", 1000, "keep a copy of the reference"),
    ],
    ids=["a picture", "before a run", "a reference"],
)
def test_a_full_disk_is_reported_and_nothing_stays_half_written(
    tmp_path: Path, call: str, most: int, what: str
) -> None:
    """Then closing the half-written file fails as well."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("CALL", call), str(tmp_path), str(most)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"There is no space left to {what} in {tmp_path}")
    assert done.stderr == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
