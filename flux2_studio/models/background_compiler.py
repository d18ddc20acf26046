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
from flux2_studio.engine.runtime.compiling import CompileError, CompileJob, CompileKey, Compiler
from flux2_studio.models.memory.choices import LARGE_MODEL_BYTES
from flux2_studio.record import COMPILED_BLOCKS, EAGER_BLOCKS
from flux2_studio.settings import CompileMode

# Kinds of blocks that are compiled for one run. A LoRA with a rank of its own for each layer would take all of a model
# to the compiler, for an hour.
MAX_BLOCK_KINDS = 4


class BackgroundCompiler:
    """A `Compiler` in a thread of its own. `try_use` is for the thread that runs models.

    choice: on, off, or auto: for large transformers on NVIDIA's cards, where torch has its compiler (Triton).
    """

    def __init__(self, choice: CompileMode, device: torch.device, compiler: Compiler) -> None:
        triton = importlib.util.find_spec("triton") is not None
        self._min_model_bytes = {"on": 0, "auto": LARGE_MODEL_BYTES}.get(choice)
        if choice == "auto" and (device.type != "cuda" or not triton):
            self._min_model_bytes = None
        self._compiler = compiler
        self._thread: threading.Thread | None = None
        self._failed = False
        self._trouble: dict[str, bool] = {}  # why something is not compiled, and whether that was said

    def try_use(self, model: Transformer, size: int, variants: Sequence[CompileKey]) -> bool:
        """Whether the blocks of `model` run compiled from now on; otherwise they are being compiled, if they are to be.

        size: of the model's weights in bfloat16, in bytes. variants: what the next run takes.
        """
        if not self._wanted(size):
            return False
        if self.is_compiling:
            self._compiler.detach(model)
            return False
        if self._compiler.attach(model, *variants):
            return True
        orders = [order for variant in variants if (order := self._compiler.make_job(model, variant)).blocks]
        if any(len(order.blocks) > MAX_BLOCK_KINDS for order in orders):
            self._trouble.setdefault("the LoRAs change every block in another way", False)
        elif orders:
            self._thread = threading.Thread(target=self._compile, args=(orders,), name="compiler", daemon=True)
            self._thread.start()
        return False

    def expected_mode(self, size: int) -> str:
        """How the blocks of a model of `size` bytes run, once they are compiled if they are to be."""
        return COMPILED_BLOCKS if self._wanted(size) and not self._failed else EAGER_BLOCKS

    @property
    def is_compiling(self) -> bool:
        """Whether something is being compiled."""
        return self._thread is not None and self._thread.is_alive()

    def wait_until_idle(self) -> None:
        """Wait until nothing is being compiled."""
        if self._thread is not None:
            self._thread.join()

    def take_notes(self) -> tuple[str, ...]:
        """Why blocks are not compiled that should be; each said once."""
        fresh = [reason for reason, said in self._trouble.items() if not said]
        self._trouble.update(dict.fromkeys(fresh, True))
        return tuple(
            f"The transformer's blocks cannot be compiled here ({reason}), so pictures take longer than they might. "
            f"FLUX2_COMPILE=off stops the attempts."
            for reason in fresh
        )

    def _wanted(self, size: int) -> bool:
        return self._min_model_bytes is not None and size >= self._min_model_bytes

    def _compile(self, orders: Sequence[CompileJob]) -> None:
        try:
            for order in orders:
                self._compiler.compile(order)
        except CompileError as error:
            if error.is_permanent:  # otherwise the next run orders it again
                self._trouble.setdefault(str(error), False)
                self._failed = True
