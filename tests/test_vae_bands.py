"""The VAEs in bands, in both orders of the loops, against whole frames: equal to the bit."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanrt.config import VaeSpec, VaeWork
from wanrt.errors import OutputError, UsageError
from wanrt.kernels import reference
from wanrt.models import vae_spool
from wanrt.models.vae import WanVAE
from wanrt.models.vae_bands import BandWalk
from wanrt.models.vae_layers import TORCH, CausalState, VaeOps
from wanrt.models.vae_spool import Spool
from wanrt.vae_shapes import decoder_bands, encoder_bands

REFERENCE = VaeOps(*(getattr(reference, name) for name in VaeOps._fields))
WAN_21 = VaeSpec(base_dim=4, decoder_base_dim=4)
WAN_22 = VaeSpec(z_dim=48, base_dim=4, decoder_base_dim=8, patch=2)
BOTH = {"2.1": WAN_21, "2.2": WAN_22}
each = pytest.mark.parametrize("spec", BOTH.values(), ids=BOTH)


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


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
    VaeWork(1, frames=2),
    VaeWork(band=100),
]


@pytest.mark.parametrize("work", WORKS, ids=str)
@each
def test_bands_equal_the_whole_to_the_bit(spec: VaeSpec, work: VaeWork) -> None:
    """With the reference arithmetic, at a height that no band divides."""
    vae = random_vae(spec, REFERENCE)
    latents, video = draw(spec, 3, 13, 2)
    assert torch.equal(vae.decode(latents, work=work), vae.decode(latents, chunk=3))
    assert torch.equal(vae.encode(video, work=work), vae.encode(video, chunk=3))
