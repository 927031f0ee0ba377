"""Figures of two folders: time, errors and keys per query against length, every head against itself, planted keys by depth."""

from __future__ import annotations

from typing import Any

from hyperattention.validate.grid_plot import Panel, grid_chart
from hyperattention.validate.plot_scatter import Group, Point, scatter_chart
from hyperattention.validate.plots import Chart, Series, line_chart, short
from hyperattention.validate.report_format import seconds

_MOST_OUTPUTS = 3


def charts(found: dict[str, Any]) -> list[tuple[str, Chart]]:
    """Captions with the figures of both folders that there are numbers for."""
    metrics = [m for m in dict.fromkeys(row["metric"] for row in found["errors"]) if m == "KL" or m.endswith("relative l2")]
    drawn = [("One forward pass of the whole model; both axes logarithmic", _lines(found, found["time"], "ours_s", "Time"))]
    for metric in metrics[:_MOST_OUTPUTS]:
        rows = [row for row in found["errors"] if row["metric"] == metric]
        drawn.append((f"{metric}, against exact attention; both axes logarithmic", _lines(found, rows, "mean", metric)))
    drawn.append(("Error of the layers against keys a query, a mark for each length; both axes logarithmic", _cost(found)))
    drawn.append(("Error of every head in both folders; both axes logarithmic", _heads(found)))
    for kind, regime in dict.fromkeys((row["kind"], row["regime"]) for row in found["needle_grid"]):
        drawn.append((f"Percent of the digits recalled, {kind}, {regime}", _grid(found, kind, regime)))
    return [(caption, chart) for caption, chart in drawn if chart is not None]


def _lines(found: dict[str, Any], rows: list[dict], key: str, what: str) -> Chart | None:
    series = []
    for i, name in enumerate(found["names"]):
        points = [(row["length"], row["pair"][i][key]) for row in rows if row["pair"][i] and row["pair"][i][key]]
        series.append(Series(name, points, i + 1, dashed=i == 1))
    if key == "ours_s":
        return line_chart(f"{what} by length", series, "", True, tick=seconds)
    return line_chart(f"{what} by length", series, what, True)


def _cost(found: dict[str, Any]) -> Chart | None:
    def point(name: str, length: int, side: dict) -> Point:
        tip = f"{name}, {length:,} tokens: {side['ours']:,.0f} keys, relative L2 {side['relative_l2']:.3g}"
        return Point(side["ours"], side["relative_l2"], tip)

    groups = [
        Group(name, [point(name, row["length"], row["pair"][i]) for row in found["keys"] if row["pair"][i]], i + 1, True, i == 1)
        for i, name in enumerate(found["names"])
    ]
    return scatter_chart("Error of the layers against keys a query", groups, "keys a query", "relative L2")


def _heads(found: dict[str, Any]) -> Chart | None:
    """Heads that approximate in both folders; below the line the second is the better one."""
    first, second = found["names"]
    points = []
    for row in found["heads"]:
        if all(row["pair"]):
            x, y = (side["relative_l2"] for side in row["pair"])
            points.append(Point(x, y, f"layer {row['layer']}, head {row['head']}: {first} {x:.3g}, {second} {y:.3g}"))
    title = f"Error of every head, {second} against {first}"
    return scatter_chart(title, [Group("a head", points, 1)], first, second, diagonal="the same in both")


def _grid(found: dict[str, Any], kind: str, regime: str) -> Chart | None:
    rows = [row for row in found["needle_grid"] if (row["kind"], row["regime"]) == (kind, regime)]
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    cells = {(row["length"], row["depth"]): row["pair"] for row in rows}
    panels = []
    for i, name in enumerate(found["names"]):
        measured = [n for n in lengths if any(cells.get((n, depth), [None, None])[i] for depth in depths)]
        pairs = [[cells.get((n, depth), [None, None])[i] for n in measured] for depth in depths]
        shares = [[float("nan") if cell is None else cell["mean"] for cell in line] for line in pairs]
        panels.append(Panel(name, [short(n) for n in measured], shares))
    return grid_chart(f"Recall, {kind}, {regime}", [f"{depth:g}" for depth in depths], panels, "tokens", "depth")
