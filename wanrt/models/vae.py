"""The Wan 2.1 and 2.2 video VAEs: causal in time, so that clips may be cut into chunks anywhere."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wanrt.config import VaeSpec, VaeWork
from wanrt.errors import UsageError
from wanrt.models.vae_bands import Course
from wanrt.models.vae_coding import channels_last, decode_pieces, encode_pieces
from wanrt.models.vae_layers import TORCH, CausalConv3d, CausalState, VaeOps, Walk
from wanrt.models.vae_stages import Decoder, Encoder
from wanrt.vae_shapes import Band, decoder_bands, default_chunk, encoder_bands

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

    def encode(
        self,
        video: Tensor,
        chunk: int | None = None,
        *,
        work: VaeWork | None = None,
        still: bool = False,
    ) -> Tensor:
        """Pixels -> normalised latents, fp32; `chunk` latent frames at a time (None: by size).

        Frames beyond the last 4n+1 are ignored, as the reference does. `work` says more than
        `chunk` and goes before it. `still`: look for chunks that repeat the one before, and do not
        compute again what they repeat; worth it where most of a clip stands still.
        """
        work = work or VaeWork(chunk)
        pieces = self._video_pieces(video, work.chunk, first=True)
        course = self._course(self.encoder, self.encoder_state(), work, video)
        latents = list(encode_pieces(self, pieces, course, work, still, ends=True))
        return torch.cat(latents, dim=2).contiguous()

    def encode_chunks(
        self,
        video: Tensor,
        state: CausalState | None = None,
        chunk: int | None = 1,
        *,
        work: VaeWork | None = None,
    ) -> Iterator[tuple[Tensor, CausalState]]:
        """Yield `(latents, state)` for every `chunk` latent frames; the mirror of decode_chunks.

        The first latent frame of a clip stands for one frame, every later one for four.
        """
        work = work or VaeWork(chunk)
        course = self._course(self.encoder, state or self.encoder_state(), work, video)
        pieces = self._video_pieces(video, work.chunk, course.first)
        for latents in encode_pieces(self, pieces, course, work):
            yield latents, course.state()
            del latents

    def decode(
        self, latents: Tensor, chunk: int | None = None, *, work: VaeWork | None = None
    ) -> Tensor:
        """Normalised latents -> pixels in [-1, 1], fp32 `[B, 3, 4(T-1)+1, H, W]`.

        `work` says more than `chunk` and goes before it.
        """
        work = work or VaeWork(chunk)
        course = self._course(self.decoder, self.decoder_state(), work, latents)
        pieces = self._latent_pieces(latents, work.chunk)
        return torch.cat(list(decode_pieces(self, pieces, course, work, ends=True)), dim=2)

    def decode_chunks(
        self,
        latents: Tensor,
        state: CausalState | None = None,
        chunk: int | None = 1,
        *,
        work: VaeWork | None = None,
    ) -> Iterator[tuple[Tensor, CausalState]]:
        """Yield `(frames, state)` for every `chunk` latent frames (None: by their size).

        A yielded state may be kept; handed back with the latents that follow, decoding goes on as
        if it had never stopped. Memory grows with the chunk, not with the clip; a state that is
        kept while decoding goes on adds its own size. `work` says more than `chunk` and goes before
        it; a state goes on with bands of the same height. With bands as the outer loop there is no
        state to go on from: no frame comes before all are decoded.
        """
        work = work or VaeWork(chunk)
        course = self._course(self.decoder, state or self.decoder_state(), work, latents)
        for frames in decode_pieces(self, self._latent_pieces(latents, work.chunk), course, work):
            yield frames, course.state()
            del frames  # or they would wait for the next ones

    def moments_to_latents(self, moments: Tensor, walk: Walk) -> Tensor:
        """What the encoder gives -> normalised latents, fp32."""
        moments = self.conv1(moments, walk)
        mean, inv_std = latent_statistics(self.spec.z_dim, moments.device)
        return (moments[:, : self.spec.z_dim].float() - mean) * inv_std

    def latents_to_decoder(self, latents: Tensor, walk: Walk) -> Tensor:
        """Normalised latents -> what the decoder takes, `[B, z, T, h, w]` channels last."""
        mean, inv_std = latent_statistics(self.spec.z_dim, latents.device)
        z = (latents.float() / inv_std + mean).to(self.conv2.weight.dtype)
        return self.conv2(channels_last(z), walk)

    def pixels_to_encoder(self, video: Tensor) -> Tensor:
        """Pixels -> what the encoder takes, `[B, C, F, H, W]` channels last."""
        x = video.to(self.conv1.weight.dtype)
        return channels_last(patchify(x, self.spec.patch) if self.spec.patch > 1 else x)

    def decoder_to_pixels(self, x: Tensor) -> Tensor:
        """What the decoder gives -> pixels in [-1, 1], fp32 `[B, 3, F, H, W]`."""
        x = unpatchify(x, self.spec.patch) if self.spec.patch > 1 else x
        return x.float().clamp_(-1, 1)

    def _course(self, side: nn.Module, state: CausalState, work: VaeWork, clip: Tensor) -> Course:
        """The walks of a clip: of pixels for the encoder, of latents for the decoder."""
        bands: tuple[Band, ...] = ()
        if work.band is not None or work.order == "bands":
            encoding = side is self.encoder
            height = clip.shape[3] // (self.spec.spatial_stride if encoding else 1)
            make = encoder_bands if encoding else decoder_bands
            bands = make(self.spec, height, work.band)
        if work.order == "bands" and not (state.first and all(s is None for s in state.slots)):
            raise UsageError(
                "order 'bands' codes a clip as a whole and goes on from no state; use 'time'"
            )
        if not state.first and len(state.bands) != len(bands):
            raise UsageError(
                f"the state is of {len(state.bands)} bands, the work of {len(bands)}; go on with"
                " the same height of bands"
            )
        return Course(state, self.ops, work, bands)

    def _latent_pieces(self, latents: Tensor, chunk: int | None) -> list[Tensor]:
        return list(latents.split(chunk or default_chunk(self.spec, *latents.shape[3:]), dim=2))

    def _video_pieces(self, video: Tensor, chunk: int | None, first: bool) -> list[Tensor]:
        """The frames of every `chunk` latent frames."""
        stride = self.spec.temporal_stride
        h, w = (side // self.spec.spatial_stride for side in video.shape[3:])
        lead = stride - 1 if first else 0  # frames that a clip's first latent frame lacks
        total = (video.shape[2] + lead) // stride * stride
        starts = range(0, total, stride * (chunk or default_chunk(self.spec, h, w)))
        bounds = [max(0, bound - lead) for bound in (*starts, total)]
        return [video[:, :, a:b] for a, b in zip(bounds, bounds[1:], strict=False)]

    def encoder_state(self) -> CausalState:
        """Nothing encoded yet."""
        return CausalState((None,) * self.encoder.num_slots)

    def decoder_state(self) -> CausalState:
        """Nothing decoded yet."""
        return CausalState((None,) * self.decoder.num_slots)


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
