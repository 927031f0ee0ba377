"""What a report says beside its verdict: the other regime, limits within the noise, prompts that were exact, a policy's budget."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import report_samples as samples

from hyperattention.export.gate_options import Limits
from hyperattention.export.policy import Policy
from hyperattention.validate.caveats import caveats, judged_lengths, over_everywhere
from hyperattention.validate.gates import Gate
from hyperattention.validate.policy.write import lines
from hyperattention.validate.report import render
from hyperattention.validate.verdict import judge


def with_numbers(regime: str, key: str, mean: float, se: float | None = 0.00021, row: int = -1, report: dict | None = None) -> dict:
    """A report one of whose estimates is another, judged again."""
    changed = copy.deepcopy(report or samples.report())
    changed["approximation"][row][regime][key] = samples.estimate(mean, se)
    return judge(changed, Limits())


@pytest.mark.parametrize(
    ("key", "bad", "said"),
    [
        ("delta_nats", 0.0288, "delta nats 0.0288 ± 0.00021 at 32,768 tokens (limit 0.0100)"),
        ("kl", 0.036, "KL 0.0360 ± 0.00021 at 32,768 tokens (limit 0.00500)"),
        ("top1", 0.9661, "top-1 0.966 ± 0.00021 at 32,768 tokens (limit 0.980)"),
    ],
)
def test_a_prefill_alone_is_not_called_safe_everywhere(key: str, bad: float, said: str) -> None:
    report = with_numbers("all_positions", key, bad)
    verdict = report["verdict"]
    assert verdict["safe"] is True and verdict["failed"] == []  # the gates are of the deployed regime
    assert verdict["headline"] == "Safe for prefill at 8,192 to 32,768 tokens: every gate holds. Not for scoring."
    assert said in verdict["small_print"][0] and "scoring" in verdict["small_print"][0]
    above = render(report, "report.html.jinja").split("<h2>")[0]
    assert "<strong>For prefill</strong>" in above and "<strong>Yes</strong>" not in above and said in above
    assert said in render(report, "report.md.jinja").split("## Gates")[0]


def test_both_regimes_stand_in_the_first_screen() -> None:
    report = with_numbers("all_positions", "delta_nats", -0.00321, 0.00046)
    assert report["verdict"]["headline"].startswith("Safe at") and report["verdict"]["small_print"] == []
    above = render(report, "report.html.jinja").split("<h2>")[0]
    assert "+0.0009" in above and "± 0.0002 nats a token after a prefill" in above and "all positions -0.0032 ± 0.0005" in above
    assert "after a prefill and with every position approximate" in above
    row = report["approximation"][-1]
    row["prefill_exact_decode"]["delta_nats"]["se"] = row["all_positions"]["delta_nats"]["se"] = None  # one block of tokens
    assert "all positions -0.0032, KL" in render(report, "report.html.jinja")


def test_a_failed_prefill_is_not_softened_by_the_other_regime() -> None:
    report = with_numbers("all_positions", "kl", 0.036, report=with_numbers("prefill_exact_decode", "kl", 0.0061))
    assert report["verdict"]["safe"] is False and report["verdict"]["headline"].startswith("Not safe")
    assert "<strong>No</strong>" in render(report, "report.html.jinja")


def test_rows_of_exact_attention_and_other_models_have_no_other_regime() -> None:
    report = with_numbers("all_positions", "kl", 0.036)
    report["approximation"][-1]["exact"] = True
    assert over_everywhere(report) == [] and over_everywhere(samples.report("features")) == []


@pytest.mark.parametrize(
    ("mean", "se", "word"), [(0.0041, 0.0005, "holds"), (0.0059, 0.0005, "fails"), (0.0041, 0.0004, None), (0.0041, None, None)], ids=str
)
def test_a_limit_within_two_standard_errors_is_said(mean: float, se: float | None, word: str | None) -> None:
    report = with_numbers("prefill_exact_decode", "kl", mean, se)
    lines = [line for line in report["verdict"]["small_print"] if line.startswith("Within two standard errors")]
    assert bool(lines) is (word is not None) and all(f"whether it {word}" in line and "--windows" in line for line in lines)
    (gate,) = [gate for gate in report["gates"] if gate["name"] == "KL"]
    assert gate["se"] == se and gate["passed"] is (mean <= 0.005)
    (row,) = [line for line in render(report, "report.md.jinja").splitlines() if line.startswith("| KL | ")]
    assert ("±" in row) is (se is not None)


def test_an_output_near_its_limit_is_named_with_its_length() -> None:
    gate = Gate("cosine", "approximation", 0.989, 0.99, ">=", "pooled at 5,184 tokens", False, "mean cosine", se=0.001)
    (line,) = caveats(samples.report("features"), [gate])
    said = "Within two standard errors of its limit: cosine 0.989 ± 0.0010 of pooled at 5,184 tokens (limit 0.990)."
    assert line == f"{said} More --windows tell whether it fails."


def test_prompts_up_to_exact_below_judge_nothing() -> None:
    report = samples.report()
    rows = report["approximation"]
    rows[0]["length"] = 4608  # of which the tail of 512 leaves a prompt of 4,096, where the op is exact
    assert judged_lengths(report) == [12345, 32768]
    assert judge(report, Limits())["verdict"]["headline"].startswith("Safe at 12,345 to 32,768 tokens")
    alone = judge({**report, "approximation": rows[:1]}, Limits())
    assert alone["verdict"]["headline"] == "Exact in every prefill measured: no prompt was longer than 4,096 tokens."
    rows[0]["length"] = 4609
    assert judged_lengths(report)[0] == 4609


def test_prompts_that_local_keys_cover_judge_nothing() -> None:
    """Whatever exact_below says; the layer that reaches least counts."""
    report = samples.report()
    first, other = (layer for layer in report["plan"]["layers"] if layer["mode"] == "approximate")
    for layer, local in ((first, 8192), (other, 16384)):
        layer["config"] = {**layer["config"], "local_size": local, "exact_below": 64}
    report["approximation"][0]["length"] = 16384 + 512
    assert judged_lengths(report) == [32768]
    alone = judge({**report, "approximation": report["approximation"][:1]}, Limits())
    assert alone["verdict"]["headline"] == "Exact in every prefill measured: no prompt was longer than 16,384 tokens."
    first["config"]["local_overlap"] = 0
    assert judged_lengths(report) == [16896, 12345, 32768]


# --- a policy's budget ---------------------------------------------------------------------------------------------------


def budgeted(budget: dict[str, Any], **changes: float) -> list[str]:
    """What is said of a budget at 8,192 tokens, where some numbers, by regime and key, are others."""
    report = copy.deepcopy(samples.with_policy())
    report["plan"]["policy"]["budget"] = budget
    for name, mean in changes.items():
        regime, _, key = name.partition("__")
        report["approximation"][0][regime][key] = samples.estimate(mean)
    return [line for line in judge(report, Limits())["verdict"]["small_print"] if "budget" in line]


def test_a_budget_that_holds_says_nothing() -> None:
    assert budgeted({"nats": 0.005, "needle": 0.9, "regime": "both"}) == [] == budgeted({"keys": 2400, "regime": "both"})


@pytest.mark.parametrize(
    ("budget", "change", "said"),
    [
        ({"nats": 0.005, "regime": "both"}, {"all_positions__delta_nats": 0.0088}, "nats 0.00880 ± 0.00021 at all positions."),
        ({"kl": 0.0004, "regime": "both"}, {"prefill_exact_decode__kl": 0.00041}, "kl 0.000410 ± 0.00021 after a prefill"),
        ({"prefill.top1": 0.999, "regime": "both"}, {"prefill_exact_decode__top1": 0.9981}, "top1 0.998 ± 0.00021 after a prefill."),
        ({"nats": 0.005, "regime": "both"}, {"all_positions__delta_nats": float("nan")}, "nats nan"),
        ({"needle": 0.9999, "regime": "both"}, {}, "at all positions"),
    ],
    ids=["nats", "kl", "prefill", "nan", "needle"],
)
def test_a_budget_that_does_not_hold_on_other_text_is_said(budget: dict, change: dict, said: str) -> None:
    (line,) = budgeted(budget, **change)
    assert "exceeded on this text, which it was not chosen on" in line and said in line


def test_a_limit_of_one_regime_is_not_held_against_the_other() -> None:
    assert budgeted({"nats": 0.005, "regime": "prefill_exact_decode"}, all_positions__delta_nats=0.0088) == []


def test_a_budget_of_a_length_that_was_not_measured() -> None:
    report = samples.with_policy()
    report["plan"]["policy"]["calibration"]["length"] = 16384
    (line,) = [line for line in judge(report, Limits())["verdict"]["small_print"] if "budget" in line]
    assert "nothing was measured at its 16,384 tokens" in line


def told(budget: dict[str, Any], mean: float, se: float | None) -> list[str]:
    """What a console says of limits that noise could cross, where every loss and KL is measured like this."""
    found = {name: value for name, value in samples.policy().items() if name not in ("schema", "digest")}
    row = {key: samples.estimate(mean, se) for key in ("delta_nats", "kl", "top1")}
    found |= {"layers": (), "budget": budget, "verified": {"all_positions": row, "prefill_exact_decode": row, "needle": None}}
    return [line for line in lines(Policy(**found)) if "two standard errors" in line]


@pytest.mark.parametrize(
    ("mean", "se", "count"), [(0.004, 0.0006, 2), (0.004, 0.0004, 0), (0.006, 0.01, 0), (0.004, None, 0), (-0.001, 0.0031, 2)], ids=str
)
def test_a_budget_that_the_mean_alone_keeps_is_said(mean: float, se: float | None, count: int) -> None:
    assert len(told({"nats": 0.005, "regime": "both"}, mean, se)) == count
    assert len(told({"prefill.kl": 0.005, "regime": "both"}, mean, se)) == count // 2
    assert told({"keys": 500, "regime": "both"}, mean, se) == []
