"""A grid of shares as inline SVG, cell by cell; what an axis of a line could not show: one number for each of two coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from hyperattention.validate.plots import RIGHT, TOP, WIDTH, Chart, labels, opening

_LEFT, _ROW, _HEADS, _GAP = 66, 30, 22, 10
_LEAST_TEXT = 24  # width of a cell that has room for a number
_CHARACTER = 9  # width of one in a label, at most


@dataclass(frozen=True)
class Panel:
    """One block of columns: its name, the columns' labels, and rows of shares 0 to 1 (NaN: none) in the order of the grid's rows."""

    name: str
    columns: list[str]
    shares: list[list[float]]


def grid_chart(title: str, rows: list[str], panels: list[Panel], below: str, beside: str) -> Chart | None:
    """Panels side by side over common rows; a cell is the darker the larger its share, and says it in percent.

    `below` names the columns, `beside` the rows. None where there is no cell.
    """
    panels = [panel for panel in panels if panel.columns]
    if not rows or not panels:
        return None
    room = WIDTH - RIGHT - _LEFT - _GAP * (len(panels) - 1)
    width = room / sum(len(panel.columns) for panel in panels)
    bottom = TOP + _HEADS + _ROW * len(rows)
    said = "; ".join(
        f"{panel.name}, {label}: " + ", ".join(f"{_percent(value)} at {column}" for column, value in zip(panel.columns, line, strict=True))
        for panel in panels
        for label, line in zip(rows, panel.shares, strict=True)
    )
    parts = [opening(title, said, bottom + 40)]
    for i, label in enumerate(rows):
        y = TOP + _HEADS + _ROW * (i + 0.5) + 4
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y:.1f}" text-anchor="end">{escape(label)}</text>')
    left = float(_LEFT)
    for panel in panels:
        parts += _panel(panel, rows, left, width, bottom)
        left += width * len(panel.columns) + _GAP
    middle = (TOP + _HEADS + bottom) / 2
    parts.append(f'<text class="axis" x="{(_LEFT + WIDTH - RIGHT) / 2:.0f}" y="{bottom + 35}" text-anchor="middle">{escape(below)}</text>')
    parts.append(f'<text class="axis" transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(beside)}</text>')
    return Chart("".join(parts) + "</svg>", [])


def _panel(panel: Panel, rows: list[str], left: float, width: float, bottom: float) -> list[str]:
    middle = left + width * len(panel.columns) / 2
    parts = [f'<text class="name" x="{middle:.1f}" y="{TOP + 12}" text-anchor="middle">{escape(panel.name)}</text>']
    places = [(left + width * (j + 0.5), column) for j, column in enumerate(panel.columns)]
    parts += labels(places, bottom + 16, _CHARACTER * (max(map(len, panel.columns)) + 0.5))
    for j, column in enumerate(panel.columns):
        x = left + width * j
        for i, label in enumerate(rows):
            parts += _cell(panel.shares[i][j], f"{panel.name}, {column}, {label}", x, TOP + _HEADS + _ROW * i, width)
    return parts


def _cell(share: float, where: str, x: float, y: float, width: float) -> list[str]:
    """The ink of a number stands out at every shade: the fill never covers more than half of the ground."""
    box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="{_ROW - 2}" rx="3"'
    opacity = 0.06 + 0.44 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    parts = [
        f'<rect {box} style="fill:var(--series-1);fill-opacity:{opacity:.3f};stroke:var(--rule)">'
        f"<title>{escape(where)}: {_percent(share)}</title></rect>"
    ]
    if width >= _LEAST_TEXT:
        text = f"{100 * share:.0f}" if math.isfinite(share) else "–"
        parts.append(f'<text class="name" x="{x + width / 2:.1f}" y="{y + _ROW / 2 + 4:.1f}" text-anchor="middle">{text}</text>')
    return parts


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "not measured"
