"""A sweep's record in words: every point of it in one Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hyperattention.validate.perplexity import perplexity
from hyperattention.validate.report_format import count, layer_list, number, percent, plus_minus, seconds, small

REGIMES = (("all_positions", "all positions"), ("prefill_exact_decode", "prefill, exact decode"))
TITLES = {
    "paper": "paper (sortLSH)",
    "blocks": "blocks",
    "window": "window + sinks, keys of blocks",
}
ORDER_TITLES = {"last": "from the last", "first": "from the first", "error": "least error first"}
_HEADS = ("tokens", "method", "order", "layers replaced", "which", "keys a query", "attention, times exact's speed")


def heading(record: dict[str, Any]) -> str:
    """What was measured, on what, where."""
    model, settings, machine = record["model"], record["settings"], record["environment"]["machine"]
    return (
        f"{model['name']} ({model['replaceable']} of {model['layers']} attention layers can be replaced), {settings['dtype']}, on "
        f"{machine['gpu'] or machine['processor']}; {settings['text']['name']}, {count(settings['windows'], 'window')} a length, "
        f"the last {settings['tail']} positions decode exactly"
    )


def markdown(record: dict[str, Any]) -> str:
    """The whole record: what exact attention gives at each length, every point, every layer alone."""
    said = "Nats a token, mean ± standard error over blocks of tokens; delta: against exact attention on the same text; exp: e to the nats."
    lines = ["# Loss against replaced layers", "", f"{heading(record)}.", "", said]
    if record["interrupted"]:
        lines += ["", "**Interrupted: not every point is here; `--resume` goes on.**"]
    lines += [
        "",
        "## Exact attention",
        "",
        *_table(("tokens", *(f"{title}: nats" for _, title in REGIMES), "exp", "attention"), _exact(record)),
    ]
    each = [f"{title}: {what}" for _, title in REGIMES for what in ("nats", "exp", "delta", "KL", "top-1")]
    lines += ["", "## Points", "", *_table((*_HEADS, *each), [_row(row) for row in record["points"]])]
    lines += [
        "",
        "## Each layer alone",
        "",
        "Relative L2 of the layer's output on the exact model's Q, K, V, and the time of one call.",
        "",
    ]
    lines += [*_layers(record), "", *_ranking(record)]
    lines += [f"- {note}" for note in record["notes"]]
    return "\n".join(lines) + "\n"


def _ranking(record: dict[str, Any]) -> list[str]:
    """Whether the text that ranked the layers was judged as well."""
    both = [f"{row['length']:,}" for row in record["windows"] if row["ranking"] in row["judged"]]
    if not both:
        return ["- The layers' errors come from a window that is not judged."]
    return [f"- At {', '.join(both)} tokens the text holds one window: it ranks the layers and is judged."]


SUMMARY_HEADS = ("tokens", "method", "order", "replaced", "all positions", "prefill, exact decode", "KL", "top-1", "attention")


def summary(record: dict[str, Any]) -> list[list[str]]:
    """Of each length, method and order the point in the middle and the last one: delta nats, KL and top-1 of the prefill, speed."""
    lines: dict[tuple, list[dict]] = {}
    for row in record["points"]:
        lines.setdefault((row["length"], row["method"], row["order"]), []).append(row)
    shown = []
    for line in lines.values():
        for row in line[(len(line) - 1) // 2 :: max(1, len(line) // 2)][:2]:
            tail = row["prefill_exact_decode"]
            deltas = [plus_minus(row[regime]["delta_nats"], 5, True) for regime, _ in REGIMES]
            told = [small(tail["kl"]), percent(tail["top1"]), f"{row['speedup']:.2f}x"]
            shown.append([f"{row['length']:,}", row["method"], row["order"], str(row["replaced"]), *deltas, *told])
    return shown


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _exact(record: dict[str, Any]) -> list[list[str]]:
    found = {}
    for row in record["points"]:
        told = [row[regime] for regime, _ in REGIMES]
        nats, shown = [plus_minus(t["exact_nats"]) for t in told], [f"{perplexity(t)['exact']:.4f}" for t in told]
        time = f"{seconds(row['exact_attention_s'])} ({row['exact_by']})"
        found[row["length"]] = [f"{row['length']:,}", *nats, " / ".join(shown), time]
    return list(found.values())


def _row(row: dict[str, Any]) -> list[str]:
    cells = [
        f"{row['length']:,}",
        TITLES[row["method"]],
        ORDER_TITLES[row["order"]],
        str(row["replaced"]),
        layer_list(sorted(row["layers"])),
    ]
    cells += [f"{row['keys_per_query']:,.0f}", f"{row['speedup']:.2f}x"]
    for regime, _ in REGIMES:
        told = row[regime]
        nats = told["exact_nats"]["mean"] + told["delta_nats"]["mean"]
        cells += [f"{nats:.4f}", f"{perplexity(told)['ours']:.4f}"]
        cells += [plus_minus(told["delta_nats"], 5, True), small(told["kl"]), percent(told["top1"])]
    return cells


def _layers(record: dict[str, Any]) -> list[str]:
    methods = list(record["settings"]["methods"])
    exact = list(record["layers"][0]["exact_s"]) if record["layers"] else []
    heads = ["tokens", "layer", *(f"{name}: {what}" for name in methods for what in ("error", "time")), *exact]
    rows = []
    for row in record["layers"]:
        cells = [f"{row['length']:,}", str(row["layer"])]
        for name in methods:
            told = row["methods"].get(name)
            cells += [number(told["relative_l2"]), seconds(told["seconds"])] if told else ["–", "–"]
        rows.append([*cells, *(seconds(row["exact_s"][name]) for name in exact)])
    return _table(heads, rows)
