"""The gates: limits on the numbers of report.json, and the verdict that follows from them.

Everything here works on the report alone, so that a saved report can be judged again under other limits without a model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from hyperattention.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """What is allowed. Ratios are against the noise that plain low precision shows on the same problem."""

    max_delta_nats: float = 0.01
    max_kl: float = 0.005
    min_top1: float = 0.98
    max_op_ratio: float = 2.0
    max_model_ratio: float = 2.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value) or value < 0:
                raise UsageError(f"{name} is {value}; a limit takes a finite number of at least 0")


@dataclass(frozen=True)
class Gate:
    """One limit and the worst value that was held against it."""

    name: str
    group: str  # "implementation" or "approximation"
    value: float
    limit: float
    sense: str  # "<=" or ">="
    where: str
    passed: bool
    meaning: str


def _gate(name: str, group: str, found: list[tuple[float, str]], limit: float, sense: str, meaning: str) -> Gate:
    """The worst of `found` (value, where); NaN is the worst of all and never passes."""
    sign = 1 if sense == "<=" else -1
    value, where = max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else sign * pair[0])
    return Gate(name, group, value, limit, sense, where, sign * value <= sign * limit, meaning)


def evaluate(report: dict, limits: Limits) -> list[Gate]:
    """All gates of a report. A report without a number to hold against a gate raises UsageError: nothing passes unmeasured."""
    implementation, approximation = report["implementation"], report["approximation"]
    ops = implementation["per_op"]
    gates = []
    if report["plan_summary"]["op_layers"]:
        if not ops:
            raise UsageError("the report holds no per-op comparison; run the validation again")
        chosen = [(float(row["plan_differences"]), row["case"]) for row in ops]
        chosen += [
            (float(row["plan_differences"]), f"layer {row['layer']}, last rows of {row['length']:,} tokens")
            for row in report["layers"]
            if row["plan_differences"] is not None
        ]
        gates.append(
            _gate(
                "selection",
                "implementation",
                chosen,
                0.0,
                "<=",
                "keys and samples chosen differently from the reference, on captured Q, K, V",
            )
        )
        gates.append(
            _gate(
                "op error",
                "implementation",
                [(row["ratio"], row["case"]) for row in ops],
                limits.max_op_ratio,
                "<=",
                "error of the op against float64, over the error of plain low-precision PyTorch under the same plan",
            )
        )
    gates.append(
        _gate(
            "model error",
            "implementation",
            [(row["ratio"], row["case"]) for row in implementation["whole_model"]],
            limits.max_model_ratio,
            "<=",
            "backend against reference, over two reference runs whose embeddings differ by one ulp",
        )
    )
    tails = [(row["prefill_exact_decode"], f"{row['length']:,} tokens") for row in approximation]
    if not tails:
        raise UsageError("the report holds no comparison with exact attention; run the validation again")

    def metric(key: str) -> list[tuple[float, str]]:
        return [(tail[key]["mean"], where) for tail, where in tails]

    regime = "approximate prefill, exact decode, against exact attention"
    gates.append(_gate("delta nats", "approximation", metric("delta_nats"), limits.max_delta_nats, "<=", f"loss added: {regime}"))
    gates.append(_gate("KL", "approximation", metric("kl"), limits.max_kl, "<=", f"KL(exact || ours) a token: {regime}"))
    gates.append(_gate("top-1", "approximation", metric("top1"), limits.min_top1, ">=", f"same first choice: {regime}"))
    return gates


def judge(report: dict, limits: Limits) -> dict:
    """The report with its gates and verdict under `limits`; works on a saved report as well."""
    gates = evaluate(report, limits)
    judged = {**report, "limits": asdict(limits), "gates": [asdict(g) for g in gates]}
    return {**judged, "verdict": verdict(judged, gates)}


def verdict(report: dict, gates: list[Gate]) -> dict:
    """Safe, not safe or not judged (None), how much faster and from which length, in words and numbers; the first thing a reader sees."""
    failed = [g for g in gates if not g.passed]
    time = [row for row in report["time"] if row.get("ours_s") and fastest_exact(row)]
    approximate = [row for row in report["approximation"] if not row["exact"]]
    judged = [row for row in time if not row["time_only"]]  # a speed counts where the accuracy was measured too
    longest = judged[-1] if judged else None
    speedup = fastest_exact(longest) / longest["ours_s"] if longest else None
    from_length = None
    for row in reversed(judged):
        if fastest_exact(row) <= row["ours_s"]:
            break
        from_length = row["length"]
    on_text = report["inputs"]["kind"] == "text"
    return {
        "safe": (True if on_text else None) if not failed else False,  # None: random tokens can condemn, but not clear
        "failed": [g.name for g in failed],
        "headline": _headline(failed, bool(approximate), report),
        "speed": _speed(longest, speedup, from_length, [row for row in time if row["time_only"]], report),
        "speedup": speedup,
        "speedup_length": longest["length"] if longest else None,
        "faster_from": from_length,
        "exact_below": report["plan_summary"]["exact_below"],
        "measured_approximate": bool(approximate),
    }


def _headline(failed: list[Gate], approximate: bool, report: dict) -> str:
    summary = report["plan_summary"]
    if any(g.group == "implementation" for g in failed):
        return "Not safe: the backend does not compute what the operator's definition says."
    if failed:
        return "Not safe: the output is too far from exact attention."
    if report["inputs"]["kind"] != "text":
        return "Not judged on text: random tokens are the easiest input for any approximation; give held-out text with --text FILE."
    if not summary["approximate_layers"]:
        return "Safe, and exact: no layer is approximated."
    if not approximate:
        return f"Exact at every length measured: nothing above {summary['exact_below']} tokens was run."
    lengths = [row["length"] for row in report["approximation"] if not row["exact"]]
    span = f"{lengths[0]:,} to {lengths[-1]:,}" if len(lengths) > 1 else f"{lengths[0]:,}"
    return f"Safe at {span} tokens: every gate holds."


def fastest_exact(row: dict) -> float | None:
    """Seconds of the fastest exact attention measured at this length, on the same device: the backend's own, or PyTorch's."""
    return min((row[key] for key in ("exact_s", "torch_exact_s") if row.get(key)), default=None)


def _speed(longest: dict | None, speedup: float | None, from_length: int | None, beyond: list[dict], report: dict) -> str:
    if longest is None or speedup is None:
        return "Speed against exact attention was not measured."
    summary = report["plan_summary"]
    part = f"{len(summary['approximate_layers'])} of {summary['layers']} layers approximate"
    where = f"{longest['length']:,} tokens (whole model, {part}, {longest['backend']})"
    text = f"{speedup:.2f}x the speed of the fastest exact attention measured at {where}"
    text = f"No faster at the lengths measured: {text}" if from_length is None else f"{text}; faster from {from_length:,} tokens on"
    timed = [f"{fastest_exact(row) / row['ours_s']:.2f}x at {row['length']:,} tokens" for row in beyond]
    return f"{text}. Time only, accuracy not measured: {', '.join(timed)}." if timed else f"{text}."
