"""The autoencoder strip by strip: the same pictures and latents, up to rounding, in a fraction of the memory.

Does: walk through the layers of `autoencoder.VAEEncoder` and `VAEDecoder` with every feature map cut into strips of
rows. Does not know: how high a strip should be, packing, normalisation of latents.

Tiles that go through the whole network apart from each other show seams and shifts of colour: their borders lack
neighbours, the attention sees one tile, and each GroupNorm measures its own tile. So here the layers are the outer
loop and the strips the inner one. A convolution is lent the row above and the row below its strip, a GroupNorm's
statistics are gathered over all strips before the first one is normalised, and attention reads the keys and values of
the whole map (at 1/8 of the resolution).

Whole are at most two feature maps: a residual block's input, or the shortcut made of it, and what its first convolution
made. They lie in `offload_device`, on the host if so wished, and are used up strip by strip while the next map grows.
All else is a small multiple of one strip.

    strip [1, C, h, W]      row [1, C, 1, W]      window [1, C, h + 2, W]: a strip between its two neighbouring rows

Pitfalls: a map is used up by the layer that reads it. The zeros beyond the picture come after norm and SiLU.
Statistics are float32 whatever the weights are. No tensor's values steer anything: all of it runs on `meta`, too.
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

STATISTICS_CHUNKS = (
    4  # a strip's statistics are gathered from so many parts of its channels, whose float32 copies are small
)

TensorFn = Callable[[Tensor], Tensor]


def encode_in_strips(
    encoder: VAEEncoder, pixels: Tensor, strip_height: int, offload_device: torch.device | None
) -> Tensor:
    """`encoder(pixels)`. strip_height: of a strip of pixels [B, 3, H, W]; it halves with every level, without a
    rest."""
    return torch.cat([_encode(encoder, Strips.from_tensor(x, strip_height, offload_device)) for x in pixels.split(1)])


def decode_in_strips(decoder: VAEDecoder, z: Tensor, strip_height: int, offload_device: torch.device | None) -> Tensor:
    """`decoder(z)`. strip_height: of a strip of the latent [B, 32, h, w]; it doubles with every level."""
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
    """One picture's feature map [1, C, H, W] in strips that wait in `offload_device`; None: on the device."""

    def __init__(self, device: torch.device, offload_device: torch.device | None) -> None:
        self.device = device
        self.offload_device = offload_device
        self._strips: list[Tensor | None] = []  # None: used up
        self._first_rows: list[Tensor] = []  # first and last row of each strip, to which its neighbours come back
        self._last_rows: list[Tensor] = []
        self._pixels_per_strip: list[int] = []  # pixels per strip
        self._moments: list[Tensor] = []  # per strip, [2, C]: mean and variance

    @classmethod
    def from_tensor(cls, x: Tensor, height: int, offload_device: torch.device | None) -> Strips:
        """x [1, C, H, W] in strips of `height` rows; the last one may be lower."""
        strips = cls(x.device, offload_device)
        for strip in x.split(height, 2):
            strips.append(strip.contiguous(), measure=False)
        return strips

    def new_like(self) -> Strips:
        """A map without strips in the same place."""
        return Strips(self.device, self.offload_device)

    def __len__(self) -> int:
        return len(self._strips)

    def append(self, strip: Tensor, *, measure: bool = True) -> None:
        """Add the next strip. measure: whether a norm is going to read this map."""
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
        """Strip `i`, for the last time; its edges stay for its neighbours' windows."""
        strip, self._strips[i] = self.read(i), None
        return strip

    def window(self, i: int, activate: TensorFn | None = None, *, pop: bool = True) -> Tensor:
        """Strip `i` and its neighbouring rows, activated; zeros where the picture ends."""
        top, bottom = i == 0, i == len(self) - 1
        above = [] if top else [self._to_device(self._last_rows[i - 1])]
        below = [] if bottom else [self._to_device(self._first_rows[i + 1])]
        x = torch.cat([*above, self.pop(i) if pop else self.read(i), *below], 2)
        if activate is not None:
            x = activate(x)
        return F.pad(x, (0, 0, int(top), int(bottom))) if top or bottom else x

    def group_norm_fn(self, norm: nn.GroupNorm) -> TensorFn:
        """`norm` with the statistics of the whole map, which make it an affine map per channel.

        They are merged from those of every strip and channel as by Chan, Golub and LeVeque, "Updating Formulae and a
        Pairwise Algorithm for Computing Sample Variances" (1979), for any number of parts at once.
        """
        # [strips, groups, channels of a group]
        means, variances = (m.unflatten(1, (norm.num_groups, -1)) for m in torch.stack(self._moments, 1))
        sizes = torch.tensor(self._pixels_per_strip, dtype=torch.float32, device=self.device)[:, None, None]
        share = sizes / (sum(self._pixels_per_strip) * means.shape[2])
        mean = (share * means).sum((0, 2), keepdim=True)
        variance = (share * (variances + (means - mean).square())).sum((0, 2), keepdim=True)
        mean, variance = (m.expand_as(means[:1]).flatten() for m in (mean, variance))
        weight, bias = norm.weight.float(), norm.bias.float()
        return lambda x: F.batch_norm(x, mean, variance, weight, bias, eps=norm.eps)

    def join(self) -> Tensor:
        """The whole map, on the device."""
        return torch.cat([self.pop(i) for i in range(len(self))], 2)

    # A copy to the host that nobody waits for lands in pinned memory. Its only reader is the copy back, which CUDA
    # makes later on the same stream. Whole tensors go there: of a part, the host would make a copy too early.

    def _offload(self, x: Tensor) -> Tensor:
        return x if self.offload_device is None else x.to(self.offload_device, non_blocking=x.is_cuda)

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=self.device.type == "cuda")


def _moments(strip: Tensor) -> Tensor:
    """Mean and variance of every channel, [2, C] in float32, in two passes: no difference of large squares."""
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
    narrowing = not isinstance(block.nin_shortcut, nn.Identity)
    shortcut = x.new_like() if narrowing else x
    activate = _activation(x, block.norm1)
    h = x.new_like()
    for i in range(len(x)):
        h.append(_convolve_window(block.conv1, x.window(i, activate, pop=False)))
        if narrowing:
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
        window = F.pad(x.window(i)[:, :, 1:], (0, 1))  # pads on the right, and below: no row above is read
        out.append(F.conv2d(window, conv.weight, conv.bias, stride=2))
    return out


def _upsample(x: Strips, conv: nn.Conv2d) -> Strips:
    out = x.new_like()
    for i in range(len(x)):
        out.append(_convolve_window(conv, _double_window(x.window(i))))
    return out


def _double_window(window: Tensor) -> Tensor:
    """A window of the map of twice the size: every row and column twice, but once the rows of the neighbours."""
    rows = torch.arange(1, 2 * window.shape[2] - 1, device=window.device) // 2
    return F.interpolate(window, scale_factor=(1.0, 2.0), mode="nearest").index_select(2, rows)


def _activation(x: Strips, norm: nn.GroupNorm) -> TensorFn:
    normalise = x.group_norm_fn(norm)
    return lambda strip: F.silu(normalise(strip), inplace=True)


def _convolve_window(conv: nn.Conv2d, window: Tensor) -> Tensor:
    """The strip that a 3x3 convolution makes of a window."""
    return F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))


def _flatten_positions(x: Tensor) -> Tensor:
    """[1, C, h, W] -> [1, 1, hW, C], contiguous as the lean kernels of attention want it."""
    return x.flatten(2).transpose(1, 2)[:, None].contiguous()
