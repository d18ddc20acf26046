"""The law of tests/models/test_placements.py for one more checkpoint."""

from __future__ import annotations

from pathlib import Path

from tests.models import test_placements as placements
from tests.tiny import Toys


def test_every_way_gives_the_same_picture(toys: Toys, tmp_path: Path) -> None:
    placements.test_every_way_gives_the_same_picture(toys, tmp_path, "nano", "off")
