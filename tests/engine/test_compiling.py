"""Compiled blocks compute what blocks do as they are written, and whoever runs them never waits for a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flux2_studio.engine.runtime import compiling
from flux2_studio.engine.runtime.compiling import CompileError, CompileKey, Compiler, structure_key
from flux2_studio.engine.weights.gguf import GGUFMatrix
from flux2_studio.engine.weights.quantize import QuantizedLinear
from tests.engine.blocks import made, velocity
from tests.graphs import Graphs


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    return Graphs()


def test_what_is_not_compiled_runs_as_it_is_written(graphs: Graphs) -> None:
    """Nothing compiles but `compile`."""
    compiler, model = Compiler(backend=graphs), made()
    assert not compiler.attach(model, CompileKey())
    (_, compiled, ran) = graphs.since(lambda: velocity(model, 4))
    assert (compiled, ran) == (0, 0)
    compiler.compile(compiler.make_job(model, CompileKey()))
    assert compiler.attach(model, CompileKey())
    assert not compiler.attach(model, CompileKey(), CompileKey(is_batched=True))
    (_, compiled, ran) = graphs.since(lambda: velocity(model, 4, batch=2))
    assert (compiled, ran) == (0, 0)


def test_a_shadow_keeps_the_weights_that_a_block_had() -> None:
    block = made().double_blocks[0]
    before = {name: tensor.data_ptr() for name, tensor in block.state_dict().items()}
    block.forward = print
    shadow = compiling.clone_sharing_weights(block)
    block.to(torch.bfloat16)
    assert {name: tensor.data_ptr() for name, tensor in shadow.state_dict().items()} == before
    assert shadow.state_dict()["img_attn.qkv.weight"].dtype is torch.float32
    assert "forward" not in vars(shadow) and structure_key(shadow) != structure_key(block)


def test_what_cannot_be_compiled_is_said(tmp_path: Path) -> None:
    def broken(_module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        raise RuntimeError("there is no compiler\nand more")

    model = made()
    compiler = Compiler(backend=broken, cache_folder=tmp_path / "none")
    with pytest.raises(CompileError, match="there is no compiler") as error:
        compiler.compile(compiler.make_job(model, CompileKey()))
    assert error.value.is_permanent
    assert not compiler.attach(model, CompileKey())
    assert velocity(model, 4).isfinite().all()


def test_formats_whose_blocks_take_the_same_bytes_are_told_apart() -> None:
    """Q4_0 takes 18 bytes for 32 values, Q4_K 144 for 256."""
    layers = [QuantizedLinear(GGUFMatrix(torch.zeros(8, 144, dtype=torch.uint8), name)) for name in ("Q4_0", "Q4_K")]
    assert layers[0].in_features == layers[1].in_features
    assert structure_key(layers[0]) != structure_key(layers[1])
