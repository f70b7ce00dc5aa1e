"""Where the seconds of a request go: named phases that add up to the time on the wall."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

OTHER, TOTAL = "other", "total"


class Clock:
    """Seconds per phase of one request, from when it was made.

    A phase within a phase counts for itself alone: the outer one stands still meanwhile. So nothing
    is counted twice, and what no phase names is `other`. For one thread.
    """

    def __init__(self, begin: float | None = None) -> None:
        """begin: in seconds of `time.perf_counter`; now where it is left out."""
        now = time.perf_counter()
        self._begin = self._mark = now if begin is None else begin
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._cold: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._pass()
        self._open.append(name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._pass()
            self._open.pop()

    @contextmanager
    def loading(self, part: str) -> Iterator[None]:
        """The phase in which the weights of a part are read; the part is cold then."""
        if part not in self._cold:
            self._cold.append(part)
        with self.phase(f"load {part}"):
            yield

    def rest(self, name: str) -> None:
        """Call this phase what no phase has named until now."""
        self._pass()
        unnamed = self._mark - self._begin - sum(self._seconds.values())
        self._seconds[name] = self._seconds.get(name, 0.0) + unnamed

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the phase is what making each of them takes, not what is done with it."""
        iterator = iter(items)
        while True:
            with self.phase(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def within(self, name: str, call: Callable[..., T]) -> Callable[..., T]:
        """The same function, as a phase."""

        def timed(*args: object, **options: object) -> T:
            with self.phase(name):
                return call(*args, **options)

        return timed

    def seconds(self, name: str) -> float:
        """Of one phase so far, as often as it was entered; 0 before its first end."""
        return self._seconds.get(name, 0.0)

    @property
    def cold(self) -> tuple[str, ...]:
        """Parts whose weights were read; the others lay there already, or were not needed."""
        return tuple(self._cold)

    def timings(self) -> dict[str, float]:
        """Seconds of each phase in the order of their beginning, then `other` and `total`."""
        self._pass()
        total = self._mark - self._begin
        return self._seconds | {OTHER: total - sum(self._seconds.values()), TOTAL: total}

    def _pass(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._mark
        self._mark = now


def added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Phase by phase, of two clocks that ran one after the other."""
    names = [*one, *other]
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in names}


def process_began() -> float:
    """When this process was started, in seconds of `time.perf_counter`.

    Linux tells, to 10 ms; elsewhere it is when this module was imported.
    """
    status = Path("/proc/self/stat")
    if not status.exists():
        return _IMPORTED
    ticks = int(status.read_text().rpartition(")")[2].split()[19])  # proc(5): starttime
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - age


_IMPORTED = time.perf_counter()
