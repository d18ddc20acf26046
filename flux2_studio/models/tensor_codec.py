"""A context as bytes, for its way from one machine to another: safetensors, or what torch.save writes.

What comes in is not trusted. safetensors can hold nothing but numbers. torch.save writes a zip with a pickle in it:
`torch.load(weights_only=True)` runs no code of it, but would unpack a small archive to any size, and make any tensor
or bytearray that the pickle orders. So only archives of one plain tensor get that far.
"""

from __future__ import annotations

import io
import pickletools
import zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

SAFETENSORS_MEDIA_TYPE = "application/x-safetensors"
TORCH_MEDIA_TYPE = "application/octet-stream"  # torch.save's format; it has no media type of its own
TRUNCATED_TOKENS_HEADER = (
    "X-Cut-Tokens"  # header of our own server: for each prompt, how many tokens did not fit, as "0,12"
)

ALLOWED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_FORMAT_OVERHEAD_BYTES = 2**16  # bytes of an answer that are not the tensor's numbers, at most
# All that the pickle of a tensor names.
_NAMES = {
    *("torch._utils _rebuild_tensor_v2", "collections OrderedDict"),
    *("torch FloatStorage", "torch BFloat16Storage", "torch HalfStorage"),
}
_ZIP = b"PK\x03\x04"


class UnreadableTensor(Exception):
    """The bytes are no tensor of one of `ALLOWED_DTYPES`."""


def max_packed_bytes(prompts: int, length: int, width: int) -> int:
    """The size of the largest context [prompts, length, width], in float32, in either format."""
    return prompts * length * width * 4 + MAX_FORMAT_OVERHEAD_BYTES


def pack_tensor(context: Tensor, media_type: str) -> bytes:
    """`context` in the format `media_type`."""
    context = context.detach().cpu().contiguous()
    if media_type == SAFETENSORS_MEDIA_TYPE:
        return save({"context": context})
    out = io.BytesIO()
    torch.save(context, out)
    return out.getvalue()


def unpack_tensor(body: bytes) -> Tensor:
    """The tensor in `body`, of any shape; which format it is, its first bytes tell. Raises `UnreadableTensor`."""
    context = _load_torch_archive(body) if body.startswith(_ZIP) else _safetensors(body)
    if context.dtype not in ALLOWED_DTYPES:
        raise UnreadableTensor(f"numbers of type {str(context.dtype).removeprefix('torch.')}")
    return context


def _safetensors(body: bytes) -> Tensor:
    try:
        tensors = load(body)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a type of numbers that torch lacks
        raise UnreadableTensor("no tensor") from error
    if len(tensors) != 1:
        raise UnreadableTensor(f"{len(tensors)} tensors instead of one")
    (context,) = tensors.values()
    return context


def _load_torch_archive(body: bytes) -> Tensor:
    try:
        context = torch.load(_sanitise_archive(body), map_location="cpu", weights_only=True)
    except UnreadableTensor:
        raise
    except Exception as error:
        # A damaged archive or pickle raises nearly anything: BadZipFile, UnpicklingError, RuntimeError, IndexError, ...
        raise UnreadableTensor("a damaged tensor") from error
    if type(context) is not Tensor:
        raise UnreadableTensor("no tensor")
    return context


def _sanitise_archive(body: bytes) -> io.BytesIO:
    """The archive `body` written anew, so that what was looked at here is what torch reads.

    Raises `UnreadableTensor` where it unpacks to more than it is, or its pickle names anything but a tensor's parts.
    """
    plain = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as archive, zipfile.ZipFile(plain, "w") as copy:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > len(body):
            raise UnreadableTensor("a packed archive")
        for entry in entries:
            content = archive.read(entry)
            # torch finds data.pkl in whichever case it is written.
            if entry.filename.lower().endswith(".pkl") and not _list_pickle_names(content) <= _NAMES:
                raise UnreadableTensor("more than a tensor")
            copy.writestr(entry.filename, content)
    plain.seek(0)
    return plain


def _list_pickle_names(pickle: bytes) -> set[str]:
    """What `pickle` would import, as 'module name'; nothing of it is run."""
    names = set()
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            names.add(str(argument))  # STACK_GLOBAL has none: its names lie on the stack, and torch.save never uses it
    return names
