"""The comparison of two output folders in words: rows for the console and for the page alike."""

from __future__ import annotations

from typing import Any

from hyperattention.export.console import readable
from hyperattention.validate.compare_table import Table, under_loss
from hyperattention.validate.compare_tables import more_tables
from hyperattention.validate.report_format import NOTHING, layer_list, number, percent, seconds

_AFFECTED = {
    (): "only what lies at a common one can be compared",
    ("error", "time"): "neither errors nor times can be compared",
    ("error",): "errors cannot be compared",
    ("time",): "times cannot be compared",
}
_NO_REPORT = "Neither folder has a report."
_DIGITS = {"top-1": 4, "top-1, all positions": 4, "cosine": 5, "norm ratio": 5}


def sentences(found: dict[str, Any]) -> list[str]:
    """What makes the comparison unfair, and which report is missing, one sentence each."""
    told = [f"{name}: {problem}" for name, problem in zip(found["names"], found["problems"], strict=True) if problem]
    for row in found["unfair"]:
        first, second = map(_value, row["pair"])
        told.append(f"other {row['what']} ({first}; {second}): {_AFFECTED[tuple(row['affects'])]}")
    return told


def tables(found: dict[str, Any]) -> list[Table]:
    """Every table, in the order of interest."""
    first, second = found["names"]
    return [
        Table("Verdict", ["", first, second], _verdicts(found), ""),
        Table("Gates", ["gate", f">{first}", f">{second}", ">limit"], list(map(_gate, found["gates"])), _NO_REPORT),
        Table(
            "Error against exact attention, by length",
            [">tokens", "", f">{first}", f">{second}", ">second over first"],
            [cells for row in found["errors"] for cells in _error(row)],
            _NO_REPORT,
        ),
        Table(
            "Time of one forward pass, by length",
            [">tokens", f">{first}", f">{second}", f">{second} over {first}", f">{first} over exact", f">{second} over exact"],
            list(map(_time, found["time"])),
            "No time was measured.",
        ),
        Table("Plan: what differs", ["", first, second], list(map(_difference, found["plan"])), "The plans are the same."),
        Table(
            "Layers",
            [">layer", first, second, f">{first}: error", f">{second}: error", ">LSE spread", ">LSE spread"],
            list(map(_layer, found["layers"])),
            "No attention layer.",
        ),
        Table("Planted keys", ["recall of", ">tokens", f">{first}", f">{second}"], list(map(_recall, found["needle"])), "Not measured."),
        *more_tables(found),
        Table("Hard inputs", ["input", ">tokens", f">{first}", f">{second}"], list(map(_hard, found["hard_inputs"])), "Not measured."),
        Table("Files", ["file", f">{first}", f">{second}"], list(map(_size, found["sizes"])), "No file."),
    ]


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(v) if isinstance(v, int) else _value(v) for v in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(v)}" for name, v in value.items()) or "none"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return "none" if value is None else text[:16] + "…" if len(text) == 64 else text  # a sha256 is known by its beginning


def _verdicts(found: dict[str, Any]) -> list[list[str]]:
    def said(key: str) -> list[str]:
        return [str(v[key]) if v else "no report" for v in found["verdicts"]]

    rows = [["verdict", *said("headline")], ["speed", *said("speed")]]
    failed = [", ".join(v["failed"]) or "none" if v else NOTHING for v in found["verdicts"]]
    return [*rows, ["gates that fail", *failed]]


def _gate(row: dict) -> list[str]:
    def cell(gate: dict | None) -> str:
        if gate is None:
            return NOTHING
        return f"{number(gate['value'])} {'pass' if gate['passed'] else 'note' if gate['advisory'] else 'FAIL'}"

    limits = list(dict.fromkeys(f"{g['sense']} {number(g['limit'])}" for g in row["pair"] if g))
    return [row["name"], *map(cell, row["pair"]), " and ".join(limits)]


def _error(row: dict) -> list[list[str]]:
    """The metric's line, and what stands under it."""
    digits = next((n for name, n in _DIGITS.items() if row["metric"].endswith(name)), 3)
    means = [value and value["mean"] for value in row["pair"]]
    ratio = means[1] / means[0] if all(means) and digits == 3 and means[0] * means[1] > 0 else None
    length, name = f"{row['length']:,}", row["metric"]
    under = ([length, *line, NOTHING] for line in under_loss(name, means))
    return [[length, name, *(number(mean, digits) for mean in means), number(ratio)], *under]


def _time(row: dict) -> list[str]:
    ours = [value and value["ours_s"] for value in row["pair"]]
    faster = [f"{number(value['speedup'])}x" if value and value["speedup"] else NOTHING for value in row["pair"]]
    return [f"{row['length']:,}", *map(seconds, ours), f"{number(ours[0] / ours[1])}x" if all(ours) else NOTHING, *faster]


def _difference(row: dict) -> list[str]:
    if row["what"] == "approximate layers":
        return [row["what"], *map(layer_list, row["pair"])]
    return [row["what"], *map(_value, row["pair"])]


def _layer(row: dict) -> list[str]:
    pair = [value or {} for value in row["pair"]]
    errors = [number(value.get("relative_l2")) for value in pair]
    return [str(row["index"]), *(v.get("mode", NOTHING) for v in pair), *errors, *(number(v.get("lse_std"), 2) for v in pair)]


def _recall(row: dict) -> list[str]:
    return [f"{row['kind']}, {row['regime']}", f"{row['length']:,}", *map(percent, row["pair"])]


def _hard(row: dict) -> list[str]:
    cells = [f"{number(v['value'])} {'pass' if v['passed'] else 'fail'}" if v else NOTHING for v in row["pair"]]
    return [row["distribution"], f"{row['length']:,}", *cells]


def _size(row: dict) -> list[str]:
    return [row["file"], *(NOTHING if size is None else readable(size) for size in row["pair"])]
