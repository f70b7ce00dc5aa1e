"""The parts of a loaded model: each is read when it is first needed and let go when it is not."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from wanrt import env
from wanrt.adapter import Adapter
from wanrt.clock import Clock
from wanrt.config import Lora, Precision, Task, VaePrecision, WanSpec
from wanrt.dtypes import Dtypes, choose_dtypes, engine_dtypes
from wanrt.errors import BudgetError, UsageError
from wanrt.guidance import Expert
from wanrt.identity import spec_of
from wanrt.loras import Shelf
from wanrt.memory import host
from wanrt.memory.budget import enough, gib
from wanrt.memory.engine_bytes import NATIVE, EngineBytes
from wanrt.memory.packed_bytes import PackedWeights
from wanrt.memory.placement import Placement
from wanrt.memory.plan import Plan
from wanrt.memory.prompt_cache import PromptCache
from wanrt.memory.question import Lessons
from wanrt.memory.vae_formats import VAE_FORMATS
from wanrt.models.eight_bit import safer
from wanrt.models.tokenizer import Tokenizer
from wanrt.quant.policy import EightBit
from wanrt.weights.load import load_component, skeleton
from wanrt.weights.names import Kind
from wanrt.weights.packed import packed_text_encoder, packed_weights
from wanrt.weights.parts import Parts
from wanrt.weights.vocabulary import read_tokenizer

if TYPE_CHECKING:
    from wanrt.engine.opened import Engine

Report = Callable[[str, int, int], None]  # phase, done, total
Changes = dict[str, Callable[[Tensor], Tensor]] | None  # of weights, by name

_WORTH_CACHING = 256 << 20  # bytes of a text encoder
_LEAST_BYTES = 2  # of a number once it is loaded, whatever its file makes of it
_KEEP_SHARE = 0.5  # of the memory: models up to this size stay loaded between requests


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' asked, but torch sees no CUDA GPU; use --device cpu")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} does not exist; choose auto, cuda or cpu")
    return torch.device(name)


def memory_bytes(device: torch.device) -> int:
    """All memory of the device, or what the process may have of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host.total_bytes()


def streams(placement: Placement | None) -> bool:
    """Whether blocks come and go; weights that a file packs then stay packed all the way."""
    return placement is not None and placement.slots > 0


@dataclass
class Components:
    """Loads parts on demand onto one device; `release` drops them unless everything fits."""

    parts: Parts
    spec: WanSpec
    dtypes: Dtypes
    device: torch.device
    check: bool
    keep: bool
    report: Report
    plan: Plan | None = None  # of the request under way; None: everything stays on the device
    loras: tuple[Lora, ...] = ()  # part of the model, for every request
    engine: "Engine | None" = None  # computes the parts that it serves; None: all is native
    lessons: Lessons = field(default_factory=Lessons)  # of all refusals so far
    clock: Clock = field(default_factory=Clock)  # of the request under way
    _adapters: dict[str, Adapter] = field(default_factory=dict)
    _loaded: dict[str, nn.Module] = field(default_factory=dict)
    _placed: dict[str, Placement | None] = field(default_factory=dict)
    _notches: dict[str, int] = field(default_factory=dict)  # how often each became safer
    _tokenizers: dict[Path | None, Tokenizer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shelf = Shelf(self.spec)

    def follow(self, plan: Plan) -> None:
        """Parts loaded from now on lie where the plan says; those that lie otherwise go."""
        if plan is self.plan:
            return
        if self._serves("dit") and self.loras and plan.placement("step").slots:
            raise BudgetError(
                "LoRAs merge for an engine into weights that stay on the device, and within "
                f"{gib(plan.budget or 0)} some stream; what would do: "
                f"--vram {enough(plan.question.least_resident())}, or --engine native"
            )
        self.plan, self.keep = plan, plan.keep
        if self.engine is not None:
            self.engine.limit(plan.workspace)
        if not plan.keep:
            self.clear()
        for name in list(self._loaded):
            if self._placed[name] != self._placement(name):
                self._drop(name)

    def learn(self, lessons: Lessons) -> None:
        """Plans made from now on keep to this, too."""
        self.lessons = self.lessons.merged(lessons)

    @cached_property
    def packed(self) -> PackedWeights | None:
        """Of transformers that GGUF files pack, where they stay so; reads headers."""
        known = self.parts.found
        files = [known[name] for name in ("dit", "low_noise") if name in known]
        plain = self.dtypes.eight_bit is None and not self._serves("dit")
        return packed_weights(files, self.dtypes.dit) if plain else None

    @cached_property
    def packed_text(self) -> PackedWeights | None:
        """The same of the text encoder."""
        found = self.parts.found.get("umt5")
        if found is None or self._serves("umt5"):
            return None
        return packed_text_encoder(found, self.dtypes.umt5)

    @property
    def engine_bytes(self) -> EngineBytes:
        """What engines work in, for a plan."""
        return NATIVE if self.engine is None else self.engine.memory(self.spec.vae)

    def dit(self, expert: Expert = "high", loras: tuple[Lora, ...] = ()) -> nn.Module:
        """The transformer with a request's LoRAs; of two experts the one asked for, alone."""
        name, other = ("low_noise", "dit") if expert == "low" else ("dit", "low_noise")
        self.release(other)
        beside = streams(self._placement(name)) or self.dtypes.eight_bit is not None
        own = self.shelf.uses(self.loras, expert)
        if name not in self._loaded:
            changes = {} if beside else self.shelf.merges(own)
            module = self._get(name, "dit", self.dtypes.dit, changes)
            self._adapters[name] = Adapter(module, self.device)
            for _ in range(self._notches.get(name, 0)):
                safer(module)
        asked = self.shelf.uses(loras, expert)
        self._adapters[name].put_on((*own, *asked) if beside else asked)
        return self._loaded[name]

    def vae(self) -> nn.Module:
        return self._get("vae", "vae", self.dtypes.vae)

    def safer(self, part: Literal["dit", "vae"]) -> str | None:
        """After NaN: run a part one notch safer from now on. What changed; None: nothing is left.

        Eight-bit transformers give up attention, then activations, in eight bits; a VAE its int8
        convolutions or its sums in fp16. fp16, whose numbers end at 65504, becomes bf16; such a
        part is read again.
        """
        if self._serves(part):
            return None
        if part == "vae":
            return self._safer_vae()
        there = [name for name in ("dit", "low_noise") if name in self._loaded]
        changed = {name: said for name in there if (said := safer(self._loaded[name]))}
        for name in changed:
            self._notches[name] = self._notches.get(name, 0) + 1
        if changed:
            return next(iter(changed.values()))
        if self.dtypes.dit != torch.float16:
            return None
        self.dtypes = replace(self.dtypes, dit=torch.bfloat16)
        self._drop("dit", "low_noise")
        return "bf16 instead of fp16"

    def _safer_vae(self) -> str | None:
        now = self.dtypes.vae_format
        if not (now.int8 or now.fp16_sums or now.plain == "fp16"):
            return None
        plain = "bf16" if now.name == "fp16" else now.plain
        self.dtypes = replace(self.dtypes, vae_format=VAE_FORMATS[plain])
        self._drop("vae")
        return f"{plain} instead of {now.name.partition('/')[0]}"

    def umt5(self) -> nn.Module:
        return self._get("umt5", "umt5", self.dtypes.umt5)

    def clip(self) -> nn.Module:
        return self._get("clip", "clip", self.dtypes.clip)

    def prompt_cache(self) -> PromptCache | None:
        """Where features of prompts wait between runs; a small encoder is faster than a disk."""
        folder, encoder = env.cache_folder(), self.parts.found.get("umt5")
        if self.engine is not None and self.engine.embeds("umt5"):
            return None
        if folder is None or encoder is None or encoder.num_bytes < _WORTH_CACHING:
            return None
        return PromptCache(folder / "prompts", encoder.file, self.dtypes.umt5)

    def tokenizer(self) -> Tokenizer:
        """Of this text encoder, read once: it is not among the parts that make room for others."""
        source = self.parts.tokenizer or self.parts.umt5
        if source not in self._tokenizers:
            self._tokenizers = {source: read_tokenizer(self.parts)}
        return self._tokenizers[source]

    def lora_bytes(self, loras: tuple[Lora, ...] = ()) -> int:
        """What the model's LoRAs and a request's keep on the device, at most."""
        every = (*self.loras, *loras)
        return self.shelf.num_bytes(every, self.dtypes.dit.itemsize) if every else 0

    def check_loras(self, loras: tuple[Lora, ...]) -> None:
        """Raises UsageError where an engine would compute without them."""
        if not loras or self.engine is None:
            return
        if self.engine.embeds("dit") or self.dtypes.eight_bit is not None:
            raise UsageError(
                f"LoRAs merge into plain weights; those of {self.engine.bundle.path} are embedded "
                "or in eight bits (export it again without --embed, in fp32, fp16 or bf16)"
            )

    def require(self, task: Task, *, text: bool, decode: bool) -> None:
        """Raises FormatError for the first part that a request needs and the model lacks."""
        needed: dict[Kind, bool] = {
            "umt5": text,
            "vae": decode or task in ("i2v", "flf2v", "vace"),
            "clip": self.spec.dit.image_dim is not None,
        }
        self.parts.require(*(kind for kind, wanted in needed.items() if wanted))

    def replace(self, name: str, module: nn.Module) -> None:
        """Have this module in the place of a loaded one, from now on."""
        assert name in self._loaded, f"{name=}"
        self._loaded[name] = module
        if name in self._adapters:
            self._adapters[name] = Adapter(module, self.device)

    def release(self, *names: str) -> None:
        """Free parts that the coming phases do not need; does nothing where all parts fit."""
        if not self.keep and any(name in self._loaded for name in names):
            self._drop(*names)

    def finish(self) -> None:
        """Wait until the device has done what it was given, so that a clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Let every part go."""
        self._drop(*self._loaded)

    def _drop(self, *names: str) -> None:
        with self.clock.phase("free"):
            self._free(names)

    def _free(self, names: tuple[str, ...]) -> None:
        for name in names:
            part = self._loaded.pop(name, None)
            self._adapters.pop(name, None)
            if (stream := getattr(part, "weight_stream", None)) is not None:
                stream.close()
            del part, stream
        if self.engine is not None and names:
            self.engine.release()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _serves(self, kind: Kind) -> bool:
        return self.engine is not None and self.engine.serves(kind)

    def _eight_bit(self, kind: Kind) -> EightBit | None:
        if kind == "vae" and self.dtypes.vae_format.int8:
            return "int8"
        return self.dtypes.eight_bit if kind == "dit" else None

    def _placement(self, name: str) -> Placement | None:
        """Where the plan puts a part's blocks; as they lie where it has no word on them."""
        phase = {"dit": "step", "low_noise": "step", "umt5": "text", "clip": "image"}.get(name)
        if self.plan is None or phase not in self.plan.options:
            return self._placed.get(name)
        return self.plan.placement(phase)

    def _get(self, name: str, kind: Kind, dtype: torch.dtype, changes: Changes = None) -> nn.Module:
        if name in self._loaded:
            return self._loaded[name]
        with self.clock.loading(name):
            return self._read(name, kind, dtype, changes)

    def _read(self, name: str, kind: Kind, dtype: torch.dtype, changes: Changes) -> nn.Module:
        if name not in self._loaded:
            self.parts.require(kind)
            self._placed[name] = self._placement(name)
            if self.engine is not None and self.engine.embeds(kind):
                module = skeleton(kind, self.parts.found[name].spec, self.device, dtype).eval()
                self._loaded[name] = self.engine.attach(kind, module.requires_grad_(False))
                return self._loaded[name]
            module = load_component(
                self.parts.found[name],
                kind,
                dtype=dtype,
                device=self.device,
                check=self.check,
                progress=lambda done, total: self.report(f"load {name}", done, total),
                placement=self._placed[name],
                changes=changes,
                keep_packed=streams(self._placed[name]) and not self._serves(kind),
                eight_bit=self._eight_bit(kind),
                fp16_sums=kind == "vae" and self.dtypes.vae_format.fp16_sums,
            )
            self._loaded[name] = self.engine.attach(kind, module) if self.engine else module
        return self._loaded[name]


def open_parts(
    parts: Parts,
    name: str,
    precision: Precision,
    device: torch.device,
    check: bool,
    report: Report,
    engine: "Engine | None" = None,
    vae_precision: VaePrecision = "auto",
) -> Components:
    """Identify a model from headers alone and choose dtypes; reads no tensor."""
    spec = spec_of(parts, name)
    dit, vae = parts.found["dit"], parts.found.get("vae")
    if engine is None:
        dtypes = choose_dtypes(precision, dit, device, vae_precision, vae)
    else:
        engine.check(spec)
        native = choose_dtypes("auto", dit, device, vae_precision, vae)
        dtypes = engine_dtypes(engine, native, precision, vae_precision)
    least = 1 if dtypes.eight_bit else _LEAST_BYTES
    loaded = sum(max(d.num_bytes, least * d.num_params) for d in parts.found.values())
    keep = loaded <= _KEEP_SHARE * memory_bytes(device)
    return Components(parts, spec, dtypes, device, check, keep, report, engine=engine)
