"""Predicts the memory of a forward pass without running it, on the meta device.

Counts the bytes of all tensors that are alive at the same time while a stage runs on tensors with shapes but no data,
so predictions follow the code instead of a separate formula. Out of scope: weights (only activations are counted),
allocator overhead, budgets.

Pitfalls: workspaces inside kernels are invisible; only those of convolutions are modelled (`_cpu_workspace`). On a GPU
a copy of the input stands for them, because cuDNN's workspace depends on the kernel that it chooses. Attention is
assumed to use a kernel that never stores the full matrix of scores. Depth hardly matters, because a block's activations
are freed before the next block's are made: two blocks of each kind stand for all.

Convolutions on a CPU: oneDNN has its own layouts, and torch hands it plain tensors, so each call allocates in two steps
(measured with torch's profiler, torch 2.13 with oneDNN 3.12):
    1. copies of the input and of the weight in oneDNN's layouts, and the result in oneDNN's layout
    2. that result, and the plain one
The layouts depend on the processor, see `_channel_block`. With channels in blocks of 8 or 16 (AVX2, AVX-512), channels
are padded. With channels last (processors with matrix units, AMX), nothing is padded, but torch's `mkldnn_to_dense`
copies the result twice: step 2 has three copies of it. With blocks, a 1x1 convolution in bfloat16 also accumulates in a
float32 result. Without oneDNN, torch stores the input once per kernel position (im2col), and nothing for a 1x1 kernel.
Linear layers in bfloat16 accumulate in a float32 result if oneDNN accepts bfloat16 and the processor has no
instructions for it. Not counted: a buffer of about 0.2 MB per thread.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux2_studio.engine.flux.transformer import ReferenceCache, Rope, Transformer
from flux2_studio.engine.params import AutoencoderParams, TransformerParams
from flux2_studio.engine.runtime.processor import has_bfloat16
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.vae.tiny_autoencoder import TinyDecoder
from flux2_studio.engine.weights.quantize import QuantizedLinear, quantize

META = torch.device("meta")
CPU = torch.device("cpu")
_CONVOLUTION_OPS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
_LINEAR_OPS = (torch.ops.aten.linear.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
FOOTPRINT_CACHE_SIZE = 256  # results kept per function: the web page asks for the same ones repeatedly


@functools.lru_cache(FOOTPRINT_CACHE_SIZE)
def transformer_bytes(
    params: TransformerParams,
    dtype: torch.dtype,
    *,
    batch: int,
    image_tokens: int,
    text_tokens: int,
    reference_tokens: int = 0,
    reference_cache: bool = False,
    quantized: bool = False,
    on_cpu: bool = False,
) -> int:
    """Return the peak of one evaluation of the transformer, including the keys and values of a reference cache.

    batch: rows (twice the pictures with classifier-free guidance). image_tokens, text_tokens, reference_tokens: per
    row. quantized: the blocks' weights are quantised and restored layer by layer. on_cpu: this machine's processor
    computes it.
    """
    shallow = replace(params, double_blocks=min(2, params.double_blocks), single_blocks=min(2, params.single_blocks))
    cached_tokens = reference_tokens if reference_cache else 0
    with META:
        model = _freeze(Transformer(shallow).to(dtype))
        if quantized:
            quantize_linear_layers(model.double_blocks)
            quantize_linear_layers(model.single_blocks)
        length = text_tokens + image_tokens + reference_tokens
        angles = torch.empty(length, params.head_width // 2)
        inputs = (
            torch.empty(batch, image_tokens + reference_tokens, params.in_channels, dtype=dtype),
            torch.empty(batch, text_tokens, params.context_width, dtype=dtype),
            torch.empty(batch),
        )
        guidance = torch.empty(batch) if params.guidance_embedding else None
    cache = ReferenceCache(cached_tokens) if cached_tokens else None
    peak = peak_bytes(
        lambda: model(*inputs, Rope(angles, angles), guidance, outputs=image_tokens, cache=cache),
        *inputs,
        angles,
        angles,
        on_cpu=on_cpu,
    )
    return (
        peak
        + reference_cache_bytes(params, dtype, batch, cached_tokens)
        - reference_cache_bytes(shallow, dtype, batch, cached_tokens)
    )


def reference_cache_bytes(params: TransformerParams, dtype: torch.dtype, batch: int, reference_tokens: int) -> int:
    """Return the size of a reference cache: keys and values of each block."""
    return 2 * (params.double_blocks + params.single_blocks) * batch * reference_tokens * params.hidden * dtype.itemsize


@functools.lru_cache(FOOTPRINT_CACHE_SIZE)
def decode_bytes(
    params: AutoencoderParams,
    dtype: torch.dtype,
    width: int,
    height: int,
    strip_height: int | None,
    offload_activations: bool = False,
    *,
    on_cpu: bool = False,
) -> int:
    """Return the peak of decoding one picture of width x height pixels, in strips of `strip_height` or whole (None).

    offload_activations: feature maps are stored in main memory, which is not counted. on_cpu: this machine's processor
    computes it.
    """
    with META:
        model = _build_autoencoder(params, dtype)
        latent = torch.empty(1, 4 * params.latent_channels, height // params.patch, width // params.patch)
    return peak_bytes(
        lambda: model.decode(latent, strip_height, CPU if offload_activations else None), latent, on_cpu=on_cpu
    )


@functools.lru_cache(FOOTPRINT_CACHE_SIZE)
def encode_bytes(
    params: AutoencoderParams,
    dtype: torch.dtype,
    width: int,
    height: int,
    strip_height: int | None,
    offload_activations: bool = False,
    *,
    on_cpu: bool = False,
) -> int:
    """Return the peak of encoding one picture of width x height pixels, in strips of `strip_height` or whole (None).

    offload_activations: feature maps are stored in main memory, which is not counted. on_cpu: this machine's processor
    computes it.
    """
    with META:
        model = _build_autoencoder(params, dtype)
        pixels = torch.empty(1, 3, height, width, dtype=dtype)
    return peak_bytes(
        lambda: model.encode(pixels, strip_height, CPU if offload_activations else None), pixels, on_cpu=on_cpu
    )


@functools.lru_cache(FOOTPRINT_CACHE_SIZE)
def tiny_decode_bytes(dtype: torch.dtype, batch: int, width: int, height: int, *, on_cpu: bool = False) -> int:
    """Return the peak of a preview of `batch` pictures by the tiny decoder. on_cpu: as for `decode_bytes`."""
    with META:
        model = _freeze(TinyDecoder().to(dtype))
        latent = torch.empty(batch, 32, height // 8, width // 8, dtype=dtype)
    return peak_bytes(lambda: model(latent).float(), latent, on_cpu=on_cpu)


def peak_bytes(run: Callable[[], Any], *inputs: Tensor, on_cpu: bool = False) -> int:
    """Return the most bytes alive at the same time while `run` works on meta tensors. inputs: tensors alive before.

    on_cpu: count workspaces of convolutions and linear layers as on this machine's processor.
    """
    counter = _MemoryCounter(inputs, on_cpu)
    with torch.inference_mode(), _FusedAttentionOnMeta(), counter:
        run()
    return counter.peak


def quantize_linear_layers(model: nn.Module) -> None:
    """Replace the bias-free linear layers of `model` by int8 ones, on the meta device. They stand for all quantised
    formats.
    """
    layers: list[tuple[str, Any]] = list(model.named_modules())
    for name, layer in layers:
        is_plain_linear = isinstance(layer, nn.Linear) and layer.bias is None
        if is_plain_linear:
            model.set_submodule(name, QuantizedLinear(quantize(layer.weight, "int8")))


class _MemoryCounter(TorchDispatchMode):
    """Tracks every storage on the meta device from creation to release."""

    def __init__(self, inputs: tuple[Tensor, ...], on_cpu: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu
        self._bytes_by_storage: dict[int, int] = {}
        self._live_bytes = self.peak = sum(tensor.nbytes for tensor in inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kwargs or {}).get("device") == CPU and args and isinstance(args[0], Tensor) and args[0].is_meta:
            # An offload to main memory: return a CPU tensor that takes no space, since there is no data.
            return torch.empty((), dtype=args[0].dtype).expand(args[0].shape)
        out = func(*args, **(kwargs or {}))
        input_storages = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        workspace = 0
        if func in _CONVOLUTION_OPS:
            workspace = (_cpu_workspace if self._on_cpu else _gpu_workspace)(args[0], args[1], out)
        elif func in _LINEAR_OPS and self._on_cpu and out.dtype is torch.bfloat16 and _converts_bfloat16():
            workspace = 4 * out.numel()
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device == META:
                storage = tensor.untyped_storage()
                # Views of inputs, such as weights, are not counted.
                if storage._cdata not in self._bytes_by_storage and storage._cdata not in input_storages:
                    self._bytes_by_storage[storage._cdata] = storage.nbytes()
                    self._live_bytes += storage.nbytes()
                    self.peak = max(self.peak, self._live_bytes + workspace)
                    weakref.finalize(storage, self._on_freed, storage._cdata)
        return out

    def _on_freed(self, key: int) -> None:
        self._live_bytes -= self._bytes_by_storage.pop(key)


def _gpu_workspace(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """Estimate the bytes that a convolution needs besides its input and its result: as many as the input."""
    return x.nbytes


def _cpu_workspace(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """Like `_gpu_workspace`, on this machine's processor. The module's header says what is counted."""
    one_by_one = weight.shape[2:].numel() == 1
    block = _channel_block(x.dtype)
    if block is None:
        columns = x.shape[0] * weight.shape[1:].numel() * out.shape[2:].numel() * x.itemsize
        return 0 if one_by_one else columns
    copies = x.nbytes + weight.nbytes
    if block == 1:
        return max(copies, 2 * out.nbytes)
    blocked_result = out.nbytes // out.shape[1] * -(-out.shape[1] // block) * block  # in oneDNN's layout
    float32_result = 4 * out.numel() if one_by_one and x.dtype is torch.bfloat16 else 0
    return max(copies + blocked_result + float32_result - out.nbytes, blocked_result)


@functools.cache
def _channel_block(dtype: torch.dtype) -> int | None:
    """Return how many channels are stored together in oneDNN's layout for results of convolutions; 1 means channels
    last.

    A small convolution finds out, because oneDNN's choice depends on the processor, its version and limits such as
    ONEDNN_MAX_CPU_ISA. None if oneDNN has no convolutions in `dtype`.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    if dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return None
    x, weight = (torch.zeros(1, 32, side, side, dtype=dtype, device=CPU) for side in (8, 3))
    with torch.inference_mode():
        out = F.conv2d(x.to_mkldnn(dtype), weight.to_mkldnn(dtype), padding=1)  # [1, 1, 8, 8]
    return int(torch.ops.mkldnn._nbytes(out)) // (out.numel() * dtype.itemsize)


def _converts_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not has_bfloat16()


class _FusedAttentionOnMeta(TorchFunctionMode):
    """Replaces attention on the meta device, where torch would choose the kernel that stores all scores. Real
    devices do not use that kernel here.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            mask = (kwargs or {}).get("attn_mask")
            if mask is not None and mask.dtype is torch.bool:  # count the float mask that kernels make
                mask = torch.empty_like(mask, dtype=query.dtype)
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def _build_autoencoder(params: AutoencoderParams, dtype: torch.dtype) -> Autoencoder:
    return _freeze(Autoencoder(params).to(dtype))


def _freeze(model: Any) -> Any:
    assert isinstance(model, nn.Module)
    return model.eval().requires_grad_(False)
