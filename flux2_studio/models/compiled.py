"""Who has transformers' blocks compiled, and when they run so: beside the runs, and from the next run on.

Nobody waits for a compiler. Until it is done, pictures are drawn with the blocks as they are written; a picture is
never drawn with both.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence

import torch

from flux2_studio.engine.compiling import CompileError, Compiler, Order, Variant
from flux2_studio.engine.transformer import Transformer
from flux2_studio.models.choices import LARGE
from flux2_studio.settings import Compile

AS_WRITTEN, COMPILED = "as written", "compiled"


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
        self._trouble: str | None = None
        self._told = False

    def use(self, model: Transformer, size: int, needed: Sequence[Variant]) -> bool:
        """Whether the blocks of `model` run compiled from now on; otherwise they are being compiled, if they are to be.

        size: of the model's weights in bfloat16, in bytes. needed: what the next run takes.
        """
        if not self._wanted(size):
            return False
        if self._compiler.attach(model, *needed):
            return True
        if self._trouble is None and not self.busy:
            orders = [self._compiler.order(model, variant) for variant in needed]
            self._thread = threading.Thread(target=self._compile, args=(orders,), name="compiler", daemon=True)
            self._thread.start()
        return False

    def outlook(self, size: int) -> str:
        """How the blocks of a model of `size` bytes will run, in words."""
        return "compiled, once they are" if self._wanted(size) and self._trouble is None else AS_WRITTEN

    @property
    def busy(self) -> bool:
        """Whether something is being compiled."""
        return self._thread is not None and self._thread.is_alive()

    def settle(self) -> None:
        """Wait until nothing is being compiled."""
        if self._thread is not None:
            self._thread.join()

    def notes(self) -> tuple[str, ...]:
        """Why nothing is compiled, where it should be and cannot; said once."""
        if self._trouble is None or self._told:
            return ()
        self._told = True
        return (
            f"The transformer's blocks cannot be compiled here ({self._trouble}), so pictures take longer than they "
            f"might. FLUX2_COMPILE=off stops the attempts.",
        )

    def _wanted(self, size: int) -> bool:
        return self._least is not None and size >= self._least

    def _compile(self, orders: Sequence[Order]) -> None:
        try:
            for order in orders:
                self._compiler.compile(order)
        except CompileError as error:
            self._trouble = str(error)
