"""The report's page, figures and Markdown: well-formed, readable, nothing fetched, and every number that of the JSON."""

from __future__ import annotations

import copy
import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
import report_samples as samples
from report_page import Page, numbers, page

from hyperattention.export.gate_options import Limits
from hyperattention.validate import report as report_module
from hyperattention.validate.charts import charts, row_histogram
from hyperattention.validate.grid_plot import Panel, grid_chart
from hyperattention.validate.report import render

KINDS = ("language", "features")
CSS = (report_module.TEMPLATES / "report.css").read_text(encoding="utf-8")
NASTY = "<script>alert(1)</script> \"'& |\n# <b>x"
FOREIGN = ("name", "case", "notes", "found", "reason", "backend", "source", "processor")


def close(texts: str, values: list[float]) -> None:
    """The numbers of a cell are the values, as far as its digits go."""
    assert numbers(texts) == pytest.approx(values, rel=0.06, abs=6e-6), texts


def replaced(value: object, found: tuple[str, ...] = FOREIGN) -> object:
    """The report with every text that comes from a user's model, file or machine made hostile."""
    if isinstance(value, dict):
        return {k: NASTY if k in found and isinstance(v, str) else replaced([NASTY] if k in found else v, found) for k, v in value.items()}
    return [replaced(v, found) for v in value] if isinstance(value, list) else value


# --- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_well_formed_and_fetches_nothing(kind: str) -> None:
    html = render(samples.report(kind), "report.html.jinja")
    found = Page(html)
    assert not re.search(r"""\b(src|href|action|srcset)\s*=|url\(|@import|https?:|//[a-z]""", html.replace("// ", ""))
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in found.tags
    figures = [svg for svg in found.svgs if svg.get("class") != "swatch"]
    assert len(figures) == sum(chart is not None for chart in charts(samples.report(kind)).values()) == (13 if kind == "language" else 9)
    for svg in figures:
        title, description = svg.find("title"), svg.find("desc")
        assert svg.get("role") == "img" and title is not None and svg.get("aria-label") == title.text
        assert description is not None and re.search(r"\d", description.text or "")
    assert found.text.count("Safe?") == found.text.count("How much faster?") == found.text.count("From which length?") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_screen_answers(kind: str) -> None:
    good = samples.report(kind)
    html = render(good, "report.html.jinja")
    above = html[: html.index("<h2>")]
    for said in (
        good["verdict"]["headline"],
        good["verdict"]["speed"],
        "<strong>Yes</strong>",
        "<strong>4.13×</strong>",
        "<strong>8,192</strong>",
    ):
        assert said in above
    bad = samples.report(kind, Limits(op_error=0.0), time=[])
    above = render(bad, "report.html.jinja").split("<h2>")[0]
    for said in ("<strong>No</strong>", "failed: op error", "<strong>Not measured</strong>", 'class="verdict bad"'):
        assert said in above
    open_ = samples.report(kind, inputs={**good["inputs"], "kind": "random"})
    above = render(open_, "report.html.jinja").split("<h2>")[0]
    assert 'class="verdict open"' in above and "<strong>Not judged</strong>" in above and "Not judged on" in above


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_screen_claims_no_speed_where_nothing_approximates(kind: str) -> None:
    report = samples.exact_report([], kind)
    above = render(report, "report.html.jinja").split("<h2>")[0]
    assert "<strong>Nothing approximated</strong>" in above and "<strong>None</strong><small>no layer approximates</small>" in above
    assert "4.13× at 32,768 tokens is the runtime" in above and report["verdict"]["speed"].replace("'", "&#39;") in above
    assert "<strong>4.13×" not in above and "faster from" not in above
    assert report["verdict"]["speed"] in render(report, "report.md.jinja")


def test_the_order_is_that_of_interest() -> None:
    text = page(samples.report()).text
    order = [
        "Safe at",
        "Gates",
        "Error against length",
        "Time against length",
        "Layer by layer",
        "Beside a window",
        "Inputs that hurt",
        "What ran",
    ]
    assert sorted(order, key=text.index) == order
    for said in ("fp32 twin of the bf16 target", "sha256", "Seeds", "held-out text", "standard error", "A note."):
        assert said in text


@pytest.mark.parametrize("kind", KINDS)
def test_tables_say_what_the_json_says(kind: str) -> None:
    report = samples.report(kind)
    found = page(report)
    for row, gate in zip(found.table("Gate", "Worst value"), report["gates"], strict=True):
        assert row[0].startswith(gate["name"]) and row[4] == gate["where"] and ("pass" in row[1]) == gate["passed"]
        close(row[2], [gate["value"], *([gate["se"]] if gate["se"] is not None else [])])
        close(row[3], [gate["limit"]])
    for row, time in zip(found.table("Tokens", "PyTorch exact"), report["time"], strict=True):
        assert numbers(row[0]) == [time["length"]]
        for cell, key in zip(row[2:5], ("ours_s", "exact_s", "torch_exact_s"), strict=True):
            close(cell, [time[key]])
        close(row[5], [min(time["exact_s"], time["torch_exact_s"]) / time["ours_s"]])
    for row, hard in zip(found.table("Input", "Judged"), report["hard_inputs"], strict=True):
        assert row[0].startswith(hard["distribution"]) and ("pass" in row[1]) == hard["passed"]
        close(row[3], [hard["value"], hard["limit"]])
        close(row[4], list(hard["ours"]["relative_l2"].values()))
    baseline = found.table("Attention", "Keys a query")
    for ours, window, row in zip(baseline[::2], baseline[1::2], report["baseline"], strict=True):
        close(ours[2] + " " + ours[3], [row["keys_per_query_ours"], row["ours_layers_relative_l2"]["mean"]])
        close(window[2] + " " + window[3], [row["keys_per_query"], row["layers_relative_l2"]["mean"]])


def test_token_tables_say_what_the_json_says() -> None:
    report = samples.report()
    heads = ["Tokens", "Delta nats", "KL", "Same first choice", "Exact nats", "exp(nats), exact", "exp(nats), ours", "Windows"]
    tables = [t for t in page(report).tables if t[0] == heads]
    assert len(tables) == 2
    for table, regime in zip(tables, ("prefill_exact_decode", "all_positions"), strict=True):
        for row, length in zip(table[1:], report["approximation"], strict=True):
            told = length[regime]
            assert numbers(row[0]) == [length["length"]]
            for cell, key in zip(row[1:5], ("delta_nats", "kl", "top1", "exact_nats"), strict=True):
                close(cell, [told[key]["mean"], told[key]["se"]])
            exact, added = (math.exp(told[key]["mean"]) for key in ("exact_nats", "delta_nats"))
            assert numbers(f"{row[5]} {row[6]}") == pytest.approx([exact, exact * added], abs=6e-5)


def test_the_window_of_equal_cost_stands_beside_ours_in_both_regimes() -> None:
    report = samples.report()
    heads = ["Tokens", "Attention", "Delta nats", "exp(delta nats)", "KL", "Same first choice", "Windows"]
    shown = [t[1:] for t in page(report).tables if t[0] == heads]
    lines = [line.strip("| ").split(" | ") for line in render(report, "report.md.jinja").splitlines()]
    starts = [i + 2 for i, line in enumerate(lines) if line[:4] == ["tokens", "attention", "delta nats", "exp(delta nats)"]]
    assert [lines[start : start + 6] for start in starts] == shown
    for table, regime in zip(shown, ("prefill_exact_decode", "all_positions"), strict=True):
        beside = [row if regime == "prefill_exact_decode" else row["all_positions"] for row in report["baseline"]]
        ours = [row[regime] for row in report["approximation"]]
        for cells, told in zip(table, [of for pair in zip(ours, beside, strict=True) for of in pair], strict=True):
            for i, key in ((2, "delta_nats"), (4, "kl"), (5, "top1")):
                close(cells[i], [told[key]["mean"], told[key]["se"]])
            assert numbers(cells[3]) == pytest.approx([math.exp(told["delta_nats"]["mean"])], abs=6e-6)
            assert numbers(cells[6]) == [told["windows"]]
    del report["baseline"][0]["all_positions"]
    (rows,) = [t[1:] for t in page(report).tables if t[0] == heads and t[2][2] == "not measured"]
    assert [row[1:] for row in rows[:2]] == [rows[0][1:], ["window + sinks", "not measured"]] and len(rows[0]) == 7


def test_the_needle_tables_and_grids_say_what_the_json_says() -> None:
    report, cells = samples.report(), ("exact", "all_positions", "prefill_exact_decode")
    found, rows = page(report), report["needle"]["rows"]
    for told, row in zip(found.table("Kind", "Keys", "Tokens"), rows, strict=True):
        assert (told[0], numbers(told[1]), numbers(told[2])) == (row["kind"], [row["keys"]], [row["length"]])
        for cell, key in zip(told[3:], cells, strict=True):
            close(cell, [row[key]["mean"], row[key]["se"]])
    every = [(row, depth) for row in rows for depth in row["depths"]]
    for told, (row, depth) in zip(found.table("Kind", "Depth"), every, strict=True):
        assert (told[0], numbers(told[1]), numbers(told[2])) == (row["kind"], [row["length"]], [depth["depth"]])
        for cell, key in zip(told[3:], cells, strict=True):
            close(cell, [depth[key]["mean"], depth[key]["se"]])
    for kind in ("single", "multi-key"):
        chart = charts(report)[f"needle {kind}"]
        assert chart is not None
        drawn = [e.text or "" for e in ElementTree.fromstring(chart.svg).iter("title")][1:]
        lengths = zip([row for row in rows if row["kind"] == kind], ("8k", "12,345", "32k"), strict=True)
        shares = {(length, depth["depth"]): depth for row, length in lengths for depth in row["depths"]}
        names = zip(("exact", "all positions", "prefill"), cells, strict=True)
        told = {f"{name}, {n}, {at:g}: {100 * cell[key]['mean']:.1f} %" for name, key in names for (n, at), cell in shares.items()}
        assert len(drawn) == len(told) == 27 and set(drawn) == told


def test_a_report_without_planted_keys_has_no_grid() -> None:
    found = samples.report(needle=None)
    assert "planted" not in page(found).text and "planted" not in render(found, "report.md.jinja")
    assert charts(found)["needle single"] is None


@pytest.mark.parametrize("bad", [math.nan, -0.5, 7.0], ids=str)
def test_a_share_that_is_none_breaks_no_grid(bad: float) -> None:
    chart = grid_chart("t", ["0.5"], [Panel("<p>", ["8k"], [[bad]]), Panel("q", [], [[]])], "tokens", "depth")
    assert chart is not None
    (box,) = list(ElementTree.fromstring(chart.svg).iter("rect"))
    style = dict(part.split(":") for part in box.attrib["style"].split(";"))
    assert 0 <= float(style["fill-opacity"]) <= 0.5 and ("not measured" in chart.svg) == math.isnan(bad)
    assert grid_chart("t", [], [Panel("p", ["8k"], [])], "tokens", "depth") is None


def test_feature_tables_say_what_the_json_says() -> None:
    report = samples.report("features")
    told = [(row["length"], output) for row in report["approximation"] for output in row["outputs"]]
    for row, (length, output) in zip(page(report).table("Output", "Worst cosine"), told, strict=True):
        assert numbers(row[0]) == [length] and row[1] == output["name"]
        for cell, key in ((row[2], "relative_l2"), (row[3], "cosine"), (row[5], "norm_ratio")):
            close(cell, [output[key]["mean"], output[key]["se"]])
        close(row[4], [output["cosine_worst"]])


def test_the_layer_table_holds_every_layer_and_every_length() -> None:
    report = samples.report()
    tables = [t for t in page(report).tables if "LSE bias" in t[0] and t[0][0] == "Layer"]
    assert [[row[0] for row in t[1:]] for t in tables] == [["0", "1", "2", "3"], ["1", "3"], ["1", "3"]]
    for table, length in zip(tables, (32768, 8192, 12345), strict=True):
        for row in table[1:]:
            found = [x for x in report["layers"] if (str(x["layer"]), x["length"]) == (row[0], length)]
            if not found:
                assert row[1] == "exact" and row[2] == "not chosen by --layers odd"
                continue
            (layer,) = found
            close(row[2], [layer["relative_l2"]])
            close(row[3].replace("–", " "), [min(layer["seeds"]["relative_l2"]), max(layer["seeds"]["relative_l2"])])
            keys = ("window_relative_l2", "cosine", "norm_ratio", "lse_bias", "lse_std", "mass")
            for cell, key in zip(row[4:10], keys, strict=True):
                close(cell, [layer[key]])
            close(row[10], [layer["worst_head"], layer["worst_head_relative_l2"]])


HEAD_KEYS = tuple("relative_l2 mass top16_recall log_kappa_p1_p99 alpha_blocks alpha_without_first_32 cv_predicted cv_measured".split())


def test_the_head_tables_say_what_the_json_says() -> None:
    report = samples.report()
    longest = [row for row in report["layers"] if row["length"] == 32768]
    every = sorted(((row["layer"], head) for row in longest for head in row["heads"]), key=lambda pair: -pair[1]["relative_l2"])
    shown = page(report).table("Head", "Recall")
    markdown = [line.strip("|").split("|") for line in render(report, "report.md.jinja").splitlines()]
    start = next(i for i, cells in enumerate(markdown) if [cell.strip() for cell in cells[:2]] == ["layer", "head"]) + 2
    for table in (shown, markdown[start : start + len(every)]):
        for row, (layer, head) in zip(table, every, strict=True):
            assert [int(cell) for cell in row[:2]] == [layer, head["head"]]
            close(row[3], [min(head["seeds"]["relative_l2"]), max(head["seeds"]["relative_l2"])])
            for cell, key in zip([row[2], *row[4:]], HEAD_KEYS, strict=True):
                close(cell, [head[key]])


def test_of_many_heads_the_worst_are_shown() -> None:
    report = samples.report()
    row = report["layers"][-1]
    row["heads"] = [{**row["heads"][0], "head": n, "relative_l2": n / 1000, "alpha_blocks": None, "cv_predicted": None} for n in range(100)]
    row["heads"][3]["relative_l2"] = math.nan
    found = page(report)
    rows = found.table("Head", "Recall")
    assert len(rows) == 64 and rows[0][1:3] == ["3", "nan"] and "The 64 of 104 heads" in found.text
    assert ["99", "0.0990"] in [told[1:3] for told in rows] and rows[0][7] == rows[0][9] == "–"
    assert "The 16 of 104 heads, the largest error first" in render(report, "report.md.jinja")


def test_the_histogram_counts_every_row_of_the_longest_length() -> None:
    report = samples.report()
    histogram = row_histogram(report)
    assert histogram is not None
    counts = [row["row_errors"]["counts"] for row in report["layers"] if row["length"] == 32768]
    assert histogram["counts"] == [a + b for a, b in zip(*counts, strict=True)] and histogram["rows"] == sum(map(sum, counts))
    below = [edge for edge in samples.EDGES[1:] if sum(histogram["counts"][: samples.EDGES.index(edge)]) >= histogram["rows"] / 2]
    assert histogram["median"] == below[0]
    table = page(report).table("Relative L2 of a row", "Rows")
    assert [numbers(row[1]) for row in table] == [[n] for n in histogram["counts"]]
    other = copy.deepcopy(report)
    other["layers"][-1]["row_errors"] = {"edges": [0.1, 1.0], "counts": [4]}
    assert row_histogram(other) is None and "No row errors were measured" in page(other).text


def test_figures_draw_what_the_json_says() -> None:
    report = samples.report()
    drawn = {name: " ".join(title.text or "" for title in ElementTree.fromstring(chart.svg).iter("title"))
             for name, chart in charts(report).items() if chart}  # fmt: skip
    for row in report["approximation"]:
        tail, everywhere = row["prefill_exact_decode"], row["all_positions"]
        assert f"prefill, exact decode, {row['length']:,} tokens: {tail['delta_nats']['mean']:.4g}" in drawn["nats"]
        assert f"all positions, {row['length']:,} tokens: {everywhere['kl']['mean']:.4g}" in drawn["kl"]
    for row in report["time"]:
        assert f"PyTorch exact, {row['length']:,} tokens: {row['torch_exact_s']:.4g}" in drawn["time"]
    for row in report["baseline"]:
        assert f"window + sinks, {row['length']:,} tokens: {row['layers_relative_l2']['mean']:.4g}" in drawn["layers"]
        errors = [x["seeds"]["relative_l2"] for x in report["layers"] if x["length"] == row["length"]]
        seeds = [sum(draw) / len(errors) for draw in zip(*errors, strict=True)]
        told = f"ours, {row['length']:,} tokens: {sum(seeds) / 5:.4g} ({min(seeds):.3g} to {max(seeds):.3g})"
        assert told in drawn["layers"]
    for row in report["hard_inputs"]:
        assert f"{row['distribution']}, ours: {row['ours']['relative_l2']['mean']:.4g}" in drawn["hard"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("time", "Time was not measured."),
        ("layers", "No layer approximates at the lengths measured"),
        ("baseline", "No baseline was measured."),
        ("hard_inputs", "Hard inputs were not measured."),
        ("provenance", "No runner left a record of what ran."),
    ],
)
def test_a_missing_part_is_a_sentence(kind: str, part: str, says: str) -> None:
    emptied: dict[str, Any] = {part: []}
    report = samples.report(kind, **emptied)
    assert says in page(report).text
    text = render(report, "report.md.jinja")
    assert part == "provenance" or "not measured" in text.lower() or "No " in text


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_break_no_figure(kind: str) -> None:
    def spoiled(value: object, bad: float) -> object:
        if isinstance(value, dict):
            return {k: v if k in ("edges", "length", "from", "to", "limits") else spoiled(v, bad) for k, v in value.items()}
        return [spoiled(v, bad) for v in value] if isinstance(value, list) else bad if isinstance(value, float) else value

    report = samples.report(kind)
    for bad in (math.nan, math.inf, 0.0, -1.0):
        parts: dict[str, Any] = {
            name: spoiled(report[name], bad) for name in ("approximation", "layers", "baseline", "hard_inputs", "time", "needle")
        }
        for svg in page(samples.report(kind, **parts)).svgs:
            drawn = [
                v for e in svg.iter() for k, v in e.attrib.items() if k in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "points", "width")
            ]
            assert not re.search("nan|inf", " ".join(drawn))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_from_outside_stay_text(kind: str) -> None:
    hostile = replaced(samples.report(kind))
    assert isinstance(hostile, dict)
    html = render(hostile, "report.html.jinja")
    assert html.count("<script>") == 1 and "<b>x" not in html
    assert "<script>alert(1)</script>" in Page(html).text
    lines = render(hostile, "report.md.jinja").splitlines()
    assert not any(line.startswith("# <b>") for line in lines) and "<script>" not in "".join(lines)
    tables = [line for line in lines if line.startswith("| ")]
    assert all(line.endswith(("|", "| ")) for line in tables)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(scheme: str) -> None:
    """WCAG's contrast of at least 4.5 for text and 3 for lines, from the style's own colours."""
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.S)
    found = dict(re.findall(r"--([\w-]+): #([0-9a-f]{6,8});", blocks[0] if scheme == "light" else blocks[1]))
    colours = {name: [value / 255 for value in bytes.fromhex(text)] for name, text in found.items()}

    def luminance(name: str) -> float:
        # What is not opaque lies on a card.
        *own, share = colours[name] if len(colours[name]) == 4 else [*colours[name], 1.0]
        channels = [share * c + (1 - share) * below for c, below in zip(own, colours["card"], strict=True)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    grounds = ("ground", "card", "head", "good-ground", "bad-ground", "open-ground")
    pairs = [(ink, ground) for ink in ("ink", "quiet") for ground in grounds]
    pairs += [(name, f"{name}-ground") for name in ("good", "bad", "open")] + [("bad", "card"), ("ink", "tint")]
    assert [(pair, contrast(*pair)) for pair in pairs if contrast(*pair) < 4.5] == []
    assert [n for n in range(1, 5) if contrast(f"series-{n}", "card") < 3] == []


# --- Markdown ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_markdown_says_the_same(kind: str) -> None:
    report = samples.report(kind)
    text = render(report, "report.md.jinja")
    assert text.startswith(f"# {report['verdict']['headline']}") and report["verdict"]["speed"] in text
    tables = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    seen = {tuple(numbers(" ".join(row))) for t in page(report).tables for row in t[1:] if row[0] in ("8,192", "12,345", "32,768")}
    rows = [row for row in tables if row[0] in ("8,192", "12,345", "32,768") and "ours" not in row and "window + sinks" not in row]
    assert len(rows) == (9 if kind == "language" else 9)
    for row in rows:
        assert any(sorted(numbers(" ".join(row))) == sorted(values) or set(numbers(" ".join(row))) <= set(values) for values in seen), row
    for gate in report["gates"]:
        assert any(row[0] == gate["name"] for row in tables)
    for hard in report["hard_inputs"]:
        assert f"| {hard['distribution']}: " in text
