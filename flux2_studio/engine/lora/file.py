"""LoRA files: which layers they change, how, and with which scale. Safetensors only.

The header is parsed first: every key names a layer and a field of its change (`keys.py`), and the fields of a layer
must form one change of known shape. At that point only the alphas are read; factors are read when needed. Malicious
files are rejected by their shapes alone, with a message: nothing is multiplied out, and text from the file is neither
trusted nor shown at length. Out of scope: whether a file fits a given transformer (`adapters.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flux2_studio.engine.lora.keys import (
    CONVOLUTION_FIELDS,
    LoraTarget,
    hidden_width,
    is_text_encoder_key,
    parse_key,
    target_of,
)
from flux2_studio.engine.weights.formats import PLAIN_TYPES
from flux2_studio.engine.weights.tensor_files import DOWNLOAD_AGAIN_ADVICE, SafetensorsFiles, printable_text, read_json
from flux2_studio.errors import WeightsError

ALPHA_TYPES = {*PLAIN_TYPES, "F64", "I64", "I32"}  # the dtypes that trainers store alphas in
MIN_ALPHA, MAX_ALPHA = 1e-6, 1e6  # other values except 0 mean damage: NaN, or bytes of another dtype
FIELDS_BY_KIND = {
    "LoRA": ("down", "up"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "difference": ("diff",),
}
BIAS_SUFFIXES = (".bias", ".diff_b", ".b_norm")

# Why tensors are left out; messages put the number of tensors in front.
FOR_TEXT_ENCODER = "for a text encoder, which LoRAs do not change here"
FOR_CONVOLUTION = "for convolutions, which FLUX.2 does not have"
FOR_UNKNOWN_LAYER = "for layers that FLUX.2 does not have"
FOR_BIAS = "biases, which FLUX.2's layers do not have"
OF_UNKNOWN_KIND = "not of a kind of LoRA that we know"


@dataclass(frozen=True, eq=False)
class LoraChange:
    """The change of one layer, or of some of its rows.

    keys: the file's key per field. shape: [out, in] of the change. kind: a key of `FIELDS_BY_KIND`. rank: None if the
    change is not a product. scale: alpha / rank.
    """

    target: LoraTarget
    kind: str
    keys: Mapping[str, str]
    shape: tuple[int, int]
    rank: int | None
    scale: float


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file with a valid header. Compared by identity: keep the object, so that `set_loras` recognises it.

    ignored_keys: keys that do not belong to FLUX.2's transformer, with the reason. width: hidden width of the
    transformer that it was made for, deduced from its shapes.
    """

    name: str
    files: SafetensorsFiles
    changes: tuple[LoraChange, ...]
    ignored_keys: Mapping[str, str]
    width: int

    @property
    def kind(self) -> str:
        """For example "LoRA of rank 16", "LoKr" or "LoRA of rank 8 to 32 with DoRA"."""
        kinds = " and ".join(sorted({change.kind for change in self.changes}))
        ranks = sorted({change.rank for change in self.changes if change.rank and change.kind != "LoKr"})
        if ranks:
            kinds += f" of rank {ranks[0]}" if len(ranks) == 1 else f" of rank {ranks[0]} to {ranks[-1]}"
        return kinds + (" with DoRA" if any("magnitude" in change.keys for change in self.changes) else "")

    def read(self, changes: Iterable[LoraChange]) -> dict[LoraChange, dict[str, Tensor]]:
        """Read the tensors of some changes, by field, on the CPU as stored, without alphas.

        Raises `WeightsError` if the file cannot be read any more or holds infinities or NaN.
        """
        tensors: dict[LoraChange, dict[str, Tensor]] = {change: {} for change in changes}
        owners = {key: (change, field) for change in tensors for field, key in change.keys.items() if field != "alpha"}
        for key, tensor in self.files.read(owners):
            if not tensor.isfinite().all():
                raise WeightsError(
                    f"{self.name} holds infinities or NaN in {printable_text(key)}: {DOWNLOAD_AGAIN_ADVICE}"
                )
            change, field = owners[key]
            tensors[change][field] = tensor
        return tensors


def open_lora(path: Path) -> Lora:
    """Open the LoRA in a safetensors file. Checks its header and reads only its alphas.

    Raises `WeightsError` if it is not a LoRA for layers of FLUX.2's transformer.
    """
    if path.is_dir():
        raise WeightsError(f"{path.name} is a folder: name the LoRA's .safetensors file in it.")
    files = SafetensorsFiles(path)
    fields: dict[str, dict[str, str]] = {}  # by layer, with the file's spelling
    left_out: dict[str, str] = {}
    for key in files.shapes:
        parsed = parse_key(key)
        if is_text_encoder_key(key):
            left_out[key] = FOR_TEXT_ENCODER
        elif parsed is None:
            left_out[key] = FOR_BIAS if key.endswith(BIAS_SUFFIXES) else OF_UNKNOWN_KIND
        else:
            layer, field = parsed
            if field in fields.setdefault(layer, {}):
                raise WeightsError(
                    f"{files.name} holds {printable_text(key)} twice, under different names: {DOWNLOAD_AGAIN_ADVICE}"
                )
            fields[layer][field] = key
    alphas = _AlphaReader(
        files,
        _peft_config(path, files.metadata),
        [layer_keys["alpha"] for layer_keys in fields.values() if "alpha" in layer_keys],
    )
    changes: dict[LoraTarget, LoraChange] = {}
    for layer, keys in fields.items():
        target = target_of(layer)
        if target is None or keys.keys() & CONVOLUTION_FIELDS:
            left_out |= dict.fromkeys(keys.values(), FOR_CONVOLUTION if target else FOR_UNKNOWN_LAYER)
            continue
        if target in changes:
            raise WeightsError(
                f"{files.name} changes {target.module} twice, under different names: {DOWNLOAD_AGAIN_ADVICE}"
            )
        changes[target] = _layer_change(files, layer, target, keys, alphas)
    if not changes:
        raise WeightsError(
            f"{files.name} is no LoRA for FLUX.2's transformer: its {len(left_out)} tensors are "
            f"{Counter(left_out.values()).most_common(1)[0][0] if left_out else 'missing'} "
            f"(for example {printable_text(min(left_out, default='none'))}). Choose a LoRA made for FLUX.2."
        )
    widths = Counter(hidden_width(change.target.module, change.shape) for change in changes.values())
    return Lora(files.name, files, tuple(changes.values()), left_out, widths.most_common(1)[0][0])


class _AlphaReader:
    """The file's alphas: one per layer, or one configuration for all of them (PEFT)."""

    def __init__(self, files: SafetensorsFiles, config: Mapping[str, Any], keys: Sequence[str]) -> None:
        self.name = files.name
        self.config = config
        for key in keys:
            if math.prod(files.shapes[key]) != 1 or files.dtypes[key] not in ALPHA_TYPES:
                raise WeightsError(
                    f"{files.name} has {printable_text(key)}, which is not one number: {DOWNLOAD_AGAIN_ADVICE}"
                )
        self.alphas: dict[str, float] = {key: tensor.double().item() for key, tensor in files.read(keys)}
        for key, alpha in self.alphas.items():
            if alpha and not MIN_ALPHA <= abs(alpha) <= MAX_ALPHA:
                raise WeightsError(
                    f"{files.name} has an alpha that is no number, {printable_text(key)}: {DOWNLOAD_AGAIN_ADVICE}"
                )

    def scale(self, layer: str, key: str | None, rank: int) -> float:
        """Return alpha / rank of `layer`, or 1 without any alpha. key: of the layer's own alpha, if it has one.

        Rank-stabilised LoRA uses alpha / sqrt(rank), https://arxiv.org/abs/2312.03732.
        """
        if key is not None:
            return self.alphas[key] / rank
        alpha = self.config.get("lora_alpha", rank)
        patterns = self.config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", suffix) for suffix in patterns):
            raise WeightsError(
                f"{self.name} states its alphas in a way that is not read (alpha_pattern): {DOWNLOAD_AGAIN_ADVICE}"
            )
        for suffix, value in patterns.items():
            if f".{layer}".endswith(f".{suffix}"):
                alpha = value
        if not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
            raise WeightsError(
                f"{self.name} states an alpha in its configuration that is no number: {DOWNLOAD_AGAIN_ADVICE}"
            )
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") is True else rank)


def _peft_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read PEFT's configuration of a LoRA. diffusers writes it into the file's header, with the component's name
    before each entry; PEFT itself into adapter_config.json beside adapter_model.safetensors.
    """
    config_file = path.with_name("adapter_config.json")
    try:
        if path.name == "adapter_model.safetensors" and config_file.is_file():
            config = read_json(config_file)
        else:
            config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"The configuration that belongs to {path.name} cannot be read: {DOWNLOAD_AGAIN_ADVICE}"
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(
            f"The configuration that belongs to {path.name} is no configuration: {DOWNLOAD_AGAIN_ADVICE}"
        )
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    if config.get("peft_type", "LORA") != "LORA":
        raise WeightsError(
            f"{path.name} was made by PEFT as {printable_text(str(config['peft_type']))}, whose configuration is not "
            "read. Save "
            f"it in LyCORIS' or ComfyUI's form, or choose another LoRA."
        )
    return config


def _layer_change(
    files: SafetensorsFiles, layer: str, target: LoraTarget, keys: Mapping[str, str], alphas: _AlphaReader
) -> LoraChange:
    """Combine a layer's tensors into its change. Raises `WeightsError` if they do not form one."""

    def refuse(problem: str) -> WeightsError:
        return WeightsError(f"{files.name}: {problem} in {printable_text(layer)}: {DOWNLOAD_AGAIN_ADVICE}")

    kinds = [kind for kind, names in FIELDS_BY_KIND.items() if keys.keys() & set(names)]
    if len(kinds) != 1:
        raise refuse(f"{' and '.join(kinds)} are mixed" if kinds else "nothing stands beside the alpha or dora_scale")
    for key in (key for field, key in keys.items() if field != "alpha"):
        if files.dtypes[key] not in PLAIN_TYPES:
            raise refuse(f"{files.dtypes[key]} tensors, where float32, bfloat16 and float16 can be read,")
    shapes = {field: files.shapes[key] for field, key in keys.items() if field in FIELDS_BY_KIND[kinds[0]]}
    if any(len(shape) != 2 for shape in shapes.values()):
        raise refuse("a tensor that is no matrix")

    def product(left: str, right: str) -> tuple[int, int, int]:
        """Return (out, in, rank) of a product of two matrices."""
        for name, partner in ((left, right), (right, left)):
            if name not in shapes:
                raise refuse(
                    f"the partner of {printable_text(keys[partner])} is missing"
                    if partner in keys
                    else "a factor is missing"
                )
        (rows, rank), (right_rank, columns) = shapes[left], shapes[right]
        if rank != right_rank:
            raise refuse(f"factors of rank {rank} and {right_rank}")
        return rows, columns, rank

    def factor(name: str) -> tuple[int, int, int | None]:
        """Return (out, in, rank) of one of LoKr's factors, stored as one matrix or as a product."""
        if name not in shapes:
            return product(f"{name}_a", f"{name}_b")
        if {f"{name}_a", f"{name}_b"} & shapes.keys():
            raise refuse(f"{name} both whole and as a product")
        rows, columns = shapes[name]
        return rows, columns, None

    rank: int | None
    match kinds[0]:
        case "LoRA":
            rows, columns, rank = product("up", "down")
        case "LoHa":
            rows, columns, rank = product("hada_w1_a", "hada_w1_b")
            if product("hada_w2_a", "hada_w2_b")[:2] != (rows, columns):
                raise refuse("two matrices of different shapes")
        case "LoKr":
            (rows1, columns1, rank1), (rows2, columns2, rank2) = factor("lokr_w1"), factor("lokr_w2")
            rows, columns = rows1 * rows2, columns1 * columns2
            rank = rank2 or rank1  # LyCORIS scales by the factorisation's rank, and not at all without one
        case _:
            rows, columns = shapes["diff"]
            rank = None
    if "magnitude" in keys:
        magnitude = files.shapes[keys["magnitude"]]
        if magnitude not in ((rows,), (rows, 1), (1, columns)):
            raise refuse(f"a dora_scale of shape {list(magnitude)} for a change of {rows} x {columns}")
    scale = 1.0 if rank is None else alphas.scale(layer, keys.get("alpha"), rank)
    return LoraChange(target, kinds[0], dict(keys), (rows, columns), rank, scale)
