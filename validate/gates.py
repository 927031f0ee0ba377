"""The gates: limits on the numbers of report.json, and the verdict that follows from them.

Everything here works on the report alone, so that a saved report can be judged again under other limits without a model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from hyperattention.errors import UsageError
from hyperattention.export.gate_options import LANGUAGE, Limits

NEEDLE_ADVICE = 0.95  # of the planted keys that exact attention recalls


@dataclass(frozen=True)
class Gate:
    """One limit and the worst value that was held against it."""

    name: str
    group: str  # "implementation", "approximation", "needle" or "hard inputs"
    value: float
    limit: float
    sense: str  # "<=" or ">="
    where: str
    passed: bool
    meaning: str
    advisory: bool = False  # shown, and never the reason of a verdict


def _gate(name: str, group: str, found: list[tuple[float, str]], limit: float, sense: str, meaning: str) -> Gate:
    """The worst of `found` (value, where); NaN is the worst of all and never passes."""
    sign = 1 if sense == "<=" else -1
    value, where = max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else sign * pair[0])
    return Gate(name, group, value, limit, sense, where, sign * value <= sign * limit, meaning)


def evaluate(report: dict, limits: Limits) -> list[Gate]:
    """All gates of a report. A report without a number to hold against a gate raises UsageError: nothing passes unmeasured."""
    if not report["approximation"]:
        raise UsageError("the report holds no comparison with exact attention; run the validation again")
    outputs = _token_gates if report["kind"] == LANGUAGE else _feature_gates
    advice = [*_needle_gate(report, limits), *_hard_gate(report, limits)]
    return [*_implementation_gates(report, limits), *outputs(report["approximation"], limits), *advice]


def _implementation_gates(report: dict, limits: Limits) -> list[Gate]:
    """Whether the backend computes the operator, whatever the operator is worth."""
    implementation = report["implementation"]
    ops, models = implementation["per_op"], implementation["whole_model"]
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
        meaning = "keys and samples chosen differently from the reference, on captured Q, K, V"
        gates.append(_gate("selection", "implementation", chosen, 0.0, "<=", meaning))
        ratios = [(row["ratio"], row["case"]) for row in ops]
        meaning = "error of the op against float64, over the error of plain low-precision PyTorch under the same plan"
        gates.append(_gate("op error", "implementation", ratios, limits.op_error, "<=", meaning))
    if not models:
        raise UsageError("the report holds no comparison of the whole model with its reference; run the validation again")
    ratios = [(row["ratio"], row["case"]) for row in models]
    meaning = "backend against reference, over two reference runs whose embeddings and floating inputs differ by one ulp"
    return [*gates, _gate("model error", "implementation", ratios, limits.model_error, "<=", meaning)]


def _token_gates(approximation: list[dict], limits: Limits) -> list[Gate]:
    """A language model by its next token."""
    tails = [(row["prefill_exact_decode"], f"{row['length']:,} tokens") for row in approximation]

    def gate(name: str, key: str, limit: float, sense: str, meaning: str) -> Gate:
        regime = "approximate prefill, exact decode, against exact attention"
        return _gate(name, "approximation", [(t[key]["mean"], where) for t, where in tails], limit, sense, f"{meaning}: {regime}")

    return [
        gate("delta nats", "delta_nats", limits.delta_nats, "<=", "loss added"),
        gate("KL", "kl", limits.kl, "<=", "KL(exact || ours) a token"),
        gate("top-1", "top1", limits.top1, ">=", "same first choice"),
    ]


def _feature_gates(approximation: list[dict], limits: Limits) -> list[Gate]:
    """A model without a vocabulary by its output vectors, the worst output at the worst length."""
    found = [(output, f"{output['name']} at {row['length']:,} tokens") for row in approximation for output in row["outputs"]]
    if not found:
        raise UsageError("the report compares no output with exact attention; run the validation again")
    cosines = [(output["cosine"]["mean"], where) for output, where in found]
    distances = [(abs(output["norm_ratio"]["mean"] - 1.0), where) for output, where in found]
    against = "output rows against exact attention's"
    return [
        _gate("cosine", "approximation", cosines, limits.cosine, ">=", f"mean cosine of {against}"),
        _gate("norm ratio", "approximation", distances, limits.norm_ratio, "<=", f"distance from 1 of the mean norm ratio of {against}"),
    ]


def _needle_gate(report: dict, limits: Limits) -> list[Gate]:
    """What an approximate prefill keeps of exact attention's recall, at the worst kind and length; advisory unless asked for, because
    only models of bytes can be asked. Rows of which exact attention recalls less than half say nothing about the approximation."""
    rows, advisory = report["needle"]["rows"] if report["needle"] else [], limits.needle is None
    able = [row for row in rows if row["exact"]["mean"] >= 0.5]
    if not able:
        if not advisory and report["plan_summary"]["approximate_layers"]:
            found = "exact attention recalls less than half of the planted keys" if rows else "the report holds no planted keys"
            raise UsageError(f"--gate needle: {found}, so nothing can be judged; leave the gate out, or run the validation with --needle")
        return []
    shares = [(row["prefill_exact_decode"]["mean"] / row["exact"]["mean"], f"{row['kind']} at {row['length']:,} tokens") for row in able]
    limit = NEEDLE_ADVICE if limits.needle is None else limits.needle
    meaning = "share kept of the planted keys that exact attention recalls: approximate prefill, exact decode"
    return [replace(_gate("needle", "needle", shares, limit, ">=", meaning), advisory=advisory)]


def _hard_gate(report: dict, limits: Limits) -> list[Gate]:
    """The share of the hard inputs that pass; advisory unless asked for, because no approximation passes them all."""
    rows, advisory = report["hard_inputs"], limits.hard is None
    if not rows:
        if not advisory and report["plan_summary"]["approximate_layers"]:
            raise UsageError("--gate hard: the report holds no hard inputs; run the validation again at a length where layers approximate")
        return []
    failed = [f"{row['distribution']} at {row['length']:,} tokens" for row in rows if not row["passed"]]
    share, limit = 1 - len(failed) / len(rows), 1.0 if limits.hard is None else limits.hard
    where, meaning = ", ".join(failed) or f"all {len(rows)} pass", "share of the hard inputs that pass"
    return [Gate("hard", "hard inputs", share, limit, ">=", where, share >= limit, meaning, advisory)]


def judge(report: dict, limits: Limits) -> dict:
    """The report with its gates and verdict under `limits`; works on a saved report as well."""
    gates = evaluate(report, limits)
    judged = {**report, "limits": asdict(limits), "gates": [asdict(g) for g in gates]}
    return {**judged, "verdict": verdict(judged, gates)}


def verdict(report: dict, gates: list[Gate]) -> dict:
    """Safe, not safe or not judged (None), how much faster and from which length, in words and numbers; the first thing a reader sees."""
    failed = [g for g in gates if not g.passed and not g.advisory]
    time = [row for row in report["time"] if row.get("ours_s") and fastest_exact(row)]
    approximate = [row for row in report["approximation"] if not row["exact"]]
    judged = [row for row in time if not row["time_only"]]  # a speed counts where the accuracy was measured too
    longest = judged[-1] if judged else None
    speedup = fastest_exact(longest) / longest["ours_s"] if longest else None
    from_length, before = _break_even(judged if approximate else [])  # what nothing approximates is not faster by our doing
    real = report["inputs"]["kind"] != "random"
    return {
        "safe": (True if real else None) if not failed else False,  # None: random inputs can condemn, but not clear
        "failed": [g.name for g in failed],
        "headline": _headline(failed, bool(approximate), report),
        "small_print": _small_print(gates, report["environment"].get("busy") if speedup else None),
        "speed": _speed(longest, speedup, from_length, [row for row in time if row["time_only"]], bool(approximate), report),
        "speedup": speedup,
        "speedup_length": longest["length"] if longest else None,
        "faster_from": from_length,
        "not_faster_at": before,
        "exact_below": report["plan_summary"]["exact_below"],
        "measured_approximate": bool(approximate),
    }


def _break_even(timed: list[dict]) -> tuple[int | None, int | None]:
    """The shortest length from which every longer one is faster, and the one before it, which is not; None where there is none."""
    faster = None
    for row in reversed(timed):
        if fastest_exact(row) <= row["ours_s"]:
            return faster, row["length"]
        faster = row["length"]
    return faster, None


def _small_print(gates: list[Gate], busy: str | None) -> list[str]:
    """What stands below the headline: gates that are advice and fail, and a warning about the speed."""
    failed = [g for g in gates if g.advisory and not g.passed]
    hard = [f"Advice, not a gate: of the hard inputs, {g.where} fails." for g in failed if g.name == "hard"]
    lost = [f"Advice, not a gate: of the planted keys, {1 - g.value:.0%} are lost ({g.where})." for g in failed if g.name == "needle"]
    return [*lost, *hard, *([busy] if busy else [])]


_NOT_JUDGED = {
    "language": "Not judged on text: random tokens are the easiest input for any approximation; give held-out text with --text FILE.",
    "features": "Not judged on real inputs: random ones are the easiest for any approximation; give real ones with --inputs FILE.npz.",
}


def _headline(failed: list[Gate], approximate: bool, report: dict) -> str:
    summary = report["plan_summary"]
    if any(g.group == "implementation" for g in failed):
        return "Not safe: the backend does not compute what the operator's definition says."
    if any(g.group == "approximation" for g in failed):
        return "Not safe: the output is too far from exact attention."
    if any(g.name == "needle" for g in failed):
        return "Not safe: fewer of the planted keys are recalled than were asked for."
    if failed:
        return "Not safe: fewer of the hard inputs pass than were asked for."
    if report["inputs"]["kind"] == "random":
        return _NOT_JUDGED[report["kind"]]
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


def _speed(
    longest: dict | None, speedup: float | None, from_length: int | None, beyond: list[dict], approximate: bool, report: dict
) -> str:
    if longest is None or speedup is None:
        return "Speed against exact attention was not measured."
    summary = report["plan_summary"]
    part = f"{len(summary['approximate_layers'])} of {summary['layers']} layers approximate"
    where = f"{longest['length']:,} tokens (whole model, {part}, {longest['backend']})"
    text = f"{speedup:.2f}x the speed of the fastest exact attention measured at {where}"
    if not approximate:
        text = f"{_unapproximated(summary)}: {text}"
    else:
        text = f"No faster at the lengths measured: {text}" if from_length is None else f"{text}; faster from {from_length:,} tokens on"
    timed = [f"{fastest_exact(row) / row['ours_s']:.2f}x at {row['length']:,} tokens" for row in beyond]
    return f"{text}. Time only, accuracy not measured: {', '.join(timed)}." if timed else f"{text}."


def _unapproximated(summary: dict) -> str:
    """Whose a difference in time is where nothing was approximated: the runtime's, and where the op ran, its exact kernels'."""
    whose = "the runtime's and our exact kernels'" if summary["op_layers"] else "the runtime's"
    where = " at the lengths measured" if summary["approximate_layers"] else ""
    return f"No layer approximates{where}; the difference is {whose}"
