"""Blocks are compiled beside the runs, for the next ones; what cannot be is said, and drawn all the same."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flux2_studio.checkpoints import KLEIN_4B
from flux2_studio.engine.compiling import Compiler, variants
from flux2_studio.engine.lora_paths import AdaptedLinear, LowRank
from flux2_studio.engine.params import TransformerParams
from flux2_studio.engine.transformer import Transformer
from flux2_studio.events import Notice, Result, Saved
from flux2_studio.models.compiled import CompiledBlocks
from flux2_studio.models.hub import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.request import Request
from flux2_studio.settings import Compile
from flux2_studio.studio import Studio
from tests.graphs import Graphs
from tests.tiny import Toys


def studio_with(toys: Toys, home: Path, choice: Compile, backend: Any) -> Studio:
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


def test_the_first_picture_is_drawn_as_it_is_written_and_the_next_ones_compiled(toys: Toys, tmp_path: Path) -> None:
    graphs = Graphs()
    studio = studio_with(toys, tmp_path, "on", graphs)
    first, _, _ = drawn(studio)
    studio._models.compiled.settle()
    again, pictures, _ = drawn(studio)
    assert (first, again) == (["as written"], ["compiled"]) and graphs.ran
    repeated, same, _ = drawn(studio)
    assert repeated == ["compiled"] and same[0].tobytes() == pictures[0].tobytes()
    larger, compiled, _ = graphs.since(lambda: drawn(studio, width=96, height=80))
    assert larger[0] == ["compiled"] and compiled == 0
    assert studio.computed(KLEIN_4B)["blocks"] == "compiled"


@pytest.mark.parametrize(
    "fields",
    [
        {"count": 2},
        {"checkpoint": "klein-base-4b", "steps": 2, "guidance": 3.0},
        {"checkpoint": "klein-base-4b", "steps": 2, "guidance": 1.0},
        {"checkpoint": "klein-9b-kv", "references": True},
        {"references": True},
    ],
)
def test_whatever_is_asked_the_second_time_it_is_compiled(fields: Any, toys: Toys, tmp_path: Path) -> None:
    if "references" in fields:
        reference = tmp_path / "reference.png"
        Image.new("RGB", (64, 64), "teal").save(reference)
        fields = {**fields, "references": (reference,)}
    graphs = Graphs()
    studio = studio_with(toys, tmp_path, "on", graphs)
    first, _, _ = drawn(studio, **fields)
    studio._models.compiled.settle()
    (again, _, _), compiled, ran = graphs.since(lambda: drawn(studio, **fields))
    assert set(first) == {"as written"} and set(again) == {"compiled"}
    assert compiled == 0 and ran


def test_what_cannot_be_compiled_is_said_once(toys: Toys, tmp_path: Path) -> None:
    tried = []

    def broken(_module: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        tried.append(1)
        raise RuntimeError("there is no compiler")

    studio = studio_with(toys, tmp_path, "on", broken)
    told = []
    for _ in range(3):
        ways, pictures, said = drawn(studio)
        assert ways == ["as written"] and len(pictures) == 1
        told.append([text for text in said if "compile" in text])
        studio._models.compiled.settle()
    assert told[0] == told[2] == [] and len(told[1]) == 1
    assert "there is no compiler" in told[1][0] and "FLUX2_COMPILE=off" in told[1][0]
    assert len(tried) == 1
    assert studio.computed(KLEIN_4B)["blocks"] == "as written"


def test_while_something_is_compiled_everything_runs_as_it_is_written(toys: Toys, tmp_path: Path) -> None:
    """torch calls no compiled code while it compiles."""
    graphs, going_on = Graphs(), threading.Event()

    def slow(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        assert going_on.wait(120)
        return graphs(module, inputs)

    studio = studio_with(toys, tmp_path, "on", slow)
    going_on.set()
    drawn(studio)
    studio._models.compiled.settle()
    assert drawn(studio)[0] == ["compiled"]
    going_on.clear()
    assert set(drawn(studio, count=2)[0]) == {"as written"}
    (ways, _, _), _, ran = graphs.since(lambda: drawn(studio))
    assert studio._models.compiled.busy and ways == ["as written"] and ran == 0
    going_on.set()
    studio._models.compiled.settle()
    assert drawn(studio)[0] == ["compiled"] and set(drawn(studio, count=2)[0]) == {"compiled"}


def test_blocks_that_all_differ_are_not_compiled() -> None:
    """As with a LoRA that has a rank of its own for each layer."""
    graphs = Graphs()
    params = TransformerParams(
        in_channels=16,
        context_width=8,
        hidden=32,
        head_width=16,
        mlp=96,
        double_blocks=1,
        single_blocks=6,
        guidance_embedding=False,
    )
    model = Transformer(params)
    for rank in range(1, 7):
        name = f"single_blocks.{rank - 1}.linear2"
        path = LowRank(torch.zeros(rank, 128), torch.zeros(32, rank))
        model.set_submodule(name, AdaptedLinear(model.get_submodule(name), "a LoRA", paths=[path]))
    blocks = CompiledBlocks("on", torch.device("cpu"), Compiler(backend=graphs))
    for _ in range(2):
        assert not blocks.use(model, 1, variants(1, reference_cache=False))
    assert not blocks.busy and graphs.made == 0
    assert len(blocks.notes()) == 1 and blocks.notes() == ()


@pytest.mark.parametrize("choice", ["off", "auto"])
def test_nothing_is_compiled_where_it_is_not_wanted(choice: Compile, toys: Toys, tmp_path: Path) -> None:
    """By default not on a processor, nor where models are small."""
    graphs = Graphs()
    studio = studio_with(toys, tmp_path, choice, graphs)
    for _ in range(2):
        assert drawn(studio)[0] == ["as written"]
        assert not studio._models.compiled.busy
    assert graphs.made == 0 and studio.computed(KLEIN_4B)["blocks"] == "as written"


@pytest.mark.parametrize("choice, size, wanted", [("auto", 8 * 10**9, True), ("auto", 10**8, False), ("on", 1, True)])
def test_what_is_wanted_on_a_card(choice: Compile, size: int, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    blocks = CompiledBlocks(choice, torch.device("cuda"), Compiler())
    assert (blocks.outlook(size) != "as written") == wanted
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # without Triton
    assert CompiledBlocks("auto", torch.device("cuda"), Compiler()).outlook(size) == "as written"
