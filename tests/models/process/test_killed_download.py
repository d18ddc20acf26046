"""A download of the Models tab whose process is killed."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from tests.models.fake_hub import MB, TOY, FakeHub, start
from tests.models.shelves import HELD, LAST, NAME, PATIENCE, reaches, shelf, until, weights


def test_a_killed_server_leaves_a_paused_download(fake: FakeHub, tmp_path: Path) -> None:
    fake.hold_at = HELD
    program = f"""
import time
from pathlib import Path
from dataclasses import replace
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.hub.library import CheckpointLibrary
from tests.models.fake_hub import CHECKPOINT, settings
there = Path({str(tmp_path)!r})
known = replace(settings(there), checkpoints=(CHECKPOINT,), default_checkpoint={NAME!r})
library = CheckpointLibrary(known, Hub(known, endpoint={fake.url!r}, cache=there / "cache", timeout={PATIENCE}))
library.download({NAME!r})
time.sleep({PATIENCE})
"""
    ours, _ = shelf(fake, tmp_path)
    with start(program) as running:
        until(lambda: ours.get_status(NAME).bytes_on_disk > HELD or running.poll() is not None)
        os.kill(running.pid, signal.SIGKILL)
        running.communicate()
    assert running.returncode == -signal.SIGKILL
    fake.hold_at = None
    fake.sent.clear()
    ours, _ = shelf(fake, tmp_path)
    entry = ours.get_status(NAME)
    assert entry.state == "paused" and entry.bytes_on_disk > HELD and 0 < entry.remaining_bytes < 1.1 * MB
    assert ours.get_status("other").state == "absent"  # what the two share is whole
    ours.download(NAME)
    reaches(ours, "complete")
    assert weights(tmp_path) == TOY
    (span,) = [span for name, span in fake.sent if name == "toy.safetensors"]
    assert span and (match := re.fullmatch(rf"bytes=(\d+)-{LAST}", span)) and int(match[1]) >= HELD
