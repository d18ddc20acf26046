"""Memory that runs out while a picture is decoded: it is decoded again with less, and nothing is denoised twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_studio.events import Event, Notice, Preview, Result
from flux2_studio.models.hub.repositories import Hub, ProgressCallback
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.plan import DECODING_STAGE, PlannedStage
from flux2_studio.models.session import Session
from flux2_studio.provenance import metadata
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.studio import Studio


class Cramped(ModelManager):
    """Models on a device in which decoding runs out of memory `failures` times."""

    failures = 0  # of the first tries
    fails_at: tuple[int, ...] = ()  # numbers of tries that fail too

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, Hub(settings))
        self.settings = settings
        self.tried: list[PlannedStage] = []
        self.opened = 0

    def open(self, *args: Any, **kwargs: Any) -> Session:
        session = super().open(*args, **kwargs)
        self.opened += 1
        decode = session.decode

        def cramped(latent: torch.Tensor, progress: ProgressCallback) -> torch.Tensor:
            self.tried.append(session.plan.stage(DECODING_STAGE))
            if len(self.tried) <= self.failures or len(self.tried) in self.fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(latent, progress)

        session.decode = cramped  # type: ignore[method-assign]
        return session


@pytest.fixture
def models(tmp_path: Path) -> Cramped:
    return Cramped(Settings(home=tmp_path, device="cpu", safety="off", preview="off"))


def run(models: Cramped, **fields: Any) -> list[Event]:
    request = Request(**{"prompt": "a cat", "seed": 4, "width": 64, "height": 256, **fields})
    return list(Studio(models.settings, models).generate(request))


def pictures(result: Event) -> list[np.ndarray]:
    assert isinstance(result, Result)
    return [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in result.images]


def test_it_is_decoded_again_in_lower_strips(models: Cramped) -> None:
    models.failures = 2
    events = run(models)
    steps = [event.step for event in events if isinstance(event, Preview)]
    assert steps == [1, 2, 3, 4] and models.opened == 1
    first, alone, strips = models.tried
    assert (first.strip_height, alone.strip_height, strips.strip_height) == (
        None,
        None,
        128,
    ) and alone.resident_parts == ("autoencoder",)
    assert sum("decoding it again" in event.text for event in events if isinstance(event, Notice)) == 2
    assert isinstance(events[-1], Result)
    record = metadata.read_settings(events[-1].images[0].read_bytes()).record
    assert record is not None and record.computed["autoencoder"] == "in strips of 128 rows"
    models.failures = 0
    (whole,), (found,) = pictures(run(models)[-1]), pictures(events[-1])
    assert abs(whole - found).max() <= 1


def test_a_batch_keeps_what_was_denoised(models: Cramped) -> None:
    models.failures = 1
    events = run(models, count=2)
    assert [event.step for event in events if isinstance(event, Preview)] == [1, 2, 3, 4]
    assert len(pictures(events[-1])) == 2 and len(models.tried) == 3


def test_each_picture_says_how_it_was_decoded(models: Cramped) -> None:
    models.fails_at = (2, 3)  # both ways to decode the second picture whole
    events = run(models, count=2)
    assert isinstance(events[-1], Result)
    records = [metadata.read_settings(path.read_bytes()).record for path in events[-1].images]
    assert [record.computed["autoencoder"] for record in records if record] == ["whole", "in strips of 128 rows"]
