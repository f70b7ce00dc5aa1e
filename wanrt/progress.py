"""Progress bars on stderr: loading, each denoise step with the time left, decoding."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from wanrt.pipeline import Step

_BYTES = "load"  # phases that count bytes, not steps


class Bars:
    """One bar per phase, opened when the phase first reports; silent where stderr is no terminal."""

    def __init__(self, quiet: bool = False) -> None:
        console = Console(stderr=True, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description:>12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not sys.stderr.isatty(),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def next_request(self) -> None:
        """Forget the bars of the last request; they stay on the screen."""
        self._tasks.clear()

    def report(self, phase: str, done: int, total: int) -> None:
        """`done` of `total`, in MiB where the phase loads a part."""
        if phase.startswith(_BYTES):
            done, total = done >> 20, max(total >> 20, 1)
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=total)
        self._progress.update(self._tasks[phase], completed=done)

    def on_step(self, step: Step) -> None:
        self.report("denoise", step.index + 1, step.num_steps)
