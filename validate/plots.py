"""Charts as inline SVG, coloured by the page's own variables, so that they follow its light and dark theme."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44


@dataclass(frozen=True)
class Series:
    """A line: points (length, value), an error bar each (0 = none), and the colour's number (1 to 4) in the page's style."""

    name: str
    points: list[tuple[int, float]]
    colour: int
    errors: list[float] = field(default_factory=list)
    dashed: bool = False


def short(length: int) -> str:
    """8192 -> 8k, 6000 -> 6,000."""
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def tick_text(value: float) -> str:
    """A tick without a tail of zeros."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    span = high - low or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= min((m for m in (1, 2, 5, 10) if span / (step * m) <= count + 0.5), default=10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


class _Axis:
    """Maps values to pixels, linearly or by logarithm."""

    def __init__(self, values: list[float], start: float, stop: float, log: bool, pad: float) -> None:
        self.log, self.start, self.stop = log, start, stop
        mapped = [self._map(v) for v in values]
        low, high = min(mapped), max(mapped)
        spread = max(high - low, 0.5) if log else (high - low) or abs(high) or 1.0
        middle = (low + high) / 2
        self.low, self.high = min(low, middle - spread / 2) - pad * spread, max(high, middle + spread / 2) + pad * spread

    def _map(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.start + (self._map(value) - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            return _nice_ticks(self.low, self.high)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        steps = (1,) if self.high - self.low > 1.7 else (1, 2, 5)
        ticks = [m * 10.0**d for d in decades for m in steps if self.low <= math.log10(m * 10.0**d) <= self.high]
        return ticks or [10 ** ((self.low + self.high) / 2)]


def line_chart(title: str, series: list[Series], unit: str, log_y: bool = False, limit: float | None = None) -> str:
    """Lines over length (logarithmic); `limit` is drawn as a labelled line. Points a logarithm cannot show are left out."""
    shown = [
        (s, [(x, y, e) for (x, y), e in zip(s.points, s.errors or [0.0] * len(s.points), strict=True) if not log_y or y > 0])
        for s in series
    ]
    shown = [(s, points) for s, points in shown if points]
    limit = None if log_y and limit is not None and limit <= 0 else limit
    if not shown:
        return ""
    xs = sorted({x for _, points in shown for x, _, _ in points})
    ys = [y + sign * e for _, points in shown for _, y, e in points for sign in (-1, 0, 1) if not log_y or y + sign * e > 0]
    if limit is not None:
        ys += [limit] if log_y else [limit, 0.0]
    x_axis = _Axis([float(x) for x in xs], LEFT, WIDTH - RIGHT, True, 0.08)
    y_axis = _Axis(ys, HEIGHT - BOTTOM, TOP, log_y, 0.08)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>']
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    for x in xs:
        parts.append(f'<text class="tick" x="{x_axis(x):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{short(x)}</text>')
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">tokens</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="axis" transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(unit)}</text>')
    if limit is not None:
        y = y_axis(limit)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="limit-text" x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">gate {tick_text(limit)}</text>')
    for s, points in shown:
        parts += _line(s, points, x_axis, y_axis, log_y)
    return "".join(parts) + "</svg>"


def _line(s: Series, points: list[tuple[int, float, float]], x_axis: _Axis, y_axis: _Axis, log_y: bool) -> list[str]:
    colour = f"var(--series-{s.colour})"
    dash = ' stroke-dasharray="6 5"' if s.dashed else ""
    path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y, _ in points)
    parts = [f'<polyline class="line" points="{path}" style="stroke:{colour}"{dash}/>'] if len(points) > 1 else []
    for x, y, e in points:
        px = x_axis(x)
        if e and (not log_y or y - e > 0):
            ends = f'x1="{px:.1f}" x2="{px:.1f}" y1="{y_axis(y - e):.1f}" y2="{y_axis(y + e):.1f}"'
            parts.append(f'<line {ends} style="stroke:{colour}" stroke-width="1.5"/>')
        tip = f"{s.name}, {x:,} tokens: {y:.4g}" + (f" ± {e:.2g}" if e else "")
        parts.append(f'<circle cx="{px:.1f}" cy="{y_axis(y):.1f}" r="4.5" style="fill:{colour}"><title>{escape(tip)}</title></circle>')
    return parts


def bar_chart(title: str, bars: list[tuple[str, float]], unit: str) -> str:
    """Bars over position, each with its text (for the tooltip) and value; zero is marked."""
    if not bars:
        return ""
    values = [v for _, v in bars]
    axis = _Axis([*values, 0.0], HEIGHT - BOTTOM, TOP, False, 0.08)
    width = (WIDTH - LEFT - RIGHT) / len(bars)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>']
    for tick in axis.ticks():
        y = axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    for i, (text, value) in enumerate(bars):
        top, bottom = sorted((axis(value), axis(0.0)))
        x = LEFT + i * width + 1.5
        parts.append(
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{width - 3:.1f}" height="{max(bottom - top, 0.8):.1f}" rx="2" '
            f'style="fill:var(--series-1)"><title>{escape(text)}: {value:+.5f}</title></rect>'
        )
    parts.append(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis(0.0):.1f}" y2="{axis(0.0):.1f}"/>')
    for at, anchor in ((0, "start"), (len(bars) - 1, "end")):
        x = LEFT if at == 0 else WIDTH - RIGHT
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="{anchor}">{escape(bars[at][0])}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">position in the window</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="axis" transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(unit)}</text>')
    return "".join(parts) + "</svg>"
