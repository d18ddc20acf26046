"""Reads the C2PA manifests of one untrusted picture, in a process of its own. Run by `credentials.py`, as a script.

The signing library parses whatever a stranger put into a file. Here it may take too long, too much memory or its whole
process down, and the studio does not notice: the process has limits, and its end is only an answer that did not come.

stdin: one line of JSON (mime, settings, memory in bytes, seconds, longest report in characters), then the picture's
bytes. stdout: JSON, one of {"report": the library's own JSON}, {"absent": true}, {"problem": why it cannot be read}.

This file knows nothing of the studio, so that it starts quickly and from anywhere.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import suppress
from typing import Any


def limit_process(memory: int, seconds: int) -> None:
    """Bound this process, as far as its system can: on Windows, only whoever started it bounds its time."""
    try:
        import resource
    except ImportError:
        return
    # A smaller stack than the studio's own threads have: what is read here can be read there, when a manifest is kept.
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_STACK, 4 << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS does not take all of them
            resource.setrlimit(kind, (most, most))


def read_manifest(data: bytes, options: dict[str, Any]) -> dict[str, Any]:
    try:
        import c2pa
    except (ImportError, OSError, RuntimeError):
        return {"problem": "the library that reads them (c2pa-python) cannot be loaded here"}
    try:
        with (
            c2pa.Context.from_dict(options["settings"]) as context,
            c2pa.Reader(options["mime"], io.BytesIO(data), context=context) as reader,
        ):
            report = reader.json()
    except c2pa.C2paError.ManifestNotFound:
        return {"absent": True}
    except (c2pa.C2paError, MemoryError) as error:
        text = str(error)[:300]
        if text.startswith("Remote:"):
            return {"problem": f"they are kept on the network, which is not asked ({text.rpartition(' ')[2]})"}
        return {"problem": text or "they take too much memory"}
    if len(report) > options["longest"]:
        return {"problem": f"they are {len(report)} characters long"}
    return {"report": report}


def main() -> None:
    asked = json.loads(sys.stdin.buffer.readline())
    data = sys.stdin.buffer.read()
    limit_process(asked["memory"], asked["seconds"])
    sys.stdout.write(json.dumps(read_manifest(data, asked)))


if __name__ == "__main__":
    main()
