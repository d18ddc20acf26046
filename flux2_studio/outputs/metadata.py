"""What a saved picture says of itself: the settings that made it, as text inside the PNG.

Two text entries: `Software`, and `parameters`, a JSON object with the fields of the resolved `Request` of this one
picture (its own seed, count 1). References are given as the SHA-256 of the file's bytes: a path would mean nothing on
another machine and may tell more about its owner than intended. LoRAs have theirs beside name and weight, because a
name may stand for another file tomorrow.

The JSON is plain ASCII, so that every reader of PNG text gets it right and no prompt can fail to be written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux2_studio import __version__
from flux2_studio.request import Request

MAX_FILE = 200 * 10**6  # bytes
MAX_TEXT = 10**6  # characters; two prompts of the longest kind take less


def png_info(request: Request, reference_hashes: Sequence[str] = (), lora_hashes: Sequence[str] = ()) -> PngInfo:
    """The text entries of the one picture that `request` (resolved, its own seed, count 1) made.

    lora_hashes: SHA-256 of the file of each of the request's LoRAs.
    """
    parameters = request.as_dict() | {"references": list(reference_hashes)}
    parameters["loras"] = [
        lora | {"sha256": sha256} for lora, sha256 in zip(parameters["loras"], lora_hashes, strict=True)
    ]
    info = PngInfo()
    info.add_text("Software", f"flux2-studio {__version__}")
    info.add_text("parameters", json.dumps(parameters))
    return info


def read(path: Path) -> dict[str, Any] | None:
    """The parameters in the picture at `path`, or None where there are none to be read, whatever the reason.

    The file may come from anybody. Nothing in it is decoded but its text, up to a limit; the values are what the file
    says and have not been checked: `Request` does that.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE:
            return None
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get("parameters")
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            return None
        parameters = json.loads(text)
    except Exception:  # noqa: BLE001 - the PNG decoder and the JSON parser raise nearly anything for a damaged file
        return None
    return parameters if isinstance(parameters, dict) else None
