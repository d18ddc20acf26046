"""Applies LoRAs to a transformer and removes them without reloading it.

`check_lora` says which tensors of a file (`file.py`) fit a transformer, and why others do not. `set_loras` applies the
given LoRAs, each with a weight, and removes all others. Out of scope: where files come from, which checkpoint a
transformer is.

A change D of a layer's weight W is applied as W + weight * scale * D, where scale = alpha / rank if the file has an
alpha; DoRA as W + weight * (W' - W), with its own W'. Several LoRAs add up, each computed from the original W, so their
order does not matter.

`set_loras` has two modes. On the fly, a layer is wrapped with branches that run beside it (`layers.py`): weights are
untouched, quantised ones work too, and switching costs no more than the LoRAs' own size. Fused, the changes are added
to the weights: no cost per step, but the originals of the changed layers are kept on the CPU, because W + D - D is not
W in floating point. In both modes an empty set restores the transformer bit by bit.

Pitfall: fused LoRAs are part of the weights. Remove them before saving, quantising or copying weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.lora.file import Lora, LoraChange
from flux2_studio.engine.lora.layers import (
    AdaptedLinear,
    LoraBranch,
    base_weight,
    build_branch,
    device_of,
    has_float_weight,
    merge_low_rank,
)
from flux2_studio.engine.params import TransformerParams
from flux2_studio.engine.runtime.streaming import editable_weights
from flux2_studio.engine.weights.tensor_files import printable_text
from flux2_studio.errors import RequestError, WeightsError

# For messages only; whether a LoRA fits depends on shapes.
KNOWN_WIDTHS = {3072: "klein 4B", 4096: "klein 9B", 6144: "dev"}

# Why tensors do not fit; messages put the number of tensors in front.
MISSING_LAYER = "for layers that this checkpoint does not have"
OTHER_SIZE = "of another size than this checkpoint's layers"
_LOKR_FACTORS = ("lokr_w1", "lokr_w2")
_CHOOSE_ANOTHER = "Choose a LoRA that was made for this checkpoint, or the checkpoint that it was made for."


@dataclass(frozen=True)
class LoraFitReport:
    """How a LoRA fits a transformer. matched: module by key. unmatched: reason by key."""

    name: str
    kind: str
    matched: Mapping[str, str]
    unmatched: Mapping[str, str]

    @property
    def text(self) -> str:
        """One or two sentences for the user."""
        total = len(self.matched) + len(self.unmatched)
        if not self.unmatched:
            return f"{self.name} ({self.kind}): all {total} tensors fit."
        reasons = Counter(self.unmatched.values())
        left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        example = printable_text(min(self.unmatched))
        return (
            f"{self.name} ({self.kind}): {len(self.matched)} of {total} tensors fit. Left out: {left_out} "
            f"(for example {example})."
        )


def check_lora(lora: Lora, transformer: Transformer) -> LoraFitReport:
    """Report how `lora` fits `transformer`. Raises `WeightsError` if less than half of its tensors fit: it then
    belongs to another model.
    """
    matching, unmatched = _split_by_fit(lora, linear_layers_of(transformer))
    matched = {key: change.target.module for change in matching for key in change.keys.values()}
    total = sum(len(change.keys) for change in lora.changes)
    if 2 * len(matched) >= total:
        return LoraFitReport(lora.name, lora.kind, matched, {**unmatched, **lora.ignored_keys})
    width = transformer.params.hidden
    if lora.width != width:
        raise WeightsError(
            f"{lora.name} is a LoRA for {_describe_width(lora.width)}; the checkpoint in use has "
            f"{_describe_width(width)}. {_CHOOSE_ANOTHER}"
        )
    reasons = ", ".join(f"{count} are {reason}" for reason, count in Counter(unmatched.values()).most_common())
    raise WeightsError(
        f"{lora.name} is not a LoRA for this checkpoint: of {total} tensors {reasons} (for example "
        f"{printable_text(min(unmatched))}). {_CHOOSE_ANOTHER}"
    )


def check_lora_for_params(lora: Lora, params: TransformerParams) -> LoraFitReport:
    """Same as `check_lora`, for the sizes of a transformer that is not loaded yet."""
    with torch.device("meta"):
        return check_lora(lora, Transformer(params))


def added_parameter_count(lora: Lora) -> int:
    """Return how many numbers `lora` adds to a transformer when applied on the fly, if all of it fits."""
    return sum(_change_parameter_count(lora, change) for change in lora.changes)


def _change_parameter_count(lora: Lora, change: LoraChange) -> int:
    shapes = {field: lora.files.shapes[key] for field, key in change.keys.items() if field != "alpha"}
    rows, columns = change.shape
    parts = change.target.parts  # rows of the other parts are stored as zeros
    # DoRA stores two numbers per row, or one per row and one per column: about as many.
    dora_count = 2 * rows * parts if "magnitude" in shapes else 0
    match change.kind:
        case "LoRA" | "LoHa":
            padded_fields = ("up", "hada_w1_a", "hada_w2_a")
            return dora_count + sum(
                math.prod(shape) * (parts if field in padded_fields else 1)
                for field, shape in shapes.items()
                if field != "magnitude"
            )
        case "LoKr" if not change.target.swap_halves:
            factor_shapes = [
                shapes.get(name) or (shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]) for name in _LOKR_FACTORS
            ]
            return dora_count + math.prod(factor_shapes[0]) * parts + math.prod(factor_shapes[1])
        case _:
            return dora_count + rows * columns * parts


@torch.no_grad()
def set_loras(
    transformer: Transformer, loras: Sequence[tuple[Lora, float]], *, fused: bool = False
) -> list[LoraFitReport]:
    """Make `loras`, pairs (LoRA, weight), exactly those that `transformer` carries. An empty list removes all.

    Layers that already carry the same changes are left alone. fused: change the weights instead of running branches
    beside them. Returns a report for each LoRA.

    Raises `WeightsError` if a LoRA does not fit or cannot be read, or if fusing meets quantised weights, and
    `RequestError` for a weight that is not finite; the transformer is then unchanged. If memory runs out midway, it
    keeps its previous LoRAs, or none when fusing.
    """
    for lora, weight in loras:
        if not math.isfinite(weight):
            raise RequestError(f"{weight} is no weight for {lora.name}: choose a number, 1 for its full effect.")
    reports = [check_lora(lora, transformer) for lora, _ in loras]
    layers = linear_layers_of(transformer)
    changes_by_layer: dict[str, list[_AppliedChange]] = {}
    for lora, weight in loras:
        for change in _split_by_fit(lora, layers)[0] if weight else ():
            changes_by_layer.setdefault(change.target.module, []).append(_AppliedChange(lora, change, weight, fused))
    if fused and not all(has_float_weight(layers[name]) for name in changes_by_layer):
        raise WeightsError(
            "This checkpoint's weights are quantised, and LoRAs cannot be fused into them: apply the LoRAs on the fly, "
            "or choose the checkpoint's bfloat16 file."
        )
    outdated = [
        name for name in layers if _applied_changes(transformer.get_submodule(name)) != changes_by_layer.get(name, [])
    ]
    tensors = _read_tensors([part for name in outdated for part in changes_by_layer.get(name, [])])
    if fused:
        _fuse(transformer, outdated, changes_by_layer, tensors)
    else:
        _wrap(transformer, outdated, changes_by_layer, tensors)
    return reports


def linear_layers_of(transformer: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers by name, without the wrappers that LoRAs add."""
    layers: dict[str, nn.Module] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, AdaptedLinear):
            layers[name] = module.base
        elif hasattr(module, "in_features") and name.removesuffix(".base") not in layers:
            layers[name] = module
    return layers


def _split_by_fit(lora: Lora, layers: Mapping[str, nn.Module]) -> tuple[list[LoraChange], dict[str, str]]:
    """Return the changes that fit `layers`, and the keys of the others with the reason."""
    matching: list[LoraChange] = []
    unmatched: dict[str, str] = {}
    for change in lora.changes:
        layer: Any = layers.get(change.target.module)
        if layer is None:
            unmatched |= dict.fromkeys(change.keys.values(), MISSING_LAYER)
        elif change.shape != (layer.out_features // change.target.parts, layer.in_features):
            unmatched |= dict.fromkeys(change.keys.values(), OTHER_SIZE)
        else:
            matching.append(change)
    return matching, unmatched


def _describe_width(width: int) -> str:
    return f"{KNOWN_WIDTHS[width]} (width {width})" if width in KNOWN_WIDTHS else f"width {width}"


# --- applying changes ---


@dataclass(frozen=True)
class _AppliedChange:
    """The change that one LoRA makes to one layer."""

    lora: Lora
    change: LoraChange
    weight: float
    fused: bool


_TensorsByChange = Mapping[LoraChange, Mapping[str, Tensor]]
_ChangesByLayer = Mapping[str, list[_AppliedChange]]


def _applied_changes(module: nn.Module) -> object:
    return module.applied_loras if isinstance(module, AdaptedLinear) else []


def _read_tensors(parts: Sequence[_AppliedChange]) -> _TensorsByChange:
    changes: dict[Lora, list[LoraChange]] = {}
    for part in parts:
        changes.setdefault(part.lora, []).append(part.change)
    return {change: tensors for lora, of_lora in changes.items() for change, tensors in lora.read(of_lora).items()}


def _build_part_branch(
    part: _AppliedChange, tensors: _TensorsByChange, module: nn.Module, dtype: torch.dtype
) -> LoraBranch:
    """Build the branch of one change in float32, on the layer's device. Tensors are copied, because a mapped file
    may be overwritten at any time.
    """
    factors = {
        field: tensor.to(device_of(module), torch.float32, copy=True) for field, tensor in tensors[part.change].items()
    }
    return build_branch(factors, part.change.target, part.change.scale, part.weight, lambda: base_weight(module, dtype))


def _wrap(
    transformer: Transformer, outdated: Sequence[str], changes_by_layer: _ChangesByLayer, tensors: _TensorsByChange
) -> None:
    """Apply LoRAs on the fly. All branches are built before any layer is replaced."""
    built: dict[str, list[LoraBranch]] = {}
    for name in outdated:
        module = transformer.get_submodule(name)
        branches = [
            _build_part_branch(part, tensors, module, transformer.dtype) for part in changes_by_layer.get(name, [])
        ]
        built[name] = [branch.to(transformer.dtype) for branch in merge_low_rank(branches)]
    for name, branches in built.items():
        base = _restore_layer(transformer, name)
        if branches:
            transformer.set_submodule(name, AdaptedLinear(base, changes_by_layer[name], branches=branches))


def _fuse(
    transformer: Transformer, outdated: Sequence[str], changes_by_layer: _ChangesByLayer, tensors: _TensorsByChange
) -> None:
    """Fuse LoRAs layer by layer, because two copies of all weights may not fit in memory. On failure all layers are
    restored.
    """
    try:
        for name in outdated:
            base: Any = _restore_layer(transformer, name)
            if name not in changes_by_layer:
                continue
            branches = merge_low_rank(
                [_build_part_branch(part, tensors, base, transformer.dtype) for part in changes_by_layer[name]]
            )
            with editable_weights(base):
                weight = new_weight = base.weight.float()
                for branch in branches:
                    new_weight = new_weight + branch.delta(weight)
                original = base.weight.detach().to("cpu", copy=True)
                transformer.set_submodule(name, AdaptedLinear(base, changes_by_layer[name], original_weight=original))
                base.weight.copy_(new_weight)
    except BaseException:
        for name in linear_layers_of(transformer):
            _restore_layer(transformer, name)
        raise


def _restore_layer(transformer: Transformer, name: str) -> nn.Module:
    """Replace the named layer by its version without LoRAs, and return it."""
    module = transformer.get_submodule(name)
    if not isinstance(module, AdaptedLinear):
        return module
    base = module.restore_base()
    transformer.set_submodule(name, base)
    return base
