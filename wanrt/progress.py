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

_BYTES = ("load", "quantize")  # phases that count bytes, not steps


class Bars:
    """One bar per phase, opened by its first report; silent where stderr is no terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self._silent = quiet or not sys.stderr.isatty()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """Leave the bars on the screen; what reports next opens new ones.

        Results are printed after this: while bars are shown, rich sends stdout to stderr too.
        """
        if self._progress is not None:
            self._progress.stop()
        self._progress = None
        self._tasks.clear()

    def report(self, phase: str, done: int, total: int) -> None:
        """`done` of `total`, in MiB where the phase loads or rewrites a part."""
        if self._silent:
            return
        if self._progress is None:
            self._progress = _open()
        if phase.startswith(_BYTES):
            done, total = -(-done >> 20), -(-total >> 20)
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=total)
        self._progress.update(self._tasks[phase], completed=done)

    def on_step(self, step: Step) -> None:
        self.report("denoise", step.index + 1, step.num_steps)


def _open() -> Progress:
    progress = Progress(
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, soft_wrap=True),
    )
    progress.start()
    return progress
