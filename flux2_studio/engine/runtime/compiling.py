"""Compiles transformer blocks with torch.compile, which fuses the pointwise operations between matmuls.

Compiles one block per structure, whatever its layers (quantised ones, LoRAs), attaches compiled forwards to a model's
blocks, and detaches them. Out of scope: whether compiling pays, and in which thread it runs
(`models/background_compiler.py`).

The eager block stays the reference. A compiled block differs from it by rounding, so one picture uses either eager or
compiled blocks, never both. Compiling takes seconds to minutes. The result serves all sizes of pictures and prompts,
and all blocks of the same structure.

Pitfalls: torch compiles inside a call whenever it meets something new, and silently falls back to eager after eight
versions of a function. Here only `compile` may compile: models run existing code only (`torch._dynamo.run`), and each
structure and key has its own function. A cache file that a killed process left half-written would fail forever: see
`compile`.
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

# Example lengths to compile with. They and their sums differ from each other and from all model widths: torch.compile
# would treat equal sizes as the same symbol, and other pictures would not fit.
EXAMPLE_TEXT_TOKENS, EXAMPLE_IMAGE_TOKENS, EXAMPLE_REFERENCE_TOKENS = 37, 53, 71
MAX_COMPILED_FORWARDS = 64  # that a compiler keeps
CACHE_READ_ERRORS = (ImportError, OSError, EOFError, ValueError)  # raised when torch reads a damaged cache file
CacheAccess = Literal["none", "writes", "reads"]
# Types of attributes that count as a layer's settings. Others may be bookkeeping (`streaming.py`).
SETTING_TYPES = (bool, int, float, str)


class CompileError(Exception):
    """A block could not be compiled, mostly because the machine has no compiler. is_permanent: False if memory ran
    out, so that a later attempt may succeed.
    """

    def __init__(self, reason: str, *, is_permanent: bool) -> None:
        super().__init__(reason)
        self.is_permanent = is_permanent


@dataclass(frozen=True, kw_only=True)
class CompileKey:
    """What a block is compiled for. is_batched: batches have more than one row. cache_access: how the block uses a
    reference cache, see `ReferenceKV`.
    """

    is_batched: bool = False
    cache_access: CacheAccess = "none"


def compile_keys_for(rows: int, *, reference_cache: bool) -> tuple[CompileKey, ...]:
    """Return the keys that a run with batches of `rows` needs. reference_cache: whether it has a reference cache
    with tokens.
    """
    batched = rows > 1
    if not reference_cache:
        return (CompileKey(is_batched=batched),)
    return CompileKey(is_batched=batched, cache_access="writes"), CompileKey(is_batched=batched, cache_access="reads")


@dataclass(frozen=True, kw_only=True)
class CompileJob:
    """Blocks to compile for one key, and the parameters of their inputs."""

    blocks: tuple[nn.Module, ...]
    compile_key: CompileKey
    params: TransformerParams
    dtype: torch.dtype
    device: torch.device


class CompiledForward:
    """The forward of blocks of one structure, for one key."""

    def __init__(self, forward: Any, backend: str | Callable[..., Any]) -> None:
        # torch keeps compiled code per code object, which all blocks of a class share: use a copy.
        copy = types.FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__)
        copy.__defaults__, copy.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
        self.compile_and_run = torch.compile(copy, fullgraph=True, dynamic=True, backend=backend)
        self.run_compiled = torch._dynamo.run(self.compile_and_run)
        self.is_ready = False
        self.error: str | None = None  # set if it can never be compiled


class Compiler:
    """Compiles blocks and keeps the results. `compile` may run in another thread, while models run.

    cache_folder: the folder of torch's compile cache, if it may be deleted. backend: torch.compile's.
    """

    def __init__(self, *, cache_folder: Path | None = None, backend: str | Callable[..., Any] = "inductor") -> None:
        self._cache_folder = cache_folder
        self._backend = backend
        self._compiled: dict[Hashable, CompiledForward] = {}

    def uncompiled_blocks(self, model: Transformer, compile_key: CompileKey) -> list[nn.Module]:
        """Return one block of each structure that is not compiled for `compile_key` yet. Empty if any structure
        cannot be compiled, because then the others are of no use.
        """
        block_by_structure: dict[Hashable, nn.Module] = {}
        for block in _transformer_blocks(model):
            block_by_structure.setdefault(structure_key(block), block)
        compiled = [(self._compiled.get((key, compile_key)), block) for key, block in block_by_structure.items()]
        if any(forward is not None and forward.error for forward, _ in compiled):
            return []
        return [block for forward, block in compiled if forward is None or not forward.is_ready]

    def make_job(self, model: Transformer, compile_key: CompileKey) -> CompileJob:
        """Make a job that compiles `uncompiled_blocks`. It keeps their weights alive, so it works even if `model`
        changes meanwhile.
        """
        return CompileJob(
            blocks=tuple(clone_sharing_weights(block) for block in self.uncompiled_blocks(model, compile_key)),
            compile_key=compile_key,
            params=model.params,
            dtype=model.dtype,
            device=model.device,
        )

    @torch.inference_mode()
    def compile(self, job: CompileJob) -> None:
        """Compile the blocks of `job`. Raises `CompileError`.

        If torch cannot read its cache, the cache counts as damaged: it is deleted, and compiling is tried once more.
        """
        for block in job.blocks:
            compiled = self._get_or_create(structure_key(block), block, job.compile_key)
            try:
                try:
                    _run_example(compiled.compile_and_run, block, job)
                except Exception as error:  # torch has many exception types of its own
                    if (
                        self._cache_folder is None
                        or not self._cache_folder.is_dir()
                        or not isinstance(_compiler_error(error), CACHE_READ_ERRORS)
                    ):
                        raise
                    shutil.rmtree(self._cache_folder, ignore_errors=True)
                    _run_example(compiled.compile_and_run, block, job)
            except Exception as error:
                is_permanent = not isinstance(_compiler_error(error), torch.OutOfMemoryError)
                if is_permanent:
                    compiled.error = _error_summary(error)
                raise CompileError(_error_summary(error), is_permanent=is_permanent) from error
            compiled.is_ready = True

    def attach(self, model: Transformer, *needed: CompileKey) -> bool:
        """Make the blocks of `model` run compiled if every block is compiled for all `needed` keys, else eager.
        Returns whether they run compiled.
        """
        self.detach(model)
        matches = []
        for block in _transformer_blocks(model):
            key = structure_key(block)
            candidates = [(compile_key, self._compiled.get((key, compile_key))) for compile_key in needed]
            forwards = {
                compile_key.cache_access: compiled.run_compiled
                for compile_key, compiled in candidates
                if compiled is not None and compiled.is_ready
            }
            if not needed or len(forwards) < len(needed):
                return False
            matches.append((block, forwards))
        for block, forwards in matches:
            block.forward = partial(_call_matching_forward, forwards, block)
        return True

    def detach(self, model: Transformer) -> None:
        """Make the blocks of `model` run eager."""
        for block in _transformer_blocks(model):
            vars(block).pop("forward", None)

    def _get_or_create(self, key: Hashable, block: nn.Module, compile_key: CompileKey) -> CompiledForward:
        full_key = key, compile_key
        if full_key not in self._compiled:
            if len(self._compiled) == MAX_COMPILED_FORWARDS:  # for example after many LoRAs of different ranks
                del self._compiled[next(iter(self._compiled))]
            self._compiled[full_key] = CompiledForward(type(block).forward, self._backend)
        return self._compiled[full_key]


def structure_key(block: nn.Module) -> Hashable:
    """Return what blocks must share to run the same compiled code: types and settings of layers, shapes of tensors."""
    tensors = (*block.named_parameters(), *block.named_buffers())
    return (
        tuple(
            (name, type(module), *(item for item in vars(module).items() if isinstance(item[1], SETTING_TYPES)))
            for name, module in block.named_modules()
        ),
        tuple((name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for name, tensor in tensors),
    )


def clone_sharing_weights(block: nn.Module) -> nn.Module:
    """Copy `block` with the very same tensors. The copy keeps them when the block's own are moved or replaced."""
    clone: nn.Module = object.__new__(type(block))
    clone.__dict__.update(vars(block))
    clone._modules = {name: module and clone_sharing_weights(module) for name, module in block._modules.items()}
    # New parameters, because moving a module replaces the data of its existing ones.
    clone._parameters = {
        name: tensor if tensor is None else nn.Parameter(tensor.detach(), tensor.requires_grad)
        for name, tensor in block._parameters.items()
    }
    clone._buffers = dict(block._buffers)
    for method in ("forward", "velocity", "run_layers"):  # compiled or captured replacements belong to the original
        vars(clone).pop(method, None)
    return clone


def _call_matching_forward(forwards: Mapping[CacheAccess, Callable[..., Any]], block: nn.Module, *inputs: Any) -> Any:
    reference_kv = next((value for value in inputs if isinstance(value, ReferenceKV)), None)
    cache_access: CacheAccess = "none" if reference_kv is None else "reads" if reference_kv.is_filled else "writes"
    return forwards[cache_access](block, *inputs)


def _transformer_blocks(model: Transformer) -> Iterator[nn.Module]:
    yield from model.double_blocks
    yield from model.single_blocks


def _run_example(forward: Callable[..., Any], block: nn.Module, job: CompileJob) -> None:
    """Call the block once for each way in which `Transformer.velocity` calls blocks of its kind."""
    p = job.params
    batch = 2 if job.compile_key.is_batched else 1
    writes, reads = job.compile_key.cache_access == "writes", job.compile_key.cache_access == "reads"
    image = EXAMPLE_IMAGE_TOKENS + (EXAMPLE_REFERENCE_TOKENS if writes else 0)
    tokens = EXAMPLE_TEXT_TOKENS + image

    def random(*shape: int, dtype: torch.dtype = job.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=job.device)

    def modulation(count: int, length: int = 1) -> tuple[Tensor, ...]:
        if writes and length > 1:  # separate tensors, as `Modulation` makes them when tokens have groups
            return tuple(random(1, length, p.hidden) for _ in range(count))
        return random(1, 1, count * p.hidden).chunk(count, -1)

    rope = Rope(*(random(tokens, p.head_width // 2, dtype=torch.float32) for _ in range(2)))
    reference_kv = None
    if writes or reads:
        keys, values = (random(batch, p.heads, EXAMPLE_REFERENCE_TOKENS, p.head_width) for _ in range(2))
        reference_kv = ReferenceKV(keys, values, is_filled=reads)
    if isinstance(block, DoubleBlock):
        x, ctx = random(batch, image, p.hidden), random(batch, EXAMPLE_TEXT_TOKENS, p.hidden)
        forward(block, x, ctx, modulation(6, image), modulation(6), rope, reference_kv)
    else:
        assert isinstance(block, SingleBlock)
        for output_range in (None, (EXAMPLE_TEXT_TOKENS, EXAMPLE_IMAGE_TOKENS)):
            forward(block, random(batch, tokens, p.hidden), modulation(3, tokens), rope, reference_kv, output_range)


def _compiler_error(error: BaseException) -> BaseException:
    """Return the original error, which torch wraps in one of its own."""
    inner = getattr(error, "inner_exception", None)
    return inner if isinstance(inner, BaseException) else error


def _error_summary(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    return lines[0] if lines else type(error).__name__
