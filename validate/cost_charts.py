"""Keys per query against error: the frontier that a policy was chosen from, and what this report measured beside a window."""

from __future__ import annotations

from typing import Any

from hyperattention.export.budget import REGIMES, budget_from_json
from hyperattention.validate.gates import PREFILL
from hyperattention.validate.plot_scatter import Group, Point, scatter_chart
from hyperattention.validate.plots import Chart

# What a policy searches, in the words of a reader.
SETTINGS = {"local_size": "local", "num_blocks": "blocks", "sample_size": "samples", "pool_size": "pool"}
CHOSEN, UNSEEN = "this policy", "this policy, on the text of this report"
ROUNDING = "exact attention by other kernels: rounding"
NOT_READ = "on text that the search has not read"
_SMALLEST = 1e-3  # of the chosen KL; predictions below it are as good as exact, and would flatten the figure


def setting_text(attributes: dict[str, Any] | None) -> str:
    """A layer's setting in words."""
    if attributes is None:
        return "exact"
    return ", ".join([attributes["selector"], *(f"{word} {attributes[name]}" for name, word in SETTINGS.items())])


def policy_rows(report: dict) -> list[dict[str, Any]]:
    """The report's policy, what it gives on the text of the report where that was read at the same length, the settings that all layers
    share, as far as they were run whole, and what rounding alone makes of exact attention: {"name", "keys", "predicted_kl", by regime
    the tokens' numbers or None, "needle"}."""
    policy = report["plan"]["policy"]
    rivals = [(f"all layers: {setting_text(fixed['attributes'])}", fixed) for fixed in policy["fixed"]]
    chosen, *others = [_policy_row(name, of, of["verified"]) for name, of in ((CHOSEN, policy), *rivals)]
    unseen = [row for row in report["approximation"] if row["length"] == policy["calibration"]["length"]]
    floor = {"keys": policy["exact_keys"], "predicted_kl": 0.0}
    rounding = [_policy_row(ROUNDING, floor, policy["rounding"])] if policy["rounding"] else []
    return [chosen, *(_policy_row(UNSEEN, policy, row) for row in unseen), *others, *rounding]


def rival_rows(report: dict) -> list[dict[str, Any]]:
    """Rows as `policy_rows` has them, of text that the search had not read: the policy first, then settings of equal keys, where these
    were run (`hyperattention policy --rivals`)."""
    policy = report["plan"]["policy"]
    judged = policy.get("rivals")
    if judged is None:
        return []
    rivals = [_policy_row(f"{row['name']}: {setting_text(row['attributes'])}", row, row["verified"]) for row in judged["rows"]]
    return [_policy_row(f"{NOT_READ}, {CHOSEN}", policy, judged["policy"]), *rivals]


def _policy_row(name: str, of: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """`run`: what whole forward passes gave."""
    regimes = {regime: run.get(regime) for regime in REGIMES}
    return {"name": name, "keys": of["keys"], "predicted_kl": of["predicted_kl"], **regimes, "needle": run.get("needle")}


def window_rows(report: dict, regime: str) -> list[tuple[int, str, dict[str, Any] | None]]:
    """(length, name, the tokens' numbers in `regime`) of ours and of the window of equal cost; None where these were not measured."""
    rows: list[tuple[int, str, dict[str, Any] | None]] = []
    for row in report["baseline"]:
        ours = next((found[regime] for found in report["approximation"] if found["length"] == row["length"]), None)
        window = row if regime == PREFILL else row.get(regime)
        rows += [(row["length"], "ours", ours), (row["length"], row["name"], window)]
    return rows


def judged_regime(policy: dict[str, Any]) -> str:
    """The regime that the prediction is about, the first that the budget limits."""
    return budget_from_json(policy["budget"]).regimes[0]


def policy_chart(report: dict) -> Chart | None:
    """KL of the whole model against keys per query: predicted, and as far as it was run, in the regime that was judged."""
    policy = report["plan"].get("policy")
    if policy is None:
        return None
    regime = judged_regime(policy)
    run: dict[str, list[Point]] = {CHOSEN: [], UNSEEN: []}
    others: list[Point] = []
    for row in policy_rows(report):
        if row["name"] != ROUNDING:
            run.get(row["name"], others).append(_whole(row, regime))
    unread = [_whole(row, regime) for row in rival_rows(report)]  # the policy first
    (chosen,) = run[CHOSEN]
    least = _SMALLEST * chosen.y
    predicted = [_point("predicted", at["keys"], at["predicted_kl"]) for at in policy["pareto"] if at["predicted_kl"] >= least]
    groups = [
        Group("predicted frontier", predicted, 1, joined=True, dashed=True),
        Group("one setting for all layers", [*others, *unread[1:]], 3),
        Group("chosen", [chosen], 2, ring=True),
        Group("on text it was not chosen on", [*run[UNSEEN], *unread[:1]], 4),
    ]
    return scatter_chart(
        "KL against keys a query", groups, "keys a query", "KL, nats a token", upright=(policy["exact_keys"], "exact: KL 0")
    )


def _whole(row: dict[str, Any], regime: str) -> Point:
    return _point(f"{row['name']}, whole model", row["keys"], row[regime]["kl"]["mean"])


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
