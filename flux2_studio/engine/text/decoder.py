"""The decoder of a Qwen3 or Mistral language model, with all layers or only the first ones.

Computes hidden states at several depths, concatenated per token. Or extends a sequence with a KV cache and returns the
input of the LM head. Reads `TextDecoderParams` from a config.json. Out of scope: files, chat templates and padding
(`encoder.py`), sampling text (`writer.py`).

transformers' models are not used, because importing them takes five seconds of CPU time before the first picture, and
because they keep the output of every layer where three are needed.

    x [B, L, W] -> x + attention(norm(x)) -> x + mlp(norm(x)), for each layer

Modules are named like the tensors of the published files. Grouped-query attention (arXiv 2305.13245), RoPE over the two
halves of a head (arXiv 2104.09864), SwiGLU MLP (arXiv 2002.05202). Qwen3 norms each head's queries and keys (arXiv
2505.09388), Mistral does not (arXiv 2310.06825).

Pitfalls: RoPE rotates halves here, but adjacent pairs in the flow transformer. With left padding, the rows before the
first token attend to nothing. torch returns zeros for them (since 2.5), as in the contexts that the tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_CONFIG_NUMBER = 1 << 24  # for all sizes in a config; no tensor of a language model has a side as long
QWEN3_DEFAULT_HEAD_WIDTH = 128  # transformers' default for Qwen3 configs without head_dim


@dataclass(frozen=True, kw_only=True)
class TextDecoderParams:
    """A decoder's sizes. attention_bias: attention's linear layers have biases. rope_theta: base of the RoPE
    frequencies.
    """

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
    """Read the sizes from a decoder's config.json, as transformers writes it today or did before version 5.

    layers: how many layers will be used. length: how many tokens will be read. Raises `ValueError` for an invalid
    config, or for features that no published encoder uses and this module lacks: scaled RoPE, a sliding window shorter
    than `length`, another activation.
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
    is_unscaled = isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) == "default"
    if not is_unscaled or rope.keys() - {"rope_type", "type", "rope_theta"}:
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
    """Keys and values [B, KV, tokens, d] of the tokens read so far, per layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v of a layer. Returns all keys and values of the layer, the new ones last."""
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
        """x [B, L, W]; cos, sin [L, d]; mask [B or 1, 1, L, past + L]: True where a row's token sees a column's.
        kv_cache: earlier keys and values, which come first in the columns and get the new ones appended.
        layer_index: this layer's index in the cache.
        """
        heads = (-1, self._head_width)
        q = apply_rope(self.q_norm(self.q_proj(x).unflatten(-1, heads)).transpose(1, 2), cos, sin)
        k = apply_rope(self.k_norm(self.k_proj(x).unflatten(-1, heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        if kv_cache is not None:
            k, v = kv_cache.append(layer_index, k, v)
        if self._queries_per_key > 1:  # explicit, because with a mask not every fast kernel shares keys itself
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
    """Token embedding and layers, without final norm and LM head."""

    def __init__(self, params: TextDecoderParams) -> None:
        super().__init__()
        self.params = params
        self.embed_tokens = nn.Embedding(params.vocabulary, params.hidden)
        self.layers = nn.ModuleList(DecoderLayer(params) for _ in range(params.layers))
        self._rope_cache: tuple[Any, Tensor, Tensor] | None = None  # (key, cos, sin) of the last call

    def forward(self, ids: Tensor, mask: Tensor, hidden_layers: Sequence[int]) -> Tensor:
        """Return the concatenated hidden states [B, L, len(hidden_layers) * W] of token ids [B, L].

        hidden_layers: 0 is the embedding, n the output of layer n. mask: [B, 1, L, L], see `causal_attention_mask`.
        """
        x = self.embed_tokens(ids)
        rope_key = x.shape[1], x.dtype, x.device
        if self._rope_cache is None or self._rope_cache[0] != rope_key:
            self._rope_cache = rope_key, *rope_table(0, x.shape[1], self.params, x)
        return self.run_layers(x, mask, *self._rope_cache[1:], hidden_layers)

    def run_layers(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, hidden_layers: Sequence[int]) -> Tensor:
        """Same as `forward`, for embeddings x [B, L, W] and the `rope_table` of their positions."""
        hidden_states = {0: x}
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, cos, sin, mask)
            if number in hidden_layers:
                hidden_states[number] = x
        return torch.cat([hidden_states[index] for index in hidden_layers], -1)

    def truncated_to(self, layer_count: int) -> TextDecoder:
        """Return a decoder of the first `layer_count` layers. It shares the modules themselves: moving one moves the
        other.
        """
        with torch.device("meta"):
            decoder = TextDecoder(replace(self.params, layers=0))
        decoder.embed_tokens = self.embed_tokens
        decoder.layers = nn.ModuleList(self.layers[:layer_count])
        return decoder.train(self.training)


class FullTextDecoder(TextDecoder):
    """All layers, with the norm before the LM head."""

    def __init__(self, params: TextDecoderParams) -> None:
        super().__init__(params)
        self.norm = RMSNorm(params.hidden, params.eps)

    def forward_cached(self, x: Tensor, kv_cache: KVCache) -> Tensor:
        """Return the normed output [B, L, W] for embeddings [B, L, W] that follow the tokens in `kv_cache`, and
        append them to it.
        """
        past_length, length = kv_cache.tokens, x.shape[1]
        mask = _causal_mask(past_length, length, x.device)
        cos, sin = rope_table(past_length, length, self.params, x)
        for number, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask[None, None], kv_cache, number)
        normed: Tensor = self.norm(x)
        return normed


def causal_attention_mask(mask: Tensor) -> Tensor:
    """Return the attention mask [B, 1, L, L] for a padding mask [B, L], 1 for tokens and 0 for padding: a token sees
    tokens up to itself.
    """
    return _causal_mask(0, mask.shape[1], mask.device) & mask.bool()[:, None, None, :]


def _causal_mask(past_length: int, length: int, device: torch.device) -> Tensor:
    """[L, past_length + L]: True where each of the last `length` tokens may attend."""
    positions = torch.arange(past_length + length, device=device)
    return positions <= positions[past_length:, None]


def rope_table(start: int, length: int, params: TextDecoderParams, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin [L, d] of `length` positions from `start` on, with dtype and device of `like`. Angles are
    computed in float64 on the CPU, because not every device has float64.
    """
    half = torch.arange(0, params.head_width, 2, dtype=torch.float64, device="cpu") / params.head_width
    positions = torch.arange(start, start + length, dtype=torch.float64, device="cpu")
    angles = positions[:, None] / params.rope_theta**half
    both = torch.cat((angles, angles), -1)
    return both.cos().to(like), both.sin().to(like)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, L, d]: pairs of the first and second half of each head, by the angle of their position."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
