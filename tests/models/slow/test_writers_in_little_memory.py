"""Language models that write beside checkpoints, where memory does not hold both."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux2_studio.checkpoints import DEV, KLEIN_4B
from flux2_studio.errors import OutOfMemory
from flux2_studio.models.memory.plan import PROMPT_STAGE, RequestShape, make_plan, usable_bytes
from tests.models.writing import (
    CPU,
    MISTRAL,
    QWEN,
    SMALL,
    TOKENS,
    Told,
    alone,
    keys,
    limited,
    manager,
    peaks,
    silent,
    whole,
    wrote,
)
from tests.tiny import Toys


@pytest.mark.parametrize("host_budget", [0, 10**9])
def test_the_encoder_is_loaded_anew_where_drawing_would_be_slower_otherwise(
    toys: Toys, tmp_path: Path, host_budget: int
) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    many = RequestShape(width=256, height=256, count=4)
    plain, _ = peaks(settings, KLEIN_4B, QWEN, many)
    models, told = manager(limited(settings, plain), host_budget=host_budget), Told()
    models.acquire_writer(QWEN, silent, tokens=TOKENS)
    session = models.open(KLEIN_4B, many, silent)
    assert session.plan.batch_size == 4 and session.plan.is_resident
    session.encode_prompts(["a fox"], told)
    assert told.loads == ["Loading FLUX.2 klein 4B: text encoder"]
    (held,) = keys(models, KLEIN_4B.text)
    assert not held.is_whole_model, "one of the two"
    assert bool(models._residency.host_bytes) == bool(host_budget), "it waits where there is room, to write again"


def test_another_checkpoints_writer_leaves_for_the_run_and_comes_back(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b", "dev"])
    peak = manager(settings).predict_plan(KLEIN_4B, SMALL).peak
    tight = limited(settings, peak)
    for host_budget in (0, 10**9):
        models = manager(tight, host_budget=host_budget)
        writer = models.acquire_writer(MISTRAL, silent, tokens=TOKENS).writer
        text = wrote(writer)
        session = models.open(KLEIN_4B, SMALL, silent)
        assert session.plan.is_resident
        session.preload(silent)
        session.prepare_transformer(silent)
        assert keys(models, MISTRAL.part) == [] and session.acquire_vision_model() is None
        back = models.acquire_writer(MISTRAL, silent, tokens=TOKENS).writer
        assert (back is writer) == bool(host_budget), "from main memory, or read anew"
        assert wrote(back) == text
        limit = usable_bytes(int(1e9 * tight.memory_limit_gb), CPU)  # type: ignore[operator]
        assert models._residency.device_bytes <= limit


def test_there_is_room_for_being_asked(toys: Toys, tmp_path: Path) -> None:
    """Beside everything that a resident plan keeps, whatever another checkpoint has left there."""
    settings = toys.settings(tmp_path, ["dev", "klein-4b"])
    plan = manager(settings).predict_plan(DEV, SMALL, load_vision_model=True)
    models = manager(limited(settings, plan.peak))
    session = whole(models, DEV)
    assert session.plan.is_resident and session.plan.peak <= plan.peak
    for name in ("flow", "text"):
        models.open(KLEIN_4B, SMALL, silent).preload(silent)
        session.preload(silent)
        assert session.acquire_vision_model() is not None, name
        stage = session.plan.stage(PROMPT_STAGE)
        assert models._residency.device_bytes + stage.activations <= session.plan.limit


def test_where_the_whole_model_does_not_fit_the_encoder_is_used_and_it_is_said(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["dev"])
    opened = manager(settings)._opener.open(DEV, silent)
    low, least = 0, 10**9  # bytes, of which the one is too little, and the other enough
    while least - low > 1:
        middle = (low + least) // 2
        try:
            make_plan(opened.footprint, SMALL, int(middle * 1.02 + 2), CPU, streaming=False)
            least = middle
        except OutOfMemory:
            low = middle
    models = manager(limited(settings, least), streaming=False)
    session = whole(models, DEV)
    (note,) = session.notes
    assert "Mistral Small 3.2 24B is not loaded as a whole" in note and "public figures" in note
    assert session.acquire_vision_model(silent) is None
    assert session.encode_prompts(["a fox"], silent).context.equal(alone(settings, DEV))
    assert models.open(DEV, SMALL, silent).notes == ()
    with pytest.raises(OutOfMemory, match=r"FLUX\.2 dev"):
        whole(manager(limited(settings, least / 2), streaming=False), DEV)
