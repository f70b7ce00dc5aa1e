"""Blocks that stream give what resident blocks give, to the bit, in the order that was planned."""

import shutil
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wanrt
from wanrt.components import Components
from wanrt.config import NANO, WanSpec
from wanrt.errors import FormatError
from wanrt.memory.placement import Placement, place
from wanrt.weights import contents
from wanrt.weights.load import load_component

MODELS = ("nano", "wan2.1-i2v-14b-480p", "wan2.1-vace-1.3b")
PLACEMENTS = {
    "none-stay": (0, 2, None),
    "one-stays": (1, 2, None),
    "three-slots": (0, 3, None),
    "all-from-file": (0, 2, 0),
    "some-from-file": (1, 2, 1),
}


def placement_of(num_blocks: int, resident: int, slots: int, pinned: int | None) -> Placement:
    streamed = num_blocks - resident
    return Placement(num_blocks, resident, slots, streamed if pinned is None else pinned)


def num_visits(spec: WanSpec) -> int:
    return spec.dit.num_layers + len(spec.dit.vace_layers)


def inputs_of(spec: WanSpec) -> dict[str, Tensor]:
    torch.manual_seed(3)
    d = spec.dit
    given = {"latents": torch.randn(1, d.out_dim, 2, 4, 6)}
    if d.in_dim > d.out_dim:
        given["y"] = torch.randn(1, d.in_dim - d.out_dim, 2, 4, 6)
    if d.vace_layers:
        given["vace_context"] = torch.randn(1, d.vace_in_dim, 2, 4, 6)
    return given


@torch.inference_mode()
def run(dit: nn.Module, spec: WanSpec, together: bool) -> list[Tensor]:
    """Two steps with two texts."""
    given, d = inputs_of(spec), spec.dit
    torch.manual_seed(4)
    image = None if d.image_dim is None else torch.randn(1, 257, d.image_dim)
    texts = [dit.prepare(torch.randn(1, n, d.text_dim), image) for n in (9, 4)]
    results = []
    for t in (900.0, 300.0):
        latents = given["latents"]
        rest = {name: value for name, value in given.items() if name != "latents"}
        if together:
            results += dit.forward_each(latents, t, texts, **rest)
        else:
            results += [dit(latents, t, text, **rest) for text in texts]
    return results


@pytest.mark.parametrize("together", [False, True], ids=["in-turn", "together"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_transformer_is_the_resident_one(
    name: str, placement: str, together: bool, zoo: Any
) -> None:
    spec, path = zoo.specs[name], zoo.path(name)
    expected = run(wanrt.load_component(path, "dit"), spec, together=False)
    where = placement_of(num_visits(spec), *PLACEMENTS[placement])
    dit = load_component(path, "dit", placement=where)
    for ours, theirs in zip(run(dit, spec, together), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pinned", [None, 0])
def test_streamed_encoders_are_the_resident_ones(
    pinned: int | None, zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "LARGE_TABLE", 0)  # so that the token table stays in its file
    spec, path = zoo.specs[MODELS[1]], zoo.path(MODELS[1])
    ids = [torch.tensor([[5, 3, 9, 5, 1]]), torch.tensor([[7, 1]])]
    pairs = [(one, torch.ones_like(one)) for one in ids]
    expected = [wanrt.load_component(path, "umt5")(*pair) for pair in pairs]
    where = placement_of(spec.umt5.num_layers, 0, 2, pinned)
    umt5 = load_component(path, "umt5", placement=where)
    assert not any("token_embedding" in name for name, _ in umt5.named_parameters())
    for ours, theirs in zip(umt5.forward_each(pairs), expected, strict=True):
        assert torch.equal(ours, theirs)
    pixels = torch.randn(1, 3, 224, 224)
    assert spec.clip is not None
    where = placement_of(spec.clip.num_layers - 1, 0, 2, pinned)
    clip = load_component(path, "clip", placement=where)
    assert torch.equal(clip(pixels), wanrt.load_component(path, "clip")(pixels))


def test_weights_that_are_not_there_cannot_be_used(zoo: Any) -> None:
    """A block that was left holds no values, least of all those of the block in its buffer."""
    where = placement_of(NANO.dit.num_layers, 2, 2, None)
    dit = load_component(zoo.path("nano"), "dit", placement=where)
    run(dit, NANO, together=False)
    there = [block.ffn[0].weight.device.type == "cpu" for block in dit.blocks]
    assert sum(there) == 3  # two that stay and the last one visited
    assert all(there[i] for i in where.resident())


def test_each_block_is_copied_once_per_pass(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = contents.Weights.read
    monkeypatch.setattr(
        contents.Weights,
        "read",
        lambda self, name, *rest: reads.append(name) or read(self, name, *rest),
    )
    where = placement_of(NANO.dit.num_layers, 0, 2, 0)  # every copy reads the file
    dit = load_component(zoo.path("nano"), "dit", placement=where)
    run(dit, NANO, together=True)
    for coming in dit.weight_stream._coming.values():
        coming.done.result()  # the worker reads ahead
    counts = [reads.count(f"blocks.{i}.ffn.0.weight") for i in range(NANO.dit.num_layers)]
    assert counts[1:] == [2] * (NANO.dit.num_layers - 1)
    assert counts[0] == 3  # the third for a step that may come
    assert reads.count("blocks.0.cross_attn.k.weight") == 2  # two calls of `prepare`


def test_blocks_that_stay_are_spread_evenly() -> None:
    assert sorted(Placement(6, 3).resident()) == [1, 3, 5]
    assert len(Placement(40, 13).resident()) == 13
    assert Placement(4, 4).resident() == {0, 1, 2, 3}


def test_host_memory_that_is_short_sends_the_rest_to_the_file() -> None:
    where = place([100] * 10, num_resident=2, room=550)  # two buffers take 200 of it
    assert (where.num_pinned, where.pinned, where.mapped, where.staging) == (3, 300, 500, 200)
    assert where.host == 500
    where = place([100] * 10, num_resident=2, room=900, from_file=30)
    assert (where.num_pinned, where.mapped, where.staging) == (8, 0, 60)
    where = place([100] * 10, num_resident=2, room=0, from_file=30)
    assert (where.num_pinned, where.mapped, where.staging) == (0, 800, 200)
    assert place([100] * 10, 10, 0) == Placement(10, 10)


def test_a_broken_weight_is_found_where_it_streams_from_the_file(zoo: Any, tmp_path: Path) -> None:
    shutil.copytree(zoo.path("nano"), tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*diffusion*.safetensors")
    tensors = load_file(file)
    tensors["blocks.3.ffn.0.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    where = placement_of(NANO.dit.num_layers, 0, 2, 0)
    dit = load_component(tmp_path / "model", "dit", placement=where)
    with pytest.raises(FormatError, match=r"blocks\.3\.ffn\.0\.weight holds NaN"):
        run(dit, NANO, together=False)


def test_a_file_that_can_be_read_again_is_read_again(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, fails = contents.Weights.read, [False]

    def sometimes(self: Any, name: str, *rest: Any) -> Tensor:
        if fails[0]:
            raise OSError("the disk was pulled")
        return read(self, name, *rest)

    monkeypatch.setattr(contents.Weights, "read", sometimes)
    where = placement_of(NANO.dit.num_layers, 0, 2, 0)
    dit = load_component(zoo.path("nano"), "dit", placement=where)
    expected = run(dit, NANO, together=True)
    fails[0] = True
    for _ in range(3):
        with pytest.raises(OSError, match="pulled"):
            run(dit, NANO, together=True)
    fails[0] = False
    for ours, theirs in zip(run(dit, NANO, together=True), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_what_failed_ahead_of_time_is_read_again(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third reading of block 0 is for a step that may come: its failure is nobody's yet."""
    read, name, times = contents.Weights.read, "blocks.0.ffn.0.weight", []

    def once_not(self: Any, asked: str, *rest: Any) -> Tensor:
        if asked == name:
            times.append(asked)
            if len(times) == 3:
                raise OSError("the disk was pulled")
        return read(self, asked, *rest)

    monkeypatch.setattr(contents.Weights, "read", once_not)
    where = placement_of(NANO.dit.num_layers, 0, 2, 0)
    dit = load_component(zoo.path("nano"), "dit", placement=where)
    expected = run(dit, NANO, together=True)
    errors = [coming.done.exception() for coming in dit.weight_stream._coming.values()]
    assert any(isinstance(error, OSError) for error in errors)
    for ours, theirs in zip(run(dit, NANO, together=True), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_part_that_is_let_go_is_gone(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while the worker still reads for a step that does not come."""
    read = contents.Weights.read
    monkeypatch.setattr(
        contents.Weights,
        "read",
        lambda self, name, *rest: time.sleep(0.005) or read(self, name, *rest),
    )
    where = placement_of(NANO.dit.num_layers, 0, 2, 0)
    monkeypatch.setattr(Components, "_placement", lambda self, name: where)
    parts = zoo.open("nano").components
    parts.keep = False
    dit = parts.dit()
    run(dit, NANO, together=True)
    seen = weakref.ref(dit)
    del dit
    parts.release("dit")
    assert seen() is None
