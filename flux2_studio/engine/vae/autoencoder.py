"""The FLUX.2 autoencoder: pictures to latents and back.

Encoding and decoding include 2x2 packing and the latent normalisation, so callers only see normalised packed latents.
Out of scope: sampling, files, PIL.

    pixels [B, 3, H, W] in -1..1      latent [B, 128, H/16, W/16], normalised to about unit variance per channel
    unpacked [B, 32, H/8, W/8], normalised or not as the name says

Packing is channel-major: packed channel = c * 4 + row * 2 + column. The statistics are those of `bn` (eps 1e-4, no
affine). The published autoencoder has channels 128, 256, 512, 512. The small decoder and nano have others, so no width
is hard-coded.

Pitfalls: downsampling pads right and bottom only. Decoder levels are numbered from full resolution (up.0) but run from
the last. The latent is the mean of the moments, never a sample. Never resample packed latents: their channels encode
positions. Parameter names are Black Forest Labs' key names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2_studio.engine.params import AutoencoderParams
from flux2_studio.engine.vae import tiling

NORM_GROUPS = 32
NORM_EPS = 1e-6
STATISTICS_EPS = 1e-4


def pack_latent(x: Tensor) -> Tensor:
    """[B, c, 2h, 2w] -> [B, 4c, h, w]."""
    return F.pixel_unshuffle(x, 2)


def unpack_latent(x: Tensor) -> Tensor:
    """[B, 4c, h, w] -> [B, c, 2h, 2w]."""
    return F.pixel_shuffle(x, 2)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), conv3x3(inputs, outputs)
        self.norm2, self.conv2 = group_norm(outputs), conv3x3(outputs, outputs)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # Contiguous rows: with other strides, only kernels that store the HW x HW matrix of scores apply.
        q, k, v = (m(h).flatten(2).transpose(1, 2)[:, None].contiguous() for m in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])  # [B, C, H, W]
        return x + self.proj_out(out)


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution. Subclasses add the change of resolution (identity at the last level)."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class DownLevel(Level):
    def __init__(self, inputs: int, outputs: int, blocks: int, *, last: bool) -> None:
        super().__init__(inputs, outputs, blocks)
        self.downsample: nn.Identity | Downsample = nn.Identity() if last else Downsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class UpLevel(Level):
    def __init__(self, inputs: int, outputs: int, blocks: int, *, last: bool) -> None:
        super().__init__(inputs, outputs, blocks)
        self.upsample: nn.Identity | Upsample = nn.Identity() if last else Upsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


class VAEEncoder(nn.Module):
    def __init__(self, p: AutoencoderParams) -> None:
        super().__init__()
        channels = p.encoder_channels
        self.conv_in = conv3x3(3, channels[0])
        last = len(channels) - 1
        self.down = nn.ModuleList(
            DownLevel(channels[max(0, i - 1)], outputs, p.encoder_blocks, last=i == last)
            for i, outputs in enumerate(channels)
        )
        self.mid = MidBlock(channels[-1])
        self.norm_out = group_norm(channels[-1])
        self.conv_out = conv3x3(channels[-1], 2 * p.latent_channels)
        self.quant_conv = nn.Conv2d(2 * p.latent_channels, 2 * p.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the latent's mean [B, 32, H/8, W/8], unnormalised."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return self.quant_conv(x).chunk(2, 1)[0]  # moments: mean, log variance


class VAEDecoder(nn.Module):
    def __init__(self, p: AutoencoderParams) -> None:
        super().__init__()
        channels = p.decoder_channels
        self.post_quant_conv = nn.Conv2d(p.latent_channels, p.latent_channels, 1)
        self.conv_in = conv3x3(p.latent_channels, channels[-1])
        self.mid = MidBlock(channels[-1])
        first = len(channels) - 1
        self.up = nn.ModuleList(
            UpLevel(channels[min(first, i + 1)], outputs, p.decoder_blocks, last=i == 0)
            for i, outputs in enumerate(channels)
        )
        self.norm_out = group_norm(channels[0])
        self.conv_out = conv3x3(channels[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        """Return pixels [B, 3, H, W] for an unnormalised, unpacked latent [B, 32, H/8, W/8]."""
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LatentStatistics(nn.Module):
    """Mean and variance of each packed latent channel, measured in training."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _deviation(self) -> Tensor:
        return (self.running_var + STATISTICS_EPS).sqrt()[None, :, None, None]

    def normalise(self, x: Tensor) -> Tensor:
        return ((x.float() - self.running_mean[None, :, None, None]) / self._deviation()).to(x.dtype)

    def denormalise(self, x: Tensor) -> Tensor:
        return x.float() * self._deviation() + self.running_mean[None, :, None, None]


class Autoencoder(nn.Module):
    """See the module's header. Build it with `weights.loading.load_autoencoder`."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = VAEEncoder(params)
        self.decoder = VAEDecoder(params)
        self.bn = LatentStatistics(4 * params.latent_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    @torch.inference_mode()
    def encode(
        self, pixels: Tensor, strip_height: int | None = None, offload_device: torch.device | None = None
    ) -> Tensor:
        """Encode pixels [B, 3, H, W] in -1..1, sides multiples of 16, to a normalised packed latent [B, 128, H/16,
        W/16].

        strip_height: None encodes the whole picture at once, which is fastest. A number of pixel rows (multiple of 16)
        runs each layer over strips of that height, one picture at a time: equal up to rounding, in a fraction of the
        memory. offload_device: where feature maps are stored in between, such as the CPU; None keeps them on the
        device. Raises `ValueError` for any other `strip_height`.
        """
        pixels = pixels.to(self.device, self.dtype)
        if strip_height is None:
            mean = self.encoder(pixels)
        else:
            mean = tiling.encode_in_strips(
                self.encoder, pixels, self.params.patch * self._strip_latent_rows(strip_height), offload_device
            )
        return self.bn.normalise(pack_latent(mean))

    @torch.inference_mode()
    def decode(
        self, latent: Tensor, strip_height: int | None = None, offload_device: torch.device | None = None
    ) -> Tensor:
        """Decode a normalised packed latent [B, 128, h, w] to pixels [B, 3, 16h, 16w], about -1..1, not clamped.

        strip_height, offload_device: as for `encode`.
        """
        z = unpack_latent(self.bn.denormalise(latent.to(self.device))).to(self.dtype)
        return (
            self.decoder(z)
            if strip_height is None
            else tiling.decode_in_strips(self.decoder, z, 2 * self._strip_latent_rows(strip_height), offload_device)
        )

    def _strip_latent_rows(self, rows: int) -> int:
        """Convert the height of a strip from `rows` of pixels to rows of the packed latent."""
        if rows < 1 or rows % self.params.patch:
            raise ValueError(f"a strip is a multiple of {self.params.patch} rows high, not {rows}")
        return rows // self.params.patch
