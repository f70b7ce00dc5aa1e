"""Graphs are the same wherever they are made, and built the same way: `export/engines.lock`."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from wanrt.bench import engines as bench
from wanrt.errors import FormatError, UsageError
from wanrt.export import engine_set, engines, lock, onnx

pytest.importorskip("tensorrt_rtx", reason="the builder is not installed (wanrt[rtx])")

MODEL, PARTS, CARD = "wan2.1-t2v-1.3b", ("dit.attention", "dit.pre"), 89
RECORD = engine_set.Record(
    MODEL, "dit.pre", "bf16", CARD, "1", "r", "graph", "engine", 1, 1, 1, 0.1, None, True, "s"
)

TRACE = """
import hashlib
from wanrt.export import engines, onnx
job = next(job for job in engines.jobs(["nano"], ["fp8"]) if job.part.name == "dit.pre")
print(hashlib.sha256(onnx.serialise(job.trace())).hexdigest())
"""


@pytest.fixture(scope="module")
def held() -> lock.Lock:
    found = lock.read()
    if found.tools != lock.tools():
        pytest.skip(f"the lock is for {found.tools}, and here are {lock.tools()}")
    return found


@pytest.mark.parametrize("name", PARTS)
def test_what_is_made_here_is_what_the_lock_says(held: lock.Lock, name: str) -> None:
    """Traced by another process, in another folder, on another day."""
    (row,) = (
        row
        for row in held.engines
        if (row.model, row.part, row.precision, row.card) == (MODEL, name, "bf16", CARD)
    )
    job = next(job for job in engines.jobs([MODEL], ["bf16"]) if job.part.name == name)
    model = job.trace()
    graph, inputs = onnx.serialise(model), engines.inputs_of(model, job.part)
    assert hashlib.sha256(graph).hexdigest() == row.onnx
    assert engine_set.recipe(graph, inputs) == row.recipe


def test_graphs_do_not_depend_on_the_process() -> None:
    """A quantised one, traced here and by a process with another hash seed."""
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TRACE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    job = next(job for job in engines.jobs(["nano"], ["fp8"]) if job.part.name == "dit.pre")
    ours = hashlib.sha256(onnx.serialise(job.trace())).hexdigest()
    assert done.stdout.strip() == ours


def test_differences_are_named(tmp_path: Path) -> None:
    lock.write([RECORD], tmp_path / "lock")
    found = lock.read(tmp_path / "lock")
    other = replace(RECORD, onnx="another")
    changed = replace(RECORD, recipe="another")
    assert lock.differences([RECORD, replace(RECORD, card=120)], found) == []
    assert lock.differences([other], found) == [f"{MODEL} dit.pre bf16 sm89: another graph"]
    (line,) = lock.differences([changed], found)
    assert line.endswith("sm89: the same graph, built in another way")
    assert lock.differences([changed], replace(found, tools=("torch 1",))) == []


class TestTheSet:
    """`build_set` on one small part."""

    def jobs(self) -> list[engines.Job]:
        return [job for job in engines.jobs(["nano"], ["bf16"]) if job.part.name == "dit.time"]

    def test_it_goes_on_where_it_was(self, tmp_path: Path) -> None:
        told: list[str] = []
        first = engine_set.build_set(tmp_path, self.jobs(), told.append, workers=1)
        assert [one.card for one in first] == [86, 89, 120] and len(told) == 3
        assert all((tmp_path / one.file).stat().st_size == one.size for one in first)
        graph = (tmp_path / "nano/bf16/dit.time.onnx").read_bytes()
        assert {one.onnx for one in first} == {hashlib.sha256(graph).hexdigest()}
        again = engine_set.build_set(tmp_path, self.jobs(), told.append, workers=1)
        assert again == first and len(told) == 3
        (tmp_path / first[1].file).write_bytes(b"damaged")
        mended = engine_set.build_set(tmp_path, self.jobs(), told.append, workers=1)
        assert len(told) == 4 and told[3].startswith("nano dit.time bf16 sm89")
        assert [one.engine for one in mended] == [one.engine for one in first]

    def test_attention_in_pieces_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_set, "fused", lambda part, built: False)
        with pytest.raises(
            FormatError, match=r"nano dit\.time: its attention is not one kernel on"
        ):
            engine_set.build_set(tmp_path, self.jobs(), print, workers=1)


def test_models_and_precisions_that_are_not_in_the_set(tmp_path: Path) -> None:
    for models, precisions, says in (
        (["wan3"], ["bf16"], "model 'wan3' is not in the set; choose of nano, "),
        (["nano"], ["fp4"], "precision 'fp4' is not in the set; choose of bf16, int8, fp8"),
    ):
        with pytest.raises(UsageError, match=says):
            bench.main(tmp_path, models, precisions, 1, False, False)
