"""Checkpoint files to modules: strict, built on meta and moved once.

Does: Black Forest Labs' single files and diffusers folders (sharded too) for the transformer and the autoencoder,
TAEF2's decoder in both spellings of its keys; in every storage format that `formats.py` knows. Widths and depths are
read from the tensors' shapes, so a checkpoint of any size loads. Does not know: where files come from, which checkpoint
a file is supposed to be.

A file's header is turned into a plan first: for every parameter of our modules, the tensors that it is made from.
Names, shapes and types are checked on the plan, so that a wrong file is refused before a byte of its data is read:
`open_...` gives a `WeightFile` file, whose `load` reads it. Every refusal is a `WeightsError` that names the file, what
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
from flux2_studio.engine.weights.formats import COMFYUI_PREFIXES, CheckpointContents, open_checkpoint_contents
from flux2_studio.engine.weights.layouts import (
    TensorPlan,
    TensorSource,
    add_source,
    autoencoder_params,
    autoencoder_plan,
    planned_shapes,
    transformer_params,
    transformer_plan,
)
from flux2_studio.engine.weights.quantize import (
    BFloat16Matrix,
    EightBitKind,
    QuantizedLinear,
    StoredEmbedding,
    StoredMatrix,
    quantize,
)
from flux2_studio.engine.weights.staged_copy import StagedReader
from flux2_studio.engine.weights.tensor_files import Shape, printable_list, printable_text
from flux2_studio.errors import DeviceError, WeightsError

# How matrices are held in memory. plain: in the precision that is computed in. stored: as the file has them, restored
# layer by layer. bfloat16, fp8, int8: those that the file has in full are brought to it on the way in, the others stay
# as stored. All linear layers and embeddings are held in bfloat16; in fp8 and int8, which are less exact, the blocks'
# linear layers alone.
WeightStorage = Literal["plain", "stored", "bfloat16", "fp8", "int8"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)
# Where a repository in diffusers' layout has the files.
TRANSFORMER_FOLDER, AUTOENCODER_FOLDER = "transformer", "vae"
LOAD_PROGRESS_SECONDS = 0.05  # seconds, at least, between two words on how far a load is


@dataclass(frozen=True)
class WeightFile(Generic[ModuleT]):
    """A file whose header fits: all that is left is to read it. `params` are the sizes that it was found to have.

    meta_model: what `build` makes, on the meta device, to look at: a deep model takes half a second to build. float32:
    prefixes of parameters that keep full precision. unquantized_prefixes: of those that are never held quantised.
    block_prefixes: of those that may be quantised on loading.
    """

    params: Any
    build: Callable[[], ModuleT]
    meta_model: ModuleT
    contents: CheckpointContents
    plan: TensorPlan
    float32_prefixes: tuple[str, ...] = ()
    unquantized_prefixes: tuple[str, ...] = ()
    block_prefixes: tuple[str, ...] = ()

    def load(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        storage: WeightStorage = "plain",
        reader: StagedReader | None = None,
        use_mmap: bool = False,
        on_progress: Callable[[float], None] | None = None,
    ) -> ModuleT:
        """Build the module on meta and give it its tensors, each converted and moved once.

        dtype: what is computed in, and what plain parameters are held in. storage: how the weights of linear layers are
        held. Only these can be quantised; everything else is restored at once. reader: what reads the files; None is
        one for `device`. use_mmap: whether the files may be mapped where that is no GPU that CUDA runs on, so that what
        needs no conversion is not even copied; see `TensorFiles.read_mapped` for which may. on_progress: called now and
        then with the share of the bytes that has been read, and with 1 in the end; what it raises ends the load and is
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
        arrived = _LoadProgress(on_progress, sum(span.size for span in spans.values()))
        on_gpu = device.type == "cuda"
        if views := use_mmap and reader is None and not on_gpu:
            reading = files.read_mapped(target_of)
        else:
            reading = (reader or StagedReader(device if on_gpu else torch.device("cpu"))).read(spans, arrived)
        with closing(reading) as arriving:
            for key, tensor in arriving:
                waiting[key] = tensor
                target = target_of[key]
                if all(piece in waiting for piece in keys_of[target]):
                    raw = {piece: waiting.pop(piece) for piece in keys_of[target]}
                    state |= self._place_parameter(model, target, raw, device, dtype, storage)
                if views:
                    arrived(spans[key].size)
        model.load_state_dict(state, assign=True)
        arrived.finish()
        if isinstance(model, Transformer):
            for module in model.modules():
                if isinstance(module, QuantizedLinear):
                    module.allow_int8_activations = True
        return model.eval().requires_grad_(False)

    def tensor_bytes(self, *, dtype: torch.dtype, storage: WeightStorage = "plain") -> dict[str, int]:
        """Bytes of memory that each parameter of the plan, and each buffer that no file holds, has after `load` with
        these arguments. Told by the header alone."""
        model = self.meta_model
        found = {name: _tensor_bytes([tensor]) for name, tensor in model.named_buffers() if name not in self.plan}
        for target, source in self.plan.items():
            # On meta, so that what a matrix keeps of its codes and scales is said by its class alone.
            held = self._storage_for(model, target, storage)
            if held == "stored":
                entries = [self.contents.entries[name] for name in source.names]
                matrices = _matrices(
                    entry.restore([self.contents.files.meta_tensor(key) for key in entry.keys]) for entry in entries
                )
                found[target] = sum(_tensor_bytes(matrix.buffers()) for matrix in matrices)
            elif held == "plain":
                found[target] = math.prod(source.shape) * self._plain_dtype(target, dtype).itemsize
            elif held == "bfloat16":
                found[target] = math.prod(source.shape) * torch.bfloat16.itemsize
            else:
                found[target] = _quantized_bytes(source.shape, held)
        return found

    def _place_parameter(
        self,
        model: nn.Module,
        target: str,
        raw: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        storage: WeightStorage,
    ) -> dict[str, Tensor]:
        """What `target` adds to the state, once its layer has been replaced where it is to stay small."""
        source = self.plan[target]
        held = self._storage_for(model, target, storage)
        parts = [
            self.contents.restore(name, [raw[key] for key in self.contents.entries[name].keys]) for name in source.names
        ]
        if held == "stored":
            return _replace_layer(model, target, QuantizedLinear(*_matrices(parts)).to(device))
        computed, dtype = dtype, torch.bfloat16 if held == "bfloat16" else self._plain_dtype(target, dtype)
        # Codes travel rather than values, but only to devices that have their types.
        worker = device if device.type == "cuda" else torch.device("cpu")
        tensor = source.assemble(
            [part.to(worker).dequantize(dtype) if isinstance(part, StoredMatrix) else part for part in parts]
        )
        if held == "plain":
            return {target: tensor.to(device, dtype)}
        if held == "bfloat16":
            matrix = BFloat16Matrix(tensor.to(device, dtype))
            embeds = isinstance(model.get_submodule(target.removesuffix(".weight")), nn.Embedding)
            return _replace_layer(
                model, target, StoredEmbedding(matrix, computed) if embeds else QuantizedLinear(matrix)
            )
        return _replace_layer(model, target, QuantizedLinear(quantize(tensor.to(worker), held)).to(device))

    def _check_device(self, device: torch.device, storage: WeightStorage) -> None:
        entries = (self.contents.entries[name] for source in self.plan.values() for name in source.names)
        if device.type == "mps" and (storage == "fp8" or (storage != "plain" and any(e.has_float8 for e in entries))):
            raise DeviceError(
                f"Apple's GPUs know no fp8, so the weights of {self.contents.name} cannot be kept in it there. Choose "
                f"int8 with the bfloat16 file, a GGUF file, or full precision."
            )

    def _storage_for(self, model: nn.Module, target: str, storage: WeightStorage) -> WeightStorage:
        """How `target` is held where `storage` is asked for. Only linear layers' weights are ever held small."""
        source = self.plan[target]
        name, _, parameter = target.rpartition(".")
        layer = model.get_submodule(name)
        linear = isinstance(layer, nn.Linear) and parameter == "weight" and layer.bias is None
        if storage == "bfloat16" and isinstance(layer, nn.Embedding):
            return storage
        if storage == "plain" or not linear or source.swap_halves or target.startswith(self.unquantized_prefixes):
            return "plain"
        if all(self.contents.entries[name].make_matrix for name in source.names):
            return "stored"
        if storage == "bfloat16":
            return storage
        return storage if storage != "stored" and target.startswith(self.block_prefixes) else "plain"

    def _plain_dtype(self, target: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if target.startswith(self.float32_prefixes) else dtype


class _LoadProgress:
    """Tells how much of `total_bytes` bytes has come, not too often."""

    def __init__(self, on_progress: Callable[[float], None] | None, total_bytes: int) -> None:
        self._on_progress = on_progress
        self._total_bytes = total_bytes
        self._bytes_read = 0
        self._last_report = -math.inf

    def __call__(self, size: int) -> None:
        self._bytes_read += size
        if (
            self._on_progress is not None
            and self._bytes_read < self._total_bytes
            and time.monotonic() - self._last_report >= LOAD_PROGRESS_SECONDS
        ):
            self._last_report = time.monotonic()
            self._on_progress(self._bytes_read / self._total_bytes)

    def finish(self) -> None:
        if self._on_progress is not None:
            self._on_progress(1.0)


def _matrices(parts: Iterable[Tensor | StoredMatrix]) -> list[StoredMatrix]:
    return [part for part in parts if isinstance(part, StoredMatrix)]


@functools.cache
def _quantized_bytes(shape: Shape, kind: EightBitKind) -> int:
    return _tensor_bytes(quantize(torch.empty(shape, device="meta"), kind).buffers())


def _tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _replace_layer(model: nn.Module, target: str, layer: nn.Module) -> dict[str, Tensor]:
    """Put `layer` where the layer of the weight `target` was; its tensors, by their names in `model`."""
    name = target.removesuffix(".weight")
    model.set_submodule(name, layer)
    return {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}


def open_transformer(path: Path) -> WeightFile[Transformer]:
    """The transformer in `path`: a single file (safetensors or GGUF) or a diffusers folder. Raises `WeightsError`."""
    contents = open_checkpoint_contents(path, TRANSFORMER_FOLDER, COMFYUI_PREFIXES)
    plan = transformer_plan(contents.shapes)
    params = transformer_params(contents.name, planned_shapes(plan))
    return check_weight_file(
        lambda: Transformer(params),
        contents,
        plan,
        params=params,
        unquantized_prefixes=("img_in.",),  # the layer that tells which precision and device the whole has; a small one
        block_prefixes=("double_blocks.", "single_blocks."),
    )


def open_autoencoder(path: Path) -> WeightFile[Autoencoder]:
    """The autoencoder in `path`: a single file of either spelling, or a diffusers folder. Raises `WeightsError`."""
    contents = open_checkpoint_contents(path, AUTOENCODER_FOLDER)
    plan = autoencoder_plan(contents.shapes)
    params = autoencoder_params(contents.name, planned_shapes(plan))
    # the statistics stay exact, whatever the precision of the convolutions
    return check_weight_file(lambda: Autoencoder(params), contents, plan, params=params, float32_prefixes=("bn.",))


def open_tiny_decoder(path: Path) -> WeightFile[TinyDecoder]:
    """TAEF2's decoder in `path`, whose encoder, if it is there, is left alone. Raises `WeightsError`."""
    contents = open_checkpoint_contents(path)
    plan: TensorPlan = {}
    for key, shape in contents.shapes.items():
        if match := re.fullmatch(r"decoder\.layers\.(\d{1,4})\.(.+)", key):
            # the hub's file counts from the first convolution, our Sequential from the clamp before it
            add_source(plan, f"{int(match[1]) + 1}.{match[2]}", TensorSource((key,), shape))
        elif not key.startswith("encoder."):
            add_source(plan, key.removeprefix("decoder."), TensorSource((key,), shape))
    return check_weight_file(TinyDecoder, contents, plan)


def load_transformer(path: Path, *, device: torch.device, dtype: torch.dtype) -> Transformer:
    """`open_transformer` and `load` in one."""
    return open_transformer(path).load(device=device, dtype=dtype)


def load_autoencoder(path: Path, *, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """`open_autoencoder` and `load` in one."""
    return open_autoencoder(path).load(device=device, dtype=dtype)


def load_tiny_decoder(path: Path, *, device: torch.device, dtype: torch.dtype) -> TinyDecoder:
    """`open_tiny_decoder` and `load` in one."""
    return open_tiny_decoder(path).load(device=device, dtype=dtype)


def check_weight_file(
    build: Callable[[], ModuleT],
    contents: CheckpointContents,
    plan: TensorPlan,
    *,
    params: Any = None,
    meta_model: ModuleT | None = None,
    float32_prefixes: tuple[str, ...] = (),
    unquantized_prefixes: tuple[str, ...] = (),
    block_prefixes: tuple[str, ...] = (),
) -> WeightFile[ModuleT]:
    """Compare `plan` with the module that `build` makes. For the other arguments see `WeightFile`.

    Raises `WeightsError` listing missing, unexpected and misshapen tensors, or tensors of a type we do not read.
    """
    # The type first: formats that we do not know have keys of their own, which would read as damage.
    entries = [contents.entries[name] for source in plan.values() for name in source.names]
    if problem := next((entry.problem for entry in entries if entry.problem), ""):
        raise WeightsError(f"{contents.name} has {problem}. Download it again, or choose the bfloat16 file.")
    if foreign := sorted({entry.dtype for entry in entries if not entry.is_readable}):
        raise WeightsError(
            f"{contents.name} holds {printable_list(foreign)} tensors; float32, bfloat16, float16, fp8 "
            "(float8_e4m3fn), NVFP4 "
            f"and GGUF files can be read. Choose the checkpoint's bfloat16 file."
        )
    if meta_model is None:
        with torch.device("meta"):
            meta_model = build()
    expected = {key: tuple(tensor.shape) for key, tensor in meta_model.state_dict().items()}
    check_shapes(contents.name, expected, planned_shapes(plan))
    return WeightFile(params, build, meta_model, contents, plan, float32_prefixes, unquantized_prefixes, block_prefixes)


def check_shapes(name: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise one `WeightsError` about everything in which `found` differs from `expected`."""
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"lacks {printable_list(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"has {printable_list(unexpected)}, which does not belong there")
    for key in sorted(expected.keys() & found.keys()):
        if expected[key] != found[key]:
            problems.append(
                f"has {printable_text(key)} of shape {list(found[key])} where {list(expected[key])} was expected"
            )
            break
    if problems:
        raise WeightsError(
            f"{name} {'; it '.join(problems)}. It is damaged or belongs to another model: download it again or "
            f"choose another file."
        )
