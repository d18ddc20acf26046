"""Who has transformers' blocks compiled, and when they run so: beside the runs, and from the next run on.

Nobody waits for a compiler. Until it is done, pictures are drawn with the blocks as they are written, those of models
that were compiled already, too: torch calls no compiled code while it compiles. A picture is never drawn with both.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence

import torch

from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.runtime.compiling import CompileError, Compiler, Order, Variant
from flux2_studio.models.memory.choices import LARGE
from flux2_studio.record import AS_WRITTEN, COMPILED
from flux2_studio.settings import Compile

# Kinds of blocks that are compiled for one run. A LoRA with a rank of its own for each layer would take all of a model
# to the compiler, for an hour.
MOST = 4


class CompiledBlocks:
    """A `Compiler` in a thread of its own. `use` is for the thread that runs models.

    choice: on, off, or auto: for large transformers on NVIDIA's cards, where torch has its compiler (Triton).
    """

    def __init__(self, choice: Compile, device: torch.device, compiler: Compiler) -> None:
        triton = importlib.util.find_spec("triton") is not None
        self._least = {"on": 0, "auto": LARGE}.get(choice)
        if choice == "auto" and (device.type != "cuda" or not triton):
            self._least = None
        self._compiler = compiler
        self._thread: threading.Thread | None = None
        self._failed = False
        self._trouble: dict[str, bool] = {}  # why something is not compiled, and whether that was said

    def use(self, model: Transformer, size: int, needed: Sequence[Variant]) -> bool:
        """Whether the blocks of `model` run compiled from now on; otherwise they are being compiled, if they are to be.

        size: of the model's weights in bfloat16, in bytes. needed: what the next run takes.
        """
        if not self._wanted(size):
            return False
        if self.busy:
            self._compiler.detach(model)
            return False
        if self._compiler.attach(model, *needed):
            return True
        orders = [order for variant in needed if (order := self._compiler.order(model, variant)).blocks]
        if any(len(order.blocks) > MOST for order in orders):
            self._trouble.setdefault("the LoRAs change every block in another way", False)
        elif orders:
            self._thread = threading.Thread(target=self._compile, args=(orders,), name="compiler", daemon=True)
            self._thread.start()
        return False

    def outlook(self, size: int) -> str:
        """How the blocks of a model of `size` bytes run, once they are compiled if they are to be."""
        return COMPILED if self._wanted(size) and not self._failed else AS_WRITTEN

    @property
    def busy(self) -> bool:
        """Whether something is being compiled."""
        return self._thread is not None and self._thread.is_alive()

    def settle(self) -> None:
        """Wait until nothing is being compiled."""
        if self._thread is not None:
            self._thread.join()

    def notes(self) -> tuple[str, ...]:
        """Why blocks are not compiled that should be; each said once."""
        fresh = [reason for reason, said in self._trouble.items() if not said]
        self._trouble.update(dict.fromkeys(fresh, True))
        return tuple(
            f"The transformer's blocks cannot be compiled here ({reason}), so pictures take longer than they might. "
            f"FLUX2_COMPILE=off stops the attempts."
            for reason in fresh
        )

    def _wanted(self, size: int) -> bool:
        return self._least is not None and size >= self._least

    def _compile(self, orders: Sequence[Order]) -> None:
        try:
            for order in orders:
                self._compiler.compile(order)
        except CompileError as error:
            if error.lasting:  # otherwise the next run orders it again
                self._trouble.setdefault(str(error), False)
                self._failed = True
