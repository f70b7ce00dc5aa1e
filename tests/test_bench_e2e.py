"""Whole requests, timed: phases that add up, two sides that agree, a table."""

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wanrt import clock as clock_module
from wanrt.bench import e2e, gpu_slices
from wanrt.bench.e2e_case import STATES, Case
from wanrt.clock import Clock, added
from wanrt.errors import NumericsError, UsageError

SMALL = e2e.Settings(size=(48, 48), num_frames=5, num_steps=2, repeats=1)


def test_phases_within_phases_count_once_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def later(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now)
    clock = Clock(begin=99.0)
    later(2)
    clock.rest("start")
    with clock.phase("outer"):
        later(1)
        with clock.loading("dit"):
            later(5)
        later(2)
    for _ in clock.each("items", (later(4) for _ in range(2))):
        later(3)
    with pytest.raises(ZeroDivisionError), clock.phase("outer"):
        clock.within("call", lambda a, b: later(a / b))(1, b=0)
    timings = clock.timings()
    expected = {"start": 3, "outer": 3, "load dit": 5, "items": 8, "call": 0}
    assert timings == expected | {"other": 6, "total": 25}
    assert clock.seconds("items") == 8 and clock.seconds("unknown") == 0
    assert clock.cold == ("dit",)
    assert added(timings, timings) == {name: 2 * value for name, value in timings.items()}


def test_a_command_says_where_its_seconds_went(tmp_path: Path) -> None:
    """From the start of the process; what no phase names is little."""
    command = [sys.executable, "-m", "wanrt", "generate", "a red circle", "--json"]
    command += ["--steps", "3", "--frames", "9", "--seed", "1", "--seed", "2"]
    begin = time.perf_counter()
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "a.mp4")], capture_output=True, text=True, check=True
    )
    wall = time.perf_counter() - begin
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["cold"] == ["umt5", "dit", "vae"] and second["cold"] == []
    phases = {"start", "open", "load umt5", "text", "load dit", "load vae", "prepare"}
    phases |= {"denoise", "decode", "watermark", "encode", "sign", "other", "total"}
    assert phases <= first["timings"].keys()
    assert {"denoise", "decode", "watermark", "encode", "sign"} <= second["timings"].keys()
    assert not any(name.startswith(("load", "start")) for name in second["timings"])
    for one in (first, second):
        total = one["timings"]["total"]
        named = [s for name, s in one["timings"].items() if name not in ("total", "other")]
        assert sum(named) == pytest.approx(total, rel=0.03, abs=0.02)
        assert len(one["steps"]) == 3
        assert sum(one["steps"]) == pytest.approx(one["timings"]["denoise"], abs=0.01)
    together = first["timings"]["total"] + second["timings"]["total"]
    assert 0.5 * wall < together <= wall + 0.02  # processes begin at whole ticks


def test_requests_of_both_sides_agree_and_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    needs = ("imageio", "imageio_ffmpeg", "diffusers")
    if any(importlib.util.find_spec(name) is None for name in needs):
        pytest.skip("needs imageio and imageio-ffmpeg, with which diffusers writes files")
    e2e.main(replace(SMALL, peer="diffusers"), as_json=True, out=None)
    row = json.loads(capsys.readouterr().out)
    assert row["bench"] == "e2e" and row["error"] < e2e.LIMITS["fp32"]
    for side in ("wanrt", "diffusers"):
        for state in STATES:
            seconds = row[side][state]
            lines = sum(value for line, value in seconds.items() if line != "total")
            assert lines == pytest.approx(seconds["total"])
            assert seconds["denoise"] > 0 and seconds["decode"] > 0 and seconds["write"] > 0
            assert abs(seconds["other"]) < 0.1 * seconds["total"]
    assert row["wanrt"]["cold"]["start"] > 0 and row["wanrt"]["warm"]["start"] == 0
    assert row["ratio"]["cold"]["total"] == pytest.approx(
        row["wanrt"]["cold"]["total"] / row["diffusers"]["cold"]["total"]
    )


def test_alone_it_makes_a_table_and_puts_it_into_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- wanrt bench e2e -->\nof another day\n<!-- end -->\nafter\n")
    e2e.main(SMALL, as_json=False, out=page)
    printed = capsys.readouterr().out
    assert "| seconds | wanrt cold | wanrt warm | wanrt again |" in printed
    assert [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| ")] == [
        "| " + name for name in ("seconds", *e2e.LINES, "other", "total")
    ]
    assert printed in page.read_text() and "another day" not in page.read_text()


def test_sides_that_disagree_give_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(module: str, case: Case) -> dict:
        side = {"e2e_ours": "wanrt", "e2e_diffusers": "diffusers"}[module]
        values = torch.ones(case.latent_shape)
        case.keep_latents(side, values if side == "wanrt" else 2 * values)
        return {}

    monkeypatch.setattr(e2e, "_run", fake)
    with pytest.raises(NumericsError, match="latents: relative error 0.5"):
        e2e.measure(e2e.prepare(SMALL, tmp_path), "diffusers", 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peer": "other"}, "peer 'other' is not known"),
        ({"model": "wan2.1-vace-1.3b"}, "no model for this"),
        ({"dtype": "int8"}, "dtype 'int8' does not exist"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        e2e.main(replace(SMALL, **settings), as_json=True, out=None)


def test_the_slice_for_a_gpu_is_a_legal_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from wanrt.cli import app

    asked: list[e2e.Settings] = []
    monkeypatch.setattr(e2e, "main", lambda settings, as_json, out: asked.append(settings))
    done = CliRunner().invoke(app, [*gpu_slices.E2E, "--repeats", "1", "--peer", "diffusers"])
    assert done.exit_code == 0, done.output
    assert asked == [
        e2e.Settings("wan2.1-t2v-1.3b", num_steps=4, peer="diffusers", device="cuda", repeats=1)
    ]
