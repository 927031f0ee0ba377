"""One line of progress for every step, on stderr: a bar on a terminal, numbered lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Steps:
    """`step(text)` begins the next of `total` steps; the estimate of the total may be raised as the work becomes known."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start, self.bar = total, 0, time.monotonic(), None

    def __enter__(self) -> "Steps":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("starting", total=self.total)
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, text: str) -> None:
        self.total = max(self.total, self.done + 1)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, total=self.total, description=text)
        else:
            print(f"[{self.done + 1:>3}/{self.total} {time.monotonic() - self.start:6.1f} s] {text}", file=sys.stderr, flush=True)
        self.done += 1
