"""Page-locked memory, with a stand-in for CUDA's runtime: whole pages of its own, let go again."""

import gc
import logging
import mmap
from types import SimpleNamespace

import pytest
import torch

from wanrt.memory import pinned

CUDA = torch.device("cuda")


class FakeRuntime:
    """Locks pages; refuses one that is locked, and whatever goes beyond a limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.forgotten = limit, []
        self.locked: dict[int, set[int]] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        first, last = address // mmap.PAGESIZE, (address + num_bytes - 1) // mmap.PAGESIZE
        pages = set(range(first, last + 1))
        if flags or any(pages & others for others in self.locked.values()):
            return 712
        if (sum(map(len, self.locked.values())) + len(pages)) * mmap.PAGESIZE > self.limit:
            return 2
        self.locked[address] = pages
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime(limit=40 * mmap.PAGESIZE)

    def check(result: int) -> None:
        if result:
            raise RuntimeError(f"CUDA error {result}")

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(cudart=lambda: fake, check_error=check))
    monkeypatch.setattr(pinned, "_forget_error", fake.forgotten.append)
    return fake


def test_small_buffers_share_no_page(runtime: FakeRuntime) -> None:
    """What malloc gives for a few bytes would: the second call would be refused."""
    buffers = [pinned.host_buffer(n, CUDA) for n in (100, 5000, 100)]
    assert [b.numel() for b in buffers] == [100, 5000, 100]
    assert [len(pages) for pages in runtime.locked.values()] == [1, 2, 1]
    buffers[1].fill_(7)
    assert (buffers[0].sum(), buffers[1].sum(), buffers[2].sum()) == (0, 35000, 0)


def test_a_buffer_is_unlocked_when_it_goes(runtime: FakeRuntime) -> None:
    buffer = pinned.host_buffer(100, CUDA)
    part = buffer[10:20]
    del buffer
    gc.collect()
    assert len(runtime.locked) == 1, "a view still needs it"
    del part
    gc.collect()
    assert not runtime.locked


def test_what_cannot_be_locked(runtime: FakeRuntime, caplog: pytest.LogCaptureFixture) -> None:
    kept = pinned.host_memory(30 * mmap.PAGESIZE, CUDA)
    assert kept is not None and not runtime.forgotten
    with caplog.at_level(logging.WARNING, "wanrt"):
        assert pinned.host_memory(30 * mmap.PAGESIZE, CUDA) is None
    assert "no more host memory can be pinned (CUDA error 2)" in caplog.text
    assert runtime.forgotten == [CUDA], "else the next kernel would report it"
