"""The stage validation: `hyperattention validate` as a process of its own, because imports go one way."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

from hyperattention.errors import BuildFailed, EnvironmentFault, ExportFailed, HyperAttentionError, UsageError
from hyperattention.export import interrupt
from hyperattention.export.bundle import REPORT
from hyperattention.export.console import Reporter, numbered
from hyperattention.export.gate_options import LANGUAGE, kind_of
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import Source

VALIDATE = (sys.executable, "-m", "hyperattention.validate", "run")
_BY_CODE: dict[int, type[HyperAttentionError]] = {e.exit_code: e for e in (UsageError, EnvironmentFault, ExportFailed, BuildFailed)}
_PR_SET_PDEATHSIG = 1  # Linux's prctl.h
_prctl = ctypes.CDLL(None).prctl


def reads_text(source: Source, plan: ExportPlan) -> bool:
    """Whether the model is measured on token ids made of text."""
    return "input_ids" in (entry.name for entry in plan.inputs) and source.kind in ("language", "encoder")


def check_material(source: Source, plan: ExportPlan, text: Path | None, inputs: Path | None) -> None:
    """Raises UsageError where --text or --inputs is not what the model reads."""
    if inputs is not None and kind_of(plan.task) == LANGUAGE:
        raise UsageError(f"--inputs is for --task features and for functions; a language model ({plan.task}) is judged on --text FILE")
    if inputs is not None and text is not None:
        raise UsageError("--text and --inputs are given together; give the one that holds what the model reads")
    if text is not None and not reads_text(source, plan):
        names = ", ".join(entry.name for entry in plan.inputs)
        raise UsageError(f"--text is for models that read text; {source.name} reads {names}: give real ones with --inputs FILE.npz")


def validate(model: str, folder: Path, options: tuple[str, ...], reporter: Reporter) -> dict[str, Any]:
    """Measures `folder` and writes its report: {"verdict", "gates", "failed": the message of the gates that failed, or None}.

    Raises what the validation ended in, with its whole message.
    """
    command = [*VALIDATE, str(folder), "--model", model, *options, "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(), preexec_fn=_die_with_parent
    )
    assert process.stdout is not None and process.stderr is not None

    def stop() -> None:
        process.kill()  # it holds nothing worth an ending of its own: the folder goes with it
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
    found = _last_object(output)
    message = str(found.get("error") or (said[-1].removeprefix("error: ") if said else f"the validation ended with status {code}"))
    if code in _BY_CODE:
        raise _BY_CODE[code](message)
    # Python ends with 1 after a traceback too; only the verdict tells a failed gate from that.
    if code not in (0, 1) or "verdict" not in found or not (folder / REPORT).is_file():
        raise RuntimeError("the validation crashed:\n" + "\n".join(said))
    return {"verdict": found["verdict"], "gates": found.get("gates", []), "failed": message if code == 1 else None}


def _die_with_parent() -> None:
    """In the child: a killed export must not leave a validation that writes into its folder."""
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
