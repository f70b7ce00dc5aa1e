"""Which file is which part of a model: transformers, VAE, text encoder, CLIP, tokenizer.

One rule for every layout: look at the headers below the folder and take what each file is, not what
it is called. Names only decide between equals: the two experts of Wan2.2 A14B.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from wanrt.config import DitSpec
from wanrt.errors import FormatError
from wanrt.weights.detect import KIND_NAMES, UNREADABLE, Detected, describe
from wanrt.weights.names import Kind
from wanrt.weights.titles import expert

FLAGS: dict[Kind, str] = {
    "dit": "--model",
    "vae": "--vae",
    "umt5": "--text-encoder",
    "clip": "--clip-vision",
}
# The folders of ComfyUI's models/ that may hold parts of Wan; the rest is not even listed.
_COMFY_FOLDERS = (
    *("diffusion_models", "unet", "checkpoints", "text_encoders", "clip", "vae", "clip_vision"),
)
_TOKENIZERS = ("tokenizer.json", "spiece.model")
_TOKENIZER_FOLDERS = ("", "tokenizer", "google/umt5-xxl")


@dataclass(frozen=True)
class Parts:
    """Where each part lies, or None. Of two experts, `dit` is the high-noise one."""

    dit: Path | None = None
    low_noise: Path | None = None
    vae: Path | None = None
    umt5: Path | None = None
    clip: Path | None = None
    tokenizer: Path | None = None  # tokenizer.json or spiece.model; else umt5 may hold it
    vocabulary: bytes | None = None  # what it holds, where it was read already
    found: dict[str, Detected] = field(default_factory=dict)  # field name above -> what it is

    def require(self, *kinds: Kind) -> None:
        """Raises FormatError that names the first missing part and the flag that gives it."""
        for kind in kinds:
            if getattr(self, kind) is None:
                raise FormatError(
                    self.dit or "the model",
                    f"comes without {KIND_NAMES[kind]}",
                    f"give it with {FLAGS[kind]}",
                )


def find_parts(
    model: str | Path,
    *,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    clip: str | Path | None = None,
    low_noise: str | Path | None = None,
) -> Parts:
    """model: a folder in any layout, one part's folder, or a file; the others override its parts.

    Of several files of one kind, those that cannot belong to the transformer drop out; if more than
    one is left, FormatError lists them. A part may be missing, unless a broken file may be it.
    """
    model = Path(model)
    chosen = choose_parts(
        model, _look(model), text_encoder=text_encoder, vae=vae, clip=clip, low_noise=low_noise
    )
    return replace(chosen, tokenizer=_tokenizer(model, chosen.umt5))


def choose_parts(
    model: Path,
    found: list[Detected],
    *,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    clip: str | Path | None = None,
    low_noise: str | Path | None = None,
) -> Parts:
    """The same, of what was found in `model`; without a tokenizer."""
    if all(d.kind in ("lora", "unknown") for d in found):
        known = "; ".join(f"{d.path.name}: {d.title} {d.note}".strip() for d in found[:5])
        raise FormatError(model, "holds no part of a Wan model", known or "no weights at all")
    dit, second = _transformers(model, _of_kind(found, "dit"), low_noise is not None)
    if low_noise is not None:
        second = find_component(Path(low_noise), "dit")
    spec = dit.spec if dit else None
    chosen: dict[str, Detected | None] = {"dit": dit, "low_noise": second}
    for kind, path in (("vae", vae), ("umt5", text_encoder), ("clip", clip)):
        if path is not None:
            chosen[kind] = find_component(Path(path), kind)
        elif kind != "clip" or spec is None or spec.image_dim is not None:
            chosen[kind] = _choose(model, found, kind, spec)
    for kind in FLAGS:
        if kind in chosen and chosen[kind] is None:
            _blame_unreadable(found, kind)
    present = {name: detected for name, detected in chosen.items() if detected}
    paths = {name: detected.path for name, detected in present.items()}
    return Parts(**paths, found=present)


def find_component(path: Path, kind: Kind) -> Detected:
    """The one model of this kind in a file or folder; of two experts the high-noise one."""
    found = _look(path)
    if kind == "dit":
        chosen, _ = _transformers(path, _of_kind(found, "dit"), False)
    else:
        dit = next((d.spec for d in _of_kind(found, "dit")), None)
        chosen = _choose(path, found, kind, dit)
    if chosen:
        return chosen
    _blame_unreadable(found, kind)
    if len(found) == 1:
        note = f" ({found[0].note})" if found[0].kind == "unknown" else ""
        what = f"this is {found[0]}{note}"
    else:
        what = "holds " + ("; ".join(f"{d.path.name}: {d}" for d in found[:5]) or "no weights")
    raise FormatError(path, f"{what}; {KIND_NAMES[kind]} was asked for")


def _blame_unreadable(found: list[Detected], kind: Kind) -> None:
    """Where a part is missing and a file is broken, the file is what the user must hear of."""
    for broken in found:
        if broken.title == UNREADABLE:
            raise FormatError(broken.path, broken.note, f"and no other file is {KIND_NAMES[kind]}")


def _look(path: Path) -> list[Detected]:
    """Everything below path; of a ComfyUI models folder only the places where Wan's parts lie."""
    if path.is_dir():
        root = path / "split_files" if (path / "split_files").is_dir() else path
        folders = [root / name for name in _COMFY_FOLDERS if (root / name).is_dir()]
        if (root / "diffusion_models").is_dir() or (root / "unet").is_dir():
            return [found for folder in folders for found in describe(folder)]
    return describe(path)


def _of_kind(found: Iterable[Detected], kind: Kind) -> list[Detected]:
    """The candidates; a pickle yields to safetensors of the same kind in the same folder."""
    same = [d for d in found if d.kind == kind]
    safe = {d.path.parent for d in same if d.container != "pickle"}
    return [d for d in same if d.container != "pickle" or d.path.parent not in safe]


def _transformers(
    model: Path, found: list[Detected], low_given: bool
) -> tuple[Detected | None, Detected | None]:
    """The transformer, or the pair of experts."""
    if len(found) < 2:
        return (found[0] if found else None), None
    low = [d for d in found if expert(d.path) == "low"]
    high = [d for d in found if expert(d.path) != "low"]
    if len(high) == 1 and low_given:
        return high[0], None
    if len(high) == 1 and len(low) == 1 and high[0].spec == low[0].spec:
        return high[0], low[0]
    raise _several(
        model, found, "name one of them with --model, a second expert with --low-noise-model"
    )


def _choose(model: Path, found: list[Detected], kind: Kind, dit: DitSpec | None) -> Detected | None:
    candidates = _of_kind(found, kind)
    if len(candidates) > 1 and dit is not None:
        candidates = [d for d in candidates if _fits(d, dit)] or candidates
    if len(candidates) > 1:
        raise _several(model, candidates, f"choose one with {FLAGS[kind]}")
    return candidates[0] if candidates else None


def _fits(candidate: Detected, dit: DitSpec) -> bool:
    """Whether a part's width is the one the transformer takes."""
    match candidate.kind:
        case "vae":
            return candidate.spec.z_dim == dit.out_dim
        case "umt5":
            return candidate.spec.dim == dit.text_dim
        case _:
            return candidate.spec.dim == dit.image_dim


def _several(model: Path, found: list[Detected], fix: str) -> FormatError:
    listed = ", ".join(
        f"{d.path.relative_to(model) if model.is_dir() else d.path} ({d.title})" for d in found
    )
    return FormatError(
        model, f"holds {len(found)} candidates for {KIND_NAMES[found[0].kind]}: {listed}", fix
    )


def _tokenizer(model: Path, text_encoder: Path | None) -> Path | None:
    """tokenizer.json or spiece.model, beside the text encoder or where the layouts have it."""
    roots = [model if model.is_dir() else model.parent]
    if text_encoder is not None:
        roots[:0] = [text_encoder.parent, text_encoder.parent.parent]
    for root in roots:
        for folder in _TOKENIZER_FOLDERS:
            for name in _TOKENIZERS:
                if (path := root / folder / name).is_file():
                    return path
    return None
