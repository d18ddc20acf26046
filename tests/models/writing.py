"""What the tests of language models that write share: managers with toy checkpoints, and what is on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from flux2_studio.checkpoints import GB, LOCAL_WRITERS, Checkpoint, LocalWriter
from flux2_studio.engine.text.writer import Writer
from flux2_studio.models.checkpoint_files import PartKey
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.plan import RequestShape
from flux2_studio.models.session import Session
from flux2_studio.settings import Settings

CPU = torch.device("cpu")
SMALL = RequestShape(width=64, height=64)
QWEN, MISTRAL = (next(it for it in LOCAL_WRITERS if it.name == name) for name in ("qwen3-4b", "mistral"))
TOKENS = 400


def silent(text: str, fraction: float | None) -> None:
    pass


class Told:
    """What was told, but for how far something is."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str, fraction: float | None) -> None:
        if fraction is None:
            self.texts.append(text)

    @property
    def loads(self) -> list[str]:
        return [text for text in self.texts if text.startswith("Loading")]


def manager(settings: Settings, **fields: Any) -> ModelManager:
    return ModelManager(settings, Hub(settings), **fields)


def limited(settings: Settings, size: float) -> Settings:
    """`settings` under which weights and activations may take `size` bytes."""
    return replace(settings, memory_limit_gb=(size * 1.02 + 2) / GB)


def wrote(writer: Writer, seed: int = 3) -> str:
    return "".join(writer.write("make a painting", "a red cat", seed=seed, max_tokens=12, temperature=0.8))


def keys(models: ModelManager, part: Any = None) -> list[PartKey]:
    """Of what is on the device."""
    held = [key for key in models._residency._entries if models._residency.device_bytes_of(key)]
    return [key for key in held if part in (None, key.part)]


def alone(settings: Settings, checkpoint: Checkpoint) -> torch.Tensor:
    """The context of "a fox" by the plain text encoder."""
    return manager(settings).open(checkpoint, SMALL, silent).encode_prompts(["a fox"], silent).context


# --- when the whole model would cost too much ---


def peaks(settings: Settings, checkpoint: Checkpoint, model: LocalWriter, workload: RequestShape) -> tuple[int, int]:
    """Of the plan with the encoder, and with the whole writer, when there is no limit."""
    plain = manager(settings).predict_plan(checkpoint, workload).peak
    models = manager(settings)
    models.acquire_writer(model, silent, tokens=TOKENS)
    return plain, models.predict_plan(checkpoint, workload).peak


# --- asking ---


def whole(models: ModelManager, checkpoint: Checkpoint) -> Session:
    return models.open(checkpoint, SMALL, silent, load_vision_model=True)
