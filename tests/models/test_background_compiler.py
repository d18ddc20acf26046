"""Blocks are compiled beside the runs, for the next ones; what cannot be is said, and drawn all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_studio.checkpoints import KLEIN_4B
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.lora.layers import AdaptedLinear, LowRank
from flux2_studio.engine.params import TransformerParams
from flux2_studio.engine.runtime.compiling import Compiler, compile_keys_for
from flux2_studio.models.background_compiler import BackgroundCompiler
from flux2_studio.settings import CompileMode
from tests.graphs import Graphs
from tests.models.compiling import drawn, studio_with
from tests.tiny import Toys


def test_the_first_picture_is_drawn_as_it_is_written_and_the_next_ones_compiled(toys: Toys, tmp_path: Path) -> None:
    graphs = Graphs()
    studio = studio_with(toys, tmp_path, "on", graphs)
    first, _, _ = drawn(studio)
    studio._models.background_compiler.wait_until_idle()
    again, pictures, _ = drawn(studio)
    assert (first, again) == (["as written"], ["compiled"]) and graphs.ran
    repeated, same, _ = drawn(studio)
    assert repeated == ["compiled"] and same[0].tobytes() == pictures[0].tobytes()
    larger, compiled, _ = graphs.since(lambda: drawn(studio, width=96, height=80))
    assert larger[0] == ["compiled"] and compiled == 0
    assert studio.compute_settings(KLEIN_4B)["blocks"] == "compiled"


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
        studio._models.background_compiler.wait_until_idle()
    assert told[0] == told[2] == [] and len(told[1]) == 1
    assert "there is no compiler" in told[1][0] and "FLUX2_COMPILE=off" in told[1][0]
    assert len(tried) == 1
    assert studio.compute_settings(KLEIN_4B)["blocks"] == "as written"


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
        model.set_submodule(name, AdaptedLinear(model.get_submodule(name), "a LoRA", branches=[path]))
    blocks = BackgroundCompiler("on", torch.device("cpu"), Compiler(backend=graphs))
    for _ in range(2):
        assert not blocks.try_use(model, 1, compile_keys_for(1, reference_cache=False))
    assert not blocks.is_compiling and graphs.made == 0
    assert len(blocks.take_notes()) == 1 and blocks.take_notes() == ()


@pytest.mark.parametrize("choice", ["off", "auto"])
def test_nothing_is_compiled_where_it_is_not_wanted(choice: CompileMode, toys: Toys, tmp_path: Path) -> None:
    """By default not on a processor, nor where models are small."""
    graphs = Graphs()
    studio = studio_with(toys, tmp_path, choice, graphs)
    for _ in range(2):
        assert drawn(studio)[0] == ["as written"]
        assert not studio._models.background_compiler.is_compiling
    assert graphs.made == 0 and studio.compute_settings(KLEIN_4B)["blocks"] == "as written"


@pytest.mark.parametrize("choice, size, wanted", [("auto", 8 * 10**9, True), ("auto", 10**8, False), ("on", 1, True)])
def test_what_is_wanted_on_a_card(
    choice: CompileMode, size: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    blocks = BackgroundCompiler(choice, torch.device("cuda"), Compiler())
    assert (blocks.expected_mode(size) != "as written") == wanted
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # without Triton
    assert BackgroundCompiler("auto", torch.device("cuda"), Compiler()).expected_mode(size) == "as written"
