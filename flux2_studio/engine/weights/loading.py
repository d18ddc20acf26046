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

import functools
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.vae.tiny_autoencoder import TinyDecoder
from flux2_studio.engine.weights.formats import PREFIXES, Contents, open_contents
from flux2_studio.engine.weights.layouts import (
    Plan,
    Source,
    autoencoder_params,
    autoencoder_plan,
    put,
    shapes_of,
    transformer_params,
    transformer_plan,
)
from flux2_studio.engine.weights.quantize import (
    EightBit,
    HalfMatrix,
    QuantizedLinear,
    StoredEmbedding,
    StoredMatrix,
    quantize,
)
from flux2_studio.engine.weights.reading import Reader
from flux2_studio.engine.weights.tensor_files import Shape, listed, shown
from flux2_studio.errors import DeviceError, WeightsError

# How matrices are held in memory. plain: in the precision that is computed in. stored: as the file has them, restored
# layer by layer. bfloat16, fp8, int8: those that the file has in full are brought to it on the way in, the others stay
# as stored. All linear layers and embeddings are held in bfloat16; in fp8 and int8, which are less exact, the blocks'
# linear layers alone.
Storage = Literal["plain", "stored", "bfloat16", "fp8", "int8"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)
# Where a repository in diffusers' layout has the files.
TRANSFORMER_FOLDER, AUTOENCODER_FOLDER = "transformer", "vae"
TOLD_EVERY = 0.05  # seconds, at least, between two words on how far a load is


@dataclass(frozen=True)
class Checked(Generic[ModuleT]):
    """A file whose header fits: all that is left is to read it. `params` are the sizes that it was found to have.

    blank: what `build` makes, on the meta device, to look at: a deep model takes half a second to build. float32:
    prefixes of parameters that keep full precision. plain: of those that are never held quantised. blocks: of those
    that may be quantised on loading.
    """

    params: Any
    build: Callable[[], ModuleT]
    blank: ModuleT
    contents: Contents
    plan: Plan
    float32: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    def load(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        storage: Storage = "plain",
        reader: Reader | None = None,
        mapped: bool = False,
        told: Callable[[float], None] | None = None,
    ) -> ModuleT:
        """Build the module on meta and give it its tensors, each converted and moved once.

        dtype: what is computed in, and what plain parameters are held in. storage: how the weights of linear layers
        are held. Only these can be quantised; everything else is restored at once. reader: what reads the files; None
        is one for `device`. mapped: whether the files may be mapped where that is no GPU that CUDA runs on, so that
        what needs no conversion is not even copied; see `TensorFiles.mapped` for which may. told: called now and then
        with the share of the bytes that has been read, and with 1 in the end; what it raises ends the load and is
        passed on. Raises `WeightsError`, and `DeviceError` where `device` does not know the types that are to be kept.
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
        files = self.contents.files
        spans = files.spans(target_of)
        arrived = _Progress(told, sum(span.size for span in spans.values()))
        on_gpu = device.type == "cuda"
        if views := mapped and reader is None and not on_gpu:
            reading = files.mapped(target_of)
        else:
            reading = (reader or Reader(device if on_gpu else torch.device("cpu"))).read(spans, arrived)
        with closing(reading) as arriving:
            for key, tensor in arriving:
                waiting[key] = tensor
                target = target_of[key]
                if all(piece in waiting for piece in keys_of[target]):
                    raw = {piece: waiting.pop(piece) for piece in keys_of[target]}
                    state |= self._place(model, target, raw, device, dtype, storage)
                if views:
                    arrived(spans[key].size)
        model.load_state_dict(state, assign=True)
        arrived.all()
        if isinstance(model, Transformer):
            for module in model.modules():
                if isinstance(module, QuantizedLinear):
                    module.coarse = True
        return model.eval().requires_grad_(False)

    def sizes(self, *, dtype: torch.dtype, storage: Storage = "plain") -> dict[str, int]:
        """Bytes of memory that each parameter of the plan, and each buffer that no file holds, has after `load` with
        these arguments. Told by the header alone."""
        model = self.blank
        found = {name: _bytes([tensor]) for name, tensor in model.named_buffers() if name not in self.plan}
        for target, source in self.plan.items():
            # On meta, so that what a matrix keeps of its codes and scales is said by its class alone.
            held = self._held_as(model, target, storage)
            if held == "stored":
                entries = [self.contents.entries[name] for name in source.names]
                matrices = _matrices(
                    entry.make([self.contents.files.like(key) for key in entry.keys]) for entry in entries
                )
                found[target] = sum(_bytes(matrix.buffers()) for matrix in matrices)
            elif held == "plain":
                found[target] = math.prod(source.shape) * self._plain_dtype(target, dtype).itemsize
            elif held == "bfloat16":
                found[target] = math.prod(source.shape) * torch.bfloat16.itemsize
            else:
                found[target] = _quantized_bytes(source.shape, held)
        return found

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
        held = self._held_as(model, target, storage)
        parts = [
            self.contents.make(name, [raw[key] for key in self.contents.entries[name].keys]) for name in source.names
        ]
        if held == "stored":
            return _replace(model, target, QuantizedLinear(*_matrices(parts)).to(device))
        computed, dtype = dtype, torch.bfloat16 if held == "bfloat16" else self._plain_dtype(target, dtype)
        # Codes travel rather than values, but only to devices that have their types.
        worker = device if device.type == "cuda" else torch.device("cpu")
        tensor = source.make(
            [part.to(worker).dequantize(dtype) if isinstance(part, StoredMatrix) else part for part in parts]
        )
        if held == "plain":
            return {target: tensor.to(device, dtype)}
        if held == "bfloat16":
            matrix = HalfMatrix(tensor.to(device, dtype))
            embeds = isinstance(model.get_submodule(target.removesuffix(".weight")), nn.Embedding)
            return _replace(model, target, StoredEmbedding(matrix, computed) if embeds else QuantizedLinear(matrix))
        return _replace(model, target, QuantizedLinear(quantize(tensor.to(worker), held)).to(device))

    def _check_device(self, device: torch.device, storage: Storage) -> None:
        entries = (self.contents.entries[name] for source in self.plan.values() for name in source.names)
        if device.type == "mps" and (storage == "fp8" or (storage != "plain" and any(e.has_float8 for e in entries))):
            raise DeviceError(
                f"Apple's GPUs know no fp8, so the weights of {self.contents.name} cannot be kept in it there. Choose "
                f"int8 with the bfloat16 file, a GGUF file, or full precision."
            )

    def _held_as(self, model: nn.Module, target: str, storage: Storage) -> Storage:
        """How `target` is held where `storage` is asked for. Only linear layers' weights are ever held small."""
        source = self.plan[target]
        name, _, parameter = target.rpartition(".")
        layer = model.get_submodule(name)
        linear = isinstance(layer, nn.Linear) and parameter == "weight" and layer.bias is None
        if storage == "bfloat16" and isinstance(layer, nn.Embedding):
            return storage
        if storage == "plain" or not linear or source.swap_halves or target.startswith(self.plain):
            return "plain"
        if all(self.contents.entries[name].unpack for name in source.names):
            return "stored"
        if storage == "bfloat16":
            return storage
        return storage if storage != "stored" and target.startswith(self.blocks) else "plain"

    def _plain_dtype(self, target: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if target.startswith(self.float32) else dtype


class _Progress:
    """Tells how much of `whole` bytes has come, not too often."""

    def __init__(self, told: Callable[[float], None] | None, whole: int) -> None:
        self._told = told
        self._whole = whole
        self._come = 0
        self._last = -math.inf

    def __call__(self, size: int) -> None:
        self._come += size
        if self._told is not None and self._come < self._whole and time.monotonic() - self._last >= TOLD_EVERY:
            self._last = time.monotonic()
            self._told(self._come / self._whole)

    def all(self) -> None:
        if self._told is not None:
            self._told(1.0)


def _matrices(parts: Iterable[Tensor | StoredMatrix]) -> list[StoredMatrix]:
    return [part for part in parts if isinstance(part, StoredMatrix)]


@functools.cache
def _quantized_bytes(shape: Shape, to: EightBit) -> int:
    return _bytes(quantize(torch.empty(shape, device="meta"), to).buffers())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _replace(model: nn.Module, target: str, layer: nn.Module) -> dict[str, Tensor]:
    """Put `layer` where the layer of the weight `target` was; its tensors, by their names in `model`."""
    name = target.removesuffix(".weight")
    model.set_submodule(name, layer)
    return {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}


def open_transformer(path: Path) -> Checked[Transformer]:
    """The transformer in `path`: a single file (safetensors or GGUF) or a diffusers folder. Raises `WeightsError`."""
    contents = open_contents(path, TRANSFORMER_FOLDER, PREFIXES)
    plan = transformer_plan(contents.shapes)
    params = transformer_params(contents.name, shapes_of(plan))
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
    contents = open_contents(path, AUTOENCODER_FOLDER)
    plan = autoencoder_plan(contents.shapes)
    params = autoencoder_params(contents.name, shapes_of(plan))
    # the statistics stay exact, whatever the precision of the convolutions
    return checked(lambda: Autoencoder(params), contents, plan, params=params, float32=("bn.",))


def open_tiny_decoder(path: Path) -> Checked[TinyDecoder]:
    """TAEF2's decoder in `path`, whose encoder, if it is there, is left alone. Raises `WeightsError`."""
    contents = open_contents(path)
    plan: Plan = {}
    for key, shape in contents.shapes.items():
        if match := re.fullmatch(r"decoder\.layers\.(\d{1,4})\.(.+)", key):
            # the hub's file counts from the first convolution, our Sequential from the clamp before it
            put(plan, f"{int(match[1]) + 1}.{match[2]}", Source((key,), shape))
        elif not key.startswith("encoder."):
            put(plan, key.removeprefix("decoder."), Source((key,), shape))
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
    blank: ModuleT | None = None,
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
    if blank is None:
        with torch.device("meta"):
            blank = build()
    expected = {key: tuple(tensor.shape) for key, tensor in blank.state_dict().items()}
    check(contents.name, expected, shapes_of(plan))
    return Checked(params, build, blank, contents, plan, float32, plain, blocks)


def check(name: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise one `WeightsError` about everything in which `found` differs from `expected`."""
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"lacks {listed(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"has {listed(unexpected)}, which does not belong there")
    for key in sorted(expected.keys() & found.keys()):
        if expected[key] != found[key]:
            problems.append(f"has {shown(key)} of shape {list(found[key])} where {list(expected[key])} was expected")
            break
    if problems:
        raise WeightsError(
            f"{name} {'; it '.join(problems)}. It is damaged or belongs to another model: download it again or "
            f"choose another file."
        )
