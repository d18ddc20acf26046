"""Checkpoint files to modules: strict, built on meta and moved once.

Does: Black Forest Labs' single files and diffusers folders (sharded too) for the transformer and the autoencoder,
TAEF2's decoder in both spellings of its keys; in every storage format that `formats.py` knows. Widths and depths are
read from the tensors' shapes, so a checkpoint of any size loads. Does not know: where files come from, which checkpoint
a file is supposed to be.

A file's header is turned into a plan first: for every parameter of our modules, the tensors that it is made from.
Names, shapes and types are checked on the plan, so that a wrong file is refused before a byte of its data is read:
`open_...` gives a `Checked` file, whose `load` reads it. Every refusal is a `WeightsError` that names the file, what
was expected and what was found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from flux2_studio.engine.autoencoder import Autoencoder
from flux2_studio.engine.formats import PREFIXES, Contents, open_contents
from flux2_studio.engine.params import AutoencoderParams, TransformerParams
from flux2_studio.engine.quantize import QuantizedLinear, StoredMatrix, quantize
from flux2_studio.engine.tensor_files import AGAIN, Shape, listed
from flux2_studio.engine.tiny_autoencoder import TinyDecoder
from flux2_studio.engine.transformer import Transformer
from flux2_studio.errors import DeviceError, WeightsError

# How matrices are held in memory. plain: in the precision that is computed in. stored: as the file has them, restored
# layer by layer. fp8, int8: those that the file has in full are quantised on the way in, the others stay as stored.
Storage = Literal["plain", "stored", "fp8", "int8"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Source:
    """How one parameter is made: `names` concatenated along rows, halves swapped where asked, viewed as `shape`."""

    names: tuple[str, ...]
    shape: Shape
    swap_halves: bool = False

    def make(self, parts: list[Tensor]) -> Tensor:
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.swap_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor.reshape(self.shape)


Plan = dict[str, Source]


@dataclass(frozen=True)
class Checked(Generic[ModuleT]):
    """A file whose header fits: all that is left is to read it. `params` are the sizes that it was found to have.

    float32: prefixes of parameters that keep full precision. plain: of those that are never held quantised. blocks: of
    those that may be quantised on loading.
    """

    params: Any
    build: Callable[[], ModuleT]
    contents: Contents
    plan: Plan
    float32: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    def load(self, *, device: torch.device, dtype: torch.dtype, storage: Storage = "plain") -> ModuleT:
        """Build the module on meta and give it its tensors, each converted and moved once.

        dtype: what is computed in, and what plain parameters are held in. storage: how the weights of linear layers
        are held. Only these can be quantised; everything else is restored at once. Raises `WeightsError`, and
        `DeviceError` where `device` does not know the types that are to be kept.
        """
        self._check_device(device, storage)
        with torch.device("meta"):
            model = self.build()
        keys_of = {
            target: tuple(key for name in source.names for key in self.contents.entries[name].keys)
            for target, source in self.plan.items()
        }
        target_of = {key: target for target, keys in keys_of.items() for key in keys}
        state: dict[str, Tensor] = {}
        waiting: dict[str, Tensor] = {}  # pieces of a parameter whose other pieces are still to come
        for key, tensor in self.contents.files.read(target_of):
            waiting[key] = tensor
            target = target_of[key]
            if all(piece in waiting for piece in keys_of[target]):
                raw = {piece: waiting.pop(piece) for piece in keys_of[target]}
                state |= self._place(model, target, raw, device, dtype, storage)
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)

    def _place(
        self,
        model: nn.Module,
        target: str,
        raw: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        storage: Storage,
    ) -> dict[str, Tensor]:
        """What `target` adds to the state, once its layer has been replaced where it is to stay small."""
        source = self.plan[target]
        parts = [
            self.contents.make(name, [raw[key] for key in self.contents.entries[name].keys]) for name in source.names
        ]
        stored = [part for part in parts if isinstance(part, StoredMatrix)]
        small = storage != "plain" and self._may_be_small(model, source, target)
        if small and len(stored) == len(parts):
            return _replace_linear(model, target, QuantizedLinear(*stored).to(device))
        if target.startswith(self.float32):
            dtype = torch.float32
        # Codes travel rather than values, but only to devices that have their types.
        worker = device if device.type == "cuda" else torch.device("cpu")
        tensor = source.make(
            [part.to(worker).dequantize(dtype) if isinstance(part, StoredMatrix) else part for part in parts]
        )
        if small and (storage == "fp8" or storage == "int8") and target.startswith(self.blocks):
            return _replace_linear(model, target, QuantizedLinear(quantize(tensor.to(worker), storage)).to(device))
        return {target: tensor.to(device, dtype)}

    def _check_device(self, device: torch.device, storage: Storage) -> None:
        entries = (self.contents.entries[name] for source in self.plan.values() for name in source.names)
        if device.type == "mps" and (storage == "fp8" or (storage != "plain" and any(e.has_float8 for e in entries))):
            raise DeviceError(
                f"Apple's GPUs know no fp8, so the weights of {self.contents.name} cannot be kept in it there. Choose "
                f"int8 with the bfloat16 file, a GGUF file, or full precision."
            )

    def _may_be_small(self, model: nn.Module, source: Source, target: str) -> bool:
        name, _, parameter = target.rpartition(".")
        layer = model.get_submodule(name)
        linear = isinstance(layer, nn.Linear) and parameter == "weight" and layer.bias is None
        return linear and not source.swap_halves and not target.startswith(self.plain)


def _replace_linear(model: nn.Module, target: str, layer: QuantizedLinear) -> dict[str, Tensor]:
    """Put `layer` where the linear layer of the weight `target` was; its tensors, by their names in `model`."""
    name = target.removesuffix(".weight")
    model.set_submodule(name, layer)
    return {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}


def open_transformer(path: Path) -> Checked[Transformer]:
    """The transformer in `path`: a single file (safetensors or GGUF) or a diffusers folder. Raises `WeightsError`."""
    contents = open_contents(path, "transformer", PREFIXES)
    plan = transformer_plan(contents.shapes)
    params = transformer_params(contents.name, _shapes(plan))
    return checked(
        lambda: Transformer(params),
        contents,
        plan,
        params=params,
        plain=("img_in.",),  # the layer that tells which precision and device the whole has; a small one
        blocks=("double_blocks.", "single_blocks."),
    )


def open_autoencoder(path: Path) -> Checked[Autoencoder]:
    """The autoencoder in `path`: a single file of either spelling, or a diffusers folder. Raises `WeightsError`."""
    contents = open_contents(path, "vae")
    plan = autoencoder_plan(contents.shapes)
    params = autoencoder_params(contents.name, _shapes(plan))
    # the statistics stay exact, whatever the precision of the convolutions
    return checked(lambda: Autoencoder(params), contents, plan, params=params, float32=("bn.",))


def open_tiny_decoder(path: Path) -> Checked[TinyDecoder]:
    """TAEF2's decoder in `path`, whose encoder, if it is there, is left alone. Raises `WeightsError`."""
    contents = open_contents(path)
    plan: Plan = {}
    for key, shape in contents.shapes.items():
        if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key):
            # the hub's file counts from the first convolution, our Sequential from the clamp before it
            plan[f"{int(match[1]) + 1}.{match[2]}"] = Source((key,), shape)
        elif not key.startswith("encoder."):
            plan[key.removeprefix("decoder.")] = Source((key,), shape)
    return checked(TinyDecoder, contents, plan)


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
    contents: Contents,
    plan: Plan,
    *,
    params: Any = None,
    float32: tuple[str, ...] = (),
    plain: tuple[str, ...] = (),
    blocks: tuple[str, ...] = (),
) -> Checked[ModuleT]:
    """Compare `plan` with the module that `build` makes. For the other arguments see `Checked`.

    Raises `WeightsError` listing missing, unexpected and misshapen tensors, or tensors of a type we do not read.
    """
    # The type first: formats that we do not know have keys of their own, which would read as damage.
    entries = [contents.entries[name] for source in plan.values() for name in source.names]
    if problem := next((entry.problem for entry in entries if entry.problem), ""):
        raise WeightsError(f"{contents.name} has {problem}. Download it again, or choose the bfloat16 file.")
    if foreign := sorted({entry.dtype for entry in entries if not entry.readable}):
        raise WeightsError(
            f"{contents.name} holds {listed(foreign)} tensors; float32, bfloat16, float16, fp8 (float8_e4m3fn), NVFP4 "
            f"and GGUF files can be read. Choose the checkpoint's bfloat16 file."
        )
    with torch.device("meta"):
        model = build()
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    check(contents.name, expected, _shapes(plan))
    return Checked(params, build, contents, plan, float32, plain, blocks)


def check(name: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise one `WeightsError` about everything in which `found` differs from `expected`."""
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"lacks {listed(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"has {listed(unexpected)}, which does not belong there")
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


def transformer_plan(shapes: Mapping[str, Shape]) -> Plan:
    """Black Forest Labs' names as they are; diffusers' names translated, separate q, k, v joined."""
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
            f"be: {AGAIN}"
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


def autoencoder_plan(shapes: Mapping[str, Shape]) -> Plan:
    """Black Forest Labs' names as they are; diffusers' names translated, its attention linears as 1x1 convolutions."""
    levels = _count(shapes, r"decoder\.up_blocks\.(\d+)\.")
    plan: Plan = {}
    for key, shape in shapes.items():
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
            raise WeightsError(f"{name} has levels of {widths} channels in {side}, which cannot be: {AGAIN}")
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


def _shapes(plan: Plan) -> dict[str, Shape]:
    return {key: source.shape for key, source in plan.items()}


def _count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers `pattern` finds at the start of names: a gap shows as a missing tensor, not as a
    model as large as the highest number that a file cares to name."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})
