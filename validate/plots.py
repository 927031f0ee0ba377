"""Charts as inline SVG, coloured by the page's own variables, so that they follow its light and dark theme.

A chart says what it shows in words as well (title and description, for a screen reader), tells its series apart by shape and dash
beside colour, and never draws what it has no number for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 420, 268
LEFT, RIGHT, TOP, BOTTOM = 82, 14, 14, 46
_LABEL_GAP = 46  # least distance between two labels under the axis
_TEXT_WIDTH, _TEXT_HEIGHT, _TEXT_ROOM = 8, 13, 8  # of a letter on a phone, at most; of a line of text; around it, with a mark's size


@dataclass(frozen=True)
class Series:
    """A line: points (length, value), a band (low, high) at each or none, and the colour's number (1 to 4) in the page's style."""

    name: str
    points: list[tuple[int, float]]
    colour: int
    band: list[tuple[float, float]] = field(default_factory=list)
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """An SVG, and its legend: the name of each series with a small SVG of its line."""

    svg: str
    legend: list[tuple[str, str]]
    gate: bool = False


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


def text_width(text: str) -> float:
    """What a text takes at most, on a phone."""
    return _TEXT_WIDTH * len(text)


class Axis:
    """Maps values to pixels, linearly or by logarithm; what a logarithm cannot show lies at the axis's lower end."""

    def __init__(self, values: Iterable[float], start: float, stop: float, log: bool, pad: float = 0.08) -> None:
        self.log, self.start, self.stop = log, start, stop
        mapped = [math.log10(v) if log else v for v in values]
        low, high = min(mapped), max(mapped)
        spread = max(high - low, 0.5) if log else (high - low) or abs(high) or 1.0
        middle = (low + high) / 2
        self.low, self.high = min(low, middle - spread / 2) - pad * spread, max(high, middle + spread / 2) + pad * spread

    def __call__(self, value: float) -> float:
        mapped = value if not self.log else math.log10(value) if value > 0 else self.low
        share = (min(max(mapped, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis, at most seven."""
        if not self.log:
            return _nice_ticks(self.low, self.high)
        span = self.high - self.low
        every = max(1, math.ceil(span / 6))
        steps = (1,) if span > 1.7 else (1, 2, 5) if span > 0.8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
        decades = [d for d in range(math.floor(self.low), math.ceil(self.high) + 1) if d % every == 0]
        return [m * 10.0**d for d in decades for m in steps if self.low <= math.log10(m * 10.0**d) <= self.high]


def line_chart(
    title: str,
    series: list[Series],
    unit: str,
    log_y: bool = False,
    limit: float | None = None,
    tick: Callable[[float], str] = tick_text,
) -> Chart | None:
    """Lines over length (logarithmic); `limit` is drawn as a labelled line. None where there is nothing that can be shown.

    `unit` names the other axis; it is empty where the ticks' own text does.
    """
    shown = [s for s in (_finite(s, log_y) for s in series) if s.points]
    if not shown:
        return None
    limit = None if limit is None or (log_y and limit <= 0) else limit
    xs = sorted({x for s in shown for x, _ in s.points})
    ys = [y for s in shown for _, y in s.points] + [edge for s in shown for ends in s.band for edge in ends if not log_y or edge > 0]
    ys += [] if limit is None else [limit] if log_y else [limit, 0.0]
    x_axis, y_axis = Axis(xs, LEFT, WIDTH - RIGHT, True), Axis(ys, HEIGHT - BOTTOM, TOP, log_y)
    said = "; ".join(f"{s.name}: " + ", ".join(f"{y:.3g} at {x:,}" for x, y in s.points) for s in shown)
    parts = [opening(title, said), *rules(y_axis, tick), *labels([(x_axis(x), short(x)) for x in xs]), *axis_names("tokens", unit)]
    parts += [part for s in shown for part in _band(s, x_axis, y_axis)]
    parts += [part for s in shown for part in _line(s, x_axis, y_axis)]
    if limit is not None:
        parts += _limit(y_axis(limit), f"gate {tick(limit)}", [[(x_axis(x), y_axis(y)) for x, y in s.points] for s in shown])
    return Chart("".join(parts) + "</svg>", [(s.name, swatch(s.colour, s.dashed)) for s in shown], limit is not None)


def _limit(y: float, text: str, lines: list[list[tuple[float, float]]]) -> list[str]:
    """A limit's line, with its text where no line of the chart runs: above or below it, at its right or left end or amid."""
    width = text_width(text)
    starts = {"end": WIDTH - RIGHT - width, "start": LEFT + 4, "middle": (LEFT + WIDTH - RIGHT - width) / 2}
    places = [(anchor, base) for base in (y - 5, y + 17) for anchor in starts]

    def room(place: tuple[str, float]) -> float:
        """From the text to the nearest line, in pixels; more than enough is enough."""
        anchor, base = place
        left, top = starts[anchor], base - _TEXT_HEIGHT
        gaps = [math.hypot(max(left - x, x - left - width, 0), max(top - v, v - base, 0)) for line in lines for x, v in _along(line)]
        return min(*gaps, _TEXT_ROOM)

    anchor, base = max(places, key=room)  # the first of the best
    x = starts[anchor] + {"end": width, "start": 0, "middle": width / 2}[anchor]
    return [
        f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text class="limit-text" x="{x:g}" y="{base:.1f}" text-anchor="{anchor}">{text}</text>',
    ]


def _along(line: list[tuple[float, float]], pieces: int = 32) -> list[tuple[float, float]]:
    """Points of a line of straight pieces, its corners among them."""
    shares = [i / pieces for i in range(pieces)]
    between = [(a + (c - a) * t, b + (d - b) * t) for (a, b), (c, d) in itertools.pairwise(line) for t in shares]
    return [*between, line[-1]]


def _finite(s: Series, log_y: bool) -> Series:
    """The series without the points that the chart cannot show: no number, or none with a logarithm."""
    keep = [i for i, (_, y) in enumerate(s.points) if math.isfinite(y) and (not log_y or y > 0)]
    band = [s.band[i] for i in keep] if s.band and all(math.isfinite(edge) for i in keep for edge in s.band[i]) else []
    return Series(s.name, [s.points[i] for i in keep], s.colour, band, s.dashed)


def opening(title: str, said: str, height: float = HEIGHT) -> str:
    """The start of a figure of `height`, whose title and description say it in words."""
    label = escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}"><title>{label}</title><desc>{escape(said)}</desc>'


def rules(axis: Axis, tick: Callable[[float], str]) -> list[str]:
    """Lines across the figure at the ticks of its upright axis, with their texts beside it."""
    parts = []
    for value in axis.ticks():
        y = axis(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(tick(value))}</text>')
    return parts


def labels(places: list[tuple[float, str]], y: float = HEIGHT - BOTTOM + 19, gap: float = _LABEL_GAP) -> list[str]:
    """Labels under the axis, at least `gap` apart; one that would touch the next is left out, the last one never is."""
    kept: list[tuple[float, str]] = []
    for x, text in reversed(places):
        if not kept or kept[-1][0] - x >= gap:
            kept.append((x, text))
    return [f'<text class="tick" x="{x:.1f}" y="{y:g}" text-anchor="middle">{escape(text)}</text>' for x, text in reversed(kept)]


def axis_names(below: str, beside: str) -> list[str]:
    """What the axes show; `beside` may be empty."""
    middle = (TOP + HEIGHT - BOTTOM) / 2
    beside_axis = f'<text class="axis" transform="translate(17 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(beside)}</text>'
    return [
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(below)}</text>',
        *([beside_axis] if beside else []),
    ]


def _band(s: Series, x_axis: Axis, y_axis: Axis) -> list[str]:
    if not s.band:
        return []
    ends = [(x_axis(x), y_axis(low), y_axis(high)) for (x, _), (low, high) in zip(s.points, s.band, strict=True)]
    colour = f"var(--series-{s.colour})"
    if len(ends) == 1:
        x, low, high = ends[0]
        return [f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" style="stroke:{colour}" stroke-width="2"/>']
    around = [f"{x:.1f},{low:.1f}" for x, low, _ in ends] + [f"{x:.1f},{high:.1f}" for x, _, high in reversed(ends)]
    return [f'<polygon class="band" points="{" ".join(around)}" style="fill:{colour}"/>']


def _line(s: Series, x_axis: Axis, y_axis: Axis) -> list[str]:
    colour = f"var(--series-{s.colour})"
    dash = ' stroke-dasharray="6 5"' if s.dashed else ""
    path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in s.points)
    parts = [f'<polyline class="line" points="{path}" style="stroke:{colour}"{dash}/>'] if len(s.points) > 1 else []
    for i, (x, y) in enumerate(s.points):
        tip = f"{s.name}, {x:,} tokens: {y:.4g}" + (f" ({s.band[i][0]:.3g} to {s.band[i][1]:.3g})" if s.band else "")
        parts.append(marker(s.colour, x_axis(x), y_axis(y), tip))
    return parts


def swatch(colour: int, dashed: bool = False, line: bool = True) -> str:
    """A mark, by default on a piece of a line, for a legend."""
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    drawn = f'<line x1="1" x2="29" y1="6" y2="6" style="stroke:var(--series-{colour})" stroke-width="2.2"{dash}/>' if line else ""
    return f'<svg class="swatch" viewBox="0 0 30 12" aria-hidden="true">{drawn}{marker(colour, 15, 6, "")}</svg>'


def marker(colour: int, x: float, y: float, tip: str) -> str:
    """A dot, square, diamond or triangle by the colour's number, so that print and any eye can tell the series apart."""
    paths = {2: "M-4-4h8v8h-8z", 3: "M0-5.4L5.4 0 0 5.4-5.4 0z", 4: "M0-5L4.8 4h-9.6z"}
    style = f'style="fill:var(--series-{colour})"'
    text = f"<title>{escape(tip)}</title>" if tip else ""
    if colour not in paths:
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.4" {style}>{text}</circle>'
    return f'<path class="dot" transform="translate({x:.1f} {y:.1f})" d="{paths[colour]}" {style}>{text}</path>'


def bar_chart(title: str, bars: list[tuple[str, float]], unit: str, below: str, ticks: dict[int, str] | None = None) -> Chart | None:
    """Bars side by side, each with its text (for the tooltip) and value; zero is marked.

    `ticks` labels the left edges of bars by number (the right end is len(bars)); without it the first and the last bar are named.
    """
    if not bars or not all(math.isfinite(v) for _, v in bars):
        return None
    axis = Axis([*(v for _, v in bars), 0.0], HEIGHT - BOTTOM, TOP, False)
    width = (WIDTH - LEFT - RIGHT) / len(bars)
    said = ", ".join(f"{text}: {value:.3g}" for text, value in bars)
    parts = [opening(title, said), *rules(axis, tick_text)]
    for i, (text, value) in enumerate(bars):
        top, bottom = sorted((axis(value), axis(0.0)))
        box = f'x="{LEFT + i * width + 1:.1f}" y="{top:.1f}" width="{width - 2:.1f}" height="{max(bottom - top, 0.8):.1f}" rx="1.5"'
        parts.append(f'<rect {box} style="fill:var(--series-1)"><title>{escape(text)}: {value:.4g}</title></rect>')
    parts.append(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis(0.0):.1f}" y2="{axis(0.0):.1f}"/>')
    if ticks is None:
        ends = ((LEFT, "start", bars[0][0]), (WIDTH - RIGHT, "end", bars[-1][0]))
        parts += [f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 19}" text-anchor="{a}">{escape(t)}</text>' for x, a, t in ends]
    else:
        parts += labels([(LEFT + i * width, text) for i, text in sorted(ticks.items())])
    return Chart("".join([*parts, *axis_names(below, unit)]) + "</svg>", [])


@dataclass(frozen=True)
class Span:
    """One mark of a row of a range chart: mean, lowest and highest value, name and colour."""

    name: str
    mean: float
    low: float
    high: float
    colour: int


def range_chart(title: str, rows: list[tuple[str, list[Span]]], below: str) -> Chart | None:
    """A row for each label with its spans, on a logarithmic axis; a dot is the mean, the line through it runs from low to high."""
    spans = [s for _, row in rows for s in row if all(math.isfinite(v) and v > 0 for v in (s.mean, s.low, s.high))]
    if not spans:
        return None
    left, step = 126, 34
    bottom = TOP + step * len(rows)
    axis = Axis([v for s in spans for v in (s.low, s.high)], left, WIDTH - RIGHT - 6, True)
    said = "; ".join(f"{label}: " + ", ".join(f"{s.name} {s.mean:.3g}" for s in row) for label, row in rows)
    parts = [opening(title, said, bottom + BOTTOM)]
    ticks = axis.ticks()
    parts += [f'<line class="grid" x1="{axis(v):.1f}" x2="{axis(v):.1f}" y1="{TOP}" y2="{bottom}"/>' for v in ticks]
    parts += labels([(axis(v), tick_text(v)) for v in ticks], bottom + 19)
    parts.append(f'<text class="axis" x="{(left + WIDTH) / 2:.0f}" y="{bottom + BOTTOM - 6}" text-anchor="middle">{escape(below)}</text>')
    for i, (label, row) in enumerate(rows):
        middle = TOP + step * (i + 0.5)
        parts.append(f'<text class="name" x="{left - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        for j, s in enumerate(s for s in row if s in spans):
            y = middle + 9 * (j - (len(row) - 1) / 2)
            ends = f'x1="{axis(s.low):.1f}" x2="{axis(s.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
            parts.append(f'<line {ends} style="stroke:var(--series-{s.colour})" stroke-width="2.5"/>')
            parts.append(marker(s.colour, axis(s.mean), y, f"{label}, {s.name}: {s.mean:.4g} ({s.low:.3g} to {s.high:.3g})"))
    return Chart("".join(parts) + "</svg>", [(name, swatch(colour)) for name, colour in dict.fromkeys((s.name, s.colour) for s in spans)])
