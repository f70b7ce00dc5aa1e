"""What a model is called: by its shape, and by file names where released models share a shape."""

import re
from pathlib import Path
from typing import Literal

from wanrt.config import MODELS, NANO, VAE_2_1, VAE_2_2, ClipSpec, DitSpec, Task, Umt5Spec, VaeSpec
from wanrt.weights.specs import Spec

# "high_noise_model", "Wan2_2-T2V-A14B-LOW_fp8"
_EXPERT = re.compile(r"(high|low)[-_]?noise|(?:2[._]2|wan22|a14b).*[-_](high|low)(?=[-_.])")


def dit_task(spec: DitSpec) -> Task:
    """What a transformer was made for, as far as its shape tells.

    Wan2.2 I2V has the 36 channels but no CLIP branch, so `image_dim` alone does not decide.
    """
    if spec.vace_layers:
        return "vace"
    if spec.image_pos_tokens:
        return "flf2v"
    return "i2v" if spec.in_dim > spec.out_dim else "t2v"


def expert(path: Path) -> Literal["high", "low"] | None:
    """Which Wan2.2 A14B expert the names of file and folder say this is; shapes are the same."""
    if path.parent.name in ("transformer_2", "transformer"):
        return "low" if path.parent.name == "transformer_2" else None
    found = _EXPERT.search(f"{path.parent.name}/{path.name}".lower())
    return (found[1] or found[2]) if found else None


def title_of(spec: Spec, path: Path) -> tuple[str, str]:
    """A released model's name, else the shape in words; and a note where shapes cannot decide."""
    match spec:
        case DitSpec():
            return _dit_title(spec, path)
        case VaeSpec():
            known = {VAE_2_1: "Wan2.1 VAE", VAE_2_2: "Wan2.2 VAE", NANO.vae: "wanrt nano VAE"}
            other = f"Wan VAE (base {spec.base_dim}, z {spec.z_dim})"
        case Umt5Spec():
            known = {Umt5Spec(): "umT5-xxl", NANO.umt5: "wanrt nano umT5"}
            other = f"umT5 (dim {spec.dim}, {spec.num_layers} layers)"
        case ClipSpec():
            known = {ClipSpec(): "CLIP ViT-H/14"}
            other = f"CLIP vision (dim {spec.dim}, {spec.num_layers} layers)"
    return known.get(spec, other), ""


def _dit_title(spec: DitSpec, path: Path) -> tuple[str, str]:
    same = [model for model in MODELS.values() if model.dit == spec]
    if not same:
        return f"Wan DiT (dim {spec.dim}, {spec.num_layers} layers)", ""
    text, role = str(path).lower(), expert(path)
    named = [m for m in same if m.title.lower() in text]
    if not named and role:
        named = [m for m in same if m.boundary is not None]
    titles = list(dict.fromkeys(re.sub(r"-\d+P$", "", m.title) for m in named or same))
    if len(named or same) == 1:
        titles = [(named or same)[0].title]
    note = f"same shapes: {', '.join(titles[1:])}" if titles[1:] else ""
    is_expert = role is not None and (named or same)[0].boundary is not None
    return f"{titles[0]} {role} noise" if is_expert else titles[0], note
