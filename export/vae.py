"""A VAE as graphs: one for the first latent frame of a clip, one for every later one.

    vae.decode.first    latents -> frames (one) and what its convolutions keep
    vae.decode.step     latents and what was kept -> frames (four) and what is kept now
    vae.encode.first    frames (one) -> latents and what is kept
    vae.encode.step     frames (four) and what was kept -> latents and what is kept now

Each is there as a whole and, as `vae.decode.{i}.first.wide` and so on, cut into sections
(`vae_sections`) so that few caches need be there twice, for the sizes of each range. Sections whose
frames go one by one have one graph, `vae.decode.{i}.frame.wide`. Slot n of the state enters as
`cache.{n}` and leaves as `kept.{n}`; zeros stand for a past that there is not.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanrt.config import VaeSpec
from wanrt.export.part import Axis, Multiple, Part, Value, cast
from wanrt.kernels import registry
from wanrt.models.vae import WanVAE
from wanrt.models.vae_layers import CausalState, VaeOps, Walk
from wanrt.vae_sections import RANGES, Range, Section, decoder_sections, encoder_sections

_NO_ONNX = ("causal_conv3d_int8",)  # graphs are quantised after they are made
FP32 = torch.float32
# Pixels, by patch: what engines are to be fastest at, unless their range is narrower.
BEST = {1: (480, 832), 2: (704, 1280)}


class _Run(NamedTuple):
    """Sections of a decoder or encoder that one graph runs, one after the other."""

    name: str
    decodes: bool
    first: bool
    sections: Sequence[Section]
    start: int  # the number of the first of them
    begins: bool  # it takes what the caller gives
    ends: bool  # it gives what the caller wants
    scale: int = 1  # of the smallest frames in it; they may have any size
    sizes: Range | None = None  # but are of these

    @property
    def slots(self) -> list[int]:
        return [number for section in self.sections for number in section.slots]

    @property
    def kept(self) -> list[int]:
        """Slots that hold something afterwards."""
        slots = {n: slot for section in self.sections for n, slot in section.slots.items()}
        return [n for n, slot in slots.items() if not (self.first and slot.late)]


def parts(vae: WanVAE, dtype: torch.dtype) -> Iterator[Part]:
    """Every graph of a VAE that has the ops of ONNX; `dtype` is that of its weights and caches.

    Those that differ in their range alone follow each other, and are one graph.
    """
    for side in ("decode", "encode"):
        decodes = side == "decode"
        cut = (decoder_sections if decodes else encoder_sections)(vae.spec)
        for when in ("first", "step"):
            name = f"vae.{side}.{when}"
            yield _part(vae, _Run(name, decodes, when == "first", cut, 0, True, True), dtype)
        for i, section in enumerate(cut):
            place = (section,), i, i == 0, i == len(cut) - 1
            scale = min(near.scale for near in cut[i : i + 2])
            for when, sizes in product(section.graphs, RANGES):
                name = f"vae.{side}.{i}.{when}.{sizes.name}"
                run = _Run(name, decodes, when == "first", *place, scale, sizes)
                yield _part(vae, run, dtype)


def is_section(part: Part) -> bool:
    """Whether it is a piece of a step, as `vae.decode.1.first.wide`."""
    return part.name.split(".")[2].isdigit()


def empty(spec: VaeSpec, dtype: torch.dtype) -> WanVAE:
    """A VAE of a spec on the meta device, with the ops of ONNX."""
    names = (name for name in VaeOps._fields if name not in _NO_ONNX)
    ops = {name: registry.function(name, "onnx") for name in names}
    with torch.device("meta"):
        return cast(WanVAE(spec, VaeOps(**ops, **dict.fromkeys(_NO_ONNX, _absent))), dtype)


def _absent(*_: object) -> None:
    raise AssertionError("int8 convolutions have no ONNX form")


def _part(vae: WanVAE, run: _Run, dtype: torch.dtype) -> Part:
    side = vae.decoder if run.decodes else vae.encoder
    groups = side.sections[run.start : run.start + len(run.sections)]
    layers = [layer for group in groups for layer in group]

    def call(vae: WanVAE, x: Tensor, *caches: Tensor) -> object:
        state: list[Tensor | None] = [None] * side.num_slots
        for number, cache in zip(run.slots, caches, strict=False):
            state[number] = cache
        walk = Walk(CausalState(tuple(state), run.first), vae.ops)
        y = _through(vae, run, layers, x, walk)
        return (y, *(walk.slots[number] for number in run.kept))

    given = () if run.first else tuple(_caches(run, vae.spec, dtype))
    names = (_result(run), *(f"kept.{number}" for number in run.kept))
    inputs = (_given(run, vae.spec, dtype), *given)
    graph = run.name.removesuffix(f".{run.sizes.name}") if run.sizes else ""
    return Part(run.name, vae, call, inputs, names, homes=("",), graph=graph)


def _through(vae: WanVAE, run: _Run, layers: Sequence[nn.Module], x: Tensor, walk: Walk) -> Tensor:
    """The layers, with what comes before the first and after the last of all."""
    if run.begins:
        x = vae.latents_to_decoder(x, walk) if run.decodes else vae.pixels_to_encoder(x)
    for layer in layers:
        x = layer(x, walk)
    if not run.ends:
        return x
    return vae.decoder_to_pixels(x) if run.decodes else vae.moments_to_latents(x, walk)


def _given(run: _Run, spec: VaeSpec, dtype: torch.dtype) -> Value:
    """What enters: latents, frames, or `x` from the section before."""
    section = run.sections[0]
    whole = run.begins and run.ends
    frames = 1 if run.first else section.frames * (section.times if whole else 1)
    if not run.begins:
        return Value("x", dtype, (1, section.channels, frames, *_size(run, spec, section.scale)))
    if run.decodes:
        return Value("latents", FP32, (1, spec.z_dim, frames, *_size(run, spec, 1)))
    return Value("frames", FP32, (1, 3, frames, *_size(run, spec, spec.spatial_stride)))


def _result(run: _Run) -> str:
    if not run.ends:
        return "y"
    return "frames" if run.decodes else "latents"


def _caches(run: _Run, spec: VaeSpec, dtype: torch.dtype) -> Iterator[Value]:
    for section in run.sections:
        for number, slot in section.slots.items():
            size = _size(run, spec, slot.scale)
            yield Value(f"cache.{number}", dtype, (1, slot.channels, slot.frames, *size))


def _size(run: _Run, spec: VaeSpec, scale: int) -> tuple[Axis | Multiple, ...]:
    """Height and width at so many times those of the latents."""
    most = run.sizes or RANGES[-1]
    best = BEST[spec.patch] if most == RANGES[-1] else most[1:]
    sizes: list[Axis | Multiple] = []
    for name, *pixels, more in zip("hw", best, most[1:], (1, 3), strict=True):
        opt, high = (side // spec.spatial_stride * run.scale for side in pixels)
        low = 2 * run.scale
        axis, factor = Axis(name, low, opt, high, trace=low + more), scale // run.scale
        sizes.append(axis if factor == 1 else Multiple(axis, factor))
    return tuple(sizes)
