"""Compiles transformer blocks in the background; the next run after that uses the compiled blocks.

No run waits for the compiler. While it works, all models run eagerly, even those compiled earlier, because torch runs
no compiled code while it compiles. A picture is never drawn with both.
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

# Largest number of distinct blocks compiled for one run. A LoRA with a different rank in each layer would otherwise
# compile every block of the model, which takes an hour.
MAX_BLOCK_KINDS = 4


class BackgroundCompiler:
    """Runs a `Compiler` in a background thread. Call `try_use` only from the thread that runs models.

    choice: on, off or auto. auto compiles large transformers on CUDA devices if Triton is installed.
    """

    def __init__(self, choice: CompileMode, device: torch.device, compiler: Compiler) -> None:
        has_triton = importlib.util.find_spec("triton") is not None
        self._min_model_bytes = {"on": 0, "auto": LARGE_MODEL_BYTES}.get(choice)
        if choice == "auto" and (device.type != "cuda" or not has_triton):
            self._min_model_bytes = None
        self._compiler = compiler
        self._thread: threading.Thread | None = None
        self._failed = False
        self._trouble: dict[str, bool] = {}  # why blocks are not compiled, and whether the user was notified

    def try_use(self, model: Transformer, size: int, variants: Sequence[CompileKey]) -> bool:
        """Switches `model` to its compiled blocks and returns True if they are ready. Otherwise returns False, and
        starts to compile them if they should be compiled.

        size: of the model's weights in bfloat16, in bytes. variants: the compile keys that the next run needs.
        """
        if not self._wanted(size):
            return False
        if self.is_compiling:
            self._compiler.detach(model)
            return False
        if self._compiler.attach(model, *variants):
            return True
        jobs = [job for variant in variants if (job := self._compiler.make_job(model, variant)).blocks]
        if any(len(job.blocks) > MAX_BLOCK_KINDS for job in jobs):
            self._trouble.setdefault("the LoRAs change every block in another way", False)
        elif jobs:
            self._thread = threading.Thread(target=self._compile, args=(jobs,), name="compiler", daemon=True)
            self._thread.start()
        return False

    def expected_mode(self, size: int) -> str:
        """Returns how the blocks of a model of `size` bytes will run after any compilation has finished."""
        return COMPILED_BLOCKS if self._wanted(size) and not self._failed else EAGER_BLOCKS

    @property
    def is_compiling(self) -> bool:
        """Whether the compiler is running."""
        return self._thread is not None and self._thread.is_alive()

    def wait_until_idle(self) -> None:
        """Waits until the compiler has finished."""
        if self._thread is not None:
            self._thread.join()

    def take_notes(self) -> tuple[str, ...]:
        """Returns messages about why blocks that should be compiled are not, each only once."""
        new_reasons = [reason for reason, was_reported in self._trouble.items() if not was_reported]
        self._trouble.update(dict.fromkeys(new_reasons, True))
        return tuple(
            f"The transformer's blocks cannot be compiled here ({reason}), so pictures take longer than they might. "
            f"FLUX2_COMPILE=off stops the attempts."
            for reason in new_reasons
        )

    def _wanted(self, size: int) -> bool:
        return self._min_model_bytes is not None and size >= self._min_model_bytes

    def _compile(self, jobs: Sequence[CompileJob]) -> None:
        try:
            for job in jobs:
                self._compiler.compile(job)
        except CompileError as error:
            if error.is_permanent:  # otherwise the next run tries again
                self._trouble.setdefault(str(error), False)
                self._failed = True
