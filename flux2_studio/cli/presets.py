"""`flux2-studio presets`, which lists them, and what `generate --preset` makes of one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flux2_studio.cli.terminal import one_line, print_lines
from flux2_studio.errors import PresetError
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.storage.presets import FormName, Preset, Presets, apply_preset, form_for, read_preset

FORM_REQUIREMENTS: Mapping[FormName, str] = {
    "generate": "makes a picture from words: leave --image out",
    "edit": "changes one picture: give it with --image",
    "multi": "combines pictures: give two or more with --image",
}


def add_presets_command(commands: argparse._SubParsersAction) -> None:
    """Add `presets` to the command line, with its function as its `run` default."""
    command = commands.add_parser(
        "presets",
        allow_abbrev=False,
        help="list the presets that generate --preset takes",
        description="List the presets: what each is for, and the words that its subject takes the place of.",
    )
    command.add_argument("--json", action="store_true", help="print all of them as JSON")
    command.set_defaults(run=run_presets)


def run_presets(options: argparse.Namespace) -> int:
    """`presets`: all that come with the studio, to stdout; files that are none, to stderr."""
    presets = Presets.load(Settings.from_environment().presets)
    if options.json:
        listed = [{"preset": slug, **preset.as_dict()} for slug, preset in presets.by_slug.items()]
        print_lines([json.dumps(listed, indent=2, ensure_ascii=False)])
    else:
        print_lines(_lines(presets))
    for problem in presets.problems:
        print(f"note: {one_line(problem)}", file=sys.stderr)
    return 0


def _lines(presets: Presets) -> Iterator[str]:
    group = ""
    for slug, preset in presets.by_slug.items():
        if preset.group != group:
            yield f"{chr(10) if group else ''}{preset.group}"
            group = preset.group
        pictures = {"generate": "", "edit": " (one --image)", "multi": " (several --image)"}[preset.form]
        yield f"  {slug}{pictures}"
        yield f"    {preset.description}"
        if preset.subject:
            yield f'    Subject, as in: "{preset.subject}"'


def complete_from_preset(given: Mapping[str, Any], name: str, images: int, settings: Settings) -> dict[str, Any]:
    """The fields of a request that are `given`, and of the others those that the preset `name` sets.

    A given prompt is the preset's subject, where it takes one. What the checkpoint cannot take is told on stderr.
    Raises `RequestError`, for a preset that takes another number of `images`, too.
    """
    preset = _find(name, settings)
    if form_for(images) != preset.form:
        raise PresetError(f"The preset {preset.name} {FORM_REQUIREMENTS[preset.form]}.")
    subject = str(given.get("prompt", "")) if preset.takes_subject else ""
    kept = {field: value for field, value in given.items() if field != "prompt" or not preset.takes_subject}
    # Half of a size says nothing of a shape.
    sized = {"width", "height"} if {"width", "height"} & kept.keys() else set()
    checkpoint = settings.checkpoint(given.get("checkpoint") or preset.request.get("checkpoint"))
    made = apply_preset(preset, subject, checkpoint, kept.keys() | sized)
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    read = Request.from_dict({"prompt": "a preset", **made.values})  # for its LoRAs as a request has them
    return {**{field: getattr(read, field) for field in made.values}, **kept}


def _find(name: str, settings: Settings) -> Preset:
    if name.endswith(".json"):
        return read_preset(Path(name))
    return Presets.load(settings.presets).find(name)
