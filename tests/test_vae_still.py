"""Clips that stand still, as those that condition on a picture: less work, the same bits."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from wanrt.config import VaeSpec, VaeWork
from wanrt.models.vae import WanVAE
from wanrt.models.vae_layers import TORCH, VaeOps

SPECS = {
    "2.1": VaeSpec(base_dim=4, decoder_base_dim=4),
    "2.2": VaeSpec(z_dim=48, base_dim=4, decoder_base_dim=8, patch=2),
}
WORKS = [
    VaeWork(1),
    VaeWork(2),
    VaeWork(1, band=2),
    VaeWork(1, band=2, order="bands"),
    VaeWork(1, host=True),
    VaeWork(1, frames=1),
    VaeWork(1, band=2, frames=2),
]
CHUNKS = 21


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def counting_vae(spec: VaeSpec) -> tuple[WanVAE, Counter[int]]:
    """A VAE, and how many frames of each height its temporal convolutions have taken."""
    seen: Counter[int] = Counter()

    def conv(x: Tensor, *args: object, **options: object) -> object:
        seen[x.shape[3]] += x.shape[2] * (len(args) > 4)
        return TORCH.causal_conv3d(x, *args, **options)

    vae = WanVAE(spec, VaeOps(**{**TORCH._asdict(), "causal_conv3d": conv})).eval()
    for name, p in vae.named_parameters():
        p.normal_().mul_(p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
        p.add_(1 if name.endswith("gamma") else 0)
    return vae.requires_grad_(False), seen


def clips(spec: VaeSpec) -> dict[str, Tensor]:
    """A picture then gray; gray between two pictures; all gray; motion that stops and starts."""
    side = spec.spatial_stride * 4
    gray = torch.zeros(1, 3, 4 * CHUNKS - 3, side, side)
    image, both, moving = gray.clone(), gray.clone(), gray.clone()
    image[:, :, 0] = both[:, :, 0] = torch.rand(3, side, side)
    both[:, :, -1] = torch.rand(3, side, side)
    moving[:, :, 33:41] = torch.rand(3, 8, side, side)
    return {"picture": image, "two": both, "gray": gray, "moving": moving}


@pytest.mark.parametrize("work", WORKS, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_still_clip_is_encoded_to_the_same_bits(spec: VaeSpec, work: VaeWork) -> None:
    vae, seen = counting_vae(spec)
    for name, clip in clips(spec).items():
        seen.clear()
        expected = vae.encode(clip, work=work)
        all_frames = sum(seen.values())
        seen.clear()
        assert torch.equal(vae.encode(clip, work=work, still=True), expected), name
        assert sum(seen.values()) < (0.8 if work.chunk == 1 else 0.95) * all_frames, name


@pytest.mark.parametrize("frames", [None, 1, 3])
def test_chunks_that_repeat_behind_another_past_are_computed(frames: int | None) -> None:
    """Within them the last frames are alike: what they leave as it was is not what came before."""
    vae, _ = counting_vae(SPECS["2.1"])
    a, b, c = torch.rand(3, 1, 3, 1, 32, 32)
    clip = torch.cat([a, *[b, c, c, c] * 6], 2)
    work = VaeWork(1, frames=frames)
    assert torch.equal(vae.encode(clip, work=work, still=True), vae.encode(clip, work=work))


def test_chunks_that_each_size_computes() -> None:
    """Chunk 5 of 21 is the first that repeats at full size, 7 at half, 12 at a quarter."""
    vae, seen = counting_vae(SPECS["2.1"])
    clip = clips(SPECS["2.1"])["picture"]
    vae.encode(clip, chunk=1)
    assert seen == {32: 5 * 81, 16: 4 * 81, 8: 80 + 4 * 41, 4: 40 + 9 * 21}
    seen.clear()
    vae.encode(clip, chunk=1, still=True)
    first, second = 4 * 5 - 3, 4 * 7 - 3  # frames of chunks 0 .. 4, 0 .. 6
    assert seen[32] == 5 * first and seen[16] == 4 * second
    assert seen[8] < 0.55 * (80 + 4 * 41)
