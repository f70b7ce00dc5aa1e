"""From what the user asks to what will be done: every default filled in, every value checked."""

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, get_args

from wanrt.config import FLF2V_NEGATIVE, Defaults, GenerateConfig, Lora, Solver, Task, WanSpec
from wanrt.errors import UsageError
from wanrt.models.prompt import check_prompt
from wanrt.presets import PRESETS, Preset, parse_loras
from wanrt.tasks import limits
from wanrt.tasks.sizes import i2v_size, ti2v_size

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")

_AREA_480P = 832 * 480
_SHIFT_480P = 3.0  # Wan2.1 image to video at the 480p area

# What each task needs of the inputs, and what else it takes.
NEEDS: dict[Task, tuple[str, ...]] = {
    "t2v": (),
    "t2i": (),
    "i2v": ("image",),
    "flf2v": ("image", "last_image"),
    "vace": (),
}
_TAKES: dict[Task, tuple[str, ...]] = {
    "t2v": (),
    "t2i": (),
    "i2v": ("image",),
    "flf2v": ("image", "last_image"),
    "vace": ("video", "mask", "refs", "image", "last_image", "outpaint", "extend"),
}
# What step-distilled models are made for, whatever they were distilled from.
_DISTILLED = "lightx2v-4step"
_CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("auto", *get_args(Task)),
    "solver": get_args(Solver),
    "noise": ("cpu", "cuda"),
    "extend": ("after", "before"),
    "preset": tuple(PRESETS),
}
_INPUTS = ("image", "last_image", "video", "mask", "outpaint", "extend")
_MIN_FLF2V_FRAMES = 5  # something must lie between the two pictures


@dataclass(frozen=True)
class Request:
    """A request with nothing left open; `negative` and `guidance_low` as they will be used."""

    task: Task
    prompt: str
    negative: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_steps: int
    guidance: float
    guidance_low: float | None
    flow_shift: float
    solver: str
    distilled: bool
    seed: int
    noise: str
    context_scale: float
    loras: tuple[Lora, ...] = ()

    @property
    def guided(self) -> bool:
        """Whether a second, unconditional branch runs. At guidance 1 it would change nothing."""
        low = self.guidance if self.guidance_low is None else self.guidance_low
        return self.guidance != 1.0 or low != 1.0

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts to encode: the prompt and, where guidance needs it, the negative one."""
        return (self.prompt, self.negative) if self.guided else (self.prompt,)


def resolve(config: GenerateConfig, spec: WanSpec) -> Request:
    """Check what is asked against the model and fill in the reference's defaults (spec 1.5).

    Raises UsageError. For image tasks the size is still the area asked for: the picture's shape
    is known later, see `with_size`.
    """
    check_prompt(config.prompt)
    check_prompt(config.negative or "")
    _check_choices(config)
    limits.check_seed(config.seed)
    task = _task(config, spec)
    preset = PRESETS.get(_DISTILLED if config.distilled else config.preset or "")
    distilled = preset is not None and preset.fixed_steps
    d = spec.defaults if preset is None else _preset_defaults(spec.defaults, preset)
    width, height = _or(config.width, d.size[0]), _or(config.height, d.size[1])
    num_frames = 1 if task == "t2i" else _or(config.num_frames, d.num_frames)
    area_only = task in ("i2v", "flf2v")
    limits.check_size(width, height, 1 if area_only else spec.vae.spatial_stride * 2)
    limits.check_frames(num_frames)
    shift = d.flow_shift
    if spec.dit.image_dim and task == "i2v" and (preset is None or preset.flow_shift is None):
        # Two models of one shape: the area decides.
        shift = _SHIFT_480P if width * height <= _AREA_480P else 5.0
    request = Request(
        task=task,
        prompt=config.prompt,
        negative=_negative(config, spec, task),
        width=width,
        height=height,
        num_frames=num_frames,
        fps=_or(config.fps, d.fps),
        num_steps=_or(config.num_steps, d.num_steps),
        guidance=_or(config.guidance, d.guidance),
        guidance_low=_guidance_low(config, spec, d.guidance_low),
        flow_shift=_or(config.flow_shift, shift),
        solver="euler" if distilled else config.solver,
        distilled=distilled,
        seed=secrets.randbelow(2**32) if config.seed == -1 else config.seed,
        noise=config.noise,
        context_scale=config.context_scale,
        loras=parse_loras(config.loras),
    )
    _check_ranges(request)
    return request


def _preset_defaults(defaults: Defaults, preset: Preset) -> Defaults:
    """A preset's settings where the user says nothing; none of them is guided."""
    shift = _or(preset.flow_shift, defaults.flow_shift)
    changed = replace(defaults, num_steps=preset.num_steps, flow_shift=shift)
    return replace(changed, guidance=1.0, guidance_low=1.0)


def check_embeds(embeds: "Tensor | None", spec: WanSpec) -> None:
    """Text features given in place of a prompt: `[n <= 512, text_dim]`, with or without a batch."""
    if embeds is None:
        return
    shape, dit = list(embeds.shape), spec.dit
    if shape[-1:] != [dit.text_dim] or not 0 < embeds.numel() <= dit.text_len * dit.text_dim:
        raise UsageError(
            f"prompt embeddings are {shape}; {spec.title} takes at most {dit.text_len} rows "
            f"of width {dit.text_dim}"
        )


def with_size(request: Request, width: int, height: int, num_frames: int | None = None) -> Request:
    """The request at the size (and length) that its picture or video dictates."""
    return replace(request, width=width, height=height, num_frames=num_frames or request.num_frames)


def size_for(request: Request, spec: WanSpec, width: int, height: int) -> Request:
    """The request at the size that a picture of these pixels gives it; the area is what was asked.

    Other tasks than those from a picture stay as they are.
    """
    if request.task not in ("i2v", "flf2v"):
        return request
    arithmetic = ti2v_size if spec.vae.patch == 2 else i2v_size
    size = arithmetic(width, height, request.width * request.height)
    return with_size(request, size.width, size.height)


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _task(config: GenerateConfig, spec: WanSpec) -> Task:
    """The task that model and inputs make; a contradiction is an error."""
    given = [n for n in _INPUTS if getattr(config, n) is not None]
    given += ["refs"] if config.refs else []
    task: Task = spec.task
    if task == "t2v" and spec.vae.patch == 2 and "image" in given:
        task = "i2v"  # TI2V-5B does both
    if task == "t2v" and (config.num_frames == 1 or config.task == "t2i"):
        task = "t2i"
    if config.task not in ("auto", task) and not (config.task == "t2v" and task in ("t2i", "vace")):
        raise UsageError(
            f"task {config.task!r} is not what {spec.title} does here, which is {task!r}"
        )
    for name in NEEDS[task]:
        if name not in given:
            raise UsageError(f"{spec.title} makes {task} videos and needs {_flag(name)}")
    for name in given:
        if name not in _TAKES[task]:
            raise UsageError(f"{spec.title} makes {task} videos and takes no {_flag(name)}")
    if config.task == "t2i" and config.num_frames not in (None, 1):
        raise UsageError(f"task 't2i' makes one image, not {config.num_frames} frames")
    return task


def _flag(name: str) -> str:
    return "--ref" if name == "refs" else "--" + name.replace("_", "-")


def _negative(config: GenerateConfig, spec: WanSpec, task: Task) -> str:
    """None is the model's default; "" stays empty (the reference cannot express it)."""
    if config.negative is not None:
        return config.negative
    return FLF2V_NEGATIVE if task == "flf2v" else spec.defaults.negative


def _guidance_low(config: GenerateConfig, spec: WanSpec, default: float | None) -> float | None:
    """Only two-expert models have one; it follows a guidance given without it."""
    if spec.boundary is None:
        if config.guidance_low is not None:
            raise UsageError(
                f"--guidance-low is for two-expert models; {spec.title} has one expert"
            )
        return None
    return _or(config.guidance_low, _or(config.guidance, default))


def _check_choices(config: GenerateConfig) -> None:
    for name, legal in _CHOICES.items():
        value = getattr(config, name)
        if value is not None and value not in legal:
            raise UsageError(f"{name} {value!r} does not exist; choose {', '.join(legal)}")


def _check_ranges(request: Request) -> None:
    if request.task == "flf2v" and request.num_frames < _MIN_FLF2V_FRAMES:
        raise UsageError(
            f"frames is {request.num_frames}; between two pictures it must be "
            f"{_MIN_FLF2V_FRAMES} or more"
        )
    limits.check_steps(request.num_steps)
    for guidance in (request.guidance, request.guidance_low):
        if guidance is not None:
            limits.check_guidance(guidance)
    limits.check_flow_shift(request.flow_shift)
    limits.check_fps(request.fps)
    limits.check_context_scale(request.context_scale)
