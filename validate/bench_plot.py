"""The benchmark as a PNG: median time against length, both logarithmic, with the band from the 10th to the 90th percentile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyperattention.validate.plots import short

_MARKERS = "osD^vP*X<>"


def figure(report: dict[str, Any]) -> Any:
    """The matplotlib figure of a record with at least one row. Needs no display."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    made = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    axes = made.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for number, contender in enumerate(report["contenders"]):
        rows = sorted((r for r in report["rows"] if r["contender"] == contender["name"]), key=lambda r: r["length"])
        if not rows:
            continue
        lengths, width = [r["length"] for r in rows], 2.4 if contender["ours"] else 1.3
        style = "-" if contender["ours"] and not contender["exact"] else "--"
        marker = _MARKERS[number % len(_MARKERS)]
        (line,) = axes.plot(
            lengths, [1000 * r["median_s"] for r in rows], style, marker=marker, markersize=5, linewidth=width, label=contender["title"]
        )
        banded = [r for r in rows if r["p10_s"] is not None]
        if banded:
            low, high = ([1000 * r[key] for r in banded] for key in ("p10_s", "p90_s"))
            axes.fill_between([r["length"] for r in banded], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    lengths = sorted({r["length"] for r in report["rows"]})
    axes.set_xticks(lengths, [short(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="tokens", ylabel="milliseconds, median (band: 10th to 90th percentile)")
    axes.set_title(heading(report), fontsize=9)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return made


def heading(report: dict[str, Any]) -> str:
    """What was timed and where."""
    machine = report["environment"]["machine"]
    return f"{report['problem']['text']}\n{machine['gpu'] or machine['processor']}"


def draw(report: dict[str, Any], path: Path) -> Path:
    """Writes `figure` to `path`."""
    return save(figure(report), path)


def save(made: Any, path: Path) -> Path:
    """Writes a figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(made)
    made.savefig(path, format="png")
    return path
