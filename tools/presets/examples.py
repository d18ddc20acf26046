"""Draws the example pictures of the presets that the toy checkpoint on board can draw, into presets/examples/.

    .venv/bin/python -m tools.presets.examples

draws all of them anew (a second each on a CPU), as the page would: by the studio, with the preset's own example
subject. A preset that takes pictures shows those before what came out. Without random: the same files again on the
same machine, and nearly the same ones elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from flux2_studio.checkpoints import NANO
from flux2_studio.events import Result
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.storage.presets import Preset, Presets, apply_preset
from flux2_studio.studio import Studio

SIDE = 128  # pixels of each picture of an example
GAP = 6
SEEDS: Mapping[str, int] = {}  # of those that look better with another one than 1
# What presets that take pictures are shown with: of assets/examples, or a preset's own example, drawn before.
REFERENCES: Mapping[str, tuple[str, ...]] = {
    "icon-paint": ("rocket",),
    "icon-ground": ("penguin",),
    "icon-cut-out": ("fox",),
    "icon-grey": ("fox",),
    "icon-to-line": ("penguin",),
    "icon-change": ("penguin",),
    "icon-like": ("penguin", "icon-line"),
    "icon-onto": ("car", "rocket"),
}


def drawn(studio: Studio, preset: Preset, references: Sequence[Path], seed: int) -> list[Path]:
    """The pictures that `preset` makes of `references` with its example subject."""
    values = apply_preset(preset, "", NANO).values
    request = replace(
        Request.from_dict({**values, "checkpoint": NANO.name}),
        references=tuple(references),
        width=SIDE,
        height=SIDE,
        seed=seed,
        watermark=False,  # a picture so small holds none
        metadata=False,
        sign=False,
    )
    *_, end = studio.generate(request, lambda: False)
    assert isinstance(end, Result), end
    return list(end.images)


def sheet(before: Sequence[Path], after: Sequence[Path]) -> Image.Image:
    """Pictures side by side, those that something was made of a little smaller than what came out, on nothing."""
    small = SIDE * 3 // 4
    tiles = [(path, small) for path in before] + [(path, SIDE) for path in after]
    out = Image.new("RGBA", (sum(side for _, side in tiles) + GAP * (len(tiles) - 1), SIDE))
    x = 0
    for path, side in tiles:
        with Image.open(path) as image:
            tile = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        out.paste(tile, (x, (SIDE - side) // 2))
        x += side + GAP
    return out


def make_room(presets: Path) -> None:
    """An empty file for each picture that was never drawn, without which its preset cannot be read."""
    for path in presets.glob("*.json"):
        if picture := json.loads(path.read_text(encoding="utf-8")).get("picture"):
            (presets / "examples" / picture).touch()


def reference(folder: Path, settings: Settings, name: str) -> Path:
    own = settings.assets / "examples" / f"{name}.png"
    return own if own.is_file() else folder / f"{name}.webp"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the presets' example pictures with the toy checkpoint.")
    parser.add_argument("--out", type=Path, help="another folder than presets/examples")
    parser.add_argument("--only", metavar="NAME", action="append", help="a preset's file without .json; repeatable")
    options = parser.parse_args(arguments)
    make_room(Settings(home=Path()).presets)
    presets = Presets.load(Settings(home=Path()).presets)
    with tempfile.TemporaryDirectory() as home:
        settings = replace(Settings(home=Path(home)), preview="off", safety="off", device="cpu")
        settings.set_environment_defaults()
        folder = options.out or settings.presets / "examples"
        folder.mkdir(parents=True, exist_ok=True)
        studio = Studio(settings)
        for slug, preset in sorted(presets.by_slug.items(), key=lambda it: (it[0] in REFERENCES, it[0])):
            if preset.picture is None or slug not in (options.only or [slug]):
                continue
            given = [reference(settings.presets / "examples", settings, name) for name in REFERENCES.get(slug, ())]
            made = sheet(given, drawn(studio, preset, given, SEEDS.get(slug, 1)))
            made.save(folder / f"{slug}.webp", quality=90, method=6)
            print(folder / f"{slug}.webp")
    for problem in presets.problems:
        print(problem, file=sys.stderr)
    return 1 if presets.problems else 0


if __name__ == "__main__":
    sys.exit(main())
