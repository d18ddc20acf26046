"""What the tests of the Models tab share: a shelf with a small hub, and waiting for its states."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flux2_studio.checkpoints import NANO, Checkpoint
from flux2_studio.models.hub.library import CheckpointLibrary, CheckpointStatus
from flux2_studio.models.hub.repositories import Hub
from tests.models.fake_hub import CHECKPOINT, MB, OTHER, FakeHub, settings

PATIENCE = 300  # seconds that nothing here takes unless it hangs
HELD = 2 * MB  # bytes after which the hub holds back, where it does
LAST = 3 * MB - 1
NAME = CHECKPOINT.name


def shelf(
    fake: FakeHub, tmp_path: Path, *checkpoints: Checkpoint, free: int = 10**12, **overrides: Path
) -> tuple[CheckpointLibrary, Hub]:
    """As the page makes them: one hub for both."""
    known = replace(settings(tmp_path, **overrides), checkpoints=(NANO, *(checkpoints or (CHECKPOINT, OTHER))))
    hub = Hub(known, endpoint=fake.url, cache=tmp_path / "cache", timeout=60, free_space=lambda _: free)
    return CheckpointLibrary(known, hub), hub


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "this never came true"
        time.sleep(0.01)


def reaches(ours: CheckpointLibrary, state: str, name: str = NAME) -> CheckpointStatus:
    """The entry, once it is in `state`; nothing of it moves any more, unless that is downloading."""
    until(lambda: ours.get_status(name).state == state)
    return ours.get_status(name)


def weights(tmp_path: Path) -> bytes:
    (file,) = (tmp_path / "cache").glob("models--maker--Toy-4B/snapshots/*/toy.safetensors")
    return file.read_bytes()
