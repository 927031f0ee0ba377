"""Keys per query against error: the frontier that a policy was chosen from, and what this report measured beside a window."""

from __future__ import annotations

from typing import Any

from hyperattention.export.budget import REGIMES
from hyperattention.validate.plot_scatter import Group, Point, scatter_chart
from hyperattention.validate.plots import Chart

# What a policy searches, in the words of a reader.
SETTINGS = {"local_size": "local", "num_blocks": "blocks", "sample_size": "samples", "pool_size": "pool"}
_SMALLEST = 1e-3  # of the chosen KL; predictions below it are as good as exact, and would flatten the figure


def setting_text(attributes: dict[str, Any] | None) -> str:
    """A layer's setting in words."""
    if attributes is None:
        return "exact"
    return ", ".join([attributes["selector"], *(f"{word} {attributes[name]}" for name, word in SETTINGS.items())])


def policy_rows(policy: dict[str, Any]) -> list[dict[str, Any]]:
    """The choice, then the settings that all layers share, as far as they were run through the whole model on the calibration text:
    {"name", "keys", "predicted_kl", by regime "delta_nats" and "kl" as estimates (None: not measured), "needle" or None}."""
    rivals = [(f"all layers: {setting_text(fixed['attributes'])}", fixed) for fixed in policy["fixed"]]
    return [_policy_row(name, of) for name, of in (("this policy", policy), *rivals)]


def _policy_row(name: str, of: dict[str, Any]) -> dict[str, Any]:
    found = {regime: of["verified"].get(regime) for regime in REGIMES}
    needle = of["verified"].get("needle")
    return {"name": name, "keys": of["keys"], "predicted_kl": of["predicted_kl"], **found, "needle": needle}


def judged_regime(policy: dict[str, Any]) -> str:
    """The regime that the prediction is about, and the whole model was run in for the frontier."""
    regime = policy["budget"]["regime"]
    return regime if regime in REGIMES else REGIMES[0]


def policy_chart(report: dict) -> Chart | None:
    """KL of the whole model against keys per query: predicted, and as far as it was run, in the regime that was judged."""
    policy = report["plan"].get("policy")
    if policy is None:
        return None
    regime = judged_regime(policy)
    chosen, *rivals = [_point(f"{row['name']}, whole model", row["keys"], row[regime]["kl"]["mean"]) for row in policy_rows(policy)]
    least = _SMALLEST * chosen.y
    predicted = [_point("predicted", at["keys"], at["predicted_kl"]) for at in policy["pareto"] if at["predicted_kl"] >= least]
    groups = [
        Group("predicted frontier", predicted, 1, joined=True, dashed=True),
        Group("one setting for all layers", rivals, 3),
        Group("chosen", [chosen], 2, ring=True),
    ]
    return scatter_chart(
        "KL against keys a query", groups, "keys a query", "KL, nats a token", upright=(policy["exact_keys"], "exact: KL 0")
    )


def _point(name: str, keys: float, kl: float) -> Point:
    return Point(keys, kl, f"{name}: {keys:,.0f} keys, KL {kl:.3g}")


def cost_chart(report: dict) -> Chart | None:
    """Relative L2 of the approximate layers against keys per query at every length measured: ours, the window, and exact attention."""
    rows = sorted(report["baseline"], key=lambda row: row["length"])
    if not rows:
        return None
    series = (("ours", "keys_per_query_ours", "ours_layers_relative_l2", 1), ("window + sinks", "keys_per_query", "layers_relative_l2", 3))
    groups = [
        Group(name, [_measured(name, row, keys, error) for row in rows], colour, joined=True, dashed=colour == 3)
        for name, keys, error, colour in series
    ]
    exact = (rows[-1]["keys_per_query_exact"], f"exact at {rows[-1]['length']:,}: no error")
    return scatter_chart("Error of the layers against keys a query", groups, "keys a query", "relative L2", upright=exact)


def _measured(name: str, row: dict, keys: str, error: str) -> Point:
    mean = row[error]["mean"]
    return Point(row[keys], mean, f"{name}, {row['length']:,} tokens: {row[keys]:,.0f} keys, relative L2 {mean:.3g}")
