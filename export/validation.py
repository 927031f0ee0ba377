"""The stage validation: `hyperattention validate` as a process of its own, because imports go one way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hyperattention.errors import UsageError
from hyperattention.export import child
from hyperattention.export.bundle import REPORT
from hyperattention.export.console import Reporter
from hyperattention.export.gate_options import LANGUAGE, kind_of
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import Source

VALIDATE = (sys.executable, "-m", "hyperattention.validate", "run")


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
    ended = child.run([*VALIDATE, str(folder), "--model", model, *options, "--json"], reporter, "the validation")
    found = ended.found
    # Python ends with 1 after a traceback too; only the verdict tells a failed gate from that.
    if ended.code not in (0, 1) or "verdict" not in found or not (folder / REPORT).is_file():
        raise ended.crash()
    return {"verdict": found["verdict"], "gates": found.get("gates", []), "failed": ended.message if ended.code == 1 else None}
