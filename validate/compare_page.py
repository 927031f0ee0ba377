"""The comparison of two output folders as a page of its own, in the dress of the report."""

from __future__ import annotations

from typing import Any

from hyperattention.validate.compare_text import sentences, tables
from hyperattention.validate.plots import Chart, Series, line_chart
from hyperattention.validate.report import templates
from hyperattention.validate.report_format import seconds

_MOST_OUTPUTS = 3


def page(found: dict[str, Any]) -> str:
    """What `compare_folders.compare` found, as HTML that needs no network."""
    parts = {"sentences": sentences(found), "tables": tables(found), "charts": charts(found)}
    return templates(html=True).get_template("compare.html.jinja").render(c=found, **parts)


def charts(found: dict[str, Any]) -> list[tuple[str, Chart]]:
    """Time, and the errors that a logarithmic axis can show, against length, of both folders; captions with charts."""
    metrics = [m for m in dict.fromkeys(row["metric"] for row in found["errors"]) if m == "KL" or m.endswith("relative l2")]
    drawn = [("One forward pass of the whole model; both axes logarithmic", _chart(found, found["time"], "ours_s", "Time"))]
    for metric in metrics[:_MOST_OUTPUTS]:
        rows = [row for row in found["errors"] if row["metric"] == metric]
        drawn.append((f"{metric}, against exact attention; both axes logarithmic", _chart(found, rows, "mean", metric)))
    return [(caption, chart) for caption, chart in drawn if chart is not None]


def _chart(found: dict[str, Any], rows: list[dict], key: str, what: str) -> Chart | None:
    series = []
    for i, name in enumerate(found["names"]):
        points = [(row["length"], row["pair"][i][key]) for row in rows if row["pair"][i] and row["pair"][i][key]]
        series.append(Series(name, points, i + 1, dashed=i == 1))
    if key == "ours_s":
        return line_chart(f"{what} by length", series, "", True, tick=seconds)
    return line_chart(f"{what} by length", series, what, True)
