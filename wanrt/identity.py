"""Which released model a transformer is, by its shape and name; whether the other parts fit it."""

from dataclasses import replace

from wanrt.config import MODELS, Defaults, WanSpec
from wanrt.errors import FormatError
from wanrt.weights.detect import Detected
from wanrt.weights.parts import Parts


def identify(dit: Detected, has_low: bool, name: str) -> WanSpec:
    """The released model that a transformer's shape and its folder's name stand for.

    Several models share one shape: two experts tell A14B, the size in the name the 480P and 720P
    forms. An unknown shape gets the defaults of the released model of its kind.
    """
    lowered = name.lower()
    same = [s for s in MODELS.values() if s.dit == dit.spec and (s.boundary is not None) == has_low]
    for spec in same:
        if spec.title.lower() in lowered or spec.id in lowered:
            return spec
    if same:
        return same[0]
    return custom_spec(dit, has_low)


def spec_of(parts: Parts, name: str) -> WanSpec:
    """Of a whole model: the transformer's, with the other parts as they are.

    Raises FormatError where there is no transformer, or a part is another model's.
    """
    parts.require("dit")
    check_fit(parts)
    spec = identify(parts.found["dit"], parts.low_noise is not None, name)
    own = {kind: parts.found[kind].spec for kind in ("vae", "umt5", "clip") if kind in parts.found}
    return replace(spec, **own)


def custom_spec(dit: Detected, has_low: bool) -> WanSpec:
    """A model of its own shape: the task from its inputs, the defaults of the nearest release."""
    d = dit.spec
    if d.vace_layers:
        like = MODELS["wan2.1-vace-1.3b"]
    elif d.image_pos_tokens:
        like = MODELS["wan2.1-flf2v-14b-720p"]
    elif d.in_dim > d.out_dim:
        like = MODELS["wan2.2-i2v-a14b" if d.image_dim is None else "wan2.1-i2v-14b-480p"]
    elif d.out_dim == 48:
        like = MODELS["wan2.2-ti2v-5b"]
    else:
        like = MODELS["wan2.2-t2v-a14b" if has_low else "wan2.1-t2v-1.3b"]
    boundary = like.boundary if has_low else None
    defaults: Defaults = like.defaults
    return WanSpec(
        "custom", dit.title, like.task, d, like.vae, defaults, clip=like.clip, boundary=boundary
    )


def check_fit(parts: Parts) -> None:
    """Raises FormatError where a part is another model's: its width is not the transformer's."""
    dit = parts.found["dit"]
    widths = {
        "vae": ("latent channels", lambda spec: spec.z_dim, dit.spec.out_dim),
        "umt5": ("text features", lambda spec: spec.dim, dit.spec.text_dim),
        "clip": ("image features", lambda spec: spec.dim, dit.spec.image_dim),
    }
    for name, (what, width, wanted) in widths.items():
        found = parts.found.get(name)
        if found is not None and wanted is not None and width(found.spec) != wanted:
            reason = f"this is {found} with {width(found.spec)} {what}; {dit.title} takes {wanted}"
            raise FormatError(found.path, reason)
    low = parts.found.get("low_noise")
    if low is not None and low.spec != dit.spec:
        raise FormatError(low.path, f"this is {low}; the other expert is {dit.title}")
