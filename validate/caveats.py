"""What a reader has to know before a verdict is believed: the other regime, advice, limits that noise could cross, a policy's budget.

The gates judge an approximate prefill. Here the same limits are held against every position approximate, and a policy's budget against
text that it was not chosen on; none of it changes the verdict, all of it is said beside it.
"""

from __future__ import annotations

from typing import Any

from hyperattention.config import Config
from hyperattention.export.budget import ACCURACY, REGIMES, Budget, budget_from_json
from hyperattention.export.gate_options import LANGUAGE, Limits
from hyperattention.validate.distributions import exact_reach
from hyperattention.validate.gates import ALL, Gate, token_gates
from hyperattention.validate.policy.readings import Reading, of_planted, of_text
from hyperattention.validate.report_format import number


def caveats(report: dict, gates: list[Gate]) -> list[str]:
    """One sentence each, the weightiest first."""
    return [*_everywhere(report), *_budget(report), *_close(gates), *_advice(gates)]


def over_everywhere(report: dict) -> list[Gate]:
    """The gates of a language model that would fail where every position is approximate, at the worst length; [] for other models."""
    rows = [row for row in report["approximation"] if not row["exact"]]
    if report["kind"] != LANGUAGE or not rows:
        return []
    return [gate for gate in token_gates(rows, Limits(**report["limits"]), ALL, "every position approximate") if not gate.passed]


def judged_lengths(report: dict) -> list[int]:
    """The lengths at which what the gates judge is approximate: a prompt, all but the tail, that is longer than exact attention reaches."""
    rows = [row for row in report["approximation"] if not row["exact"]]
    return [row["length"] for row in rows if row["length"] - row.get("tail", 0) > reach(report)]


def reach(report: dict) -> int:
    """Up to so many keys no layer approximates (`exact_reach`)."""
    layers = [layer["config"] for layer in report["plan"]["layers"] if layer["mode"] == "approximate"]
    return min((exact_reach(Config.from_attributes(config)) for config in layers), default=report["plan_summary"]["exact_below"])


def _everywhere(report: dict) -> list[str]:
    over = over_everywhere(report)
    if not over:
        return []
    return [f"Where every position is approximate, as in scoring, the same limits are not kept: {'; '.join(map(_said, over))}."]


def _close(gates: list[Gate]) -> list[str]:
    """Gates of the approximation that another text could turn."""
    close = [gate for gate in gates if gate.group == "approximation" and gate.close]
    return [
        f"Within two standard errors of its limit: {_said(gate)}. More --windows tell whether it {'holds' if gate.passed else 'fails'}."
        for gate in close
    ]


def _said(gate: Gate) -> str:
    spread = "" if gate.se is None else f" ± {number(gate.se, 2)}"
    of = "of" if " at " in gate.where else "at"  # an output at a length, or a length alone
    return f"{gate.name} {number(gate.value)}{spread} {of} {gate.where} (limit {number(gate.limit)})"


def _advice(gates: list[Gate]) -> list[str]:
    failed = [g for g in gates if g.advisory and not g.passed]
    hard = [f"Advice, not a gate: of the hard inputs these fail: {g.where}." for g in failed if g.name == "hard"]
    lost = [f"Advice, not a gate: of the planted keys, {1 - g.value:.0%} are lost ({g.where})." for g in failed if g.name == "needle"]
    return [*lost, *hard]


# --- a policy's budget ---------------------------------------------------------------------------------------------------


def _budget(report: dict) -> list[str]:
    """Whether the budget that a policy was chosen under holds on the text of this report, at the policy's own length."""
    policy = report["plan"].get("policy")
    if not policy:
        return []
    budget, length = budget_from_json(policy["budget"]), policy["calibration"]["length"]
    if not any(budget.limit(name, regime) is not None for name in ACCURACY for regime in REGIMES):
        return []
    measured = next((row for row in report["approximation"] if row["length"] == length), None)
    if measured is None:
        return [f"The policy's budget ({budget}) was not held against this text: nothing was measured at its {length:,} tokens."]
    held = (*of_text(budget, measured), *_planted(budget, report["needle"], length))
    over = [_exceeded(reading) for reading in held if not reading.kept]
    return [f"The policy's budget ({budget}) is exceeded on this text, which it was not chosen on: {'; '.join(over)}."] if over else []


def _planted(budget: Budget, needle: dict[str, Any] | None, length: int) -> list[Reading]:
    """Planted keys are asked for one at a time in a search."""
    rows = [row for row in needle["rows"] if row["length"] == length and row["kind"] == "single"] if needle else []
    return [reading for row in rows for reading in of_planted(budget, {regime: row[regime]["mean"] for regime in REGIMES})]


def _exceeded(reading: Reading) -> str:
    spread = "" if reading.se is None else f" ± {number(reading.se, 2)}"
    where = "at all positions" if reading.regime == ALL else "after a prefill"
    return f"{reading.name} {number(reading.value)}{spread} {where}"
