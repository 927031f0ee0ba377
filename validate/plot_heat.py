"""A heat map as inline SVG: a cell for each row and column, shaded by the logarithm of its value, with the scale below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from hyperattention.validate.plots import RIGHT, TOP, WIDTH, Chart, opening, tick_text

_LEFT, _FOOT = 58, 66
_TALLEST, _LOWEST, _HIGHEST = 30, 9, 420  # a row at most and at least, and all rows together unless the least asks for more
_LEAST_TEXT = 46  # width of a cell that has room for a number
_GAP = {"row": 17, "column": 26}  # least distance between two labels
_FAINT, _FULL = 0.05, 0.55  # opacity: the ink of a number stands out from the fullest as well
_STEPS = 24  # of the scale


def heat_chart(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], below: str, beside: str, unit: str
) -> Chart | None:
    """`values` of `rows` x `columns`, the darker the larger; zeros are the lightest, NaN, infinities and None are left blank and said so.

    `below` names the columns, `beside` the rows, `unit` the values. None where no value is above zero.
    """
    found = [v for row in values for v in row if v is not None and math.isfinite(v) and v > 0]
    if not found:
        return None
    low, high = min(found), max(found)
    width = (WIDTH - RIGHT - _LEFT) / len(columns)
    height = max(_LOWEST, min(_TALLEST, _HIGHEST / len(rows)))
    bottom = TOP + height * len(rows)
    said = "; ".join(
        f"{beside} {row}: " + ", ".join(f"{_told(v)} at {below} {column}" for column, v in zip(columns, line, strict=True))
        for row, line in zip(rows, values, strict=True)
    )
    parts = [opening(title, said, bottom + _FOOT)]
    for i in _kept(len(rows), height, _GAP["row"]):
        y = TOP + height * (i + 0.5) + 4
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y:.1f}" text-anchor="end">{escape(rows[i])}</text>')
    for j in _kept(len(columns), width, _GAP["column"]):
        x = _LEFT + width * (j + 0.5)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{escape(columns[j])}</text>')
    for i, (row, line) in enumerate(zip(rows, values, strict=True)):
        for j, (column, value) in enumerate(zip(columns, line, strict=True)):
            where = f"{beside} {row}, {below} {column}"
            parts += _cell(value, _share(value, low, high), where, _LEFT + width * j, TOP + height * i, width, height)
    middle = (TOP + bottom) / 2
    parts.append(f'<text class="axis" transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(beside)}</text>')
    parts.append(
        f'<text class="axis" x="{(_LEFT + WIDTH - RIGHT) / 2:.0f}" y="{bottom + 34:.1f}" text-anchor="middle">{escape(below)}</text>'
    )
    return Chart("".join([*parts, *_scale(low, high, unit, bottom + 45)]) + "</svg>", [])


def _kept(count: int, size: float, gap: float) -> range:
    """Places whose labels do not touch."""
    return range(0, count, max(1, math.ceil(gap / size)))


def _share(value: float | None, low: float, high: float) -> float | None:
    """0 at `low` to 1 at `high` on the logarithmic scale; None for what is no number."""
    if value is None or not math.isfinite(value):
        return None
    if value <= low or high <= low:
        return 0.0 if value < high else 1.0
    return min(1.0, math.log(value / low) / math.log(high / low))


def _cell(value: float | None, share: float | None, where: str, x: float, y: float, width: float, height: float) -> list[str]:
    gap = 2 if min(width, height) > 14 else 1
    box = f'x="{x + gap / 2:.1f}" y="{y + gap / 2:.1f}" width="{width - gap:.1f}" height="{height - gap:.1f}" rx="{gap}"'
    parts = [f'<rect {box} style="{_shade(share)}"><title>{escape(where)}: {_told(value)}</title></rect>']
    if width >= _LEAST_TEXT and height >= 20:
        text = tick_text(float(f"{value:.2g}")) if share is not None and value is not None else "–"
        parts.append(f'<text class="name" x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle">{text}</text>')
    return parts


def _shade(share: float | None) -> str:
    opacity = 0.0 if share is None else _FAINT + (_FULL - _FAINT) * share
    return f"fill:var(--series-2);fill-opacity:{opacity:.3f};stroke:var(--rule)"


def _scale(low: float, high: float, unit: str, y: float) -> list[str]:
    """The shades from the smallest to the largest value, between the two in figures."""
    left, right = 168.0, WIDTH - RIGHT - 78.0
    step = (right - left) / _STEPS
    parts = [
        f'<rect x="{left + step * i:.1f}" y="{y}" width="{step:.1f}" height="12" shape-rendering="crispEdges" '
        f'style="fill:var(--series-2);fill-opacity:{_FAINT + (_FULL - _FAINT) * i / (_STEPS - 1):.3f}"/>'
        for i in range(_STEPS)
    ]
    ends = ((left - 7, "end", f"{unit} {tick_text(float(f'{low:.2g}'))}"), (right + 7, "start", tick_text(float(f"{high:.2g}"))))
    return parts + [f'<text class="tick" x="{x:.1f}" y="{y + 10:.1f}" text-anchor="{a}">{escape(text)}</text>' for x, a, text in ends]


def _told(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}" if math.isfinite(value) else "no number"
