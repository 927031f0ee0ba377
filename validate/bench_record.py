"""A benchmark's record: bench.json (docs/bench.schema.json says what is in it), a table for the console, and a summary line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export.console import readable
from hyperattention.export.files import write_whole
from hyperattention.export.folder import refuse_output
from hyperattention.validate.bench_statistics import GROWTH_STEP, add_ratios, growth
from hyperattention.validate.bench_timing import Contender, LeftOut, Timings
from hyperattention.validate.report_format import NOTHING, seconds

SCHEMA = 1
RECORD, CHART = "bench.json", "bench.png"


def record(
    kind: str, head: dict[str, Any], contenders: Sequence[Contender], missing: Sequence[LeftOut], found: Timings, against: str | None
) -> dict[str, Any]:
    """The record as JSON values; `head` is what only the caller knows: problem, settings, clock, environment and so on."""
    add_ratios(found.rows, [c.name for c in contenders if c.exact and not c.ours], against)
    return {
        "schema": SCHEMA,
        "kind": kind,
        **head,
        "interrupted": found.interrupted,
        "against": against,
        "contenders": [{"name": c.name, "title": c.title, "ours": c.ours, "exact": c.exact} for c in contenders],
        "rows": found.rows,
        "growth": growth(found.rows),
        "left_out": [asdict(left) for left in [*missing, *found.left_out]],
    }


def check_output(folder: Path) -> None:
    """Before anything is measured. Raises UsageError where `folder` is a file or below one, or lies in an output of export-model."""
    there = next((path for path in (folder, *folder.absolute().parents) if os.path.lexists(path)), None)
    if there is not None and not there.is_dir():
        raise UsageError(
            f"--output {folder}: {there} is no folder; it takes one, or a name for one, for {RECORD} and {CHART}; give another"
        )
    refuse_output(folder, "--output")


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes bench.json and, where anything was timed, bench.png into `folder`. Raises EnvironmentFault where that cannot be done."""
    from hyperattention.validate import bench_plot, bench_profile_page

    profiled = report["kind"] == "profile"
    page, shown = (bench_profile_page, report["profile"]["cases"]) if profiled else (bench_plot, report["rows"])
    path = folder / RECORD
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(report, indent=1) + "\n")
        (folder / CHART).unlink(missing_ok=True)
        return [path, page.draw(report, folder / CHART)] if shown else [path]
    except OSError as error:
        raise EnvironmentFault(f"{folder} cannot be written ({error.strerror or error}); give another folder with --output") from error


def titles(report: dict[str, Any]) -> dict[str, str]:
    """Title of each contender by name."""
    return {c["name"]: c["title"] for c in report["contenders"]}


def table(report: dict[str, Any]) -> Table:
    """A row for each contender at each length, the fastest first; `rounds` are those that a ratio was taken over."""
    columns = ("tokens", "contender", "median", "p10", "p90", "p99", "runs", "memory", "against", "rounds")
    shown = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for column in (0, 2, 3, 4, 5, 6, 7, 9):
        shown.columns[column].justify = "right"
    for column in shown.columns:
        column.no_wrap = True
    last = None
    for row in sorted(report["rows"], key=lambda r: (r["length"], r["median_s"])):
        memory, against = row["memory"], row["against"]
        rival = against and against["name"] == row["contender"]
        ratio = "rival" if rival else f"{against['ratio']:.2f}x" if against else ""
        cells = [
            f"{row['length']:,}" if row["length"] != last else "",
            row["contender"],
            *(seconds(row[key]) for key in ("median_s", "p10_s", "p90_s", "p99_s")),
            str(row["runs"]),
            readable(memory["bytes"]) if memory else NOTHING,
            ratio,
            str(against["rounds"]) if against and not rival else "",
        ]
        shown.add_row(*map(escape, cells), style="bold" if row["ours"] and not row["exact"] else "")
        last = row["length"]
    return shown


def left_out_lines(report: dict[str, Any]) -> list[str]:
    """One line for every contender and reason, lengths together."""
    names = titles(report)
    lengths: dict[tuple[str, str], list[int | None]] = {}
    for left in report["left_out"]:
        lengths.setdefault((left["contender"], left["reason"]), []).append(left["length"])
    return [
        f"left out: {names.get(name, name)}" + (f" at {', '.join(f'{n:,}' for n in at if n)} tokens" if any(at) else "") + f": {reason}"
        for (name, reason), at in lengths.items()
    ]


def summary(report: dict[str, Any]) -> list[str]:
    """For each of ours that approximates: from which length on it is faster than every rival, and by how much at the longest."""
    names, lines = titles(report), []
    for contender in (c["name"] for c in report["contenders"] if c["ours"] and not c["exact"]):
        rows = sorted((r for r in report["rows"] if r["contender"] == contender and r["against"]), key=lambda r: r["length"])
        if not rows:
            continue
        slower = [r["length"] for r in rows if r["against"]["ratio"] <= 1]
        faster = [r["length"] for r in rows if not slower or r["length"] > max(slower)]
        last = rows[-1]
        rival = names[last["against"]["name"]]
        since = f"faster from {faster[0]:,} tokens on" if faster else "not faster at any measured length"
        lines.append(f"{names[contender]}: {since}; {last['against']['ratio']:.2f}x {rival} at {last['length']:,} tokens")
    return lines


def growth_lines(report: dict[str, Any]) -> list[str]:
    """How the time grew over the longest factor of eight in length, a line for each contender."""
    names = titles(report)
    return [
        f"{names[found['contender']]}: {found['ratio']:.3g}x the time at {GROWTH_STEP}x the tokens, {found['from']:,} to {found['to']:,}"
        for found in report.get("growth", [])
    ]
