"""Start the page: `python app.py`; also the entry point of a Hugging Face Space."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flux2_studio.errors import StudioError
from flux2_studio.models.hub.local_checkpoints import add_local_checkpoints
from flux2_studio.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted. Returns 2, with one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(description="flux2-studio: pictures with the FLUX.2 open models, in the browser")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="also open a public link through Gradio's servers")
    options = parser.parse_args(arguments)
    try:
        settings, notes = add_local_checkpoints(Settings.from_environment())
        for note in notes:
            sys.stderr.write(f"{note}\n")
        from flux2_studio.ui import app as ui

        ui.serve_page(settings, options.host, options.port, options.share, notes)
    except StudioError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
