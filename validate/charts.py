"""Which numbers of a report go into which chart; a chart without numbers is None."""

from __future__ import annotations

import math
from statistics import fmean

from hyperattention.export.gate_options import LANGUAGE
from hyperattention.validate.cost_charts import cost_chart, policy_chart
from hyperattention.validate.grid_plot import Panel, grid_chart
from hyperattention.validate.head_charts import hardness, heat
from hyperattention.validate.plots import Chart, Series, Span, bar_chart, line_chart, range_chart, short
from hyperattention.validate.report_format import seconds

OURS, WINDOW = "ours", "window + sinks"
_MOST_SERIES = 4  # colours, shapes


def charts(report: dict) -> dict[str, Chart | None]:
    """Every chart of a report by name."""
    found = {"layers": layer_chart(report), "time": time_chart(report), "rows": row_chart(report), "hard": hard_chart(report)}
    found |= {"heat": heat(report), "hardness": hardness(report), "policy": policy_chart(report), "cost": cost_chart(report)}
    return found | (_token_charts(report) if report["kind"] == LANGUAGE else _feature_charts(report))


def layer_chart(report: dict) -> Chart | None:
    """Relative L2 of the approximate layers' outputs against length: ours with the range of five seeds, and the window, which draws
    nothing, of equal keys."""
    by_length: dict[int, list[list[float]]] = {}
    for row in report["layers"]:
        by_length.setdefault(row["length"], []).append(row["seeds"]["relative_l2"])
    ours = [(n, [fmean(draw) for draw in zip(*rows, strict=True)]) for n, rows in sorted(by_length.items())]
    series = [Series(OURS, [(n, fmean(draws)) for n, draws in ours], 1, [(min(draws), max(draws)) for _, draws in ours])]
    series.append(Series(WINDOW, [(row["length"], row["layers_relative_l2"]["mean"]) for row in report["baseline"]], 3, dashed=True))
    return line_chart("Error of the approximate layers by length", series, "relative L2", True)


def time_chart(report: dict) -> Chart | None:
    """Seconds of one forward pass against length, both logarithmic."""
    series = []
    for key, name, colour in (("ours_s", OURS, 1), ("exact_s", "exact, same backend", 3), ("torch_exact_s", "PyTorch exact", 4)):
        points = [(row["length"], row[key]) for row in sorted(report["time"], key=lambda row: row["length"]) if row.get(key)]
        series.append(Series(name, points, colour, dashed=key == "torch_exact_s"))
    return line_chart("Time of one forward pass by length", series, "", True, tick=seconds)


def row_histogram(report: dict) -> dict | None:
    """Row errors of all approximate layers at the longest length measured: {"length", "edges", "counts", "rows", "median", "p99"}.

    The quantiles are the upper edges of the bins that hold them.
    """
    longest = max((row["length"] for row in report["layers"]), default=None)
    found = [row["row_errors"] for row in report["layers"] if row["length"] == longest]
    if longest is None or len({tuple(h["edges"]) for h in found}) != 1:
        return None
    counts = [sum(bins) for bins in zip(*(h["counts"] for h in found), strict=True)]
    edges, rows = found[0]["edges"], sum(counts)
    if not rows:
        return None

    def quantile(share: float) -> float:
        seen = 0
        for i, n in enumerate(counts):
            seen += n
            if seen >= share * rows:
                return edges[i + 1]
        return edges[-1]

    return {"length": longest, "edges": edges, "counts": counts, "rows": rows, "median": quantile(0.5), "p99": quantile(0.99)}


def hardest_heads(report: dict, most: int = 64) -> dict:
    """At the longest length measured the (layer, row of `heads`) with the largest errors: {"length", "rows", "count": of all heads}."""
    longest = max((row["length"] for row in report["layers"]), default=0)
    every = [(row["layer"], head) for row in report["layers"] if row["length"] == longest for head in row["heads"]]
    errors = [math.inf if math.isnan(head["relative_l2"]) else head["relative_l2"] for _, head in every]
    order = sorted(range(len(every)), key=lambda i: -errors[i])
    return {"length": longest, "rows": [every[i] for i in order[:most]], "count": len(every)}


def row_chart(report: dict) -> Chart | None:
    """How the relative L2 error is spread over the rows of the approximate layers."""
    found = row_histogram(report)
    if found is None:
        return None
    edges, counts = found["edges"], found["counts"]
    bars = [(bin_text(edges, i), 100 * n / found["rows"]) for i, n in enumerate(counts)]
    decades = {i: f"{edge:g}" for i, edge in enumerate(edges) if abs(math.log10(edge) - round(math.log10(edge))) < 1e-6}
    title = f"Errors of single rows at {found['length']:,} tokens"
    return bar_chart(title, bars, "% of rows", "relative L2 of a row", decades)


def bin_text(edges: list[float], i: int) -> str:
    """A bin of a histogram in words; the outer bins hold what lies beyond them as well."""
    if i == 0:
        return f"below {edges[1]:.2g}"
    return f"{edges[i]:.2g} and more" if i == len(edges) - 2 else f"{edges[i]:.2g} to {edges[i + 1]:.2g}"


def hard_chart(report: dict) -> Chart | None:
    """Relative L2 on each hard input at the longest length, ours beside the window."""
    longest = max((row["length"] for row in report["hard_inputs"]), default=None)
    rows = []
    for row in report["hard_inputs"]:
        if row["length"] == longest:
            spans = [(OURS, row["ours"], 1), (WINDOW, row["window"], 3)]
            rows.append((row["distribution"], [_span(name, of["relative_l2"], colour) for name, of, colour in spans if of]))
    return range_chart(f"Error on the hard inputs at {longest:,} tokens", rows, "relative L2 of a layer's output") if rows else None


def _span(name: str, value: dict, colour: int) -> Span:
    return Span(name, value["mean"], value["min"], value["max"], colour)


def _error_band(values: list[dict]) -> list[tuple[float, float]]:
    """mean ± standard error of each estimate; no band where one has no standard error."""
    if any(v["se"] is None for v in values):
        return []
    return [(v["mean"] - v["se"], v["mean"] + v["se"]) for v in values]


_REGIMES = (("prefill_exact_decode", "prefill, exact decode"), ("all_positions", "all positions"))


def _token_charts(report: dict) -> dict[str, Chart | None]:
    rows, limits = report["approximation"], report["limits"]

    def series(key: str) -> list[Series]:
        lines = []
        for colour, (regime, name) in enumerate(_REGIMES, 1):
            found = [(row["length"], row[regime][key]) for row in rows if row[regime]]
            points = [(n, value["mean"]) for n, value in found]
            lines.append(Series(name, points, colour, _error_band([value for _, value in found]), regime == "all_positions"))
        beside = [(row["length"], row[key]) for row in report["baseline"] if row[key] is not None]
        points = [(n, value["mean"]) for n, value in beside]
        lines.append(Series(f"{WINDOW}, prefill", points, 3, _error_band([value for _, value in beside]), True))
        return lines

    longest = rows[-1]
    return {
        "nats": line_chart("Loss added against exact attention by length", series("delta_nats"), "nats", limit=limits["delta_nats"]),
        "kl": line_chart("KL divergence from exact attention by length", series("kl"), "KL, nats", True, limits["kl"]),
        **{f"needle {kind}": needle_chart(report, kind) for kind in ("single", "multi-key")},
        **{f"position {regime}": position_chart(longest, regime, name) for regime, name in _REGIMES},
    }


def position_chart(row: dict, regime: str, name: str) -> Chart | None:
    """Loss added by place in the window, at one length and in one regime."""
    bars = [(short(b["from"]) if i == 0 else short(b["to"]), b["delta_nats"]) for i, b in enumerate(row["by_position"][regime])]
    return bar_chart(f"Loss added by position, {name}, {row['length']:,} tokens", bars, "nats", "position in the window")


def needle_chart(report: dict, kind: str) -> Chart | None:
    """Share of planted digits recalled by depth and length, exact attention beside both regimes, for one kind of prompt."""
    rows = [row for row in report["needle"]["rows"] if row["kind"] == kind] if report["needle"] else []
    depths = [cell["depth"] for cell in rows[0]["depths"]] if rows else []
    columns = [short(row["length"]) for row in rows]
    panels = [
        Panel(name, columns, [[row["depths"][i][regime]["mean"] for row in rows] for i in range(len(depths))])
        for regime, name in (("exact", "exact"), ("all_positions", "all positions"), ("prefill_exact_decode", "prefill"))
    ]
    keys = f"{rows[0]['keys']} keys planted" if rows and rows[0]["keys"] > 1 else "one key planted"
    return grid_chart(f"Recall, {keys}, percent of digits", [f"{depth:g}" for depth in depths], panels, "tokens", "depth")


def _feature_charts(report: dict) -> dict[str, Chart | None]:
    rows = report["approximation"]
    names = list(dict.fromkeys(output["name"] for row in rows for output in row["outputs"]))[:_MOST_SERIES]

    def series(key: str) -> list[Series]:
        lines = []
        for colour, name in enumerate(names, start=1):
            found = [(row["length"], output[key]) for row in rows for output in row["outputs"] if output["name"] == name]
            points = [(n, value["mean"]) for n, value in found]
            lines.append(Series(name, points, colour, _error_band([value for _, value in found]), colour > 1))
        return lines

    return {
        "relative_l2": line_chart("Error of the outputs by length", series("relative_l2"), "relative L2", True),
        "cosine": _cosine_chart(series("cosine"), report["limits"]["cosine"]),
    }


def _cosine_chart(series: list[Series], limit: float) -> Chart | None:
    """1 - cosine, whose logarithm shows what a cosine close to 1 hides."""
    turned = [Series(s.name, [(n, 1 - y) for n, y in s.points], s.colour, [(1 - b, 1 - a) for a, b in s.band], s.dashed) for s in series]
    return line_chart("Distance of the cosine from 1 by length", turned, "1 − cosine", True, 1 - limit)
