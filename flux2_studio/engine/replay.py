"""Runs of a model recorded as CUDA graphs: hundreds of kernels that the processor asks for at once.

Does: records what a transformer or a text encoder's tower computes, for each shape that comes again, and replays it
with other inputs. Does not know: when that is worth its memory (`models/replayed.py`).

A small run is over sooner than its kernels can be asked for one by one. Replayed, the very same kernels run on the very
same weights: the result is the same to the bit, so that one picture may be drawn with both.

The first run of a shape is as it is written, the second is recorded. Larger runs are never recorded, for the device is
busy while their kernels are asked for; nor are those with a reference cache, which write to it.

Pitfalls: a recording has the addresses of all tensors in it. `attach` tells whether they, and what else it was made
from, are as they were, and must be called before every run that may follow a change. Recordings share their memory,
which holds because what one gives is copied before the next one runs. Nothing may wait for the device, nor copy from
memory that is not pinned, in what is recorded: so rotations and modulations are inputs.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from flux2_studio.engine.compiling import structure
from flux2_studio.engine.streaming import is_streamed
from flux2_studio.engine.tower import Tower
from flux2_studio.engine.transformer import Modulations, ReferenceCache, Rope, Transformer

LARGEST = 3072  # tokens, of all rows: 512 x 512 with CFG
MOST = 4  # recordings of a model

Run = Callable[[], Tensor]
# Records a run, which it may make or not; gives what makes it again, and where the result then is.
Record = Callable[[Run], tuple[Callable[[], object], Tensor]]


class CudaRecorder:
    """Records what is asked of the device in the current thread, for others may be loading or compiling."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        self._pool = graph.pool()
        return graph.replay, output


@dataclass(frozen=True, eq=False)
class Recording:
    """inputs: what it reads; output: what it writes. held: what must live as long as it is replayed."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    replay: Callable[[], object]
    held: object

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.replay()
        return self.output.clone()


@dataclass(eq=False)
class _Recorded:
    """Of one model, as it was when it had this `identity`: its recordings, the last used last, and the shapes that ran
    as they are written."""

    identity: Hashable
    recordings: OrderedDict[Hashable, Recording] = field(default_factory=OrderedDict)
    seen: set[Hashable] = field(default_factory=set)


class Replays:
    """Records and replays the runs of models. For the thread that runs them, all under `torch.inference_mode`.

    record: how a run is recorded. trouble: why one could not be; nothing more is recorded then.
    """

    def __init__(self, record: Record | None = None) -> None:
        self._record = record or CudaRecorder()
        self._models: WeakKeyDictionary[Transformer | Tower, _Recorded] = WeakKeyDictionary()
        self.trouble: str | None = None

    def attach(self, model: Transformer | Tower) -> None:
        """Have the runs of `model`, as it is now, recorded and replayed from now on. One whose blocks are streamed runs
        as it is written."""
        vars(model).pop(_entry(model), None)
        if self.trouble is not None or any(is_streamed(module) for module in model.modules()):
            self.forget(model)
            return
        identity = _identity(model)
        recorded = self._models.get(model)
        if recorded is None or recorded.identity != identity:
            recorded = self._models[model] = _Recorded(identity)
        itself: Any = ref(model)  # what a model holds must not hold the model
        run = self._velocity if isinstance(model, Transformer) else self._read
        vars(model)[_entry(model)] = partial(run, itself, recorded)

    def forget(self, model: Transformer | Tower) -> None:
        """Have `model` run as it is written, and give back what its recordings hold."""
        vars(model).pop(_entry(model), None)
        self._models.pop(model, None)

    def clear(self) -> None:
        """`forget` every model."""
        for model in list(self._models):
            self.forget(model)

    def _velocity(
        self,
        model_of: Callable[[], Transformer],
        recorded: _Recorded,
        x: Tensor,
        ctx: Tensor,
        modulations: Modulations,
        rope: Rope,
        *,
        outputs: int | None = None,
        cache: ReferenceCache | None = None,
    ) -> Tensor:
        model = model_of()
        if cache is not None:
            return Transformer.velocity(model, x, ctx, modulations, rope, outputs=outputs, cache=cache)

        def run(x: Tensor, ctx: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> Tensor:
            again = modulations.like(rest)
            return Transformer.velocity(model, x, ctx, again, Rope(cos, sin), outputs=outputs)

        inputs = (x, ctx, rope.cos, rope.sin, *modulations.tensors)
        held = [vars(block).get("forward") for block in (*model.double_blocks, *model.single_blocks)]
        return self._run(recorded, run, inputs, outputs, x.shape[0] * (x.shape[1] + ctx.shape[1]), held)

    def _read(
        self,
        model_of: Callable[[], Tower],
        recorded: _Recorded,
        x: Tensor,
        mask: Tensor,
        cos: Tensor,
        sin: Tensor,
        taps: Sequence[int],
    ) -> Tensor:
        run = partial(Tower.through, model_of(), taps=taps)
        return self._run(recorded, run, (x, mask, cos, sin), tuple(taps), x.shape[0] * x.shape[1], None)

    def _run(
        self,
        recorded: _Recorded,
        run: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        how: Hashable,
        tokens: int,
        held: object,
    ) -> Tensor:
        """`run` with `inputs`, as it is written, recorded or replayed. how: what it depends on but for its inputs."""
        key = how, tuple((given.shape, given.dtype, given.device) for given in inputs)
        if (found := recorded.recordings.get(key)) is not None:
            recorded.recordings.move_to_end(key)
            return found(inputs)
        if tokens > LARGEST or self.trouble is not None:
            return run(*inputs)
        if key not in recorded.seen:
            recorded.seen.add(key)
            return run(*inputs)
        own = tuple(given.clone() for given in inputs)
        try:
            replay, output = self._record(lambda: run(*own))
        except RuntimeError as error:  # also for want of memory
            self.trouble = next(iter(str(error).splitlines()), type(error).__name__)
            self.clear()
            return run(*inputs)
        while len(recorded.recordings) >= MOST:
            recorded.recordings.popitem(last=False)
        recorded.recordings[key] = Recording(own, output, replay, held)
        return recorded.recordings[key](inputs)


def _entry(model: Transformer | Tower) -> str:
    """The name of the method whose runs are recorded."""
    return "velocity" if isinstance(model, Transformer) else "through"


def _identity(model: Transformer | Tower) -> Hashable:
    """What a recording depends on: where the weights are, which layers there are, and, where LoRAs may change them,
    how these are set and whether they run compiled."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    places = tuple(tensor.data_ptr() for tensor in tensors)
    if not isinstance(model, Transformer):
        return places, tuple(map(id, model.modules()))
    return places, structure(model), tuple("forward" in vars(module) for module in model.modules())
