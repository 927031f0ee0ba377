"""The report's figures by themselves (validate/plots.py): what they draw, and what they do not draw over."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest

from hyperattention.validate.plots import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Series, Span, bar_chart, line_chart, range_chart


def test_charts_hold_one_point_none_and_negative_values() -> None:
    one = line_chart("t", [Series("s", [(8192, -0.001)], 1, [(-0.0015, -0.0005)])], "nats", limit=0.01)
    assert one is not None and one.svg.count("<circle") == 1 and "gate 0.01" in one.svg
    assert line_chart("t", [Series("s", [(8192, 0.0)], 1)], "nats", log_y=True) is None
    assert line_chart("t", [], "nats") is None and bar_chart("t", [], "nats", "b") is None
    flat = bar_chart("t", [("0", 0.0), ("8k", 0.0)], "nats", "position")
    assert flat is not None and "<rect" in flat.svg
    assert range_chart("t", [("x", [Span("s", 0.0, 0.0, 0.0, 1)])], "b") is None


def test_bands_run_around_their_line_and_labels_keep_apart() -> None:
    points = [(2**n, 0.1 * n) for n in range(8, 20)]
    band = [(y * 0.5, y * 2) for _, y in points]
    chart = line_chart("t", [Series("s", points, 2, band)], "nats", log_y=True)
    assert chart is not None
    root = ElementTree.fromstring(chart.svg)
    polygon, line = root.find("polygon"), root.find("polyline")
    assert polygon is not None and line is not None
    around = [tuple(map(float, p.split(","))) for p in polygon.attrib["points"].split()]
    middle = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    assert [x for x, _ in around] == [x for x, _ in middle] + [x for x, _ in reversed(middle)]
    assert all(high < y < low for (_, y), (_, low), (_, high) in zip(middle, around[:12], reversed(around[12:]), strict=True))
    below = [t for t in root.iter("text") if re.fullmatch(r"\d+k?", t.text or "") and t.get("text-anchor") == "middle"]
    places = [float(t.attrib["x"]) for t in below]
    assert below[-1].text == "512k" and 2 < len(places) < 12 and all(b - a >= 46 for a, b in zip(places, places[1:], strict=False))


NEAR_THE_LIMIT = {
    "below": [0.001, 0.001, 0.001],
    "ends above it on the right": [0.001, 0.002, 0.0105],
    "ends above it on both sides": [0.0107, 0.001, 0.0107],
    "rises through it": [0.002, 0.008, 0.014],
    "falls through it": [0.014, 0.009, 0.002],
    "lies on it at its right end": [0.001, 0.001, 0.01],
}


@pytest.mark.parametrize("values", NEAR_THE_LIMIT.values(), ids=NEAR_THE_LIMIT)
def test_a_limits_text_lies_over_no_line(values: list[float]) -> None:
    """With the letters as wide as they are on a phone; and within the figure's axes."""
    chart = line_chart("t", [Series("s", list(zip((8192, 16384, 32768), values, strict=True)), 1)], "nats", limit=0.01)
    assert chart is not None
    root = ElementTree.fromstring(chart.svg)
    polyline, text = root.find("polyline"), next(t for t in root.iter("text") if t.get("class") == "limit-text")
    assert polyline is not None and text.text == "gate 0.01"
    x, bottom, width = float(text.attrib["x"]), float(text.attrib["y"]), 8 * len(text.text)
    left = x - {"start": 0, "middle": width / 2, "end": width}[text.attrib["text-anchor"]]
    assert LEFT <= left and left + width <= WIDTH - RIGHT and 12 <= bottom <= HEIGHT - BOTTOM + 4
    line = [tuple(map(float, p.split(","))) for p in polyline.attrib["points"].split()]
    for (a, b), (c, d) in itertools.pairwise(line):
        for i in range(201):
            at, height = a + (c - a) * i / 200, b + (d - b) * i / 200
            assert not (left - 2 < at < left + width + 2 and bottom - 15 < height < bottom + 2), (at, height)
