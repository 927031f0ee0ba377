"""What the engine's build says while it runs: TensorRT's messages into build.log, its steps into one share of progress."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, Callable

from hyperattention.errors import BuildFailed

Progress = Callable[[str], None]
_SHOWN_ERRORS = 3
_REPORTED_SHARE = 0.05


class BuildLog:
    """build.log: TensorRT's messages from INFO up, without this machine's folders; and the errors among them."""

    def __init__(self, path: Path, *folders: Path) -> None:
        usual = [Path.cwd(), Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix)]
        names = {str(p) for f in [*folders, *usual] for p in (f, f.resolve())} - {"/", "."}
        self._folders = sorted(names, key=len, reverse=True)
        self.path, self.errors = path, []
        path.write_text("")

    def write(self, severity: str, message: str) -> None:
        """Appends one message; `severity` is TensorRT's name of it."""
        for name in self._folders:
            message = message.replace(name + "/", "").replace(name, ".")
        if "ERROR" in severity:
            self.errors.append(message)
        with self.path.open("a") as file:
            file.write(f"[{severity}] {message}\n")

    def failure(self, what: str) -> BuildFailed:
        """The exception that tells `what` and the last errors."""
        last = "; ".join(dict.fromkeys(self.errors[-_SHOWN_ERRORS:])) or "TensorRT gave no reason"
        return BuildFailed(f"{what}: {last}. {self.path.name} holds every message; `hyperattention doctor` checks the set-up")


def make_logger(trt: Any, log: BuildLog) -> Any:
    """A `trt.ILogger` that writes into `log`."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity != trt.ILogger.Severity.VERBOSE:
                log.write(severity.name, msg)

    return Logger()


class Share:
    """The share done of TensorRT's nested phases, each a number of steps; `cancelled` makes the build stop at its next step."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.cancelled = progress, False
        self._phases: dict[str, tuple[int, int]] = {}  # name: (steps done, steps), the outermost first
        self._reported = -1.0

    def start(self, phase: str, steps: int) -> None:
        """A phase inside the ones that have started and not finished."""
        self._phases[phase] = (0, max(1, steps))
        self._report(phase)

    def step(self, phase: str, done: int) -> None:
        """`done` steps of the phase are over."""
        self._phases[phase] = (done, self._phases[phase][1])
        self._report(phase)

    def finish(self, phase: str) -> None:
        """The phase is over."""
        self._phases.pop(phase, None)

    def _report(self, phase: str) -> None:
        share, width = 0.0, 1.0
        for done, steps in list(self._phases.values()):
            share, width = share + width * min(done, steps) / steps, width / steps
        if share - self._reported > _REPORTED_SHARE - 1e-9:  # TensorRT runs some phases again: never backwards
            self._reported = share
            self.progress(f"building the engine, {min(share, 1.0):.0%}: {phase}")


def make_monitor(trt: Any, share: Share) -> Any:
    """A `trt.IProgressMonitor` that feeds `share`."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            share.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            share.step(phase_name, step + 1)
            return not share.cancelled

        def phase_finish(self, phase_name: str) -> None:
            share.finish(phase_name)

    return Monitor()
