"""What two reports say of single heads, look-ahead, planted keys by depth, keys per query and policies, pair by pair.

Generators of (key, value) for one report, which compare_folders.py joins; every value is what report.json holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hyperattention.export.budget import REGIMES

Row = tuple[dict[str, Any], Any]
HEAD_KEYS = ("relative_l2", "top16_recall", "log_kappa_p1_p99", "alpha_blocks", "cv_predicted", "cv_measured")


def common_length(reports: Sequence[dict | None]) -> int | None:
    """The longest length at which layers were measured alone in both reports, or in the one that has any; None: in neither."""
    lengths = [{row["length"] for row in report["layers"]} if report else set() for report in reports]
    common = lengths[0] & lengths[1] if all(lengths) else lengths[0] | lengths[1]
    return max(common, default=None)


def heads(report: dict, length: int | None) -> Iterable[Row]:
    """Error and hardness of every head of the approximate layers at `length`."""
    for row in report["layers"]:
        for head in row["heads"] if row["length"] == length else ():
            yield {"layer": row["layer"], "head": head["head"]}, {key: head[key] for key in HEAD_KEYS}


def look_ahead(report: dict) -> Iterable[Row]:
    """Of each selector in the place of the layer's own: how far back a change moves outputs, of the operator and of the whole model."""
    found = report["look_ahead"]
    for i, op in enumerate(found["op"] if found else ()):
        model = found["model"][i] if found["model"] else {}
        told = {"length": found["length"], "this_export": op["selector"] == found["own"], "farthest": op["farthest"]}
        told |= {"largest_change": op["largest_change"], "model_farthest": model.get("farthest")}
        yield {"selector": op["selector"]}, told | {"model_largest_change": model.get("largest_change")}


def strict(report: dict) -> Iterable[Row]:
    """Nats that the strict choice of keys costs, by regime."""
    found = report["look_ahead"]["strict"] if report["look_ahead"] else None
    if found is None:
        return
    for regime in REGIMES:
        yield {"regime": regime.replace("_", " "), "length": found["length"]}, found[regime]["cost"]


def needle_grid(report: dict) -> Iterable[Row]:
    """Recall of planted keys by kind, length and depth."""
    for row in report["needle"]["rows"] if report["needle"] else ():
        for cell in row["depths"]:
            for regime in REGIMES:
                key = {"kind": row["kind"], "regime": regime.replace("_", " "), "length": row["length"], "depth": cell["depth"]}
                yield key, cell[regime]


def keys(report: dict) -> Iterable[Row]:
    """Keys of a mean query row of the approximate layers, and their error, ours and the window's of equal cost."""
    for row in report["baseline"]:
        told = {name: row[f"keys_per_query{of}"] for name, of in (("ours", "_ours"), ("exact", "_exact"))}
        told |= {"relative_l2": row["ours_layers_relative_l2"]["mean"], "window_relative_l2": row["layers_relative_l2"]["mean"]}
        yield {"length": row["length"]}, told


def policies(policies: Sequence[dict[str, Any] | None]) -> list[dict]:
    """{"what", "pair"} of what chose the layers, where a policy did so in either folder."""
    if not any(policies):
        return []
    sides = [_policy(policy) if policy else {} for policy in policies]
    return [{"what": what, "pair": [side.get(what) for side in sides]} for what in dict.fromkeys([*sides[0], *sides[1]])]


def _policy(policy: dict[str, Any]) -> dict[str, Any]:
    at = policy["calibration"]
    told: dict[str, Any] = {"calibration": f"{at['name']}, {at['windows']} x {at['length']:,} tokens", "keys a query": policy["keys"]}
    told |= {"keys a query of exact attention": policy["exact_keys"], "predicted KL": policy["predicted_kl"]}
    for regime in REGIMES:
        found = policy["verified"].get(regime)
        for key, name in (("kl", "KL"), ("delta_nats", "delta nats")) if found else ():
            told[f"{name}, {regime.replace('_', ' ')}"] = found[key]["mean"]
    return told
