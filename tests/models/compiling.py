"""A studio with toy checkpoints and a compiler of the test, and one run of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from flux2_studio.engine.runtime.compiling import Compiler
from flux2_studio.events import Notice, Result, Saved
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.request import Request
from flux2_studio.settings import CompileMode
from flux2_studio.studio import Studio
from tests.tiny import Toys


def studio_with(toys: Toys, home: Path, choice: CompileMode, backend: Any) -> Studio:
    settings = replace(toys.settings(home, ["klein-4b", "klein-base-4b", "klein-9b-kv"]), compile=choice)
    return Studio(settings, ModelManager(settings, Hub(settings), compiler=Compiler(backend=backend)))


def drawn(studio: Studio, **fields: Any) -> tuple[list[str], list[Image.Image], list[str]]:
    """How the blocks of each picture ran as its record says it, the pictures, and what was said."""
    request = Request(**{"prompt": "a fox", "checkpoint": "klein-4b", "width": 64, "height": 64, "seed": 1, **fields})
    events = list(studio.generate(request))
    assert isinstance(events[-1], Result)
    saved = [event for event in events if isinstance(event, Saved)]
    ways = [event.record.computed["blocks"] for event in saved if event.record]
    pictures = [Image.open(event.image).convert("RGB") for event in saved]
    return ways, pictures, [event.text for event in events if isinstance(event, Notice)]
