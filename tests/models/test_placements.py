"""However a checkpoint is made to fit, the picture is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_studio.checkpoints import GB, Checkpoint
from flux2_studio.errors import OutOfMemory
from flux2_studio.events import Notice, Result
from flux2_studio.models.checkpoint_files import CheckpointOpener
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.plan import MemoryPlan, RequestShape, make_plan
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.studio import Studio
from tests.tiny import Toys

CPU = torch.device("cpu")
MB = 10**6
Way = tuple[str, bool, bool]  # what is together, whether blocks are streamed, whether pictures go in strips


def silent(text: str, fraction: float | None) -> None:
    pass


def way(plan: MemoryPlan) -> Way:
    streamed, strips = (any(getattr(stage, name) for stage in plan.stages) for name in ("streamed", "strip_height"))
    return plan.resident_parts, streamed, strips


def budgets(settings: Settings, checkpoint: Checkpoint, workload: RequestShape, streaming: bool) -> dict[Way, int]:
    """For each way in which the request can be made to fit, the least budget that was found to lead to it."""
    needs = CheckpointOpener(settings, Hub(settings), CPU).open(checkpoint, silent).footprint
    found = {}
    whole = make_plan(needs, workload, 10**12, CPU).peak
    for budget in range(int(1.05 * whole), 0, -max(1, whole // 150)):
        try:
            found[way(make_plan(needs, workload, budget, CPU, streaming=streaming))] = budget
        except OutOfMemory:
            break  # and still less would not do either; each refusal takes its time to name what would fit
    return found


def pictures(studio: Studio, request: Request) -> tuple[list[np.ndarray], str]:
    events = list(studio.generate(request))
    assert isinstance(events[-1], Result)
    drawn = [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in events[-1].images]
    return drawn, " ".join(event.text for event in events if isinstance(event, Notice))


@pytest.mark.parametrize(("name", "preview"), [("klein-4b", "off"), ("nano", "tiny")])
def test_every_way_gives_the_same_picture(toys: Toys, tmp_path: Path, name: str, preview: str) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"], preview=preview)
    checkpoint = settings.checkpoint(name)
    source = tmp_path / "source.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 192)).save(source)
    references = (source,) if name == "klein-4b" else ()
    request = Request(prompt="a red house", checkpoint=name, width=64, height=192, seed=1, references=references)
    workload = RequestShape(width=64, height=192, references=((64, 192),) * len(request.references))
    exact, _ = pictures(Studio(settings), request)
    seen = set()
    for streaming in (False, True):
        for found, budget in budgets(settings, checkpoint, workload, streaming).items():
            if found in seen:
                continue
            limited = replace(settings, memory_limit_gb=budget / GB)
            for host_budget in (0, 10**9) if streaming else (0,):
                models = ModelManager(limited, Hub(limited), streaming=streaming, host_budget=host_budget)
                assert way(models.predict_plan(checkpoint, workload)) == found
                studio = Studio(limited, models)
                for _ in range(2):  # the second run finds what the first one left
                    drawn, told = pictures(studio, request)
                    off = max(int(abs(a - b).max()) for a, b in zip(exact, drawn, strict=True))
                    assert off <= found[2], found
                    assert ("Fits: " in told) == (found[0] != "all")
            seen.add(found)
    together = {found[0] for found in seen}
    assert "all" in together and "all but the text encoder" in together
    assert any(found[1] for found in seen)
    # A preview by the autoencoder itself is decoded whole, and then so can the picture be.
    assert preview == "tiny" or any(found[2] for found in seen)
