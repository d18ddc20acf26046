"""How much memory a forward takes, found without running it: the same code goes through the meta device.

Does: counts the bytes of all tensors alive at once while a stage runs on tensors that have shapes but no data, so a
prediction follows the code instead of a formula beside it. Does not know: weights (only activations are counted), what
a device's allocator adds, budgets.

Pitfalls: workspaces inside kernels are not seen, but for those of convolutions (`_cpu_workspace`). On a GPU a copy
of the input stands for them; what cuDNN takes depends on the kernel that it chooses. Attention is taken to be one of
the kernels that never hold the whole matrix of scores. Depth hardly matters, as a block's activations are gone before
the next one's come: two blocks of a kind stand for all.

Convolutions on a CPU. oneDNN has layouts of its own, and torch hands it plain tensors, so each call takes, one after
the other (allocations counted by torch's profiler, torch 2.13 with oneDNN 3.12):
    1. copies of the input and of the weight in oneDNN's layouts, and the result in oneDNN's layout
    2. that result, and the plain one
The layouts depend on the processor, see `_channel_block`. Channels in blocks of 8 or 16 (AVX2, AVX-512) are padded.
Where channels come last (processors with matrix units, AMX) nothing is padded, but torch's `mkldnn_to_dense` copies the
result twice: step 2 has three of them. A 1x1 convolution in bfloat16 with blocks also sums into a float32 result.
Without oneDNN, torch writes out the input once for each position of the kernel (im2col), and nothing for a 1x1 kernel.
Linear layers in bfloat16 sum into a float32 result where oneDNN takes bfloat16 and the processor has no instructions
for it.
Not counted: a buffer for each thread, of about 0.2 MB.
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
FOOTPRINT_CACHE_SIZE = 256  # stages whose figure is remembered: a page asks for the same ones again and again


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
    """Peak of one evaluation of the transformer, with the keys and values that a reference cache keeps after it.

    batch: rows (twice the pictures under classifier-free guidance). image_tokens, text, references: of each row.
    quantized: whether the blocks' weights are held in few bits, and restored layer by layer. on_cpu: whether this
    machine's processor computes it.
    """
    shallow = replace(params, double_blocks=min(2, params.double_blocks), single_blocks=min(2, params.single_blocks))
    cached = reference_tokens if reference_cache else 0
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
    cache = ReferenceCache(cached) if cached else None
    peak = peak_bytes(
        lambda: model(*inputs, Rope(angles, angles), guidance, outputs=image_tokens, cache=cache),
        *inputs,
        angles,
        angles,
        on_cpu=on_cpu,
    )
    return (
        peak
        + reference_cache_bytes(params, dtype, batch, cached)
        - reference_cache_bytes(shallow, dtype, batch, cached)
    )


def reference_cache_bytes(params: TransformerParams, dtype: torch.dtype, batch: int, reference_tokens: int) -> int:
    """What a reference cache keeps: keys and values of each block."""
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
    """Peak of decoding one picture of width x height pixels, in strips of `strip_height` or whole.

    offload_activations: whether feature maps wait in main memory, which is not counted. on_cpu: whether this machine's
    processor computes it.
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
    """Peak of encoding one picture of width x height pixels, in strips of `strip_height` or whole.

    offload_activations: whether feature maps wait in main memory, which is not counted. on_cpu: whether this machine's
    processor computes it.
    """
    with META:
        model = _build_autoencoder(params, dtype)
        pixels = torch.empty(1, 3, height, width, dtype=dtype)
    return peak_bytes(
        lambda: model.encode(pixels, strip_height, CPU if offload_activations else None), pixels, on_cpu=on_cpu
    )


@functools.lru_cache(FOOTPRINT_CACHE_SIZE)
def tiny_decode_bytes(dtype: torch.dtype, batch: int, width: int, height: int, *, on_cpu: bool = False) -> int:
    """Peak of the small decoder's preview of `batch` pictures. on_cpu: as for `decode_bytes`."""
    with META:
        model = _freeze(TinyDecoder().to(dtype))
        latent = torch.empty(batch, 32, height // 8, width // 8, dtype=dtype)
    return peak_bytes(lambda: model(latent).float(), latent, on_cpu=on_cpu)


def peak_bytes(run: Callable[[], Any], *inputs: Tensor, on_cpu: bool = False) -> int:
    """The bytes alive at once, at most, while `run` works on meta tensors; `inputs` are those alive before it.

    on_cpu: whether convolutions and linear layers are those of this machine's processor.
    """
    counter = _MemoryCounter(inputs, on_cpu)
    with torch.inference_mode(), _FusedAttentionOnMeta(), counter:
        run()
    return counter.peak


def quantize_linear_layers(model: nn.Module) -> None:
    """Put quantised layers, on the meta device, where `model` has linear ones: as 8 bits, which stand for all kinds."""
    layers: list[tuple[str, Any]] = list(model.named_modules())
    for name, layer in layers:
        unbiased = isinstance(layer, nn.Linear) and layer.bias is None
        if unbiased:
            model.set_submodule(name, QuantizedLinear(quantize(layer.weight, "int8")))


class _MemoryCounter(TorchDispatchMode):
    """Follows every storage on the meta device from its making to its end."""

    def __init__(self, inputs: tuple[Tensor, ...], on_cpu: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu
        self._bytes_by_storage: dict[int, int] = {}
        self._live_bytes = self.peak = sum(tensor.nbytes for tensor in inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kwargs or {}).get("device") == CPU and args and isinstance(args[0], Tensor) and args[0].is_meta:
            # Going to main memory: a tensor there that takes no room, for there is nothing to put into it.
            return torch.empty((), dtype=args[0].dtype).expand(args[0].shape)
        out = func(*args, **(kwargs or {}))
        known = {
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
                if (
                    storage._cdata not in self._bytes_by_storage and storage._cdata not in known
                ):  # a view of a weight, say
                    self._bytes_by_storage[storage._cdata] = storage.nbytes()
                    self._live_bytes += storage.nbytes()
                    self.peak = max(self.peak, self._live_bytes + workspace)
                    weakref.finalize(storage, self._on_freed, storage._cdata)
        return out

    def _on_freed(self, key: int) -> None:
        self._live_bytes -= self._bytes_by_storage.pop(key)


def _gpu_workspace(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """What a convolution takes beside its input and its result."""
    return x.nbytes


def _cpu_workspace(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """As `_gpu_workspace`, on this machine's processor; the module's header says what is counted."""
    one_by_one = weight.shape[2:].numel() == 1
    block = _channel_block(x.dtype)
    if block is None:
        columns = x.shape[0] * weight.shape[1:].numel() * out.shape[2:].numel() * x.itemsize
        return 0 if one_by_one else columns
    copies = x.nbytes + weight.nbytes
    if block == 1:
        return max(copies, 2 * out.nbytes)
    own = out.nbytes // out.shape[1] * -(-out.shape[1] // block) * block  # the result in oneDNN's layout
    sums = 4 * out.numel() if one_by_one and x.dtype is torch.bfloat16 else 0
    return max(copies + own + sums - out.nbytes, own)


@functools.cache
def _channel_block(dtype: torch.dtype) -> int | None:
    """How many channels stand together in oneDNN's layout for results of convolutions; 1 is channels last.

    oneDNN is asked, by a small convolution: what it chooses follows from the processor, its own version, and limits
    such as ONEDNN_MAX_CPU_ISA. None where it has no convolutions in `dtype`.
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
    """On the meta device torch would choose the kernel that writes the scores down, which no other device does here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            mask = (kwargs or {}).get("attn_mask")
            if mask is not None and mask.dtype is torch.bool:  # kernels add it, as numbers
                mask = torch.empty_like(mask, dtype=query.dtype)
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def _build_autoencoder(params: AutoencoderParams, dtype: torch.dtype) -> Autoencoder:
    return _freeze(Autoencoder(params).to(dtype))


def _freeze(model: Any) -> Any:
    assert isinstance(model, nn.Module)
    return model.eval().requires_grad_(False)
