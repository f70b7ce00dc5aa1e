"""The parts of a VAE: what enters and leaves them, for VAEs of every kind and width."""

from collections.abc import Mapping

import onnx_ir
import pytest
import torch
from onnx_graphs import TracedGraphs
from torch import Tensor
from vae_models import SPECS, distance, draw_latents, draw_video, random_vae

from wanrt.config import MODELS, NANO, VaeSpec
from wanrt.engine.vae import GraphVae
from wanrt.export import onnx
from wanrt.export import vae as parts
from wanrt.export.part import Part
from wanrt.models.vae import WanVAE
from wanrt.models.vae_layers import CausalState
from wanrt.vae_sections import RANGES, Slot, decoder_sections, encoder_sections

ALL = SPECS | {
    "nano": NANO.vae,
    "wan2.1": MODELS["wan2.1-t2v-1.3b"].vae,
    "wan2.2": MODELS["wan2.2-ti2v-5b"].vae,
}
SIDES = {"decode": decoder_sections, "encode": encoder_sections}
EVERY_SPEC = pytest.mark.parametrize("spec", ALL.values(), ids=ALL)
EVERY_SIDE = pytest.mark.parametrize("side", SIDES)


def draw(side: str, spec: VaeSpec, frames: int) -> Tensor:
    """What a side codes, of so many latent frames."""
    return (draw_latents if side == "decode" else draw_video)(spec, (3, 5), frames)


@EVERY_SIDE
@EVERY_SPEC
def test_sections_name_every_slot_and_its_shape(spec: VaeSpec, side: str) -> None:
    with torch.device("meta"), torch.inference_mode():
        chunks = getattr(WanVAE(spec), f"{side}_chunks")(draw(side, spec, 2).to("meta"))
        (_, first), (_, second) = chunks
    slots = {n: slot for section in SIDES[side](spec) for n, slot in section.slots.items()}
    assert list(slots) == list(range(len(second.slots)))
    for n, slot in slots.items():
        shape = (1, slot.channels, slot.frames, 3 * slot.scale, 5 * slot.scale)
        assert second.slots[n].shape == shape
        assert slot.late == (first.slots[n] is None)


def result_of(part: Part) -> dict[str, Tensor]:
    """A part run without data at its trace sizes."""
    inputs = [
        torch.empty(value.at(lambda axis: axis.trace), dtype=value.dtype, device="meta")
        for value in part.inputs
    ]
    with torch.inference_mode():
        made = part.function(part.module, *inputs)
    assert len(made) == len(part.outputs)
    return dict(zip(part.outputs, made, strict=True))


@EVERY_SIDE
@EVERY_SPEC
def test_what_a_part_keeps_is_what_it_takes(spec: VaeSpec, side: str) -> None:
    """Whole or by section, at the first latent frame or later."""
    made = {p.name: p for p in parts.parts(parts.empty(spec, torch.float16), torch.float16)}
    cut = SIDES[side](spec)
    whole = (made[f"vae.{side}.{when}"] for when in ("first", "step"))
    check_kept({n: slot for section in cut for n, slot in section.slots.items()}, *whole)
    for i, section in enumerate(cut):
        for sizes in RANGES:
            graphs = [made[f"vae.{side}.{i}.{when}.{sizes.name}"] for when in section.graphs]
            check_kept(section.slots, *graphs)


def check_kept(slots: Mapping[int, Slot], *graphs: Part) -> None:
    """Of the first latent frame, where a graph is its own, and of later ones."""
    step = graphs[-1]
    caches = {value.name: value for value in step.inputs[1:]}
    assert list(caches) == [f"cache.{n}" for n in slots]
    kept = result_of(step)
    result, *names = kept
    assert names == [f"kept.{n}" for n in slots]
    assert kept[result].dtype == (torch.float16 if result == "y" else torch.float32)
    results = [kept]
    if len(graphs) == 2:
        assert len(graphs[0].inputs) == 1
        results.append(result_of(graphs[0]))
        late = [f"kept.{n}" for n, slot in slots.items() if not slot.late]
        assert list(results[1]) == [result, *late]
    for found in results:
        for name, tensor in found.items():
            if name != result:
                cache = caches[name.replace("kept", "cache")]
                assert tensor.shape == cache.at(lambda axis: axis.trace)
                assert tensor.dtype == cache.dtype == torch.float16


@EVERY_SIDE
@pytest.mark.parametrize("name", ["2.1", "2.2"])
def test_zeros_stand_for_no_past(name: str, side: str) -> None:
    """In any slot: a graph is given zeros where modules have nothing."""
    spec, vae = SPECS[name], random_vae(SPECS[name])
    clip = draw(side, spec, 3)
    with torch.inference_mode():
        run = getattr(vae, f"{side}_chunks")
        cut = 1 if side == "decode" else 1 + spec.temporal_stride
        *_, (_, state) = run(clip[:, :, :cut])
        *_, (_, full) = run(clip[:, :, cut:], state)
        rest, stride = clip[:, :, cut:], 1 if side == "decode" else spec.temporal_stride
        for n, slot in enumerate(full.slots):
            results = []
            for past in (None, torch.zeros_like(slot)):
                slots = (*full.slots[:n], past, *full.slots[n + 1 :])
                result, _ = next(run(rest[:, :, -stride:], CausalState(slots, first=False)))
                results.append(result)
            assert distance(*results) < 1e-6


def test_bf16_passes_the_checker() -> None:
    """ONNX Runtime multiplies none on a CPU, so that nothing runs here."""
    vae = parts.empty(SPECS["2.1-short"], torch.bfloat16)
    made = {part.name: part for part in parts.parts(vae, torch.bfloat16)}
    model = onnx.trace(made["vae.decode.0.frame.wide"])
    dtypes = {value.name: value.dtype for value in model.graph.inputs}
    assert dtypes.pop("latents") == onnx_ir.DataType.FLOAT
    assert set(dtypes.values()) == {onnx_ir.DataType.BFLOAT16}
    assert "decoder.conv1.weight" in dtypes and "cache.0" in dtypes
    assert not any("upsamples" in name or "encoder" in name for name in dtypes)


def test_ranges_are_one_graph() -> None:
    """For which the builder makes an engine each."""
    vae = parts.empty(SPECS["2.1-short"], torch.bfloat16)
    made = {part.name: part for part in parts.parts(vae, torch.bfloat16)}
    graphs = {onnx.serialise(onnx.trace(made[f"vae.decode.4.frame.{r.name}"])) for r in RANGES}
    assert len(graphs) == 1
    assert {made[f"vae.decode.4.frame.{r.name}"].graph for r in RANGES} == {"vae.decode.4.frame"}
    assert made["vae.decode.step"].graph == ""
    for sizes in RANGES:
        x, cache = made[f"vae.decode.4.frame.{sizes.name}"].inputs
        assert x.most[3:] == cache.most[3:] == (sizes.height, sizes.width)


@pytest.mark.slow
def test_the_decoder_of_wan21_at_its_real_widths() -> None:
    spec = MODELS["wan2.1-t2v-1.3b"].vae
    vae = random_vae(spec)
    graphs = TracedGraphs(parts.parts(parts.empty(spec, torch.float32), torch.float32))
    latents = draw_latents(spec, (16, 24), 3)
    with torch.inference_mode():
        assert distance(GraphVae(vae, graphs).decode(latents), vae.decode(latents)) < 1e-5
