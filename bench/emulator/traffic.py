"""What a kernel's accesses ask of shared memory and of the caches, counted while it runs.

Shared memory has 32 banks of 4 bytes; a warp's access takes as many turns (wavefronts) as the
busiest bank has words to give. Accesses of 8 and 16 bytes are taken by half and by quarter warps.
Global memory is read and written in sectors of 32 bytes. Beside each count stands the least that
the same bytes could take.

Source: CUDA C++ Best Practices Guide 13.0, sections 10.2.1 (coalescing), 10.2.3 (banks).
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from wanrt.bench.emulator.memory import Array
from wanrt.bench.emulator.program import WARP, Instruction

_BANKS, _BANK, _SECTOR = 32, 4, 32  # banks; bytes
_SAMPLES = 64  # of an instruction, from its first turns; the others count as these


@dataclass
class Access:
    """One instruction's accesses: how often warps took it, and what those looked at had to wait."""

    text: str
    source: str
    times: int = 0  # warps
    looked_at: int = 0
    turns: int = 0  # of those looked at: wavefronts, or sectors
    least: int = 0

    @property
    def total(self) -> float:
        """Wavefronts or sectors of all its turns."""
        return self.turns / max(1, self.looked_at) * self.times

    @property
    def total_least(self) -> float:
        return self.least / max(1, self.looked_at) * self.times


@dataclass
class Traffic:
    """Of one launch: accesses by space and instruction; instructions that warps took."""

    accesses: dict[str, dict[str, Access]] = field(default_factory=lambda: defaultdict(dict))
    instructions: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def take(self, instruction: Instruction, warps: int) -> None:
        self.instructions[".".join(instruction.opcode)] += warps

    def see(
        self, space: str, taking: Instruction, addresses: Array, size: int, active: Array | None
    ) -> None:
        """Warps reach for `size` bytes at each lane's address `[lanes]`."""
        new = Access(taking.text, taking.source)
        access = self.accesses[space].setdefault(f"{taking.source} {taking.text}", new)
        warps = addresses.reshape(-1, WARP)
        lanes = np.ones(warps.shape, bool) if active is None else active.reshape(-1, WARP)
        busy = lanes.any(1)
        access.times += int(busy.sum())
        if access.looked_at >= _SAMPLES * len(warps):
            return
        count = wavefronts if space == "shared" else sectors
        for places, there in zip(warps[busy], lanes[busy], strict=True):
            turns, least = count(places, size, there)
            access.looked_at += 1
            access.turns += turns
            access.least += least


def wavefronts(places: Array, size: int, there: Array) -> tuple[int, int]:
    """Turns that one warp's access to shared memory takes, and the fewest for as many bytes."""
    phases = max(1, size // _BANK)
    turns = 0
    for lanes in np.split(np.arange(WARP), phases):
        taken = places[lanes][there[lanes]]
        if taken.size:
            words = np.unique(taken[:, None] // _BANK + np.arange(phases))
            turns += int(np.bincount(words % _BANKS).max())
    distinct = np.unique(places[there, None] + np.arange(size)).size
    return turns, max(1, -(-distinct // (_BANKS * _BANK)))


def sectors(places: Array, size: int, there: Array) -> tuple[int, int]:
    """Sectors that one warp's access touches, and the fewest that would hold its bytes."""
    taken = np.unique(places[there, None] + np.arange(size))
    return np.unique(taken // _SECTOR).size, -(-taken.size // _SECTOR)
