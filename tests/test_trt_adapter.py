"""How wanrt uses TensorRT's interface, against a fake of it; what a machine without a card says."""

import gc
import logging
from dataclasses import replace
from functools import cache
from pathlib import Path

import bundle_files
import fake_tensorrt_rtx as fake
import pytest
import torch
from fake_tensorrt_rtx import FakePlace
from torch import Tensor

from wanrt.config import NANO
from wanrt.engine import bundle as bundles
from wanrt.engine import trt as adapter
from wanrt.engine.bundle import Bundle
from wanrt.engine.manifest import Graph, Input, Licence
from wanrt.engine.ort import OrtRunner
from wanrt.engine.trt import TrtGraphs, TrtRunner
from wanrt.engine.trt_library import library
from wanrt.engine.trt_place import CompiledKernels, CudaPlace, Workspace
from wanrt.errors import BudgetError, FormatError, UsageError
from wanrt.export import dit, engines, onnx

FP32, CPU = torch.float32, torch.device("cpu")


@cache
def graph() -> tuple[bytes, tuple[Input, ...]]:
    """`dit.pre` of nano: three outputs, 12 weights, tokens left open."""
    empty = dit.empty(NANO.dit, FP32)
    part = next(part for part in dit.parts(empty, FP32) if part.name == "dit.pre")
    model = onnx.trace(part)
    return onnx.serialise(model), engines.inputs_of(model, part)


def engine() -> bytes:
    data, inputs = graph()
    return fake.engine_of(data, inputs, {name: [1, "x:1", 2, 128] for name in ("q", "k", "v")})


@pytest.fixture
def place() -> FakePlace:
    return FakePlace()


def runner(place: FakePlace, cache: Path | None = None) -> TrtRunner:
    return TrtRunner("dit.pre", engine(), fake, place, Workspace(place), cache)


def inputs(tokens: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def at(one: Input) -> tuple[int, ...]:
        sizes = zip(one.min, one.max, strict=True)
        return tuple(low if low == high else tokens for low, high in sizes)

    return {one.name: torch.randn(at(one), generator=generator) for one in graph()[1]}


def expected(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return OrtRunner("dit.pre", graph()[0], CPU, threads=1)(given)


def assert_same(found: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    wanted = expected(given)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_it_is_a_runner(place: FakePlace) -> None:
    """The graph's dtypes by name, and its results; nothing is computed before the stream does."""
    run = runner(place)
    assert set(run.outputs) == {"q", "k", "v"} and set(run.outputs.values()) == {FP32}
    assert run.inputs == {one.name: FP32 for one in graph()[1]}
    for tokens in (40, 7, 7, 96):
        given = inputs(tokens, seed=tokens)
        out = {"k": torch.full((1, tokens, 2, 128), float("nan"))}
        found = run(given, out)
        assert found["k"] is out["k"] and out["k"].isnan().all()
        place.synchronise()
        assert_same(found, given)


def test_strided_inputs_are_copied(place: FakePlace) -> None:
    given = inputs(9)
    strided = given | {"x": given["x"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert not strided["x"].is_contiguous()
    found = runner(place)(strided)
    gc.collect()
    place.synchronise()
    assert_same(found, given)


def test_inputs_may_be_dropped_before_the_stream_has_come_to_them(place: FakePlace) -> None:
    run, given = runner(place), inputs(9)
    found = run({name: tensor.clone() for name, tensor in given.items()})
    gc.collect()
    place.synchronise()
    assert_same(found, given)


def test_the_fake_finds_memory_that_nobody_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the two tests above can fail."""
    place = FakePlace()
    keeps = place.hold

    def forgets(tensor: Tensor) -> None:
        keeps(tensor)
        place._held.clear()

    monkeypatch.setattr(place, "hold", forgets)
    run, given = runner(place), inputs(9)
    run({name: tensor.clone() for name, tensor in given.items()})
    gc.collect()
    with pytest.raises(AssertionError, match="was freed"):
        place.synchronise()
    place = FakePlace()
    monkeypatch.setattr(place, "hold", lambda tensor: None)
    runner(place)(given)
    with pytest.raises(AssertionError, match="nobody held"):
        place.synchronise()


def test_the_fake_wants_the_calls_in_order(place: FakePlace) -> None:
    run, given = runner(place), inputs(9)
    context = run._new_context()
    assert not context.execute_async_v3(fake.STREAM)
    for name, tensor in given.items():
        assert context.set_input_shape(name, tuple(tensor.shape))
        assert context.set_tensor_address(name, tensor.data_ptr())
    for name in run.outputs:
        assert context.set_tensor_address(name, torch.empty(9 * 256).data_ptr())
    assert not context.execute_async_v3(fake.STREAM)  # no workspace
    size = context.update_device_memory_size_for_shapes()
    context.set_device_memory(torch.empty(size, dtype=torch.uint8).data_ptr(), size - 1)
    assert not context.execute_async_v3(fake.STREAM)
    context.set_device_memory(torch.empty(size, dtype=torch.uint8).data_ptr(), size)
    assert not context.execute_async_v3(fake.STREAM + 1)
    assert context.execute_async_v3(fake.STREAM)
    assert not context.set_input_shape("x", (1, 9000, 256))


def test_wrong_calls_are_named(place: FakePlace) -> None:
    run, given = runner(place), inputs(9)
    without = {name: tensor for name, tensor in given.items() if name != "e0"}
    for wrong, says in (
        (without, "wants the input e0, which was not given"),
        (given | {"x": given["x"].half()}, "x is torch.float16 on cpu, not torch.float32"),
        (given | {"x": given["x"].to("meta")}, "x is torch.float32 on meta, not .* on cpu"),
        (inputs(3), r"x is \(1, 3, 256\); the engine takes \(1, 4, 256\) to \(1, 8192, 256\)"),
        (given | {"x": given["x"][0]}, r"x is \(9, 256\); the engine takes"),
    ):
        with pytest.raises(UsageError, match=f"dit.pre.*{says}"):
            run(wrong)
    with pytest.raises(UsageError, match=r"q is to be written to \(\(1, 8, 2, 128\)"):
        run(given, {"q": torch.empty(1, 8, 2, 128)})
    found = run(given)
    place.synchronise()
    assert_same(found, given)


def test_what_the_library_refuses_is_said_and_forgotten(
    place: FakePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, given = runner(place), inputs(9)
    with monkeypatch.context() as changed:
        changed.setattr(place, "stream", lambda: 5)
        with pytest.raises(UsageError, match="refuses its execution: there is no stream 5"):
            run(given)
    found = run(given)
    place.synchronise()
    assert_same(found, given)
    with pytest.raises(FormatError, match=r"does not take the engine: magicTag =="):
        TrtRunner("dit.pre", b"no engine", fake, place, Workspace(place))


def test_engines_share_one_workspace_within_its_limit(place: FakePlace) -> None:
    shared = Workspace(place)
    first, second = (TrtRunner("dit.pre", engine(), fake, place, shared) for _ in range(2))
    found = first(inputs(96))
    memory = shared.of(0)
    other = second(inputs(9))
    assert shared.of(0) is memory
    place.synchronise()
    assert_same(found, inputs(96))
    assert_same(other, inputs(9))
    tight = TrtRunner("dit.pre", engine(), fake, place, Workspace(place, memory.nbytes - 1))
    with pytest.raises(BudgetError, match=f"works in {memory.nbytes} bytes; the plan leaves"):
        tight(inputs(96))
    found = tight(inputs(9))
    place.synchronise()
    assert_same(found, inputs(9))


class TestGraphsOfABundle:
    """Engines are found by card and release; those of others are not there."""

    @pytest.fixture(autouse=True)
    def _on_a_fake_card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = FakePlace()
        monkeypatch.setattr(adapter, "CudaPlace", lambda device: self.place)
        monkeypatch.setattr(adapter, "library", lambda kind: fake)

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        data, ranges = graph()
        names = ("dit.pre.engine", "other.engine", "dit.pre.onnx", "other.onnx", "licence.txt")
        contents = {name: engine() for name in names[:2]} | {name: data for name in names[2:4]}
        contents |= {names[4]: b"Apache License"}
        made = replace(
            bundle_files.manifest(),
            members=bundles.members_of(contents),
            graphs=(
                Graph("dit.pre", names[2], "fp32", False, 23, ranges),
                Graph("other", names[3], "fp32", False, 23, ranges),
            ),
            engines=(
                bundle_files.engine(names[0], 89, graph="dit.pre"),
                bundle_files.engine(names[1], 86, graph="other"),
            ),
            weights=(),
            licences=(Licence("Apache-2.0", names[4], tuple(names[2:4])),),
        )
        bundles.write(tmp_path / "b", made, contents, bundle_files.SIGNER)
        return Bundle.open(tmp_path / "b", {bundle_files.SIGNER.key})

    def test_those_for_the_card_run(self, bundle: Bundle) -> None:
        graphs = TrtGraphs(bundle, CPU, "tensorrt-rtx")
        assert graphs.has("dit.pre") and not graphs.has("other") and not graphs.has("no such")
        found = graphs.get("dit.pre")(inputs(9))
        assert graphs.get("dit.pre") is graphs.get("dit.pre")
        self.place.synchronise()
        assert_same(found, inputs(9))
        with pytest.raises(FormatError, match=r"no engine of other for .* 8\.9; .*8\.6"):
            graphs.get("other")

    @pytest.mark.parametrize(("card", "release"), [(120, "1.7.1.116"), (89, "1.8.0.1")])
    def test_other_cards_and_releases_are_refused(
        self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, card: int, release: str
    ) -> None:
        monkeypatch.setattr(self.place, "compute_capability", card)
        monkeypatch.setattr(fake, "__version__", release)
        with pytest.raises(FormatError, match=f"has no engine for tensorrt-rtx {release} on"):
            TrtGraphs(bundle, CPU, "tensorrt-rtx")


class TestCompiledKernels:
    """What the runtime compiled is kept for the next process."""

    def test_they_are_found_again(self, place: FakePlace, tmp_path: Path) -> None:
        runner(place, tmp_path)(inputs(9))
        (file,) = (tmp_path / "tensorrt-rtx").iterdir()
        assert file.name.endswith("-fake-0.kernels")
        held = file.read_bytes()
        again = runner(place, tmp_path)
        assert again._kernels._cache.compiled and bytes(again._kernels._cache.serialize()) == held
        again(inputs(9))
        again.close()
        assert file.read_bytes() == held
        again(inputs(12))
        assert file.read_bytes() != held

    def test_those_of_another_release_are_replaced(
        self, place: FakePlace, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        runner(place, tmp_path)(inputs(9))
        (file,) = (tmp_path / "tensorrt-rtx").iterdir()
        file.write_bytes(b"kernels of 1.6\n")
        with caplog.at_level(logging.INFO):
            runner(place, tmp_path)(inputs(9))
        assert "compiling anew" in caplog.text and file.read_bytes().startswith(b"kernels of 1.7.1")

    def test_where_they_cannot_be_kept_work_goes_on(
        self, place: FakePlace, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("")
        given = inputs(9)
        found = runner(place, blocked)(given)
        place.synchronise()
        assert_same(found, given)
        assert "compiled again the next time" in caplog.text

    def test_another_card_has_a_file_of_its_own(self, place: FakePlace, tmp_path: Path) -> None:
        paths = set()
        for identity in ("a-1", "a-2"):
            place.identity = lambda identity=identity: identity
            paths.add(CompiledKernels(tmp_path, b"engine", place)._path)
        assert len(paths) == 2


def test_the_fake_invents_nothing() -> None:
    """Every class and method that it has, the library has."""
    real = pytest.importorskip("tensorrt_rtx", reason="wanrt[rtx] is not installed")
    assert fake.__version__ == real.__version__
    for name in ("Runtime", "ICudaEngine", "IRuntimeConfig", "IRuntimeCache", "IExecutionContext"):
        methods = {key for key in vars(getattr(fake, name)) if not key.startswith("_")}
        assert methods <= set(dir(getattr(real, name))) | {"num_io_tensors"}, name
    for name in ("DataType", "TensorIOMode", "ExecutionContextAllocationStrategy"):
        members = {one.name for one in getattr(fake, name)}
        assert members <= set(getattr(real, name).__members__), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a card")
def test_a_machine_without_a_card_gets_a_sentence(place: FakePlace) -> None:
    with pytest.raises(UsageError, match="engines of TensorRT run on an NVIDIA card"):
        CudaPlace(torch.device("cuda"))
    real = pytest.importorskip("tensorrt_rtx", reason="wanrt[rtx] is not installed")
    with pytest.raises(FormatError, match=r"1\.7\.1\.\d+ does not take the engine: "):
        TrtRunner("dit.pre", b"no engine" * 99, real, place, Workspace(place))


def test_a_library_that_is_not_there_is_named() -> None:
    """Classic TensorRT is on no package index that the tests use."""
    try:
        library("tensorrt")
    except UsageError as error:
        assert "engines of tensorrt want it: pip install" in str(error)
    else:
        pytest.skip("classic TensorRT is installed")
