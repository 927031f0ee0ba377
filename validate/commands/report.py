"""`hyperattention report OUT`: judge a saved report again and write it anew."""

from __future__ import annotations

from hyperattention.errors import UsageError
from hyperattention.export.gate_options import parse_gates, with_gates
from hyperattention.validate.commands.options import AsJson, Folder, Gates, Quiet, save, say

EXAMPLE = "hyperattention report out --gate kl=0.01 --gate top1=0.95"


def command(
    folder: Folder,
    gate: Gates = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Judge a saved report again, under other limits if given, and write it anew. Needs neither model nor device."""
    from hyperattention.export.bundle import REPORT
    from hyperattention.export.console import Reporter
    from hyperattention.validate.gates import judge
    from hyperattention.validate.report import INCOMPLETE, read

    path = folder if folder.is_file() else folder / "report" / "report.json"
    saved = read(path)
    limits = with_gates(parse_gates(gate or [], saved["kind"]), saved["limits"])
    out = path.parent.parent  # a report.json copied elsewhere has no manifest to keep in step
    try:
        report = judge(saved, limits)
        written = save(report, path.parent, out if path == out / REPORT else None)
    except UsageError:
        raise
    except INCOMPLETE as error:
        raise UsageError(f"{path} is incomplete ({type(error).__name__}: {error}); run `hyperattention validate` again") from error
    say(report, written, Reporter(quiet, as_json))
