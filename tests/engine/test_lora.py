"""LoRAs against arithmetic done by hand: every kind as a dense change of the weights, run through diffusers' model.

The factors are drawn here, multiplied out here, and added to the weights that diffusers runs; the engine sees only the
file. Files in Black Forest Labs' names reach diffusers through its own converter of whole checkpoints, files that its
LoRA loader can read through that loader too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders import Flux2LoraLoaderMixin
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2_studio.engine.flux.latents import sequence_position_ids
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.lora import adapters as lora
from flux2_studio.engine.lora.adapters import set_loras
from flux2_studio.engine.lora.file import Lora, open_lora
from flux2_studio.engine.lora.keys import parse_key, target_of
from flux2_studio.engine.lora.layers import AdaptedLinear
from flux2_studio.engine.weights.loading import WeightStorage, open_transformer
from flux2_studio.engine.weights.quantize import QuantizedLinear
from flux2_studio.errors import RequestError, WeightsError
from tests import oracle, tiny
from tests.tiny import Flow, State, Toys

CPU = torch.device("cpu")
TEXT, SIZE = 9, (4, 3)
RANK, ALPHA = 4, 3.0
Draw = Callable[..., Tensor]


class Bench:
    """One toy transformer, ours and diffusers', and the same inputs for both."""

    def __init__(self, flow: Flow, size: tiny.FlowSize) -> None:
        self.flow = flow
        generator = torch.Generator().manual_seed(5)
        self.ids = sequence_position_ids(TEXT, *SIZE, [])
        self.x = torch.randn(2, len(self.ids) - TEXT, 128, generator=generator)
        self.ctx = torch.randn(2, TEXT, size.context_width, generator=generator)
        self.t = torch.tensor([0.83, 0.21])
        self.guidance = torch.tensor([4.0, 2.5]) if size.guidance else None

    @cached_property
    def weights(self) -> State:
        """Of every linear layer, in Black Forest Labs' names."""
        return {key: tensor for key, tensor in load_file(self.flow.file).items() if tensor.ndim == 2}

    def load(self, dtype: torch.dtype = torch.float32, storage: WeightStorage = "plain") -> Transformer:
        return open_transformer(self.flow.file).load(device=CPU, dtype=dtype, storage=storage)

    def run(self, model: Any) -> Tensor:
        dtype = model.dtype
        with torch.no_grad():
            return model(self.x.to(dtype), self.ctx.to(dtype), self.t, model.rope(self.ids), self.guidance)

    def theirs(self, deltas: State, *, bfl: bool) -> Tensor:
        """diffusers' velocity with `deltas` [out, in] added to its weights; bfl: they have Black Forest Labs' names."""
        model = copy.deepcopy(self.flow.model)
        if bfl:
            state = load_file(self.flow.file)
            for key, delta in deltas.items():
                state[key] = state[key] + delta
            model.load_state_dict(convert_flux2_transformer_checkpoint_to_diffusers(state))
        else:
            add(model, deltas)
        return oracle.velocity(model, self.x, self.ctx, self.t, self.ids[TEXT:], self.ids[:TEXT], self.guidance)


def add(model: Flux2Transformer2DModel, deltas: State) -> None:
    """Add deltas to diffusers' weights; `to_qkv` and `to_added_qkv` are the three projections in one."""
    state = model.state_dict()
    for key, delta in deltas.items():
        for joined, names in (
            (".to_qkv.", ("to_q", "to_k", "to_v")),
            (".to_added_qkv.", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            if joined in key:
                for name, rows in zip(names, delta.chunk(3), strict=True):
                    state[key.replace(joined, f".{name}.")] += rows
                break
        else:
            state[key] += delta


@pytest.fixture(scope="module")
def klein(toys: Toys) -> Bench:
    return Bench(toys.klein, tiny.KLEIN)


@pytest.fixture(scope="module")
def dev(toys: Toys) -> Bench:
    return Bench(toys.dev, tiny.DEV)


def drawing(seed: int = 0) -> Draw:
    """Numbers of order one over the root of the last axis, reproducible."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def opened(state: Mapping[str, Tensor], folder: Path, name: str = "style.safetensors", **metadata: str) -> Lora:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, folder / name, metadata=metadata)
    return open_lora(folder / name)


def close(ours: Tensor, expected: Tensor) -> None:
    assert oracle.relative_error(ours, expected) <= 1e-5


def agree(bench: Bench, loras: list[tuple[Lora, float]], deltas: State, *, bfl: bool) -> None:
    """Both ways of applying `loras` are what diffusers makes of the dense deltas; and the deltas matter."""
    model = bench.load()
    bare = bench.run(model)
    expected = bench.theirs(deltas, bfl=bfl)
    assert oracle.relative_error(expected, bare) > 1e-2, "the changes are too small to prove anything"
    reports = set_loras(model, loras)
    assert all(not report.unmatched for report in reports)
    close(bench.run(model), expected)
    set_loras(model, loras, fused=True)
    close(bench.run(model), expected)
    set_loras(model, [])
    assert torch.equal(bench.run(model), bare)


# --- every spelling of the keys ---

DOTTED = ("diffusion_model.", "base_model.model.", "base_model.model.diffusion_model.", "model.diffusion_model.", "")
DIFFUSERS = ("transformer.", "base_model.model.transformer.", "base_model.model.", "")
SUFFIXES = (
    ("lora_A.weight", "lora_B.weight", False),
    ("lora_A.default.weight", "lora_B.default.weight", False),
    ("lora_A.weight", "lora_B.weight", True),
    ("lora_down.weight", "lora_up.weight", True),
)


def low_rank(shapes: Mapping[str, tuple[int, int]], spell: Callable[[str], str], suffixes: Any) -> tuple[State, State]:
    """A LoRA file's state for layers of the given [out, in] shapes, and the deltas, under the layers' names."""
    draw = drawing(1)
    down_name, up_name, with_alpha = suffixes
    state: State = {}
    deltas: State = {}
    for number, (name, (rows, columns)) in enumerate(shapes.items()):
        rank = RANK + number % 2
        down, up = draw(rank, columns), draw(rows, rank) * 0.3
        layer = spell(name.removesuffix(".weight"))
        state |= {f"{layer}.{down_name}": down, f"{layer}.{up_name}": up}
        if with_alpha:
            state[f"{layer}.alpha"] = torch.tensor(ALPHA)
        deltas[name] = torch.einsum("or,ri->oi", up, down) * (ALPHA / rank if with_alpha else 1.0)
    return state, deltas


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {key: (tensor.shape[0], tensor.shape[1]) for key, tensor in state.items() if tensor.ndim == 2}


def underscored(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


def prefixed(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


@pytest.mark.parametrize("suffixes", SUFFIXES, ids=["A, B", "default", "A, B, alpha", "down, up, alpha"])
@pytest.mark.parametrize(
    "spell",
    [*map(prefixed, DOTTED), *map(underscored, ("lora_unet_", "lycoris_"))],
    ids=[*(prefix or "bare" for prefix in DOTTED), "lora_unet_", "lycoris_"],
)
def test_black_forest_labs_names(
    klein: Bench, tmp_path: Path, spell: Callable[[str], str], suffixes: tuple[str, str, bool]
) -> None:
    state, deltas = low_rank(shapes_of(klein.weights), spell, suffixes)
    agree(klein, [(opened(state, tmp_path), 1.0)], deltas, bfl=True)


@pytest.mark.parametrize("suffixes", SUFFIXES[1:], ids=["default", "A, B, alpha", "down, up, alpha"])
@pytest.mark.parametrize(
    "spell",
    [*map(prefixed, DIFFUSERS), *map(underscored, ("lycoris_", "lora_transformer_", "lora_unet_"))],
    ids=[*(prefix or "bare" for prefix in DIFFUSERS), "lycoris_", "lora_transformer_", "lora_unet_"],
)
def test_diffusers_names(
    klein: Bench, tmp_path: Path, spell: Callable[[str], str], suffixes: tuple[str, str, bool]
) -> None:
    """q, k, v apart and the halves of norm_out the other way round."""
    state, deltas = low_rank(shapes_of(klein.flow.model.state_dict()), spell, suffixes)
    agree(klein, [(opened(state, tmp_path), 1.0)], deltas, bfl=False)


@pytest.mark.parametrize("bfl", [True, False], ids=["Black Forest Labs", "diffusers"])
def test_dev_with_its_guidance(dev: Bench, tmp_path: Path, bfl: bool) -> None:
    shapes = shapes_of(dev.weights if bfl else dev.flow.model.state_dict())
    assert any("guidance" in name for name in shapes)
    state, deltas = low_rank(shapes, prefixed("diffusion_model." if bfl else "transformer."), SUFFIXES[2])
    agree(dev, [(opened(state, tmp_path), 1.0)], deltas, bfl=bfl)


def test_every_linear_layer_has_a_name(klein: Bench, dev: Bench) -> None:
    for bench in (klein, dev):
        layers = set(lora.linear_layers_of(bench.load()))
        assert {f"{name}.weight" for name in layers} == set(bench.weights)
        assert {target.module for name in layers if (target := target_of(name))} == layers
        theirs = [name.removesuffix(".weight") for name in shapes_of(bench.flow.model.state_dict())]
        assert {target.module for name in theirs if (target := target_of(name))} == layers


@pytest.mark.parametrize(
    "key",
    [
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_attn.qkv.lora_B.bias",
        "double_blocks.0.img_attn.qkv.diff_b",
        "lora_A.weight",
        ".lora_A.weight",
        "x." * 200 + "lora_A.weight",
    ],
)
def test_keys_that_are_none(key: str) -> None:
    parsed = parse_key(key)
    assert parsed is None or target_of(parsed[0]) is None


# --- what diffusers' own loader makes of a file ---


def loaded_by_diffusers(state: State) -> State:
    """Deltas under diffusers' names, from the factors that its loader hands to PEFT (alphas multiplied in)."""
    converted = Flux2LoraLoaderMixin.lora_state_dict(dict(state))
    deltas: State = {}
    for key, tensor in converted.items():
        name, _, field = key.removeprefix("transformer.").partition(".lo")
        if field == "ra_B.weight":
            deltas[f"{name}.weight"] = tensor @ converted[key.replace("lora_B", "lora_A")]
        elif field in ("kr_w1", "kr_w1_a"):
            base = key.partition(".lokr_")[0]
            w1, w2 = (
                converted[f"{base}.{f}"]
                if f"{base}.{f}" in converted
                else converted[f"{base}.{f}_a"] @ converted[f"{base}.{f}_b"]
                for f in ("lokr_w1", "lokr_w2")
            )
            deltas[f"{name}.weight"] = torch.kron(w1, w2)
    return deltas


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model.", "lora_unet_", "transformer."])
def test_low_rank_files_as_diffusers_reads_them(klein: Bench, tmp_path: Path, prefix: str) -> None:
    bfl = prefix != "transformer."
    shapes = shapes_of(klein.weights if bfl else klein.flow.model.state_dict())
    if prefix == "lora_unet_":  # the loader knows of no modulations in this spelling
        shapes = {name: shape for name, shape in shapes.items() if "modulation" not in name.lower()}
    # diffusers gives final_layer.adaLN_modulation.1 to norm_out as it is, though the halves are swapped between them
    shapes.pop("final_layer.adaLN_modulation.1.weight", None)
    spell = underscored(prefix) if prefix == "lora_unet_" else prefixed(prefix)
    state, _ = low_rank(shapes, spell, SUFFIXES[3] if prefix == "lora_unet_" else SUFFIXES[0])
    agree(klein, [(opened(state, tmp_path), 1.0)], loaded_by_diffusers(state), bfl=False)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lycoris_", ""])
def test_lokr_files_as_diffusers_reads_them(klein: Bench, tmp_path: Path, prefix: str) -> None:
    draw = drawing(2)
    state: State = {}
    source = klein.weights if prefix == "diffusion_model." else klein.flow.model.state_dict()
    spell = underscored(prefix) if prefix == "lycoris_" else prefixed(prefix)
    for name, (rows, columns) in shapes_of(source).items():
        if "blocks" in name:
            layer = spell(name.removesuffix(".weight"))
            state |= {
                f"{layer}.lokr_w1": draw(4, 4),
                f"{layer}.lokr_w2_a": draw(rows // 4, RANK),
                f"{layer}.lokr_w2_b": draw(RANK, columns // 4),
                f"{layer}.alpha": torch.tensor(ALPHA),
            }
    agree(klein, [(opened(state, tmp_path), 1.0)], loaded_by_diffusers(state), bfl=False)


# --- every kind of change ---


def kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ik,jl->ijkl", a, b).reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def lokr(draw: Draw, rows: int, columns: int, *, first: bool, second: bool, height: int = 4) -> tuple[State, Tensor]:
    """Fields and delta of a LoKr with factors of `height` and 8; first, second: whether that factor is a product
    itself. LyCORIS divides alpha by the rank once, if there is any product."""
    fields: State = {}
    w1, w2 = draw(height, 8), draw(rows // height, columns // 8)
    if first:
        fields["lokr_w1_a"], fields["lokr_w1_b"] = draw(height, 2), draw(2, 8)
        w1 = fields["lokr_w1_a"] @ fields["lokr_w1_b"]
    else:
        fields["lokr_w1"] = w1
    if second:
        fields["lokr_w2_a"], fields["lokr_w2_b"] = draw(rows // height, RANK), draw(RANK, columns // 8)
        w2 = fields["lokr_w2_a"] @ fields["lokr_w2_b"]
    else:
        fields["lokr_w2"] = w2
    fields["alpha"] = torch.tensor(3)  # an integer, as LyCORIS writes it
    return fields, kron(w1, w2) * (3 / RANK if second else 3 / 2 if first else 1.0)


def loha(draw: Draw, rows: int, columns: int) -> tuple[State, Tensor]:
    a1, b1, a2, b2 = draw(rows, RANK), draw(RANK, columns), 3 * draw(rows, RANK), 3 * draw(RANK, columns)
    fields = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(ALPHA)}
    delta = torch.einsum("or,ri,os,si->oi", a1, b1, a2, b2) * ALPHA / RANK
    return fields, delta


def difference(draw: Draw, rows: int, columns: int) -> tuple[State, Tensor]:
    fields = {"diff": 0.5 * draw(rows, columns)}
    return fields, fields["diff"]


def plain(draw: Draw, rows: int, columns: int) -> tuple[State, Tensor]:
    down, up = draw(RANK, columns), draw(rows, RANK)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}, up @ down * ALPHA / RANK


KINDS: dict[str, Callable[[Draw, int, int], tuple[State, Tensor]]] = {
    "lora": plain,
    "lokr": lambda *args: lokr(*args, first=False, second=False),
    "lokr, w1 a product": lambda *args: lokr(*args, first=True, second=False),
    "lokr, w2 a product": lambda *args: lokr(*args, first=False, second=True),
    "lokr, both products": lambda *args: lokr(*args, first=True, second=True),
    "lokr, w1 a row": lambda *args: lokr(*args, first=False, second=False, height=1),
    "loha": loha,
    "diff": difference,
}
MAGNITUDES = {
    "dora": ("dora_scale", lambda rows, columns: (rows, 1)),
    "dora of PEFT": ("lora_magnitude_vector", lambda rows, columns: (rows,)),
    "dora by columns": ("dora_scale", lambda rows, columns: (1, columns)),
}


def changes(
    weights: Mapping[str, Tensor],
    prefix: str,
    kind: str,
    magnitude: str | None = None,
    weight: float = 1.0,
    seed: int = 3,
) -> tuple[State, State]:
    """A file's state with one kind of change for every layer of `weights`, and the deltas for the LoRA's `weight`."""
    draw = drawing(seed)
    state: State = {}
    deltas: State = {}
    for name, before in weights.items():
        fields, delta = KINDS[kind](draw, *before.shape)
        if magnitude is None:
            deltas[name] = weight * delta
        else:
            field, shape = MAGNITUDES[magnitude]
            merged = before + delta
            axis = 0 if magnitude == "dora by columns" else 1
            norms = merged.square().sum(axis, keepdim=True).sqrt()
            sizes = norms.mean() * (0.7 + draw(*norms.shape).abs())
            fields[field] = sizes.reshape(shape(*before.shape))
            deltas[name] = weight * (sizes * merged / norms - before)
        layer = prefix + name.removesuffix(".weight")
        state |= {f"{layer}.{field}": tensor for field, tensor in fields.items()}
    return state, deltas


@pytest.mark.parametrize("bfl", [True, False], ids=["Black Forest Labs", "diffusers"])
@pytest.mark.parametrize(
    ("kind", "magnitude"),
    [*((kind, None) for kind in KINDS), *(("lora", name) for name in MAGNITUDES), ("lokr", "dora")],
)
def test_kinds(klein: Bench, tmp_path: Path, kind: str, magnitude: str | None, bfl: bool) -> None:
    """In diffusers' names the changes are for q, k and v apart, norms of DoRA included, and for swapped halves."""
    weights = klein.weights if bfl else shaped(klein.flow.model.state_dict())
    prefix = "diffusion_model." if bfl else "transformer."
    state, deltas = changes(weights, prefix, kind, magnitude, weight=0.6)
    agree(klein, [(opened(state, tmp_path), 0.6)], deltas, bfl=bfl)


def shaped(state: Mapping[str, Tensor]) -> State:
    return {name: tensor for name, tensor in state.items() if tensor.ndim == 2}


@pytest.mark.parametrize("stabilised", [False, True])
def test_an_alpha_in_the_header(klein: Bench, tmp_path: Path, stabilised: bool) -> None:
    """diffusers keeps PEFT's configuration there; a layer of its own alpha is named in alpha_pattern."""
    weights = {name: klein.weights[name] for name in klein.weights if "single_blocks" in name}
    state, deltas = low_rank(shapes_of(weights), prefixed("transformer."), SUFFIXES[0])
    for name in deltas:
        rank = state[f"transformer.{name.replace('.weight', '.lora_A.weight')}"].shape[0]
        alpha = 2.0 if name == "single_blocks.1.linear2.weight" else 7.0
        deltas[name] = deltas[name] * alpha / (rank**0.5 if stabilised else rank)
    config = {
        "transformer.r": RANK,
        "transformer.lora_alpha": 7,
        "transformer.alpha_pattern": {"single_blocks.1.linear2": 2},
        "transformer.use_rslora": stabilised,
    }
    found = opened(state, tmp_path, lora_adapter_metadata=json.dumps(config))
    agree(klein, [(found, 1.0)], deltas, bfl=True)


def test_an_alpha_beside_the_file(klein: Bench, tmp_path: Path) -> None:
    """As PEFT itself saves it."""
    state, deltas = low_rank({"img_in.weight": (128, 128)}, prefixed("base_model.model."), SUFFIXES[0])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8, "r": RANK}))
    found = opened(state, tmp_path, "adapter_model.safetensors")
    agree(klein, [(found, 1.0)], {name: delta * 8 / RANK for name, delta in deltas.items()}, bfl=True)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "alpha": 8}))
    with pytest.raises(WeightsError, match="LOKR"):
        open_lora(tmp_path / "adapter_model.safetensors")


# --- several, on and off ---


@pytest.fixture
def three(klein: Bench, tmp_path: Path) -> tuple[list[Lora], list[State]]:
    """A LoRA, a LoKr and a DoRA for overlapping layers, and their deltas at weight 1."""
    some = {name: tensor for name, tensor in klein.weights.items() if "double" in name or "img_in" in name}
    made = [
        changes(klein.weights, "diffusion_model.", "lora", seed=11),
        changes(some, "diffusion_model.", "lokr", seed=12),
        changes(some, "diffusion_model.", "lora", "dora", seed=13),
    ]
    return [opened(state, tmp_path, f"{i}.safetensors") for i, (state, _) in enumerate(made)], [d for _, d in made]


def summed(deltas: Iterable[State], weights: Iterable[float]) -> State:
    total: State = {}
    for state, weight in zip(deltas, weights, strict=True):
        for name, delta in state.items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


def test_several_at_once(klein: Bench, three: tuple[list[Lora], list[State]]) -> None:
    loras, deltas = three
    weights = [1.0, -0.5, 0.7]
    agree(klein, list(zip(loras, weights, strict=True)), summed(deltas, weights), bfl=True)
    agree(klein, list(zip(loras, weights, strict=True))[::-1], summed(deltas, weights), bfl=True)


def test_low_rank_ones_share_two_multiplications(klein: Bench, tmp_path: Path) -> None:
    made = [changes(klein.weights, "", "lora", seed=seed) for seed in (1, 2, 3)]
    loras = [(opened(state, tmp_path, f"{i}.safetensors"), 0.5) for i, (state, _) in enumerate(made)]
    model = klein.load()
    set_loras(model, loras)
    layer = model.single_blocks[0].linear1
    assert isinstance(layer, AdaptedLinear) and len(layer.branches) == 1
    agree(klein, loras, summed((deltas for _, deltas in made), (0.5, 0.5, 0.5)), bfl=True)


@pytest.mark.parametrize("fused", [False, True], ids=["on the fly", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_added_and_removed(
    klein: Bench, three: tuple[list[Lora], list[State]], fused: bool, dtype: torch.dtype
) -> None:
    """Any way to a set gives the same bits as the direct one, and the way back to none gives the original's."""
    a, b, c = three[0]
    model = klein.load(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bare = klein.run(model)
    outputs = {}
    for name, loras in {"a": [(a, 0.8)], "ab": [(a, 0.8), (b, 0.4)], "c": [(c, 1.0)]}.items():
        fresh = klein.load(dtype)
        set_loras(fresh, loras, fused=fused)
        outputs[name] = klein.run(fresh)
        assert not torch.equal(outputs[name], bare)
    set_loras(model, [(a, 0.8)], fused=fused)
    assert torch.equal(klein.run(model), outputs["a"])
    set_loras(model, [(a, 0.8), (b, 0.4)], fused=fused)
    assert torch.equal(klein.run(model), outputs["ab"])
    set_loras(model, [(c, 1.0)], fused=not fused)
    set_loras(model, [(c, 1.0)], fused=fused)
    assert torch.equal(klein.run(model), outputs["c"])
    set_loras(model, [(a, 0.8)], fused=fused)
    assert torch.equal(klein.run(model), outputs["a"])
    set_loras(model, [])
    assert torch.equal(klein.run(model), bare)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_only_layers_whose_loras_changed_are_touched(klein: Bench, three: tuple[list[Lora], list[State]]) -> None:
    a, b, _ = three[0]
    model = klein.load()
    set_loras(model, [(a, 1.0), (b, 1.0)])
    before = {name: model.get_submodule(name) for name in lora.linear_layers_of(model)}
    set_loras(model, [(a, 1.0), (b, 1.0)])
    assert all(model.get_submodule(name) is module for name, module in before.items())
    set_loras(model, [(a, 1.0), (b, 0.5)])
    same = {name for name, module in before.items() if model.get_submodule(name) is module}
    assert same == {name for name in before if not ("double" in name or name == "img_in")}


def test_a_weight_of_nothing_is_nothing(klein: Bench, three: tuple[list[Lora], list[State]]) -> None:
    model = klein.load()
    reports = set_loras(model, [(three[0][0], 0.0)])
    assert reports[0].matched
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(klein: Bench, three: tuple[list[Lora], list[State]], weight: float) -> None:
    with pytest.raises(RequestError, match=r"0\.safetensors"):
        set_loras(klein.load(), [(three[0][0], weight)])


@pytest.mark.parametrize("fused", [False, True], ids=["on the fly", "fused"])
def test_half_precision_errs_by_its_own_rounding(klein: Bench, tmp_path: Path, fused: bool) -> None:
    state, deltas = changes(klein.weights, "", "lora")
    model = klein.load(torch.bfloat16)
    bare_error = oracle.relative_error(klein.run(model).float(), klein.theirs({}, bfl=True))
    set_loras(model, [(opened(state, tmp_path), 1.0)], fused=fused)
    error = oracle.relative_error(klein.run(model).float(), klein.theirs(deltas, bfl=True))
    assert 0 < error <= 3 * bare_error


@pytest.mark.parametrize("fused", [False, True], ids=["on the fly", "fused"])
def test_the_model_looks_the_same_from_outside(
    klein: Bench, three: tuple[list[Lora], list[State]], fused: bool
) -> None:
    """Names, shapes and types of the state, what `dtype` and `device` say, loading, and moving with the model."""
    model = klein.load()
    before = model.state_dict()
    set_loras(model, [(part, 1.0) for part in three[0]], fused=fused)
    assert isinstance(model.img_in, AdaptedLinear)
    assert model.dtype is torch.float32 and model.device == CPU
    assert list(model.state_dict()) == list(before)
    expected = klein.run(model)
    model.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(klein.run(model), expected)
    with pytest.raises(RuntimeError, match=r"img_in.*nonsense"):
        model.load_state_dict({**model.state_dict(), "img_in.nonsense": torch.zeros(1)}, strict=True)
    model.to("meta")
    assert all(tensor.is_meta for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def test_a_compiled_block_sees_them_come_and_go(klein: Bench, three: tuple[list[Lora], list[State]]) -> None:
    """Hooks, for one, would be overlooked. fullgraph: nothing in the way of the compiler."""
    model = klein.load()
    bare = klein.run(model)
    expected = {}
    for fused in (False, True):
        set_loras(model, [(part, 0.5) for part in three[0]], fused=fused)
        expected[fused] = klein.run(model)
    set_loras(model, [])
    torch.compiler.reset()
    model.double_blocks[0].compile(backend="eager", fullgraph=True)
    close(klein.run(model), bare)
    for fused in (False, True):
        set_loras(model, [(part, 0.5) for part in three[0]], fused=fused)
        close(klein.run(model), expected[fused])
    set_loras(model, [])
    close(klein.run(model), bare)


# --- quantised weights ---


@pytest.mark.parametrize("magnitude", [None, "dora", "dora by columns"])
@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_on_the_fly_over_quantised_weights(
    klein: Bench, tmp_path: Path, storage: WeightStorage, magnitude: str | None
) -> None:
    model = klein.load(storage=storage)
    bare = klein.run(model)
    restored = dict(klein.weights)
    small = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(small) > 10
    for name, layer in small.items():
        restored[f"{name}.weight"] = layer.dequantize(torch.float32)
    state, deltas = changes(restored, "lora_unet_", "lora", magnitude)
    deltas = {name: delta + restored[name] - klein.weights[name] for name, delta in deltas.items()}
    set_loras(model, [(opened(underscore(state), tmp_path), 1.0)])
    close(klein.run(model), klein.theirs(deltas, bfl=True))
    set_loras(model, [])
    assert torch.equal(klein.run(model), bare)


def underscore(state: State) -> State:
    """Keys with their layers' dots as underscores."""
    spelled = {}
    for key, tensor in state.items():
        layer, field = layer_and_field(key)
        spelled[f"{layer.replace('.', '_')}.{field}"] = tensor
    return spelled


def layer_and_field(key: str) -> tuple[str, str]:
    fields = 2 if key.endswith(".weight") else 1
    parts = key.split(".")
    return ".".join(parts[:-fields]), ".".join(parts[-fields:])


def test_fusing_with_quantised_weights_is_refused(klein: Bench, tmp_path: Path) -> None:
    state, _ = changes(klein.weights, "", "lora")
    model = klein.load(storage="int8")
    bare = klein.run(model)
    with pytest.raises(WeightsError, match="on the fly"):
        set_loras(model, [(opened(state, tmp_path), 1.0)], fused=True)
    assert torch.equal(klein.run(model), bare)


# --- failures ---


@pytest.mark.parametrize("damage", ["NaN", "gone", "shorter"])
@pytest.mark.parametrize("fused", [False, True], ids=["on the fly", "fused"])
def test_what_fails_while_reading_changes_nothing(
    klein: Bench, three: tuple[list[Lora], list[State]], tmp_path: Path, fused: bool, damage: str
) -> None:
    model = klein.load()
    set_loras(model, [(three[0][0], 1.0)], fused=fused)
    before = klein.run(model)
    state, _ = changes(klein.weights, "", "lora")
    if damage == "NaN":
        state["single_blocks.1.linear2.lora_up.weight"][3, 1] = float("nan")
    broken = opened(state, tmp_path, "broken.safetensors")
    if damage == "gone":
        (tmp_path / "broken.safetensors").unlink()
    elif damage == "shorter":
        data = (tmp_path / "broken.safetensors").read_bytes()
        (tmp_path / "broken.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match=r"broken\.safetensors"):
        set_loras(model, [(three[0][1], 1.0), (broken, 1.0)], fused=fused)
    assert torch.equal(klein.run(model), before)


def test_fusing_that_fails_on_the_way_leaves_the_bare_weights(klein: Bench, tmp_path: Path) -> None:
    """The last layer has no memory behind it, which shows only when its turn comes."""
    model = klein.load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.final_layer.linear.to("meta")
    state, _ = changes(klein.weights, "", "lora")
    with pytest.raises(NotImplementedError, match="meta"):
        set_loras(model, [(opened(state, tmp_path), 1.0)], fused=True)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    after = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    assert len(after) == len(before) - 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
