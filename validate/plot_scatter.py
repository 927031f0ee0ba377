"""Points over two logarithmic axes as inline SVG: clouds, frontiers, and the lines that they are read against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from hyperattention.validate.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Chart,
    axis_names,
    labels,
    marker,
    opening,
    rules,
    swatch,
    text_width,
    tick_text,
)

_MOST_SAID = 24  # points of a group that its description tells
_DIAGONAL = (  # in a legend
    '<svg class="swatch" viewBox="0 0 30 12" aria-hidden="true">'
    '<line class="zero" x1="1" x2="29" y1="6" y2="6" stroke-dasharray="5 5"/></svg>'
)


@dataclass(frozen=True)
class Point:
    """A mark at (x, y), and what a pointer on it is told."""

    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Group:
    """Marks of one name and colour (1 to 4): a cloud, or with `joined` a line through them in order of x; `ring` marks them out."""

    name: str
    points: Sequence[Point]
    colour: int
    joined: bool = False
    dashed: bool = False
    ring: bool = False


def scatter_chart(
    title: str, groups: Sequence[Group], below: str, beside: str, diagonal: str | None = None, upright: tuple[float, str] | None = None
) -> Chart | None:
    """Groups over two logarithmic axes named `below` and `beside`; points that a logarithm cannot show are left out.

    `diagonal` names the line on which both are equal, and gives both axes one range; `upright` is (x, name) of a line at one x.
    None where there is no point.
    """
    shown = [kept for kept in (_drawable(group) for group in groups) if kept.points]
    if not shown:
        return None
    xs, ys = ([getattr(p, name) for group in shown for p in group.points] for name in ("x", "y"))
    if diagonal:
        xs = ys = xs + ys
    elif upright:
        xs = [*xs, upright[0]]
    x_axis, y_axis = Axis(xs, LEFT, WIDTH - RIGHT, True), Axis(ys, HEIGHT - BOTTOM, TOP, True)
    parts = [opening(title, _said(shown, upright)), *rules(y_axis, tick_text)]
    ticks = [(x_axis(v), f"{v:,.0f}" if v >= 1000 else tick_text(v)) for v in x_axis.ticks()]
    parts += labels([(x, text) for x, text in ticks if x + text_width(text) / 2 <= WIDTH])
    if diagonal:
        parts.append(_diagonal(x_axis, y_axis))
    if upright:
        parts += _upright(x_axis(upright[0]), upright[1])
    parts += [part for group in shown for part in _group(group, x_axis, y_axis)]
    legend = [(group.name, swatch(group.colour, group.dashed, group.joined)) for group in shown]
    legend += [(diagonal, _DIAGONAL)] if diagonal else []
    return Chart("".join([*parts, *axis_names(below, beside)]) + "</svg>", legend)


def _drawable(group: Group) -> Group:
    points = [p for p in group.points if all(math.isfinite(v) and v > 0 for v in (p.x, p.y))]
    if group.joined:
        points.sort(key=lambda p: p.x)
    return Group(group.name, points, group.colour, group.joined, group.dashed, group.ring)


def _said(groups: Sequence[Group], upright: tuple[float, str] | None) -> str:
    told = []
    for group in groups:
        more = len(group.points) - _MOST_SAID
        told.append(f"{group.name}: " + "; ".join(p.tip for p in group.points[:_MOST_SAID]) + (f"; and {more} more" if more > 0 else ""))
    return ". ".join(told + ([f"{upright[1]} at {upright[0]:,.0f}"] if upright else []))


def _diagonal(x_axis: Axis, y_axis: Axis) -> str:
    line = f'x1="{x_axis.start:.1f}" y1="{y_axis.start:.1f}" x2="{x_axis.stop:.1f}" y2="{y_axis.stop:.1f}"'
    return f'<line class="zero" {line} stroke-dasharray="5 5"/>'


def _upright(x: float, name: str) -> list[str]:
    line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
    text = f'transform="translate({x - 6:.1f} {TOP + 4}) rotate(-90)" text-anchor="end"'
    return [f'<line class="zero" {line} stroke-dasharray="5 5"/>', f'<text class="tick" {text}>{escape(name)}</text>']


def _group(group: Group, x_axis: Axis, y_axis: Axis) -> list[str]:
    colour, parts = f"var(--series-{group.colour})", []
    if group.joined and len(group.points) > 1:
        dash = ' stroke-dasharray="6 5"' if group.dashed else ""
        path = " ".join(f"{x_axis(p.x):.1f},{y_axis(p.y):.1f}" for p in group.points)
        parts.append(f'<polyline class="line" points="{path}" style="stroke:{colour}"{dash}/>')
    for p in group.points:
        x, y = x_axis(p.x), y_axis(p.y)
        if group.ring:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" style="fill:none;stroke:{colour};stroke-width:2"/>')
        parts.append(marker(group.colour, x, y, p.tip))
    return parts
