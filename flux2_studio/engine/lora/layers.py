"""What LoRAs add to a linear layer: branches beside it, or a change of its weight.

    W [out, in] the layer's weight, x [..., in], y = W x the layer's output. A branch adds D x to it, where D is
    LowRank    B A                          LoRA, https://arxiv.org/abs/2106.09685
    Kronecker  W1 (x) W2                    LoKr, https://arxiv.org/abs/2309.14859
    Hadamard   (A1 B1) * (A2 B2)            LoHa, https://arxiv.org/abs/2108.06098
    FullDelta  a matrix                     "diff"
    DoraRows, DoraColumns                   DoRA, https://arxiv.org/abs/2402.09353: (W + D) rescaled to given norms

A branch never reads W while it runs, so it works beside any layer, including quantised ones. Scales and weights are
multiplied into the factors when a branch is built, so they cost nothing at run time, and `torch.compile` sees plain
tensors. Layers are *replaced* by `AdaptedLinear` instead of given forward hooks: a compiled model ignores hooks that
are added later, and would silently run without the LoRA.

LoHa is multiplied out in every call. That costs as much as 2 * rank extra tokens, and avoids a second copy of the
weight. Only `FullDelta` stores one. DoRA needs W once, for its norms, when it is built.
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
    """Base class: one addition to a layer's output. Its tensors are non-persistent buffers: moved with the model,
    but not saved.
    """

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """Return what to add to y = layer(x), [..., out]."""
        raise NotImplementedError

    def delta(self, weight: Tensor) -> Tensor:
        """Return the same change as a change of the layer's weight [out, in]."""
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
    """w1 [a, b] (x) w2 [c, d], out = a c and in = b d, never multiplied out in `forward`."""

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
    """The elementwise product of two low-rank matrices: (a1 b1) * (a2 b2), a [out, rank] and b [rank, in]."""

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
    """A matrix [out, in]."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self._register_tensors(matrix=matrix)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        return F.linear(x, self.matrix)

    def delta(self, weight: Tensor) -> Tensor:
        return self.matrix


class DoraRows(LoraBranch):
    """weight * (gain * (W + D) - W) with one gain per row, computed from y, since W x = y.

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
    """weight * ((W + D) * gain - W) with one gain per column: the layer runs a second time.

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
    """Build the branch of one change.

    tensors: by field (see `keys.parse_key`), complete and of matching shapes, in float32. scale: the file's own (alpha
    / rank). weight: the user's. get_base_weight: returns the layer's weight [out, in] in float32; called for DoRA only.
    """
    magnitude = tensors.get("magnitude")
    branch = _branch_without_dora(tensors, target, scale if magnitude is not None else scale * weight)
    if magnitude is None:
        return branch
    base = get_base_weight()
    merged = base + branch.delta(base)
    adapted_rows = magnitude.new_full((merged.shape[0] // target.parts, 1), weight)
    row_weight = _place_rows(adapted_rows, target)[:, 0]  # the user's weight in adapted rows, 0 elsewhere
    epsilon = torch.finfo(torch.float32).eps
    if magnitude.ndim == 2 and magnitude.shape[0] == 1 and magnitude.shape[1] == merged.shape[1]:
        # LyCORIS' older variant: column norms, over the rows of the trained layer
        gain = magnitude[0] / (merged[row_weight != 0].norm(dim=0) + epsilon)
        return DoraColumns(branch, gain, row_weight)
    gain = _place_rows(magnitude.reshape(-1, 1), target)[:, 0] / (merged.norm(dim=1) + epsilon)
    return DoraRows(branch, row_weight * (gain - 1), row_weight * gain)


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
    if target.swap_halves:  # with swapped halves it is no Kronecker product any more
        return FullDelta(_place_rows(scale * torch.kron(w1, w2), target))
    return Kronecker(_place_rows(scale * w1, target), w2)  # each row of w1 makes one run of the product's rows


def _place_rows(rows: Tensor, target: LoraTarget) -> Tensor:
    """Pad the rows of a change with zeros to the layer's rows."""
    if target.swap_halves:
        rows = torch.cat(rows.chunk(2)[::-1])
    return F.pad(rows, (0, 0, target.part * len(rows), (target.parts - 1 - target.part) * len(rows)))


def merge_low_rank(branches: Iterable[LoraBranch]) -> list[LoraBranch]:
    """Merge all low-rank branches into one: a sum of B A is one B A of the stacked factors."""
    branches = list(branches)
    low_rank = [branch for branch in branches if isinstance(branch, LowRank)]
    others: list[LoraBranch] = [branch for branch in branches if not isinstance(branch, LowRank)]
    if len(low_rank) > 1:
        low_rank = [
            LowRank(torch.cat([branch.down for branch in low_rank]), torch.cat([branch.up for branch in low_rank], 1))
        ]
    return [*low_rank, *others]


class AdaptedLinear(nn.Module):
    """A linear layer with LoRAs: `branches` beside it, or fused, with `original_weight` kept on the CPU.

    applied_loras: lets the caller recognise which LoRAs these are. State dicts look as if the layer were not wrapped.
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
        self.original_weight = original_weight  # not a buffer, so that it stays on the CPU when the model moves
        self.register_state_dict_post_hook(_without_base)
        self.register_load_state_dict_pre_hook(_with_base)

    @property
    def weight(self) -> Any:
        """The layer's own weight, for code that reads the model's dtype and device from it."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = out = self.base(x)
        for branch in self.branches:
            out = out + branch(x, y, self.base)
        return out

    def restore_base(self) -> nn.Module:
        """Return the layer without LoRAs, restored bit by bit."""
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
    """Return whether the layer has a plain floating-point weight to read and change; quantised layers do not."""
    return isinstance(layer, nn.Linear) and layer.weight.dtype in FLOAT_DTYPES


def base_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] of a layer without its LoRAs, in float32 on the layer's device.

    dtype: the layer's compute dtype; quantised weights are restored to it first, as when the layer runs.
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
