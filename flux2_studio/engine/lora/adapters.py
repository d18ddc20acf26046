"""LoRAs: files of small changes to a transformer's linear layers, put onto it and taken off without loading it again.

Does: says which tensors of a file (`lora_file`) fit a transformer and why others do not (`check_lora`), and makes any
set of LoRAs, each with a weight, the one that a transformer carries (`set_loras`). Does not know: where files come
from, which checkpoint a transformer is.

A change D of a layer's weight W counts as W + weight * scale * D, where scale = alpha / rank if the file states an
alpha; DoRA's as W + weight * (its W' - W). Several add up, each reckoned from the bare W: their order is all one.

`set_loras` has two ways. On the fly, a layer is wrapped with paths that run beside it (`lora_paths`): the weights are
not touched, quantised ones do as well as others, and changing LoRAs is a matter of their own size. Fused, the changes
are added to the weights: no cost per step, but the originals of the touched layers are kept on the CPU, because W + D -
D is not W in floating point. Either way an empty set gives back the transformer bit by bit.

Pitfall: fused LoRAs are in the weights. Whoever saves, quantises or copies weights takes the LoRAs off first.
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

# Only to put a name to a width in messages; what fits is decided by shapes.
KNOWN_WIDTHS = {3072: "klein 4B", 4096: "klein 9B", 6144: "dev"}

# Why a tensor does not fit, as it reads after a number.
MISSING_LAYER = "for layers that this checkpoint does not have"
OTHER_SIZE = "of another size than this checkpoint's layers"
_LOKR_FACTORS = ("lokr_w1", "lokr_w2")
_CHOOSE_ANOTHER = "Choose a LoRA that was made for this checkpoint, or the checkpoint that it was made for."


@dataclass(frozen=True)
class LoraFitReport:
    """How a LoRA fits a transformer: `matched` has the module of each key, `unmatched` the reason why it has none."""

    name: str
    kind: str
    matched: Mapping[str, str]
    unmatched: Mapping[str, str]

    @property
    def text(self) -> str:
        """A sentence or two for the page."""
        total = len(self.matched) + len(self.unmatched)
        if not self.unmatched:
            return f"{self.name} ({self.kind}): all {total} tensors fit."
        reasons = Counter(self.unmatched.values())
        left = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        example = printable_text(min(self.unmatched))
        return (
            f"{self.name} ({self.kind}): {len(self.matched)} of {total} tensors fit. Left out: {left} "
            f"(for example {example})."
        )


def check_lora(lora: Lora, transformer: Transformer) -> LoraFitReport:
    """How `lora` fits `transformer`. Raises `WeightsError` if less than half of it does: it is another model's."""
    fitting, unmatched = _split_by_fit(lora, linear_layers_of(transformer))
    matched = {key: change.target.module for change in fitting for key in change.keys.values()}
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
    """As `check_lora`, before the transformer is loaded: its sizes are enough."""
    with torch.device("meta"):
        return check_lora(lora, Transformer(params))


def added_parameter_count(lora: Lora) -> int:
    """How many numbers `lora` lays beside the weights of a transformer that all of it fits, put on on the fly."""
    return sum(_change_parameter_count(lora, change) for change in lora.changes)


def _change_parameter_count(lora: Lora, change: LoraChange) -> int:
    shapes = {field: lora.files.shapes[key] for field, key in change.keys.items() if field != "alpha"}
    rows, columns = change.shape
    parts = change.target.parts  # rows of the other parts are zeros, and there
    dora = 2 * rows * parts if "magnitude" in shapes else 0  # per row, or one per row and one per column: about as many
    match change.kind:
        case "LoRA" | "LoHa":
            placed = ("up", "hada_w1_a", "hada_w2_a")
            return dora + sum(
                math.prod(shape) * (parts if field in placed else 1)
                for field, shape in shapes.items()
                if field != "magnitude"
            )
        case "LoKr" if not change.target.swap_halves:
            whole = [shapes.get(name) or (shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]) for name in _LOKR_FACTORS]
            return dora + math.prod(whole[0]) * parts + math.prod(whole[1])
        case _:
            return dora + rows * columns * parts


@torch.no_grad()
def set_loras(
    transformer: Transformer, loras: Sequence[tuple[Lora, float]], *, fused: bool = False
) -> list[LoraFitReport]:
    """Make `loras`, each with its weight, exactly those that `transformer` carries; an empty list takes all off.

    Layers that already carry just that are left alone. fused: change the weights instead of running paths beside
    them. Returns a report for each LoRA.

    Raises `WeightsError` where a LoRA does not fit or cannot be read, or quantised weights are to be fused with, and
    `RequestError` for a weight that is no number; the transformer is then as it was. If memory runs out on the way,
    it carries what it did before, or, when fusing, nothing.
    """
    for lora, weight in loras:
        if not math.isfinite(weight):
            raise RequestError(f"{weight} is no weight for {lora.name}: choose a number, 1 for its full effect.")
    reports = [check_lora(lora, transformer) for lora, _ in loras]
    layers = linear_layers_of(transformer)
    wanted: dict[str, list[_AppliedChange]] = {}
    for lora, weight in loras:
        for change in _split_by_fit(lora, layers)[0] if weight else ():
            wanted.setdefault(change.target.module, []).append(_AppliedChange(lora, change, weight, fused))
    if fused and not all(has_float_weight(layers[name]) for name in wanted):
        raise WeightsError(
            "This checkpoint's weights are quantised, and LoRAs cannot be fused into them: apply the LoRAs on the fly, "
            "or choose the checkpoint's bfloat16 file."
        )
    stale = [name for name in layers if _applied_changes(transformer.get_submodule(name)) != wanted.get(name, [])]
    tensors = _read_tensors([part for name in stale for part in wanted.get(name, [])])
    if fused:
        _fuse(transformer, stale, wanted, tensors)
    else:
        _wrap(transformer, stale, wanted, tensors)
    return reports


def linear_layers_of(transformer: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by their names, whether LoRAs are on them or not."""
    found: dict[str, nn.Module] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, AdaptedLinear):
            found[name] = module.base
        elif hasattr(module, "in_features") and name.removesuffix(".base") not in found:
            found[name] = module
    return found


def _split_by_fit(lora: Lora, layers: Mapping[str, nn.Module]) -> tuple[list[LoraChange], dict[str, str]]:
    """The changes that fit `layers`, and the keys of those that do not, with the reason."""
    fitting: list[LoraChange] = []
    unmatched: dict[str, str] = {}
    for change in lora.changes:
        layer: Any = layers.get(change.target.module)
        if layer is None:
            unmatched |= dict.fromkeys(change.keys.values(), MISSING_LAYER)
        elif change.shape != (layer.out_features // change.target.parts, layer.in_features):
            unmatched |= dict.fromkeys(change.keys.values(), OTHER_SIZE)
        else:
            fitting.append(change)
    return fitting, unmatched


def _describe_width(width: int) -> str:
    return f"{KNOWN_WIDTHS[width]} (width {width})" if width in KNOWN_WIDTHS else f"width {width}"


# --- onto the transformer ---


@dataclass(frozen=True)
class _AppliedChange:
    """One LoRA's share in what a layer carries."""

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
    return {change: found for lora, some in changes.items() for change, found in lora.read(some).items()}


def _build_part_branch(
    part: _AppliedChange, tensors: _TensorsByChange, module: nn.Module, dtype: torch.dtype
) -> LoraBranch:
    """The path of one part in float32, on the layer's device. Copied: a mapped file may be written over at any time."""
    factors = {
        field: tensor.to(device_of(module), torch.float32, copy=True) for field, tensor in tensors[part.change].items()
    }
    return build_branch(factors, part.change.target, part.change.scale, part.weight, lambda: base_weight(module, dtype))


def _wrap(transformer: Transformer, stale: Sequence[str], wanted: _ChangesByLayer, tensors: _TensorsByChange) -> None:
    """On the fly: everything is built before anything is put into its place."""
    built: dict[str, list[LoraBranch]] = {}
    for name in stale:
        module = transformer.get_submodule(name)
        paths = [_build_part_branch(part, tensors, module, transformer.dtype) for part in wanted.get(name, [])]
        built[name] = [path.to(transformer.dtype) for path in merge_low_rank(paths)]
    for name, paths in built.items():
        base = _restore_layer(transformer, name)
        if paths:
            transformer.set_submodule(name, AdaptedLinear(base, wanted[name], branches=paths))


def _fuse(transformer: Transformer, stale: Sequence[str], wanted: _ChangesByLayer, tensors: _TensorsByChange) -> None:
    """Layer by layer, because two copies of all weights are too many: on failure the layers are all stripped."""
    try:
        for name in stale:
            base: Any = _restore_layer(transformer, name)
            if name not in wanted:
                continue
            paths = merge_low_rank(
                [_build_part_branch(part, tensors, base, transformer.dtype) for part in wanted[name]]
            )
            with editable_weights(base):
                whole = changed = base.weight.float()
                for path in paths:
                    changed = changed + path.delta(whole)
                original = base.weight.detach().to("cpu", copy=True)
                transformer.set_submodule(name, AdaptedLinear(base, wanted[name], original_weight=original))
                base.weight.copy_(changed)
    except BaseException:
        for name in linear_layers_of(transformer):
            _restore_layer(transformer, name)
        raise


def _restore_layer(transformer: Transformer, name: str) -> nn.Module:
    """The layer without its LoRAs, put back into its place."""
    module = transformer.get_submodule(name)
    if not isinstance(module, AdaptedLinear):
        return module
    base = module.restore_base()
    transformer.set_submodule(name, base)
    return base
