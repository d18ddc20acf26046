"""Serialises a prompt context for transfer between machines, as safetensors or in torch.save's format.

Received bytes are not trusted. safetensors holds nothing but numbers. torch.save writes a zip with a pickle in it:
`torch.load(weights_only=True)` runs no code from it, but it would unpack a small archive to any size and create any
tensor or bytearray that the pickle requests. So only archives of one plain tensor are passed to it.
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
# Header of our own server: the number of truncated tokens of each prompt, as "0,12".
TRUNCATED_TOKENS_HEADER = "X-Cut-Tokens"

ALLOWED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_FORMAT_OVERHEAD_BYTES = 2**16  # largest part of a response that is not tensor data
# All names that the pickle of a plain tensor imports.
_ALLOWED_PICKLE_NAMES = {
    *("torch._utils _rebuild_tensor_v2", "collections OrderedDict"),
    *("torch FloatStorage", "torch BFloat16Storage", "torch HalfStorage"),
}
_ZIP_MAGIC = b"PK\x03\x04"


class UnreadableTensor(Exception):
    """The bytes are not a tensor of one of `ALLOWED_DTYPES`."""


def max_packed_bytes(prompts: int, length: int, width: int) -> int:
    """Returns the largest size in bytes of a context [prompts, length, width], float32, in either format."""
    return prompts * length * width * 4 + MAX_FORMAT_OVERHEAD_BYTES


def pack_tensor(context: Tensor, media_type: str) -> bytes:
    """Serialises `context` in the format `media_type`."""
    context = context.detach().cpu().contiguous()
    if media_type == SAFETENSORS_MEDIA_TYPE:
        return save({"context": context})
    out = io.BytesIO()
    torch.save(context, out)
    return out.getvalue()


def unpack_tensor(body: bytes) -> Tensor:
    """Returns the tensor in `body`, of any shape. Its first bytes determine the format. Raises `UnreadableTensor`."""
    context = _load_torch_archive(body) if body.startswith(_ZIP_MAGIC) else _load_safetensors(body)
    if context.dtype not in ALLOWED_DTYPES:
        raise UnreadableTensor(f"numbers of type {str(context.dtype).removeprefix('torch.')}")
    return context


def _load_safetensors(body: bytes) -> Tensor:
    try:
        tensors = load(body)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that torch lacks
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
        # A damaged archive or pickle can raise almost anything: BadZipFile, UnpicklingError, RuntimeError, IndexError.
        raise UnreadableTensor("a damaged tensor") from error
    if type(context) is not Tensor:
        raise UnreadableTensor("no tensor")
    return context


def _sanitise_archive(body: bytes) -> io.BytesIO:
    """Copies the archive `body`, so that torch reads exactly what was checked here.

    Raises `UnreadableTensor` if the archive is compressed, or if its pickle imports anything that a plain tensor does
    not need.
    """
    plain = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as archive, zipfile.ZipFile(plain, "w") as copy:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > len(body):
            raise UnreadableTensor("a packed archive")
        for entry in entries:
            content = archive.read(entry)
            # torch finds data.pkl regardless of case.
            if entry.filename.lower().endswith(".pkl") and not _list_pickle_names(content) <= _ALLOWED_PICKLE_NAMES:
                raise UnreadableTensor("more than a tensor")
            copy.writestr(entry.filename, content)
    plain.seek(0)
    return plain


def _list_pickle_names(pickle: bytes) -> set[str]:
    """Returns what `pickle` would import, as 'module name', without running it."""
    names = set()
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            names.add(
                str(argument)
            )  # STACK_GLOBAL has no argument (its names are on the stack); torch.save never uses it
    return names
