"""`hyperattention report OUT`: judge a saved report again and write it anew."""

from __future__ import annotations

from hyperattention.errors import UsageError
from hyperattention.validate.commands.options import AsJson, DeltaNats, Folder, Kl, ModelRatio, OpRatio, Top1, limits, say


def command(
    folder: Folder,
    max_delta_nats: DeltaNats = None,
    max_kl: Kl = None,
    min_top1: Top1 = None,
    max_op_ratio: OpRatio = None,
    max_model_ratio: ModelRatio = None,
    as_json: AsJson = False,
) -> None:
    """Judge a saved report again, under other limits if given, and write it anew. Needs neither model nor device."""
    from hyperattention.export.bundle import REPORT, update_report
    from hyperattention.validate.gates import judge
    from hyperattention.validate.report import INCOMPLETE, read, write

    path = folder if folder.is_file() else folder / "report" / "report.json"
    saved = read(path)
    given = dict(
        max_delta_nats=max_delta_nats, max_kl=max_kl, min_top1=min_top1, max_op_ratio=max_op_ratio, max_model_ratio=max_model_ratio
    )
    try:
        report = judge(saved, limits(given, saved["limits"]))
        written = write(report, path.parent)
    except UsageError:
        raise
    except INCOMPLETE as error:
        raise UsageError(f"{path} is incomplete ({type(error).__name__}: {error}); run `hyperattention validate` again") from error
    out = path.parent.parent
    if path == out / REPORT:  # a report.json copied elsewhere has no manifest to keep in step
        update_report(out)
    say(report, written, as_json)
