"""The FLUX.2 flow transformer: packed latent tokens and text tokens in, velocity out.

One evaluation of v(x_t, t, text, references), for klein and dev, of any width and depth. Out of scope: schedules,
guidance, decoding latents to pictures, loading weights.

    B batch, L text tokens, N tokens of x (image tokens, then R reference tokens until they are cached)
    D hidden width, H heads, d head width, G groups
    x [B, N, 128]   ctx [B, L, C]   vec [B, G, D] time (and guidance) embedding   modulation [B, 1 or tokens, D]

The sequence order is always [text, image, references]. Attention has no mask: padded text tokens take part.

Reference cache (klein 9B KV): reference tokens are modulated as at t = 0 and attend to references only, so their keys
and values depend on the reference pictures alone. The first evaluation fills the cache; later ones append it to every
block's keys and values. During that first evaluation, tokens form G = 2 groups (0: text and image, 1: references), each
with its own modulation. In all others there is one group.

`Modulations` depend only on the timestep (and guidance), so they can be precomputed for all steps. The last single
block computes keys and values for all tokens, but everything else only for the output tokens.

Pitfalls: qkv's output axis is (3, heads, head width). RoPE rotates adjacent pairs, not halves. final_layer gives
(shift, scale), the reverse of what diffusers stores. Parameter names are Black Forest Labs' key names; renaming an
attribute breaks loading.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2_studio.engine.params import TransformerParams

EPS = 1e-6
ROPE_THETA = 2000
ROPE_AXES = 4  # (t, h, w, l), a quarter of the head each
FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class ReferenceKV:
    """Keys and values of the reference tokens in one block, each [B, H, R, d], keys after RoPE.

    is_filled: False while the references are the last R tokens of the sequence and the block must write their keys and
    values here.
    """

    keys: Tensor
    values: Tensor
    is_filled: bool


@dataclass
class ReferenceCache:
    """Keys and values of the reference tokens, one pair per block, filled by the first evaluation.

    tokens: R, the number of reference tokens. Until the cache is filled, they are the last tokens of x. blocks: (keys,
    values) per block, see `ReferenceKV`. is_filled: whether the first evaluation is done.
    """

    tokens: int
    blocks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    is_filled: bool = False

    def allocate(self, count: int, like: Tensor, heads: int, head_width: int) -> None:
        """Allocate empty tensors for `count` blocks, with the batch size, dtype and device of `like`."""
        shape = (like.shape[0], heads, self.tokens, head_width)
        self.blocks = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(count)]

    def block_kv(self, block: int) -> ReferenceKV | None:
        """Return what a block writes or reads, or None if there are no reference tokens."""
        return ReferenceKV(*self.blocks[block], is_filled=self.is_filled) if self.tokens else None


@dataclass(frozen=True)
class Rope:
    """Rotation tables for a sequence: cos and sin, each [tokens, d/2] in float32."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x [B, H, tokens, d] (float32)."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * self.cos - b * self.sin, a * self.sin + b * self.cos), -1).flatten(-2)

    def slice(self, first: int, count: int) -> Rope:
        """Return the tables of `count` tokens from `first` on."""
        return Rope(self.cos.narrow(0, first, count), self.sin.narrow(0, first, count))


@dataclass(frozen=True, kw_only=True)
class Modulations:
    """Shifts, scales and gates of the blocks, computed from the time (and guidance).

    Each tensor is [rows, 1 or tokens, D]. There is one row for the whole batch, one per row of the batch, or one per
    step of a run; `at_step` selects a step.

    image, text: for the two streams of a double block. single: for a single block. final: shift and scale of the final
    layer.
    """

    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    final: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.image, *self.text, *self.single, *self.final)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Modulations:
        """Return modulations made of `tensors`, which have the order of `self.tensors`."""
        remaining = iter(tensors)
        image, text, single, final = (
            tuple(itertools.islice(remaining, len(part))) for part in (self.image, self.text, self.single, self.final)
        )
        return Modulations(image=image, text=text, single=single, final=final)

    def at_step(self, row: int) -> Modulations:
        """Return the modulations of step `row`, if there is one row per step. They broadcast over any batch."""
        return self.with_tensors([part[row : row + 1] for part in self.tensors])


def axial_rope_table(ids: Tensor, head_width: int, device: torch.device) -> Rope:
    """Build the tables for position ids [tokens, 4], on `device`. Angles are computed in float64 on the CPU, because
    not every device has float64. Ids on the CPU need no synchronisation.
    """
    axis = head_width // ROPE_AXES
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, axis, 2, dtype=torch.float64) / axis)
    angles = (ids.detach().cpu().double()[:, :, None] * frequencies).flatten(1)  # [tokens, 4 * axis/2]
    return Rope(angles.cos().float().to(device), angles.sin().float().to(device))


def sinusoid(t: Tensor, channels: int) -> Tensor:
    """Embed t [B] (0..1, scaled by 1000) as [B, channels] in float32, cosines first, longest period 10000."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


def clamp_to_float16(x: Tensor) -> Tensor:
    """Clamp x to float16's range if that is its dtype: large activations would become inf, then NaN."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX) if x.dtype is torch.float16 else x


def attend(
    q: Tensor, k: Tensor, v: Tensor, reference_kv: ReferenceKV | None, *, q_has_references: bool = True
) -> Tensor:
    """Attention over q, k, v [B, H, tokens, d], returned as [B, tokens, D]. The module's header explains references.

    q_has_references: whether q includes the reference tokens, as k and v do, while the cache is being filled.
    """
    if reference_kv is None:
        out = F.scaled_dot_product_attention(q, k, v)
    elif reference_kv.is_filled:
        out = F.scaled_dot_product_attention(
            q, torch.cat((k, reference_kv.keys), 2), torch.cat((v, reference_kv.values), 2)
        )
    else:
        reference_tokens = reference_kv.keys.shape[2]
        reference_kv.keys.copy_(k[:, :, -reference_tokens:])
        reference_kv.values.copy_(v[:, :, -reference_tokens:])
        out = F.scaled_dot_product_attention(q[:, :, :-reference_tokens] if q_has_references else q, k, v)
        if q_has_references:
            out = torch.cat(
                (
                    out,
                    F.scaled_dot_product_attention(q[:, :, -reference_tokens:], reference_kv.keys, reference_kv.values),
                ),
                2,
            )
    return out.transpose(1, 2).flatten(2)


class Embedder(nn.Module):
    """Two-layer MLP over a sinusoidal embedding."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(channels, hidden, bias=False)
        self.out_layer = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """Project vec to `sets` triples (shift, scale, gate). All blocks of a kind share one."""

    def __init__(self, hidden: int, sets: int) -> None:
        super().__init__()
        self.sets = sets
        self.lin = nn.Linear(hidden, sets * 3 * hidden, bias=False)

    def forward(self, vec: Tensor, group: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return 3 * sets tensors [B, 1, D]; with `group` [tokens], the group of each token, [B, tokens, D]."""
        parts = self.lin(F.silu(vec)).chunk(3 * self.sets, -1)
        return parts if group is None else tuple(part[:, group] for part in parts)


class RMSScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))


class QKNorm(nn.Module):
    """RMS norm of each head's queries and keys, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = RMSScale(width)
        self.key_norm = RMSScale(width)

    def forward(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Split qkv [B, tokens, 3D] into q, k (normed, float32) and v (unchanged), each [B, H, tokens, d]."""
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return self.query(q), self.key(k), v

    def query(self, q: Tensor) -> Tensor:
        return F.rms_norm(q.float(), q.shape[-1:], self.query_norm.scale.float(), EPS)

    def key(self, k: Tensor) -> Tensor:
        return F.rms_norm(k.float(), k.shape[-1:], self.key_norm.scale.float(), EPS)


class Attention(nn.Module):
    """The projections of one stream. `DoubleBlock` computes the attention over both streams."""

    def __init__(self, hidden: int, head_width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.norm = QKNorm(head_width)
        self.proj = nn.Linear(hidden, hidden, bias=False)


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, -1)
        return clamp_to_float16(F.silu(gate) * value)


def mlp(hidden: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, 2 * inner, bias=False), SwiGLU(), nn.Linear(inner, hidden, bias=False))


class DoubleBlock(nn.Module):
    """Text and image have separate weights and share one attention."""

    def __init__(self, p: TransformerParams) -> None:
        super().__init__()
        self.heads = p.heads
        self.img_attn = Attention(p.hidden, p.head_width)
        self.txt_attn = Attention(p.hidden, p.head_width)
        self.img_mlp = mlp(p.hidden, p.mlp)
        self.txt_mlp = mlp(p.hidden, p.mlp)

    def forward(
        self,
        x: Tensor,
        ctx: Tensor,
        x_mod: tuple[Tensor, ...],
        ctx_mod: tuple[Tensor, ...],
        rope: Rope,
        reference_kv: ReferenceKV | None = None,
    ) -> tuple[Tensor, Tensor]:
        x_shift1, x_scale1, x_gate1, x_shift2, x_scale2, x_gate2 = x_mod
        c_shift1, c_scale1, c_gate1, c_shift2, c_scale2, c_gate2 = ctx_mod

        q_x, k_x, v_x = self.img_attn.norm(self.img_attn.qkv(modulate(x, x_shift1, x_scale1)), self.heads)
        q_c, k_c, v_c = self.txt_attn.norm(self.txt_attn.qkv(modulate(ctx, c_shift1, c_scale1)), self.heads)
        v = torch.cat((v_c, v_x), 2)
        q = rope(torch.cat((q_c, q_x), 2)).to(v.dtype)
        k = rope(torch.cat((k_c, k_x), 2)).to(v.dtype)
        out_c, out_x = attend(q, k, v, reference_kv).split((ctx.shape[1], x.shape[1]), 1)

        x = clamp_to_float16(x + x_gate1 * self.img_attn.proj(out_x))
        x = clamp_to_float16(x + x_gate2 * self.img_mlp(modulate(x, x_shift2, x_scale2)))
        ctx = clamp_to_float16(ctx + c_gate1 * self.txt_attn.proj(out_c))
        ctx = clamp_to_float16(ctx + c_gate2 * self.txt_mlp(modulate(ctx, c_shift2, c_scale2)))
        return x, ctx


class SingleBlock(nn.Module):
    """Attention and MLP in parallel, over the joined sequence."""

    def __init__(self, p: TransformerParams) -> None:
        super().__init__()
        self.heads = p.heads
        self.splits = (3 * p.hidden, 2 * p.mlp)
        self.linear1 = nn.Linear(p.hidden, sum(self.splits), bias=False)
        self.linear2 = nn.Linear(p.hidden + p.mlp, p.hidden, bias=False)
        self.norm = QKNorm(p.head_width)
        self.act = SwiGLU()

    def forward(
        self,
        x: Tensor,
        mod: tuple[Tensor, ...],
        rope: Rope,
        reference_kv: ReferenceKV | None = None,
        output_range: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return the new x [B, tokens, D], or only the tokens of `output_range` (first, count).

        With `output_range`, the output must not include references that are being cached.
        """
        shift, scale, gate = mod
        q, k, v, inner = self._project(modulate(x, shift, scale), output_range)
        k = rope(self.norm.key(k)).to(v.dtype)
        if output_range is not None:
            x, rope = x.narrow(1, *output_range), rope.slice(*output_range)
            gate = gate if gate.shape[1] == 1 else gate.narrow(1, *output_range)
        q = rope(self.norm.query(q)).to(v.dtype)
        attended = attend(q, k, v, reference_kv, q_has_references=output_range is None)
        return clamp_to_float16(x + gate * self.linear2(torch.cat((attended, self.act(inner)), -1)))

    def _project(self, x: Tensor, output_range: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, H, tokens, d] and the MLP's input [B, tokens, 2 * mlp] for x [B, tokens,
        D]. Keys and values cover all tokens, the others only `output_range`.
        """
        if output_range is not None and type(self.linear1) is nn.Linear:
            hidden, weight = x.shape[-1], self.linear1.weight
            k, v = F.linear(x, weight[hidden : 3 * hidden]).chunk(2, -1)
            x = x.narrow(1, *output_range)
            q, inner = F.linear(x, weight[:hidden]), F.linear(x, weight[3 * hidden :])
        else:  # quantised and adapted layers cannot compute a part of their outputs
            qkv, inner = self.linear1(x).split(self.splits, -1)
            q, k, v = qkv.chunk(3, -1)
            if output_range is not None:
                q, inner = q.narrow(1, *output_range), inner.narrow(1, *output_range)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return q, k, v, inner


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, out_channels, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden, bias=False))

    def modulation(self, vec: Tensor) -> tuple[Tensor, ...]:
        """Return shift and scale, each with the shape of vec."""
        return self.adaLN_modulation(vec).chunk(2, -1)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.linear(modulate(x, shift, scale))


class Transformer(nn.Module):
    """See the module's header. Build it with `weights.loading.load_transformer`."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        p = self.params = params
        self.img_in = nn.Linear(p.in_channels, p.hidden, bias=False)
        self.txt_in = nn.Linear(p.context_width, p.hidden, bias=False)
        self.time_in = Embedder(p.time_channels, p.hidden)
        if p.guidance_embedding:
            self.guidance_in = Embedder(p.time_channels, p.hidden)
        self.double_stream_modulation_img = Modulation(p.hidden, sets=2)
        self.double_stream_modulation_txt = Modulation(p.hidden, sets=2)
        self.single_stream_modulation = Modulation(p.hidden, sets=1)
        self.double_blocks = nn.ModuleList(DoubleBlock(p) for _ in range(p.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(p) for _ in range(p.single_blocks))
        self.final_layer = FinalLayer(p.hidden, p.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.img_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.img_in.weight.device

    def rope(self, ids: Tensor) -> Rope:
        """Build the tables for the full sequence; ids [tokens, 4] in the order text, image, references."""
        return axial_rope_table(ids, self.params.head_width, self.device)

    def forward(
        self,
        x: Tensor,
        ctx: Tensor,
        t: Tensor,
        rope: Rope,
        guidance: Tensor | None = None,
        *,
        outputs: int | None = None,
        cache: ReferenceCache | None = None,
    ) -> Tensor:
        """Return the velocity [B, outputs, 128] of the first `outputs` tokens of x (default: all).

        x: [B, N, 128], image tokens, then reference tokens if any. ctx: [B, L, C]. t, guidance: [B] in float32; pass
        guidance if and only if the model embeds it. rope: for L + N tokens. cache: while it is unfilled, the last
        `cache.tokens` tokens of x are references.
        """
        cached_tokens = cache.tokens if cache is not None and not cache.is_filled else 0
        modulations = self.modulations(
            t, guidance, (ctx.shape[1], x.shape[1], cached_tokens) if cached_tokens else None
        )
        return self.velocity(x, ctx, modulations, rope, outputs=outputs, cache=cache)

    def modulations(
        self, t: Tensor, guidance: Tensor | None = None, cache_fill: tuple[int, int, int] | None = None
    ) -> Modulations:
        """Return the modulations for t and guidance [B], for the rows of a batch or for all steps of a run.

        cache_fill: (L, N, R) if the evaluation fills a reference cache: the last R tokens are then modulated as at t =
        0.
        """
        vec = self._embed_time(t, guidance)[:, None]
        final = self.final_layer.modulation(vec)
        text = self.double_stream_modulation_txt(vec)
        image_group = group = None
        if cache_fill is not None:
            length, tokens, references = cache_fill
            vec = torch.cat((vec, self._embed_time(torch.zeros_like(t), guidance)[:, None]), 1)
            group = torch.zeros(length + tokens, dtype=torch.long, device=t.device)
            group[-references:] = 1
            image_group = group[length:]
        return Modulations(
            image=self.double_stream_modulation_img(vec, image_group),
            text=text,
            single=self.single_stream_modulation(vec, group),
            final=final,
        )

    def velocity(
        self,
        x: Tensor,
        ctx: Tensor,
        modulations: Modulations,
        rope: Rope,
        *,
        outputs: int | None = None,
        cache: ReferenceCache | None = None,
    ) -> Tensor:
        """Same as `forward`, with precomputed `modulations`."""
        is_filling = cache is not None and not cache.is_filled and cache.tokens > 0
        x, ctx = self.img_in(x), self.txt_in(ctx)
        blocks = len(self.double_blocks) + len(self.single_blocks)
        if cache is not None and not cache.is_filled:
            cache.allocate(blocks, x, self.params.heads, self.params.head_width)
        block_kvs = [None if cache is None else cache.block_kv(block) for block in range(blocks)]
        for double, block_kv in zip(self.double_blocks, block_kvs[: len(self.double_blocks)], strict=True):
            x, ctx = double(x, ctx, modulations.image, modulations.text, rope, block_kv)
        output_range = ctx.shape[1], x.shape[1] if outputs is None else outputs
        joined = torch.cat((ctx, x), 1)
        # Without `outputs`, the result includes the references. While they are being cached, `SingleBlock` must not get
        # an `output_range` that includes them, so no block is narrowed.
        narrow_block = len(self.single_blocks) - 1 if outputs is not None or not is_filling else None
        for i, (single, block_kv) in enumerate(
            zip(self.single_blocks, block_kvs[len(self.double_blocks) :], strict=True)
        ):
            joined = single(joined, modulations.single, rope, block_kv, output_range if i == narrow_block else None)
        if cache is not None:
            cache.is_filled = True
        out = joined if joined.shape[1] == output_range[1] else joined.narrow(1, *output_range)
        return self.final_layer(out, *modulations.final)

    def _embed_time(self, t: Tensor, guidance: Tensor | None) -> Tensor:
        channels = self.params.time_channels
        vec = self.time_in(sinusoid(t, channels).to(self.dtype))
        if self.params.guidance_embedding:
            assert guidance is not None, "this checkpoint embeds guidance: pass it"
            vec = vec + self.guidance_in(sinusoid(guidance, channels).to(self.dtype))
        return vec
