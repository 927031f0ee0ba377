"""The verdict that follows from the gates of a report: safe or not, how much faster, from which length on.

Works on the report alone, so that a saved report can be judged again under other limits without a model.
"""

from __future__ import annotations

from dataclasses import asdict

from hyperattention.export.gate_options import Limits
from hyperattention.validate.caveats import caveats, judged_lengths, over_everywhere, reach
from hyperattention.validate.gates import Gate, evaluate


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
        "small_print": [*caveats(report, gates), *([busy] if speedup and (busy := report["environment"].get("busy")) else [])],
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
    lengths = judged_lengths(report)
    if not lengths:
        return f"Exact in every prefill measured: no prompt was longer than {reach(report):,} tokens."
    span = f"{lengths[0]:,} to {lengths[-1]:,}" if len(lengths) > 1 else f"{lengths[0]:,}"
    if over_everywhere(report):
        return f"Safe for prefill at {span} tokens: every gate holds. Not for scoring."
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
