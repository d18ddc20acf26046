"""Read the C2PA manifests of one untrusted picture in a separate process. `credentials.py` runs this file as a script.

The signing library parses untrusted data. It may take too long, use too much memory or crash; here that only ends this
process, which has limits, and the studio sees a missing reply.

stdin: one line of JSON (mime, settings, memory in bytes, seconds, longest report in characters), then the picture's
bytes. stdout: JSON, one of {"report": the library's own JSON}, {"absent": true}, {"problem": why it cannot be read}.

This file imports nothing of the studio, so that it starts quickly and from any folder.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import suppress
from typing import Any


def limit_process(memory: int, seconds: int) -> None:
    """Set the resource limits of this process. Not on Windows: there only the parent limits its time."""
    try:
        import resource
    except ImportError:
        return
    # A smaller stack than the studio's threads have: a manifest that is read here can be read again when signing there.
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_STACK, 4 << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS does not support all of them
            resource.setrlimit(kind, (limit, limit))


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
    options = json.loads(sys.stdin.buffer.readline())
    data = sys.stdin.buffer.read()
    limit_process(options["memory"], options["seconds"])
    sys.stdout.write(json.dumps(read_manifest(data, options)))


if __name__ == "__main__":
    main()
