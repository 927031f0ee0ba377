"""The arithmetic of the prefill benchmark: rivals, limits, share of the limit, the slope over depths, targets, tables. Needs no GPU.

An engine is a row {"depth", "variant", "approximate": layers that approximate, "tokens", "ms", "plugin_ms"}. Its rest, ms - plugin_ms, is
what no attention kernel can change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench_table import closing, milliseconds, table

DEPTH = 32  # layers of the model that the targets speak of


@dataclass(frozen=True)
class Target:
    """A variant has to be at least `factor` times as fast as the faster of both exact rivals, at DEPTH layers."""

    variant: str
    tokens: int
    factor: float

    def __str__(self) -> str:
        return f"{self.variant}, {self.tokens:,} tokens: at least {self.factor:g}x exact attention"


TARGETS = (Target("half", 32768, 1.15), Target("all", 32768, 1.45), Target("half", 131072, 1.5), Target("all", 131072, 3.2))


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of the least-squares line a + b x through points of at least two different x. Raises ValueError for fewer."""
    x, y = ([float(point[i]) for point in points] for i in range(2))
    mean_x, mean_y = sum(x) / len(x) if x else 0.0, sum(y) / len(y) if y else 0.0
    spread = sum((value - mean_x) ** 2 for value in x)
    if not spread:
        raise ValueError(f"a line needs two different depths, got {sorted(set(x))}")
    slope = sum((u - mean_x) * (v - mean_y) for u, v in zip(x, y, strict=True)) / spread
    return mean_y - slope * mean_x, slope


def extrapolated(rows: Sequence[Mapping[str, Any]], depth: int = DEPTH) -> list[dict[str, Any]]:
    """Rows at `depth` from time(L) = a + b L, for what was measured at two other depths or more and not at this one.

    `from` names the depths, `residual` the largest distance of a measured time from the line, as a share of it (0 for two depths).
    """
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["tokens"]), []).append(row)
    found = []
    for (variant, tokens), group in groups.items():
        depths = sorted({row["depth"] for row in group})
        if depth in depths or len(depths) < 2:
            continue
        lines = {key: line([(row["depth"], row[key]) for row in group]) for key in ("ms", "plugin_ms", "approximate")}
        at = {key: a + b * depth for key, (a, b) in lines.items()}
        a, b = lines["ms"]
        residual = max(abs(row["ms"] / (a + b * row["depth"]) - 1) for row in group)
        place = {"depth": depth, "variant": variant, "tokens": tokens, "from": depths, "residual": residual}
        found.append({**place, **at, "approximate": round(at["approximate"])})
    return found


def compare(rows: Sequence[Mapping[str, Any]], in_model: Mapping[int, float], alone: Mapping[int, float]) -> list[dict[str, Any]]:
    """Every approximate row against the exact ones of its depth and length; FA4's milliseconds of one layer's attention, by length,
    within the model and alone.

    rest_ms: the least that an engine of the two takes beside attention. What has to do with FA4 is as of `against_fa4`: with its time
    within the model, where the plugin's was measured too, and under the same names with `_alone` with its time alone.
    """
    exact = {(row["depth"], row["tokens"]): row for row in rows if row["variant"] == "exact"}
    found = []
    for row in rows:
        rival = exact.get((row["depth"], row["tokens"]))
        if row["variant"] == "exact" or rival is None:
            continue
        rest = min(each["ms"] - each["plugin_ms"] for each in (row, rival))
        result = {**row, "rest_ms": rest, "exact_ms": rival["ms"], "over_exact_engine": rival["ms"] / row["ms"]}
        for kind, fa4 in (("", in_model), ("_alone", alone)):
            result |= {name + kind: value for name, value in against_fa4(result, fa4.get(row["tokens"])).items()}
        found.append(result)
    return found


def against_fa4(row: Mapping[str, Any], layer: float | None) -> dict[str, float | None]:
    """A row of `compare` against an exact engine in which FA4 takes `layer` milliseconds a layer.

    exact_fa4_ms = rest_ms + depth x FA4. `speedup`, the headline, is over the faster of the exact engine and exact_fa4_ms. `limit`:
    exact_fa4_ms with the approximating layers' FA4 time free; `share` = speedup / limit. None where FA4 was not measured: the headline
    needs both rivals.
    """
    if layer is None:
        return dict.fromkeys(("exact_fa4_ms", "over_fa4", "speedup", "limit", "share"))
    total = row["rest_ms"] + row["depth"] * layer
    over, limit = total / row["ms"], total / (total - row["approximate"] * layer)
    speedup = min(over, row["over_exact_engine"])
    return {"exact_fa4_ms": total, "over_fa4": over, "speedup": speedup, "limit": limit, "share": speedup / limit}


def results(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`compare` of all that a report of bench_prefill.py measured, and of what follows from it at DEPTH layers."""
    rows = [
        {**{key: engine[key] for key in ("depth", "variant", "approximate")}, **row}
        for engine in report["engines"]
        for row in engine["rows"]
        if "plugin_ms" in row
    ]
    in_model = {found["tokens"]: found["fa4_ms_in_model"] for found in report["in_model"]}
    return compare([*rows, *extrapolated(rows)], in_model, _alone(report))


def _alone(report: Mapping[str, Any]) -> dict[int, float]:
    return {int(tokens): ms for tokens, ms in report["fa4_ms_alone"].items()}


def check_targets(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each target: its text, the speed-up (None: not measured), the share of the limit, and whether it is met; and least_alone, the
    speed-up by FA4's time alone, which decides nothing.
    """
    at = {(row["variant"], row["tokens"]): row for row in found if row["depth"] == DEPTH}
    checked = []
    for target in TARGETS:
        row = at.get((target.variant, target.tokens), dict.fromkeys(("speedup", "share", "speedup_alone")))
        met = row["speedup"] is not None and row["speedup"] >= target.factor
        least = {"least": row["speedup"], "least_alone": row["speedup_alone"]}
        checked.append({"target": str(target), **least, "share": row["share"], "met": met})
    return checked


def verdict(result: Mapping[str, Any]) -> str:
    """One line on a target."""
    alone = "" if result["least_alone"] is None else f" (by FA4's time alone, the harder figure: {result['least_alone']:.2f}x)"
    if result["least"] is None:
        return f"Not measured: {result['target']}{alone}"
    share = f", {result['share']:.0%} of the limit"
    return f"{'Met' if result['met'] else 'MISSED'}: {result['target']}: {result['least']:.2f}x{share}{alone}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def _depth(row: Mapping[str, Any]) -> str:
    return f"{row['depth']}, from {' and '.join(map(str, row['from']))}" if "from" in row else str(row["depth"])


def speedup_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A row for each depth, length and approximate variant."""
    header = ["layers", "tokens", "variant", "ms", "exact engine", "exact at FA4's speed", "rest"]
    header += ["over the exact engine", "over FA4's speed", "speed-up", "limit", "share of the limit"]
    header += ["speed-up by FA4 alone"]
    lines = (
        [_depth(row), f"{row['tokens']:,}", row["variant"]]
        + [milliseconds(row[key]) for key in ("ms", "exact_ms", "exact_fa4_ms", "rest_ms")]
        + [_ratio(row[key]) for key in ("over_exact_engine", "over_fa4", "speedup", "limit")]
        + ["–" if row["share"] is None else f"{row['share']:.0%}", _ratio(row["speedup_alone"])]
        for row in found
    )
    return table(header, lines)


def engine_table(engines: Sequence[Mapping[str, Any]]) -> str:
    """What was measured of each engine: its time, the plugin's part of it by kind of layer, the difference from the exact engine."""
    header = ["layers", "tokens", "variant", "ms", "plugin", "an approximate layer", "an exact layer", "all layers, profiled"]
    header += ["logits against the exact engine", "build, s", "engine, MiB"]
    lines = []
    for engine in engines:
        counts = {"approximate_ms": engine["approximate"], "exact_ms": engine["depth"] - engine["approximate"]}
        for row in engine["rows"]:
            layer = [row[key] / counts[key] if counts[key] and key in row else None for key in counts]
            times = [row.get("ms"), row.get("plugin_ms"), *layer, row.get("profiled_ms")]
            difference = f"{row['difference']:.3g}" if "difference" in row else "–"
            place = [str(engine["depth"]), f"{row['tokens']:,}", engine["variant"], *map(milliseconds, times)]
            lines.append([*place, difference, f"{engine['build_seconds']:.0f}", f"{engine['engine_bytes'] / 2**20:,.0f}"])
    return table(header, lines)


def attention_table(report: Mapping[str, Any]) -> str:
    """Exact attention of one layer: alone, within the model, in the exact engine of most layers. The model stands for the engine as far
    as ours takes the same time in both.
    """
    engines = sorted((each for each in report["engines"] if each["variant"] == "exact"), key=lambda each: each["depth"])
    ours = {row["tokens"]: row["plugin_ms"] / each["depth"] for each in engines for row in each["rows"] if "plugin_ms" in row}
    header = ["tokens", "FA4 alone", "FA4 in the model", "ours in the model", "ours in the engine", "layers a run", "runs"]
    header += ["logits, FA4 against ours"]
    within, lines = {found["tokens"]: found for found in report["in_model"]}, []
    for tokens, alone in _alone(report).items():
        found = within.get(tokens, {})
        times = [alone, found.get("fa4_ms_in_model"), found.get("ours_ms_in_model"), ours.get(tokens)]
        how = [f"{found[key]:{form}}" if found else "–" for key, form in (("layers", ""), ("runs", ""), ("difference", ".3g"))]
        lines.append([f"{tokens:,}", *map(milliseconds, times), *how])
    return table(header, lines)


def markdown(report: Mapping[str, Any]) -> str:
    """All tables of one run."""
    shape = report["shape"]
    words = ", ".join(f"{name} {value}" for name, value in shape.items() if name != "layers")
    parts = [f"### Prefill of a Llama shape through the engine, bf16, milliseconds\n{words}; random weights, one layer's tied over all."]
    parts.append(speedup_table(report["results"]))
    fitted = [row for row in report["results"] if "from" in row]
    if fitted:
        worst = max(row["residual"] for row in fitted)
        depths = sorted({depth for row in fitted for depth in row["from"]})
        parts.append(
            f"{DEPTH} layers were not measured: time(L) = a + b L through {' and '.join(map(str, depths))} layers, for the engine's time "
            f"and the plugin's part alike; largest distance of a measured time from its line {worst:.2%} (none through two depths)."
        )
    parts.append(
        "FA4's speed, and so the headline and its limit, is by its time within the model, where the plugin's was measured too. Its time "
        "alone is that of a chip that rested: the speed-up by it is the harder figure, and no verdict."
    )
    if report["fa4_ms_alone"]:
        parts.append(f"### Exact attention of one layer, milliseconds\n{attention_table(report)}")
    parts.append(f"### Engines\n{engine_table(report['engines'])}")
    return "\n\n".join(parts + closing(report, verdict)) + "\n"
