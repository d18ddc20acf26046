"""`flux2-studio inspect`: what a picture says of where it comes from, and what of that can be relied on.

What looks at pictures is imported only once there is one to look at.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flux2_studio.cli.terminal import print_lines
from flux2_studio.errors import RequestError
from flux2_studio.settings import Settings

if TYPE_CHECKING:
    from flux2_studio.provenance.inspect import Inspection


def add_inspect_command(commands: argparse._SubParsersAction) -> None:
    """Add `inspect_picture` to the command line, with its function as its `run` default."""
    command = commands.add_parser(
        "inspect",
        allow_abbrev=False,
        help="tell how a picture was made, and whether that can be relied on",
        description="Tell what a picture says of how it was made: settings, invisible watermark, content credentials.",
        epilog="Nothing is sent anywhere.",
    )
    command.add_argument("file", metavar="FILE", type=Path, help="any picture, by whatever program")
    command.add_argument("--json", action="store_true", help="print all of it as JSON")
    command.set_defaults(run=run_inspect)


def run_inspect(options: argparse.Namespace) -> int:
    """`inspect FILE`: what was found, to stdout. Raises `RequestError` for no file, or one that is no picture."""
    from PIL import Image

    from flux2_studio.provenance.c2pa.credentials import Signer
    from flux2_studio.provenance.inspect import inspect_picture
    from flux2_studio.provenance.watermark import PUBLISHED_MESSAGE, WatermarkMessage

    settings = Settings.from_environment()
    own = [WatermarkMessage.parse(settings.watermark_message)] if settings.watermark_message else []
    signer = Signer(settings.identity, settings.c2pa_certificate, settings.c2pa_key)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is too large is told in our words
    seen = inspect_picture(options.file, signer, [*own, PUBLISHED_MESSAGE])
    if not seen.is_picture:
        raise RequestError(seen.problem or "This is not a picture.")
    print_lines(
        [json.dumps(seen.as_dict(), indent=2)] if options.json else map(strip_control_characters, report_lines(seen))
    )
    return 0


def report_lines(seen: Inspection) -> Iterator[str]:
    """What is told of a picture, line by line; texts of the file are still as they are in it."""
    from flux2_studio.provenance.inspect import credential_rows, setting_rows

    yield f"{seen.name}: {seen.format}, {seen.width} x {seen.height} pixels, {seen.bytes:,} bytes"
    yield f"SHA-256 {seen.sha256}"
    yield ""
    for finding in seen.findings:
        yield f"- {finding}"
    if record := seen.settings.record:
        yield ""
        yield "Settings, as the file has them"
        yield from (f"  {name}: {text}" for name, text in setting_rows(record))
    if credentials := credential_rows(seen.credentials):
        yield ""
        yield "Content credentials"
        yield from (f"  {name}: {text}" for name, text in credentials)


def strip_control_characters(line: str) -> str:
    """`line` without what would move the cursor of a terminal, or change the order in which it is read."""
    return "".join(it if it.isprintable() else " " for it in line)
