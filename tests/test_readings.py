"""A budget's limits and the numbers they are held against: the same ones in a search, in a policy's words and in a report."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import report_samples as samples
import torch

from hyperattention.export.budget import ACCURACY, REGIMES, Budget, budget_from_json
from hyperattention.export.gate_options import Limits
from hyperattention.validate.policy.readings import ROUNDING, Reading, of_planted, of_text
from hyperattention.validate.policy.verify import excess
from hyperattention.validate.verdict import judge

BETTER_BELOW = {"nats": True, "kl": True, "top1": False, "needle": False}
NUMBER = {"nats": "delta_nats", "kl": "kl", "top1": "top1"}


def measured(numbers: dict[tuple[str, str], float]) -> dict[str, Any]:
    """What a trial answers, from values by (regime, name of the limit)."""
    rows = {regime: {key: samples.estimate(numbers[regime, name], 0.25) for name, key in NUMBER.items()} for regime in REGIMES}
    return {**rows, "needle": {"exact": 1.0, **{regime: numbers[regime, "needle"] for regime in REGIMES}}}


def drawn(rng: random.Random) -> dict[tuple[str, str], float]:
    """Numbers of which most keep a limit of 0.5, some exactly; some do not, and some are NaN."""

    def one(name: str) -> float:
        good, bad = (0.25, 0.75) if BETTER_BELOW[name] else (0.75, 0.25)
        return rng.choices((good, 0.5, bad, math.nan), (8, 8, 1, 1))[0]

    return {(regime, name): one(name) for regime in REGIMES for name in ACCURACY}


def said_of(report: dict, budget: Budget) -> list[str]:
    """What the report's small print says of the budget."""
    told = copy.deepcopy(report)
    told["plan"]["policy"]["budget"] = budget.to_json()
    return [line for line in judge(told, Limits())["verdict"]["small_print"] if "exceeded" in line]


def test_every_limit_reads_its_own_number_in_every_regime() -> None:
    numbers = {(regime, name): 10.0 * i + j for i, regime in enumerate(REGIMES) for j, name in enumerate(ACCURACY)}
    found, budget = measured(numbers), Budget(nats=0.1, kl=0.2, top1=0.3, needle=0.4)
    held = [*of_text(budget, found), *of_planted(budget, found["needle"])]
    assert {(r.regime, r.name): (r.value, r.limit, r.se) for r in held} == {
        (regime, name): (value, getattr(budget, name), None if name == "needle" else 0.25) for (regime, name), value in numbers.items()
    }
    assert {r.name: r.sense == "<=" for r in held} == BETTER_BELOW


@pytest.mark.parametrize("name", ACCURACY)
def test_what_is_not_limited_is_not_read(name: str) -> None:
    budget = budget_from_json({f"prefill.{name}": 0.5})
    row = {REGIMES[1]: {number: samples.estimate(0.5) for key, number in NUMBER.items() if key == name}}
    (reading,) = (*of_text(budget, row), *of_planted(budget, {REGIMES[1]: 0.5}))
    assert (reading.name, reading.regime, reading.kept) == (name, REGIMES[1], True)


def test_a_limit_of_planted_keys_is_not_kept_unmeasured() -> None:
    numbers = {(regime, name): 0.5 for regime in REGIMES for name in ACCURACY}
    with pytest.raises(KeyError):
        excess(Budget(needle=0.9), {**measured(numbers), "needle": None})


@pytest.mark.parametrize("name", ACCURACY)
@pytest.mark.parametrize("limit", [0.0, 0.5, 0.98, 1.0], ids=str)
def test_a_limit_is_kept_on_its_side_alone(name: str, limit: float) -> None:
    rng = random.Random(f"{name}{limit}")
    for value in (0.0, limit - 1e-6, limit, limit + 1e-6, 1.0, math.nan, -1.0, *(rng.random() for _ in range(50))):
        kept = value <= limit if BETTER_BELOW[name] else value >= limit
        assert Reading(name, REGIMES[0], limit, value).kept == kept, value


@pytest.mark.parametrize("name", ACCURACY)
@pytest.mark.parametrize("limit", [0.0, 0.0004, 0.005, 0.995, 1.0], ids=str)
def test_what_rounding_adds_breaks_no_limit(name: str, limit: float) -> None:
    """As the KL of two passes of the same exact attention in fp32, 1.6e-12, against kl=0."""
    worse = 1 if BETTER_BELOW[name] else -1
    for beyond in (0.0, 1.6e-12, 0.99 * ROUNDING, 1.01 * ROUNDING, 1e-6):
        reading = Reading(name, REGIMES[0], limit, limit + worse * beyond)
        assert reading.kept == (beyond <= ROUNDING) and (reading.use <= 1) == reading.kept, beyond
    assert ROUNDING <= float(torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("limits", [("nats",), ("kl",), ("top1",), ("needle",), ("nats", "top1"), ACCURACY], ids="-".join)
def test_a_search_and_a_report_hold_a_budget_by_the_same_rule(limits: tuple[str, ...]) -> None:
    rng, report = random.Random(str(limits)), samples.with_policy()
    found = set()
    for _ in range(25):
        numbers, regime = drawn(rng), rng.choice(("both", *REGIMES))
        budget = Budget(**dict.fromkeys(limits, 0.5), regime=regime)
        told = measured(numbers)
        report["approximation"][0] |= {name: {**report["approximation"][0][name], **told[name]} for name in REGIMES}
        row = next(row for row in report["needle"]["rows"] if (row["kind"], row["length"]) == ("single", 8192))
        row |= {name: samples.estimate(told["needle"][name]) for name in REGIMES}
        asked = REGIMES if regime == "both" else (regime,)
        kept = all(numbers[where, name] <= 0.5 if BETTER_BELOW[name] else numbers[where, name] >= 0.5 for where in asked for name in limits)
        assert (excess(budget, told) <= 1, said_of(report, budget) == []) == (kept, kept)
        found.add(kept)
    assert found == {True, False}
