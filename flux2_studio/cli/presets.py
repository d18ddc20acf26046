"""`flux2-studio presets`, which lists them, and `generate --preset`."""

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
    """Add the `presets` command to the parser, with `run_presets` as its `run` default."""
    command = commands.add_parser(
        "presets",
        allow_abbrev=False,
        help="list the presets that generate --preset takes",
        description="List the presets: what each is for, and the words that its subject takes the place of.",
    )
    command.add_argument("--json", action="store_true", help="print all of them as JSON")
    command.set_defaults(run=run_presets)


def run_presets(options: argparse.Namespace) -> int:
    """`presets`: list the studio's presets on stdout; invalid files on stderr."""
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
    """Return the fields of a request: those in `given`, and the others that the preset `name` sets.

    A given prompt becomes the preset's subject, if it takes one. Values that the checkpoint cannot use are reported on
    stderr. Raises `PresetError`, also if the preset takes another number of `images`, and `RequestError`.
    """
    preset = _find(name, settings)
    if form_for(images) != preset.form:
        raise PresetError(f"The preset {preset.name} {FORM_REQUIREMENTS[preset.form]}.")
    subject = str(given.get("prompt", "")) if preset.takes_subject else ""
    overrides = {field: value for field, value in given.items() if field != "prompt" or not preset.takes_subject}
    # A given width or height replaces the preset's size completely: half of it would distort the shape.
    size_fields = {"width", "height"} if {"width", "height"} & overrides.keys() else set()
    checkpoint = settings.checkpoint(given.get("checkpoint") or preset.request.get("checkpoint"))
    applied = apply_preset(preset, subject, checkpoint, overrides.keys() | size_fields)
    for note in applied.notes:
        print(f"note: {note}", file=sys.stderr)
    converted = Request.from_dict({"prompt": "a preset", **applied.values})  # converts the LoRAs
    return {**{field: getattr(converted, field) for field in applied.values}, **overrides}


def _find(name: str, settings: Settings) -> Preset:
    if name.endswith(".json"):
        return read_preset(Path(name))
    return Presets.load(settings.presets).find(name)
