"""The VAEs in bands, in both orders of the loops, against whole frames: equal to the bit."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.config import VaeSpec, VaeWork
from wanrt.errors import OutputError, UsageError
from wanrt.kernels import reference_vae, torch_conv
from wanrt.models import vae_spool
from wanrt.models.vae import WanVAE
from wanrt.models.vae_layers import TORCH, CausalState, VaeOps
from wanrt.models.vae_spool import Spool
from wanrt.vae_shapes import decoder_bands, encoder_bands

WAN_21 = VaeSpec(base_dim=4, decoder_base_dim=4)
WAN_22 = VaeSpec(z_dim=48, base_dim=4, decoder_base_dim=8, patch=2)
BOTH = {"2.1": WAN_21, "2.2": WAN_22}
each = pytest.mark.parametrize("spec", BOTH.values(), ids=BOTH)


@pytest.fixture(autouse=True)
def exact():
    """oneDNN, as BLAS, orders a sum's terms by the shape of what it is given."""
    torch.manual_seed(0)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        yield


class Rows:
    """The reference arithmetic, a row of pixels at a time: no bit depends on the height."""

    rms_norm_channels = staticmethod(reference_vae.rms_norm_channels)

    @staticmethod
    def causal_conv3d(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        history: Tensor | None,
        gamma: Tensor | None = None,
        residual: Tensor | None = None,
        stride: int = 1,
        out: Tensor | None = None,
        accumulator: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor | None]:
        taps, b = weight.shape[3], x.shape[0]
        past = None if history is None else windows(history, taps)
        y, kept = reference_vae.causal_conv3d(
            windows(x, taps), weight, bias, past, gamma, stride=stride
        )
        y = whole(y[..., taps // 2, :], b)
        y = y if residual is None else y + residual
        return (y if out is None else out.copy_(y)), (
            kept if kept is None else whole(kept[..., taps // 2, :], b)
        )

    @staticmethod
    def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = reference_vae.upsample_conv2d(windows(x, 3), weight, bias)
        pairs = [whole(y[..., i, :], x.shape[0]) for i in (2, 3)]
        return torch.stack(pairs, 4).flatten(3, 4)

    @staticmethod
    def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = windows(x, 3)[1::2][: x.shape[3] // 2] if len(x) == 1 else None
        return whole(reference_vae.downsample_conv2d(rows, weight, bias)[..., 0, :], 1)


def windows(x: Tensor, taps: int) -> Tensor:
    """`[B, C, T, H, W]` -> `[B * H, C, T, taps, W]`: each row amid its neighbours."""
    half = taps // 2
    rows = F.pad(x, (0, 0, half, half)).unfold(3, taps, 1)  # [B, C, T, H, W, taps]
    return rows.permute(0, 3, 1, 2, 5, 4).flatten(0, 1)


def whole(rows: Tensor, b: int) -> Tensor:
    """`[B * H, C, T, W]` -> `[B, C, T, H, W]`, channels last."""
    x = rows.unflatten(0, (b, -1)).permute(0, 2, 3, 1, 4)
    return x.contiguous(memory_format=torch.channels_last_3d)


ROWS = TORCH._replace(
    **{name: getattr(Rows, name) for name in VaeOps._fields if hasattr(Rows, name)}
)


def random_vae(spec: VaeSpec, ops: VaeOps = TORCH) -> WanVAE:
    """Weights large enough that every layer matters, a head small enough that few pixels clamp."""
    vae = WanVAE(spec, ops).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        p.normal_().mul_(p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
        if name.endswith("gamma"):
            p.add_(1)
        elif name.startswith("decoder.head.2"):
            p.mul_(0.4)
    return vae


def draw(spec: VaeSpec, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Latents and pixels of one clip, sizes in latents."""
    stride = spec.spatial_stride
    pixels = torch.rand(1, 3, 4 * frames - 3, height * stride, width * stride) * 2 - 1
    return torch.randn(1, spec.z_dim, frames, height, width), pixels


WORKS = [
    VaeWork(1, band=5),
    VaeWork(2, band=4, frames=1),
    VaeWork(3, band=1, host=True),
    VaeWork(1, band=7, order="bands"),
    VaeWork(2, band=4, order="bands", frames=3),
    VaeWork(2, order="bands"),
    VaeWork(1, frames=1),
    VaeWork(1, frames=2),
    VaeWork(band=100),
]


@pytest.fixture(scope="module", params=BOTH.values(), ids=BOTH)
def coded(request: pytest.FixtureRequest) -> tuple[WanVAE, Tensor, Tensor, Tensor, Tensor]:
    """A VAE, latents and pixels of odd height, what it makes of them whole."""
    torch.manual_seed(0)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        vae = random_vae(request.param, ROWS)
        latents, video = draw(request.param, 3, 13, 2)
        return vae, latents, video, vae.decode(latents, chunk=3), vae.encode(video, chunk=3)


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_bands_equal_the_whole_to_the_bit(
    coded: tuple[WanVAE, Tensor, Tensor, Tensor, Tensor], work: VaeWork
) -> None:
    vae, latents, video, pixels, encoded = coded
    assert torch.equal(vae.decode(latents, work=work), pixels)
    assert torch.equal(vae.encode(video, work=work), encoded)


@pytest.mark.parametrize("work", WORKS[:4], ids=str)
@each
def test_bands_equal_the_whole_on_the_fast_path(spec: VaeSpec, work: VaeWork) -> None:
    """To rounding: oneDNN picks its blocking by shape, and so the order of a sum's terms."""
    with torch.backends.mkldnn.flags(enabled=True):
        vae = random_vae(spec)
        latents, video = draw(spec, 3, 7, 5)
        assert (vae.decode(latents, work=work) - vae.decode(latents)).abs().max() <= 1e-5
        assert (vae.encode(video, work=work) - vae.encode(video)).abs().max() <= 1e-5


@each
def test_the_halo_of_a_decoder_is_13_latent_rows(spec: VaeSpec) -> None:
    """Not one row more or fewer: found from the rows that NaN in one latent row reaches."""
    top, inner, bottom = decoder_bands(spec, 60, 20)
    assert (top.given[:2], inner.given[:2], bottom.given[:2]) == ((0, 33), (7, 53), (27, 60))
    vae = random_vae(spec)
    for row, reached in ((6, False), (7, True), (52, True), (53, False)):
        x = torch.randn(1, vae.decoder.conv1.out_channels, 2, 60, 1)
        x[:, :, 0, row] = torch.nan
        y = vae.decoder.local(x, vae._course(vae.decoder, vae.decoder_state(), VaeWork(), x).whole)
        assert y[..., inner.result.start : inner.result.stop, :].isnan().any() == reached


@each
def test_the_halo_of_an_encoder_is_what_its_layers_see(spec: VaeSpec) -> None:
    """A band sees (2, 2, 2) x 2 convolutions at each size, more rows below it than above."""
    inner = encoder_bands(spec, 30, 10)[1]
    first, last = inner.given.start, inner.given.stop - 1
    vae = random_vae(spec)
    for row, reached in ((first - 1, False), (first, True), (last, True), (last + 1, False)):
        x = torch.randn(1, vae.encoder.conv1.in_channels, 1, inner.given.height, 8)
        x[..., row, :] = torch.nan
        walk = vae._course(vae.encoder, vae.encoder_state(), VaeWork(), x).whole
        for layer in vae.encoder.local_layers:
            x = layer(x, walk)
        assert x[..., inner.result.start : inner.result.stop, :].isnan().any() == reached


@each
def test_a_banded_state_goes_on_where_it_stopped(spec: VaeSpec) -> None:
    vae, work = random_vae(spec), VaeWork(1, band=3, host=True)
    latents, video = draw(spec, 4, 7, 2)
    for run, clip, cut in ((vae.decode_chunks, latents, 2), (vae.encode_chunks, video, 5)):
        steps = list(run(clip, work=work))
        state = steps[1][1]
        assert isinstance(state, CausalState) and len(state.bands) == 3
        rest = torch.cat([part for part, _ in run(clip[:, :, cut:], state, work=work)], 2)
        assert torch.equal(rest, torch.cat([part for part, _ in steps[2:]], 2))
        with pytest.raises(UsageError, match="3 bands"):
            next(run(clip, state, work=VaeWork(1, band=4)))
        with pytest.raises(UsageError, match="0 bands"):
            next(run(clip, next(run(clip))[1], work=work))
        with pytest.raises(UsageError, match="'bands'"):
            next(run(clip, state, work=VaeWork(1, band=3, order="bands")))


def test_attention_takes_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = random_vae(WAN_21)
    latents, _ = draw(WAN_21, 1, 7, 5)
    expected = vae.decode(latents)
    sizes, attend = [], F.scaled_dot_product_attention

    def seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes.append((q.shape[2], k.shape[2]))
        return attend(q, k, v)

    monkeypatch.setattr(torch_conv, "_SCORES", 10 * 35)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    assert (vae.decode(latents) - expected).abs().max() <= 1e-6
    assert sizes == [(10, 35), (10, 35), (10, 35), (5, 35)]


def test_a_full_disk_is_told_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_spool.tempfile, "tempdir", str(tmp_path))

    class Full:
        def __init__(self, file):
            self.file, self.seek, self.close = file, file.seek, file.close

        def write(self, data) -> None:
            raise OSError(28, "No space left on device")

    opened = vae_spool.tempfile.TemporaryFile
    monkeypatch.setattr(vae_spool.tempfile, "TemporaryFile", lambda **kw: Full(opened(**kw)))
    vae = random_vae(WAN_21)
    latents, _ = draw(WAN_21, 1, 4, 2)
    with pytest.raises(OutputError, match=f"{tmp_path}.*No space left.*TMPDIR"):
        vae.decode(latents, work=VaeWork(1, band=2, order="bands"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_spool_gives_back_what_it_was_given(dtype: torch.dtype) -> None:
    tensors = {i: torch.randn(1, 3, i + 1, 4, 5).to(dtype) for i in range(3)}
    with Spool() as spool:
        for name, x in tensors.items():
            spool.put(name, x)
        for name, x in reversed(tensors.items()):
            assert torch.equal(spool.get(name), x)
