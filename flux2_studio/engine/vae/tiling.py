"""Strip-wise encoding and decoding: the same pictures and latents, up to rounding, in a fraction of the memory.

Runs the layers of `autoencoder.VAEEncoder` and `VAEDecoder` with every feature map split into strips of rows. Out of
scope: choosing the strip height, packing, normalisation of latents.

Independent tiles that each pass the whole network show seams and colour shifts: their borders lack neighbours,
attention sees one tile, and each GroupNorm uses the statistics of its own tile. Here the layers are the outer loop and
the strips the inner one. A convolution also gets the row above and the row below its strip, GroupNorm statistics are
collected over all strips before the first one is normalised, and attention reads the keys and values of the full map
(at 1/8 of the resolution).

At most two full feature maps exist at a time: a residual block's input (or its shortcut), and the output of the block's
first convolution. They are stored on `offload_device` and freed strip by strip while the next map grows. Everything
else is a small multiple of one strip.

    strip [1, C, h, W]      row [1, C, 1, W]      window [1, C, h + 2, W]: a strip between its two neighbouring rows

Pitfalls: a layer frees the strips of the map that it reads. Zero padding beyond the picture is applied after norm and
SiLU. Statistics are float32 whatever the dtype of the weights. No control flow depends on tensor values, so all of it
also runs on `meta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from flux2_studio.engine.vae.autoencoder import (
        AttnBlock,
        DownLevel,
        Level,
        MidBlock,
        ResBlock,
        UpLevel,
        VAEDecoder,
        VAEEncoder,
    )

# Channels are split into this many parts for the statistics, to keep the float32 copies small.
STATISTICS_CHUNKS = 4

TensorFn = Callable[[Tensor], Tensor]


def encode_in_strips(
    encoder: VAEEncoder, pixels: Tensor, strip_height: int, offload_device: torch.device | None
) -> Tensor:
    """Same as `encoder(pixels)`. strip_height: rows of pixels [B, 3, H, W] per strip; each level must halve it
    exactly.
    """
    return torch.cat([_encode(encoder, Strips.from_tensor(x, strip_height, offload_device)) for x in pixels.split(1)])


def decode_in_strips(decoder: VAEDecoder, z: Tensor, strip_height: int, offload_device: torch.device | None) -> Tensor:
    """Same as `decoder(z)`. strip_height: rows of the latent [B, 32, h, w] per strip; each level doubles it."""
    return torch.cat(
        [
            _decode(decoder, Strips.from_tensor(x, strip_height, offload_device))
            for x in decoder.post_quant_conv(z).split(1)
        ]
    )


def _encode(encoder: VAEEncoder, pixels: Strips) -> Tensor:
    x = _convolve(pixels, encoder.conv_in)
    for level in cast("Iterable[DownLevel]", encoder.down):
        x = _residual_blocks(x, level)
        if not isinstance(level.downsample, nn.Identity):
            x = _downsample(x, level.downsample.conv)
    x = _convolve(_middle(x, encoder.mid), encoder.conv_out, encoder.norm_out)
    return encoder.quant_conv(x.join()).chunk(2, 1)[0]


def _decode(decoder: VAEDecoder, z: Strips) -> Tensor:
    x = _middle(_convolve(z, decoder.conv_in), decoder.mid)
    for level in reversed(cast("Sequence[UpLevel]", decoder.up)):
        x = _residual_blocks(x, level)
        if not isinstance(level.upsample, nn.Identity):
            x = _upsample(x, level.upsample.conv)
    return _convolve(x, decoder.conv_out, decoder.norm_out).join()


class Strips:
    """One picture's feature map [1, C, H, W] as strips, stored on `offload_device` (None: on `device`)."""

    def __init__(self, device: torch.device, offload_device: torch.device | None) -> None:
        self.device = device
        self.offload_device = offload_device
        self._strips: list[Tensor | None] = []  # None: already popped
        self._first_rows: list[Tensor] = []  # first and last row of each strip, for its neighbours' windows
        self._last_rows: list[Tensor] = []
        self._pixels_per_strip: list[int] = []
        self._moments: list[Tensor] = []  # per strip, [2, C]: mean and variance

    @classmethod
    def from_tensor(cls, x: Tensor, height: int, offload_device: torch.device | None) -> Strips:
        """Split x [1, C, H, W] into strips of `height` rows; the last one may be lower."""
        strips = cls(x.device, offload_device)
        for strip in x.split(height, 2):
            strips.append(strip.contiguous(), measure=False)
        return strips

    def new_like(self) -> Strips:
        """Return an empty map on the same devices."""
        return Strips(self.device, self.offload_device)

    def __len__(self) -> int:
        return len(self._strips)

    def append(self, strip: Tensor, *, measure: bool = True) -> None:
        """Add the next strip. measure: collect its statistics, if a norm will read this map."""
        if measure:
            self._pixels_per_strip.append(strip[0, 0].numel())
            self._moments.append(_moments(strip))
        self._first_rows.append(self._offload(strip[:, :, :1].contiguous()))
        self._last_rows.append(self._offload(strip[:, :, -1:].contiguous()))
        self._strips.append(self._offload(strip))

    def read(self, i: int) -> Tensor:
        strip = self._strips[i]
        assert strip is not None, "this strip is used up"
        return self._to_device(strip)

    def pop(self, i: int) -> Tensor:
        """Return strip `i` and free it. Its first and last row stay for the neighbours' windows."""
        strip, self._strips[i] = self.read(i), None
        return strip

    def window(self, i: int, activate: TensorFn | None = None, *, pop: bool = True) -> Tensor:
        """Return strip `i` with its neighbouring rows, activated, and zeros beyond the picture. pop: free the strip."""
        top, bottom = i == 0, i == len(self) - 1
        above = [] if top else [self._to_device(self._last_rows[i - 1])]
        below = [] if bottom else [self._to_device(self._first_rows[i + 1])]
        x = torch.cat([*above, self.pop(i) if pop else self.read(i), *below], 2)
        if activate is not None:
            x = activate(x)
        return F.pad(x, (0, 0, int(top), int(bottom))) if top or bottom else x

    def group_norm_fn(self, norm: nn.GroupNorm) -> TensorFn:
        """Return `norm` with the statistics of the full map, which make it an affine map per channel.

        Merges the statistics of all strips and channels, generalised to any number of parts from Chan, Golub and
        LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979).
        """
        # [strips, groups, channels per group]
        means, variances = (m.unflatten(1, (norm.num_groups, -1)) for m in torch.stack(self._moments, 1))
        sizes = torch.tensor(self._pixels_per_strip, dtype=torch.float32, device=self.device)[:, None, None]
        share = sizes / (sum(self._pixels_per_strip) * means.shape[2])
        mean = (share * means).sum((0, 2), keepdim=True)
        variance = (share * (variances + (means - mean).square())).sum((0, 2), keepdim=True)
        mean, variance = (m.expand_as(means[:1]).flatten() for m in (mean, variance))
        weight, bias = norm.weight.float(), norm.bias.float()
        return lambda x: F.batch_norm(x, mean, variance, weight, bias, eps=norm.eps)

    def join(self) -> Tensor:
        """Return the full map, on the device. Frees the strips."""
        return torch.cat([self.pop(i) for i in range(len(self))], 2)

    # A non-blocking copy to the host goes to pinned memory. Only the copy back reads it, later on the same CUDA stream.
    # Only contiguous tensors are copied: for a view, the host would make a copy before the data has arrived.

    def _offload(self, x: Tensor) -> Tensor:
        return x if self.offload_device is None else x.to(self.offload_device, non_blocking=x.is_cuda)

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=self.device.type == "cuda")


def _moments(strip: Tensor) -> Tensor:
    """Return mean and variance of every channel, [2, C] in float32. Two passes avoid a difference of large squares."""
    moments = []
    for x in strip[0].chunk(STATISTICS_CHUNKS):
        x = x.float()
        mean = x.mean((1, 2), keepdim=True)
        moments.append(torch.stack([mean.flatten(), (x - mean).square_().mean((1, 2))]))
    return torch.cat(moments, 1)


def _convolve(x: Strips, conv: nn.Conv2d, norm: nn.GroupNorm | None = None) -> Strips:
    activate = None if norm is None else _activation(x, norm)
    out = x.new_like()
    for i in range(len(x)):
        out.append(_convolve_window(conv, x.window(i, activate)))
    return out


def _residual_blocks(x: Strips, level: Level) -> Strips:
    for block in cast("Iterable[ResBlock]", level.block):
        x = _residual(x, block)
    return x


def _middle(x: Strips, middle: MidBlock) -> Strips:
    return _residual(_attention(_residual(x, middle.block_1), middle.attn_1), middle.block_2)


def _residual(x: Strips, block: ResBlock) -> Strips:
    has_projection = not isinstance(block.nin_shortcut, nn.Identity)
    shortcut = x.new_like() if has_projection else x
    activate = _activation(x, block.norm1)
    h = x.new_like()
    for i in range(len(x)):
        h.append(_convolve_window(block.conv1, x.window(i, activate, pop=False)))
        if has_projection:
            shortcut.append(block.nin_shortcut(x.pop(i)), measure=False)
    activate = _activation(h, block.norm2)
    out = x.new_like()
    for i in range(len(h)):
        out.append(_convolve_window(block.conv2, h.window(i, activate)).add_(shortcut.pop(i)))
    return out


def _attention(x: Strips, block: AttnBlock) -> Strips:
    normalise = x.group_norm_fn(block.norm)
    k, v = (
        torch.cat([_flatten_positions(project(normalise(x.read(i)))) for i in range(len(x))], 2)
        for project in (block.k, block.v)
    )
    out = x.new_like()
    for i in range(len(x)):
        strip = x.pop(i)
        attended = F.scaled_dot_product_attention(_flatten_positions(block.q(normalise(strip))), k, v)
        out.append(block.proj_out(attended[:, 0].transpose(1, 2).unflatten(2, strip.shape[2:])).add_(strip))
    return out


def _downsample(x: Strips, conv: nn.Conv2d) -> Strips:
    out = x.new_like()
    for i in range(len(x)):
        window = F.pad(x.window(i)[:, :, 1:], (0, 1))  # pads right and bottom only, so the row above is not read
        out.append(F.conv2d(window, conv.weight, conv.bias, stride=2))
    return out


def _upsample(x: Strips, conv: nn.Conv2d) -> Strips:
    out = x.new_like()
    for i in range(len(x)):
        out.append(_convolve_window(conv, _double_window(x.window(i))))
    return out


def _double_window(window: Tensor) -> Tensor:
    """Return the window of the map upsampled by 2: all rows and columns doubled, but each neighbour's row only once."""
    rows = torch.arange(1, 2 * window.shape[2] - 1, device=window.device) // 2
    return F.interpolate(window, scale_factor=(1.0, 2.0), mode="nearest").index_select(2, rows)


def _activation(x: Strips, norm: nn.GroupNorm) -> TensorFn:
    normalise = x.group_norm_fn(norm)
    return lambda strip: F.silu(normalise(strip), inplace=True)


def _convolve_window(conv: nn.Conv2d, window: Tensor) -> Tensor:
    """Apply a 3x3 convolution to a window; the result is a strip."""
    return F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))


def _flatten_positions(x: Tensor) -> Tensor:
    """[1, C, h, W] -> [1, 1, hW, C], contiguous as memory-efficient attention kernels require."""
    return x.flatten(2).transpose(1, 2)[:, None].contiguous()
