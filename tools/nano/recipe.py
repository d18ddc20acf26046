"""What a run is made of, read from recipes/*.json: unknown keys are errors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of a run. Learning rates decay to 0 over the last `decay` of `minutes`, whatever the machine manages."""

    subjects: int  # how many of subjects.json are taught
    side: int  # pixels
    minutes: float
    batch: int
    rate: float
    decay: float = 0.5
    warmup: int = 100  # steps
    weight_decay: float = 0.01
    ema: float = 0.995
    shift: float = 6.0  # of t towards 1: the sampler's own schedule hardly ever goes below 0.5
    caption_dropout: float = 0.1
    text_length: int = 40
    by_references: dict[str, float]  # share of batches with 0, 1, 2, 3 references
    kinds: dict[str, float]  # share of every kind among those with as many references
    pools: dict[str, int]  # how many different samples of a kind there are
    transformer: dict[str, int] = field(default_factory=dict)  # sizes, where there is no checkpoint to start from

    @classmethod
    def read(cls, path: Path) -> Recipe:
        return cls(**json.loads(path.read_text("utf-8")))
