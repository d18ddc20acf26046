"""Downloads of processes that are killed, or that want the same file."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from flux2_studio.errors import WeightsError
from flux2_studio.models.hub.cache import HubCache
from flux2_studio.models.hub.part_files import select_repo_files
from tests.models.downloading import (
    HELD,
    LAST,
    PATIENCE,
    Waiting,
    arrived,
    downloads,
    partial,
    toy,
    until,
)
from tests.models.fake_hub import FLOW, MB, TOY, FakeHub, hub, start

# --- going on where it broke off ----------------------------------------------------------------------------------


def test_a_killed_program_loses_nothing(fake: FakeHub, tmp_path: Path) -> None:
    fake.hold_at = HELD
    program = f"""
from pathlib import Path
from flux2_studio.models.hub.repositories import Hub
from tests.models.fake_hub import FLOW, settings, silent
there = Path({str(tmp_path)!r})
Hub(settings(there), endpoint={fake.url!r}, cache=there / "cache", timeout={PATIENCE}).find_or_download(FLOW, silent)
"""
    with start(program) as running:
        until(lambda: arrived(tmp_path) > MB or running.poll() is not None)
        os.kill(running.pid, signal.SIGKILL)
        running.communicate()
    assert running.returncode == -signal.SIGKILL
    there = arrived(tmp_path)
    assert MB < there <= HELD and partial(tmp_path).read_bytes() == TOY[:there]
    fake.hold_at = None
    ours = hub(fake, tmp_path)
    assert ours.size_on_disk(FLOW) == there and not ours.is_on_disk(FLOW)
    told: list[tuple[str, float | None]] = []
    files = ours.find_or_download(FLOW, lambda text, fraction: told.append((text, fraction)))
    assert files.weights.read_bytes() == TOY and not partial(tmp_path).exists()
    assert fake.sent[1:] == [("toy.safetensors", f"bytes={there}-{LAST}")]
    assert told[-1] == ("Downloading Toy-4B: 3.0 of 3.0 MB", 1.0)


def test_two_programs_take_turns(fake: FakeHub, tmp_path: Path) -> None:
    fake.hold_at = HELD
    program = f"""
from pathlib import Path
from flux2_studio.models.hub.repositories import Hub
from tests.models.fake_hub import FLOW, settings, silent
there = Path({str(tmp_path)!r})
hub = Hub(settings(there), endpoint={fake.url!r}, cache=there / "cache", timeout={PATIENCE})
print(hub.find_or_download(FLOW, silent))
"""
    with start(program) as running:
        until(lambda: arrived(tmp_path) > MB or running.poll() is not None)
        ours = Waiting(downloads(fake, tmp_path))
        until(lambda: ours.sees("Waiting for another program that downloads Toy-4B: 2.0 of 3.0 MB"))
        cache = HubCache(tmp_path / "cache", lock_timeout=0.05)
        with pytest.raises(WeightsError, match=r"toy\.safetensors is being downloaded at the moment: stop that first"):
            cache.remove(select_repo_files(FLOW), [])
        fake.go.set()
        out, err = running.communicate(timeout=PATIENCE)
    assert "toy.safetensors" in out, err
    assert ours.end() is None
    assert toy(tmp_path) == TOY and len(fake.sent) == 1
