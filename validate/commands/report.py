"""`hyperattention report OUT`: render a saved report anew, or judge it again."""

from __future__ import annotations

from typing import Annotated

import typer

from hyperattention.errors import UsageError
from hyperattention.export.entry import AsJson, Quiet
from hyperattention.export.gate_options import parse_gates, with_gates
from hyperattention.validate.commands.options import Folder, Gates, save, say

EXAMPLE = "hyperattention report out --recheck --gate kl=0.01 --gate top1=0.95"
Recheck = Annotated[bool, typer.Option("--recheck", help="Judge the saved numbers again, under the saved limits and every --gate.")]


def command(
    folder: Folder,
    recheck: Recheck = False,
    gate: Gates = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a saved report's pages anew and say its verdict; with --recheck judge its numbers again. Needs neither model nor device.

    Exit 1: a gate is not met.
    """
    from hyperattention.export.bundle import REPORT, check_report
    from hyperattention.export.console import Reporter
    from hyperattention.validate.report import INCOMPLETE, read
    from hyperattention.validate.verdict import judge

    if gate and not recheck:
        raise UsageError("--gate changes what a report is judged by; add --recheck to judge it again, or leave --gate out")
    path = folder if folder.is_file() else folder / REPORT
    report = read(path)
    limits = with_gates(parse_gates(gate or [], report["kind"]), report["limits"])
    out = path.parent.parent if path == path.parent.parent / REPORT else None  # copied elsewhere it has no manifest to be held against
    if out is not None:
        check_report(out)
    try:
        report = judge(report, limits) if recheck else report
        written = save(report, path.parent, out)
    except UsageError:
        raise
    except INCOMPLETE as error:
        raise UsageError(f"{path} is incomplete ({type(error).__name__}: {error}); run `hyperattention validate` again") from error
    say(report, written, Reporter(quiet, as_json))
