"""The time split as a table and lines for the console, and as a figure: one bar a case, cut by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hyperattention.validate.bench_plot import save
from hyperattention.validate.bench_profile import ESTIMATE, ORDER, TOTAL
from hyperattention.validate.plots import short
from hyperattention.validate.report_format import NOTHING, seconds

# A colour a stage; those of `rest` are grey.
_COLOURS = ("#4e79a7", "#a0cbe8", "#59a14f", "#8cd17d", "#e15759", "#e15759", "#f1ce63", "#f28e2b", "#b07aa1", "#ff9da7", "#d0d0d0")


def table(report: dict[str, Any]) -> Table:
    """A row for each stage of each case."""
    columns = ("tokens", "preset", "D", "stage", "time", "share", "TFLOP/s", "TOP/s int8", "TB/s", "bound by", "of roofline")
    shown = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for column in (0, 2, 4, 5, 6, 7, 8, 10):
        shown.columns[column].justify = "right"
    for column in shown.columns:
        column.no_wrap = True
    for case in report["profile"]["cases"]:
        head = [f"{case['length']:,}", case["preset"], str(case["head_dim"])]
        for row in case["stages"]:
            rates = (_tera(row[key]) for key in ("flop_per_s", "int8_op_per_s", "bytes_per_s"))
            time = ("~" if row["how"] == ESTIMATE else "") + _signed(row["seconds"])
            cells = [*head, row["stage"], time, _percent(row["share"]), *rates, row["bound"] or NOTHING, _percent(row["roofline"])]
            shown.add_row(*map(escape, cells), style="bold" if row["stage"] == TOTAL else "")
            head = ["", "", ""]
    return shown


def lines(report: dict[str, Any]) -> list[str]:
    """Ceilings, how the split was obtained, and what the cases note."""
    found = report["profile"]
    notes = [f"{c['preset']}, {c['length']:,} tokens, D={c['head_dim']}: {note}" for c in found["cases"] for note in c["notes"]]
    return [f"ceilings: {found['ceilings']['text']}", *found["method"], *(f"note: {note}" for note in notes)]


def figure(report: dict[str, Any]) -> Any:
    """The matplotlib figure of a record with at least one case: shares of the time by stage, the whole time beside each bar."""
    from matplotlib.figure import Figure

    cases = report["profile"]["cases"]
    made = Figure(figsize=(9, 1.6 + 0.42 * len(cases)), dpi=150, layout="constrained")
    axes = made.subplots()
    names = [f"{case['preset']}, D={case['head_dim']}, {short(case['length'])}" for case in cases]
    left = [0.0] * len(cases)
    times = [{row["stage"]: max(0.0, row["seconds"]) for row in case["stages"] if row["stage"] != TOTAL} for case in cases]
    sums = [sum(stages.values()) for stages in times]
    for stage, colour in zip(ORDER, _COLOURS, strict=True):
        if not any(stage in stages for stages in times):
            continue
        widths = [100 * stages.get(stage, 0.0) / whole for stages, whole in zip(times, sums, strict=True)]
        axes.barh(names, widths, left=left, color=colour, label=stage, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, case in enumerate(cases):
        axes.text(101, place, seconds(case["stages"][-1]["seconds"]), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="% of the time of one call")
    axes.set_title(f"{report['problem']['text']}\n{report['environment']['machine']['gpu']}", fontsize=9)
    axes.legend(fontsize=8, frameon=False, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.3 / (1 + len(cases))))
    return made


def draw(report: dict[str, Any], path: Path) -> Path:
    """Writes `figure` to `path` as a PNG."""
    return save(figure(report), path)


def _tera(value: float | None) -> str:
    return NOTHING if value is None else f"{value / 1e12:.3g}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"


def _signed(value: float) -> str:
    """A difference may be below 0."""
    return seconds(value) if value > 0 else "0" if value == 0 else f"-{seconds(-value)}"
