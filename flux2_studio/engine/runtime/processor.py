"""What this machine's processor can compute quickly."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F


@functools.cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware.

    oneDNN takes bfloat16 wherever there is AVX-512, but converts it to float32 on processors without such instructions:
    five times slower than float32 itself (0.49 s against 0.10 s for 512 rows of a 3072 x 9216 layer, oneDNN limited to
    AVX512_CORE). It does not tell, so it is asked: by their specification the instructions (Intel's VDPBF16PS and
    TDPBF16PS, Arm's BFMMLA) count numbers below the smallest normal float32 as zero; a conversion keeps them.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    subnormal = torch.full((16, 32), 2.0**-130, dtype=torch.bfloat16, device="cpu")
    with torch.inference_mode():
        return not F.linear(subnormal, torch.ones_like(subnormal)).any()
