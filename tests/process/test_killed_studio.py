"""A studio that was killed in the middle of a run: the next one has its pictures, its queue and the rest of the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image

from flux2_studio.events import Event, Result
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.jobs.tasks import Job
from flux2_studio.settings import Settings
from flux2_studio.studio import Studio
from tests.command_line import DEADLINE, ROOT
from tests.scripted_studio import journal_of

DRAWS = """
import os, signal, sys
from pathlib import Path
from flux2_studio.events import Saved
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.studio import Studio
from tests.scripted_studio import journal_of

home, reference = map(Path, sys.argv[1:])
jobs = JobQueue(Studio(Settings(home=home, device="cpu", safety="off", preview="off")), journal_of(home))
job = jobs.submit(Request(prompt="a flat fox", seed=5, count=6, sign=False, watermark=False), "me")
jobs.submit(Request(prompt="make it blue", seed=50, references=(reference,), sign=False, watermark=False), "me")
for _, event in job.events():
    if isinstance(event, Saved):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_studio_loses_no_picture_and_no_run(tmp_path: Path) -> None:
    reference = tmp_path / "upload.png"
    Image.new("RGB", (128, 128), "teal").save(reference)
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-c", DRAWS, str(home), str(reference)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    reference.unlink()  # as uploads are, in time

    settings = Settings(home=home, device="cpu", safety="off", preview="off")
    jobs = JobQueue(Studio(settings), journal_of(home))
    try:
        jobs.restore_waiting()
        (waited,) = (standing.job for standing in jobs.queue_positions("me"))
        assert isinstance(ended(waited), Result)
        (cut,) = jobs.interrupted("me")
        assert 1 <= len(cut.pictures) < 6 and all(path.is_file() for path in cut.pictures)
        rest = ended(jobs.resume_interrupted(cut.id, "me"))
        assert isinstance(rest, Result)
        assert (*cut.seeds, *rest.seeds) == (5, 6, 7, 8, 9, 10)
        assert len(list(settings.outputs.rglob("*.png"))) >= 7
        assert not [path for path in (home / "queue").iterdir() if path.is_dir()], "no reference is left behind"
    finally:
        jobs.close()


def ended(job: Job) -> Event:
    *_, (_, last) = job.events(timeout=DEADLINE)
    return last
