"""Checkpoint files to modules: safetensors only, strict, built on meta and moved once.

Does: Black Forest Labs' single files and diffusers folders (sharded too) for the transformer and the autoencoder,
TAEF2's decoder in both spellings of its keys. Widths and depths are read from the tensors' shapes, so a checkpoint of
any size loads. Does not know: where files come from, which checkpoint a file is supposed to be.

A file's header is turned into a plan first: for every parameter of our modules, the tensors that it is made from.
Names, shapes and types are checked on the plan, so that a wrong file is refused before a byte of its data is read:
`open_...` gives a `Checked` file, whose `load` reads it. Every refusal is a `WeightsError` that names the file, what
was expected and what was found.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux2_studio.engine.autoencoder import Autoencoder
from flux2_studio.engine.params import AutoencoderParams, TransformerParams
from flux2_studio.engine.tiny_autoencoder import TinyDecoder
from flux2_studio.engine.transformer import Transformer
from flux2_studio.errors import WeightsError

READABLE = {"F32", "F16", "BF16"}
Shape = tuple[int, ...]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class TensorFiles:
    """The tensors of one safetensors file, or of a folder's file or shards, read one at a time.

    path: a file, or a folder with one .safetensors file or an index (*.safetensors.index.json). Where the folder has a
    `subfolder` with such files (a whole repository in diffusers' layout), that is meant. Raises `WeightsError` for
    anything that cannot be read; the safetensors library checks headers, offsets and lengths.
    """

    def __init__(self, path: Path, subfolder: str = "") -> None:
        self.path = path
        self.name = path.name
        self._of: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        for file in self._files(subfolder):
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 - not a dict
                        tensor = opened.get_slice(key)
                        self._of[key] = file
                        self.shapes[key] = tuple(tensor.get_shape())
                        self.dtypes[key] = tensor.get_dtype()
                        if 0 in self.shapes[key]:
                            raise WeightsError(f"{file.name} has an empty tensor, {key}: {_AGAIN}")
            except (SafetensorError, OSError) as error:
                raise WeightsError(
                    f"{file.name} is not a whole safetensors file ({error}). Download it again; files in other "
                    f"formats (.ckpt, .pt, .bin) are not read."
                ) from error

    def _files(self, subfolder: str) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise WeightsError(f"There is no file or folder {self.path}: check the path, or download it again.")
        for folder in (self.path / subfolder, self.path):
            indexes = sorted(folder.glob("*.safetensors.index.json"))
            if indexes:
                return self._shards(indexes[0])
            files = sorted(folder.glob("*.safetensors"))
            if len(files) == 1:
                return files
            if files:
                names = ", ".join(file.name for file in files)
                raise WeightsError(f"The folder {self.name} holds several weight files ({names}): name one of them.")
        raise WeightsError(f"The folder {self.name} holds no .safetensors file: point to one that does.")

    def _shards(self, index: Path) -> list[Path]:
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            # A shard is a plain name beside its index; anything else in a foreign index must not lead us elsewhere.
            files = [index.parent / Path(str(name)).name for name in sorted(names)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index.name} in {self.name} is not a valid index. Download it again.") from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise WeightsError(
                f"The folder {self.name} lacks {_list(missing)}, which its index names. Download the folder again."
            )
        return files

    def read(self, keys: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
        """(key, tensor) on the CPU for each of `keys`, shard by shard; tensors may be views of the mapped file."""
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._of[key], []).append(key)
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in wanted:
                        yield key, opened.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file.name} could not be read to its end ({error}). Download it again.") from error


@dataclass(frozen=True)
class Source:
    """How one parameter is made: `keys` concatenated along rows, halves swapped where asked, viewed as `shape`."""

    keys: tuple[str, ...]
    shape: Shape
    swap_halves: bool = False

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = [tensors[key] for key in self.keys]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.swap_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor.reshape(self.shape)


Plan = dict[str, Source]


@dataclass(frozen=True)
class Checked(Generic[ModuleT]):
    """A file whose header fits: all that is left is to read it. `params` are the sizes that it was found to have."""

    params: Any
    build: Callable[[], ModuleT]
    files: TensorFiles
    plan: Plan
    float32: tuple[str, ...]  # prefixes of parameters that keep full precision

    def load(self, *, device: torch.device, dtype: torch.dtype) -> ModuleT:
        """Build the module on meta and give it its tensors, each converted and moved once. Raises `WeightsError`."""
        with torch.device("meta"):
            model = self.build()
        target_of = {key: name for name, source in self.plan.items() for key in source.keys}
        state: dict[str, Tensor] = {}
        waiting: dict[str, Tensor] = {}  # pieces of a parameter whose other pieces are still to come
        for key, tensor in self.files.read(target_of):
            waiting[key] = tensor
            target = target_of[key]
            source = self.plan[target]
            if all(piece in waiting for piece in source.keys):
                made = source.make({piece: waiting.pop(piece) for piece in source.keys})
                state[target] = made.to(device, torch.float32 if target.startswith(self.float32) else dtype)
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)


def open_transformer(path: Path) -> Checked[Transformer]:
    """The transformer in `path`: a single file or a diffusers folder. Raises `WeightsError`."""
    files = TensorFiles(path, "transformer")
    plan = transformer_plan(files)
    params = transformer_params(files.name, _shapes(plan))
    return checked(lambda: Transformer(params), files, plan, params=params)


def open_autoencoder(path: Path) -> Checked[Autoencoder]:
    """The autoencoder in `path`: a single file of either spelling, or a diffusers folder. Raises `WeightsError`."""
    files = TensorFiles(path, "vae")
    plan = autoencoder_plan(files)
    params = autoencoder_params(files.name, _shapes(plan))
    # the statistics stay exact, whatever the precision of the convolutions
    return checked(lambda: Autoencoder(params), files, plan, params=params, float32=("bn.",))


def open_tiny_decoder(path: Path) -> Checked[TinyDecoder]:
    """TAEF2's decoder in `path`, whose encoder, if it is there, is left alone. Raises `WeightsError`."""
    files = TensorFiles(path)
    plan: Plan = {}
    for key, shape in files.shapes.items():
        if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key):
            # the hub's file counts from the first convolution, our Sequential from the clamp before it
            plan[f"{int(match[1]) + 1}.{match[2]}"] = Source((key,), shape)
        elif not key.startswith("encoder."):
            plan[key.removeprefix("decoder.")] = Source((key,), shape)
    return checked(TinyDecoder, files, plan)


def load_transformer(path: Path, *, device: torch.device, dtype: torch.dtype) -> Transformer:
    """`open_transformer` and `load` in one."""
    return open_transformer(path).load(device=device, dtype=dtype)


def load_autoencoder(path: Path, *, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """`open_autoencoder` and `load` in one."""
    return open_autoencoder(path).load(device=device, dtype=dtype)


def load_tiny_decoder(path: Path, *, device: torch.device, dtype: torch.dtype) -> TinyDecoder:
    """`open_tiny_decoder` and `load` in one."""
    return open_tiny_decoder(path).load(device=device, dtype=dtype)


def checked(
    build: Callable[[], ModuleT],
    files: TensorFiles,
    plan: Plan,
    *,
    params: Any = None,
    float32: tuple[str, ...] = (),
) -> Checked[ModuleT]:
    """Compare `plan` with the module that `build` makes.

    Raises `WeightsError` listing missing, unexpected and misshapen tensors, or tensors of a type we do not read.
    """
    # The type first: quantised files also have keys of their own, which would read as damage.
    foreign = sorted({files.dtypes[key] for source in plan.values() for key in source.keys} - READABLE)
    if foreign:
        raise WeightsError(
            f"{files.name} holds {_list(foreign)} tensors; float32, bfloat16 and float16 files can be read. "
            f"Choose the checkpoint's bfloat16 file."
        )
    with torch.device("meta"):
        model = build()
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    check(files.name, expected, _shapes(plan))
    return Checked(params, build, files, plan, float32)


def check(name: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise one `WeightsError` about everything in which `found` differs from `expected`."""
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"lacks {_list(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"has {_list(unexpected)}, which does not belong there")
    for key in sorted(expected.keys() & found.keys()):
        if expected[key] != found[key]:
            problems.append(f"has {key} of shape {list(found[key])} where {list(expected[key])} was expected")
            break
    if problems:
        raise WeightsError(
            f"{name} {'; it '.join(problems)}. It is damaged or belongs to another model: download it again or "
            f"choose another file."
        )


# --- the transformer ---

_TOP = {
    "x_embedder.weight": "img_in.weight",
    "context_embedder.weight": "txt_in.weight",
    "time_guidance_embed.timestep_embedder.linear_1.weight": "time_in.in_layer.weight",
    "time_guidance_embed.timestep_embedder.linear_2.weight": "time_in.out_layer.weight",
    "time_guidance_embed.guidance_embedder.linear_1.weight": "guidance_in.in_layer.weight",
    "time_guidance_embed.guidance_embedder.linear_2.weight": "guidance_in.out_layer.weight",
    "double_stream_modulation_img.linear.weight": "double_stream_modulation_img.lin.weight",
    "double_stream_modulation_txt.linear.weight": "double_stream_modulation_txt.lin.weight",
    "single_stream_modulation.linear.weight": "single_stream_modulation.lin.weight",
    "proj_out.weight": "final_layer.linear.weight",
    "norm_out.linear.weight": "final_layer.adaLN_modulation.1.weight",
}
_DOUBLE = {
    "attn.to_out.0.weight": "img_attn.proj.weight",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.to_add_out.weight": "txt_attn.proj.weight",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.linear_in.weight": "img_mlp.0.weight",
    "ff.linear_out.weight": "img_mlp.2.weight",
    "ff_context.linear_in.weight": "txt_mlp.0.weight",
    "ff_context.linear_out.weight": "txt_mlp.2.weight",
}
_DOUBLE_QKV = {
    "img_attn.qkv.weight": ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight"),
    "txt_attn.qkv.weight": ("attn.add_q_proj.weight", "attn.add_k_proj.weight", "attn.add_v_proj.weight"),
}
_SINGLE = {
    "attn.to_qkv_mlp_proj.weight": "linear1.weight",
    "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}


def transformer_plan(files: TensorFiles) -> Plan:
    """Black Forest Labs' names as they are; diffusers' names translated, separate q, k, v joined."""
    shapes = files.shapes
    plan: Plan = {}
    for key, shape in shapes.items():
        block = re.fullmatch(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)", key)
        if block is None:
            target = _TOP.get(key, key)
            # diffusers stores the last modulation as (scale, shift)
            plan[target] = Source((key,), shape, swap_halves=key == "norm_out.linear.weight")
            continue
        single = block[1].startswith("single")
        prefix = f"{'single' if single else 'double'}_blocks.{block[2]}."
        names = _SINGLE if single else _DOUBLE
        if block[3] in names:
            plan[prefix + names[block[3]]] = Source((key,), shape)
            continue
        for target, pieces in _DOUBLE_QKV.items():
            if not single and block[3] in pieces:
                sources = tuple(key.removesuffix(block[3]) + piece for piece in pieces)
                if all(shapes.get(source, ())[1:] == shape[1:] and source in shapes for source in sources):
                    rows = sum(shapes[source][0] for source in sources)
                    plan[prefix + target] = Source(sources, (rows, *shape[1:]))
                break
        else:
            plan[key] = Source((key,), shape)  # reported as unexpected
    return plan


def transformer_params(name: str, shapes: Mapping[str, Shape]) -> TransformerParams:
    """Sizes from the planned shapes. Raises `WeightsError` if this is no FLUX.2 transformer."""
    for key in ("img_in.weight", "txt_in.weight", "time_in.in_layer.weight", "single_blocks.0.linear2.weight"):
        if len(shapes.get(key, ())) != 2:
            raise WeightsError(
                f"{name} is not a FLUX.2 transformer: it has no {key}. Point to the transformer's own file "
                f"(flux-2-...safetensors) or diffusers folder."
            )
    hidden, in_channels = shapes["img_in.weight"]
    head_width = math.prod(shapes.get("single_blocks.0.norm.query_norm.scale", (0,)))
    mlp = shapes["single_blocks.0.linear2.weight"][1] - hidden
    # four rotary axes, each of adjacent pairs
    if not head_width or hidden % head_width or head_width % 8 or mlp < 1:
        raise WeightsError(
            f"{name} has heads of width {head_width} and an MLP of width {mlp} at hidden width {hidden}, which cannot "
            f"be: {_AGAIN}"
        )
    return TransformerParams(
        in_channels=in_channels,
        context_width=shapes["txt_in.weight"][1],
        hidden=hidden,
        head_width=head_width,
        mlp=mlp,
        double_blocks=_count(shapes, r"double_blocks\.(\d+)\."),
        single_blocks=_count(shapes, r"single_blocks\.(\d+)\."),
        guidance_embedding="guidance_in.in_layer.weight" in shapes,
        time_channels=shapes["time_in.in_layer.weight"][1],
    )


# --- the autoencoder ---

_MIDDLE = {"resnets.0": "block_1", "resnets.1": "block_2", "attentions.0": "attn_1"}
_LEVEL = r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def autoencoder_plan(files: TensorFiles) -> Plan:
    """Black Forest Labs' names as they are; diffusers' names translated, its attention linears as 1x1 convolutions."""
    levels = _count(files.shapes, r"decoder\.up_blocks\.(\d+)\.")
    plan: Plan = {}
    for key, shape in files.shapes.items():
        if key == "bn.num_batches_tracked":  # a counter of training
            continue
        target = _autoencoder_name(key, levels)
        if ".attn_1." in target and target.endswith(".weight") and len(shape) == 2:
            shape = (*shape, 1, 1)
        plan[target] = Source((key,), shape)
    return plan


def _autoencoder_name(key: str, levels: int) -> str:
    """Our name of a diffusers key; any other key as it is."""
    if key.startswith("quant_conv."):
        return f"encoder.{key}"
    if key.startswith("post_quant_conv."):
        return f"decoder.{key}"
    key = key.replace(".conv_norm_out.", ".norm_out.").replace(".conv_shortcut.", ".nin_shortcut.")
    if match := re.fullmatch(_LEVEL, key):
        coder, level, what, index, rest = match.groups()
        side, number = ("down", int(level)) if coder == "encoder" else ("up", levels - 1 - int(level))
        inner = {"resnets": f"block.{index}", "downsamplers": "downsample", "upsamplers": "upsample"}[what]
        return f"{coder}.{side}.{number}.{inner}.{rest}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.(\w+\.\d+)\.(.+)", key):
        coder, which, rest = match.groups()
        if which == "attentions.0":
            for old, new in _ATTENTION.items():
                rest = re.sub(rf"^{re.escape(old)}\.", f"{new}.", rest)
        return f"{coder}.mid.{_MIDDLE.get(which, which)}.{rest}"
    return key


def autoencoder_params(name: str, shapes: Mapping[str, Shape]) -> AutoencoderParams:
    """Sizes from the planned shapes. Raises `WeightsError` if this is no FLUX.2 autoencoder."""
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight", "bn.running_mean")
    for key in needed:
        if len(shapes.get(key, ())) != (1 if key.startswith("bn.") else 4):
            raise WeightsError(
                f"{name} is not a FLUX.2 autoencoder: it has no {key}. Point to ae.safetensors or to the diffusers "
                f"folder vae/."
            )
    levels = max(_count(shapes, r"encoder\.down\.(\d+)\."), _count(shapes, r"decoder\.up\.(\d+)\."))

    def blocks(side: str) -> int:
        return _count(shapes, rf"{side}\.0\.block\.(\d+)\.")

    def channels(side: str, changer: str, ends: Mapping[int, str]) -> tuple[int, ...]:
        # A level's width stands in its last block, else in its change of resolution, else in the layer beside it.
        widths = []
        for level in range(levels):
            at = f"{side}.{level}"
            candidates = (f"{at}.block.0.conv2.weight", f"{at}.{changer}.conv.weight", ends.get(level, ""))
            found = next((shapes[key] for key in candidates if key in shapes), (0,))
            widths.append(found[0] if found else 0)
        if not all(width and width % 32 == 0 for width in widths):
            raise WeightsError(f"{name} has levels of {widths} channels in {side}, which cannot be: {_AGAIN}")
        return tuple(widths)

    last = levels - 1
    return AutoencoderParams(
        encoder_channels=channels("encoder.down", "downsample", {last: "encoder.mid.block_1.conv1.weight"}),
        decoder_channels=channels("decoder.up", "upsample", {last: "decoder.conv_in.weight"}),
        encoder_blocks=blocks("encoder.down"),
        decoder_blocks=blocks("decoder.up"),
        latent_channels=shapes["decoder.conv_in.weight"][1],
    )


# --- small things ---

_AGAIN = "the file is damaged or belongs to another model; download it again or choose another file."


def _shapes(plan: Plan) -> dict[str, Shape]:
    return {key: source.shape for key, source in plan.items()}


def _count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers `pattern` finds at the start of names: a gap shows as a missing tensor, not as a
    model as large as the highest number that a file cares to name."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _list(names: Sequence[str], shown: int = 3) -> str:
    """'a, b, c and 12 more'."""
    text = ", ".join(names[:shown])
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"
