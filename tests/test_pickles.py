"""Pickles: tensors are read, code is never run, and every damaged file is refused in words."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wanrt.errors import FormatError
from wanrt.weights.checkpoint import Checkpoint


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


class Evil:
    """Unpickling this the usual way creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickle_with_code_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    content = {"w": torch.zeros(2), "x": Evil(marker)}
    torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        FormatError, match="system.*nothing of it was run" if zipped else "not a zip"
    ):
        Checkpoint.open(tmp_path / "m.pth")
    assert not marker.exists()


def legacy_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())


def compressed_zip(path: Path) -> None:
    torch.save({"a": torch.zeros(100)}, path)
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in members.items():
            new.writestr(name, content)


def truncated_zip(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    os.truncate(path, path.stat().st_size // 2)


def broken_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00(X\xff\xff")
        archive.writestr("archive/version", b"3\n")


def huge_view(path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(2**40)}, path)


PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "legacy tar": (legacy_tar, "legacy tar"),
    "text": (lambda path: path.write_text("not a pickle"), "not a zip"),
    "empty": (lambda path: path.write_bytes(b""), "not a zip"),
    "truncated": (truncated_zip, "truncated"),
    "compressed": (compressed_zip, "compressed"),
    "broken pickle": (broken_pickle, "not readable|code or objects"),
    "huge pickle": (lambda path: torch.save({"a": "x" * 9_000_000}, path), "limit"),
    "a list": (lambda path: torch.save([torch.zeros(1)], path), "not a state dict"),
    "no tensors": (lambda path: torch.save({"epoch": 3, "model": {"a": 1}}, path), "no tensors"),
    "tensor larger than its storage": (huge_view, "beyond its bytes"),
    "sparse tensor": (
        lambda path: torch.save({"a": torch.eye(2).to_sparse()}, path),
        "plain tensor",
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_hostile_pickles(case: str, tmp_path: Path) -> None:
    write, word = PICKLES[case]
    write(tmp_path / "m.pth")
    with pytest.raises(FormatError, match=word) as caught:
        Checkpoint.open(tmp_path / "m.pth")
    assert "\n" not in str(caught.value)


WRAPPED = {
    "plain": lambda state: state | {"epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "step": 1},
    "model": lambda state: {"model": state},
    "self-forcing": lambda state: {"generator": {"a": torch.zeros(9)}, "generator_ema": state},
    "twice": lambda state: {"model": {"state_dict": state}},
}


@pytest.mark.parametrize("case", WRAPPED)
def test_state_dicts_inside_training_checkpoints(case: str, tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
    torch.save(WRAPPED[case](state), tmp_path / "m.pt")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors.keys() == state.keys()
    assert all(same_bits(checkpoint.read(name), state[name]) for name in state)


def test_pickled_views_are_read_as_their_own_tensor(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    torch.save({"t": base.t(), "row": base[1]}, tmp_path / "m.bin")
    checkpoint = Checkpoint.open(tmp_path)
    row = checkpoint.read("row")
    assert same_bits(row, base[1]) and same_bits(checkpoint.read("t"), base.t())
    assert row.untyped_storage().nbytes() == 16
