"""What LoRAs add to a linear layer: paths beside it, or a change of its weight.

    W [out, in] the layer's weight, x [..., in], y = W x the layer's output. A path adds D x to it, where D is
    LowRank    B A                          LoRA, https://arxiv.org/abs/2106.09685
    Kronecker  W1 (x) W2                    LoKr, https://arxiv.org/abs/2309.14859
    Hadamard   (A1 B1) * (A2 B2)            LoHa, https://arxiv.org/abs/2108.06098
    Full       a matrix                     "diff"
    DoraRows, DoraColumns                   DoRA, https://arxiv.org/abs/2402.09353: (W + D) rescaled to given norms

A path never reads W while it runs, so it fits beside a layer of any kind, quantised ones too. Scales and weights are
multiplied into the factors when a path is built: a run costs nothing more, and `torch.compile` sees plain tensors.
Layers are *replaced* by `AdaptedLinear` rather than given forward hooks: a compiled model overlooks hooks that come
later, and would draw without the LoRA and without a word.

LoHa is multiplied out at every call: that costs as much as 2 * rank more tokens would, and spares a second copy of the
weight. Only `FullDelta` holds one. DoRA needs W once, when it is built, for its norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2_studio.engine.lora.keys import LoraTarget
from flux2_studio.engine.runtime.streaming import editable_weights, fetch_weights

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LoraBranch(nn.Module):
    """One addition to a layer's output. Its tensors are buffers that move with the model and are not saved with it."""

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """What to add to y = layer(x), [..., out]."""
        raise NotImplementedError

    def delta(self, weight: Tensor) -> Tensor:
        """The same as a change of the layer's weight [out, in]."""
        raise NotImplementedError

    def _register_tensors(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)


class LowRank(LoraBranch):
    """down [rank, in], then up [out, rank]."""

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self._register_tensors(down=down, up=up)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)

    def delta(self, weight: Tensor) -> Tensor:
        return self.up @ self.down


class Kronecker(LoraBranch):
    """w1 [a, b] (x) w2 [c, d], out = a c and in = b d, never multiplied out."""

    w1: Tensor
    w2: Tensor

    def __init__(self, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self._register_tensors(w1=w1, w2=w2)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        grid = x.unflatten(-1, (self.w1.shape[1], self.w2.shape[1]))  # [..., b, d]
        return (self.w1 @ F.linear(grid, self.w2)).flatten(-2)

    def delta(self, weight: Tensor) -> Tensor:
        return torch.kron(self.w1, self.w2)


class Hadamard(LoraBranch):
    """The product, element by element, of two low-rank matrices: (a1 b1) * (a2 b2), a [out, rank] and b [rank, in]."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor

    def __init__(self, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> None:
        super().__init__()
        self._register_tensors(a1=a1, b1=b1, a2=a2, b2=b2)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        return F.linear(x, self._multiplied_out())

    def delta(self, weight: Tensor) -> Tensor:
        return self._multiplied_out()

    def _multiplied_out(self) -> Tensor:
        return (self.a1 @ self.b1) * (self.a2 @ self.b2)


class FullDelta(LoraBranch):
    """A matrix [out, in] as it is."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self._register_tensors(matrix=matrix)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        return F.linear(x, self.matrix)

    def delta(self, weight: Tensor) -> Tensor:
        return self.matrix


class DoraRows(LoraBranch):
    """gain * (W + D) - W with one gain per row, times the LoRA's weight: of W there is y left to rescale.

    output_gain = weight (gain - 1) and delta_gain = weight gain, both [out], zero in rows that are not adapted.
    """

    output_gain: Tensor
    delta_gain: Tensor

    def __init__(self, inner: LoraBranch, output_gain: Tensor, delta_gain: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self._register_tensors(output_gain=output_gain, delta_gain=delta_gain)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        return self.output_gain * y + self.delta_gain * self.inner(x, y, layer)

    def delta(self, weight: Tensor) -> Tensor:
        return self.output_gain[:, None] * weight + self.delta_gain[:, None] * self.inner.delta(weight)


class DoraColumns(LoraBranch):
    """(W + D) * gain - W with one gain per column, times the LoRA's weight: the layer runs a second time.

    gain: [in]. row_weight: [out], the LoRA's weight, zero in rows that are not adapted.
    """

    gain: Tensor
    row_weight: Tensor

    def __init__(self, inner: LoraBranch, gain: Tensor, row_weight: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self._register_tensors(gain=gain, row_weight=row_weight)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        return self.row_weight * (layer((self.gain - 1) * x) + self.inner(self.gain * x, y, layer))

    def delta(self, weight: Tensor) -> Tensor:
        return self.row_weight[:, None] * ((self.gain - 1) * weight + self.gain * self.inner.delta(weight))


def build_branch(
    tensors: Mapping[str, Tensor],
    target: LoraTarget,
    scale: float,
    weight: float,
    get_base_weight: Callable[[], Tensor],
) -> LoraBranch:
    """The path of one change.

    tensors: by their fields (`lora_keys.parse`), whole and of fitting shapes, in float32. scale: the file's own (alpha
    / rank). weight: the user's. get_base_weight: gives the layer's weight [out, in] in float32; called for DoRA only.
    """
    magnitude = tensors.get("magnitude")
    path = _branch_without_dora(tensors, target, scale if magnitude is not None else scale * weight)
    if magnitude is None:
        return path
    whole = get_base_weight()
    merged = whole + path.delta(whole)
    rows = magnitude.new_full((merged.shape[0] // target.parts, 1), weight)
    share = _place_rows(rows, target)[:, 0]  # the user's weight in the rows that are adapted
    tiny = torch.finfo(torch.float32).eps
    if magnitude.ndim == 2 and magnitude.shape[0] == 1 and magnitude.shape[1] == merged.shape[1]:
        # LyCORIS' older way: norms along the output, over the rows of the layer that was trained
        gain = magnitude[0] / (merged[share != 0].norm(dim=0) + tiny)
        return DoraColumns(path, gain, share)
    gain = _place_rows(magnitude.reshape(-1, 1), target)[:, 0] / (merged.norm(dim=1) + tiny)
    return DoraRows(path, share * (gain - 1), share * gain)


def _branch_without_dora(tensors: Mapping[str, Tensor], target: LoraTarget, scale: float) -> LoraBranch:
    if "down" in tensors:
        return LowRank(tensors["down"], _place_rows(scale * tensors["up"], target))
    if "diff" in tensors:
        return FullDelta(_place_rows(scale * tensors["diff"], target))
    if "hada_w1_a" in tensors:
        a1, a2 = _place_rows(scale * tensors["hada_w1_a"], target), _place_rows(tensors["hada_w2_a"], target)
        return Hadamard(a1, tensors["hada_w1_b"], a2, tensors["hada_w2_b"])
    w1, w2 = (
        tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]
        for name in ("lokr_w1", "lokr_w2")
    )
    if target.swap_halves:  # a product with swapped halves is no product any more
        return FullDelta(_place_rows(scale * torch.kron(w1, w2), target))
    return Kronecker(_place_rows(scale * w1, target), w2)  # w1's rows are runs of the product's rows


def _place_rows(rows: Tensor, target: LoraTarget) -> Tensor:
    """The rows of a change where they belong among the layer's, zeros elsewhere."""
    if target.swap_halves:
        rows = torch.cat(rows.chunk(2)[::-1])
    return F.pad(rows, (0, 0, target.part * len(rows), (target.parts - 1 - target.part) * len(rows)))


def merge_low_rank(branches: Iterable[LoraBranch]) -> list[LoraBranch]:
    """The same paths with all low-rank ones in one: a sum of B A is one B A of the stacked factors."""
    branches = list(branches)
    low = [path for path in branches if isinstance(path, LowRank)]
    others: list[LoraBranch] = [path for path in branches if not isinstance(path, LowRank)]
    if len(low) > 1:
        low = [LowRank(torch.cat([path.down for path in low]), torch.cat([path.up for path in low], 1))]
    return [*low, *others]


class AdaptedLinear(nn.Module):
    """A linear layer with LoRAs: `branches` beside it, or fused into its weight, the `original_weight` being kept on
    the CPU.

    applied_loras: whatever tells the caller which LoRAs these are. State dicts look as if the layer stood here itself.
    """

    def __init__(
        self,
        base: nn.Module,
        applied_loras: object,
        *,
        branches: Iterable[LoraBranch] = (),
        original_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.applied_loras = applied_loras
        self.branches = nn.ModuleList(branches)
        self.original_weight = original_weight  # not a buffer: it stays on the CPU when the model moves
        self.register_state_dict_post_hook(_without_base)
        self.register_load_state_dict_pre_hook(_with_base)

    @property
    def weight(self) -> Any:
        """The layer's own, for those who ask it for the model's dtype and device."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = out = self.base(x)
        for path in self.branches:
            out = out + path(x, y, self.base)
        return out

    def restore_base(self) -> nn.Module:
        """The layer as it was, bit by bit."""
        if self.original_weight is not None:
            with editable_weights(self.base):
                self.weight.copy_(self.original_weight)
            self.original_weight = None
        return self.base


def _without_base(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}base.")]:
        state[prefix + key.removeprefix(f"{prefix}base.")] = state.pop(key)


def _with_base(_module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}base.{key.removeprefix(prefix)}"] = state.pop(key)


def has_float_weight(layer: nn.Module) -> bool:
    """Whether the layer is its `weight`, to be read and changed as it stands; quantised layers are not."""
    return isinstance(layer, nn.Linear) and layer.weight.dtype in FLOAT_DTYPES


def base_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of a layer without its LoRAs, in float32 on the layer's device.

    dtype: what the layer computes in; quantised weights are restored to it, as when the layer runs.
    """
    base: Any = module
    if isinstance(module, AdaptedLinear):
        if module.original_weight is not None:
            return module.original_weight.to(device_of(module), torch.float32)
        base = module.base
    fetch_weights(base)
    weight: Tensor = base.weight if has_float_weight(base) else base.dequantize(dtype)
    return weight.float()


def device_of(module: nn.Module) -> torch.device:
    return next(tensor.device for tensors in (module.parameters(), module.buffers()) for tensor in tensors)
