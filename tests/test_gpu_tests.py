"""Tests in several processes within a time: what is counted when they end, hang or die."""

import os
import time
from pathlib import Path

import pytest

from wanrt.bench import gpu_tests

QUICK = """
import os
import pytest

@pytest.mark.parametrize("i", range(9))
def test_passes(i):
    assert "CUBLAS_WORKSPACE_CONFIG" in os.environ

def test_fails():
    assert 1 == 2, "cosine 0.5"

def test_is_skipped():
    pytest.skip("needs fp8")

@pytest.fixture
def broken():
    raise OSError("no file")

def test_has_no_input(broken):
    pass
"""


def run(code: str, seconds: float, root: Path, cases: str = "") -> dict[str, object]:
    (root / "tests").mkdir()
    (root / "tests" / "test_ops.py").write_text(code)
    return gpu_tests.run(cases, time.monotonic() + seconds, root=root)


@pytest.fixture(autouse=True)
def four_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests.os, "cpu_count", lambda: 8)


def test_shares_are_added_up(tmp_path: Path) -> None:
    found = run(QUICK, 60, tmp_path)
    counts = {name: found[name] for name in ("passed", "failed", "skipped", "left", "processes")}
    assert counts == {"passed": 9, "failed": 2, "skipped": 1, "left": 0, "processes": 4}
    failed, error = sorted(found["named"], reverse=True)
    assert failed.startswith("FAILED tests/test_ops.py::test_fails - AssertionError: cosine 0.5")
    assert error.startswith("ERROR tests/test_ops.py::test_has_no_input - OSError: no file")


def test_a_part_of_the_tests(tmp_path: Path) -> None:
    """More processes than tests: an empty share is no failure."""
    found = run(QUICK, 60, tmp_path, "passes and 3")
    assert (found["passed"], found["failed"], found["left"]) == (1, 0, 0)


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot interrupt another process")
def test_what_there_was_no_time_for_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test that hangs is interrupted; what passed and failed before it is told, with reasons."""
    monkeypatch.setattr(gpu_tests.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(gpu_tests, "_GRACE", 60.0)  # a busy machine takes its time to sum up
    code = QUICK + "\ndef test_hangs():\n    __import__('time').sleep(100)\n"
    begin = time.monotonic()
    found = run(code + "\ndef test_is_behind():\n    pass\n", 70, tmp_path)
    assert time.monotonic() - begin < 60
    assert (found["passed"], found["failed"], found["left"]) == (9, 2, 2)
    assert any("cosine 0.5" in row for row in found["named"])


def test_the_test_in_which_a_process_dies_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tests.os, "cpu_count", lambda: 1)
    found = run(QUICK + "\ndef test_dies():\n    os._exit(3)\n", 60, tmp_path)
    assert (found["passed"], found["failed"], found["left"]) == (9, 3, 1)
    assert found["named"] == [
        "ERROR a process ended with 3, in tests/test_ops.py::test_dies",
    ]


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot interrupt another process")
def test_a_process_that_hears_nothing_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that waits for a kernel which never ends."""
    monkeypatch.setattr(gpu_tests.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(gpu_tests, "_GRACE", 1.0)
    deaf = "__import__('signal').signal(2, __import__('signal').SIG_IGN)"
    hangs = f"\ndef test_hangs():\n    {deaf}\n    __import__('time').sleep(100)\n"
    found = run(QUICK + hangs, 8, tmp_path)
    assert (found["passed"], found["failed"], found["left"]) == (9, 3, 1)
    assert found["named"] == ["ERROR a process ended with -9, in tests/test_ops.py::test_hangs"]


def test_without_a_checkout_there_are_none(tmp_path: Path) -> None:
    assert "in the checkout" in gpu_tests.run("", 0, root=tmp_path)["note"]
