"""A compiler for tests that compiles nothing, and counts what it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
