"""The benchmark's rows as Markdown tables for docs/results.md, and the targets they are held against. Needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

TIMES = {
    "plugin": "plugin",
    "ort": "ORT CUDA",
    "forward": "kernels",
    "select": "selection",
    "attend": "attention",
    "exact": "our exact",
    "cudnn": "cuDNN",
    "fa2": "FA2",
    "fa4": "FA4",
    "released": "released code",
}
PEAKS = {"forward": "kernels", "exact": "our exact", "cudnn": "cuDNN", "fa2": "FA2", "fa4": "FA4", "released": "released code"}
MASKS = {1: "causal", 0: "full"}


@dataclass(frozen=True)
class Target:
    """`preset` has to be at least `factor` times as fast as FA4 at this length, in both runtimes and at every head size."""

    preset: str
    causal: int
    tokens: int
    factor: float

    def __str__(self) -> str:
        return f"{self.preset}, {MASKS[self.causal]}, {self.tokens:,} tokens: at least {self.factor:g}x FA4"


TARGETS = (Target("paper", 1, 131072, 3.0), Target("paper", 0, 131072, 20.0))


def check_targets(rows: list[dict]) -> list[dict]:
    """For each target: its text, the smallest ratio found over head sizes and runtimes (None: not measured), and whether it is met."""
    results = []
    for target in TARGETS:
        wanted = [r for r in rows if (r["preset"], r["causal"], r["n"]) == (target.preset, target.causal, target.tokens)]
        ratios = [r["ms"]["fa4"] / r["ms"][name] for r in wanted for name in ("plugin", "ort") if {"fa4", name} <= r["ms"].keys()]
        least = min(ratios, default=None)
        results.append({"target": str(target), "least": least, "met": least is not None and least >= target.factor})
    return results


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    rows = [list(header), *map(list, lines)]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def milliseconds(value: float | None) -> str:
    """A table's cell: two decimals, a dash for what was not measured."""
    return "–" if value is None else f"{value:.2f}"


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.0f}"


def verdict(result: dict) -> str:
    """One line on a target."""
    if result["least"] is None:
        return f"Not measured: {result['target']}"
    return f"{'Met' if result['met'] else 'MISSED'}: {result['target']}: {result['least']:.2f}x"


def times_table(rows: list[dict], causal: int) -> str:
    """Milliseconds, a row for each head size, length and preset, and both runtimes' gain over FA4 and over the released code."""
    chosen = [r for r in rows if r["causal"] == causal]
    present = {name: title for name, title in TIMES.items() if any(name in r["ms"] for r in chosen)}

    def ratio(row: dict, name: str, rival: str) -> str:
        return f"{row['ms'][rival] / row['ms'][name]:.2f}x" if {name, rival} <= row["ms"].keys() else "–"

    lines = (
        [f"`{r['preset']}`", str(r["head_dim"]), f"{r['n']:,}", *(milliseconds(r["ms"].get(name)) for name in present)]
        + [ratio(r, "plugin", "fa4"), ratio(r, "ort", "fa4"), ratio(r, "plugin", "released")]
        for r in chosen
    )
    gains = ["plugin against FA4", "ORT against FA4", "plugin against released code"]
    return table(["preset", "D", "tokens", *present.values(), *gains], lines)


def memory_table(rows: list[dict], causal: int) -> str:
    """MiB: the op's workspace, and the peak of device memory over the inputs of one call (outputs and scratch)."""
    chosen = [r for r in rows if r["causal"] == causal]
    present = {name: title for name, title in PEAKS.items() if any(name in r["peak"] for r in chosen)}
    lines = (
        [f"`{r['preset']}`", str(r["head_dim"]), f"{r['n']:,}", _mib(r["workspace"]), *(_mib(r["peak"].get(name)) for name in present)]
        for r in chosen
    )
    return table(["preset", "D", "tokens", "workspace", *(f"{title}, peak" for title in present.values())], lines)


def markdown(report: dict) -> str:
    """All tables of one run."""
    rows, parts = report["rows"], []
    heads = rows[0]["heads"] if rows else 0
    for causal, mask in MASKS.items():
        if any(r["causal"] == causal for r in rows):
            parts.append(f"### {mask.capitalize()}, {heads} heads, bf16: milliseconds\n{times_table(rows, causal)}")
            parts.append(f"### {mask.capitalize()}: memory over the inputs, MiB\n{memory_table(rows, causal)}")
    return "\n\n".join(parts + closing(report, verdict)) + "\n"


def closing(report: dict, line: Callable[[dict], str]) -> list[str]:
    """What ends a page: a line on each target, what was left out, what failed."""
    parts = [f"{line(result)}." for result in report["targets"]]
    parts += [f"Left out: {name}: {reason}." for name, reason in report["missing"].items()]
    return parts + [f"FAILED: {name}: {reason}." for name, reason in report["failed"].items()]
