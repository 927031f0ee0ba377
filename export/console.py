"""What a command line shows: stages with progress on standard error, tables of the plan, one JSON object on request."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from hyperattention.config import shared
from hyperattention.export import interrupt

if TYPE_CHECKING:
    from hyperattention.export.memory import Item
    from hyperattention.export.plan import ExportPlan

_WIDTH = 160  # of a file or a pipe, in characters
_NUMBERED = re.compile(r"\[ *(\d+)/(\d+) [^]]*\] (.*)")


class Reporter:
    """Progress and tables. quiet: errors and warnings only; json: everything for people goes to standard error.

    rich colours only what a terminal shows, and nothing where NO_COLOR is set.
    """

    def __init__(self, quiet: bool = False, json: bool = False) -> None:
        self.quiet, self.json = quiet, json
        # rich cuts a table to 80 columns where no terminal says its width.
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else _WIDTH)
        self.out = self.errors if json else Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDTH)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._start = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A named stage with a running clock; `step` says what it is doing."""
        self._start = time.perf_counter()
        if self.quiet or not self.errors.is_terminal:
            self.step(name)
            yield
        else:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
            clock = (TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
            with Progress(*columns, *clock, console=self.errors, transient=True) as self._progress:
                self._task = self._progress.add_task(name, total=None, left="")
                try:
                    with interrupt.undoing(self._progress.stop):  # the terminal gets its cursor back
                        yield
                finally:
                    self._progress = None
        self.say(f"[green]✓[/] {escape(name)} [dim]({time.perf_counter() - self._start:.1f} s)[/]")

    def step(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """What the current stage is doing, and how many of its steps are done where that is known."""
        seconds = time.perf_counter() - self._start
        left = f"about {duration(seconds * (total - done) / done)} left" if done and total else ""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text, completed=done, total=total, left=left)
        elif not self.quiet:
            counted = f"[{done + 1:>3}/{total} {seconds:6.1f} s{', ' + left if left else ''}] " if done is not None and total else "  "
            self.errors.print(counted + text, style="dim", markup=False)

    def counted(self, total: int) -> Callable[[str], None]:
        """A function that begins the next of about `total` steps; the total grows where there turn out to be more."""
        begun = 0

        def step(text: str) -> None:
            nonlocal begun
            self.step(text, begun, max(total, begun + 1))
            begun += 1

        return step

    def answer(self, found: dict[str, Any]) -> None:
        """The one object on standard output, where --json asked for it."""
        if self.json:
            print(json.dumps(jsonable(found), default=str))

    def say(self, text: str) -> None:
        """One line for people, in rich's markup."""
        if not self.quiet:
            self.out.print(text)

    def warn(self, text: str) -> None:
        """A warning; shown even when quiet."""
        self.errors.print(f"[yellow]warning:[/] {escape(text)}")

    def fail(self, text: str) -> None:
        """An error; always shown."""
        self.errors.print(f"[red]error:[/] {escape(text)}")

    def plan(self, plan: ExportPlan, architecture: str) -> None:
        """Every decision of the plan."""
        if self.quiet:
            return
        low, opt, high = plan.seq
        rows = "x".join(str(n) for n in sorted(set(plan.batch)))
        self.out.print(
            f"{architecture}: task {plan.task}, {plan.dtype}, preset {plan.preset}, sequence {low} to {high} (best at {opt}), "
            f"batch {rows}, input ids are {plan.input_ids}, seed {plan.seed}",
            markup=False,
        )
        table = Table("layer", "name", "attention", "why", "seed", box=None, header_style="bold", pad_edge=False)
        for layer in plan.layers:
            seed = str(layer.config.seed) if layer.config and layer.mode == "approximate" else ""
            table.add_row(str(layer.index), escape(layer.name), layer.mode, escape(layer.reason), seed)
        self.out.print(table)
        if plan.approximate:
            found = shared([layer.config.attributes() for layer in plan.approximate if layer.config is not None])
            shown = ", ".join(f"{name} {value}" for name, value in found.items() if name not in ("seed", "scale", "causal"))
            self.out.print(f"approximate layers: {shown}")

    def memory(self, items: list[Item]) -> None:
        """The memory prediction."""
        if self.quiet:
            return
        table = Table("memory", "predicted", "of what", box=None, header_style="bold", pad_edge=False)
        for item in items:
            table.add_row(item.name, "?" if item.bytes is None else readable(item.bytes), escape(item.note))
        self.out.print(table)

    def gates(self, found: dict[str, Any]) -> None:
        """The verdict of a report and its gates."""
        if self.quiet:
            return
        verdict = found.get("verdict")
        told = [verdict.get("headline"), verdict.get("speed"), *verdict.get("small_print", ())] if isinstance(verdict, dict) else [verdict]
        for line in told:
            if line:
                self.out.print(str(line), markup=False)
        for gate in found.get("gates", []):
            mark = "[green]pass[/]" if gate["passed"] else "[yellow]note[/]" if gate.get("advisory") else "[red]FAIL[/]"
            spread = "" if gate.get("se") is None else f" ± {gate['se']:.2g}"
            judged = f"{gate['name']:<12} {gate['value']:.4g}{spread} {gate['sense']} {gate['limit']:.4g}  ({gate['where']})"
            self.out.print(f"  {mark}  {escape(judged)}")


def jsonable(value: object) -> object:
    """NaN and infinities as strings: JSON has none, and a failed number must survive."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    return value


def numbered(line: str) -> tuple[str, int, int] | None:
    """Text, steps done and total of a plain line that `Reporter.step` wrote, in another process; None for any other line."""
    match = _NUMBERED.match(line)
    return (match[3], int(match[1]) - 1, int(match[2])) if match else None


def duration(seconds: float) -> str:
    """Seconds for people: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = max(1, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def readable(size: int) -> str:
    """Bytes with a binary unit: 1536 is 1.5 KiB."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
