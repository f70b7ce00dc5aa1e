"""What a file is, from its header (and config.json if there is one): kind, shape, precision."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from wanrt.errors import FormatError
from wanrt.quant.formats import PLAIN
from wanrt.weights import names
from wanrt.weights.checkpoint import Checkpoint, TensorInfo, weight_sets
from wanrt.weights.gguf_file import type_counts
from wanrt.weights.lora import LoraFile
from wanrt.weights.names import Component, Source, Translation
from wanrt.weights.quantised import FP8, SCALES
from wanrt.weights.safetensors_file import MAX_HEADER
from wanrt.weights.specs import READERS, Config, Spec, contradiction
from wanrt.weights.stretch import Stretch
from wanrt.weights.strict_json import parse_json
from wanrt.weights.titles import title_of

KIND_NAMES = {
    "dit": "a diffusion transformer",
    "vae": "a VAE",
    "umt5": "a umT5 text encoder",
    "clip": "a CLIP image encoder",
    "lora": "a LoRA",
    "unknown": "nothing wanrt knows",
}
Layout = Literal["original", "diffusers", "comfyui", "llama.cpp"]
UNREADABLE = "unreadable"  # title of a broken file
_PRECISIONS = {dtype: name for name, dtype in PLAIN.items()}
_COMFY_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "first_stage_model.")
_COMFY_MARKS = ("spiece_model", "scaled_fp8", "comfy_quant")
# Relatives with modules of their own, as ComfyUI's `comfy/model_detection.py` tells them apart.
_FAMILIES = {
    "control_adapter.": "Wan Fun-Camera",
    "casual_audio_encoder.": "Wan2.2-S2V-14B",
    "audio_proj.": "HuMo",
    "face_adapter.": "Wan2.2-Animate-14B",
}
_CONFIG_CLASSES = {
    "dit": {"WanModel", "VaceWanModel", "WanTransformer3DModel", "WanVACETransformer3DModel"},
    "vae": {"AutoencoderKLWan"},
    "umt5": {"umt5", "UMT5EncoderModel"},
    "clip": {"clip_vision_model", "CLIPVisionModel"},
}
_LORA = re.compile(r"lora_(A|B|up|down)\b|[._]lora\.(up|down)\.|\.diff(_b|_m)?$|\.lokr_|\.hada_")


@dataclass(frozen=True)
class Detected:
    """One model in a file. `spec` and `component` are None for a LoRA and for what is unknown."""

    kind: Literal["dit", "vae", "umt5", "clip", "lora", "unknown"]
    title: str  # "Wan2.1-I2V-14B fp8"
    path: Path  # what Checkpoint.open takes
    container: str  # safetensors, shards, pickle, gguf
    layout: Layout | None = None
    precision: str | None = None  # fp32, bf16, fp16, fp8, fp8_scaled, int8, q4_k ..., mixed
    spec: Spec | None = None
    component: Component | None = None
    num_params: int = 0
    num_bytes: int = 0
    note: str = ""
    within: Stretch | None = None  # the file is there, and `path` is what it is called

    @property
    def file(self) -> Path:
        """What lies on the disk."""
        return self.path if self.within is None else self.within.file

    def open(self) -> Checkpoint:
        """Reads its header once more. Raises FormatError."""
        return Checkpoint.open(self.path, self.within)

    def __str__(self) -> str:
        return f"{self.title}, {KIND_NAMES[self.kind]}" if self.spec else self.title


def describe(path: str | Path) -> list[Detected]:
    """Every model in a file, or in a folder and the folders below it. Reads headers only.

    In a folder, what cannot be read is listed as unknown with the reason as its note.
    """
    path = Path(path)
    if not path.is_dir():
        return identify(Checkpoint.open(path))
    return [found for weights in walk(path) for found in _identify_or_note(weights)]


def walk(folder: Path, depth: int = 3) -> Iterator[Path]:
    """Weight sets in a folder, then in its folders (hidden ones aside) down to `depth`."""
    yield from weight_sets(folder)
    if depth:
        for child in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."):
            yield from walk(child, depth - 1)


def identify(checkpoint: Checkpoint) -> list[Detected]:
    """The models in one open checkpoint; one of kind "lora" or "unknown" where there is no model.

    Raises FormatError where a model is incomplete or contradicts its config.json.
    """
    found = names.components(checkpoint.tensors)
    if found:
        return [_detect(checkpoint, component, found) for component in found]
    rank = _lora_rank(checkpoint.tensors)
    if rank is not None:
        title = f"LoRA of rank {rank}" if rank else "LoRA"
        infos = checkpoint.tensors.values()
        return [
            Detected(
                "lora",
                title,
                checkpoint.path,
                checkpoint.container,
                precision=_precision(infos, checkpoint.tensors),
                num_params=sum(info.numel for info in infos),
                num_bytes=sum(info.num_bytes for info in infos),
                note=LoraFile(checkpoint).summary,
            )
        ]
    some = ", ".join(list(checkpoint.tensors)[:3])
    note = f"{len(checkpoint.tensors)} tensors: {some} ..."
    return [Detected("unknown", "no Wan model", checkpoint.path, checkpoint.container, note=note)]


def translate(checkpoint: Checkpoint, component: Component) -> Translation:
    """The original names of a component's tensors, and the stored names without meaning."""
    others = names.components(checkpoint.tensors)
    return names.translate(names.own_names(checkpoint.tensors, component, others), component)


def shape_of(source: Source, tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """The shape the original tensor has: parts joined, leading ones restored."""
    first = tensors[source.stored[0]].shape
    if len(source.stored) > 1:
        first = (sum(tensors[name].shape[0] for name in source.stored), *first[1:])
    return (1,) * source.lead + first


def _identify_or_note(path: Path) -> list[Detected]:
    try:
        return identify(Checkpoint.open(path))
    except FormatError as error:
        return [Detected("unknown", UNREADABLE, path, "", note=error.reason)]


def _detect(checkpoint: Checkpoint, component: Component, others: list[Component]) -> Detected:
    path, kind = checkpoint.path, component.kind
    own = names.own_names(checkpoint.tensors, component, others)
    sources = names.translate(own, component).sources
    stored = [checkpoint.tensors[name] for source in sources.values() for name in source.stored]
    family = _family(sources) if kind == "dit" else None
    precision = _precision(stored, own)
    common = {
        "path": path,
        "container": checkpoint.container,
        "within": checkpoint.within,
        "layout": _layout(component, checkpoint),
        "precision": precision,
        "num_params": sum(info.numel for info in stored),
        "num_bytes": sum(checkpoint.tensors[name].num_bytes for name in own),
    }
    if family:
        return Detected("unknown", f"{family} {precision}", note="wanrt does not run it", **common)
    config = read_config(path.parent, kind)
    spec = _spec(checkpoint, kind, sources, config)
    title, note = title_of(spec, path)
    if checkpoint.container == "gguf":
        note = "; ".join(filter(None, (type_counts(checkpoint.tensors), note)))
    wrong = contradiction(spec, config)
    if wrong:
        raise FormatError(path, f"this is {title} {precision}, but its config.json says {wrong}")
    return Detected(
        kind, f"{title} {precision}", spec=spec, component=component, note=note, **common
    )


def _spec(checkpoint: Checkpoint, kind: str, sources: dict[str, Source], config: Config) -> Spec:
    shapes = {name: shape_of(source, checkpoint.tensors) for name, source in sources.items()}
    empty = next((name for name, shape in shapes.items() if 0 in shape), None)
    if empty:
        raise FormatError(checkpoint.path, f"{empty} is empty: {list(shapes[empty])}")
    try:
        return READERS[kind](shapes, config)
    except KeyError as error:
        raise FormatError(checkpoint.path, f"incomplete: it lacks {error.args[0]}") from None
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise FormatError(checkpoint.path, f"not usable as {KIND_NAMES[kind]}: {error}") from None


def read_config(folder: Path, kind: str) -> Config:
    """The fields of the folder's config.json, if it is the config of this kind of model."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_HEADER:
        raise FormatError(path, f"is larger than {MAX_HEADER} bytes")
    config = parse_json(path, path.read_bytes(), "config")
    if not isinstance(config, dict):
        raise FormatError(path, "is not a table of settings")
    said = [
        config.get("_class_name"),
        config.get("model_type"),
        *_list(config.get("architectures")),
    ]
    return config if any(s in _CONFIG_CLASSES[kind] for s in said if isinstance(s, str)) else {}


def _precision(stored: Iterable[TensorInfo], own: Iterable[str]) -> str:
    """By the bytes of the matrices; fp16 files keep a few tensors in fp32.

    Of packed blocks the most frequent: such files mix two or three formats by design.
    """
    weight, packed = Counter[torch.dtype](), Counter[str]()
    for info in stored:
        if info.packing is not None:
            packed[info.packing.name.lower()] += info.num_bytes
        weight[info.dtype] += info.num_bytes if len(info.shape) > 1 else 0
    if packed:
        return packed.most_common(1)[0][0]
    if any(dtype in weight for dtype in FP8):
        scaled = any(name.rpartition(".")[2] in SCALES for name in own)
        return "fp8_scaled" if scaled else "fp8"
    if torch.int8 in weight:
        return "int8"
    dtype, most = weight.most_common(1)[0] if weight else (torch.float32, 0)
    return _PRECISIONS.get(dtype, "mixed") if most >= 0.9 * weight.total() else "mixed"


def _layout(component: Component, checkpoint: Checkpoint) -> Layout:
    marked = any(name.rpartition(".")[2] in _COMFY_MARKS for name in checkpoint.tensors)
    return "comfyui" if marked or component.prefix in _COMFY_PREFIXES else component.spelling


def _family(sources: Iterable[str]) -> str | None:
    return next((f for s in sources for mark, f in _FAMILIES.items() if s.startswith(mark)), None)


def _lora_rank(tensors: Mapping[str, TensorInfo]) -> int | None:
    """The rank; 0 for a file of plain differences; None if this is no LoRA."""
    hits = [name for name in tensors if _LORA.search(name)]
    downs = (tensors[n].shape for n in hits if re.search(r"lora_A|lora_down|lora\.down", n))
    return next((shape[0] for shape in downs if shape), 0) if hits else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
