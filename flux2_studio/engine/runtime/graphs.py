"""Captures and replays a model's runs as CUDA graphs, which launch hundreds of kernels in one call.

Captures what a transformer or a text decoder computes, for each recurring shape, and replays it with other inputs. Out
of scope: whether that is worth its memory (`models/cuda_graphs.py`).

A small run takes less time on the GPU than the CPU needs to launch its kernels one by one. A replay runs the very same
kernels on the very same weights, so the result is bit-identical and one picture may mix both.

The first run of a shape is eager, the second is captured. Large runs are never captured, because launching their
kernels overlaps with the GPU's work. Runs with a reference cache are not captured either, because they write to it.

Pitfalls: a graph contains the addresses of all its tensors. `attach` detects whether they, and everything else the
graph depends on, are unchanged; call it before every run that may follow a change. A model's graphs share one memory
pool. That is safe because each result is copied before the next replay. Nothing else can use the pool while one of the
graphs lives. Captured code must not synchronise with the device, nor copy from unpinned memory, so rope tables and
modulations are inputs.
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

MAX_GRAPH_TOKENS = 3072  # in all rows together: 512 x 512 with CFG
MAX_GRAPHS_PER_MODEL = 4

RunFn = Callable[[], Tensor]
# Captures a run (and may or may not execute it). Returns a replay function and the tensor that replays write.
CaptureFn = Callable[[RunFn], tuple[Callable[[], object], Tensor]]


class CudaGraphCapture:
    """Captures runs of one model on `device`. Only the current thread's work is captured, since other threads may be
    loading. No thread may synchronise the whole device meanwhile, as a compiler does while it benchmarks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None  # torch's default would be on the first device ever captured on
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, run: RunFn) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        live_graph = next(iter(self._graphs), None)  # its pool can be shared; a dead graph's pool is gone
        with torch.cuda.device(self._device):
            self._stream = self._stream or torch.cuda.Stream()
            pool = torch.cuda.graph_pool_handle() if live_graph is None else live_graph.pool()
            # Entered here as well, because torch does not leave the stream if capturing fails.
            with torch.cuda.stream(self._stream):
                try:
                    with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                        output = run()
                except RuntimeError:
                    # Nor does torch always stop allocating from the pool.
                    with contextlib.suppress(RuntimeError):
                        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                    raise
        self._graphs.add(graph)
        return graph.replay, output


@dataclass(frozen=True, eq=False)
class CapturedGraph:
    """A captured run. inputs: the tensors it reads. output: the tensor it writes. keep_alive: objects that must live
    as long as the graph.
    """

    inputs: tuple[Tensor, ...]
    output: Tensor
    replay: Callable[[], object]
    keep_alive: object

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for static, new in zip(self.inputs, inputs, strict=True):
            static.copy_(new)
        self.replay()
        return self.output.clone()


@dataclass(eq=False)
class _ModelGraphs:
    """The graphs of one model in the state `identity`, least recently used first, made by `capture`. seen_shapes:
    shapes that have run eagerly once.
    """

    identity: Hashable
    capture: CaptureFn
    graphs: OrderedDict[Hashable, CapturedGraph] = field(default_factory=OrderedDict)
    seen_shapes: set[Hashable] = field(default_factory=set)
    out_of_memory_shapes: set[Hashable] = field(default_factory=set)  # shapes whose capture ran out of memory


class GraphRunner:
    """Captures and replays the runs of models. Use it only in the thread that runs them, under `torch.inference_mode`.

    make_capture: makes the capture function for one model, see `CudaGraphCapture`. is_paused: replay existing graphs,
    but capture no new ones. error: why a capture failed; nothing is captured or replayed afterwards.
    """

    def __init__(self, make_capture: Callable[[], CaptureFn]) -> None:
        self._make_capture = make_capture
        self._graphs_by_model: WeakKeyDictionary[Transformer | TextDecoder, _ModelGraphs] = WeakKeyDictionary()
        self.is_paused = False
        self.error: str | None = None

    def attach(self, model: Transformer | TextDecoder) -> None:
        """Capture and replay the runs of `model`, in its present state, from now on. A model with streamed blocks
        stays eager.
        """
        vars(model).pop(_captured_method(model), None)
        if self.error is not None or any(is_streamed(module) for module in model.modules()):
            self.forget(model)
            return
        identity = _model_identity(model)
        model_graphs = self._graphs_by_model.get(model)
        if model_graphs is None or model_graphs.identity != identity:
            model_graphs = self._graphs_by_model[model] = _ModelGraphs(identity, self._make_capture())
        model_ref: Any = ref(model)  # weak, because the model itself will hold this
        run = self._run_velocity if isinstance(model, Transformer) else self._run_decoder_layers
        vars(model)[_captured_method(model)] = partial(run, model_ref, model_graphs)

    def forget(self, model: Transformer | TextDecoder) -> None:
        """Make `model` run eager, and free its graphs and their device memory."""
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

        def run(x: Tensor, ctx: Tensor, cos: Tensor, sin: Tensor, *modulation_tensors: Tensor) -> Tensor:
            new_modulations = modulations.with_tensors(modulation_tensors)
            return Transformer.velocity(model, x, ctx, new_modulations, Rope(cos, sin), outputs=outputs)

        inputs = (x, ctx, rope.cos, rope.sin, *modulations.tensors)
        compiled_forwards = [vars(block).get("forward") for block in (*model.double_blocks, *model.single_blocks)]
        return self._run_or_replay(
            model_graphs, run, inputs, outputs, x.shape[0] * (x.shape[1] + ctx.shape[1]), compiled_forwards
        )

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
        """Run `run(*inputs)` eagerly, or capture it, or replay it. static_key: everything besides the inputs that
        the run depends on.
        """
        key = static_key, tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in inputs)
        if (graph := model_graphs.graphs.get(key)) is not None:
            model_graphs.graphs.move_to_end(key)
            return graph(inputs)
        if tokens > MAX_GRAPH_TOKENS or key in model_graphs.out_of_memory_shapes or self.error is not None:
            return run(*inputs)
        if self.is_paused or key not in model_graphs.seen_shapes:
            model_graphs.seen_shapes.add(key)
            return run(*inputs)
        captured = self._capture(model_graphs, run, inputs, key, keep_alive)
        return run(*inputs) if captured is None else captured(inputs)

    def _capture(
        self,
        model_graphs: _ModelGraphs,
        run: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        key: Hashable,
        keep_alive: object,
    ) -> CapturedGraph | None:
        """Capture `run` and store the graph. Returns None if that fails; nothing of the attempt remains then."""
        static_inputs = tuple(tensor.clone() for tensor in inputs)
        try:
            replay, output = model_graphs.capture(lambda: run(*static_inputs))
        except RuntimeError as error:
            root = _root_error(error)
            if isinstance(root, torch.OutOfMemoryError):
                model_graphs.out_of_memory_shapes.add(key)
            else:
                self.error = next(iter(str(root).splitlines()), type(root).__name__)
                self.clear()
            return None
        while len(model_graphs.graphs) >= MAX_GRAPHS_PER_MODEL:
            model_graphs.graphs.popitem(last=False)
        model_graphs.graphs[key] = CapturedGraph(static_inputs, output, replay, keep_alive)
        return model_graphs.graphs[key]


def _root_error(error: BaseException) -> BaseException:
    """Return the first error: ending a failed capture raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _captured_method(model: Transformer | TextDecoder) -> str:
    """Return the name of the method that is captured."""
    return "velocity" if isinstance(model, Transformer) else "run_layers"


def _model_identity(model: Transformer | TextDecoder) -> Hashable:
    """Return what a graph depends on: addresses of the weights and the modules. For transformers, where LoRAs may
    change both, also the layers' settings and which blocks are compiled.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    places = tuple(tensor.data_ptr() for tensor in tensors)
    if not isinstance(model, Transformer):
        return places, tuple(map(id, model.modules()))
    return places, structure_key(model), tuple("forward" in vars(module) for module in model.modules())
