"""What is known of how one picture was made: what goes into its file, and what is read back to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flux2_studio.request import Request

EAGER_BLOCKS, COMPILED_BLOCKS = "as written", "compiled"  # how the transformer's blocks ran, in `computed`


@dataclass(frozen=True, kw_only=True)
class Record:
    """One picture's making. Hashes are SHA-256 of a file's bytes, in hexadecimal.

    `request` is resolved, with this picture's own seed and count 1; its prompt is what the transformer drew, and no
    language model is asked again (`upsampling.by` is none). Its references are no paths: `references` names them by
    hash, in order, and so does `loras` the request's LoRAs, and `mask` its mask. `marked` is where the watermark lies.

    Pictures that are drawn together differ in a shade here and there from the same pictures drawn alone: matrices of
    another shape are multiplied in another order. So this was number `place` (0-based) of `together`, and the same bits
    come out where the request's seed is less by `place` and its count is `together`.

    `unfinished` is (n, m) for the preview of a run that ended after step n of m: no request gives that picture.
    """

    request: Request
    label: str  # the checkpoint's, as users call it
    checkpoint: str = ""  # hash of the transformer's file, "" where it is not known
    references: tuple[str, ...] = ()
    mask: str = ""  # "" for none
    loras: tuple[str, ...] = ()
    original_prompt: str | None = None  # before a language model enriched it
    upsampled_by: str | None = None  # which one
    place: int = 0
    together: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)  # of flux2-studio, torch, ...
    marked: tuple[int, int, int, int] | None = (
        None  # left, top, right, bottom in pixels; None for the whole, or nowhere
    )
    unfinished: tuple[int, int] | None = None
    computed: Mapping[str, str] = field(default_factory=dict)  # device, precision, ...: what else the pixels depend on
