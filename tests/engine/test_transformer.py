"""The transformer against diffusers', from every layout in which its weights are published."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flux2_studio.engine.flux.latents import sequence_position_ids
from flux2_studio.engine.flux.transformer import ReferenceCache, Transformer
from flux2_studio.engine.weights.loading import WeightStorage, load_transformer, open_transformer
from flux2_studio.engine.weights.quantize import QuantizedLinear
from tests import oracle, tiny
from tests.tiny import Flow, Toys

CPU = torch.device("cpu")
TEXT = 21
NOISE_SIZE = (4, 6)
REFERENCE_SIZES = ((5, 3), (2, 7))
LAYOUTS: dict[str, Callable[[Flow], Path]] = {
    "single file": lambda flow: flow.file,
    "folder": lambda flow: flow.folder,
    "shards": lambda flow: flow.sharded,
}


class Inputs:
    """One evaluation's inputs: two pictures at two times, with two references each."""

    def __init__(self, size: tiny.FlowSize) -> None:
        generator = torch.Generator().manual_seed(7)
        references = [torch.empty(1, 128, h, w) for h, w in REFERENCE_SIZES]
        self.ids = sequence_position_ids(TEXT, *NOISE_SIZE, references)
        self.x = torch.randn(2, len(self.ids) - TEXT, 128, generator=generator)
        self.ctx = torch.randn(2, TEXT, size.context_width, generator=generator)
        self.t = torch.tensor([0.83, 0.21])
        self.guidance = torch.tensor([4.0, 2.5]) if size.guidance else None

    def ours(self, model: Transformer) -> Tensor:
        dtype = model.dtype
        with torch.no_grad():
            return model(self.x.to(dtype), self.ctx.to(dtype), self.t, model.rope(self.ids), self.guidance)

    def theirs(self, flow: Flow) -> Tensor:
        return oracle.velocity(flow.model, self.x, self.ctx, self.t, self.ids[TEXT:], self.ids[:TEXT], self.guidance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "size"), [("klein", tiny.KLEIN), ("nine", tiny.NINE), ("dev", tiny.DEV)])
def test_one_velocity_equals_diffusers(toys: Toys, name: str, size: tiny.FlowSize, layout: str) -> None:
    flow: Flow = getattr(toys, name)
    model = load_transformer(LAYOUTS[layout](flow), device=CPU, dtype=torch.float32)
    inputs = Inputs(size)
    assert oracle.relative_error(inputs.ours(model), inputs.theirs(flow)) <= 1e-5


@pytest.mark.parametrize(("name", "size"), [("klein", tiny.KLEIN), ("dev", tiny.DEV)])
def test_bfloat16_errs_no_more_than_twice_as_much_as_diffusers(toys: Toys, name: str, size: tiny.FlowSize) -> None:
    flow: Flow = getattr(toys, name)
    inputs = Inputs(size)
    # Times and guidance that stay exact in bfloat16: diffusers rounds them too, which would hide all other errors.
    inputs.t = torch.tensor([0.5, 0.25])
    inputs.guidance = torch.tensor([4.0, 2.0]) if size.guidance else None
    exact = inputs.theirs(flow)
    ours = inputs.ours(load_transformer(flow.file, device=CPU, dtype=torch.bfloat16))
    theirs_model = type(flow.model).from_pretrained(flow.folder, torch_dtype=torch.bfloat16)
    guidance = None if inputs.guidance is None else inputs.guidance.bfloat16()
    theirs = oracle.velocity(
        theirs_model,
        inputs.x.bfloat16(),
        inputs.ctx.bfloat16(),
        inputs.t.bfloat16(),
        inputs.ids[TEXT:],
        inputs.ids[:TEXT],
        guidance,
    )
    assert ours.dtype is torch.bfloat16
    assert 0 < oracle.relative_error(ours, exact) <= 2 * oracle.relative_error(theirs, exact)


def test_sizes_are_read_from_the_shapes(toys: Toys) -> None:
    for flow, size in ((toys.klein, tiny.KLEIN), (toys.nine, tiny.NINE), (toys.dev, tiny.DEV)):
        for locate in LAYOUTS.values():
            params = open_transformer(locate(flow)).params
            found = (params.double_blocks, params.single_blocks, params.heads, params.head_width, params.context_width)
            assert found == (size.double_blocks, size.single_blocks, size.heads, size.head_width, size.context_width)
            assert params.guidance_embedding == size.guidance
            assert params.mlp == 3 * params.hidden


@pytest.mark.parametrize("name", ["klein", "nine", "dev"])
def test_the_toys_single_file_is_what_diffusers_itself_reads(toys: Toys, name: str) -> None:
    """The mapping in tiny.py, written from the published names, against the converter that diffusers ships."""
    flow: Flow = getattr(toys, name)
    converted = convert_flux2_transformer_checkpoint_to_diffusers(load_file(flow.file))
    expected = flow.model.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("name", "size"), [("klein", tiny.KLEIN), ("dev", tiny.DEV)])
def test_every_tensor_of_a_toy_leaves_a_trace(toys: Toys, name: str, size: tiny.FlowSize) -> None:
    """Parity means little if a tensor could be garbled without being noticed: each shows at ten times the bar."""
    inputs = Inputs(size)
    model = load_transformer(getattr(toys, name).file, device=CPU, dtype=torch.float32)
    before = inputs.ours(model)
    silent = []
    for key, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        parameter.copy_(kept.roll(1, 0))
        if oracle.relative_error(inputs.ours(model), before) < 1e-4:
            silent.append(key)
        parameter.copy_(kept)
    assert silent == []


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_every_axis_of_the_positions_leaves_a_trace(toys: Toys, axis: int) -> None:
    inputs = Inputs(tiny.KLEIN)
    model = load_transformer(toys.klein.file, device=CPU, dtype=torch.float32)
    before = inputs.ours(model)
    moved = inputs.ids[:, axis] > 0
    inputs.ids = inputs.ids.clone()
    inputs.ids[moved, axis] += 1
    assert oracle.relative_error(inputs.ours(model), before) > 1e-3


def test_only_the_asked_for_tokens_are_returned(toys: Toys) -> None:
    inputs = Inputs(tiny.KLEIN)
    model = load_transformer(toys.klein.file, device=CPU, dtype=torch.float32)
    tokens = NOISE_SIZE[0] * NOISE_SIZE[1]
    with torch.no_grad():
        some = model(inputs.x, inputs.ctx, inputs.t, model.rope(inputs.ids), outputs=tokens)
    assert some.shape == (2, tokens, 128)
    torch.testing.assert_close(some, inputs.ours(model)[:, :tokens])


def _largest_block_output(model: Transformer, run: Callable[[], Tensor]) -> float:
    """The largest magnitude among the residual streams after each block."""
    seen: list[float] = []

    def note(_module: torch.nn.Module, _inputs: Sequence[object], output: Tensor | tuple[Tensor, ...]) -> None:
        streams = output if isinstance(output, tuple) else (output,)
        seen.extend(float(stream.abs().max()) for stream in streams)

    hooks = [block.register_forward_hook(note) for block in (*model.double_blocks, *model.single_blocks)]
    run()
    for hook in hooks:
        hook.remove()
    return max(seen)


def test_float16_stays_finite_where_activations_outgrow_it(toys: Toys, tmp_path: Path) -> None:
    state = load_file(toys.klein.file)
    for key in state:
        if key.endswith(("proj.weight", "mlp.2.weight", "linear2.weight")):
            state[key] = 1e5 * state[key]
    loud = tiny.save_state(state, tmp_path / "loud.safetensors")
    inputs = Inputs(tiny.KLEIN)
    exact = load_transformer(loud, device=CPU, dtype=torch.float32)
    assert _largest_block_output(exact, lambda: inputs.ours(exact)) > 65504, "the toy is too quiet to prove anything"

    half = load_transformer(loud, device=CPU, dtype=torch.float16)
    velocity = inputs.ours(half)
    assert velocity.dtype is torch.float16
    assert velocity.isfinite().all()


def test_a_diffusers_repository_is_found_by_its_root(toys: Toys, tmp_path: Path) -> None:
    """The whole repository as `snapshot_download` lays it out: model_index.json and transformer/."""
    (tmp_path / "transformer").symlink_to(toys.klein.folder, target_is_directory=True)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"}))
    inputs = Inputs(tiny.KLEIN)
    model = load_transformer(tmp_path, device=CPU, dtype=torch.float32)
    assert oracle.relative_error(inputs.ours(model), inputs.theirs(toys.klein)) <= 1e-5


@pytest.mark.parametrize("storage", ["plain", "int8"])
@pytest.mark.parametrize("name", ["klein", "nine"])
def test_the_last_block_computes_what_is_read_and_no_more(toys: Toys, name: str, storage: WeightStorage) -> None:
    model = open_transformer(getattr(toys, name).file).load(device=CPU, dtype=torch.float32, storage=storage)
    inputs = Inputs({"klein": tiny.KLEIN, "nine": tiny.NINE}[name])
    wanted = NOISE_SIZE[0] * NOISE_SIZE[1]
    references = inputs.x.shape[1] - wanted
    rope = model.rope(inputs.ids)

    def velocity(outputs: int | None, cache: ReferenceCache | None) -> tuple[Tensor, int]:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            v = model(inputs.x, inputs.ctx, inputs.t, rope, outputs=outputs, cache=cache)
        return v[:, :wanted], counter.get_total_flops()

    for kept in (0, references):
        caches = [ReferenceCache(kept) if kept else None for _ in range(2)]
        everything, of_all = velocity(None, caches[0])
        some, of_some = velocity(wanted, caches[1])
        assert oracle.relative_error(some, everything) <= 1e-6
        hidden, inner = model.params.hidden, model.params.mlp
        after = (hidden + inner) * hidden  # the attention; before it, where the layer can: queries, the MLP's halves
        before = (hidden + 2 * inner) * hidden if storage == "plain" else 0
        # Of all of x, the text is left out already, unless references attend by themselves.
        left_out = len(inputs.x) * (references + (TEXT if kept else 0))
        assert of_all - of_some >= 2 * left_out * (before + after)
        if kept:
            assert caches[0] is not None and caches[1] is not None
            pairs = zip(caches[0].blocks, caches[1].blocks, strict=True)
            assert all(torch.allclose(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def test_what_hangs_on_the_time_is_the_same_for_one_step_and_for_all(toys: Toys) -> None:
    model = load_transformer(toys.dev.file, device=CPU, dtype=torch.float32)
    times, guidance = torch.tensor([1.0, 0.7, 0.2]), torch.full((3,), 4.0)
    with torch.no_grad():
        together = model.modulations(times, guidance)
        for step in range(3):
            alone = model.modulations(times[step : step + 1], guidance[:1])
            for part in ("image", "text", "single", "final"):
                for a, b in zip(getattr(together.at_step(step), part), getattr(alone, part), strict=True):
                    assert a.shape == b.shape == (1, 1, model.params.hidden)
                    torch.testing.assert_close(a, b)


def test_held_in_bfloat16_it_computes_what_its_values_say(toys: Toys) -> None:
    """What a processor without bfloat16 does: half the memory, and no error but the weights' own rounding."""
    opened = open_transformer(toys.klein.file)
    rounded = opened.load(device=CPU, dtype=torch.float32)
    for name, layer in rounded.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "img_in":
            layer.weight.copy_(layer.weight.bfloat16())
    held = opened.load(device=CPU, dtype=torch.float32, storage="bfloat16")
    assert isinstance(held.double_blocks[0].img_mlp[0], QuantizedLinear)
    assert held.dtype is torch.float32
    inputs = Inputs(tiny.KLEIN)
    assert oracle.relative_error(inputs.ours(held), inputs.ours(rounded)) <= 1e-6
    exact, half = inputs.theirs(toys.klein), inputs.ours(opened.load(device=CPU, dtype=torch.bfloat16))
    assert 0 < oracle.relative_error(inputs.ours(held), exact) < oracle.relative_error(half, exact)
    sizes = (opened.tensor_bytes(dtype=torch.float32), opened.tensor_bytes(dtype=torch.float32, storage="bfloat16"))
    assert 0.5 <= sum(sizes[1].values()) / sum(sizes[0].values()) < 0.55
