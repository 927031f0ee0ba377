"""Options that several commands of `hyperattention` share, and what they print of a judged report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.markup import escape

from hyperattention.errors import AccuracyFailed
from hyperattention.export import gate_options, interrupt

if TYPE_CHECKING:
    from hyperattention.export.console import Reporter

Folder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that export-model wrote.")]
Gates = Annotated[Optional[list[str]], typer.Option("--gate", metavar="NAME=VALUE", help=gate_options.help_text())]


def save(report: dict, folder: Path, out: Path | None) -> list[Path]:
    """Writes the report into `folder` and brings the manifest of `out` in step with it; Ctrl-C comes before or after both."""
    from hyperattention.export.bundle import update_report
    from hyperattention.validate.report import write

    with interrupt.deferred():
        written = write(report, folder)
        if out is not None:
            update_report(out)
    return written


def say(report: dict, written: list[Path], reporter: "Reporter") -> None:
    """The verdict and the gates; AccuracyFailed where one was not met."""
    reporter.gates(report)
    reporter.say(f"Report: {escape(str(written[-1]))}")
    found = {"verdict": report["verdict"], "gates": report["gates"], "files": [p.name for p in written]}
    if failed := report["verdict"]["failed"]:
        names = ", ".join(failed)
        raise AccuracyFailed(f"gates not met: {names}; the report says where. {_advice(report)}", found)
    reporter.answer(found)


def _advice(report: dict) -> str:
    """What to change where a gate was not met: the layers of a policy are its budget's."""
    if any(gate["group"] == "implementation" and not gate["passed"] for gate in report["gates"]):
        return "The kernels are at fault, not the settings: `hyperattention doctor` says what this machine has"
    if report["plan"].get("policy"):
        return "Give `--layers auto` a tighter --budget, or more calibration (`hyperattention policy --windows`)"
    return "Approximate fewer layers (--layers) or raise num_blocks"
