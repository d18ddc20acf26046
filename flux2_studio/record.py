"""How one picture was made: written into its file, and read back to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flux2_studio.request import Request

SOURCE_TYPE_URL = "http://cv.iptc.org/newscodes/digitalsourcetype/"  # how a picture was made, by IPTC's terms
EAGER_BLOCKS, COMPILED_BLOCKS = "as written", "compiled"  # how the transformer's blocks ran, in `computed`


@dataclass(frozen=True, kw_only=True)
class Record:
    """How one picture was made. Hashes are SHA-256 of a file's bytes, in hexadecimal.

    `request` is resolved, with this picture's own seed and count 1. Its prompt is the one that the transformer drew,
    and `upsampling.by` is none, so no language model runs again. The files are named by hash instead of by path:
    `references` and `loras` in the request's order, and `mask`. `marked` is the region of the watermark.

    Pictures drawn in one batch differ slightly from the same pictures drawn alone, because matmuls of another shape sum
    in another order. This was picture `place` (0-based) of a batch of `together`; a request with the seed reduced by
    `place` and with count `together` gives the same bits.

    `unfinished` is (n, m) for a saved preview of a run that ended after step n of m; no request reproduces it.
    """

    request: Request
    label: str  # the checkpoint's label for users
    checkpoint: str = ""  # hash of the transformer's file, "" if unknown
    references: tuple[str, ...] = ()
    mask: str = ""  # "" for none
    loras: tuple[str, ...] = ()
    original_prompt: str | None = None  # before a language model enhanced it
    upsampled_by: str | None = None  # the language model
    place: int = 0
    together: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)  # of flux2-studio, torch, ...
    # Left, top, right, bottom in pixels; None for the whole picture, or for no watermark.
    marked: tuple[int, int, int, int] | None = None
    unfinished: tuple[int, int] | None = None
    computed: Mapping[str, str] = field(default_factory=dict)  # device, precision, ...: what else affects the pixels
