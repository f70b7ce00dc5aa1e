"""The Wan 2.1 and 2.2 video VAEs: causal in time, so that clips may be cut into chunks anywhere."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wanrt.config import VaeSpec
from wanrt.models.vae_layers import TORCH, CausalConv3d, CausalState, VaeOps, Walk
from wanrt.models.vae_stages import Decoder, Encoder

# Latent statistics: Wan2.1 `wan/modules/vae.py`, Wan2.2 `wan/modules/vae2_2.py`.
_MEAN_16 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_STD_16 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_MEAN_48 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_STD_48 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
# Fewer, longer chunks save the work done once per chunk, until activations outgrow the caches.
_CHUNK_BYTES = 64 << 20  # of fp32 activations at full resolution
LATENT_STATISTICS = {16: (_MEAN_16, _STD_16), 48: (_MEAN_48, _STD_48)}


def latent_statistics(z_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of the latent channels, fp32 `[1, z, 1, 1, 1]`; 1/std is what the reference
    keeps: it multiplies by it to encode and divides by it to decode."""
    mean, std = (
        torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in LATENT_STATISTICS[z_dim]
    )
    return mean, 1.0 / std


class WanVAE(nn.Module):
    """Encoder, decoder and the statistics of the latents between them.

    Pixels are `[B, 3, F, H, W]` in [-1, 1] with F = 4n+1; latents `[B, z, n+1, h, w]` normalised to
    about zero mean and unit variance. Runs in the dtype of its weights (the reference: fp32).
    Source: Wan2.1 @9737cba `wan/modules/vae.py`, Wan2.2 @42bf4cf `wan/modules/vae2_2.py`.
    """

    OPS = VaeOps
    FP32_NAMES: tuple[str, ...] = ()

    def __init__(self, spec: VaeSpec, ops: VaeOps = TORCH) -> None:
        super().__init__()
        self.spec = spec
        self.ops = ops
        self.encoder = Encoder(spec)
        self.conv1 = CausalConv3d(spec.z_dim * 2, spec.z_dim * 2, 1)
        self.conv2 = CausalConv3d(spec.z_dim, spec.z_dim, 1)
        self.decoder = Decoder(spec)

    def encode(self, video: Tensor, chunk: int | None = None) -> Tensor:
        """Pixels -> normalised latents, fp32; `chunk` latent frames at a time (None: by size).

        Frames beyond the last 4n+1 are ignored, as the reference does.
        """
        walk = Walk(self.encoder_state(), self.ops)
        pieces = self._video_pieces(video, chunk, first=True)
        last = len(pieces) - 1
        parts = [self._encode(piece, walk, i == last) for i, piece in enumerate(pieces)]
        return torch.cat(parts, dim=2)

    def encode_chunks(
        self, video: Tensor, state: CausalState | None = None, chunk: int | None = 1
    ) -> Iterator[tuple[Tensor, CausalState]]:
        """Yield `(latents, state)` for every `chunk` latent frames; the mirror of decode_chunks.

        The first latent frame of a clip stands for one frame, every later one for four.
        """
        walk = Walk(state or self.encoder_state(), self.ops)
        for piece in self._video_pieces(video, chunk, walk.first):
            yield self._encode(piece, walk), walk.state()

    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """Normalised latents -> pixels in [-1, 1], fp32 `[B, 3, 4(T-1)+1, H, W]`."""
        walk = Walk(self.decoder_state(), self.ops)
        pieces = latents.split(chunk or self._chunk(*latents.shape[3:]), dim=2)
        last = len(pieces) - 1
        parts = [self._decode(piece, walk, i == last) for i, piece in enumerate(pieces)]
        return torch.cat(parts, dim=2)

    def decode_chunks(
        self, latents: Tensor, state: CausalState | None = None, chunk: int | None = 1
    ) -> Iterator[tuple[Tensor, CausalState]]:
        """Yield `(frames, state)` for every `chunk` latent frames (None: by their size).

        A yielded state may be kept; handed back with the latents that follow, decoding goes on as
        if it had never stopped. Memory grows with the chunk, not with the clip; a state that is
        kept while decoding goes on adds its own size.
        """
        walk = Walk(state or self.decoder_state(), self.ops)
        for piece in latents.split(chunk or self._chunk(*latents.shape[3:]), dim=2):
            yield self._decode(piece, walk), walk.state()

    def _encode(self, video: Tensor, walk: Walk, last: bool = False) -> Tensor:
        walk.last = last
        x = video.to(self.conv1.weight.dtype)
        x = patchify(x, self.spec.patch) if self.spec.patch > 1 else x
        moments = self.conv1(self.encoder(channels_last(x), walk), walk)
        walk.first = False
        mean, inv_std = latent_statistics(self.spec.z_dim, video.device)
        return (moments[:, : self.spec.z_dim].float() - mean) * inv_std

    def _decode(self, latents: Tensor, walk: Walk, last: bool = False) -> Tensor:
        walk.last = last
        mean, inv_std = latent_statistics(self.spec.z_dim, latents.device)
        z = (latents.float() / inv_std + mean).to(self.conv2.weight.dtype)
        x = self.decoder(self.conv2(channels_last(z), walk), walk)
        walk.first = False
        x = unpatchify(x, self.spec.patch) if self.spec.patch > 1 else x
        return x.float().clamp_(-1, 1)

    def _video_pieces(self, video: Tensor, chunk: int | None, first: bool) -> list[Tensor]:
        """The frames of every `chunk` latent frames."""
        stride = self.spec.temporal_stride
        h, w = (side // self.spec.spatial_stride for side in video.shape[3:])
        lead = stride - 1 if first else 0  # frames that a clip's first latent frame lacks
        total = (video.shape[2] + lead) // stride * stride
        starts = range(0, total, stride * (chunk or self._chunk(h, w)))
        bounds = [max(0, bound - lead) for bound in (*starts, total)]
        return [video[:, :, a:b] for a, b in zip(bounds, bounds[1:], strict=False)]

    def _chunk(self, h: int, w: int) -> int:
        """Latent frames `[z, h, w]` to code at once: as many as keep an activation small."""
        pixels = h * w * (self.spec.spatial_stride // self.spec.patch) ** 2
        per_frame = self.spec.temporal_stride * pixels * self.spec.decoder_base_dim * 4
        return max(1, _CHUNK_BYTES // per_frame)

    def encoder_state(self) -> CausalState:
        """Nothing encoded yet."""
        return CausalState((None,) * self.encoder.num_slots)

    def decoder_state(self) -> CausalState:
        """Nothing decoded yet."""
        return CausalState((None,) * self.decoder.num_slots)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def patchify(video: Tensor, p: int) -> Tensor:
    """`[B, C, F, H, W]` -> `[B, C*p*p, F, H/p, W/p]`; inside C the row offset runs fastest."""
    b, c, f, h, w = video.shape
    x = video.reshape(b, c, f, h // p, p, w // p, p)  # rows then columns
    return x.permute(0, 1, 6, 4, 2, 3, 5).reshape(b, c * p * p, f, h // p, w // p)


def unpatchify(x: Tensor, p: int) -> Tensor:
    """The inverse of patchify."""
    b, c, f, h, w = x.shape
    x = x.reshape(b, c // (p * p), p, p, f, h, w)  # columns then rows
    return x.permute(0, 1, 4, 5, 3, 6, 2).reshape(b, c // (p * p), f, h * p, w * p)
