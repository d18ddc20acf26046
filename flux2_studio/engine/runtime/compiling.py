"""A transformer's blocks compiled by torch.compile: what lies between the products of matrices becomes few kernels.

Does: compiles a block of each kind, whatever layers it has (quantised ones, LoRAs), has a model's blocks run so, and
has them run as they are written again. Does not know: when that is worth it, or in which thread (`models/compiled.py`).

A block as it is written ("eager") stays the reference; a compiled one differs from it by rounding, so that a picture is
drawn with the one or the other, never with both. Compiling takes seconds to minutes; what is compiled holds for every
size of pictures and prompts, and for all blocks of the same structure.

Pitfalls: torch compiles inside a call whatever it meets for the first time, and gives a function up, silently, after
eight versions. Here only `compile` does so: a model runs what there is (`torch._dynamo.run`), and every structure and
variant has a function of its own. What a killed process leaves half written on the disk fails for ever: see `compile`.
"""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flux2_studio.engine.flux.transformer import DoubleBlock, ReferenceKV, Rope, SingleBlock, Transformer
from flux2_studio.engine.params import TransformerParams

# Lengths to compile with: text, image, references. No two that occur, nor their sums, are alike or a model's width:
# equal ones would be taken for the same, and other pictures would not fit.
EXAMPLE_TEXT_TOKENS, EXAMPLE_IMAGE_TOKENS, EXAMPLE_REFERENCE_TOKENS = 37, 53, 71
MAX_COMPILED_FORWARDS = 64  # compiled forwards that are remembered
CACHE_READ_ERRORS = (ImportError, OSError, EOFError, ValueError)  # what reading a damaged file raises
CacheAccess = Literal["none", "writes", "reads"]
SETTING_TYPES = (bool, int, float, str)  # settings of a layer; others may be whatever keeps it (`streaming`)


class CompileError(Exception):
    """A block could not be compiled: no compiler on this machine, mostly. is_permanent: whether it never will be, as
    when it is not for want of memory."""

    def __init__(self, reason: str, *, is_permanent: bool) -> None:
        super().__init__(reason)
        self.is_permanent = is_permanent


@dataclass(frozen=True, kw_only=True)
class CompileKey:
    """What a block is compiled for. is_batched: whether batches have more than one row. cache_access: what it does
    about a reference cache, see `ReferenceKV`."""

    is_batched: bool = False
    cache_access: CacheAccess = "none"


def compile_keys_for(rows: int, *, reference_cache: bool) -> tuple[CompileKey, ...]:
    """Those that drawing takes, with batches of `rows`. reference_cache: whether there is one with tokens in it."""
    several = rows > 1
    if not reference_cache:
        return (CompileKey(is_batched=several),)
    return CompileKey(is_batched=several, cache_access="writes"), CompileKey(is_batched=several, cache_access="reads")


@dataclass(frozen=True, kw_only=True)
class CompileJob:
    """Blocks to compile for a variant, and what their inputs are like."""

    blocks: tuple[nn.Module, ...]
    compile_key: CompileKey
    params: TransformerParams
    dtype: torch.dtype
    device: torch.device


class CompiledForward:
    """A forward for blocks of one structure, for one variant."""

    def __init__(self, forward: Any, backend: str | Callable[..., Any]) -> None:
        # torch keeps what it compiled by the code object, which all blocks of a kind share: so a copy of it.
        copy = types.FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__)
        copy.__defaults__, copy.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
        self.compile_and_run = torch.compile(copy, fullgraph=True, dynamic=True, backend=backend)
        self.run_compiled = torch._dynamo.run(self.compile_and_run)
        self.is_ready = False
        self.error: str | None = None  # why it cannot be compiled


class Compiler:
    """Compiles blocks and remembers them. `compile` may run in a thread of its own, beside models that run.

    cache: the folder where torch keeps what it compiled, if it is ours to empty. backend: torch.compile's.
    """

    def __init__(self, *, cache_folder: Path | None = None, backend: str | Callable[..., Any] = "inductor") -> None:
        self._cache_folder = cache_folder
        self._backend = backend
        self._compiled: dict[Hashable, CompiledForward] = {}

    def uncompiled_blocks(self, model: Transformer, compile_key: CompileKey) -> list[nn.Module]:
        """A block of each structure that is not compiled for `compile_key` yet; none where one of them cannot be, for
        then the others are of no use."""
        found: dict[Hashable, nn.Module] = {}
        for block in _transformer_blocks(model):
            found.setdefault(structure_key(block), block)
        compiled = [(self._compiled.get((key, compile_key)), block) for key, block in found.items()]
        if any(it is not None and it.error for it, _ in compiled):
            return []
        return [block for it, block in compiled if it is None or not it.is_ready]

    def make_job(self, model: Transformer, compile_key: CompileKey) -> CompileJob:
        """What is `uncompiled_blocks`, to be compiled whatever becomes of `model` meanwhile; its weights are held until
        then."""
        return CompileJob(
            blocks=tuple(clone_sharing_weights(block) for block in self.uncompiled_blocks(model, compile_key)),
            compile_key=compile_key,
            params=model.params,
            dtype=model.dtype,
            device=model.device,
        )

    @torch.inference_mode()
    def compile(self, job: CompileJob) -> None:
        """Compile what was ordered. Raises `CompileError`.

        Where torch cannot read what it kept, that is taken for damaged: it is emptied, and all is tried once more.
        """
        for block in job.blocks:
            compiled = self._get_or_create(structure_key(block), block, job.compile_key)
            try:
                try:
                    _run_example(compiled.compile_and_run, block, job)
                except Exception as error:  # torch's own kinds are many
                    if (
                        self._cache_folder is None
                        or not self._cache_folder.is_dir()
                        or not isinstance(_compiler_error(error), CACHE_READ_ERRORS)
                    ):
                        raise
                    shutil.rmtree(self._cache_folder, ignore_errors=True)
                    _run_example(compiled.compile_and_run, block, job)
            except Exception as error:
                lasting = not isinstance(_compiler_error(error), torch.OutOfMemoryError)
                if lasting:
                    compiled.error = _error_summary(error)
                raise CompileError(_error_summary(error), is_permanent=lasting) from error
            compiled.is_ready = True

    def attach(self, model: Transformer, *needed: CompileKey) -> bool:
        """Have the blocks of `model` run compiled, if all is there that the `needed` variants take. Otherwise they run
        as they are written."""
        self.detach(model)
        found = []
        for block in _transformer_blocks(model):
            key = structure_key(block)
            compiled = [(variant, self._compiled.get((key, variant))) for variant in needed]
            forwards = {
                variant.cache_access: it.run_compiled for variant, it in compiled if it is not None and it.is_ready
            }
            if not needed or len(forwards) < len(needed):
                return False
            found.append((block, forwards))
        for block, forwards in found:
            block.forward = partial(_call_matching_forward, forwards, block)
        return True

    def detach(self, model: Transformer) -> None:
        """Have the blocks of `model` run as they are written."""
        for block in _transformer_blocks(model):
            vars(block).pop("forward", None)

    def _get_or_create(self, key: Hashable, block: nn.Module, compile_key: CompileKey) -> CompiledForward:
        whole = key, compile_key
        if whole not in self._compiled:
            if len(self._compiled) == MAX_COMPILED_FORWARDS:  # LoRAs of ever other ranks, say
                del self._compiled[next(iter(self._compiled))]
            self._compiled[whole] = CompiledForward(type(block).forward, self._backend)
        return self._compiled[whole]


def structure_key(block: nn.Module) -> Hashable:
    """What blocks must share to run the same compiled code: their layers' kinds and settings, their tensors' shapes."""
    tensors = (*block.named_parameters(), *block.named_buffers())
    return (
        tuple(
            (name, type(module), *(item for item in vars(module).items() if isinstance(item[1], SETTING_TYPES)))
            for name, module in block.named_modules()
        ),
        tuple((name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for name, tensor in tensors),
    )


def clone_sharing_weights(block: nn.Module) -> nn.Module:
    """Another `block` with the very same tensors, which keeps them when the block's own are moved or replaced."""
    other: nn.Module = object.__new__(type(block))
    other.__dict__.update(vars(block))
    other._modules = {name: module and clone_sharing_weights(module) for name, module in block._modules.items()}
    # New parameters: a move puts other values into those that there are.
    other._parameters = {
        name: tensor if tensor is None else nn.Parameter(tensor.detach(), tensor.requires_grad)
        for name, tensor in block._parameters.items()
    }
    other._buffers = dict(block._buffers)
    for attached in ("forward", "velocity", "run_layers"):  # what compiled or recorded the block itself
        vars(other).pop(attached, None)
    return other


def _call_matching_forward(forwards: Mapping[CacheAccess, Callable[..., Any]], block: nn.Module, *inputs: Any) -> Any:
    kept = next((value for value in inputs if isinstance(value, ReferenceKV)), None)
    references: CacheAccess = "none" if kept is None else "reads" if kept.is_filled else "writes"
    return forwards[references](block, *inputs)


def _transformer_blocks(model: Transformer) -> Iterator[nn.Module]:
    yield from model.double_blocks
    yield from model.single_blocks


def _run_example(forward: Callable[..., Any], block: nn.Module, job: CompileJob) -> None:
    """Once for each way in which `Transformer.velocity` calls a block of that kind."""
    p = job.params
    batch = 2 if job.compile_key.is_batched else 1
    writes, reads = job.compile_key.cache_access == "writes", job.compile_key.cache_access == "reads"
    image = EXAMPLE_IMAGE_TOKENS + (EXAMPLE_REFERENCE_TOKENS if writes else 0)
    tokens = EXAMPLE_TEXT_TOKENS + image

    def made(*shape: int, dtype: torch.dtype = job.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=job.device)

    def modulation(count: int, length: int = 1) -> tuple[Tensor, ...]:
        if writes and length > 1:  # a tensor each, as they are looked up for every token
            return tuple(made(1, length, p.hidden) for _ in range(count))
        return made(1, 1, count * p.hidden).chunk(count, -1)

    rope = Rope(*(made(tokens, p.head_width // 2, dtype=torch.float32) for _ in range(2)))
    kept = None
    if writes or reads:
        keys, values = (made(batch, p.heads, EXAMPLE_REFERENCE_TOKENS, p.head_width) for _ in range(2))
        kept = ReferenceKV(keys, values, is_filled=reads)
    if isinstance(block, DoubleBlock):
        x, ctx = made(batch, image, p.hidden), made(batch, EXAMPLE_TEXT_TOKENS, p.hidden)
        forward(block, x, ctx, modulation(6, image), modulation(6), rope, kept)
    else:
        assert isinstance(block, SingleBlock)
        for wanted in (None, (EXAMPLE_TEXT_TOKENS, EXAMPLE_IMAGE_TOKENS)):
            forward(block, made(batch, tokens, p.hidden), modulation(3, tokens), rope, kept, wanted)


def _compiler_error(error: BaseException) -> BaseException:
    """What a compiler raised, of which torch makes an error of its own."""
    inner = getattr(error, "inner_exception", None)
    return inner if isinstance(inner, BaseException) else error


def _error_summary(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    return lines[0] if lines else type(error).__name__
