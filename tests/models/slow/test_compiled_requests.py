"""Every kind of request runs on compiled blocks the second time; nothing does while something is compiled."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.graphs import Graphs
from tests.models.compiling import drawn, studio_with
from tests.tiny import Toys


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
    studio._models.background_compiler.wait_until_idle()
    (again, _, _), compiled, ran = graphs.since(lambda: drawn(studio, **fields))
    assert set(first) == {"as written"} and set(again) == {"compiled"}
    assert compiled == 0 and ran


def test_while_something_is_compiled_everything_runs_as_it_is_written(toys: Toys, tmp_path: Path) -> None:
    """torch calls no compiled code while it compiles."""
    graphs, going_on = Graphs(), threading.Event()

    def slow(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        assert going_on.wait(120)
        return graphs(module, inputs)

    studio = studio_with(toys, tmp_path, "on", slow)
    going_on.set()
    drawn(studio)
    studio._models.background_compiler.wait_until_idle()
    assert drawn(studio)[0] == ["compiled"]
    going_on.clear()
    assert set(drawn(studio, count=2)[0]) == {"as written"}
    (ways, _, _), _, ran = graphs.since(lambda: drawn(studio))
    assert studio._models.background_compiler.is_compiling and ways == ["as written"] and ran == 0
    going_on.set()
    studio._models.background_compiler.wait_until_idle()
    assert drawn(studio)[0] == ["compiled"] and set(drawn(studio, count=2)[0]) == {"compiled"}
