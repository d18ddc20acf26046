"""Runs of a model recorded as CUDA graphs: hundreds of kernels that the processor asks for at once.

Does: records what a transformer or a text encoder's tower computes, for each shape that comes again, and replays it
with other inputs. Does not know: when that is worth its memory (`models/replayed.py`).

A small run is over sooner than its kernels can be asked for one by one. Replayed, the very same kernels run on the very
same weights: the result is the same to the bit, so that one picture may be drawn with both.

The first run of a shape is as it is written, the second is recorded. Larger runs are never recorded, for the device is
busy while their kernels are asked for; nor are those with a reference cache, which write to it.

Pitfalls: a recording has the addresses of all tensors in it. `attach` tells whether they, and what else it was made
from, are as they were, and must be called before every run that may follow a change. A model's recordings share their
memory, which holds because what one gives is copied before the next one runs; nothing else can have that memory while
one of them lives. Nothing may wait for the device, nor copy from memory that is not pinned, in what is recorded: so
rotations and modulations are inputs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor

from flux2_studio.engine.flux.transformer import Modulations, ReferenceCache, Rope, Transformer
from flux2_studio.engine.runtime.compiling import structure_key
from flux2_studio.engine.runtime.streaming import is_streamed
from flux2_studio.engine.text.decoder import TextDecoder

MAX_GRAPH_TOKENS = 3072  # tokens, of all rows: 512 x 512 with CFG
MAX_GRAPHS_PER_MODEL = 4  # recordings of a model

RunFn = Callable[[], Tensor]
# Records a run, which it may make or not; gives what makes it again, and where the result then is.
CaptureFn = Callable[[RunFn], tuple[Callable[[], object], Tensor]]


class CudaGraphCapture:
    """Records runs of one model on `device`: what the current thread asks of it, for others may be loading. Nobody may
    wait for the whole device meanwhile, as a compiler does that measures."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None  # torch's own would be that of the first device ever recorded on
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, run: RunFn) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        living = next(iter(self._graphs), None)  # whose memory this may use, too; a dead one's is gone
        with torch.cuda.device(self._device):
            self._stream = self._stream or torch.cuda.Stream()
            pool = torch.cuda.graph_pool_handle() if living is None else living.pool()
            # Entered here, too: where recording fails, torch does not leave it.
            with torch.cuda.stream(self._stream):
                try:
                    with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                        output = run()
                except RuntimeError:
                    # Nor does it always end what makes memory be taken from the pool.
                    with contextlib.suppress(RuntimeError):
                        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                    raise
        self._graphs.add(graph)
        return graph.replay, output


@dataclass(frozen=True, eq=False)
class CapturedGraph:
    """inputs: what it reads; output: what it writes. keep_alive: what must live as long as it is replayed."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    replay: Callable[[], object]
    keep_alive: object

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.replay()
        return self.output.clone()


@dataclass(eq=False)
class _ModelGraphs:
    """Of one model, as it was when it had this `identity`: its recordings, the last used last, which `capture` made,
    and the shapes that ran as they are written."""

    identity: Hashable
    capture: CaptureFn
    graphs: OrderedDict[Hashable, CapturedGraph] = field(default_factory=OrderedDict)
    seen_shapes: set[Hashable] = field(default_factory=set)
    out_of_memory_shapes: set[Hashable] = field(default_factory=set)  # for want of memory


class GraphRunner:
    """Records and replays the runs of models. For the thread that runs them, all under `torch.inference_mode`.

    recorder: makes what records the runs of one model, see `CudaGraphCapture`. is_paused: whether nothing is recorded
    for now, and only replayed. error: why a run could not be recorded; nothing more is recorded then.
    """

    def __init__(self, make_capture: Callable[[], CaptureFn]) -> None:
        self._make_capture = make_capture
        self._graphs_by_model: WeakKeyDictionary[Transformer | TextDecoder, _ModelGraphs] = WeakKeyDictionary()
        self.is_paused = False
        self.error: str | None = None

    def attach(self, model: Transformer | TextDecoder) -> None:
        """Have the runs of `model`, as it is now, recorded and replayed from now on. One whose blocks are streamed runs
        as it is written."""
        vars(model).pop(_captured_method(model), None)
        if self.error is not None or any(is_streamed(module) for module in model.modules()):
            self.forget(model)
            return
        identity = _model_identity(model)
        recorded = self._graphs_by_model.get(model)
        if recorded is None or recorded.identity != identity:
            recorded = self._graphs_by_model[model] = _ModelGraphs(identity, self._make_capture())
        itself: Any = ref(model)  # what a model holds must not hold the model
        run = self._run_velocity if isinstance(model, Transformer) else self._run_decoder_layers
        vars(model)[_captured_method(model)] = partial(run, itself, recorded)

    def forget(self, model: Transformer | TextDecoder) -> None:
        """Have `model` run as it is written, and drop its recordings and what they hold of the device's memory."""
        vars(model).pop(_captured_method(model), None)
        self._graphs_by_model.pop(model, None)

    def clear(self) -> None:
        """`forget` every model."""
        for model in list(self._graphs_by_model):
            self.forget(model)

    def _run_velocity(
        self,
        model_of: Callable[[], Transformer],
        model_graphs: _ModelGraphs,
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
            again = modulations.with_tensors(rest)
            return Transformer.velocity(model, x, ctx, again, Rope(cos, sin), outputs=outputs)

        inputs = (x, ctx, rope.cos, rope.sin, *modulations.tensors)
        held = [vars(block).get("forward") for block in (*model.double_blocks, *model.single_blocks)]
        return self._run_or_replay(model_graphs, run, inputs, outputs, x.shape[0] * (x.shape[1] + ctx.shape[1]), held)

    def _run_decoder_layers(
        self,
        model_of: Callable[[], TextDecoder],
        model_graphs: _ModelGraphs,
        x: Tensor,
        mask: Tensor,
        cos: Tensor,
        sin: Tensor,
        hidden_layers: Sequence[int],
    ) -> Tensor:
        run = partial(TextDecoder.run_layers, model_of(), hidden_layers=hidden_layers)
        return self._run_or_replay(
            model_graphs, run, (x, mask, cos, sin), tuple(hidden_layers), x.shape[0] * x.shape[1], None
        )

    def _run_or_replay(
        self,
        model_graphs: _ModelGraphs,
        run: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        static_key: Hashable,
        tokens: int,
        keep_alive: object,
    ) -> Tensor:
        """`run` with `inputs`, as it is written, recorded or replayed. static_key: what it depends on but for its
        inputs."""
        key = static_key, tuple((given.shape, given.stride(), given.dtype, given.device) for given in inputs)
        if (found := model_graphs.graphs.get(key)) is not None:
            model_graphs.graphs.move_to_end(key)
            return found(inputs)
        if tokens > MAX_GRAPH_TOKENS or key in model_graphs.out_of_memory_shapes or self.error is not None:
            return run(*inputs)
        if self.is_paused or key not in model_graphs.seen_shapes:
            model_graphs.seen_shapes.add(key)
            return run(*inputs)
        recording = self._capture(model_graphs, run, inputs, key, keep_alive)
        return run(*inputs) if recording is None else recording(inputs)

    def _capture(
        self,
        model_graphs: _ModelGraphs,
        run: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        key: Hashable,
        keep_alive: object,
    ) -> CapturedGraph | None:
        """`run` recorded and kept, or None where that cannot be: then nothing of the attempt is left."""
        own = tuple(given.clone() for given in inputs)
        try:
            replay, output = model_graphs.capture(lambda: run(*own))
        except RuntimeError as error:
            first = _root_error(error)
            if isinstance(first, torch.OutOfMemoryError):
                model_graphs.out_of_memory_shapes.add(key)
            else:
                self.error = next(iter(str(first).splitlines()), type(first).__name__)
                self.clear()
            return None
        while len(model_graphs.graphs) >= MAX_GRAPHS_PER_MODEL:
            model_graphs.graphs.popitem(last=False)
        model_graphs.graphs[key] = CapturedGraph(own, output, replay, keep_alive)
        return model_graphs.graphs[key]


def _root_error(error: BaseException) -> BaseException:
    """What went wrong: ending a recording that failed raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _captured_method(model: Transformer | TextDecoder) -> str:
    """The name of the method whose runs are recorded."""
    return "velocity" if isinstance(model, Transformer) else "run_layers"


def _model_identity(model: Transformer | TextDecoder) -> Hashable:
    """What a recording depends on: where the weights are, which layers there are, and, where LoRAs may change them,
    how these are set and whether they run compiled."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    places = tuple(tensor.data_ptr() for tensor in tensors)
    if not isinstance(model, Transformer):
        return places, tuple(map(id, model.modules()))
    return places, structure_key(model), tuple("forward" in vars(module) for module in model.modules())
