"""Winners of the tuner: read strictly, run by the kernels, written by a tuner that checks first."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")

from wanrt.bench import tune
from wanrt.errors import NumericsError, UsageError
from wanrt.kernels import conv, registry, winners
from wanrt.kernels.cases import Case, all_cases
from wanrt.kernels.launch import INTERPRETING
from wanrt.kernels.target import Target

interpreted = pytest.mark.skipif(not INTERPRETING, reason="needs Triton's interpreter")
CASE = all_cases()["causal_conv3d-two-tiles"]
KEY = "conv/1x1x1/24-9"


def content(key: str = KEY, **tile: int) -> dict[str, Any]:
    sizes = {
        "pixels": 16,
        "wide": 16,
        "narrow": 0,
        "step": 32,
        "unroll": 1,
        "warps": 4,
        "stages": 1,
    }
    sizes = tile or sizes
    entry = {"tile": sizes, "case": "a", "median_s": 1.0, "runner_up": sizes, "runner_up_s": 2.0}
    head = {name: "" for name in ("card", "torch", "triton", "commit", "date")}
    return {"format": 1, **head, "winners": {key: entry}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(winners, "FOLDER", tmp_path)
    return tmp_path


def run_conv(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, list[int]]:
    """The result of a convolution, and the pixels of each program that was launched."""
    seen, real = [], conv.launch

    def watched(*args: Any, **options: Any) -> None:
        seen.append(options["BLOCK_M"])
        real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(conv, "launch", watched)
        y, _ = conv.causal_conv3d(*CASE.draw(torch.bfloat16), **CASE.kwargs)
    return y, seen


@interpreted
def test_a_file_reaches_the_kernel_and_changes_no_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, default = run_conv(monkeypatch)
    (folder / "interpreter.json").write_text(json.dumps(content()))
    winners._winners.cache_clear()
    y, tuned = run_conv(monkeypatch)
    winners._winners.cache_clear()
    assert default == [1024] and tuned == [16]
    assert torch.equal(y, expected)


@interpreted
@pytest.mark.parametrize(
    ("fault", "word"),
    [("{", "cannot be read"), (json.dumps(content(pixels=48)), "no tile of the kernel has")],
)
def test_a_bad_file_is_refused_in_words_and_defaults_run(
    fault: str,
    word: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (folder / "interpreter.json").write_text(fault)
    winners._winners.cache_clear()
    winners._known.cache_clear()
    with caplog.at_level(logging.WARNING, "wanrt"):
        assert run_conv(monkeypatch)[1] == run_conv(monkeypatch)[1] == [1024]
    winners._winners.cache_clear()
    assert len(caplog.messages) == 1 and word in caplog.messages[0]


def _broken(change: Callable[[dict[str, Any]], Any]) -> str:
    value = content()
    change(value)
    return json.dumps(value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[]", "the file is no object"),
        (_broken(lambda c: c.update(extra=1)), "field 'extra' of the file is not known"),
        (_broken(lambda c: c.pop("card")), "field 'card' of the file is missing"),
        (_broken(lambda c: c.update(format=2)), "has format 2; this wanrt reads 1"),
        (_broken(lambda c: c["winners"][KEY].update(note="")), "field 'note' of entry"),
        (_broken(lambda c: c["winners"][KEY].update(median_s="fast")), "is no float"),
        (_broken(lambda c: c["winners"][KEY]["tile"].update(warps="8")), "a tile that is no sizes"),
        (_broken(lambda c: c["winners"][KEY]["tile"].update(warps=True)), "a tile that is no size"),
        (_broken(lambda c: c["winners"][KEY]["tile"].update(warps=-4)), "a tile that is no sizes"),
    ],
)
def test_what_the_tuner_never_writes_is_refused(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(text)
    with pytest.raises(winners.TuningError, match=word):
        winners.read(path)


def test_no_file_is_asked_for_while_launches_are_recorded(folder: Path) -> None:
    from wanrt.bench import compile as gate

    (folder / "interpreter.json").write_text("{")
    case = all_cases()["causal_conv3d-96"]
    first = gate.launches(case, 89, torch.bfloat16)[-1]
    with winners.trial() as trial:
        gate.launches(case, 89, torch.bfloat16)
    ((key, tiles),) = trial.asked.items()
    assert first.options["BLOCK_M"] == tiles[0].pixels == 256
    narrow = next(tile for tile in tiles if tile.pixels == 64)
    assert gate.launches(case, 89, torch.bfloat16, {key: narrow})[-1].options["BLOCK_M"] == 64


def test_the_gate_compiles_every_tile_once() -> None:
    from wanrt.bench import compile as gate

    tiles = {(job.key, job.tile) for job in gate.jobs([89], "causal_conv3d-96-one", True)}
    assert len(tiles) == 5 and len(gate.jobs([89], "causal_conv3d-96-one")) == 2


def test_questions_come_from_shapes_alone_and_what_matters_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def here(dtype: torch.dtype, device: str, result: torch.dtype | None) -> Target:
        return Target(device, 89, dtype, result)

    monkeypatch.setattr(tune.registry, "here", here)
    drawn: list[str] = []
    draw = Case.draw
    monkeypatch.setattr(
        Case, "draw", lambda self, dtype, device: drawn.append(device) or draw(self, dtype, device)
    )
    found = tune.questions()
    assert set(drawn) == {"meta"}
    ops = list(dict.fromkeys(question.case.op for question in found))
    assert ops[0] == "attention_int8" and ops.index("causal_conv3d") < ops.index("linear_quantized")
    assert found[0].case.id == "attention_int8-1.3B-480p" and len(found) > 30


@interpreted
def test_the_tuner_writes_what_kernels_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (question,) = [
        q for q in tune.questions("causal_conv3d-two-tiles", "small", "cpu") if q.key == KEY
    ]
    small = min(question.tiles)

    def timer(runs: dict[str, Any], device: str) -> dict[str, float]:
        assert device == "cpu"
        return {name: 1.0 if name == str(small) else 2.0 for name in runs}

    (answer,) = tune.tune([question], "cpu", timer)
    assert answer.faults == () and next(iter(answer.seconds)) == small
    path = tune.write([answer], "interpreter", folder / "interpreter.json")
    assert winners.read(path)[KEY].tile == small._asdict()
    assert winners.read(path)[KEY].runner_up_s == 2.0
    winners._winners.cache_clear()
    assert run_conv(monkeypatch)[1] == [16]
    winners._winners.cache_clear()


@interpreted
def test_a_tile_that_gives_other_numbers_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    (question,) = [
        q for q in tune.questions("causal_conv3d-two-tiles", "small", "cpu") if q.key == KEY
    ]
    right, small = registry.function, min(question.tiles)

    def half_wrong(op: str, backend: str) -> Callable[..., Any]:
        def run(*tensors: Any, **kwargs: Any) -> Any:
            y, kept = right(op, backend)(*tensors, **kwargs)
            current = winners._trial.get()
            wrong = current is not None and current.tiles.get(KEY) == small
            return (torch.full_like(y, torch.nan) if wrong else y), kept

        return run

    monkeypatch.setattr(tune.registry, "function", half_wrong)
    answer = tune.answer(question, "cpu", lambda runs, device: dict.fromkeys(runs, 1.0))
    assert small not in answer.seconds and "far from PyTorch's" in answer.faults[0]
    with pytest.raises(NumericsError, match="no tile is right"):
        tune.answer(question._replace(tiles=[small]), "cpu", lambda runs, device: {})


def test_without_a_gpu_the_tuner_says_so() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="there is none here"):
            tune.main("cuda", "", None)
