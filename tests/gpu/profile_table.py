"""The time split of `hyperattention bench --attention --profile` as Markdown tables for docs: profile_table.py bench.json. Needs no GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_table import milliseconds, table

STAGES = {"pool": "pool, hash", "hash": "pool, hash", "select": "select, sort", "sort": "select, sort"}
COLUMNS = ("pool, hash", "select, sort", "exact", "local", "sinks", "heavy", "sampled", "merge", "rest", "total")


def columns(case: Mapping[str, Any], key: str) -> dict[str, float | None]:
    """One figure of every stage, by the tables' columns."""
    return {str(STAGES.get(row["stage"], row["stage"])): row[key] for row in case["stages"]}


def split_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds, a row for each preset, head size and length."""
    found = [(case, columns(case, "seconds")) for case in cases]
    present = [name for name in COLUMNS if any(name in times for _, times in found)]
    lines = ([*_head(case), *(_milliseconds(times.get(name)) for name in present)] for case, times in found)
    return table(["preset", "D", "tokens", *present], lines)


def rate_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Of every stage the rate reached and its share of the roofline."""
    present = [name for name in COLUMNS[:-3] if any(name in columns(case, "seconds") for case in cases)] + ["total"]
    lines = ([*_head(case), *(_rate(case, name) for name in present)] for case in cases)
    return table(["preset", "D", "tokens", *present], lines)


def markdown(profile: Mapping[str, Any]) -> str:
    """Both tables, what the shares are of, and how the split was obtained."""
    cases = profile["cases"]
    parts = [f"Milliseconds:\n\n{split_table(cases)}", f"Rates, and shares of the roofline:\n\n{rate_table(cases)}"]
    parts.append(f"Ceilings: {profile['ceilings']['text']}.\n" + "\n".join(f"- {line}" for line in profile["method"]))
    parts += [f"{case['preset']}, D={case['head_dim']}, {case['length']:,} tokens: {note}." for case in cases for note in case["notes"]]
    return "\n\n".join(parts) + "\n"


def _head(case: Mapping[str, Any]) -> list[str]:
    return [f"`{case['preset']}`", str(case["head_dim"]), f"{case['length']:,}"]


def _milliseconds(seconds: float | None) -> str:
    return milliseconds(None if seconds is None else 1000 * seconds)


def _rate(case: Mapping[str, Any], column: str) -> str:
    flops, int8, moved = (columns(case, key).get(column) for key in ("flop_per_s", "int8_op_per_s", "bytes_per_s"))
    share = columns(case, "roofline").get(column)
    # The total does work of several kinds: only its share says something.
    shown = [] if column == "total" else [f"{value / 1e12:.3g} {unit}" for value, unit in ((flops, "TFLOP/s"), (int8, "TOP/s")) if value]
    shown = shown or ([f"{moved / 1e12:.2f} TB/s"] if moved and column != "total" else [])
    return ", ".join([*shown, *([f"{share:.0%}"] if share else [])]) or "–"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, metavar="bench.json")
    print(markdown(json.loads(parser.parse_args().file.read_text())["profile"]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
