"""Every task from prompt and pictures to latents, against a plain loop over the same modules."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from wanrt import sampler
from wanrt.media.image import cover_crop
from wanrt.models.clip import preprocess
from wanrt.tasks import i2v, vace
from wanrt.tasks.sizes import Size
from wanrt.weights.load import load_component

PROMPT, NEGATIVE = "a red circle moving right", "a blue square"
T2V, I2V, FLF2V, VACE = (
    *("wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-flf2v-14b-720p", "wan2.1-vace-1.3b"),
)
T2V_A14B, I2V_A14B, TI2V = "wan2.2-t2v-a14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"
# t is 999, 937, 833, 624: two steps for each of two experts
SETTINGS = {"width": 48, "height": 32, "num_frames": 5, "num_steps": 4, "flow_shift": 5.0}
SETTINGS |= {"negative": NEGATIVE, "seed": 7, "guidance": 3.0}


@dataclass
class Known:
    """What conditions a request, put together by the test."""

    size: Size = Size(32, 48)
    num_frames: int = 5
    y: Tensor | None = None
    clip: tuple[Tensor, ...] = ()  # pictures for CLIP
    source: vace.Source | None = None
    refs: tuple[Tensor, ...] = ()
    context_scale: float = 1.0
    first: Tensor | None = None  # clean first latent frame


Encode = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    model: str
    settings: Callable[[Any], dict[str, Any]]
    known: Callable[[Any, Encode], Known]


def plain(files: Any, encode: Encode) -> Known:
    return Known()


def still(files: Any, encode: Encode) -> Known:
    return Known(num_frames=1)


def picture(files: Any, encode: Encode) -> Known:
    y = i2v.i2v_condition(files.picture, 5, Size(32, 48), encode)
    return Known(y=y, clip=(files.picture,))


def two_pictures(files: Any, encode: Encode) -> Known:
    y = i2v.flf2v_condition(files.picture, files.last, 5, Size(32, 48), encode)
    return Known(y=y, clip=(files.picture, files.last))


def square_picture(files: Any, encode: Encode) -> Known:
    """The picture's shape decides: 40x40 at an area of 48x32 is 32x32. CLIP sees it as it is."""
    y = i2v.i2v_condition(files.square, 5, Size(32, 32), encode)
    return Known(Size(32, 32), y=y, clip=(files.square,))


def unequal_pictures(files: Any, encode: Encode) -> Known:
    y = i2v.flf2v_condition(files.picture, files.square, 5, Size(32, 48), encode)
    return Known(y=y, clip=(files.picture, i2v.match_last(files.picture, files.square)))


def first_frame(files: Any, encode: Encode) -> Known:
    return Known(Size(32, 64), first=i2v.ti2v_condition(files.picture, Size(32, 64), encode))


def edited(
    video: Callable[[Any], Tensor | None], mask: Callable[[Any], Tensor | None], scale: float = 1.0
) -> Callable[[Any, Encode], Known]:
    def known(files: Any, encode: Encode) -> Known:
        pixels = video(files)
        if pixels is None:
            return Known(source=vace.Source())
        frames, height, width = pixels.shape[1:]
        source = vace.Source(pixels, mask(files))
        return Known(Size(height, width), frames, source=source, context_scale=scale)

    return known


def padded(before: int, middle: Tensor, after: int) -> Tensor:
    """Gray frames around known ones."""
    gray = torch.zeros(3, 1, *middle.shape[2:])
    return torch.cat([gray.expand(3, before, -1, -1), middle, gray.expand(3, after, -1, -1)], 1)


def unknown(*flags: int) -> Tensor:
    return torch.tensor(flags, dtype=torch.float32)[None, :, None, None].expand(1, -1, 32, 48)


def referenced(files: Any, encode: Encode) -> Known:
    return Known(source=vace.Source(), refs=(files.picture, files.last))


def widened(files: Any) -> Tensor:
    return torch.cat([torch.zeros(3, 9, 32, 16), files.clip, torch.zeros(3, 9, 32, 16)], 3)


def border(files: Any) -> Tensor:
    mask = torch.ones(1, 1, 32, 80)
    mask[..., 16:64] = 0
    return mask


CASES = {
    "t2v": Case(T2V, lambda f: {}, plain),
    "t2i": Case(T2V, lambda f: {"num_frames": 1}, still),
    "i2v": Case(I2V, lambda f: {"image": f["a.png"]}, picture),
    "flf2v": Case(FLF2V, lambda f: {"image": f["a.png"], "last_image": f["b.png"]}, two_pictures),
    "i2v, of another shape": Case(I2V, lambda f: {"image": f["square.png"]}, square_picture),
    "flf2v, of two shapes": Case(
        FLF2V, lambda f: {"image": f["a.png"], "last_image": f["square.png"]}, unequal_pictures
    ),
    "two experts": Case(T2V_A14B, lambda f: {}, plain),
    "two experts, image": Case(I2V_A14B, lambda f: {"image": f["a.png"]}, picture),
    "ti2v, text": Case(TI2V, lambda f: {"width": 64}, lambda f, e: Known(Size(32, 64))),
    "ti2v, image": Case(TI2V, lambda f: {"image": f["a.png"], "width": 64}, first_frame),
    "vace, text": Case(VACE, lambda f: {}, edited(lambda f: None, lambda f: None)),
    "vace, references": Case(VACE, lambda f: {"refs": (f["a.png"], f["b.png"])}, referenced),
    "vace, control": Case(
        VACE, lambda f: {"video": f["clip.mp4"]}, edited(lambda f: f.clip, lambda f: None)
    ),
    "vace, weak control": Case(
        VACE,
        lambda f: {"video": f["clip.mp4"], "context_scale": 0.5},
        edited(lambda f: f.clip, lambda f: None, scale=0.5),
    ),
    "vace, inpaint by image": Case(
        VACE,
        lambda f: {"video": f["clip.mp4"], "mask": f["mask.png"]},
        edited(lambda f: f.clip * (1 - f.half), lambda f: f.half),
    ),
    "vace, inpaint by video": Case(
        VACE,
        lambda f: {"video": f["clip.mp4"], "mask": f["mask.mp4"]},
        edited(lambda f: f.clip * (f.shade <= 0.5), lambda f: f.shade),
    ),
    "vace, outpaint": Case(
        VACE,
        lambda f: {"video": f["clip.mp4"], "outpaint": "left,right:0.35", "width": 80},
        edited(widened, border),
    ),
    "vace, from an image": Case(
        VACE,
        lambda f: {"image": f["a.png"]},
        edited(lambda f: padded(0, f.picture[:, None], 4), lambda f: unknown(0, 1, 1, 1, 1)),
    ),
    "vace, to an image": Case(
        VACE,
        lambda f: {"last_image": f["a.png"]},
        edited(lambda f: padded(4, f.picture[:, None], 0), lambda f: unknown(1, 1, 1, 1, 0)),
    ),
    "vace, between images": Case(
        VACE,
        lambda f: {"image": f["b.png"], "last_image": f["a.png"]},
        edited(
            lambda f: torch.cat([f.last[:, None], padded(3, f.picture[:, None], 0)], 1),
            lambda f: unknown(0, 1, 1, 1, 0),
        ),
    ),
    "vace, from an image of another shape": Case(
        VACE,
        lambda f: {"image": f["square.png"]},
        edited(
            lambda f: padded(0, cover_crop(f.square[None], 32, 48).clamp(-1, 1)[0][:, None], 4),
            lambda f: unknown(0, 1, 1, 1, 1),
        ),
    ),
    "vace, after a clip": Case(
        VACE,
        lambda f: {"video": f["clip.mp4"], "extend": "after", "num_frames": 13},
        edited(lambda f: padded(0, f.clip[:, -6:], 7), lambda f: unknown(*[0] * 6, *[1] * 7)),
    ),
    "vace, before a clip": Case(
        VACE,
        lambda f: {"video": f["clip.mp4"], "extend": "before", "num_frames": 13},
        edited(lambda f: padded(7, f.clip[:, :6], 0), lambda f: unknown(*[1] * 7, *[0] * 6)),
    ),
    "vace, after a clip shorter than half": Case(
        VACE,
        lambda f: {"video": f["clip.mp4"], "extend": "after", "num_frames": 21},
        edited(lambda f: padded(0, f.clip, 12), lambda f: unknown(*[0] * 9, *[1] * 12)),
    ),
}


def experts(folder: Path, boundary: float | None) -> Callable[[float], tuple[nn.Module, float]]:
    """Transformer and guidance of a timestep: 3, and 2 for the low-noise expert."""
    if boundary is None:
        only = load_component(folder, "dit")
        return lambda t: (only, 3.0)
    high = load_component(folder / "high_noise_model", "dit")
    low = load_component(folder / "low_noise_model", "dit")
    return lambda t: (high, 3.0) if t >= boundary * 1000 else (low, 2.0)


@torch.inference_mode()
def by_hand(zoo: Any, case: Case, files: Any) -> Tensor:
    """The latents of a request, by the plainest loop that the reference's description gives."""
    folder, spec = zoo.path(case.model), zoo.specs[case.model]
    vae = load_component(folder, "vae")
    known = case.known(files, lambda video: vae.encode(video, chunk=1))
    extra: dict[str, Any] = {}
    if known.y is not None:
        extra["y"] = known.y
    if known.clip and spec.clip:
        clip = load_component(folder, "clip")
        tokens = [clip(preprocess(pixels[None])) for pixels in known.clip]
        extra["image_context"] = torch.cat(tokens, 1)
    if known.source is not None:
        extra["context_scale"] = known.context_scale
        extra["vace_context"], _ = vace.vace_condition(
            known.source, known.refs, known.num_frames, known.size, vae.encode
        )
    contexts = torch.zeros(2, 512, spec.dit.text_dim)
    for context, prompt in zip(contexts, (PROMPT, NEGATIVE), strict=True):
        rows = zoo.text_rows(case.model, prompt)
        context[: len(rows)] = rows
    stride, num_refs = spec.vae.spatial_stride, len(known.refs)
    frames = (known.num_frames - 1) // 4 + 1 + num_refs
    shape = (1, spec.vae.z_dim, frames, known.size.height // stride, known.size.width // stride)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    expert = experts(folder, spec.boundary)
    timesteps, sigmas = sampler.schedule("unipc", 4, 5.0)
    solver = sampler.UniPC(sigmas)
    for step in timesteps.tolist():
        dit, guidance = expert(step)
        t: float | Tensor = step
        if known.first is not None:
            x[:, :, :1] = known.first
            levels = torch.full((1, frames, shape[3] // 2, shape[4] // 2), float(step))
            levels[:, 0] = 0
            t = levels.flatten(1)
        cond, uncond = (dit(x, t, context[None], **extra) for context in contexts)
        x = solver.step(uncond + guidance * (cond - uncond), x)
    if known.first is not None:
        x[:, :, :1] = known.first
    return x[:, :, num_refs:]


@pytest.mark.parametrize("name", CASES)
def test_every_task_against_a_plain_loop(name: str, zoo: Any, files: Any) -> None:
    case = CASES[name]
    pipe = zoo.open(case.model)
    settings = SETTINGS | case.settings(files)
    if pipe.spec.boundary:
        settings["guidance_low"] = 2.0
    latents = pipe.generate(PROMPT, output="latents", **settings)
    expected = by_hand(zoo, case, files)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
