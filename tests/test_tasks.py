"""Conditioning tensors of I2V, FLF2V, TI2V and VACE, by hand and against diffusers' pipelines."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.errors import UsageError
from wanrt.tasks import i2v, vace
from wanrt.tasks.sizes import Size


class FakeVae(nn.Module):
    """A linear stand-in with Wan's strides: 8x8 means, frames 0 | 1-4 | 5-8 ..., 3 -> 16 channels.

    Answers to our `vae_encode` as `encode_pixels` and to diffusers' pipelines as `encode`.
    """

    dtype = torch.float32
    device = torch.device("cpu")
    config = SimpleNamespace(latents_mean=[0.0] * 16, latents_std=[1.0] * 16, z_dim=16)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(16, 3, generator=generator), requires_grad=False)
        self.seen: list[Tensor] = []

    def encode_pixels(self, video: Tensor) -> Tensor:
        self.seen.append(video.clone())
        assert (video.shape[2] - 1) % 4 == 0
        small = F.avg_pool3d(video, (1, 8, 8))  # [B, 3, F, h, w]
        groups = [small[:, :, :1], *small[:, :, 1:].split(4, dim=2)]
        latents = torch.cat([g.mean(2, keepdim=True) for g in groups if g.shape[2]], dim=2)
        return torch.einsum("zc,bcthw->bzthw", self.mix, latents)

    def encode(self, video: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=self.encode_pixels(video))


@pytest.fixture
def vae() -> FakeVae:
    return FakeVae()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    ("frames", "two"), [(1, False), (5, False), (13, False), (5, True), (13, True)]
)
def test_i2v_condition_equals_diffusers(frames: int, two: bool, vae: FakeVae) -> None:
    """At the output size, so that only the reference's resize (bicubic) is out of the picture."""
    from diffusers import WanImageToVideoPipeline

    size = Size(32, 48)
    first, last = noise(3, *size), noise(3, *size, seed=1)
    pipe = SimpleNamespace(
        vae=vae,
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        config=SimpleNamespace(expand_timesteps=False),
    )
    _, theirs = WanImageToVideoPipeline.prepare_latents(
        pipe,
        first[None],
        batch_size=1,
        height=size.height,
        width=size.width,
        num_frames=frames,
        dtype=torch.float32,
        device=torch.device("cpu"),
        latents=torch.zeros(1),
        last_image=last[None] if two else None,
    )
    if two:
        ours = i2v.flf2v_condition(first, last, frames, size, vae.encode_pixels)
    else:
        ours = i2v.i2v_condition(first, frames, size, vae.encode_pixels)
    assert torch.equal(ours, theirs)


def test_i2v_condition_by_hand(vae: FakeVae) -> None:
    image, size = noise(3, 30, 50), Size(32, 48)
    y = i2v.i2v_condition(image, 9, size, vae.encode_pixels)
    (clip,) = vae.seen
    resized = F.interpolate(image[None], size=(32, 48), mode="bicubic", align_corners=False)
    assert torch.equal(clip[0, :, 0], resized[0]) and not clip[0, :, 1:].any()
    assert y[0, :4, :, 0, 0].tolist() == [[1, 0, 0]] * 4
    assert torch.equal(y[0, :4], y[0, :4, :, :1, :1].expand(-1, -1, 4, 6))
    assert torch.equal(y[:, 4:], vae.encode_pixels(clip))


def test_flf2v_mask_for_any_length() -> None:
    """The reference builds it for 81 frames; the rule is the same for others."""
    for frames, columns in ((81, 21), (13, 4), (5, 2)):
        mask = i2v.known_mask(frames, [0, frames - 1])
        expected = torch.zeros(4, columns)
        expected[:, 0] = 1
        expected[3, -1] = 1
        assert torch.equal(mask, expected)


def test_flf2v_crops_the_last_image_to_the_shape_of_the_first(vae: FakeVae) -> None:
    first, last = noise(3, 40, 40), noise(3, 64, 120, seed=1)
    i2v.flf2v_condition(first, last, 5, Size(32, 32), vae.encode_pixels)
    middle = last[:, :, 28:92]
    expected = F.interpolate(middle[None], size=(32, 32), mode="bicubic")[0]
    assert torch.equal(vae.seen[0][0, :, -1], expected)
    assert not vae.seen[0][0, :, 1:-1].any()
    with pytest.raises(UsageError, match="5 or more"):
        i2v.flf2v_condition(first, first, 1, Size(32, 32), vae.encode_pixels)


def test_ti2v_encodes_one_frame_and_holds_it(vae: FakeVae) -> None:
    colours = torch.tensor([-1.0, 1.0, 0.2])
    image = colours[:, None, None].expand(3, 30, 90)
    z = i2v.ti2v_condition(image, Size(32, 64), vae.encode_pixels)
    assert vae.seen[0].shape == (1, 3, 1, 32, 64)
    assert torch.allclose(vae.seen[0][0, :, 0, 0, 0], colours, atol=1 / 255)
    latents = noise(1, 16, 3, 4, 8)
    kept = latents[:, :, 1:].clone()
    assert i2v.hold_first_frame(latents, z) is latents
    assert torch.equal(latents[:, :, :1], z) and torch.equal(latents[:, :, 1:], kept)


def test_token_times() -> None:
    times = i2v.token_times(torch.tensor(937), (3, 2, 2))
    assert times.dtype == torch.float32 and times.tolist() == [[0.0] * 4 + [937.0] * 8]
    assert i2v.token_times(500.0, (2, 1, 1), known_frames=0).tolist() == [[500.0, 500.0]]


def test_mask_takes_the_reference_frames() -> None:
    """Latent frame 0 takes the mask of pixel frame 1, and so on; channel = dy * 8 + dx."""
    frames = torch.arange(81.0)[None, :, None, None].expand(1, 81, 16, 16)
    expected = [1, 5, 9, 13, 17, 21, 25, 28, 32, 36, 40, 44, 48, 52, 55, 59, 63, 67, 71, 75, 79]
    assert vace.mask_channels(frames, 81)[0, 0, :, 0, 0].tolist() == expected
    square = torch.zeros(1, 1, 16, 16)
    square[..., 8 + 5, 3] = 1  # second row of blocks, dy = 5, dx = 3
    channels = vace.mask_channels(square, 5)
    assert channels.nonzero().tolist() == [[0, 5 * 8 + 3, t, 1, 0] for t in range(2)]


@pytest.mark.parametrize("frames", [1, 5, 9, 49, 81, 121, 257])
def test_mask_resampling_is_nearest_exact(frames: int) -> None:
    mask = torch.rand(1, frames, 8, 8, generator=torch.Generator().manual_seed(frames))
    every = F.pixel_unshuffle(mask[0, :, None], 8).transpose(0, 1)[None]  # [1, 64, F, 1, 1]
    oracle = F.interpolate(every, size=((frames + 3) // 4, 1, 1), mode="nearest-exact")
    assert torch.equal(vace.mask_channels(mask, frames), oracle)


def diffusers_context(vae: FakeVae, video: Tensor, mask: Tensor, refs: list[Tensor]) -> Tensor:
    from diffusers import WanVACEPipeline

    pipe = SimpleNamespace(
        vae=vae,
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        transformer=SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2))),
        _execution_device=torch.device("cpu"),
    )
    mask = mask.expand(1, video.shape[1], -1, -1)
    latents = WanVACEPipeline.prepare_video_latents(pipe, video[None], mask[None], [refs])
    masks = WanVACEPipeline.prepare_masks(pipe, mask[None], [refs])
    return torch.cat([latents, masks], dim=1)


@pytest.mark.parametrize("num_refs", [0, 1, 3])
def test_vace_condition_equals_diffusers(num_refs: int, vae: FakeVae) -> None:
    """A soft mask splits the video at 0.5 and is passed on soft, in the reference and here."""
    size = Size(32, 48)
    video, mask = noise(3, 9, *size), (noise(1, 9, *size, seed=1) + 1) / 2
    refs = [noise(3, *size, seed=9 + i) for i in range(num_refs)]
    ours = vace.vace_condition(vace.Source(video, mask), refs, 9, size, vae.encode_pixels)
    assert ours.num_refs == num_refs
    # NOTE: diffusers puts each reference before the ones already there; the reference keeps order.
    theirs = diffusers_context(vae, video, mask, refs[::-1])
    assert torch.equal(ours.context, theirs)
    if num_refs > 1:
        assert not torch.equal(ours.context, diffusers_context(vae, video, mask, refs))


def test_vace_condition_without_a_video_or_a_mask(vae: FakeVae) -> None:
    size = Size(16, 32)
    text, _ = vace.vace_condition(vace.Source(), [], 5, size, vae.encode_pixels)
    gray, ones = torch.zeros(3, 5, *size), torch.ones(1, 5, *size)
    assert torch.equal(text, diffusers_context(vae, gray, ones, []))
    assert len(vae.seen) == 3  # ours encodes the gray clip once, for both halves
    video = noise(3, 5, *size)
    control, _ = vace.vace_condition(vace.Source(video), [], 5, size, vae.encode_pixels)
    assert torch.equal(control, diffusers_context(vae, video, ones, []))
    assert not control[:, :16].any() and control[:, 32:].eq(1).all()
    with pytest.raises(UsageError, match="needs the video"):
        vace.vace_condition(vace.Source(None, ones), [], 5, size, vae.encode_pixels)


def test_references_are_centered_on_white() -> None:
    image = torch.full((3, 20, 10), -0.5)
    canvas = vace.on_white(image, Size(32, 48))
    assert canvas[:, :, 16:32].eq(-0.5).all()  # 20x10 -> 32x16
    assert canvas[:, :, :16].eq(1).all() and canvas[:, :, 32:].eq(1).all()
    wide = vace.on_white(noise(3, 8, 8), Size(16, 32))
    oracle = F.interpolate(noise(3, 8, 8)[None], scale_factor=2, mode="bilinear")[0]
    assert torch.allclose(wide[:, :, 8:24], oracle, atol=1e-6)
    exact = noise(3, 16, 32)
    assert torch.equal(vace.on_white(exact, Size(16, 32)), exact)


def test_inpaint_blanks_what_is_to_be_generated() -> None:
    video, mask = noise(3, 5, 16, 16), torch.zeros(16, 16)
    mask[:, 8:] = 0.51
    filled, kept_mask = vace.inpaint(video, mask)
    assert torch.equal(filled[..., :8], video[..., :8]) and not filled[..., 8:].any()
    assert kept_mask.shape == (1, 1, 16, 16) and torch.equal(kept_mask[0, 0], mask)


@pytest.mark.parametrize(
    ("directions", "ratio", "size", "corner"),
    [  # 40x64 source -> canvas (height, width), (top, left) of the source in it
        (["left", "right"], 0.25, (48, 96), (0, 16)),
        (["left"], 0.25, (48, 80), (0, 16)),
        (["right"], 0.3, (48, 96), (0, 0)),
        (["up"], 0.5, (64, 64), (24, 0)),
        (["up", "down", "left"], 0.5, (80, 96), (20, 32)),
    ],
)
def test_outpaint(
    directions: list, ratio: float, size: tuple[int, int], corner: tuple[int, int]
) -> None:
    video = noise(3, 5, 40, 64)
    canvas, mask = vace.outpaint(video, directions, ratio)
    assert canvas.shape == (3, 5, *size) and mask.shape == (1, 1, *size)
    inside = (..., slice(corner[0], corner[0] + 40), slice(corner[1], corner[1] + 64))
    assert torch.equal(canvas[inside], video) and not mask[inside].any()
    assert mask.sum() == size[0] * size[1] - 40 * 64
    assert not (canvas * mask).any()


def test_outpaint_refuses() -> None:
    for directions, ratio in ((["north"], 0.25), ([], 0.25), (["up"], 0), (["up"], math.nan)):
        with pytest.raises(UsageError, match="outpaint"):
            vace.outpaint(noise(3, 1, 16, 16), directions, ratio)


@pytest.mark.parametrize(("head", "tail"), [(1, 0), (0, 1), (1, 1), (3, 0), (0, 4), (3, 4)])
def test_extend(head: int, tail: int) -> None:
    first = noise(3, head, 16, 32) if head else None
    last = noise(3, tail, 16, 32, seed=1) if tail else None
    one = [x[:, 0] if x is not None and x.shape[1] == 1 else x for x in (first, last)]  # images
    video, mask = vace.extend(13, *one)
    assert video.shape == (3, 13, 16, 32)
    assert mask[0, :, 0, 0].tolist() == [0] * head + [1] * (13 - head - tail) + [0] * tail
    assert torch.equal(mask, mask[:, :, :1, :1].expand(-1, -1, 16, 32))
    assert not video[:, head : 13 - tail].any()
    if first is not None:
        assert torch.equal(video[:, :head], first)
    if last is not None:
        assert torch.equal(video[:, 13 - tail :], last)


def test_extend_refuses() -> None:
    clip = noise(3, 5, 16, 16)
    for first, last, named in (
        (None, None, "give its first"),
        (clip, clip, "10 frames are given and 9 asked for"),
        (clip, noise(3, 16, 32), "16x16, the last ones 32x16"),
    ):
        with pytest.raises(UsageError, match=named):
            vace.extend(9, first, last)


def test_fit_scales_video_and_mask_alike() -> None:
    video, mask = noise(3, 2, 40, 64), torch.zeros(1, 1, 40, 64)
    mask[..., 32:] = 1
    fitted, shade = vace.fit(vace.Source(video, mask), Size(16, 16))
    assert fitted.shape == (3, 2, 16, 16) and fitted.abs().max() <= 1
    assert shade[0, 0, :, :6].max() < 0.5 < shade[0, 0, :, 10:].min() and shade.max() <= 1
    assert vace.fit(vace.Source(), Size(16, 16)) == vace.Source()
