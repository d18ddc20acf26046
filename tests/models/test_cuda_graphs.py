"""Pictures are the same whether runs are replayed or not, and recordings leave with what they were made of."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flux2_studio.engine.runtime.compiling import Compiler
from flux2_studio.models import cuda_graphs
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.settings import GraphsMode
from flux2_studio.studio import Studio
from tests.graphs import Tape
from tests.models.compiling import drawn
from tests.tiny import Toys

NAMES = ("klein-4b", "klein-base-4b", "klein-9b-kv")


def about_graphs(notices: list[str]) -> list[str]:
    return [text for text in notices if "CUDA graphs" in text]


def studio_with(toys: Toys, home: Path, choice: GraphsMode, tape: Tape | None) -> Studio:
    settings = replace(toys.settings(home, list(NAMES)), graphs=choice)
    return Studio(settings, ModelManager(settings, Hub(settings), capture=tape))


def test_pictures_and_prompts_are_replayed_to_the_same_bits(toys: Toys, tmp_path: Path) -> None:
    tape = Tape()
    plain, replaying = (studio_with(toys, tmp_path / choice, choice, tape) for choice in ("off", "on"))  # type: ignore[arg-type]
    for number, prompt in enumerate(("a fox", "an owl", "a whale in the sea")):
        (_, expected, _), recorded, replays = tape.since(lambda prompt=prompt: drawn(plain, prompt=prompt))  # type: ignore[misc]
        assert (recorded, replays) == (0, 0)
        (_, pictures, notices), recorded, replays = tape.since(lambda prompt=prompt: drawn(replaying, prompt=prompt))  # type: ignore[misc]
        # Four steps, of which the first two are as written and recorded; prompts are recorded when the second is read.
        assert (recorded, replays) == ((1, 3), (1, 5), (0, 5))[number]
        assert pictures[0].tobytes() == expected[0].tobytes() and about_graphs(notices) == []


def test_guided_pictures_and_those_with_kept_references(toys: Toys, tmp_path: Path) -> None:
    tape = Tape()
    plain, replaying = (studio_with(toys, tmp_path / choice, choice, tape) for choice in ("off", "on"))  # type: ignore[arg-type]
    reference = tmp_path / "reference.png"
    Image.new("RGB", (64, 64), "teal").save(reference)
    requests: dict[str, dict[str, Any]] = {
        "klein-base-4b": {"steps": 4},
        "klein-9b-kv": {"references": (reference,)},
    }
    for name, fields in requests.items():
        pairs = [drawn(studio, checkpoint=name, count=2, **fields)[1] for studio in (plain, replaying, replaying)]
        assert [[picture.tobytes() for picture in pictures] for pictures in pairs[1:]] == [
            [picture.tobytes() for picture in pairs[0]]
        ] * 2
    assert tape.replayed


def test_recordings_go_with_a_part_that_leaves(toys: Toys, tmp_path: Path) -> None:
    studio = studio_with(toys, tmp_path, "on", Tape())
    for prompt in ("a fox", "an owl"):
        drawn(studio, prompt=prompt)
    recorded = studio._models.cuda_graphs._runner._graphs_by_model
    assert len(recorded) == 2
    studio._models.release_all()
    assert not recorded


def test_why_nothing_can_be_recorded_is_said_once(toys: Toys, tmp_path: Path) -> None:
    studio = studio_with(toys, tmp_path, "on", Tape(trouble="the driver is too old"))
    notices = [about_graphs(drawn(studio, prompt=prompt)[2]) for prompt in ("a fox", "an owl", "a frog")]
    assert [len(said) for said in notices] == [0, 1, 0]
    assert "(the driver is too old)" in notices[1][0] and "FLUX2_GRAPHS=off" in notices[1][0]


def test_nothing_is_recorded_where_memory_is_short(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tape = Tape()
    studio = studio_with(toys, tmp_path, "on", tape)
    drawn(studio)
    assert tape.recorded
    monkeypatch.setattr(cuda_graphs, "free_memory", lambda _: cuda_graphs.MIN_FREE_GRAPH_BYTES - 1)
    (_, _, notices), recorded, replays = tape.since(lambda: drawn(studio, prompt="an owl"))
    assert (recorded, replays) == (0, 0) and "(less than 4 GiB of memory would be left)" in about_graphs(notices)[0]
    assert not studio._models.cuda_graphs._runner._graphs_by_model


def test_without_an_nvidia_card_it_is_said_that_nothing_is_recorded(toys: Toys, tmp_path: Path) -> None:
    studio = studio_with(toys, tmp_path, "on", None)
    said = [about_graphs(drawn(studio)[2]) for _ in range(2)]
    assert "(only NVIDIA's cards can)" in said[0][0] and said[1] == []
    assert not studio._models.cuda_graphs._runner._graphs_by_model


def test_nothing_is_recorded_any_more_once_memory_ran_out(toys: Toys, tmp_path: Path) -> None:
    tape = Tape()
    studio = studio_with(toys, tmp_path, "on", tape)
    drawn(studio)
    studio._models.release_unused_memory()
    assert not studio._models.cuda_graphs._runner._graphs_by_model
    (_, _, notices), recorded, replayed = tape.since(lambda: drawn(studio, prompt="an owl"))
    assert (recorded, replayed) == (0, 0) and "(memory ran out)" in about_graphs(notices)[0]


def test_nothing_is_recorded_while_a_compiler_is_at_work(toys: Toys, tmp_path: Path) -> None:
    tape = Tape()
    go_on = threading.Event()

    def slow(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        go_on.wait(60)
        return module.forward

    settings = replace(toys.settings(tmp_path, list(NAMES)), graphs="on", compile="on")
    studio = Studio(settings, ModelManager(settings, Hub(settings), compiler=Compiler(backend=slow), capture=tape))
    _, recorded, _ = tape.since(lambda: [drawn(studio, prompt=prompt) for prompt in ("a fox", "an owl")])
    compiling = studio._models.background_compiler.is_compiling
    go_on.set()
    studio._models.background_compiler.wait_until_idle()
    assert compiling and recorded == 0
    (ways, _, _), recorded, _ = tape.since(lambda: drawn(studio))
    assert ways == ["compiled"] and recorded == 1
