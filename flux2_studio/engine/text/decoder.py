"""The decoder of a Qwen3 or Mistral language model: cut after the last layer that is read, or whole.

Does: token ids to hidden states at a few depths, joined per token; further tokens after those that are in a cache, to
where the head begins; `TowerParams` from a config.json. Does not know: files, chat templates, padding
(`encoder.py`), or how to write (`writer.py`). Our own, because transformers' models take five seconds of a core to
import, before the first picture, and keep every layer's output where three are read.

    x [B, L, W] -> x + attention(norm(x)) -> x + mlp(norm(x)), for each layer

Modules are named as the published files name their tensors. Grouped queries share keys (arXiv 2305.13245), positions
rotate the two halves of a head against each other (arXiv 2104.09864), the MLP is a SwiGLU (arXiv 2002.05202); Qwen3
norms each head's queries and keys (arXiv 2505.09388), Mistral does not (arXiv 2310.06825).

Pitfalls: these rotate halves, the flow transformer neighbours. A padded row before the first token sees nothing at
all; torch then gives zeros (since 2.5), which is what the encoders' context was made with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST = 1 << 24  # of anything that a config counts: no tensor of a language model is as long along one side
HEAD_OF_QWEN3 = 128  # a head's width where a Qwen3 config does not say, as transformers takes it


@dataclass(frozen=True, kw_only=True)
class TowerParams:
    """A decoder's sizes. biased: whether attention's linear layers have biases. theta: base of the rotations."""

    vocabulary: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    eps: float
    theta: float
    biased: bool
    qk_norm: bool


def tower_params(fields: Mapping[str, Any], layers: int, length: int) -> TowerParams:
    """The sizes in a decoder's config.json, as transformers writes it today or did before version 5.

    layers: how many are read. length: of what will be read, in tokens. Raises `ValueError` for what is no such config,
    or asks for what no published encoder has and we do not compute: scaled rotations, a window shorter than `length`,
    another activation.
    """
    qwen3 = fields["model_type"] == "qwen3"
    hidden, heads = _count(fields, "hidden_size"), _count(fields, "num_attention_heads")
    head_width = _count(fields, "head_dim", HEAD_OF_QWEN3 if qwen3 else hidden // heads)
    kv_heads = _count(fields, "num_key_value_heads", heads)
    if heads % kv_heads or head_width % 2:
        raise ValueError(f"{heads} heads of width {head_width} cannot share {kv_heads} keys")
    if fields.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {fields['hidden_act']!r}")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    plain = isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) == "default"
    if not plain or rope.keys() - {"rope_type", "type", "rope_theta"}:
        raise ValueError(f"the rotations are {rope!r}")
    window = fields.get("sliding_window") if not qwen3 or fields.get("use_sliding_window") else None
    if window is not None and _count(fields, "sliding_window") < length:
        raise ValueError(f"the window of {window} tokens is shorter than {length}")
    return TowerParams(
        vocabulary=_count(fields, "vocab_size"),
        hidden=hidden,
        mlp=_count(fields, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        eps=_positive(fields.get("rms_norm_eps", 1e-6)),
        theta=_positive(rope.get("rope_theta", fields.get("rope_theta", 10000.0))),
        biased=fields.get("attention_bias") is True,
        qk_norm=qwen3,
    )


def _count(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MOST:
        raise ValueError(f"{name} is {value!r}")
    return value


def _positive(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is no positive number")
    return float(value)


class Past:
    """Keys and values [B, KV, tokens, d] of the tokens that a decoder has read, for each layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def extended(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of `layer`, the new ones last, and kept."""
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            earlier_k, earlier_v = self.layers[layer]
            self.layers[layer] = torch.cat((earlier_k, k), 2), torch.cat((earlier_v, v), 2)
        return self.layers[layer]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)


class Attention(nn.Module):
    def __init__(self, params: TowerParams) -> None:
        super().__init__()
        p = params
        self._head_width = p.head_width
        self._group = p.heads // p.kv_heads
        self.q_proj = nn.Linear(p.hidden, p.heads * p.head_width, bias=p.biased)
        self.k_proj = nn.Linear(p.hidden, p.kv_heads * p.head_width, bias=p.biased)
        self.v_proj = nn.Linear(p.hidden, p.kv_heads * p.head_width, bias=p.biased)
        self.o_proj = nn.Linear(p.heads * p.head_width, p.hidden, bias=p.biased)
        self.q_norm = RMSNorm(p.head_width, p.eps) if p.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(p.head_width, p.eps) if p.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Past | None = None, layer: int = 0
    ) -> Tensor:
        """x [B, L, W]; cos, sin [L, d]; mask [B or none, 1, L, L]: True where a row's token sees a column's. past: what
        goes before, which the columns begin with, and which is extended; `layer` is which one this is."""
        heads = (-1, self._head_width)
        q = rotated(self.q_norm(self.q_proj(x).unflatten(-1, heads)).transpose(1, 2), cos, sin)
        k = rotated(self.k_norm(self.k_proj(x).unflatten(-1, heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        if past is not None:
            k, v = past.extended(layer, k, v)
        if self._group > 1:  # written out: with a mask, not every fast kernel shares keys by itself
            k, v = k.repeat_interleave(self._group, 1), v.repeat_interleave(self._group, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, params: TowerParams) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(params.hidden, params.mlp, bias=False)
        self.up_proj = nn.Linear(params.hidden, params.mlp, bias=False)
        self.down_proj = nn.Linear(params.mlp, params.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, params: TowerParams) -> None:
        super().__init__()
        self.self_attn = Attention(params)
        self.mlp = MLP(params)
        self.input_layernorm = RMSNorm(params.hidden, params.eps)
        self.post_attention_layernorm = RMSNorm(params.hidden, params.eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Past | None = None, layer: int = 0
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, past, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Tower(nn.Module):
    """Token embedding and layers, no final norm and no head."""

    def __init__(self, params: TowerParams) -> None:
        super().__init__()
        self.params = params
        self.embed_tokens = nn.Embedding(params.vocabulary, params.hidden)
        self.layers = nn.ModuleList(Layer(params) for _ in range(params.layers))
        self._turns: tuple[Any, Tensor, Tensor] | None = None  # the last rotations, and for what they were made

    def forward(self, ids: Tensor, mask: Tensor, taps: Sequence[int]) -> Tensor:
        """[B, L, taps * W] of token ids [B, L]: what stands after so many layers, 0 the embedding, side by side.

        mask: [B, 1, L, L], see `seen`.
        """
        x = self.embed_tokens(ids)
        asked = x.shape[1], x.dtype, x.device
        if self._turns is None or self._turns[0] != asked:
            self._turns = asked, *rotations(0, x.shape[1], self.params, x)
        return self.through(x, mask, *self._turns[1:], taps)

    def through(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, taps: Sequence[int]) -> Tensor:
        """What `forward` gives for embeddings x [B, L, W], with the `rotations` of all their positions."""
        kept = {0: x}
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, cos, sin, mask)
            if number in taps:
                kept[number] = x
        return torch.cat([kept[tap] for tap in taps], -1)

    def cut(self, layers: int) -> Tower:
        """A tower of the first `layers`, made of the very same modules: moving one moves the other."""
        with torch.device("meta"):
            tower = Tower(replace(self.params, layers=0))
        tower.embed_tokens = self.embed_tokens
        tower.layers = nn.ModuleList(self.layers[:layers])
        return tower.train(self.training)


class Decoder(Tower):
    """The whole: with the norm that comes before the head."""

    def __init__(self, params: TowerParams) -> None:
        super().__init__(params)
        self.norm = RMSNorm(params.hidden, params.eps)

    def read(self, x: Tensor, past: Past) -> Tensor:
        """[B, L, W], normed, of embeddings [B, L, W] that follow what is in `past`, which they extend."""
        before, length = past.tokens, x.shape[1]
        mask = _earlier(before, length, x.device)
        cos, sin = rotations(before, length, self.params, x)
        for number, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask[None, None], past, number)
        normed: Tensor = self.norm(x)
        return normed


def seen(mask: Tensor) -> Tensor:
    """[B, 1, L, L] of the tokens' mask [B, L], 1 for a token and 0 for padding: a token sees those up to itself."""
    return _earlier(0, mask.shape[1], mask.device) & mask.bool()[:, None, None, :]


def _earlier(before: int, length: int, device: torch.device) -> Tensor:
    """[L, before + L]: which tokens each of the last `length` may look at."""
    places = torch.arange(before + length, device=device)
    return places <= places[before:, None]


def rotations(start: int, length: int, params: TowerParams, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [L, d] of so many positions from `start` on, where and as `like` is. The angles are computed in
    float64 on the CPU, where every device has it."""
    half = torch.arange(0, params.head_width, 2, dtype=torch.float64, device="cpu") / params.head_width
    places = torch.arange(start, start + length, dtype=torch.float64, device="cpu")
    angles = places[:, None] / params.theta**half
    both = torch.cat((angles, angles), -1)
    return both.cos().to(like), both.sin().to(like)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, L, d], each pair of a head's first and second half turned by its position's angle."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
