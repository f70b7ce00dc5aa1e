"""What conditions a request besides its prompt: pictures and videos in, tensors per step out."""

import math
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.budgeted import make_vae_safer, within_memory
from wanrt.components import Components
from wanrt.config import GenerateConfig, VaeWork, WanSpec
from wanrt.errors import UsageError
from wanrt.media.image import is_image, load_image
from wanrt.media.marking import Input, Origin
from wanrt.models.clip import preprocess
from wanrt.request import Request, size_for, with_size
from wanrt.tasks import i2v, limits, vace
from wanrt.tasks.sizes import Size, latent_shape, vace_grid
from wanrt.watch import healthy


@dataclass(frozen=True)
class Inputs:
    """The user's pictures and videos as pixels in [-1, 1]."""

    image: Tensor | None = None  # [3, H, W]
    last_image: Tensor | None = None
    source: vace.Source = field(default_factory=vace.Source)
    refs: tuple[Tensor, ...] = ()


class Text(NamedTuple):
    """Text features as the transformer takes them: `rows` [1, n, text_dim], fp32.

    The reference puts zero rows behind a prompt, up to 512. All of them make the same key and the
    same value, so one row stands for them: `key_bias` [1, n] has the log of their number, which
    multiplies that key's share of the softmax. Exact, but for the order of sums.
    """

    rows: Tensor
    key_bias: Tensor | None

    @classmethod
    def pad(cls, features: Tensor, length: int, device: torch.device) -> "Text":
        """features `[n <= length, text_dim]`."""
        missing = length - len(features)
        features = features.to(device, torch.float32)
        if missing == 0:
            return cls(features[None], None)
        bias = torch.zeros(1, len(features) + 1, device=device)
        bias[0, -1] = math.log(missing)
        return cls(F.pad(features, (0, 0, 0, 1))[None], bias)


class StepInputs(NamedTuple):
    """What the transformer is given in one step beside latents and text."""

    t: float | Tensor
    extra: dict[str, Any]


@dataclass
class Conditions:
    """Everything that stays the same from step to step."""

    text: Text
    negative: Text | None
    y: Tensor | None = None  # [1, 20, T, h, w]
    image_context: Tensor | None = None  # CLIP tokens
    vace_context: Tensor | None = None  # [1, 96, T, h, w]
    context_scale: float = 1.0
    num_refs: int = 0
    first: Tensor | None = None  # TI2V: the clean first latent frame [1, 48, 1, h, w]
    grid: tuple[int, int, int] = (0, 0, 0)

    def prepare(self, dit: nn.Module) -> tuple[Any, Any]:
        """Keys and values of the text for this transformer, once: with the prompt, without."""
        texts = [self.text] if self.negative is None else [self.text, self.negative]
        caches = dit.prepare_each(texts, self.image_context)
        return caches[0], caches[1] if len(caches) > 1 else None

    def step_inputs(self, t: float) -> StepInputs:
        extra: dict[str, Any] = {}
        if self.y is not None:
            extra["y"] = self.y
        if self.vace_context is not None:
            extra |= {"vace_context": self.vace_context, "context_scale": self.context_scale}
        if self.first is None:
            return StepInputs(t, extra)
        return StepInputs(i2v.token_times(t, self.grid).to(self.first.device), extra)

    def impose(self, latents: Tensor) -> Tensor:
        """Put back what is known: TI2V's first frame stays clean."""
        return latents if self.first is None else i2v.hold_first_frame(latents.clone(), self.first)


def origin_of(config: GenerateConfig, request: Request, spec: WanSpec) -> Origin:
    """What a mark says of this request; a mask shows nothing and is not an input in that sense."""
    given = {"image": config.image, "last image": config.last_image, "video": config.video}
    given |= {f"reference {n}": ref for n, ref in enumerate(config.refs, start=1)}
    inputs = tuple(
        Input(role, Path(value) if isinstance(value, str | PathLike) else None)
        for role, value in given.items()
        if value is not None
    )
    return Origin(spec.title, request.task, inputs, request.prompt)


def prepare_inputs(
    config: GenerateConfig, request: Request, spec: WanSpec
) -> tuple[Request, Inputs]:
    """Read pictures and videos and settle the output size; costs no model work.

    Raises FormatError for files that cannot be used.
    """
    image = None if config.image is None else load_image(config.image)
    last = None if config.last_image is None else load_image(config.last_image)
    if request.task in ("i2v", "flf2v"):
        assert image is not None
        return size_for(request, spec, *reversed(image.shape[1:])), Inputs(image, last)
    if request.task != "vace":
        return request, Inputs()
    refs = tuple(load_image(ref) for ref in config.refs)
    source = _vace_source(config, request, image, last)
    if source.video is not None:
        frames, height, width = source.video.shape[1:]
        limits.check_frames(frames)
        limits.check_size(width, height, spec.vae.spatial_stride * 2)
        request = with_size(request, width, height, frames)
    return request, Inputs(source=source, refs=refs)


def _vace_source(
    config: GenerateConfig, request: Request, image: Tensor | None, last: Tensor | None
) -> vace.Source:
    """Control video, masked edit, outpaint or extension, by what is given."""
    size = Size(request.height, request.width)
    edits = [n for n in ("mask", "outpaint", "extend") if getattr(config, n) is not None]
    if len(edits) > 1:
        raise UsageError(f"--{edits[0]} and --{edits[1]} are two kinds of edit; give one of them")
    if config.video is None:
        if edits:
            raise UsageError(f"--{edits[0]} edits a video; give it with --video")
        if image is None and last is None:
            return vace.Source()
        pictures = (None if p is None else _cover(p, size) for p in (image, last))
        return vace.extend(request.num_frames, *pictures)
    if image is not None or last is not None:
        raise UsageError("--image and --last-image extend by pictures; leave them out with --video")
    if isinstance(config.video, vace.Source) and not edits:
        return config.video
    if not _is_path(config.video):
        raise UsageError("video is a path, or a wanrt.tasks.vace.Source without a further edit")
    if config.extend:
        at_most = max(1, request.num_frames // 2)
        clip = vace.read_end(config.video, config.extend == "after", at_most, size)
        ends = (clip, None) if config.extend == "after" else (None, clip)
        return vace.extend(request.num_frames, *ends)
    area = request.width * request.height
    video_mask = config.mask if _is_path(config.mask) and not is_image(config.mask) else None
    source = vace.read_source(config.video, video_mask, area)
    if source.mask is not None:
        return vace.inpaint(source.video, source.mask)
    if config.mask is not None:
        mask = _cover(load_image(config.mask), Size(*source.video.shape[2:]))
        return vace.inpaint(source.video, (mask[:1] + 1) / 2)
    if config.outpaint is None:
        return source
    wider = vace.outpaint(source.video, *_directions(config.outpaint))
    frames, height, width = wider.video.shape[1:]
    return vace.fit(wider, vace_grid(frames, width, height, area).size)


def _is_path(value: object) -> bool:
    return isinstance(value, str | PathLike)


def _cover(picture: Tensor, size: Size) -> Tensor:
    return vace.fit(vace.Source(picture[:, None]), size).video[:, 0]


def _directions(text: str) -> tuple[list[str], float]:
    """`left,right:0.25` -> directions and how much of the side to add in each."""
    names, _, ratio = text.partition(":")
    try:
        return names.split(","), float(ratio) if ratio else 0.25
    except ValueError:
        raise UsageError(
            f"outpaint {text!r}: write directions and a ratio, as left,right:0.25"
        ) from None


def make_conditions(
    request: Request,
    inputs: Inputs,
    text: Text,
    negative: Text | None,
    components: Components,
) -> Conditions:
    """Run the image encoder and the VAE over the inputs, then let them go."""
    conditions = Conditions(text, negative, context_scale=request.context_scale)
    spec, size = components.spec, Size(request.height, request.width)

    def encode(video: Tensor) -> Tensor:
        while True:
            latents = within_memory(components, "encode", lambda: _latents(video, components))
            if healthy(latents):
                return latents
            make_vae_safer(components, "encoding a picture or video")

    if spec.dit.image_dim is not None:
        pictures = [inputs.image]
        if inputs.last_image is not None:
            pictures.append(i2v.match_last(inputs.image, inputs.last_image))
        conditions.image_context = within_memory(
            components, "image", lambda: _clip_tokens(pictures, components)
        )
    if request.task == "flf2v":
        conditions.y = i2v.flf2v_condition(
            inputs.image, inputs.last_image, request.num_frames, size, encode
        )
    elif request.task == "i2v" and spec.vae.patch == 2:
        conditions.first = i2v.ti2v_condition(inputs.image, size, encode)
    elif request.task == "i2v":
        conditions.y = i2v.i2v_condition(inputs.image, request.num_frames, size, encode)
    elif request.task == "vace":
        vace_condition = vace.vace_condition(
            inputs.source, inputs.refs, request.num_frames, size, encode
        )
        conditions.vace_context, conditions.num_refs = vace_condition
    shape = latent_shape(request.num_frames, size, spec.vae, conditions.num_refs)
    conditions.grid = (shape.frames, shape.height // 2, shape.width // 2)
    components.release("vae", "clip")
    return conditions


def _latents(video: Tensor, components: Components) -> Tensor:
    plan = components.plan
    work = VaeWork(chunk=1) if plan is None else plan.work("encode")
    return components.vae().encode(video.to(components.device), work=work, still=True)


def _clip_tokens(pictures: list[Tensor | None], components: Components) -> Tensor:
    """CLIP tokens of each picture, one after the other: `[1, 257 * n, D]`."""
    clip = components.clip()
    weight = clip.patch_embedding.weight
    tokens = [clip(preprocess(p[None].to(weight.device)).to(weight.dtype)) for p in pictures]
    return torch.cat(tokens, dim=1)


def noise_shape(request: Request, spec: WanSpec, num_refs: int) -> tuple[int, ...]:
    """`[1, C, T, h, w]` of the latents; each reference image adds a frame in front."""
    size = Size(request.height, request.width)
    return (1, *latent_shape(request.num_frames, size, spec.vae, num_refs))
