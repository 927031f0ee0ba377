"""The gates: limits on the numbers of report.json. They work on the report alone, so that a saved one can be judged again (verdict.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hyperattention.errors import UsageError
from hyperattention.export.budget import REGIMES
from hyperattention.export.gate_options import LANGUAGE, Limits

ALL, PREFILL = REGIMES
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
    se: float | None = None  # standard error of the value, where it is a mean of many tokens

    @property
    def close(self) -> bool:
        """Whether the limit lies within two standard errors of the value: another text may fall on its other side."""
        return self.se is not None and abs(self.value - self.limit) <= 2 * self.se


class Found(NamedTuple):
    """A value that is held against a gate, where it was found, and its standard error."""

    value: float
    where: str
    se: float | None = None


def _gate(name: str, group: str, found: Sequence[Found], limit: float, sense: str, meaning: str) -> Gate:
    """The worst of `found`; NaN is the worst of all and never passes."""
    sign = 1 if sense == "<=" else -1
    worst = max(found, key=lambda one: math.inf if math.isnan(one.value) else sign * one.value)
    return Gate(name, group, worst.value, limit, sense, worst.where, sign * worst.value <= sign * limit, meaning, se=worst.se)


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
        chosen = [Found(float(row["plan_differences"]), row["case"]) for row in ops]
        chosen += [
            Found(float(row["plan_differences"]), f"layer {row['layer']}, last rows of {row['length']:,} tokens")
            for row in report["layers"]
            if row["plan_differences"] is not None
        ]
        meaning = "keys and samples chosen differently from the reference, on captured Q, K, V"
        gates.append(_gate("selection", "implementation", chosen, 0.0, "<=", meaning))
        ratios = [Found(row["ratio"], row["case"]) for row in ops]
        meaning = "error of the op against float64, over the error of plain low-precision PyTorch under the same plan"
        gates.append(_gate("op error", "implementation", ratios, limits.op_error, "<=", meaning))
    if not models:
        raise UsageError("the report holds no comparison of the whole model with its reference; run the validation again")
    ratios = [Found(row["ratio"], row["case"]) for row in models]
    meaning = "backend against reference, over two reference runs whose embeddings and floating inputs differ by one ulp"
    return [*gates, _gate("model error", "implementation", ratios, limits.model_error, "<=", meaning)]


def _token_gates(approximation: list[dict], limits: Limits) -> list[Gate]:
    """A language model by its next token, as it is deployed."""
    return token_gates(approximation, limits, PREFILL, "approximate prefill, exact decode, against exact attention")


def token_gates(approximation: list[dict], limits: Limits, regime: str, said: str) -> list[Gate]:
    """Loss, KL and first choices in one of REGIMES (export/budget.py), `said` in words, at the worst length."""

    def gate(name: str, key: str, limit: float, sense: str, meaning: str) -> Gate:
        found = [Found(row[regime][key]["mean"], f"{row['length']:,} tokens", row[regime][key]["se"]) for row in approximation]
        return _gate(name, "approximation", found, limit, sense, f"{meaning}: {said}")

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
    cosines = [Found(output["cosine"]["mean"], where, output["cosine"]["se"]) for output, where in found]
    distances = [Found(abs(output["norm_ratio"]["mean"] - 1.0), where, output["norm_ratio"]["se"]) for output, where in found]
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
    shares = [Found(row[PREFILL]["mean"] / row["exact"]["mean"], f"{row['kind']} at {row['length']:,} tokens") for row in able]
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
