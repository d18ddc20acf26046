"""Stand-ins for a compiler and for CUDA graphs, which count what they were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Graphs:
    """A backend that counts: graphs that were compiled, and how often one ran. They compute as torch does without."""

    made: int = 0
    ran: int = 0

    def __call__(self, module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        self.made += 1

        def run(*inputs: Any) -> Any:
            self.ran += 1
            return module.forward(*inputs)

        return run

    def since(self, run: Callable[[], Any]) -> tuple[Any, int, int]:
        """What `run` gives, how many graphs it made, and how many ran in it."""
        made, ran = self.made, self.ran
        result = run()
        return result, self.made - made, self.ran - ran


@dataclass
class Tape:
    """Records runs for tests without a GPU, as CUDA does: a recording reads its inputs and weights where they are, and
    writes its result where it wrote the first. Nothing that Python decided in the run is decided again."""

    recorded: int = 0
    replayed: int = 0
    trouble: str | None = None  # why nothing can be recorded

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.trouble is not None:
            raise RuntimeError(f"{self.trouble}\nwith more to read")
        self.recorded += 1
        with _Taping() as calls:
            output = run()

        def replay() -> None:
            self.replayed += 1
            for function, arguments, keywords, result in calls.made:
                _overwrite(result, function(*arguments, **keywords))

        return replay, output

    def since(self, run: Callable[[], Any]) -> tuple[Any, int, int]:
        """What `run` gives, how many runs it recorded, and how many it replayed."""
        recorded, replayed = self.recorded, self.replayed
        result = run()
        return result, self.recorded - recorded, self.replayed - replayed


class _Taping(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.made.append((function, args, kwargs or {}, result))
        return result


def _overwrite(old: Any, new: Any) -> None:
    """Put what was computed anew where it was; a view of it is there already."""
    if isinstance(old, Tensor):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)
    elif isinstance(old, list | tuple):
        for a, b in zip(old, new, strict=True):
            _overwrite(a, b)
