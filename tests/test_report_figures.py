"""Figures of heads, hardness and cost in the report: every number that of the JSON, nothing drawn without one, readable at any size."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
import report_samples as samples
from report_page import numbers, page

from hyperattention.validate.charts import charts
from hyperattention.validate.grid_plot import Panel, grid_chart
from hyperattention.validate.plot_heat import heat_chart
from hyperattention.validate.plot_scatter import Group, Point, scatter_chart
from hyperattention.validate.plots import LEFT, RIGHT, WIDTH, Chart
from hyperattention.validate.report import render


def drawn(chart: Chart | None) -> ElementTree.Element:
    assert chart is not None
    return ElementTree.fromstring(chart.svg)


def tips(root: ElementTree.Element) -> list[str]:
    """What a pointer is told, mark by mark; the first title is the figure's."""
    return [title.text or "" for title in root.iter("title")][1:]


def opacity(rect: ElementTree.Element) -> float:
    return float(dict(part.split(":") for part in rect.attrib["style"].split(";"))["fill-opacity"])


def place(mark: ElementTree.Element) -> tuple[float, float]:
    if mark.tag == "circle":
        return float(mark.attrib["cx"]), float(mark.attrib["cy"])
    x, y = re.findall(r"[-\d.]+", mark.attrib["transform"])
    return float(x), float(y)


def marks(root: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Where each mark with a tooltip lies."""
    return {(title.text or ""): place(mark) for mark in root.iter() for title in mark.findall("title") if mark is not root}


OFF = "under every seed more than 2 times the predicted"


def longest(report: dict) -> list[dict]:
    return [row for row in report["layers"] if row["length"] == 32768]


# --- heat map ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["language", "features"])
def test_the_heat_map_has_a_cell_for_every_head(kind: str) -> None:
    report = samples.report(kind)
    root = drawn(charts(report)["heat"])
    heads = [(row["layer"], head) for row in longest(report) for head in row["heads"]]
    assert tips(root) == [f"layer {layer}, head {head['head']}: {head['relative_l2']:.3g}" for layer, head in heads]
    cells = [rect for rect in root.iter("rect") if rect.find("title") is not None]
    shades = sorted((head["relative_l2"], opacity(cell)) for (_, head), cell in zip(heads, cells, strict=True))
    assert [shade for _, shade in shades] == sorted(shade for _, shade in shades) and shades[0][1] < shades[-1][1]
    description = root.find("desc")
    assert description is not None and "layer 3: " in (description.text or "")


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, 0.0], ids=str)
def test_a_cell_without_a_number_is_left_blank_or_lightest(bad: float | None) -> None:
    root = drawn(heat_chart("t", ["0"], ["0", "1", "2"], [[bad, 0.1, 0.2]], "head", "layer", "<unit>"))
    blank, low, high = (opacity(rect) for rect in root.iter("rect") if rect.find("title") is not None)
    assert blank == (low if bad == 0.0 else 0.0) and 0 < low < high <= 0.55
    assert heat_chart("t", ["0"], ["0"], [[bad]], "head", "layer", "u") is None


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (10, 12), (80, 64)], ids=lambda n: str(n))
def test_labels_of_a_heat_map_never_touch(rows: int, columns: int) -> None:
    values: list[list[float | None]] = [[1e-3 * (i + 1) * (j + 1) for j in range(columns)] for i in range(rows)]
    root = drawn(heat_chart("t", [str(i) for i in range(rows)], [str(j) for j in range(columns)], values, "head", "layer", "error"))
    ends = [e for e in root.iter("text") if e.get("class") == "tick"]
    beside = [float(e.attrib["y"]) for e in ends if e.get("text-anchor") == "end"][:-1]  # the last one names the scale
    below = [float(e.attrib["x"]) for e in ends if e.get("text-anchor") == "middle"]
    assert all(b - a >= 16.9 for a, b in zip(beside, beside[1:], strict=False)) and len(beside) >= min(rows, 12)
    assert all(b - a >= 25.9 for a, b in zip(below, below[1:], strict=False)) and len(below) >= min(columns, 8)
    right = max(float(r.attrib["x"]) + float(r.attrib["width"]) for r in root.iter("rect"))
    assert right <= WIDTH - RIGHT and len(tips(root)) == rows * columns


# --- hardness ----------------------------------------------------------------------------------------------------------


def test_the_hardness_figure_has_a_mark_for_every_head_with_samples() -> None:
    report = samples.report()
    heads = longest(report)[0]["heads"]
    heads[0] |= {"cv_measured": 5 * heads[0]["cv_predicted"], "cv_seeds": [5 * heads[0]["cv_predicted"]] * 5}
    heads[1]["cv_predicted"] = None
    chart = charts(report)["hardness"]
    told = marks(drawn(chart))
    every = [(row["layer"], head) for row in longest(report) for head in row["heads"] if head["cv_predicted"]]
    assert len(told) == len(every) == 7
    for layer, head in every:
        (tip,) = [tip for tip in told if tip.startswith(f"layer {layer}, head {head['head']}: ")]
        assert numbers(tip)[2:4] == pytest.approx([head["cv_predicted"], head["cv_measured"]], rel=0.01)
    assert chart is not None and [name for name, _ in chart.legend] == ["heads", OFF, "as predicted"]


@pytest.mark.parametrize(
    ("predicted", "seeds", "marked"),
    [
        (0.01, [0.021, 0.03, 0.025, 0.04, 0.022], True),
        (0.01, [0.019, 0.3, 0.3, 0.3, 0.3], False),  # one seed as it should be: heavy keys that the others drew
        (0.01, [0.001] * 5, False),  # heavy keys that no seed drew
        (1e-6, [5e-5] * 5, False),  # rounding
        (1e-6, [2e-4] * 5, True),
        (0.01, None, False),  # an older report
    ],
    ids=["every seed", "four seeds", "too little", "rounding", "above rounding", "older"],
)
def test_a_head_is_marked_only_where_chance_does_not_explain_it(predicted: float, seeds: list[float] | None, marked: bool) -> None:
    report = samples.report()
    for row in report["layers"]:
        for head in row["heads"]:
            head |= {"cv_predicted": predicted, "cv_measured": max(seeds or [0.01]), "cv_seeds": seeds}
    chart = charts(report)["hardness"]
    assert chart is not None and (OFF in dict(chart.legend)) == marked and ("heads" in dict(chart.legend)) != marked


def test_no_samples_no_hardness_figure() -> None:
    report = samples.report()
    for row in report["layers"]:
        for head in row["heads"]:
            head["cv_predicted"] = head["cv_measured"] = None
    assert charts(report)["hardness"] is None
    assert "as five seeds show it, against" not in page(report).text and "Error of every head" in render(report, "report.html.jinja")


def test_on_the_diagonal_both_are_equal() -> None:
    points = [Point(0.01, 0.01, "low"), Point(0.3, 0.3, "high"), Point(0.02, 0.2, "above"), Point(0.2, 0.02, "below")]
    root = drawn(scatter_chart("t", [Group("a", points, 1)], "x", "y", diagonal="equal"))
    (line,) = [e for e in root.iter("line") if e.get("class") == "zero"]
    x1, y1, x2, y2 = (float(line.attrib[key]) for key in ("x1", "y1", "x2", "y2"))
    at = marks(root)
    for name, (x, y) in at.items():
        on = y1 + (x - x1) / (x2 - x1) * (y2 - y1)
        assert {"low": abs(y - on) < 0.1, "high": abs(y - on) < 0.1, "above": y < on - 5, "below": y > on + 5}[name]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0], ids=str)
def test_a_scatter_draws_only_numbers_with_a_logarithm(bad: float) -> None:
    good = Point(2.0, 3.0, "good")
    groups = [Group("a", [good, Point(bad, 1.0, "x"), Point(1.0, bad, "y")], 1), Group("b", [Point(bad, bad, "z")], 2)]
    chart = scatter_chart("t", groups, "x", "y")
    assert tips(drawn(chart)) == ["good"] and chart is not None and [name for name, _ in chart.legend] == ["a"]
    assert scatter_chart("t", groups[1:], "x", "y") is None and scatter_chart("t", [], "x", "y") is None


@pytest.mark.parametrize("rightmost", [16384, 17000, 19000, 20500], ids=str)
def test_every_text_below_a_scatter_lies_within_the_figure(rightmost: int) -> None:
    """With the letters as wide as they are on a phone."""
    points = [Point(1144.0, 0.07, "short"), Point(1408.0, 0.08, "long")]
    root = drawn(scatter_chart("t", [Group("a", points, 1)], "keys a query", "relative L2", upright=(rightmost, "exact")))
    below = [t for t in root.iter("text") if t.get("class") == "tick" and t.get("text-anchor") == "middle"]
    assert "10,000" in [t.text for t in below]
    assert all(float(t.attrib["x"]) + 8 * len(t.text or "") / 2 <= WIDTH for t in below)


# --- keys per query ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["language", "features"])
def test_the_cost_figure_says_what_the_json_says(kind: str) -> None:
    report = samples.report(kind)
    root = drawn(charts(report)["cost"])
    told = tips(root)
    for row in report["baseline"]:
        for name, keys, error in (("ours", "keys_per_query_ours", "ours_layers"), ("window + sinks", "keys_per_query", "layers")):
            mean = row[f"{error}_relative_l2"]["mean"]
            assert f"{name}, {row['length']:,} tokens: {row[keys]:,.0f} keys, relative L2 {mean:.3g}" in told
    assert len(told) == 2 * len(report["baseline"]) and any(e.text == "exact at 32,768: no error" for e in root.iter("text"))
    (line,) = [e for e in root.iter("line") if e.get("class") == "zero"]
    assert all(LEFT <= x < float(line.attrib["x1"]) <= WIDTH - RIGHT for x, _ in marks(root).values())
    assert charts(samples.report(kind, baseline=[]))["cost"] is None


def test_the_policy_is_a_figure_and_tables() -> None:
    report = samples.with_policy()
    policy = report["plan"]["policy"]
    root = drawn(charts(report)["policy"])
    at = marks(root)
    (ring,) = [e for e in root.iter("circle") if e.get("r") == "9"]
    chosen, unseen = [tip for tip in at if tip.startswith("this policy")]
    assert unseen.startswith("this policy, on the text of this report") and numbers(unseen)[1] == pytest.approx(0.00097)
    assert place(ring) == at[chosen] and numbers(chosen) == [1701, 0.00039]
    frontier = [tip for tip in at if tip.startswith("predicted: ")]
    told = [point for point in policy["pareto"] if point["predicted_kl"] >= 0.00039e-3]  # the rest would flatten the figure
    assert [numbers(tip) for tip in frontier] == [pytest.approx([p["keys"], p["predicted_kl"]], rel=0.01) for p in told]
    assert 0 < len(told) < len(policy["pareto"])
    found = page(report)
    (rows,) = [table[1:] for table in found.tables if table[0][0] == "Setting"]
    assert [row[0] for row in rows[:2]] == ["this policy", "this policy, on the text of this report"]
    close = {key: report["approximation"][0][key]["kl"]["mean"] for key in ("all_positions", "prefill_exact_decode")}
    assert [numbers(rows[1][i])[0] for i in (3, 5)] == pytest.approx(list(close.values()), rel=0.05) and rows[1][7] == "–"
    assert rows[2][0].startswith("all layers: blocks, local ")
    told = [line.strip("| ").split(" | ") for line in render(report, "report.md.jinja").splitlines() if line.startswith("| this policy")]
    assert [[row[0], row[3], f"{row[4]} exp {row[5]}", row[6], f"{row[7]} exp {row[8]}"] for row in told] == [
        [r[0], *r[3:7]] for r in rows[:2]
    ]
    del rows[1]
    floor, kl = rows.pop(), policy["rounding"]["prefill_exact_decode"]["kl"]["mean"]
    assert floor[0].endswith(": rounding") and numbers(floor[5])[0] == pytest.approx(kl, rel=0.05)
    assert "Attention of all layers took 31.5 ms there, exact 96.0 ms" in found.text
    for row, of in zip(rows, [policy, *policy["fixed"]], strict=True):
        tail = of["verified"]["prefill_exact_decode"]
        values = [of["keys"], of["predicted_kl"], of["verified"]["all_positions"]["kl"]["mean"], tail["kl"]["mean"], 0.9844]
        assert [numbers(row[i])[0] for i in (1, 2, 3, 5, 7)] == pytest.approx(values, rel=0.05)
        losses = [of["verified"][regime]["delta_nats"]["mean"] for regime in ("all_positions", "prefill_exact_decode")]
        assert [numbers(row[i])[2] for i in (4, 6)] == pytest.approx([math.exp(loss) for loss in losses], abs=6e-6)
    layers = found.table("Layer", "Setting")
    assert [row[1] == "exact" for row in layers] == [False, False, True, False]
    (frontier_rows,) = [table[1:] for table in found.tables if table[0] == ["Keys a query", "Predicted KL"]]
    assert [numbers(row[0]) for row in frontier_rows] == [[point["keys"]] for point in policy["pareto"]]
    assert "nats ≤ 0.005, needle ≥ 0.98 in both regimes" in found.text
    (equal,) = [table[1:] for table in found.tables if table[0][0] == "At equal keys"]
    judged = policy["rivals"]
    for row, of in zip(equal, [{**policy, "verified": judged["policy"]}, *judged["rows"]], strict=True):
        regimes = [of["verified"][regime]["kl"]["mean"] for regime in ("all_positions", "prefill_exact_decode")]
        assert [numbers(row[i])[0] for i in (1, 3, 5, 7)] == pytest.approx([of["keys"], *regimes, 0.9844], rel=0.05)
        assert any(tip.startswith(row[0]) for tip in at)
    assert equal[0][0].startswith("on text that the search has not read") and equal[2][2] == "–"
    assert "196,607 to 786,432" in found.text and "196,607 to 786,432" in render(report, "report.md.jinja")
    note = f"Not as it was measured: {report['plan']['policy_notes'][0]}."
    assert note in found.text and note in render(report, "report.md.jinja")


def test_a_policy_of_one_regime_shows_that_one() -> None:
    report = samples.with_policy()
    policy = report["plan"]["policy"]
    policy["budget"] = {"nats": 0.005, "regime": "prefill_exact_decode"}
    policy["rivals"] = None
    for of in (policy, *policy["fixed"]):
        del of["verified"]["all_positions"]
        of["verified"]["needle"] = None
    policy["calibration"]["length"] = 4096  # which the report did not read
    (chosen,) = [tip for tip in marks(drawn(charts(report)["policy"])) if tip.startswith("this policy")]
    assert numbers(chosen) == [1701, 0.00013]
    (row,) = [table[1] for table in page(report).tables if table[0][0] == "Setting"]
    assert row[3] == row[4] == "–" and len(row) == 7
    assert charts(samples.report())["policy"] is None and "the policy" not in page(samples.report()).text


# --- planted keys, first screen ----------------------------------------------------------------------------------------


def test_columns_of_a_grid_are_named_as_far_as_there_is_room() -> None:
    columns = ["8k", "12,345", "32k", "100,001"]
    panels = [Panel(name, columns, [[0.5] * 4]) for name in ("exact", "all positions", "prefill")]
    root = drawn(grid_chart("t", ["0.5"], panels, "tokens", "depth"))
    named = [(float(e.attrib["x"]), e.text or "") for e in root.iter("text") if e.text in columns]
    assert {text for _, text in named} >= {"100,001"} and len(named) == 6
    for (a, first), (b, last) in zip(named[::2], named[1::2], strict=True):  # of each panel
        assert (first, last) == ("8k", "100,001") and b - a >= 9 * len(last)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([1.0, 1.0, 1.0], "faster at every length measured; the break-even, below, was not measured"),
        ([9.9, 1.0, 1.0], "break-even measured between 8,192 (not faster) and 12,345"),
        ([1.0, 1.0, 9.9], "not faster at 32,768, the longest; the break-even was not measured"),
        ([], "no time beside exact attention"),
    ],
    ids=["always", "between", "never", "not timed"],
)
def test_the_first_screen_says_where_the_break_even_lies(times: list[float], says: str) -> None:
    rows = [{**row, "ours_s": row["exact_s"] * ours / 2} for row, ours in zip(samples.report()["time"], times)]
    above = render(samples.report(time=rows), "report.html.jinja").split("<h2>")[0]
    assert says in above


# --- by position -------------------------------------------------------------------------------------------------------


def test_the_tables_by_position_have_both_regimes() -> None:
    report = samples.report("language")
    tables = [t for t in page(report).tables if t[0] == ["From position", "To", "Delta nats", "exp(delta nats)", "KL", "Top-1"]]
    last = report["approximation"][-1]["by_position"]
    for table, regime in zip(tables, ("prefill_exact_decode", "all_positions"), strict=True):
        for row, bucket in zip(table[1:], last[regime], strict=True):
            assert numbers(row.pop(3)) == pytest.approx([math.exp(bucket["delta_nats"])], abs=6e-6)
            for cell, key in zip(row, ("from", "to", "delta_nats", "kl", "top1"), strict=True):
                assert numbers(cell) == pytest.approx([bucket[key]], rel=0.01), key


# --- look-ahead --------------------------------------------------------------------------------------------------------


def moved_report() -> dict:
    """A report whose look-ahead test names the rows that moved."""
    report = samples.report()
    for rows in (report["look_ahead"]["op"], report["look_ahead"]["model"]):
        for row in rows:
            row["attributes"] = {"local_size": 2048, "block_size": 128}
        rows[1]["places"] += [
            {**rows[1]["places"][0], "row": 4095, "moved": 0, "farthest": 0, "largest_change": 0.0, "rows": [], "runs": []}
        ]
        rows[1]["places"][0] |= {"moved": 61, "runs": [[8130, 8189], [8190, 8190]]}
        rows[1]["places"][0]["rows"] = [{"row": 8190 - n, "change": 0.31 - n / 100} for n in range(8)]
        rows[3]["places"][0] |= {"moved": 900, "runs": [[4098, 4100]]}
    return report


def test_the_rows_that_moved_are_told_for_every_place() -> None:
    report = moved_report()
    found = page(report)
    told = [table for table in found.tables if table[0][-2:] == ["Which", "Most (change)"]]
    assert [table[0][1] for table in told] == ["Row changed", "Token changed"]
    for table, key in zip(told, ("op", "model"), strict=True):
        every = [(row["selector"], place) for row in report["look_ahead"][key] if row["farthest"] for place in row["places"]]
        assert len(table) == 1 + len(every) == 4
        for cells, (selector, place) in zip(table[1:], every, strict=True):
            assert (cells[0], cells[2]) == (selector, place["place"])
            values = [place[name] for name in ("row", "moved", "farthest", "largest_change")]
            assert numbers(" ".join([cells[1], *cells[3:6]])) == pytest.approx(values, rel=0.06)
        assert [cells[6] for cells in table[1:]] == ["8,130 to 8,189, 8,190", "–", "4,098 to 4,100, …"]
        assert table[2][7] == "–" and numbers(table[1][7]) == pytest.approx([8190, 0.31, 8189, 0.3, 8188, 0.29, 8187, 0.28])
    assert found.text.count("None, at any place: exact; blocks, strict.") == 2
    text = render(report, "report.md.jinja")
    assert text.count("| 8,130 to 8,189, 8,190 |") == text.count("| 4,098 to 4,100, … |") == 2
    for said in (text, found.text):
        assert "local 2,048, query blocks of 128" in said


def test_a_report_without_runs_of_rows_has_a_dash() -> None:
    (_, first, _) = next(table for table in page(samples.report()).tables if "Row changed" in table[0])
    assert first[6] == "–" and numbers(first[7]) == [8130, 0.31]
