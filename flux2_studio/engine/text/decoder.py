"""The decoder of a Qwen3 or Mistral language model: cut after the last layer that is read, or whole.

Does: token ids to hidden states at a few depths, joined per token; further tokens after those that are in a cache, to
where the head begins; `TextDecoderParams` from a config.json. Does not know: files, chat templates, padding
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

MAX_CONFIG_NUMBER = 1 << 24  # of anything that a config counts: no tensor of a language model is as long along one side
QWEN3_DEFAULT_HEAD_WIDTH = 128  # a head's width where a Qwen3 config does not say, as transformers takes it


@dataclass(frozen=True, kw_only=True)
class TextDecoderParams:
    """A decoder's sizes. attention_bias: whether attention's linear layers have biases. rope_theta: base of the
    rotations."""

    vocabulary: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    eps: float
    rope_theta: float
    attention_bias: bool
    qk_norm: bool


def text_decoder_params(config: Mapping[str, Any], layers: int, length: int) -> TextDecoderParams:
    """The sizes in a decoder's config.json, as transformers writes it today or did before version 5.

    layers: how many are read. length: of what will be read, in tokens. Raises `ValueError` for what is no such config,
    or asks for what no published encoder has and we do not compute: scaled rotations, a window shorter than `length`,
    another activation.
    """
    qwen3 = config["model_type"] == "qwen3"
    hidden, heads = _positive_int(config, "hidden_size"), _positive_int(config, "num_attention_heads")
    head_width = _positive_int(config, "head_dim", QWEN3_DEFAULT_HEAD_WIDTH if qwen3 else hidden // heads)
    kv_heads = _positive_int(config, "num_key_value_heads", heads)
    if heads % kv_heads or head_width % 2:
        raise ValueError(f"{heads} heads of width {head_width} cannot share {kv_heads} keys")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) == "default"
    if not plain or rope.keys() - {"rope_type", "type", "rope_theta"}:
        raise ValueError(f"the rotations are {rope!r}")
    window = config.get("sliding_window") if not qwen3 or config.get("use_sliding_window") else None
    if window is not None and _positive_int(config, "sliding_window") < length:
        raise ValueError(f"the window of {window} tokens is shorter than {length}")
    return TextDecoderParams(
        vocabulary=_positive_int(config, "vocab_size"),
        hidden=hidden,
        mlp=_positive_int(config, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        eps=_positive_float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=_positive_float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        attention_bias=config.get("attention_bias") is True,
        qk_norm=qwen3,
    )


def _positive_int(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_CONFIG_NUMBER:
        raise ValueError(f"{name} is {value!r}")
    return value


def _positive_float(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is no positive number")
    return float(value)


class KVCache:
    """Keys and values [B, KV, tokens, d] of the tokens that a decoder has read, for each layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of `layer_index`, the new ones last, and kept."""
        if layer_index == len(self.layers):
            self.layers.append((k, v))
        else:
            earlier_k, earlier_v = self.layers[layer_index]
            self.layers[layer_index] = torch.cat((earlier_k, k), 2), torch.cat((earlier_v, v), 2)
        return self.layers[layer_index]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)


class GroupedQueryAttention(nn.Module):
    def __init__(self, params: TextDecoderParams) -> None:
        super().__init__()
        p = params
        self._head_width = p.head_width
        self._queries_per_key = p.heads // p.kv_heads
        self.q_proj = nn.Linear(p.hidden, p.heads * p.head_width, bias=p.attention_bias)
        self.k_proj = nn.Linear(p.hidden, p.kv_heads * p.head_width, bias=p.attention_bias)
        self.v_proj = nn.Linear(p.hidden, p.kv_heads * p.head_width, bias=p.attention_bias)
        self.o_proj = nn.Linear(p.heads * p.head_width, p.hidden, bias=p.attention_bias)
        self.q_norm = RMSNorm(p.head_width, p.eps) if p.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(p.head_width, p.eps) if p.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kv_cache: KVCache | None = None, layer_index: int = 0
    ) -> Tensor:
        """x [B, L, W]; cos, sin [L, d]; mask [B or none, 1, L, L]: True where a row's token sees a column's. kv_cache:
        what goes before, which the columns begin with, and which is extended; `layer_index` is which one this is."""
        heads = (-1, self._head_width)
        q = apply_rope(self.q_norm(self.q_proj(x).unflatten(-1, heads)).transpose(1, 2), cos, sin)
        k = apply_rope(self.k_norm(self.k_proj(x).unflatten(-1, heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        if kv_cache is not None:
            k, v = kv_cache.append(layer_index, k, v)
        if self._queries_per_key > 1:  # written out: with a mask, not every fast kernel shares keys by itself
            k, v = k.repeat_interleave(self._queries_per_key, 1), v.repeat_interleave(self._queries_per_key, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, params: TextDecoderParams) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(params.hidden, params.mlp, bias=False)
        self.up_proj = nn.Linear(params.hidden, params.mlp, bias=False)
        self.down_proj = nn.Linear(params.mlp, params.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, params: TextDecoderParams) -> None:
        super().__init__()
        self.self_attn = GroupedQueryAttention(params)
        self.mlp = MLP(params)
        self.input_layernorm = RMSNorm(params.hidden, params.eps)
        self.post_attention_layernorm = RMSNorm(params.hidden, params.eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kv_cache: KVCache | None = None, layer_index: int = 0
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, kv_cache, layer_index)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextDecoder(nn.Module):
    """Token embedding and layers, no final norm and no head."""

    def __init__(self, params: TextDecoderParams) -> None:
        super().__init__()
        self.params = params
        self.embed_tokens = nn.Embedding(params.vocabulary, params.hidden)
        self.layers = nn.ModuleList(DecoderLayer(params) for _ in range(params.layers))
        self._rope_cache: tuple[Any, Tensor, Tensor] | None = None  # the last rotations, and for what they were made

    def forward(self, ids: Tensor, mask: Tensor, hidden_layers: Sequence[int]) -> Tensor:
        """[B, L, taps * W] of token ids [B, L]: what stands after so many layers, 0 the embedding, side by side.

        mask: [B, 1, L, L], see `causal_attention_mask`.
        """
        x = self.embed_tokens(ids)
        asked = x.shape[1], x.dtype, x.device
        if self._rope_cache is None or self._rope_cache[0] != asked:
            self._rope_cache = asked, *rope_table(0, x.shape[1], self.params, x)
        return self.run_layers(x, mask, *self._rope_cache[1:], hidden_layers)

    def run_layers(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, hidden_layers: Sequence[int]) -> Tensor:
        """What `forward` gives for embeddings x [B, L, W], with the `rope_table` of all their positions."""
        kept = {0: x}
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, cos, sin, mask)
            if number in hidden_layers:
                kept[number] = x
        return torch.cat([kept[tap] for tap in hidden_layers], -1)

    def truncated_to(self, layer_count: int) -> TextDecoder:
        """A tower of the first `layer_count`, made of the very same modules: moving one moves the other."""
        with torch.device("meta"):
            tower = TextDecoder(replace(self.params, layers=0))
        tower.embed_tokens = self.embed_tokens
        tower.layers = nn.ModuleList(self.layers[:layer_count])
        return tower.train(self.training)


class FullTextDecoder(TextDecoder):
    """The whole: with the norm that comes before the head."""

    def __init__(self, params: TextDecoderParams) -> None:
        super().__init__(params)
        self.norm = RMSNorm(params.hidden, params.eps)

    def forward_cached(self, x: Tensor, kv_cache: KVCache) -> Tensor:
        """[B, L, W], normed, of embeddings [B, L, W] that follow what is in `kv_cache`, which they extend."""
        before, length = kv_cache.tokens, x.shape[1]
        mask = _causal_mask(before, length, x.device)
        cos, sin = rope_table(before, length, self.params, x)
        for number, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask[None, None], kv_cache, number)
        normed: Tensor = self.norm(x)
        return normed


def causal_attention_mask(mask: Tensor) -> Tensor:
    """[B, 1, L, L] of the tokens' mask [B, L], 1 for a token and 0 for padding: a token sees those up to itself."""
    return _causal_mask(0, mask.shape[1], mask.device) & mask.bool()[:, None, None, :]


def _causal_mask(past_length: int, length: int, device: torch.device) -> Tensor:
    """[L, before + L]: which tokens each of the last `length` may look at."""
    places = torch.arange(past_length + length, device=device)
    return places <= places[past_length:, None]


def rope_table(start: int, length: int, params: TextDecoderParams, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [L, d] of so many positions from `start` on, where and as `like` is. The angles are computed in
    float64 on the CPU, where every device has it."""
    half = torch.arange(0, params.head_width, 2, dtype=torch.float64, device="cpu") / params.head_width
    places = torch.arange(start, start + length, dtype=torch.float64, device="cpu")
    angles = places[:, None] / params.rope_theta**half
    both = torch.cat((angles, angles), -1)
    return both.cos().to(like), both.sin().to(like)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, L, d], each pair of a head's first and second half turned by its position's angle."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
