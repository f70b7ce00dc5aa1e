"""What a checkpoint is (specs, the table of released models), what a user asks (GenerateConfig)."""

from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any, Literal

from wanrt.errors import UsageError

Task = Literal["t2v", "t2i", "i2v", "flf2v", "vace"]
Solver = Literal["unipc", "dpm++", "euler"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8"]
VaePrecision = Literal["auto", "fp32", "bf16", "fp16", "fp16-accumulate", "int8"]

VIDEO_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
I2V_NEGATIVE = "镜头晃动，" + VIDEO_NEGATIVE
FLF2V_NEGATIVE = "镜头切换，" + I2V_NEGATIVE


@dataclass(frozen=True)
class DitSpec:
    """Shape of a diffusion transformer. `head_dim` is 128 in every Wan model.

    Source: Wan2.1 @9737cba `wan/modules/model.py`, `vace_model.py`.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    image_dim: int | None = None  # CLIP width, 1280 where `img_emb` exists
    image_pos_tokens: int | None = None  # rows of `img_emb.emb_pos`: 514 in FLF2V
    vace_layers: tuple[int, ...] = ()  # main-block index that receives hint j
    vace_in_dim: int = 96
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def t_per_token(self) -> bool:
        """TI2V: what is known of a clip has t = 0, the rest the step's."""
        return self.out_dim == 48


@dataclass(frozen=True)
class VaeSpec:
    """Shape of a causal video VAE: Wan 2.1 (`patch=1`) or Wan 2.2 (`patch=2`, residual stages).

    `temporal_downsample` is per encoder stage but the last; the decoder mirrors it.
    Source: Wan2.1 `wan/modules/vae.py`, Wan2.2 `wan/modules/vae2_2.py`.
    """

    z_dim: int = 16
    base_dim: int = 96
    decoder_base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch: int = 1

    @property
    def residual(self) -> bool:
        """Wan 2.2: stages are blocks with a parameter-free shortcut."""
        return self.patch == 2

    @property
    def spatial_stride(self) -> int:
        return self.patch * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)


@dataclass(frozen=True)
class VaeWork:
    """How much of a clip a VAE codes at once: it bounds memory and changes no result.

    chunk: latent frames (None: by their size). band: latent rows, in the layers that see only rows
    nearby (None: all). order: which loop is the outer one. "time": frames come out chunk by chunk,
    the caches of all bands are kept. "bands": one band's caches at a time; what is finished waits
    in a temporary file. frames: how many frames at once pass the stages at the full frame rate, the
    decoder's last and the encoder's first (None: all of a chunk). host: caches wait in host memory.
    """

    chunk: int | None = None
    band: int | None = None
    order: Literal["time", "bands"] = "time"
    frames: int | None = None
    host: bool = False

    def __post_init__(self) -> None:
        for name in ("chunk", "band", "frames"):
            value = getattr(self, name)
            assert value is None or value >= 1, f"{name}={value}"
        assert self.order in ("time", "bands"), f"{self.order=}"


@dataclass(frozen=True)
class Umt5Spec:
    """Shape of a umT5 encoder. Source: Wan2.1 `wan/modules/t5.py`."""

    vocab_size: int = 256384
    dim: int = 4096
    attn_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True)
class ClipSpec:
    """Shape of the CLIP visual tower (ViT-H/14); `num_layers` counts the unused last block too.

    Source: Wan2.1 `wan/modules/clip.py`.
    """

    dim: int = 1280
    mlp_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 32
    image_size: int = 224
    patch_size: int = 14
    eps: float = 1e-5


@dataclass(frozen=True)
class Defaults:
    """What the reference's command line uses for a model when the user is silent (spec 1.5)."""

    size: tuple[int, int]  # width, height
    num_frames: int = 81
    fps: int = 16
    num_steps: int = 50
    flow_shift: float = 5.0
    guidance: float = 5.0
    guidance_low: float | None = None  # second expert of A14B
    negative: str = VIDEO_NEGATIVE


@dataclass(frozen=True)
class WanSpec:
    """One released model: its parts, its task and its defaults."""

    id: str
    title: str
    task: Task
    dit: DitSpec
    vae: VaeSpec
    defaults: Defaults
    umt5: Umt5Spec = Umt5Spec()
    clip: ClipSpec | None = None
    boundary: float | None = None  # A14B: high-noise expert while t >= boundary * 1000
    sizes: tuple[tuple[int, int], ...] = ()  # sizes the reference offers, width x height


_SIZES_480P = ((832, 480), (480, 832))
_SIZES_720P = ((1280, 720), (720, 1280))
_SIZES_BOTH = _SIZES_720P + _SIZES_480P

VAE_2_1 = VaeSpec()
VAE_2_2 = VaeSpec(z_dim=48, base_dim=160, decoder_base_dim=256, patch=2)

DIT_1_3B = DitSpec(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
DIT_14B = DitSpec(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
DIT_5B = DitSpec(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)

NANO = WanSpec(
    id="nano",
    title="wanrt nano",
    task="t2v",
    dit=DitSpec(dim=256, ffn_dim=1024, num_heads=2, num_layers=6, text_dim=128),
    vae=VaeSpec(base_dim=16, decoder_base_dim=16),
    umt5=Umt5Spec(vocab_size=130, dim=128, attn_dim=128, ffn_dim=256, num_heads=4, num_layers=2),
    defaults=Defaults(
        size=(96, 96), num_frames=33, num_steps=20, flow_shift=3.0, guidance=3.0, negative=""
    ),
    sizes=((96, 96),),
)

MODELS: dict[str, WanSpec] = {
    spec.id: spec
    for spec in (
        NANO,
        WanSpec(
            "wan2.1-t2v-1.3b",
            "Wan2.1-T2V-1.3B",
            "t2v",
            DIT_1_3B,
            VAE_2_1,
            Defaults((832, 480)),
            sizes=_SIZES_480P,
        ),
        WanSpec(
            "wan2.1-t2v-14b",
            "Wan2.1-T2V-14B",
            "t2v",
            DIT_14B,
            VAE_2_1,
            Defaults((1280, 720)),
            sizes=_SIZES_BOTH,
        ),
        WanSpec(
            "wan2.1-i2v-14b-480p",
            "Wan2.1-I2V-14B-480P",
            "i2v",
            replace(DIT_14B, in_dim=36, image_dim=1280),
            VAE_2_1,
            Defaults((832, 480), num_steps=40, flow_shift=3.0, negative=I2V_NEGATIVE),
            clip=ClipSpec(),
            sizes=_SIZES_480P,
        ),
        WanSpec(
            "wan2.1-i2v-14b-720p",
            "Wan2.1-I2V-14B-720P",
            "i2v",
            replace(DIT_14B, in_dim=36, image_dim=1280),
            VAE_2_1,
            Defaults((1280, 720), num_steps=40, negative=I2V_NEGATIVE),
            clip=ClipSpec(),
            sizes=_SIZES_BOTH,
        ),
        WanSpec(
            "wan2.1-flf2v-14b-720p",
            "Wan2.1-FLF2V-14B-720P",
            "flf2v",
            replace(DIT_14B, in_dim=36, image_dim=1280, image_pos_tokens=514),
            VAE_2_1,
            Defaults((1280, 720), flow_shift=16.0, negative=FLF2V_NEGATIVE),
            clip=ClipSpec(),
            sizes=_SIZES_BOTH,
        ),
        WanSpec(
            "wan2.1-vace-1.3b",
            "Wan2.1-VACE-1.3B",
            "vace",
            replace(DIT_1_3B, vace_layers=tuple(range(0, 30, 2))),
            VAE_2_1,
            Defaults((832, 480), flow_shift=16.0),
            sizes=_SIZES_480P,
        ),
        WanSpec(
            "wan2.1-vace-14b",
            "Wan2.1-VACE-14B",
            "vace",
            replace(DIT_14B, vace_layers=tuple(range(0, 40, 5))),
            VAE_2_1,
            Defaults((1280, 720), flow_shift=16.0),
            sizes=_SIZES_BOTH,
        ),
        WanSpec(
            "wan2.2-t2v-a14b",
            "Wan2.2-T2V-A14B",
            "t2v",
            DIT_14B,
            VAE_2_1,
            Defaults((1280, 720), num_steps=40, flow_shift=12.0, guidance=4.0, guidance_low=3.0),
            boundary=0.875,
            sizes=_SIZES_BOTH,
        ),
        WanSpec(
            "wan2.2-i2v-a14b",
            "Wan2.2-I2V-A14B",
            "i2v",
            replace(DIT_14B, in_dim=36),
            VAE_2_1,
            Defaults((1280, 720), num_steps=40, guidance=3.5, guidance_low=3.5),
            boundary=0.900,
            sizes=_SIZES_BOTH,
        ),
        WanSpec(
            "wan2.2-ti2v-5b",
            "Wan2.2-TI2V-5B",
            "t2v",
            DIT_5B,
            VAE_2_2,
            Defaults((1280, 704), num_frames=121, fps=24),
            sizes=((1280, 704), (704, 1280)),
        ),
    )
}


def find_variant(variant: str) -> WanSpec:
    """`t2v-1.3B`, `wan2.1-t2v-1.3b` ... -> the released model."""
    name = variant.lower()
    for known in (name, f"wan2.1-{name}", f"wan2.2-{name}"):
        if known in MODELS:
            return MODELS[known]
    raise UsageError(f"no variant {variant!r}; known: {', '.join(MODELS)}")


@dataclass(frozen=True)
class Lora:
    """A LoRA file, how strongly it acts, and on which expert of Wan2.2 A14B.

    `auto`: a file that holds a pair serves both experts, one that says high or low noise in its
    name serves that expert, every other one both.
    """

    path: str
    strength: float = 1.0
    expert: Literal["auto", "high", "low", "both"] = "auto"

    @classmethod
    def parse(cls, text: "str | PathLike[str] | Lora") -> "Lora":
        """From `FILE`, `FILE:WEIGHT` or `FILE:WEIGHT:EXPERT`; a path may hold colons itself."""
        if isinstance(text, Lora):
            return text
        path, expert, strength = fspath(text), "auto", 1.0
        head, _, last = path.rpartition(":")
        if head and last in ("high", "low", "both"):
            path, expert = head, last
            head, _, last = path.rpartition(":")
        if head:
            try:
                path, strength = head, float(last)
            except ValueError:
                path = f"{head}:{last}"
        return cls(path, strength, expert)


@dataclass(frozen=True)
class GenerateConfig:
    """What a user asks for. None is the model's default, as the reference's command line has it.

    Sizes are pixels, `fps` frames per second; `num_frames` is 4n+1. Images may be paths, PIL images
    or tensors; a video is a path or a `wanrt.tasks.vace.Source`. `seed` -1 draws one. `noise` names
    the random generator: "cpu" gives the same noise on every machine, "cuda" what the reference
    draws on the same GPU. `loras` act on this request alone, as `Lora`, path or "FILE:WEIGHT".
    """

    prompt: str
    negative: str | None = None  # "" means empty, None the model's own
    task: Task | Literal["auto"] = "auto"
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_steps: int | None = None
    guidance: float | None = None
    guidance_low: float | None = None
    flow_shift: float | None = None
    solver: Solver = "unipc"
    distilled: bool = (
        False  # the four-step list of step-distilled models; implies euler, no guidance
    )
    seed: int = -1
    noise: Literal["cpu", "cuda"] = "cpu"
    image: Any = None
    last_image: Any = None
    video: Any = None
    mask: Any = None
    refs: tuple[Any, ...] = ()
    outpaint: str | None = None  # VACE: "left,right:0.25", directions and share of the side
    extend: Literal["after", "before"] | None = None  # VACE: go on after the video, or lead to it
    context_scale: float = 1.0
    loras: tuple[Any, ...] = ()
    preset: str | None = None  # settings that a step-distilled LoRA is made for, see docs/lora.md
