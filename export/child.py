"""A command of `hyperattention` as a process of its own: its steps as ours, its one JSON object, its errors by their exit codes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperattention.errors import BuildFailed, EnvironmentFault, ExportFailed, HyperAttentionError, UsageError
from hyperattention.export import interrupt
from hyperattention.export.console import Reporter, numbered

_BY_CODE: dict[int, type[HyperAttentionError]] = {e.exit_code: e for e in (UsageError, EnvironmentFault, ExportFailed, BuildFailed)}
_PR_SET_PDEATHSIG = 1  # Linux's prctl.h
_prctl = ctypes.CDLL(None).prctl


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code, the object on its standard output (empty where there was none), its last words."""

    what: str
    code: int
    found: dict[str, Any]
    said: tuple[str, ...]

    @property
    def message(self) -> str:
        """The error in its own words."""
        last = self.said[-1].removeprefix("error: ") if self.said else f"{self.what} ended with status {self.code}"
        return str(self.found.get("error") or last)

    def crash(self) -> RuntimeError:
        """For an ending that none of its errors explains."""
        return RuntimeError(f"{self.what} crashed:\n" + "\n".join(self.said))


def run(command: Sequence[str], reporter: Reporter, what: str) -> Ended:
    """Runs `command` to its end; `what` names it in messages. An interruption of ours ends it too.

    Raises UsageError, EnvironmentFault, ExportFailed or BuildFailed where it ended in one, with its whole message.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(), preexec_fn=_die_with_parent
    )
    assert process.stdout is not None and process.stderr is not None

    def stop() -> None:
        process.kill()  # it holds nothing worth an ending of its own: what it writes into goes with it, or is taken over line by line
        process.wait()

    said: deque[str] = deque(maxlen=40)
    with interrupt.undoing(stop):
        try:
            for line in process.stderr:
                if step := numbered(line):
                    reporter.step(*step)
                elif line.strip():
                    said.append(line.rstrip())
            output = process.stdout.read()
            code = process.wait()
        except BaseException:
            stop()
            raise
    ended = Ended(what, code, _last_object(output), tuple(said))
    if code in _BY_CODE:
        raise _BY_CODE[code](ended.message)
    return ended


def _die_with_parent() -> None:
    """In the child: a killed export must not leave a process that writes into its folder."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_object(output: str) -> dict[str, Any]:
    """The JSON object of the last line; empty where that holds none."""
    try:
        found = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


def _environment() -> dict[str, str]:
    """The child finds this package wherever this process found it."""
    root = str(Path(sys.modules["hyperattention"].__path__[0]).parent)
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}
