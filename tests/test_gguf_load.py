"""Models from GGUF files: the numbers the file holds, whether they stay packed or not."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from conftest import TOKENIZER, lively
from gguf_files import write_gguf
from lora_files import DIALECTS, matrices, shapes_of, truth
from safetensors.torch import save_file
from test_offload import placement_of, run
from test_tokenizer import train_spiece
from torch import Tensor, nn

from wanrt import cli
from wanrt.adapter import Adapter
from wanrt.cli_plan import _stored
from wanrt.components import Components
from wanrt.config import NANO, Lora, Umt5Spec, WanSpec
from wanrt.errors import FormatError
from wanrt.loras import Shelf
from wanrt.memory import dit_bytes
from wanrt.memory.meter import metered
from wanrt.memory.phases import text_options
from wanrt.memory.placement import Ask, Placement
from wanrt.models import layers, spiece
from wanrt.models.packed import PackedEmbedding, PackedLinear
from wanrt.models.tokenizer import Tokenizer
from wanrt.pipeline import Pipeline
from wanrt.planning import CPU as MACHINE
from wanrt.quant.gguf_blocks import FORMATS
from wanrt.weights import contents
from wanrt.weights.gguf_vocabulary import read_vocabulary
from wanrt.weights.layouts import write_model
from wanrt.weights.load import load_component, skeleton
from wanrt.weights.names import Kind
from wanrt.weights.packed import packed_text_encoder
from wanrt.weights.parts import find_component

T2V = "wan2.1-t2v-1.3b"
CPU = torch.device("cpu")
NAMES = [form.name for form in FORMATS.values()]
LLAMA = {
    "token_embedding": "token_embd",
    "norm": "enc.output_norm",
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_o",
    "pos_embedding.embedding": "attn_rel_b",
    "ffn.gate.0": "ffn_gate",
    "ffn.fc1": "ffn_up",
    "ffn.fc2": "ffn_down",
}


class Held(NamedTuple):
    """A GGUF file and the fp32 values that are in it, by original name."""

    path: Path
    values: dict[str, Tensor]


def llama(name: str) -> str:
    """The name that llama.cpp gives a weight of umT5."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("blocks."):
        return f"{LLAMA[stem]}.weight"
    _, block, rest = stem.split(".", 2)
    return f"enc.blk.{block}.{LLAMA[rest]}.weight"


def test_llama_cpp_has_these_names() -> None:
    theirs = {
        gguf.TENSOR_NAMES[one].replace("{bid}", "1")
        for one in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.T5ENCODER]
        if one != gguf.MODEL_TENSOR.OUTPUT  # an encoder has none
    }
    outside = ("token_embedding", "norm")
    ours = {llama(stem if stem in outside else f"blocks.1.{stem}") for stem in LLAMA}
    assert ours == {f"{name}.weight" for name in theirs}


@pytest.fixture(scope="module")
def spec(zoo: Any) -> WanSpec:
    """Tiny, but with rows of 256, which the K formats need."""
    tiny = zoo.specs[T2V]
    dit = replace(tiny.dit, dim=256, num_heads=2, ffn_dim=512, text_dim=256, freq_dim=256)
    umt5 = Umt5Spec(NANO.umt5.vocab_size, 256, 256, 512, num_heads=4, num_layers=2)
    return replace(tiny, dit=dit, umt5=umt5)


def kind_of(matrix: str) -> Callable[[str, Tensor], str]:
    """As ComfyUI-GGUF does it: vectors, modulation and convolutions stay plain; a second format."""

    def choose(name: str, values: Tensor) -> str:
        if values.ndim != 2 or "rel_b" in name:
            return "F16" if name == "patch_embedding.weight" else "F32"
        return "Q6_K" if name.endswith("ffn.2.weight") else matrix

    return choose


def write(path: Path, spec: WanSpec, kind: Kind, matrix: str, **settings: object) -> Held:
    shapes = skeleton(kind, getattr(spec, kind)).state_dict()
    values = {n: lively(kind, n, tuple(t.shape), torch.float32) for n, t in shapes.items()}
    rename = llama if kind == "umt5" else str
    named = {rename(name): tensor for name, tensor in values.items()}
    arch = "t5encoder" if kind == "umt5" else "wan"
    held = write_gguf(path, named, kind_of(matrix), arch, **settings)
    return Held(path, {name: held[rename(name)] for name in values})


@pytest.fixture(scope="module")
def dit(spec: WanSpec, tmp_path_factory: pytest.TempPathFactory) -> Held:
    return write(tmp_path_factory.mktemp("dit") / "wan.gguf", spec, "dit", "Q4_K")


def without_nonsense(results: list[Tensor]) -> list[Tensor]:
    assert all(result.isfinite().all() and result.std() > 0.01 for result in results)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("matrix", NAMES)
def test_every_format_loads(matrix: str, dtype: torch.dtype, spec: WanSpec, tmp_path: Path) -> None:
    path, values = write(tmp_path / "a.gguf", spec, "dit", matrix)
    loaded = load_component(path, "dit", dtype).state_dict()
    assert loaded.keys() == values.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, values[name].to(tensor.dtype)), name


@pytest.mark.parametrize("kept", [False, True])
def test_umt5_of_llama_cpp(kept: bool, spec: WanSpec, tmp_path: Path) -> None:
    path, values = write(tmp_path / "a.gguf", spec, "umt5", "Q5_K")
    save_file(values, tmp_path / "plain.safetensors")
    ids = torch.tensor([[5, 3, 9, 5, 1], [7, 1, 0, 0, 0]])
    for dtype in (torch.float32, torch.bfloat16):
        expected = load_component(tmp_path / "plain.safetensors", "umt5", dtype)
        ours = load_component(path, "umt5", dtype, keep_packed=kept)
        packed = [isinstance(m, PackedLinear | PackedEmbedding) for m in ours.modules()]
        assert sum(packed) == (1 + 2 * 7 if kept else 0)
        mask = (ids > 0).long()
        assert torch.equal(ours(ids, mask), expected(ids, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same_bits(dtype: torch.dtype, dit: Held, spec: WanSpec) -> None:
    plain = load_component(dit.path, "dit", dtype)
    expected = without_nonsense(run(plain, spec, together=False))
    packed = load_component(dit.path, "dit", dtype, keep_packed=True)
    for together in (False, True):
        for ours, theirs in zip(run(packed, spec, together), expected, strict=True):
            assert torch.equal(ours, theirs)
    linears = [m for m in packed.modules() if isinstance(m, nn.Linear)]
    assert not linears and isinstance(packed.blocks[0].ffn[2], PackedLinear)
    assert packed.blocks[0].ffn[2].form.name == "Q6_K"
    assert num_bytes(packed) < 0.3 * num_bytes(plain) * (2 if dtype == torch.bfloat16 else 1)


def num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


@pytest.mark.parametrize("pinned", [None, 0], ids=["from memory", "from the file"])
def test_packed_weights_stream(pinned: int | None, dit: Held, spec: WanSpec) -> None:
    expected = run(load_component(dit.path, "dit", torch.bfloat16), spec, together=False)
    where = placement_of(2, 0, 2, pinned)
    streamed = load_component(dit.path, "dit", torch.bfloat16, keep_packed=True, placement=where)
    for ours, theirs in zip(run(streamed, spec, together=True), expected, strict=True):
        assert torch.equal(ours, theirs)
    plain = load_component(dit.path, "dit", torch.bfloat16).blocks[0]
    assert max(s.num_bytes for s in streamed.weight_stream._stops.values()) < num_bytes(plain) / 3


def test_a_long_feed_forward_unpacks_once(
    dit: Held, spec: WanSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "FEED_FORWARD_ROWS", 5)
    counts = []
    unpacked = PackedLinear.hold
    monkeypatch.setattr(PackedLinear, "hold", lambda self: counts.append(1) or unpacked(self))
    feed_forward = load_component(dit.path, "dit", keep_packed=True).blocks[0].ffn
    plain = load_component(dit.path, "dit").blocks[0].ffn
    x = torch.randn(1, 13, 256)
    with torch.inference_mode():
        assert torch.equal(feed_forward(x), plain(x))
    assert len(counts) == 2 and all(m._held is None for m in (feed_forward[0], feed_forward[2]))


def test_packed_vectors_are_refused(spec: WanSpec, tmp_path: Path) -> None:
    """No tool writes them: a row of a vector is one number, which is no block."""
    shapes = {n: tuple(t.shape) for n, t in skeleton("dit", spec.dit).state_dict().items()}
    values = {n: lively("dit", n, shape, torch.float32) for n, shape in shapes.items()}
    bias = "blocks.0.ffn.0.bias"
    write_gguf(tmp_path / "a.gguf", values, lambda name, _: "Q8_0" if name == bias else "F32")
    with pytest.raises(FormatError, match=rf"{bias}' has blocks that cross the rows .* \[512\]"):
        load_component(tmp_path / "a.gguf", "dit", keep_packed=True)


def test_a_large_token_table_stays_in_its_file(
    spec: WanSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "LARGE_TABLE", 0)
    path, values = write(tmp_path / "a.gguf", spec, "umt5", "Q4_K")
    where = Placement(2, 2)
    umt5 = load_component(path, "umt5", torch.bfloat16, placement=where, keep_packed=True)
    rows = umt5.token_embedding(torch.tensor([[3, 100, 3]]))
    expected = values["token_embedding.weight"][[3, 100, 3]].bfloat16()
    assert torch.equal(rows[0], expected)


@pytest.mark.parametrize("streams", [False, True])
def test_loras_beside_packed_weights(
    streams: bool, dit: Held, spec: WanSpec, tmp_path: Path
) -> None:
    """Low-rank changes and differences of packed matrices are those of plain ones, to the bit."""
    shapes = shapes_of(spec.dit)
    changed = ("blocks.0.ffn.0.weight", "blocks.1.norm3.weight", "head.head.weight")
    given = truth(shapes, matrices(shapes, blocks_only=False), changed)
    path = tmp_path / "lora.safetensors"
    tensors = DIALECTS["comfy down up"](given)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    where = placement_of(2, 0, 2, None) if streams else None
    modules = [
        load_component(dit.path, "dit", torch.bfloat16),
        load_component(dit.path, "dit", torch.bfloat16, placement=where, keep_packed=True),
    ]
    without = [run(module, spec, together=False) for module in modules]
    shelf = Shelf(spec)
    adapters = [Adapter(module, CPU) for module in modules]
    for strength in (0.7, -0.3):
        for adapter in adapters:
            adapter.put_on(shelf.uses([Lora(str(path), strength)], "high"))
        plain, packed = (run(module, spec, together=False) for module in modules)
        assert all(torch.equal(a, b) for a, b in zip(plain, packed, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(plain, without[0], strict=True))
    for adapter, module, before in zip(adapters, modules, without, strict=True):
        adapter.put_on(())
        after = run(module, spec, together=False)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_weights_that_change_do_not_stay_packed(dit: Held) -> None:
    """What LoRAs merge into is read in fp32 and rounded once."""
    name = "blocks.1.ffn.0.weight"
    module = load_component(
        dit.path, "dit", torch.bfloat16, changes={name: lambda w: w + 1}, keep_packed=True
    )
    expected = (dit.values[name] + 1).bfloat16()
    assert torch.equal(module.get_parameter(name), expected)
    assert isinstance(module.blocks[0].ffn[0], PackedLinear)


@pytest.mark.parametrize("kept", [False, True])
def test_a_scale_that_is_not_finite(kept: bool, dit: Held, tmp_path: Path) -> None:
    raw = bytearray(dit.path.read_bytes())
    raw[-96 - 210 :] = b"\xff" * (96 + 210)  # the last tensor is head.head.weight or its neighbour
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        load_component(path, "dit", keep_packed=kept)
    load_component(path, "dit", keep_packed=kept, check=False)


def vocabulary_of(data: bytes, padding: int = 0) -> dict[str, object]:
    """The settings that llama.cpp's converter writes for a SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model, ours = sentencepiece.SentencePieceProcessor(model_proto=data), spiece.parse(data)
    ids = range(model.vocab_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 1 for i in ids]
    return {
        "tokenizer__ggml__model": "t5",
        "tokenizer__ggml__tokens": [p for p, _ in ours.pieces]
        + [f"[PAD{i}]" for i in range(padding)],
        "tokenizer__ggml__scores": [s for _, s in ours.pieces] + [-1e4] * padding,
        "tokenizer__ggml__token_type": kinds + [5] * padding,
        "tokenizer__ggml__precompiled_charsmap": ours.charsmap,
        "tokenizer__ggml__add_space_prefix": ours.add_dummy_prefix,
        "tokenizer__ggml__remove_extra_whitespaces": ours.remove_extra_whitespaces,
    }


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_the_vocabulary_in_the_header(rule: str, tmp_path: Path) -> None:
    data = train_spiece(rule)
    path = tmp_path / "a.gguf"
    write_gguf(path, {"x": torch.ones(1, 32)}, lambda *_: "F32", **vocabulary_of(data, 20))
    found = read_vocabulary(path)
    assert found == spiece.parse(data)
    texts = ["the cat walks on grass", "x </s> y", "ﬁnal １２", "zzz 🦊", "你好 世界"]
    ids = Tokenizer.from_model(found, str(path))(texts).ids
    assert torch.equal(ids, Tokenizer.from_spiece(data)(texts).ids)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "llama"}, "is of kind 'llama', not 't5'"),
        ({"scores": [0.5]}, "its vocabulary has [0-9]+ tokens, 1 scores"),
        ({"scores": None}, "tokens, 0 scores"),
        ({"tokens": "a"}, "is no list"),
        ({"token_type": ["x"] * 4}, "no list of texts, scores and types"),
        ({"token_type": [1] * 4}, "4 pieces of which 0 are unknown"),
        ({"tokens": ["a", "a", "b", "c"]}, "the same piece twice"),
        ({"scores": [float("nan")] * 4}, "has score nan"),
        ({"precompiled_charsmap": [300, 1]}, "no list of bytes"),
        ({"precompiled_charsmap": b"\1\2\3"}, "character map of 3 bytes"),
    ],
)
def test_a_vocabulary_that_cannot_be_used(
    changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    given = {
        "model": "t5",
        "tokens": ["<pad>", "</s>", "<unk>", "a"],
        "scores": [0.0, 0.0, 0.0, -1.0],
        "token_type": [3, 3, 2, 1],
    } | changes
    stored = {f"tokenizer__ggml__{k}": v for k, v in given.items() if v is not None}
    write_gguf(tmp_path / "a.gguf", {"x": torch.ones(1, 32)}, lambda *_: "F32", **stored)
    with pytest.raises(FormatError, match=reason):
        read_vocabulary(tmp_path / "a.gguf")


def test_other_files_have_no_vocabulary(dit: Held, tmp_path: Path) -> None:
    assert read_vocabulary(dit.path) is None
    assert read_vocabulary(tmp_path / "none.safetensors") is None


def nano_vocabulary() -> dict[str, object]:
    """nano's tokenizer.json as llama.cpp would keep it."""
    content = json.loads(TOKENIZER.read_text())
    pieces, unk = content["model"]["vocab"], content["model"]["unk_id"]
    special = {token["id"] for token in content["added_tokens"]}
    kinds = [2 if i == unk else 3 if i in special else 1 for i in range(len(pieces))]
    return {
        "tokenizer__ggml__model": "t5",
        "tokenizer__ggml__tokens": [piece for piece, _ in pieces],
        "tokenizer__ggml__scores": [float(score) for _, score in pieces],
        "tokenizer__ggml__token_type": kinds,
        "tokenizer__ggml__add_space_prefix": True,
        "tokenizer__ggml__remove_extra_whitespaces": True,
    }


class Folders(NamedTuple):
    packed: Path
    plain: Path


@pytest.fixture(scope="module")
def folders(spec: WanSpec, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A ComfyUI folder with GGUF files, and the same numbers in safetensors."""
    root = tmp_path_factory.mktemp("models")
    names = {"dit": "unet/wan-Q4_K", "umt5": "text_encoders/umt5-Q5_K"}
    for folder in ("packed", "plain"):
        for name in ("unet", "text_encoders", "vae"):
            (root / folder / name).mkdir(parents=True)
    write_model(spec, "comfyui", root / "vae", lively, components=("vae",), precision="fp32")
    (vae,) = (root / "vae").rglob("*.safetensors")
    for folder in ("packed", "plain"):
        (root / folder / "vae" / "vae.safetensors").write_bytes(vae.read_bytes())
    for kind, name in names.items():
        more = nano_vocabulary() if kind == "umt5" else {}
        held = write(root / "packed" / f"{name}.gguf", spec, kind, name[-4:], **more)
        save_file(held.values, root / "plain" / f"{name}.safetensors")
    (root / "plain" / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    return Folders(root / "packed", root / "plain")


SIZE = {"width": 32, "height": 32, "num_frames": 5}
SMALL = SIZE | {"num_steps": 2, "seed": 3, "negative": "a blue circle"}


@pytest.fixture
def keeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each part was asked to stay packed."""
    asked: list[bool] = []
    load = load_component

    def watch(*args: Any, keep_packed: bool = False, **options: Any) -> nn.Module:
        asked.append(keep_packed)
        return load(*args, keep_packed=keep_packed, **options)

    monkeypatch.setattr("wanrt.components.load_component", watch)
    return asked


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_whole_model(
    precision: str,
    streams: bool,
    folders: Folders,
    keeps: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Text encoder and transformer from GGUF files, with the tokenizer of the first."""

    def latents(folder: Path) -> Tensor:
        pipe = Pipeline.load(str(folder), precision=precision)
        return pipe.generate("a red circle moving right", output="latents", **SMALL)

    expected = latents(folders.plain)
    keeps.clear()
    if streams:
        where = {"dit": placement_of(2, 0, 2, None), "umt5": placement_of(2, 0, 2, 0)}
        monkeypatch.setattr(Components, "_placement", lambda self, name: where.get(name))
    assert torch.equal(latents(folders.packed), expected)
    assert keeps == [streams, streams]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("resident", [0, 1])
def test_packed_weights_are_planned_as_they_lie(
    resident: int, precision: str, folders: Folders
) -> None:
    """The ring, what waits and what stays, to the byte; and no pass holds more than was planned."""
    pipe = Pipeline.load(str(folders.packed), precision=precision, vram="64G")
    started = pipe.start("a red circle moving right", decode=False, **SMALL)
    options = started.plan.question.phases["step"]
    option = next(o for o in options if o.placement.num_resident == resident)
    pipe.components.clear()
    started.plan = replace(
        started.plan, keep=False, options=started.plan.options | {"step": option}
    )
    pipe.components.follow(started.plan)
    dit = pipe.components.dit()
    stream = dit.weight_stream
    assert sum(slot.buffer.nbytes for slot in stream._free) == option.phase.ring
    staging = sum(slot.staging.nbytes for slot in stream._free)
    waiting = sum(stop.host.nbytes for stop in stream._stops.values() if stop.host is not None)
    assert (waiting, staging) == (option.placement.pinned, option.placement.staging)
    stays = sum(p.nbytes for p in dit.parameters() if p.device.type == "cpu")
    assert stays == option.phase.weights
    pipe.components.clear()
    with metered(CPU) as meter:
        pipe.denoise(started)
    assert 0 < meter.peak <= option.phase.peak
    plain = Pipeline.load(str(folders.plain), precision=precision, vram="64G")
    asked = plain.start("a red circle moving right", decode=False, **SMALL).plan.question
    unpacked = next(o for o in asked.phases["step"] if o.placement.num_resident == resident)
    assert option.phase.ring < unpacked.phase.ring / 3
    assert options[0].phase == asked.phases["step"][0].phase  # whole, both are unpacked at load


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_packed_text_encoder_is_planned_as_it_lies(precision: str, folders: Folders) -> None:
    """The ring, what waits and what stays, to the byte; and no prompt holds more than planned."""
    pipe = Pipeline.load(str(folders.packed), precision=precision, vram="64G")
    long = SMALL | {"prompt": "a red circle moving " * 200, "negative": "a blue square " * 200}
    started = pipe.start(decode=False, **long)
    whole, option = started.plan.question.phases["text"]
    assert option.placement.slots and not whole.placement.slots
    pipe.components.clear()
    pipe._embeds.clear()
    options = started.plan.options | {"text": option}
    pipe.components.follow(replace(started.plan, keep=False, options=options))
    umt5 = pipe.components.umt5()
    stream = umt5.weight_stream
    assert sum(slot.buffer.nbytes for slot in stream._free) == option.phase.ring
    staging = sum(slot.staging.nbytes for slot in stream._free)
    assert (option.placement.pinned, option.placement.staging) == (0, staging)
    table = umt5.token_embedding.weight.nbytes  # small here; a true one stays in its file
    stays = sum(p.nbytes for p in umt5.parameters() if p.device.type == "cpu")
    assert stays == option.phase.weights >= table
    del umt5, stream
    pipe.components.clear()
    with metered(CPU) as meter:
        pipe.encode_prompts([long["prompt"], long["negative"]])
    assert 0 < meter.peak <= option.phase.peak
    plain = Pipeline.load(str(folders.plain), precision=precision, vram="64G")
    unpacked = plain.start(decode=False, **long).plan.question.phases["text"]
    assert option.phase.ring < unpacked[1].phase.ring / 2
    assert whole.phase.peak == unpacked[0].phase.peak  # whole, both are unpacked at load
    shown = _stored(str(folders.packed), precision, "cpu", True)
    assert shown.packed_text == pipe.components.packed_text is not None


@pytest.mark.parametrize("heads", [2, 16])
def test_what_a_packed_text_encoder_holds_is_what_was_planned(
    heads: int, spec: WanSpec, tmp_path: Path
) -> None:
    """With few heads a matrix of the feed-forward is the most, else the scores are.

    On a CPU pieces that are unpacked are smaller than on a card, for which the scratch is planned.
    """
    umt5 = Umt5Spec(512, 1024, 1024, 4096, num_heads=heads, num_layers=2)
    spec = replace(spec, umt5=umt5)
    path, _ = write(tmp_path / "a.gguf", spec, "umt5", "Q8_0")
    packed = packed_text_encoder(find_component(path, "umt5"), torch.bfloat16)
    ask = Ask(64, 64, 5, text_rows=512)
    _, option = text_options(spec, ask, dit_bytes.FORMATS["bf16"], MACHINE, packed=packed)
    ids = torch.randint(512, (2, 512), generator=torch.Generator().manual_seed(0))
    prompts = [(one[None], torch.ones(1, 512, dtype=torch.int64)) for one in ids]
    with metered(CPU) as meter, torch.inference_mode():
        module = load_component(
            path, "umt5", torch.bfloat16, placement=option.placement, keep_packed=True
        )
        module.forward_each(prompts)
    module.weight_stream.close()
    planned = option.phase.peak
    assert 0.95 * (planned - packed.scratch) <= meter.peak <= planned


def test_loras_of_a_pipeline_beside_packed_weights(
    spec: WanSpec, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = shapes_of(spec.dit)
    tensors = DIALECTS["comfy down up"](truth(shapes, matrices(shapes)))
    path = tmp_path / "lora.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    where = placement_of(2, 0, 2, None)
    monkeypatch.setattr(
        Components, "_placement", lambda self, name: where if name == "dit" else None
    )

    def latents(folder: Path, *loras: Path) -> Tensor:
        pipe = Pipeline.load(str(folder), precision="bf16", loras=loras)
        return pipe.generate("a red circle", output="latents", **SMALL)

    ours = latents(folders.packed, path)
    assert torch.equal(ours, latents(folders.plain, path))
    assert not torch.equal(ours, latents(folders.packed))


def inspected(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["inspect", *map(str, args)])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_inspect_counts_the_types(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    line = inspected(capsys, folders.packed / "unet" / "wan-Q4_K.gguf").splitlines()[1]
    assert "Wan DiT (dim 256, 2 layers) q4_k (Q4_K 24, Q6_K 2, F32 42, F16 1)" in line
    assert "diffusion transformer" in line and "original gguf" in line
    rows = [json.loads(row) for row in inspected(capsys, folders.packed, "--json").splitlines()]
    assert [(row["kind"], row["precision"], row["layout"]) for row in rows] == [
        ("umt5", "q5_k", "llama.cpp"),
        ("dit", "q4_k", "original"),
        ("vae", "fp32", "original"),
    ]
    file = folders.packed / "text_encoders" / "umt5-Q5_K.gguf"
    assert rows[0]["bytes"] < file.stat().st_size < 1.05 * rows[0]["bytes"] + 2**18


def test_a_t5_is_no_umt5(spec: WanSpec, tmp_path: Path) -> None:
    """Its one table of relative positions gives it away."""
    path, values = write(tmp_path / "a.gguf", spec, "umt5", "Q8_0")
    named = {llama(n): t for n, t in values.items() if not n.startswith("blocks.1.pos_")}
    path.unlink()
    write_gguf(path, named, lambda *_: "F16", "t5")
    with pytest.raises(FormatError, match="it is a T5, not a umT5: 1 bias tables, 2 layers"):
        load_component(path, "umt5")


def test_a_decoder_has_no_place(spec: WanSpec, tmp_path: Path) -> None:
    path, values = write(tmp_path / "a.gguf", spec, "umt5", "Q8_0")
    named = {llama(n): t for n, t in values.items()} | {"dec.blk.0.attn_q.weight": torch.ones(2, 2)}
    path.unlink()
    write_gguf(path, named, lambda *_: "F16", "t5")
    with pytest.raises(FormatError, match="has no place for dec.blk.0.attn_q.weight"):
        load_component(path, "umt5")
