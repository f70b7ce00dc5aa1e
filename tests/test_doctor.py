"""What `wanrt doctor` finds, and the sentences that it has for what stands in the way."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wanrt import cli, doctor
from wanrt.kernels import registry

ADA = doctor.Card("NVIDIA GeForce RTX 4070", "8.9", 12 << 30, 11 << 30, "580.65.06")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANRT_LEDGER", str(tmp_path / "data" / "ledger.jsonl"))
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "absent")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}" * (name == "cc"))


def without_a_card(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def on_a_card(monkeypatch: pytest.MonkeyPatch, card: doctor.Card) -> None:
    monkeypatch.setattr(doctor, "_card", lambda: card)
    arch = int(card.capability.replace(".", ""))
    target = registry.Target("cuda", arch, torch.bfloat16)
    monkeypatch.setattr(registry, "here", lambda dtype, device: target._replace(dtype=dtype))


def test_a_machine_without_a_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_card(monkeypatch, None)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu" and found["backends"] == {"torch": len(registry.OPS)}
    assert found["packages"]["torch"] == torch.__version__ and found["card"] is None
    assert found["problems"] == []
    with pytest.raises(SystemExit, match="0"):
        cli.main(["doctor"])
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
    with pytest.raises(SystemExit, match="0"):
        cli.main(["doctor"])
    expected = "NVIDIA GeForce RTX 4070, 8.9, 11.00 GiB of 12.00 GiB free, driver 580.65.06"
    assert expected in capsys.readouterr().out


def test_a_card_that_is_not_used_well(monkeypatch: pytest.MonkeyPatch) -> None:
    told = lambda card, triton: " ".join(doctor._about_the_card(card, triton))  # noqa: E731
    assert "compute capability 7.5: the kernels need 8.0" in told(
        replace(ADA, capability="7.5"), "3"
    )
    assert "pip install 'wanrt[gpu]'" in told(ADA, None)
    assert told(ADA, "3.6.0") == ""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "finds no C compiler" in told(ADA, "3.6.0")
    monkeypatch.setenv("CC", "/opt/bin/clang")
    assert told(ADA, "3.6.0") == ""


def test_a_card_that_pytorch_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_card(monkeypatch, "13.0")
    (problem,) = doctor._about_the_card(None, None)
    assert "is built for CUDA 13.0 and finds no card" in problem
    without_a_card(monkeypatch, None)
    assert list(doctor._about_the_card(None, None)) == []
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path)
    (problem,) = doctor._about_the_card(None, None)
    assert "is built without CUDA; install one with it" in problem


def test_what_is_set_wrong_is_a_problem_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_card(monkeypatch, None)
    (tmp_path / "file").touch()
    monkeypatch.setenv("WANRT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("WANRT_OPS", "cuda")
    monkeypatch.setattr(doctor, "check_codec", no_encoder)
    report = doctor.examine()
    assert report.backends == {} and report.encoders == dict.fromkeys(("h264", "hevc", "av1"))
    assert [problem.split()[0] for problem in report.problems] == [
        *("WANRT_OPS", "PyAV", "PyAV", "PyAV"),
        str(tmp_path / "file" / "cache"),
    ]
    monkeypatch.setenv("WANRT_OPS", "triton")
    monkeypatch.setattr(registry, "INTERPRETING", False)
    assert "WANRT_OPS is 'triton': layer_norm cannot run on cpu" in doctor.examine().problems[0]


def no_encoder(codec: str) -> tuple[str, int]:
    raise doctor.UsageError(codec)


def test_the_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wanrt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("wanrt ") and len(done.stdout.splitlines()) == 1
