"""`wanrt export` and `--engine onnxruntime`: from a model to a bundle to a clip, on the CPU."""

import struct
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import bundle_files
import pytest
import torch
from conftest import Files, Zoo
from onnx_graphs import TracedGraphs, each_graph_traced_once
from torch import Tensor

from wanrt import Pipeline, cli
from wanrt.engine.bundle import Bundle, sign
from wanrt.engine.manifest import Member, is_bundle
from wanrt.engine.opened import Engine
from wanrt.engine.trust import load_signer, make_key
from wanrt.errors import FormatError, UsageError
from wanrt.weights.checkpoint import Checkpoint

PROMPT = "a red circle moving right on a navy background"
SETTINGS = {"seed": 3, "num_steps": 3, "num_frames": 5, "width": 64, "height": 48}


class Way(NamedTuple):
    """How nano is exported; how near its latents are to the native ones of the same precision.

    In fp32 only sums are in another order. In fp16 the native model multiplies in bf16 where there
    is no fp16 on a CPU, so it is held against fp32: half a thousandth for each of many roundings.
    The eight-bit graphs have one scale for a row where the native kernels have one for 128 columns.
    """

    flags: tuple[str, ...]
    precision: str
    limit: float


WAYS = {
    "fp32": Way((), "fp32", 1e-4),
    "fp32-embedded": Way(("--embed",), "fp32", 1e-4),
    "fp16": Way(("--precision", "fp16"), "fp32", 1e-2),
    "int8": Way(("--precision", "int8"), "int8", 0.1),
    "fp8-embedded": Way(("--precision", "fp8", "--embed"), "fp8", 0.1),
}
Make = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    with each_graph_traced_once():
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Bundles by what was asked for, each made once."""
    made: dict[tuple[str, ...], Path] = {}

    def export(model: object, *flags: str, ending: str = "") -> Path:
        key = (str(model), *flags, ending)
        if key not in made:
            out = tmp_path_factory.mktemp("bundles") / f"bundle{ending}"
            with pytest.raises(SystemExit) as ended:
                cli.main(["export", str(model), "-o", str(out), *flags])
            assert not ended.value.code
            made[key] = out
        return made[key]

    return export


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def latents(settings: dict[str, Any] = SETTINGS, **options: Any) -> Tensor:
    pipe = Pipeline.load(**options)
    return pipe.generate(PROMPT, output="latents", **settings)


@pytest.mark.parametrize("name", WAYS)
def test_nano_computed_by_onnx_runtime(name: str, exported: Make) -> None:
    way = WAYS[name]
    bundle = exported("nano", *way.flags)
    actual = latents(model=str(bundle), engine="onnxruntime")
    expected = latents(model="nano", precision=way.precision)
    assert distance(actual, expected) < way.limit
    held = Bundle.open(bundle).manifest
    assert all(graph.embedded == ("--embed" in way.flags) for graph in held.graphs)


def test_a_whole_request_is_marked_like_any_other(
    exported: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bundle = tmp_path / "clip.mp4", exported("nano")
    words = ["--engine", "onnxruntime", "--model", str(bundle), "--frames", "17", "--steps", "2"]
    for args in (["generate", PROMPT, "-o", str(out), "--seed", "1", *words], ["verify", str(out)]):
        with pytest.raises(SystemExit) as ended:
            cli.main(args)
        assert not ended.value.code
    assert "marked: watermark" in capsys.readouterr().out


def test_a_bundle_is_told_from_other_folders(
    exported: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(exported("nano"))])
    assert not ended.value.code
    told = capsys.readouterr().out
    assert "nano, commit" in told and "onnx/dit.block.onnx" in told
    (tmp_path / "manifest.json").write_text('{"name": "something else"}')
    assert is_bundle(exported("nano")) and not is_bundle(tmp_path)


def test_graphs_of_no_part_are_refused(tmp_path: Path) -> None:
    """A bundle of the format's own test, signed and trusted, but of no model of ours."""
    bundle_files.write(tmp_path / "bundle")
    held = Bundle.open(tmp_path / "bundle", {bundle_files.SIGNER.key})
    with pytest.raises(FormatError, match="has a graph block, which belongs to no part"):
        Engine("onnxruntime", held, TracedGraphs([]))


def test_graphs_alone_serve_a_model_that_lies_elsewhere(exported: Make, zoo: Zoo) -> None:
    """A zip of megabytes, from a released model's shapes: no weight is read to make it."""
    graphs = exported("nano", "--no-weights", ending=".zip")
    assert graphs.is_file() and graphs.stat().st_size < 1 << 20
    folder = str(zoo.path("nano"))  # other weights than nano's own
    actual = latents(model=folder, engine="onnxruntime", bundle=graphs)
    assert distance(actual, latents(model=folder)) < 1e-4


@pytest.mark.parametrize("flags", [(), ("--embed",)], ids=["beside", "embedded"])
def test_a_zip_with_weights_computes_what_the_folder_does(
    flags: tuple[str, ...], exported: Make
) -> None:
    """Its weights are read where they lie in the zip: the same latents, bit for bit."""
    zipped, folder = exported("nano", *flags, ending=".zip"), exported("nano", *flags)
    assert zipped.is_file()
    before = sorted(zipped.parent.iterdir())
    expected = latents(model=str(folder), engine="onnxruntime")
    assert torch.equal(latents(model=str(zipped), engine="onnxruntime"), expected)
    assert sorted(zipped.parent.iterdir()) == before


def _weights_in(data: bytes) -> int:
    """Where the local header of the first weights begins."""
    listed = zipfile.ZipFile(BytesIO(data)).infolist()
    return next(one.header_offset for one in listed if one.filename.endswith(".safetensors"))


def _shift(data: bytearray, offset: int, number: int) -> None:
    """Add to a number of four bytes."""
    (old,) = struct.unpack_from("<I", data, offset)
    struct.pack_into("<I", data, offset, old + number)


# Each changes a good zip; `at` is where the local header of weights begins.
ZIPS: dict[str, tuple[Callable[[bytearray, int], object], str]] = {
    "local size": (lambda d, at: _shift(d, at + 22, -8), "not as wanrt writes it"),
    "both local sizes": (lambda d, at: _resize(d, at, -8), "no file of a stored zip begins"),
    "local name": (lambda d, at: d.__setitem__(at + 31, ord("x")), "directory alone"),
    "place": (lambda d, at: _shift(d, d.rindex(b"PK\x01\x02") + 42, -64), "directory alone"),
    "overlap": (lambda d, at: _resize(d, at, 64), "no file of a stored zip begins"),
    "a byte of a weight": (lambda d, at: d.__setitem__(at + 5000, d[at + 5000] ^ 1), "the CRC"),
}


def _resize(data: bytearray, header: int, number: int) -> None:
    """Both sizes that a local header states."""
    for place in (18, 22):
        _shift(data, header + place, number)


@pytest.mark.parametrize("attack", ZIPS)
def test_a_zip_that_means_harm_gives_no_weights(
    attack: str, exported: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers that disagree, bytes that overlap, numbers that were changed: none is opened."""
    change, says = ZIPS[attack]
    data = bytearray(exported("nano", ending=".zip").read_bytes())
    change(data, _weights_in(data))
    (tmp_path / "hostile.zip").write_bytes(data)
    opened: list[object] = []
    monkeypatch.setattr(Checkpoint, "open", lambda *args: opened.append(args))
    with pytest.raises(FormatError, match=says):
        Pipeline.load(str(tmp_path / "hostile.zip"), engine="onnxruntime")
    assert not opened


def test_a_bundle_is_opened_once(exported: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at the signature, one at each of its weights."""
    opened, hashed = [], []
    open_bundle, checked = Bundle.open, Bundle._checked

    def note(path: Path) -> Bundle:
        opened.append(path)
        return open_bundle(path)

    def watch(self: Bundle, member: Member) -> Iterator[bytes]:
        hashed.append(member.name)
        return checked(self, member)

    monkeypatch.setattr(Bundle, "open", note)
    monkeypatch.setattr(Bundle, "_checked", watch)
    bundle = exported("nano")
    Pipeline.load(str(bundle), engine="onnxruntime")
    held = open_bundle(bundle).manifest
    assert opened == [bundle] and sorted(hashed) == sorted([*held.weights, held.tokenizer])


class Task(NamedTuple):
    """A tiny model and what conditions it."""

    model: str
    files: dict[str, str]


TASKS = [
    Task("wan2.1-i2v-14b-480p", {"image": "a.png"}),
    pytest.param(Task("wan2.2-ti2v-5b", {"image": "a.png"}), marks=pytest.mark.slow),
    pytest.param(Task("wan2.1-vace-1.3b", {"video": "clip.mp4"}), marks=pytest.mark.slow),
    pytest.param(Task("wan2.2-i2v-a14b", {"image": "a.png"}), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.model)
def test_every_kind_of_model(task: Task, exported: Make, zoo: Zoo, files: Files) -> None:
    """Encoders, both experts, control, levels of t: frames within a 16-bit step of native ones."""
    bundle = exported(zoo.path(task.model))
    settings = {"seed": 3, "num_steps": 2, "num_frames": 5, "width": 64, "height": 64}
    settings |= {name: files[file] for name, file in task.files.items()}
    frames = [
        Pipeline.load(**options).generate(PROMPT, **settings).frames.astype(int)
        for options in (
            {"model": str(bundle), "engine": "onnxruntime"},
            {"model": str(zoo.path(task.model))},
        )
    ]
    assert abs(frames[0] - frames[1]).max() <= 1


def test_a_lora_merges_into_the_weights_that_graphs_are_given(exported: Make) -> None:
    lora = str(Path(__file__).parent / "data" / "purple.safetensors")
    bundle = str(exported("nano"))
    actual = latents(model=bundle, engine="onnxruntime", loras=[lora])
    assert distance(actual, latents(model="nano", loras=[lora])) < 1e-4
    assert distance(actual, latents(model="nano")) > 1e-2
    pipe = Pipeline.load(bundle, engine="onnxruntime")
    with pytest.raises(UsageError, match="LoRAs merge when the model is loaded"):
        pipe.generate(PROMPT, loras=[lora], **SETTINGS)
    for flags in (("--embed",), ("--precision", "int8")):
        with pytest.raises(UsageError, match="embedded or in eight bits"):
            Pipeline.load(str(exported("nano", *flags)), engine="onnxruntime", loras=[lora])


class Refusal(NamedTuple):
    """Arguments of Pipeline.load, with `BUNDLE` for nano's, and what is said of them."""

    options: dict[str, Any]
    error: type[Exception]
    says: str


REFUSALS = [
    Refusal({"engine": "onnxruntime"}, UsageError, "wants a bundle: `wanrt export nano -o"),
    Refusal({"bundle": "BUNDLE"}, UsageError, "say what runs them, --engine"),
    Refusal({"model": "BUNDLE"}, UsageError, "say what runs them, --engine"),
    Refusal({"engine": "xla", "bundle": "BUNDLE"}, UsageError, "choose native, onnxruntime"),
    Refusal(
        {"engine": "onnxruntime", "bundle": "BUNDLE", "vram": "8G"},
        UsageError,
        "memory of its own",
    ),
    Refusal(
        {"engine": "onnxruntime", "bundle": "BUNDLE", "precision": "fp16"},
        UsageError,
        "precision fp16 asked; the bundle .* is in fp32",
    ),
    Refusal(
        {"engine": "onnxruntime", "bundle": "BUNDLE", "model": "OTHER"},
        FormatError,
        "is of nano, and the model is .*, which has other shapes",
    ),
    Refusal({"engine": "onnxruntime", "model": "GRAPHS"}, FormatError, "a bundle without weights"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.says[:20])
def test_what_is_refused(refusal: Refusal, exported: Make, zoo: Zoo) -> None:
    places = {
        "BUNDLE": exported("nano"),
        "OTHER": zoo.path("wan2.1-t2v-1.3b"),
        "GRAPHS": exported("nano", "--no-weights", ending=".zip"),
    }
    options = {name: str(places.get(value, value)) for name, value in refusal.options.items()}
    with pytest.raises(refusal.error, match=refusal.says):
        Pipeline.load(**options)


def test_a_bundle_of_a_stranger_is_not_opened(exported: Make, tmp_path: Path) -> None:
    make_key(tmp_path / "key.pem")
    out = tmp_path / "bundle"
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "nano", "-o", str(out), "--key", str(tmp_path / "key.pem")])
    assert not ended.value.code
    with pytest.raises(FormatError, match="which is not trusted here"):
        Pipeline.load(str(out), engine="onnxruntime")
    sign(out, load_signer(tmp_path / "key.pem"))
    weights = next(out.glob("weights/nano*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    key = load_signer(tmp_path / "key.pem").key
    with pytest.raises(SystemExit) as ended:
        cli.main(["bundle", "verify", str(out), "--trust", key])
    assert ended.value.code == 3
