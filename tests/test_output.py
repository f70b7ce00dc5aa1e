"""Output paths that cannot be written, interrupted writing, and a full disk."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from wanrt.errors import OutputError, UsageError, WanrtError
from wanrt.media.output import MIN_FREE_BYTES, PendingFile, check_output
from wanrt.media.video import VideoWriter, probe_video, write_video


def gray(count: int) -> np.ndarray:
    return np.full((count, 64, 96, 3), 90, dtype=np.uint8)


def noisy(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("absent/a.mp4", OutputError, "absent does not exist and is never created"),
        ("file/a.mp4", OutputError, "file is not a folder"),
        ("folder.mp4", OutputError, "it is a folder"),
        ("there.mp4", OutputError, "exists already .-y overwrites it"),
        ("pipe.mp4", OutputError, "not a regular file"),
        ("a.avi", UsageError, "the ending .avi; results are .mp4, .webm, .mkv"),
        ("a", UsageError, "no ending"),
        ("new\nline.mp4", UsageError, "control character"),
        ("nul\0.mp4", UsageError, "control character"),
        ("x" * 300 + ".mp4", OutputError, "File name too long"),
    ],
)
def test_output_paths(name: str, kind: type[WanrtError], reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "there.mp4").write_text("precious")
    os.mkfifo(tmp_path / "pipe.mp4")
    before = sorted(tmp_path.iterdir())
    for call in (check_output, lambda path: write_video(path, [gray(2)], 16)):
        with pytest.raises(kind, match=reason) as caught:
            call(tmp_path / name)
        assert caught.value.exit_code == (5 if kind is OutputError else 2)
    if name != "there.mp4":
        with pytest.raises(kind, match=reason):
            check_output(tmp_path / name, overwrite=True)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.mp4").read_text() == "precious"


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that refuses root as well")
def test_a_read_only_folder() -> None:
    with pytest.raises(OutputError, match="cannot write /sys/a.mp4: Permission denied"):
        check_output("/sys/a.mp4")


def test_overwriting_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("precious")
    with VideoWriter(path, 16, overwrite=True) as writer:
        writer.append(gray(3))
        assert path.read_text() == "precious"
    assert writer.num_frames == 3 == probe_video(path).num_frames
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError):
        check_output(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_nothing_is_left_behind(error: type[BaseException], tmp_path: Path) -> None:
    def chunks() -> Iterator[Tensor]:
        yield torch.zeros(3, 90, 64, 64)
        assert [file.name[:7] for file in tmp_path.iterdir()] == [".wanrt-"]
        raise error

    with pytest.raises(error):
        write_video(tmp_path / "a.mp4", chunks(), 16)
    with pytest.raises(error), PendingFile(tmp_path / "a.png") as pending:
        pending.part.touch()
        raise error
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 1.5 MiB of room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full_while_writing(small_disk: Path) -> None:
    check_output(small_disk / "a.mp4")
    with pytest.raises(OutputError, match="no space left in .*disk") as caught:
        write_video(small_disk / "a.mp4", [noisy(60)] * 3, 16)
    assert caught.value.exit_code == 5 and not list(small_disk.iterdir())


def test_disk_full_is_seen_before_any_work(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(1536 * 1024 - MIN_FREE_BYTES))
    check_output(small_disk / "a.mp4")
    with (small_disk / "ballast").open("ab") as file:
        file.write(bytes(8192))
    with pytest.raises(OutputError, match="1016 KiB are free in .*at least 1024 KiB"):
        check_output(small_disk / "a.mp4")


@pytest.mark.parametrize("step", ["mux", "close", "fsync"])
def test_disk_full_at_any_step(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be mounted: the same errors, raised where the system raises them."""

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        def __init__(self, container: object) -> None:
            self.container = container

        def __getattr__(self, name: str) -> object:
            return refuse if name == step else getattr(self.container, name)

    real_open = av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: Full(real_open(*args, **kwargs)))
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError, match="no space left") as caught:
        write_video(tmp_path / "a.mp4", [noisy(4)], 16)
    assert caught.value.exit_code == 5 and not list(tmp_path.iterdir())
