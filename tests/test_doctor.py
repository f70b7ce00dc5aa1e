"""What `wanrt doctor` finds, and the sentences that it has for what stands in the way."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from wanrt import cli, doctor, env
from wanrt.bench import measure
from wanrt.kernels import registry
from wanrt.kernels.target import Target

ADA = doctor.Card("NVIDIA GeForce RTX 4070", "8.9", 12 << 30, 11 << 30, "580.65.06")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (env.OPS, env.KEYS, "CC", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(env.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(env.LEDGER, str(tmp_path / "data" / "ledger.jsonl"))
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "absent")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}" * (name == "gcc"))


def without_a_card(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def on_a_card(monkeypatch: pytest.MonkeyPatch, card: doctor.Card) -> None:
    monkeypatch.setattr(doctor, "_card", lambda problems: card)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_86", "compute_120"])
    target = Target("cuda", int(card.capability.replace(".", "")), torch.bfloat16)
    monkeypatch.setattr(registry, "here", lambda dtype, device: target._replace(dtype=dtype))


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["doctor", *arguments])


def test_a_machine_without_a_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_card(monkeypatch, None)
    run("--json")
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu" and found["backends"] == {"torch": len(registry.OPS)}
    assert found["packages"]["torch"] == version("torch") and found["card"] is None
    assert found["problems"] == []
    run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("wanrt", "system", "processor", "card", "packages"),
        *("encoders", "folders", "variables", "used", "problem"),
    ]
    assert "none that PyTorch sees, which is built without CUDA" in lines[3]
    assert lines[-1].endswith("problem    none")


def test_a_card(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    on_a_card(monkeypatch, ADA)
    report = doctor.examine()
    assert report.device == "cuda" and report.problems == ()
    assert report.backends["triton"] > report.backends["torch"]
    run()
    card = "NVIDIA GeForce RTX 4070, 8.9, 11.00 GiB of 12.00 GiB free, driver 580.65.06, CUDA 13.0"
    assert card in capsys.readouterr().out


def told(monkeypatch: pytest.MonkeyPatch, capability: str = "8.9") -> str:
    card = replace(ADA, capability=capability)
    on_a_card(monkeypatch, card)
    return " ".join(doctor._about_the_card(card))


def test_a_card_that_is_not_used_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert told(monkeypatch) == told(monkeypatch, "12.1") == ""
    assert "compute capability 7.5: the kernels need 8.0" in told(monkeypatch, "7.5")
    assert "has no code for 6.1; it is for sm_75, sm_86, compute_120" in told(monkeypatch, "6.1")
    assert "has no code for 9.0" in told(monkeypatch, "9.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/cc" * (name == "cc"))
    assert "finds no C compiler" in told(monkeypatch)
    monkeypatch.setenv("CC", "/opt/bin/clang")
    assert told(monkeypatch) == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'wanrt[gpu]'" in told(monkeypatch)


def test_a_card_that_pytorch_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_card(monkeypatch, "13.0")
    (problem,) = doctor._about_the_card(None)
    assert "is built for CUDA 13.0 and finds no card" in problem
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list(doctor._about_the_card(None)) == [
        "PyTorch finds no card; CUDA_VISIBLE_DEVICES is ''"
    ]
    without_a_card(monkeypatch, None)
    assert list(doctor._about_the_card(None)) == []
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path)
    (problem,) = doctor._about_the_card(None)
    assert "is built without CUDA; install one with it" in problem


def broken(*_: Any) -> Any:
    raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")


def test_a_card_that_is_full_or_kernels_that_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(registry, "resolve", broken)
    report = doctor.examine()
    assert (report.device, report.card, report.backends) == ("cpu", None, {})
    assert report.problems[0] == (
        "PyTorch sees a CUDA card and cannot use it: "
        "CUDA error: out of memory Compile with TORCH_USE_CUDA_DSA"
    )
    assert "the kernels cannot be loaded" in report.problems[1]


def test_what_is_set_wrong_is_a_problem_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_card(monkeypatch, None)
    (tmp_path / "file").touch()
    monkeypatch.setenv(env.CACHE, str(tmp_path / "file" / "cache"))
    monkeypatch.setenv(env.OPS, "cuda")
    monkeypatch.setattr(doctor, "check_codec", no_encoder)
    report = doctor.examine()
    assert report.backends == {} and report.encoders == dict.fromkeys(("h264", "hevc", "av1"))
    assert [problem.split()[0] for problem in report.problems] == [
        *(env.OPS, "PyAV", "PyAV", "PyAV"),
        str(tmp_path / "file" / "cache"),
    ]
    monkeypatch.setenv(env.OPS, "triton")
    monkeypatch.setattr(registry, "INTERPRETING", False)
    assert "WANRT_OPS is 'triton': layer_norm cannot run on cpu" in doctor.examine().problems[0]


def no_encoder(codec: str) -> tuple[str, int]:
    raise doctor.UsageError(codec)


def test_no_home_and_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    def no_git(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("git")

    without_a_card(monkeypatch, None)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv(env.CACHE)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(measure.subprocess, "run", no_git)
    report = doctor.examine()
    assert report.commit == "" and set(report.folders) == {"ledger"}
    cache, keys = report.problems
    assert cache.startswith("no place for the cache") and "WANRT_CACHE" in cache
    assert "WANRT_KEYS" in keys


@pytest.mark.parametrize(
    ("name", "is_folder", "writable"),
    [("new/deep", True, True), ("new/file", False, True), ("file", False, True),
     ("file", True, False), ("folder", False, False), ("file/below", True, False)],
)  # fmt: skip
def test_what_can_be_written(name: str, is_folder: bool, writable: bool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert doctor._writable(tmp_path / name, is_folder) == writable


def test_a_folder_that_may_not_be_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> bool:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "exists", forbidden)
    assert not doctor._writable(Path("/root/.cache/wanrt"), True)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # Windows: there is no such drive
    assert not doctor._writable(Path("Z:/wanrt"), True)


def test_the_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wanrt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("wanrt ") and len(done.stdout.splitlines()) == 1
