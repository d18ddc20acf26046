"""Example prompts from assets/examples/examples.json, some with reference pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flux2_studio.checkpoints import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Example:
    prompt: str
    references: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples by form name, for toy checkpoints and for all others."""

    folder: Path
    toy: dict[str, tuple[Example, ...]]
    full: dict[str, tuple[Example, ...]]

    @classmethod
    def load(cls, folder: Path) -> Examples:
        table = json.loads((folder / "examples.json").read_text(encoding="utf-8"))

        def read(kind: str) -> dict[str, tuple[Example, ...]]:
            return {
                form: tuple(
                    Example(
                        prompt=entry["prompt"], references=tuple(folder / name for name in entry.get("references", ()))
                    )
                    for entry in entries
                )
                for form, entries in table[kind].items()
            }

        return cls(folder=folder, toy=read("toy"), full=read("full"))

    def of(self, form: str, checkpoint: Checkpoint) -> tuple[Example, ...]:
        return (self.toy if checkpoint.is_toy else self.full).get(form, ())
