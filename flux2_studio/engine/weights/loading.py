"""Checkpoint files to modules: strictly checked, built on meta, each tensor moved once.

Reads Black Forest Labs' single files and diffusers folders (also sharded) for the transformer and the autoencoder, and
TAEF2's decoder with both of its key spellings, in every storage format that `formats.py` supports. Widths and depths
come from the tensors' shapes, so a checkpoint of any size loads. Out of scope: where files come from, which checkpoint
a file is supposed to be.

A file's header first becomes a plan: for every parameter of our modules, the tensors that it is made from. Names,
shapes and types are checked on the plan, so a wrong file is rejected before any of its data is read. `open_...` returns
a `WeightFile`, whose `load` reads the data. Every rejection is a `WeightsError` that names the file, what was expected
and what was found.
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

# How matrices are held in memory. plain: in the compute dtype. stored: as in the file, dequantised layer by layer.
# bfloat16, fp8, int8: matrices that the file has unquantised are converted while loading, the others stay as stored.
# bfloat16 applies to all linear layers and embeddings; fp8 and int8, which are less exact, only to linear layers of
# blocks.
WeightStorage = Literal["plain", "stored", "bfloat16", "fp8", "int8"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)
# Folders in a repository in diffusers' layout.
TRANSFORMER_FOLDER, AUTOENCODER_FOLDER = "transformer", "vae"
LOAD_PROGRESS_SECONDS = 0.05  # shortest time between two progress reports


@dataclass(frozen=True)
class WeightFile(Generic[ModuleT]):
    """A file whose header is checked; only the data remains to be read. params: the model's sizes, read from the
    header.

    meta_model: the result of `build` on meta, kept for inspection, because building a deep model takes half a second.
    float32_prefixes: parameters that stay in float32. unquantized_prefixes: parameters that are never held quantised.
    block_prefixes: parameters of the model's blocks, which may be quantised while loading and streamed.
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
        """Build the module on meta and assign its tensors, each converted and moved once.

        dtype: the compute dtype, also of plain parameters. storage: how the weights of linear layers are held. Only
        these can be quantised; everything else is dequantised at once. reader: reads the files; None makes one for
        `device`. use_mmap: map the files if `device` is not a CUDA GPU, so that tensors that need no conversion are not
        copied; for the risks see `SafetensorsFiles.read_mapped`. on_progress: called now and then with the share of
        bytes read, and with 1 at the end; an exception that it raises aborts the load and is passed on.

        Raises `WeightsError`, and `DeviceError` if `device` lacks the dtypes that must be kept.
        """
        self._check_device(device, storage)
        with torch.device("meta"):
            model = self.build()
        keys_by_target = {
            target: tuple(key for name in source.names for key in self.contents.entries[name].keys)
            for target, source in self.plan.items()
        }
        target_by_key = {key: target for target, keys in keys_by_target.items() for key in keys}
        state: dict[str, Tensor] = {}
        pending: dict[str, Tensor] = {}  # tensors of parameters that are still incomplete
        files = self.contents.files
        spans = files.spans(target_by_key)
        progress = _LoadProgress(on_progress, sum(span.size for span in spans.values()))
        on_gpu = device.type == "cuda"
        if mapped := use_mmap and reader is None and not on_gpu:
            tensors = files.read_mapped(target_by_key)
        else:
            tensors = (reader or StagedReader(device if on_gpu else torch.device("cpu"))).read(spans, progress)
        with closing(tensors) as open_tensors:
            for key, tensor in open_tensors:
                pending[key] = tensor
                target = target_by_key[key]
                if all(piece in pending for piece in keys_by_target[target]):
                    raw = {piece: pending.pop(piece) for piece in keys_by_target[target]}
                    state |= self._place_parameter(model, target, raw, device, dtype, storage)
                if mapped:
                    progress(spans[key].size)
        model.load_state_dict(state, assign=True)
        progress.finish()
        if isinstance(model, Transformer):
            for module in model.modules():
                if isinstance(module, QuantizedLinear):
                    module.allow_int8_activations = True
        return model.eval().requires_grad_(False)

    def tensor_bytes(self, *, dtype: torch.dtype, storage: WeightStorage = "plain") -> dict[str, int]:
        """Return the bytes of memory that each planned parameter, and each buffer that no file contains, takes after
        `load` with these arguments. Computed from the header alone.
        """
        model = self.meta_model
        sizes = {name: _tensor_bytes([tensor]) for name, tensor in model.named_buffers() if name not in self.plan}
        for target, source in self.plan.items():
            # Matrices are made on meta, so their own classes determine which codes and scales they keep.
            target_storage = self._storage_for(model, target, storage)
            if target_storage == "stored":
                entries = [self.contents.entries[name] for name in source.names]
                matrices = _matrices(
                    entry.restore([self.contents.files.meta_tensor(key) for key in entry.keys]) for entry in entries
                )
                sizes[target] = sum(_tensor_bytes(matrix.buffers()) for matrix in matrices)
            elif target_storage == "plain":
                sizes[target] = math.prod(source.shape) * self._plain_dtype(target, dtype).itemsize
            elif target_storage == "bfloat16":
                sizes[target] = math.prod(source.shape) * torch.bfloat16.itemsize
            else:
                sizes[target] = _quantized_bytes(source.shape, target_storage)
        return sizes

    def _place_parameter(
        self,
        model: nn.Module,
        target: str,
        raw: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        storage: WeightStorage,
    ) -> dict[str, Tensor]:
        """Return what `target` adds to the state dict. Replaces its layer first if it is held quantised or in
        bfloat16.
        """
        source = self.plan[target]
        target_storage = self._storage_for(model, target, storage)
        parts = [
            self.contents.restore(name, [raw[key] for key in self.contents.entries[name].keys]) for name in source.names
        ]
        if target_storage == "stored":
            return _replace_layer(model, target, QuantizedLinear(*_matrices(parts)).to(device))
        compute_dtype, dtype = (
            dtype,
            torch.bfloat16 if target_storage == "bfloat16" else self._plain_dtype(target, dtype),
        )
        # Move codes rather than values, which are larger; but other devices than CUDA's may lack their dtypes.
        convert_device = device if device.type == "cuda" else torch.device("cpu")
        tensor = source.assemble(
            [part.to(convert_device).dequantize(dtype) if isinstance(part, StoredMatrix) else part for part in parts]
        )
        if target_storage == "plain":
            return {target: tensor.to(device, dtype)}
        if target_storage == "bfloat16":
            matrix = BFloat16Matrix(tensor.to(device, dtype))
            is_embedding = isinstance(model.get_submodule(target.removesuffix(".weight")), nn.Embedding)
            return _replace_layer(
                model, target, StoredEmbedding(matrix, compute_dtype) if is_embedding else QuantizedLinear(matrix)
            )
        return _replace_layer(
            model, target, QuantizedLinear(quantize(tensor.to(convert_device), target_storage)).to(device)
        )

    def _check_device(self, device: torch.device, storage: WeightStorage) -> None:
        entries = (self.contents.entries[name] for source in self.plan.values() for name in source.names)
        if device.type == "mps" and (storage == "fp8" or (storage != "plain" and any(e.has_float8 for e in entries))):
            raise DeviceError(
                f"Apple's GPUs know no fp8, so the weights of {self.contents.name} cannot be kept in it there. Choose "
                f"int8 with the bfloat16 file, a GGUF file, or full precision."
            )

    def _storage_for(self, model: nn.Module, target: str, storage: WeightStorage) -> WeightStorage:
        """Return how `target` is held if `storage` is requested. Everything is plain, except weights of linear
        layers without a bias, and embeddings in bfloat16.
        """
        source = self.plan[target]
        name, _, parameter = target.rpartition(".")
        layer = model.get_submodule(name)
        is_linear_weight = isinstance(layer, nn.Linear) and parameter == "weight" and layer.bias is None
        if storage == "bfloat16" and isinstance(layer, nn.Embedding):
            return storage
        if (
            storage == "plain"
            or not is_linear_weight
            or source.swap_halves
            or target.startswith(self.unquantized_prefixes)
        ):
            return "plain"
        if all(self.contents.entries[name].make_matrix for name in source.names):
            return "stored"
        if storage == "bfloat16":
            return storage
        return storage if storage != "stored" and target.startswith(self.block_prefixes) else "plain"

    def _plain_dtype(self, target: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if target.startswith(self.float32_prefixes) else dtype


class _LoadProgress:
    """Reports the share of `total_bytes` that has been read, at most every `LOAD_PROGRESS_SECONDS`."""

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
    """Replace the layer of the weight `target` by `layer`. Returns its tensors by their names in `model`."""
    name = target.removesuffix(".weight")
    model.set_submodule(name, layer)
    return {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}


def open_transformer(path: Path) -> WeightFile[Transformer]:
    """Check the transformer in `path`: a single file (safetensors or GGUF) or a diffusers folder. Raises
    `WeightsError`.
    """
    contents = open_checkpoint_contents(path, TRANSFORMER_FOLDER, COMFYUI_PREFIXES)
    plan = transformer_plan(contents.shapes)
    params = transformer_params(contents.name, planned_shapes(plan))
    return check_weight_file(
        lambda: Transformer(params),
        contents,
        plan,
        params=params,
        unquantized_prefixes=("img_in.",),  # `Transformer.dtype` and `device` read its weight; it is small
        block_prefixes=("double_blocks.", "single_blocks."),
    )


def open_autoencoder(path: Path) -> WeightFile[Autoencoder]:
    """Check the autoencoder in `path`: a single file with either naming, or a diffusers folder. Raises
    `WeightsError`.
    """
    contents = open_checkpoint_contents(path, AUTOENCODER_FOLDER)
    plan = autoencoder_plan(contents.shapes)
    params = autoencoder_params(contents.name, planned_shapes(plan))
    # the statistics stay exact at any precision of the convolutions
    return check_weight_file(lambda: Autoencoder(params), contents, plan, params=params, float32_prefixes=("bn.",))


def open_tiny_decoder(path: Path) -> WeightFile[TinyDecoder]:
    """Check TAEF2's decoder in `path`; an encoder in the file is ignored. Raises `WeightsError`."""
    contents = open_checkpoint_contents(path)
    plan: TensorPlan = {}
    for key, shape in contents.shapes.items():
        if match := re.fullmatch(r"decoder\.layers\.(\d{1,4})\.(.+)", key):
            # the hub's indices start at the first convolution, ours at the clamp before it
            add_source(plan, f"{int(match[1]) + 1}.{match[2]}", TensorSource((key,), shape))
        elif not key.startswith("encoder."):
            add_source(plan, key.removeprefix("decoder."), TensorSource((key,), shape))
    return check_weight_file(TinyDecoder, contents, plan)


def load_transformer(path: Path, *, device: torch.device, dtype: torch.dtype) -> Transformer:
    """`open_transformer` and `load` in one call."""
    return open_transformer(path).load(device=device, dtype=dtype)


def load_autoencoder(path: Path, *, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """`open_autoencoder` and `load` in one call."""
    return open_autoencoder(path).load(device=device, dtype=dtype)


def load_tiny_decoder(path: Path, *, device: torch.device, dtype: torch.dtype) -> TinyDecoder:
    """`open_tiny_decoder` and `load` in one call."""
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

    Raises `WeightsError` that lists missing, unexpected and misshapen tensors, or unsupported tensor types.
    """
    # Check types first: unknown formats have extra keys, which would look like damage.
    entries = [contents.entries[name] for source in plan.values() for name in source.names]
    if problem := next((entry.problem for entry in entries if entry.problem), ""):
        raise WeightsError(f"{contents.name} has {problem}. Download it again, or choose the bfloat16 file.")
    if unsupported := sorted({entry.dtype for entry in entries if not entry.is_readable}):
        raise WeightsError(
            f"{contents.name} holds {printable_list(unsupported)} tensors; float32, bfloat16, float16, fp8 "
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
    """Raise one `WeightsError` that lists the differences between `expected` and `found`."""
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
