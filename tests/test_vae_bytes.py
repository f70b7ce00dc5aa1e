"""The bytes predicted for a VAE against the storage its modules allocate, at real sizes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from int8_vaes import make_empty_int8
from torch import Tensor

from wanrt.config import MODELS, NANO, VaeSpec, VaeWork
from wanrt.kernels import channel_norm, conv, conv_int8
from wanrt.kernels.torch_conv import rms_norm_channels
from wanrt.memory.measure import LiveBytes
from wanrt.memory.vae_byte_walk import Backend
from wanrt.memory.vae_bytes import VaeBytes, decode_bytes, encode_bytes
from wanrt.models import vae_coding
from wanrt.models.vae import WanVAE
from wanrt.models.vae_layers import TORCH, CausalState, VaeOps

SPECS = {
    "2.1": MODELS["wan2.1-t2v-1.3b"].vae,
    "2.2": MODELS["wan2.2-ti2v-5b"].vae,
}
SIZES = [(480, 832), (720, 1280)]
WORKS = [
    VaeWork(1),
    VaeWork(1, frames=1),
    VaeWork(1, band=16),
    VaeWork(2, band=23, frames=2),
]
PREDICT = {"decode": decode_bytes, "encode": partial(encode_bytes, still=False)}


def measure(
    spec: VaeSpec,
    side: str,
    size: tuple[int, int],
    dtype: torch.dtype,
    work: VaeWork,
    ops: VaeOps,
    int8: bool = False,
) -> VaeBytes:
    """Run the modules on tensors without data, long enough that every cache is full."""
    frames, stride = 3 * (work.chunk or 1), spec.spatial_stride
    with torch.device("meta"), torch.inference_mode():
        vae = WanVAE(spec, ops).to(dtype)
        if int8:
            make_empty_int8(vae)
        if side == "decode":
            clip = torch.empty(1, spec.z_dim, frames, size[0] // stride, size[1] // stride)
        else:
            clip = torch.empty(1, 3, 4 * frames - 3, *size)
        with LiveBytes().ignore(clip, *vae.parameters(), *vae.buffers()) as bytes_:
            for _, state in getattr(vae, f"{side}_chunks")(clip, work=work):
                caches = cache_bytes(state)
                del _, state  # who keeps them pays for them
    return VaeBytes(bytes_.peak - caches, caches)


def cache_bytes(state: CausalState) -> int:
    slots = [s for group in (state.slots, *state.bands) for s in group if s is not None]
    return sum(slot.untyped_storage().nbytes() for slot in slots)


def check(predicted: VaeBytes, measured: VaeBytes) -> None:
    assert predicted.caches == measured.caches
    share = predicted.activations / measured.activations
    assert 1 <= share <= 1.05, f"{share:.3f} {predicted} {measured}"


@pytest.mark.parametrize("work", WORKS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("side", PREDICT)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_predicted_bytes_are_those_allocated(
    spec: VaeSpec, side: str, size: tuple[int, int], work: VaeWork
) -> None:
    measured = measure(spec, side, size, torch.float32, work, TORCH)
    check(PREDICT[side](spec, *size, 4, work), measured)


def ops_of(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> VaeOps:
    """Triton's kernels allocate as they would, but are not launched."""
    if backend == "torch":
        return TORCH
    for module in (conv, conv_int8, channel_norm):
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    tiles = (conv.Tile(128, 64, 0, 32, 1, 4, 4),)
    for module in (conv, conv_int8):
        monkeypatch.setattr(module, "_tiles", lambda *args: tiles)
    return TORCH._replace(
        rms_norm_channels=rms_norm_channels,
        causal_conv3d=conv.causal_conv3d,
        causal_conv3d_int8=conv_int8.causal_conv3d_int8,
        upsample_conv2d=conv.upsample_conv2d,
        downsample_conv2d=conv.downsample_conv2d,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_predicted_bytes_of_int8(
    spec: VaeSpec, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's convolution is 27 products for each frame, which takes long to count."""
    ops = ops_of(backend, monkeypatch)
    for size in SIZES if backend == "triton" else SIZES[:1]:
        for work in WORKS if backend == "triton" else WORKS[1:2]:
            measured = measure(spec, "decode", size, torch.float16, work, ops, int8=True)
            check(decode_bytes(spec, *size, 2, work, backend, int8=True), measured)


@pytest.mark.parametrize("work", [VaeWork(1), VaeWork(1, band=23)], ids=str)
def test_predicted_bytes_of_int8_beside_fp32(work: VaeWork) -> None:
    measured = measure(SPECS["2.1"], "decode", (480, 832), torch.float32, work, TORCH, int8=True)
    check(decode_bytes(SPECS["2.1"], 480, 832, 4, work, "torch", int8=True), measured)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_predicted_bytes_of_int8_in_every_way(spec: VaeSpec, size: tuple[int, int]) -> None:
    for work in WORKS:
        for dtype in (torch.float16, torch.float32):
            measured = measure(spec, "decode", size, dtype, work, TORCH, int8=True)
            check(decode_bytes(spec, *size, dtype.itemsize, work, "torch", int8=True), measured)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("side", PREDICT)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_predicted_bytes_in_16_bits(
    spec: VaeSpec, side: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = ops_of(backend, monkeypatch)
    for work in (VaeWork(1), VaeWork(1, band=16)):
        measured = measure(spec, side, (480, 832), torch.bfloat16, work, ops)
        check(PREDICT[side](spec, 480, 832, 2, work, backend), measured)


class Away:
    """A spool that keeps shapes alone: a file takes no memory of the device."""

    def __init__(self) -> None:
        self.shapes: dict[object, tuple[torch.Size, torch.dtype]] = {}

    def __enter__(self) -> "Away":
        return self

    def __exit__(self, *error: object) -> None:
        self.shapes.clear()

    def put(self, name: object, x: Tensor) -> None:
        self.shapes[name] = x.shape, x.dtype

    def get(self, name: object) -> Tensor:
        shape, dtype = self.shapes[name]
        x = torch.empty(shape, dtype=dtype, device="meta")
        return x.to(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("side", PREDICT)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_predicted_bytes_band_by_band(
    spec: VaeSpec, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches come and go with the bands here, so that the sum is what can be measured."""
    monkeypatch.setattr(vae_coding, "Spool", Away)
    work = VaeWork(1, band=16, order="bands")
    measured = measure(spec, side, (480, 832), torch.float32, work, TORCH)
    predicted = PREDICT[side](spec, 480, 832, 4, work)
    share = sum(predicted) / (measured.activations + measured.caches)
    assert 1 <= share <= 1.05, f"{share:.3f} {predicted} {measured}"


@pytest.mark.parametrize("side", PREDICT)
def test_bands_and_hosts_take_caches_off_the_device(side: str) -> None:
    spec, predict = SPECS["2.1"], PREDICT[side]
    size = (720, 1280, 4)
    whole = predict(spec, *size, VaeWork(1))
    in_time = predict(spec, *size, VaeWork(1, band=10))
    by_band = predict(spec, *size, VaeWork(1, band=10, order="bands"))
    assert in_time.activations < 0.6 * whole.activations
    assert whole.caches < in_time.caches and by_band.caches < whole.caches / 2
    hosted = predict(spec, *size, VaeWork(1, band=10, host=True))
    assert hosted.caches == 0 and hosted.activations > in_time.activations


@pytest.mark.parametrize("band", [None, 4])
def test_caches_in_host_memory_are_counted(band: int | None) -> None:
    spec, work = NANO.vae, VaeWork(1, band=band, host=True)
    vae = WanVAE(spec)
    with torch.inference_mode():
        for _, state in vae.decode_chunks(torch.randn(1, spec.z_dim, 3, 8, 8), work=work):
            held = cache_bytes(state)
    predicted = decode_bytes(spec, 64, 64, 4, work)
    assert held == predicted.host > 0 and predicted.caches == 0
    assert predicted.host == decode_bytes(spec, 64, 64, 4, replace(work, host=False)).caches


def test_a_still_clip_keeps_a_little_more() -> None:
    """Each band one activation at half size; whole frames no more than they held before."""
    size = (720, 1280, 4)
    for work, least, most in ((VaeWork(1), 1, 1.001), (VaeWork(1, band=10), 1.05, 1.5)):
        usual = encode_bytes(SPECS["2.1"], *size, work, still=False)
        still = encode_bytes(SPECS["2.1"], *size, work)
        assert still.caches == usual.caches
        assert least <= still.activations / usual.activations <= most


def test_caches_are_those_of_the_specification() -> None:
    """wan-spec 3.6: 3.78 and 8.72 GB to decode, 2.24 and 5.18 GB to encode, in fp32."""
    spec = SPECS["2.1"]
    for predict, sizes in ((decode_bytes, (3.78, 8.72)), (encode_bytes, (2.24, 5.18))):
        for size, expected in zip(SIZES, sizes, strict=True):
            assert round(predict(spec, *size, 4, VaeWork(1)).caches / 1e9, 2) == expected
