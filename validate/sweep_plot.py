"""A sweep as a figure: a column for each length; nats added in both regimes and the attention's speed, against the layers replaced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from hyperattention.validate.bench_plot import save
from hyperattention.validate.plots import short
from hyperattention.validate.sweep_page import ORDER_TITLES, REGIMES, TITLES, heading

_COLOURS = {"paper": "#b4560a", "blocks": "#1f5fae", "window": "#6b4fa0"}
_STYLES = {"last": ("-", "o"), "first": ("--", "s"), "error": (":", "^")}


def figure(record: dict[str, Any]) -> Any:
    """The matplotlib figure of a record with at least one point. Needs no display."""
    from matplotlib.figure import Figure

    lengths = sorted({row["length"] for row in record["points"]})
    made = Figure(figsize=(max(9.0, 4.2 * len(lengths) + 1.2), 9.2), dpi=150, layout="constrained")
    grid = made.subplots(3, len(lengths), squeeze=False, sharex=True, sharey="row")
    for column, length in enumerate(lengths):
        rows = [row for row in record["points"] if row["length"] == length]
        for axes, (regime, title) in zip(grid[:2, column], REGIMES, strict=True):
            _loss(axes, rows, regime)
            axes.set_title(f"{short(length)} tokens, {title}", fontsize=9)
        _speed(grid[2, column], rows)
        grid[2, column].set_title(f"{short(length)} tokens, attention", fontsize=9)
        grid[2, column].set_xlabel("layers replaced")
    for axes, label in zip(grid[:, 0], ("nats added a token", "nats added a token", "times exact attention's speed"), strict=True):
        axes.set_ylabel(label)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    made.suptitle("\n".join(wrap(heading(record), 120)), fontsize=8)
    return made


def _loss(axes: Any, rows: Sequence[dict[str, Any]], regime: str) -> None:
    """Delta nats with one standard error to each side; linear within a thousandth of a nat, logarithmic beyond."""
    for (method, order), line in _lines(rows).items():
        style, marker = _STYLES[order]
        told = [row[regime]["delta_nats"] for row in line]
        axes.errorbar(
            [row["replaced"] for row in line], [t["mean"] for t in told], [t["se"] or 0.0 for t in told], linestyle=style, marker=marker,
            markersize=3.5, linewidth=1.3, elinewidth=0.7, color=_COLOURS[method], label=f"{TITLES[method]}, {ORDER_TITLES[order]}",
        )  # fmt: skip
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.axhline(0.0, color="#888888", linewidth=0.7)
    axes.grid(True, alpha=0.3)


def _speed(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for (method, order), line in _lines(rows).items():
        style, marker = _STYLES[order]
        axes.plot([row["replaced"] for row in line], [row["speedup"] for row in line], linestyle=style, marker=marker, markersize=3.5,
                  linewidth=1.3, color=_COLOURS[method])  # fmt: skip
    axes.axhline(1.0, color="#888888", linewidth=0.7)
    axes.grid(True, alpha=0.3)


def _lines(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Points of one method and order, fewest layers first."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["replaced"]):
        found.setdefault((row["method"], row["order"]), []).append(row)
    return found


def draw(record: dict[str, Any], path: Path) -> Path:
    """Writes `figure` to `path` as a PNG."""
    return save(figure(record), path)
