"""`flux2-studio inspect`: what a picture says about its origin, and how reliable that is.

The modules that read pictures are imported only when the command runs.
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
    """Add the `inspect` command to the parser, with `run_inspect` as its `run` default."""
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
    """`inspect FILE`: print the findings to stdout. Raises `RequestError` if there is no picture at the path."""
    from PIL import Image

    from flux2_studio.provenance.c2pa.credentials import Signer
    from flux2_studio.provenance.inspect import inspect_picture
    from flux2_studio.provenance.watermark import PUBLISHED_MESSAGE, WatermarkMessage

    settings = Settings.from_environment()
    own_messages = [WatermarkMessage.parse(settings.watermark_message)] if settings.watermark_message else []
    signer = Signer(settings.identity, settings.c2pa_certificate, settings.c2pa_key)
    # The report has its own message for pictures that are too large.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    inspection = inspect_picture(options.file, signer, [*own_messages, PUBLISHED_MESSAGE])
    if not inspection.is_picture:
        raise RequestError(inspection.problem or "This is not a picture.")
    print_lines(
        [json.dumps(inspection.as_dict(), indent=2)]
        if options.json
        else map(strip_control_characters, report_lines(inspection))
    )
    return 0


def report_lines(seen: Inspection) -> Iterator[str]:
    """Yield the report on a picture, line by line; texts from the file are not sanitized."""
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
    """Replace unprintable characters, which could move a terminal's cursor or change the reading order."""
    return "".join(it if it.isprintable() else " " for it in line)
