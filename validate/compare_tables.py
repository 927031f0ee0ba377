"""Tables of the comparison that compare_parts.py has the numbers of: heads, look-ahead, planted keys by depth, keys per query, policies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hyperattention.validate.compare_table import Table, under_loss
from hyperattention.validate.report_format import NOTHING, exp_nats, number, percent, plus_minus

# Of all heads: what is told, by which number, and which end of it is the worst.
_WORST: tuple[tuple[str, str, Callable], ...] = (
    ("largest error", "relative_l2", max),
    ("lowest recall of the 16 largest logits", "top16_recall", min),
    ("widest log kappa", "log_kappa_p1_p99", max),
    ("largest alpha of an unmasked block", "alpha_blocks", max),
    ("row sums off by, predicted", "cv_predicted", max),
    ("row sums off by, measured", "cv_measured", max),
)


def more_tables(found: dict[str, Any]) -> list[Table]:
    """Those that either folder has numbers for."""
    first, second = found["names"]
    at = f", at {found['heads_length']:,} tokens" if found["heads_length"] else ""
    made = [
        Table(f"Worst heads{at}", ["", f">{first}", f">{second}"], _worst(found["heads"]), ""),
        Table(f"Worst head of each layer{at}", [">layer", f">{first}", f">{second}"], _by_layer(found["heads"]), ""),
        Table(
            "Keys a query, and the error that they leave in a layer",
            [">tokens", f">{first}", f">{second}", ">exact", f">{first}: error", f">{second}: error", ">its window's", ">its window's"],
            list(map(_keys, found["keys"])),
            "",
        ),
        Table("Policy", ["", f">{first}", f">{second}"], [cells for row in found["policy"] for cells in _policy(row)], ""),
        Table(
            "Look-ahead: rows back that one change moves",
            ["attention", f">{first}", f">{second}", ">whole model", ">whole model", ">largest change", ">largest change"],
            list(map(_look_ahead, found["look_ahead"])),
            "",
        ),
        Table(
            "Cost of the strict choice, nats",
            ["", ">tokens", f">{first}", f">{second}", f">{first}: exp", f">{second}: exp"],
            list(map(_strict, found["strict"])),
            "",
        ),
        Table(
            "Planted keys by depth",
            ["recall of", ">tokens", ">depth", f">{first}", f">{second}"],
            list(map(_needle, found["needle_grid"])),
            "",
        ),
    ]
    return [table for table in made if table.rows]


def _worst(heads: list[dict]) -> list[list[str]]:
    def cell(side: int, key: str, worst: Callable) -> str:
        told = [(row["pair"][side][key], row) for row in heads if row["pair"][side] and row["pair"][side][key] is not None]
        if not told:
            return NOTHING
        value, row = worst(told, key=lambda pair: _order(pair[0], worst))
        text = percent(value) if key == "top16_recall" else number(value)
        return f"{text} (layer {row['layer']}, head {row['head']})"

    return [[name, *(cell(side, key, worst) for side in (0, 1))] for name, key, worst in _WORST] if heads else []


def _order(value: float, worst: Callable) -> float:
    """NaN is the worst of all."""
    return (math.inf if worst is max else -math.inf) if math.isnan(value) else value


def _by_layer(heads: list[dict]) -> list[list[str]]:
    def cell(side: int, layer: int) -> str:
        told = [(row["pair"][side]["relative_l2"], row["head"]) for row in heads if row["layer"] == layer and row["pair"][side]]
        if not told:
            return NOTHING
        value, head = max(told, key=lambda pair: _order(pair[0], max))
        return f"{number(value)} (head {head})"

    return [[str(layer), cell(0, layer), cell(1, layer)] for layer in sorted({row["layer"] for row in heads})]


def _keys(row: dict) -> list[str]:
    def cells(key: str, shown: Callable[[float], str]) -> list[str]:
        return [NOTHING if value is None else shown(value[key]) for value in row["pair"]]

    exact = ", ".join(dict.fromkeys(cell for cell in cells("exact", _whole) if cell != NOTHING))
    errors = [*cells("relative_l2", number), *cells("window_relative_l2", number)]
    return [f"{row['length']:,}", *cells("ours", _whole), exact, *errors]


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _policy(row: dict) -> list[list[str]]:
    """The row's line, and what stands under it."""

    def cell(value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or NOTHING
        return _whole(value) if row["what"].startswith("keys") else number(value)

    return [[row["what"], *map(cell, row["pair"])], *under_loss(row["what"], row["pair"])]


def _look_ahead(row: dict) -> list[str]:
    def cells(key: str, shown: Callable[[Any], str]) -> list[str]:
        return [NOTHING if value is None or value[key] is None else shown(value[key]) for value in row["pair"]]

    own = ["this export" if value and value["this_export"] else "" for value in row["pair"]]
    marked = [f"{text} ({mark})" if mark else text for text, mark in zip(cells("farthest", _whole), own, strict=True)]
    return [row["selector"], *marked, *cells("model_farthest", _whole), *cells("largest_change", lambda v: number(v, 2))]


def _strict(row: dict) -> list[str]:
    return [row["regime"], f"{row['length']:,}", *(plus_minus(value, 5, True) for value in row["pair"]), *map(exp_nats, row["pair"])]


def _needle(row: dict) -> list[str]:
    return [f"{row['kind']}, {row['regime']}", f"{row['length']:,}", f"{row['depth']:g}", *map(percent, row["pair"])]
