"""Compiled blocks compute what blocks do as they are written, in every variant and storage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from flux2_studio.engine.flux.latents import initial_noise
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.engine.flux.transformer import ReferenceCache, Transformer
from flux2_studio.engine.lora.layers import AdaptedLinear, LowRank
from flux2_studio.engine.runtime.compiling import CompileError, CompileKey, Compiler, compile_keys_for, structure_key
from flux2_studio.engine.runtime.streaming import stream_blocks
from flux2_studio.engine.weights.quantize import QuantizedLinear, quantize
from tests import oracle
from tests.engine.blocks import CPU, PARAMS, made, velocity
from tests.graphs import Graphs

BLOCKS = PARAMS.double_blocks + PARAMS.single_blocks
MANNERS: tuple[Literal["none", "writes", "reads"], ...] = ("none", "writes", "reads")
ALL = [CompileKey(is_batched=several, cache_access=which) for several in (False, True) for which in MANNERS]


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    return Graphs()


@pytest.fixture(scope="module")
def compiler(graphs: Graphs) -> Compiler:
    """All variants of the model's blocks, compiled."""
    compiler = Compiler(backend=graphs)
    for variant in ALL:
        compiler.compile(compiler.make_job(made(), variant))
    return compiler


def test_one_graph_for_each_way_to_call_a_kind_of_block(graphs: Graphs, compiler: Compiler) -> None:
    """A double block has one, a single one two: the last leaves out what nobody reads."""
    assert graphs.made == len(ALL) * 3
    assert all(compiler.uncompiled_blocks(made(), variant) == [] for variant in ALL)


@pytest.mark.parametrize(
    "side, references, batch, text",
    [(4, 0, 1, 24), (9, 0, 1, 24), (4, 1, 1, 24), (3, 3, 1, 512), (4, 0, 2, 24), (5, 2, 3, 8), (16, 0, 1, 77)],
)
def test_what_is_compiled_holds_for_every_size(
    graphs: Graphs, compiler: Compiler, side: int, references: int, batch: int, text: int
) -> None:
    model = made()
    expected = velocity(model, side, references, batch, text)
    assert compiler.attach(model, CompileKey(is_batched=batch > 1))
    found, compiled, ran = graphs.since(lambda: velocity(model, side, references, batch, text))
    assert (compiled, ran) == (0, BLOCKS)
    assert oracle.relative_error(found, expected) <= 1e-6
    compiler.detach(model)
    found, compiled, ran = graphs.since(lambda: velocity(model, side, references, batch, text))
    assert (compiled, ran) == (0, 0) and found.equal(expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("side", [4, 7])
def test_a_reference_cache_is_written_and_read(graphs: Graphs, compiler: Compiler, side: int, batch: int) -> None:
    model = made()
    caches = [ReferenceCache(side * side) for _ in range(2)]

    def both(cache: ReferenceCache) -> tuple[Tensor, Tensor]:
        return velocity(model, side, 1, batch, cache=cache), velocity(model, side, 0, batch, cache=cache)

    expected = both(caches[0])
    assert compiler.attach(model, *compile_keys_for(batch, reference_cache=True))
    found, compiled, ran = graphs.since(lambda: both(caches[1]))
    assert (compiled, ran) == (0, 2 * BLOCKS)
    for a, b in zip(found, expected, strict=True):
        assert oracle.relative_error(a, b) <= 1e-6
    for ours, theirs in zip(caches[1].blocks, caches[0].blocks, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("guiding, reference_cache", [("none", False), ("none", True), ("cfg", False)])
def test_the_loop_takes_the_variants_that_are_foretold(
    graphs: Graphs, compiler: Compiler, guiding: Any, reference_cache: bool
) -> None:
    model = made()
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(1, 24, PARAMS.context_width, generator=generator)
    references = [torch.randn(1, 128, 5, 4, generator=generator)]

    def picture() -> Tensor:
        *_, last = denoise(
            model,
            initial_noise([1], 96, 64),
            context,
            steps=3,
            guidance=3.0,
            guidance_mode=guiding,
            negative_context=context.flip(1),
            references=references,
            reference_cache=reference_cache,
        )
        return last.latents

    expected = picture()
    rows = 2 if guiding == "cfg" else 1
    assert compiler.attach(model, *compile_keys_for(rows, reference_cache=reference_cache))
    found, compiled, ran = graphs.since(picture)
    assert (compiled, ran) == (0, 3 * BLOCKS)
    assert oracle.relative_error(found, expected) <= 1e-5


def test_what_no_compiled_code_fits_runs_as_it_is_written_too(graphs: Graphs, compiler: Compiler) -> None:
    model = made()
    assert compiler.attach(model, CompileKey())
    expected = velocity(made(), 4, batch=2)
    found, compiled, ran = graphs.since(lambda: velocity(model, 4, batch=2))  # one row was promised
    assert (compiled, ran) == (0, 0) and found.equal(expected)


def hold(model: Transformer, kind: Any) -> None:
    for name, layer in list(model.named_modules()):
        if "blocks." in name and isinstance(layer, nn.Linear):
            model.set_submodule(name, held := QuantizedLinear(quantize(layer.weight, kind)))
            held.allow_int8_activations = True


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("products", [False, True])
def test_layers_in_8_bits(kind: Any, products: bool, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restored before their products, and multiplied as they are: both as without a compiler."""
    monkeypatch.setattr(
        "flux2_studio.engine.weights.quantize.has_8bit_matmul", lambda _device, of: products and of == kind
    )
    compiler, model = Compiler(backend=graphs), made()
    plain = velocity(model, 6)
    hold(model, kind)
    expected = velocity(model, 6)
    compiler.compile(compiler.make_job(model, CompileKey()))
    assert compiler.attach(model, CompileKey())
    found, compiled, ran = graphs.since(lambda: velocity(model, 6))
    assert (compiled, ran) == (0, BLOCKS)
    assert oracle.relative_error(found, expected) <= 1e-2 if products else 1e-6  # a rounded code may be the next
    assert 1e-3 < oracle.relative_error(expected, plain) < 0.1


def test_blocks_with_loras_have_code_of_their_own(graphs: Graphs, compiler: Compiler) -> None:
    model = made()
    compiler.compile(compiler.make_job(model, CompileKey()))
    assert len({structure_key(block) for block in model.double_blocks}) == 1
    name = "double_blocks.1.img_attn.proj"
    layer = model.get_submodule(name)
    model.set_submodule(
        name, AdaptedLinear(layer, "a LoRA", branches=[LowRank(torch.ones(2, 128), torch.ones(128, 2))])
    )
    assert [structure_key(block) for block in compiler.uncompiled_blocks(model, CompileKey())] == [
        structure_key(model.double_blocks[1])
    ]
    assert not compiler.attach(model, CompileKey())
    expected = velocity(model, 4)
    _, compiled, _ = graphs.since(lambda: compiler.compile(compiler.make_job(model, CompileKey())))
    assert compiled == 1 and compiler.attach(model, CompileKey())
    found, compiled, ran = graphs.since(lambda: velocity(model, 4))
    assert (compiled, ran) == (0, BLOCKS)
    assert oracle.relative_error(found, expected) <= 1e-6
    assert oracle.relative_error(expected, velocity(made(), 4)) > 1e-3
    model.set_submodule(name, layer)
    assert compiler.attach(model, CompileKey())


def test_streamed_blocks_are_fetched_before_they_run(graphs: Graphs, compiler: Compiler) -> None:
    model = made()
    expected = velocity(model, 4)
    streaming = stream_blocks(model, [*model.double_blocks, *model.single_blocks][1:], CPU)
    assert compiler.attach(model, CompileKey())
    for _ in range(2):
        found, compiled, ran = graphs.since(lambda: velocity(model, 4))
        assert (compiled, ran) == (0, BLOCKS)
        assert oracle.relative_error(found, expected) <= 1e-6
    streaming.close()


def test_blocks_are_compiled_beside_one_that_runs(graphs: Graphs) -> None:
    """In a thread of its own, while the weights move, and what runs meanwhile is as it is written."""
    model, compiler = made(), Compiler(backend=graphs)
    expected = velocity(model, 4)
    with ThreadPoolExecutor(1) as pool:
        preparing = pool.submit(compiler.compile, compiler.make_job(model, CompileKey()))
        while not preparing.done():
            model.to(torch.bfloat16).to(torch.float32)
            assert not compiler.attach(model, CompileKey()) or preparing.done()
            assert velocity(model, 4).isfinite().all()
        preparing.result()
    model = made()
    assert compiler.attach(model, CompileKey())
    assert oracle.relative_error(velocity(model, 4), expected) <= 1e-6


def test_want_of_memory_does_not_last(graphs: Graphs) -> None:
    short = [True]

    def wants(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        if short:
            short.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return graphs(module, inputs)

    model, compiler = made(), Compiler(backend=wants)
    with pytest.raises(CompileError, match="out of memory") as error:
        compiler.compile(compiler.make_job(model, CompileKey()))
    assert not error.value.is_permanent
    compiler.compile(compiler.make_job(model, CompileKey()))
    assert compiler.attach(model, CompileKey())


def test_a_damaged_cache_is_emptied(tmp_path: Path, graphs: Graphs) -> None:
    """As a killed process may leave it: whoever meets it again would fail with every start."""
    (tmp_path / "half.so").write_bytes(b"half")

    def reads(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        if (tmp_path / "half.so").exists():
            raise ImportError("file too short")
        return graphs(module, inputs)

    model, compiler = made(), Compiler(backend=reads, cache_folder=tmp_path)
    compiler.compile(compiler.make_job(model, CompileKey()))
    assert not tmp_path.exists()
    assert compiler.attach(model, CompileKey())


def test_torch_itself_compiles_them() -> None:
    """The real compiler, with one block of each kind: it needs a C++ compiler on a CPU, as on any machine."""
    model, compiler = made(), Compiler()
    model.double_blocks, model.single_blocks = model.double_blocks[:1], model.single_blocks[:1]
    expected = velocity(model, 5, 1)
    compiler.compile(compiler.make_job(model, CompileKey()))
    assert compiler.attach(model, CompileKey())
    assert oracle.relative_error(velocity(model, 5, 1), expected) <= 1e-5
