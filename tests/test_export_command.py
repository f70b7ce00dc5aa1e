"""The command `wanrt export`: what it refuses, what it keeps of a stopped run, what it holds."""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Zoo
from onnx_graphs import each_graph_traced_once
from torch import Tensor

from wanrt import cli
from wanrt.export import bundle, graphs, onnx
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.parts import find_parts


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    with each_graph_traced_once():
        yield


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["nano", "-o", "OUT/none/bundle"], 5, "there is no folder"),
        (["nano", "-o", "OUT"], 5, "is there already"),
        (["nano", "-o", "OUT/b", "--precision", "fp4"], 2, "choose fp32, fp16, bf16, int8, fp8"),
        (["nano", "-o", "OUT/b", "--engine", "xla"], 2, "choose onnxruntime, tensorrt-rtx"),
        (["nano", "-o", "OUT/b", "--embed", "--no-weights"], 2, "leaves them out"),
    ],
)
def test_what_an_export_refuses(
    args: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", *(arg.replace("OUT", str(tmp_path)) for arg in args)])
    assert ended.value.code == code and says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_finished_counts_for_the_same_weights_only(zoo: Zoo, tmp_path: Path) -> None:
    """Else a stopped export with embedded weights would go on with those of another checkpoint."""
    shutil.copytree(zoo.path("nano"), tmp_path / "model")

    def key() -> str:
        parts = find_parts(tmp_path / "model")
        return bundle.Order(Zoo.specs["nano"], parts, "fp32", embed=True).key

    before = key()
    assert key() == before
    weights = find_parts(tmp_path / "model").dit
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert key() != before


def test_embedding_opens_a_checkpoint_once_and_keeps_no_block(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 14B has forty blocks of 1.4 GB in fp32: they must not wait for Python's collector."""
    opened: list[Path] = []
    numbers: list[weakref.ref[Any]] = []
    open_checkpoint, constant = Checkpoint.open, onnx.constant

    def note(path: Path, *within: Any) -> Checkpoint:
        opened.append(path)
        return open_checkpoint(path, *within)

    def watch(name: str, tensor: Tensor) -> Any:
        made = constant(name, tensor)
        numbers.append(weakref.ref(made.raw))
        return made

    parts = find_parts(zoo.path("nano"))
    order = bundle.Order(Zoo.specs["nano"], parts, "fp32", embed=True)
    jobs = [job for job in graphs.wanted(order) if job.part.name in ("dit.kv", "dit.block")]
    monkeypatch.setattr(Checkpoint, "open", note)
    monkeypatch.setattr(onnx, "constant", watch)
    writer = graphs.GraphWriter(order, tmp_path)
    gc.disable()
    try:
        for job in jobs:
            for _ in writer.write(job):
                assert numbers and not [one for one in numbers if one() is not None]
                numbers.clear()
    finally:
        gc.enable()
    assert opened == [parts.dit]
    assert len(list(tmp_path.glob("*.onnx"))) == 2 * order.spec.dit.num_layers


def test_a_stopped_export_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is finished is not traced again, and the bundle is that of one go."""
    traced: list[str] = []
    trace = onnx.trace

    def stop_at_the_fifth(part: Any) -> Any:
        if len(traced) == 4:
            raise KeyboardInterrupt
        traced.append(part.name)
        return trace(part)

    def note(part: Any) -> Any:
        traced.append(part.name)
        return trace(part)

    monkeypatch.setattr(onnx, "trace", stop_at_the_fifth)
    words = ["export", "nano", "-o", str(tmp_path / "out.zip"), "--no-weights", "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 130 and not (tmp_path / "out.zip").exists()
    first = set(traced)
    traced.clear()
    monkeypatch.setattr(onnx, "trace", note)
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert not ended.value.code and not first & set(traced)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["graphs"] == len(first | set(traced))
    assert [path.name for path in tmp_path.iterdir()] == ["out.zip"]
