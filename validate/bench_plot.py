"""The benchmark as a PNG: time against length, both logarithmic: every run as a dot, medians joined, the band from the 10th to the
90th percentile. It names the exact rivals, and those that were left out.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Any

from hyperattention.validate.plots import short

_LEGEND = "Lines: medians; dots: every run; bands: 10th to 90th percentile, from ten runs on."
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
        dots = [(r["length"], 1000 * second) for r in rows for second in r["seconds"]]
        axes.scatter(*zip(*dots, strict=True), s=5, color=line.get_color(), alpha=0.35, linewidths=0)
        banded = [r for r in rows if r["p10_s"] is not None]
        if banded:
            low, high = ([1000 * r[key] for r in banded] for key in ("p10_s", "p90_s"))
            axes.fill_between([r["length"] for r in banded], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    lengths = sorted({r["length"] for r in report["rows"]})
    axes.set_xticks(lengths, [short(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="tokens", ylabel="milliseconds")
    axes.set_title(heading(report), fontsize=9)
    made.supxlabel("\n".join([_LEGEND, *wrap(rivals_line(report), 150)]), fontsize=7)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return made


def heading(report: dict[str, Any]) -> str:
    """What was timed and where."""
    machine = report["environment"]["machine"]
    return f"{report['problem']['text']}\n{machine['gpu'] or machine['processor']}"


def rivals_line(report: dict[str, Any]) -> str:
    """Which exact rivals were timed, and which were not, at which lengths."""
    names = {c["name"]: c["title"] for c in report["contenders"]}
    timed = {row["contender"] for row in report["rows"]}
    rivals = [c["title"] for c in report["contenders"] if c["exact"] and not c["ours"] and c["name"] in timed]
    left: dict[str, list[int | None]] = {}
    for entry in report["left_out"]:
        left.setdefault(entry["contender"], []).append(entry["length"])
    absent = [names.get(name, name) + (f" at {', '.join(short(n) for n in at if n)}" if any(at) else "") for name, at in left.items()]
    said = f"Exact rivals: {'; '.join(rivals) or 'none'}."
    return f"{said} Left out (reasons in bench.json): {'; '.join(absent)}." if absent else said


def draw(report: dict[str, Any], path: Path) -> Path:
    """Writes `figure` to `path`."""
    return save(figure(report), path)


def save(made: Any, path: Path) -> Path:
    """Writes a figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(made)
    made.savefig(path, format="png")
    return path
