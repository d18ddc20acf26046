"""Which tensors of a file form which parameter: the layouts in which checkpoints are published.

Maps Black Forest Labs' and diffusers' names and shapes of the transformer and the autoencoder to ours, as a plan, and
derives the model's sizes from the planned shapes. Out of scope: files, formats (`formats.py`), and carrying out a plan
(`loading.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flux2_studio.engine.params import AutoencoderParams, TransformerParams
from flux2_studio.engine.weights.layer_names import (
    DOUBLE_BLOCK_NAMES,
    DOUBLE_BLOCK_PARTS,
    SINGLE_BLOCK_NAMES,
    TOP_LEVEL_NAMES,
)
from flux2_studio.engine.weights.tensor_files import DOWNLOAD_AGAIN_ADVICE, Shape
from flux2_studio.errors import WeightsError

MAX_BLOCKS = 500  # of each kind in a transformer; published ones have at most 48
MAX_LEVELS = 16  # of an autoencoder, and residual blocks per level; published ones have at most 4 levels of 3 blocks


@dataclass(frozen=True)
class TensorSource:
    """How one parameter is made: `names` concatenated along rows, optionally with swapped halves, viewed as `shape`."""

    names: tuple[str, ...]
    shape: Shape
    swap_halves: bool = False

    def assemble(self, parts: list[Tensor]) -> Tensor:
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.swap_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor.reshape(self.shape)


TensorPlan = dict[str, TensorSource]


def add_source(plan: TensorPlan, target: str, source: TensorSource) -> None:
    """Add `source` to `plan`. If the target already has a different source, this one is added under a name that no
    model has, so that `check_shapes` reports it as unexpected.
    """
    plan[target if plan.get(target, source) == source else f"a second {target}"] = source


# --- the transformer ---


def _weight_names(layers: Mapping[str, str]) -> dict[str, str]:
    """Map diffusers' weight names to ours."""
    return {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in layers.items()}


_TOP_LEVEL_WEIGHTS = _weight_names(TOP_LEVEL_NAMES)
_DOUBLE_BLOCK_WEIGHTS = _weight_names(DOUBLE_BLOCK_NAMES) | {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
}
_DOUBLE_BLOCK_WEIGHT_PARTS = {
    f"{ours}.weight": tuple(f"{part}.weight" for part in parts) for ours, parts in DOUBLE_BLOCK_PARTS.items()
}
_SINGLE_BLOCK_WEIGHTS = _weight_names(SINGLE_BLOCK_NAMES) | {
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}


def transformer_plan(shapes: Mapping[str, Shape]) -> TensorPlan:
    """Plan the transformer. Black Forest Labs' names stay; diffusers' names are translated, and separate q, k, v
    joined.
    """
    plan: TensorPlan = {}
    for key, shape in shapes.items():
        block = re.fullmatch(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)", key)
        if block is None:
            target = _TOP_LEVEL_WEIGHTS.get(key, key)
            # diffusers stores the last modulation as (scale, shift)
            add_source(plan, target, TensorSource((key,), shape, swap_halves=key == "norm_out.linear.weight"))
            continue
        single = block[1].startswith("single")
        prefix = f"{'single' if single else 'double'}_blocks.{block[2]}."
        names = _SINGLE_BLOCK_WEIGHTS if single else _DOUBLE_BLOCK_WEIGHTS
        if block[3] in names:
            add_source(plan, prefix + names[block[3]], TensorSource((key,), shape))
            continue
        for target, pieces in _DOUBLE_BLOCK_WEIGHT_PARTS.items():
            if not single and block[3] in pieces:
                sources = tuple(key.removesuffix(block[3]) + piece for piece in pieces)
                if all(shapes.get(source, ())[1:] == shape[1:] and source in shapes for source in sources):
                    rows = sum(shapes[source][0] for source in sources)
                    add_source(plan, prefix + target, TensorSource(sources, (rows, *shape[1:])))
                break
        else:
            add_source(plan, key, TensorSource((key,), shape))  # reported as unexpected
    return plan


def transformer_params(name: str, shapes: Mapping[str, Shape]) -> TransformerParams:
    """Derive the sizes from the planned shapes. Raises `WeightsError` if this is not a FLUX.2 transformer."""
    for key in ("img_in.weight", "txt_in.weight", "time_in.in_layer.weight", "single_blocks.0.linear2.weight"):
        if len(shapes.get(key, ())) != 2:
            raise WeightsError(
                f"{name} is not a FLUX.2 transformer: it has no {key}. Point to the transformer's own file "
                f"(flux-2-...safetensors) or diffusers folder."
            )
    hidden, in_channels = shapes["img_in.weight"]
    head_width = math.prod(shapes.get("single_blocks.0.norm.query_norm.scale", (0,)))
    mlp = shapes["single_blocks.0.linear2.weight"][1] - hidden
    # the head is split into four rotary axes of adjacent pairs
    if not head_width or hidden % head_width or head_width % 8 or mlp < 1:
        raise WeightsError(
            f"{name} has heads of width {head_width} and an MLP of width {mlp} at hidden width {hidden}, which cannot "
            f"be: {DOWNLOAD_AGAIN_ADVICE}"
        )
    time_channels = shapes["time_in.in_layer.weight"][1]
    double_blocks, single_blocks = (
        _count_distinct(shapes, rf"{kind}_blocks\.(\d+)\.") for kind in ("double", "single")
    )
    if time_channels % 2 or max(double_blocks, single_blocks) > MAX_BLOCKS:
        raise WeightsError(
            f"{name} has {double_blocks} double and {single_blocks} single blocks and {time_channels} channels for the "
            f"time, which cannot be: {DOWNLOAD_AGAIN_ADVICE}"
        )
    return TransformerParams(
        in_channels=in_channels,
        context_width=shapes["txt_in.weight"][1],
        hidden=hidden,
        head_width=head_width,
        mlp=mlp,
        double_blocks=double_blocks,
        single_blocks=single_blocks,
        guidance_embedding="guidance_in.in_layer.weight" in shapes,
        time_channels=time_channels,
    )


# --- the autoencoder ---

_MIDDLE = {"resnets.0": "block_1", "resnets.1": "block_2", "attentions.0": "attn_1"}
_LEVEL = r"(encoder|decoder)\.(?:down|up)_blocks\.(\d{1,4})\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def autoencoder_plan(shapes: Mapping[str, Shape]) -> TensorPlan:
    """Plan the autoencoder. Black Forest Labs' names stay; diffusers' names are translated, and its attention
    linears become 1x1 convolutions.
    """
    levels = _count_distinct(shapes, r"decoder\.up_blocks\.(\d+)\.")
    plan: TensorPlan = {}
    for key, shape in shapes.items():
        if key == "bn.num_batches_tracked":  # a training counter
            continue
        target = _autoencoder_name(key, levels)
        if ".attn_1." in target and target.endswith(".weight") and len(shape) == 2:
            shape = (*shape, 1, 1)
        add_source(plan, target, TensorSource((key,), shape))
    return plan


def _autoencoder_name(key: str, levels: int) -> str:
    """Translate a diffusers key to our name. Other keys stay."""
    if key.startswith("quant_conv."):
        return f"encoder.{key}"
    if key.startswith("post_quant_conv."):
        return f"decoder.{key}"
    key = key.replace(".conv_norm_out.", ".norm_out.").replace(".conv_shortcut.", ".nin_shortcut.")
    if match := re.fullmatch(_LEVEL, key):
        coder, level, group, index, rest = match.groups()
        side, number = ("down", int(level)) if coder == "encoder" else ("up", levels - 1 - int(level))
        inner = {"resnets": f"block.{index}", "downsamplers": "downsample", "upsamplers": "upsample"}[group]
        return f"{coder}.{side}.{number}.{inner}.{rest}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.(\w+\.\d+)\.(.+)", key):
        coder, module, rest = match.groups()
        if module == "attentions.0":
            for old, new in _ATTENTION.items():
                rest = re.sub(rf"^{re.escape(old)}\.", f"{new}.", rest)
        return f"{coder}.mid.{_MIDDLE.get(module, module)}.{rest}"
    return key


def autoencoder_params(name: str, shapes: Mapping[str, Shape]) -> AutoencoderParams:
    """Derive the sizes from the planned shapes. Raises `WeightsError` if this is not a FLUX.2 autoencoder."""
    required_keys = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight", "bn.running_mean")
    for key in required_keys:
        if len(shapes.get(key, ())) != (1 if key.startswith("bn.") else 4):
            raise WeightsError(
                f"{name} is not a FLUX.2 autoencoder: it has no {key}. Point to ae.safetensors or to the diffusers "
                f"folder vae/."
            )
    levels = max(_count_distinct(shapes, r"encoder\.down\.(\d+)\."), _count_distinct(shapes, r"decoder\.up\.(\d+)\."))

    def blocks(side: str) -> int:
        return _count_distinct(shapes, rf"{side}\.0\.block\.(\d+)\.")

    if not 0 < levels <= MAX_LEVELS or max(blocks("encoder.down"), blocks("decoder.up")) > MAX_LEVELS:
        raise WeightsError(
            f"{name} has {levels} levels of {blocks('encoder.down')} and {blocks('decoder.up')} blocks, which cannot "
            f"be: {DOWNLOAD_AGAIN_ADVICE}"
        )

    def channels(side: str, resampler: str, edge_layers: Mapping[int, str]) -> tuple[int, ...]:
        # A level's width is read from its first block, else its change of resolution, else the adjacent layer.
        widths = []
        for level in range(levels):
            prefix = f"{side}.{level}"
            candidates = (
                f"{prefix}.block.0.conv2.weight",
                f"{prefix}.{resampler}.conv.weight",
                edge_layers.get(level, ""),
            )
            shape = next((shapes[key] for key in candidates if key in shapes), (0,))
            widths.append(shape[0] if shape else 0)
        if not all(width and width % 32 == 0 for width in widths):
            raise WeightsError(
                f"{name} has levels of {widths} channels in {side}, which cannot be: {DOWNLOAD_AGAIN_ADVICE}"
            )
        return tuple(widths)

    last = levels - 1
    return AutoencoderParams(
        encoder_channels=channels("encoder.down", "downsample", {last: "encoder.mid.block_1.conv1.weight"}),
        decoder_channels=channels("decoder.up", "upsample", {last: "decoder.conv_in.weight"}),
        encoder_blocks=blocks("encoder.down"),
        decoder_blocks=blocks("decoder.up"),
        latent_channels=shapes["decoder.conv_in.weight"][1],
    )


# --- helpers ---


def planned_shapes(plan: TensorPlan) -> dict[str, Shape]:
    return {key: source.shape for key, source in plan.items()}


def _count_distinct(names: Iterable[str], pattern: str) -> int:
    """Count the different numbers that `pattern` finds at the start of names. A gap then shows as a missing tensor,
    and a file cannot claim a huge model by one high number.
    """
    return len({match[1] for name in names if (match := re.match(pattern, name))})
