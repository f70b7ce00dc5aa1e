"""What a process holds on its card: with a stand-in for NVML, the driver's own account."""

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanrt.errors import BudgetError
from wanrt.memory.card import held_bytes, on_card
from wanrt.memory.meter import metered

CUDA = torch.device("cuda")
MIB = 1 << 20


class FakeNvml(SimpleNamespace):
    """One card, some processes on it."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1234":
            raise self.NVMLError(uuid)
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, card: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=n) for pid, n in self.processes.items()]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """8 GiB, of which a desktop has 1; PyTorch reserved 300 MiB, at its peak 500."""
    nvml = FakeNvml(processes={os.getpid(): 700 * MIB, os.getpid() + 1: 1024 * MIB})
    cuda = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(uuid="1234", total_memory=8188 * MIB),
        mem_get_info=lambda device: ((8192 - 1724) * MIB, 8192 * MIB),
        memory_reserved=lambda device: 300 * MIB,
        max_memory_reserved=lambda device: 500 * MIB,
        reset_peak_memory_stats=lambda device: None,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return SimpleNamespace(nvml=nvml, cuda=cuda)


def test_what_others_hold_is_not_ours(card: Any) -> None:
    assert held_bytes(CUDA) == 700 * MIB
    with metered(CUDA) as meter:
        assert not meter.whole_card
        assert meter.peak == 900 * MIB, "500 reserved at most, 400 of context and libraries"


@pytest.mark.parametrize("reason", ["no library", "other card", "other numbers", "windows"])
def test_where_nobody_says_the_whole_card_counts(
    card: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    match reason:
        case "no library":
            monkeypatch.setitem(sys.modules, "pynvml", None)
        case "other card":
            card.cuda.get_device_properties = lambda device: SimpleNamespace(uuid="5678")
        case "other numbers":
            card.nvml.processes = {1: 700 * MIB}
        case "windows":
            card.nvml.processes = {os.getpid(): None}
    assert held_bytes(CUDA) is None
    with metered(CUDA) as meter:
        assert meter.whole_card
        assert meter.peak == (500 + 1724 - 300) * MIB


def test_a_budget_of_the_size_a_card_is_sold_as_is_all_it_has(card: Any) -> None:
    assert on_card(8192 * MIB, CUDA) == 8188 * MIB
    assert on_card(6000 * MIB, CUDA) == 6000 * MIB
    with pytest.raises(BudgetError, match=r"--vram 9.00 GiB is more than the card's 8.00 GiB"):
        on_card(9216 * MIB, CUDA)
