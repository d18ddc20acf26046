"""Parses the keys of LoRA files: which layer of our transformer a tensor changes, and which field it is.

A key consists of a trainer's prefix, a layer's name and a field:

    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight      Black Forest Labs' names
    transformer.transformer_blocks.0.attn.to_q.lora_B.weight        diffusers' names
    base_model.model.single_blocks.3.linear1.lora_A.default.weight  PEFT
    lora_unet_single_blocks_3_linear1.alpha                         kohya, musubi: dots written as underscores
    lycoris_transformer_blocks_0_ff_linear_in.lokr_w1               LyCORIS

Prefixes and names occur in any combination. No two layers of FLUX.2 differ only in dots and underscores, so names are
compared with dots replaced by underscores. Works on strings only, without tensors or files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flux2_studio.engine.weights.layer_names import (
    DOUBLE_BLOCK_NAMES,
    DOUBLE_BLOCK_PARTS,
    SINGLE_BLOCK_NAMES,
    TOP_LEVEL_NAMES,
)


@dataclass(frozen=True)
class LoraTarget:
    """A layer of our transformer, or some of its rows.

    module: its name in `Transformer`. part, parts: the rows form `parts` equal ranges (such as q, k and v of a joined
    qkv), and the change applies to range `part`. swap_halves: the file stores the two halves of the rows in reverse
    order.
    """

    module: str
    part: int = 0
    parts: int = 1
    swap_halves: bool = False


MAX_KEY_LENGTH = 300  # published keys have less than a third of it; longer ones are not parsed

# Our field by the name that follows the layer's. An adapter's name and `.weight` may follow.
_FIELDS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_down": "down",
    "lora_up": "up",
    "lora.down": "down",
    "lora.up": "up",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "diff": "diff",
} | {
    name: name
    for name in (
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    )
}
# Factors of convolutions, which FLUX.2 does not have: layers with such a field are left out.
CONVOLUTION_FIELDS = {"lora_mid", "lokr_t1", "lokr_t2", "hada_t1", "hada_t2"}
_FIELDS |= {name: name for name in CONVOLUTION_FIELDS}

_KEY = re.compile(
    rf"(?P<layer>.+)\.(?P<field>{'|'.join(re.escape(name) for name in _FIELDS)})"
    rf"(?:\.(?!(?:weight|bias)\b)\w+)?(?:\.weight)?"
)
_PREFIX = re.compile(
    r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.)*"
    r"(?:lora_unet_|lora_transformer_|lycoris_)?"
)
_TEXT_ENCODER_KEY = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?:(?:lora_|lycoris_)?(?:te\d?|text_encoders?(?:_\d)?|text_model|conditioner|language_model)[._]"
    r"|model\.layers\.|model\.language_model\.)"
)
_BLOCK = re.compile(
    r"(?:(?P<single>single_)(?:transformer_)?|double_|transformer_)blocks_(?P<number>\d{1,4})_(?P<layer>\w+)"
)


def _dots_to_underscores(name: str) -> str:
    return name.replace(".", "_")


def _targets(names: Mapping[str, str], parts: Mapping[str, Sequence[str]]) -> dict[str, LoraTarget]:
    """Build targets by all names of each layer, with dots replaced by underscores."""
    target_by_name: dict[str, LoraTarget] = {}
    for ours, theirs in names.items():
        target_by_name[_dots_to_underscores(ours)] = LoraTarget(ours)
        target_by_name[_dots_to_underscores(theirs)] = LoraTarget(ours, swap_halves=theirs == "norm_out.linear")
    for ours, pieces in parts.items():
        for number, piece in enumerate(pieces):
            target_by_name[_dots_to_underscores(piece)] = LoraTarget(ours, part=number, parts=len(pieces))
    return target_by_name


_TOP_TARGETS = _targets(TOP_LEVEL_NAMES, {})
_DOUBLE_TARGETS = _targets(DOUBLE_BLOCK_NAMES, DOUBLE_BLOCK_PARTS)
_SINGLE_TARGETS = _targets(SINGLE_BLOCK_NAMES, {})

# Layers whose input has the transformer's hidden width. The others' output has it.
_READS_HIDDEN = re.compile(r".*(?:attn\.(?:qkv|proj)|mlp\.0|linear1|\.lin|\.out_layer)|final_layer\..*")


def parse_key(key: str) -> tuple[str, str] | None:
    """Split a key into (layer as spelled in the file, field). None if it is not a known kind of LoRA key.

    Fields are down, up, alpha, magnitude (DoRA), diff, LyCORIS' `lokr_...` and `hada_...`, and those of
    `CONVOLUTION_FIELDS`.
    """
    match = _KEY.fullmatch(key) if len(key) <= MAX_KEY_LENGTH else None
    return (match["layer"], _FIELDS[match["field"]]) if match else None


def target_of(layer: str) -> LoraTarget | None:
    """Return the target of a layer as spelled in a file, with its prefix. None if FLUX.2 has no such layer."""
    prefix = _PREFIX.match(layer)
    name = _dots_to_underscores(layer[prefix.end() :] if prefix else layer)
    block = _BLOCK.fullmatch(name)
    if block is None:
        return _TOP_TARGETS.get(name)
    kind, targets = ("single", _SINGLE_TARGETS) if block["single"] else ("double", _DOUBLE_TARGETS)
    target = targets.get(block["layer"])
    return target and replace(target, module=f"{kind}_blocks.{int(block['number'])}.{target.module}")


def is_text_encoder_key(key: str) -> bool:
    """Return whether the key belongs to a text encoder's LoRA, which some trainers put into the same file."""
    return _TEXT_ENCODER_KEY.match(key) is not None


def hidden_width(module: str, shape: tuple[int, int]) -> int:
    """Return the transformer's hidden width implied by a change of `shape` [out, in] to `module`. This holds for a
    part of a module too: only layers that read the hidden width have parts.
    """
    return shape[1] if _READS_HIDDEN.fullmatch(module) else shape[0]
