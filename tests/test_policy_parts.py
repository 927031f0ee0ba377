"""The parts of a policy's search: budgets, settings, text kept apart, measurements kept, errors of an op and of a model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch

from hyperattention.config import Config
from hyperattention.errors import UsageError
from hyperattention.export.budget import DEFAULT, REGIMES, Budget, budget_from_json, parse_budget
from hyperattention.export.load import inspect_source
from hyperattention.export.patch import Patched
from hyperattention.export.plan import make_plan
from hyperattention.reference import exact_attention
from hyperattention.validate.inputs import Corpus, windows
from hyperattention.validate.operators import reference_operator
from hyperattention.validate.policy.calibration import calibration_part, describe_part, unseen_part
from hyperattention.validate.policy.candidates import EXACT, MOST_KEYS, candidates
from hyperattention.validate.policy.errors import MOST_HEADS, layer_errors, some_heads
from hyperattention.validate.policy.fixed import parse_fixed
from hyperattention.validate.policy.store import Store
from hyperattention.validate.policy.trial import Laboratory

SMALL = dict(exact_below=32, block_size=16, local_size=32, sinks=4)

# --- budgets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """What is written, and a word of the error."""

    text: str
    word: str

    def __str__(self) -> str:
        return self.text or "nothing"


@pytest.mark.parametrize(
    "given, expected",
    [
        ((), Budget(nats=0.005)),
        (("nats=0.01",), Budget(nats=0.01)),
        (("nats=0.01, keys=2400", "needle=0.98"), Budget(nats=0.01, keys=2400, needle=0.98)),
        (("speedup=3.5",), Budget(speedup=3.5)),
        (("kl=0",), Budget(kl=0.0)),
        (("keys=2400,prefill.kl=0.0004", "all.nats=0.003"), Budget(keys=2400, named={"prefill.kl": 0.0004, "all.nats": 0.003})),
    ],
    ids=str,
)
def test_a_budget_is_read_and_survives_json(given: tuple[str, ...], expected: Budget) -> None:
    found = parse_budget(given)
    assert found == expected and budget_from_json(json.loads(json.dumps(found.to_json()))) == expected
    assert found.regimes == REGIMES and (found.named or parse_budget(given, REGIMES[0]).regimes == REGIMES[:1])


@pytest.mark.parametrize(
    "case",
    [
        Refused("nats", "takes NAME=VALUE"),
        Refused("loss=1", "names 'loss'"),
        Refused("nats=", "a number"),
        Refused("nats=-0.1", "at least 0"),
        Refused("nats=nan", "at least 0"),
        Refused("top1=1.1", "0 to 1"),
        Refused("speedup=0.5", "at least 1"),
        Refused("speedup=2,keys=300", "a cost in time do not go together"),
        Refused("prefill.keys=300", "names 'prefill.keys'"),
        Refused("tail.kl=1", "names 'tail.kl'"),
        Refused("prefill.top1=2", "prefill.top1 is 2"),
        Refused("all.kl=1,all.kl=1", "given twice"),
        Refused("nats=1,nats=2", "given twice"),
        Refused("", "names"),
    ],
    ids=str,
)
def test_a_wrong_budget_is_named(case: Refused) -> None:
    with pytest.raises(UsageError, match=case.word):
        parse_budget([case.text])
    with pytest.raises(UsageError, match="--budget-regime"):
        parse_budget([DEFAULT], "tail")


def test_the_cap_is_in_the_unit_of_the_cost() -> None:
    assert (Budget(keys=300).cap(1000), Budget(keys=300).unit) == (300, "keys")
    assert (Budget(speedup=4).cap(1000), Budget(speedup=4).unit) == (250, "time")
    assert math.isinf(Budget(nats=1).cap(1000)) and Budget(nats=1).unit == "keys" and Budget(nats=1, cost="time").unit == "time"
    for wrong in ({"keys": 300, "cost": "time"}, {"speedup": 2, "cost": "keys"}):
        with pytest.raises(UsageError, match="do not go together"):
            budget_from_json(wrong)


def test_a_limit_of_one_regime_takes_the_place_of_the_general_one() -> None:
    both = Budget(kl=0.01, needle=0.9, named={"prefill.kl": 0.001})
    assert [both.limit("kl", regime) for regime in REGIMES] == [0.01, 0.001] and both.limit("nats", REGIMES[0]) is None
    assert (
        both.regimes == REGIMES
        and both.plants
        and str(both) == "kl <= 0.01, needle >= 0.9 in both regimes, kl <= 0.001 in prefill, exact decode"
    )
    one = Budget(keys=300, named={"prefill.top1": 0.99})
    assert one.regimes == REGIMES[1:] and not one.plants and one.limit("top1", REGIMES[0]) is None
    assert Budget(keys=300).regimes == REGIMES and Budget(nats=1, regime=REGIMES[1]).limit("nats", REGIMES[0]) is None
    assert Budget(nats=1, regime=REGIMES[1], named={"all.nats": 2}).regimes == REGIMES
    assert not Budget(nats=1).plants and Budget(named={"all.needle": 1}).plants


# --- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [4097, 8192, 32768], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_every_setting_approximates_and_no_two_are_alike(causal: bool, length: int) -> None:
    found = candidates(length, causal, {})
    layer = Config(causal=int(causal), seed=3, scale=0.5).exact()
    made = [candidate.config(layer) for candidate in found]
    assert found[-1] is EXACT and made[-1] == layer
    assert len(set(made)) == len(made)
    assert not any(config.is_exact(length, length) for config in made[:-1])
    assert {(c.causal, c.seed, c.scale) for c in made} == {(int(causal), 3, 0.5)}
    keys = [candidate.keys(layer, length) for candidate in found]
    assert keys[-1] == ((length + 1) / 2 if causal else length) and max(keys[:-1]) <= MOST_KEYS * keys[-1]


def test_fixed_attributes_hold_for_every_setting() -> None:
    fixed = parse_fixed(["sinks=128", "num_blocks = 8"])
    for candidate in candidates(8192, True, fixed)[:-1]:
        assert candidate.attributes is not None
        assert {name: candidate.attributes[name] for name in fixed} == {"sinks": 128, "num_blocks": 8}
    assert {c.attributes["selector"] for c in candidates(8192, True, {"selector": "sortlsh"})[:-1] if c.attributes} == {"sortlsh"}


def test_a_length_at_which_nothing_approximates_is_refused() -> None:
    with pytest.raises(UsageError, match="no setting approximates at 4,096 tokens under the preset"):
        candidates(4096, True, {})


@pytest.mark.parametrize(
    "case",
    [
        Refused("seed=1", "names 'seed'"),
        Refused("sinks", "whole number"),
        Refused("sinks=many", "whole number"),
        Refused("block_size=15", "15"),
        Refused("sinks=1,", "whole number"),
    ],
    ids=str,
)
def test_a_wrong_fixed_attribute_is_named(case: Refused) -> None:
    with pytest.raises(UsageError, match=case.word):
        parse_fixed([case.text])
    with pytest.raises(UsageError, match="given twice"):
        parse_fixed(["sinks=1", "sinks=1"])


# --- text --------------------------------------------------------------------------------------------------------------


def corpus(size: int) -> Corpus:
    """Ids that say where they stand."""
    return Corpus(torch.arange(size), "text.txt", "text", "bytes", f"sha256 of {size}")


@pytest.mark.parametrize("size, needed", [(4000, 100), (4001, 1000), (4001, 2000)], ids=str)
def test_the_report_reads_no_token_that_the_policy_was_chosen_on(size: int, needed: int) -> None:
    whole = corpus(size)
    part = calibration_part(whole, needed)
    policy = {"calibration": json.loads(json.dumps(describe_part(part)))}
    rest = unseen_part(whole, policy, 100)
    assert max(needed, size // 4) <= len(part.ids) <= size // 2
    assert torch.equal(torch.cat([part.ids, rest.ids]), whole.ids)
    seen = {int(i) for window in windows(part, 100, 9) for i in window.ids[0]}
    assert seen.isdisjoint(int(i) for window in windows(rest, 100, 9) for i in window.ids[0])
    assert "behind them" in rest.note
    assert unseen_part(whole, None, 100) is whole and unseen_part(corpus(size + 1), policy, 100).note == ""


def test_a_text_too_short_for_both_is_refused() -> None:
    with pytest.raises(UsageError, match="may have half of them"):
        calibration_part(corpus(4000), 2001)
    policy = {"calibration": describe_part(calibration_part(corpus(4000), 2000))}
    with pytest.raises(UsageError, match="hold no window of 2,000"):
        unseen_part(corpus(4000), policy, 2000)


# --- what was measured -------------------------------------------------------------------------------------------------


def test_measurements_are_taken_over_where_all_that_they_read_is_equal(tmp_path: Path) -> None:
    file = tmp_path / "measured.jsonl"
    first = Store(file, {"model": "a"})
    assert first.get("op", [1, {"b": 2, "a": 1}], lambda: 7.5) == first.get("op", [1, {"a": 1, "b": 2}], lambda: 0.0) == 7.5
    first.get("op", [2], lambda: {"kl": [1.0]})
    assert (first.made, first.reused) == (2, 1)
    with file.open("a") as torn:
        torn.write('{"key": "cut o')  # its writer was killed

    again = Store(file, {"model": "a"}, resume=True)
    assert again.get("op", [2], lambda: None) == {"kl": [1.0]} and again.get("op", [3], lambda: 3) == 3
    assert (again.made, again.reused) == (1, 1)
    assert Store(file, {"model": "a"}, resume=True).get("op", [3], lambda: 0) == 3  # what came behind the cut line
    assert Store(file, {"model": "b"}, resume=True).get("op", [2], lambda: "anew") == "anew"
    assert Store(file, {"model": "a"}).get("op", [2], lambda: "anew") == "anew" and len(file.read_text().splitlines()) == 1


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Patched:
    """A tiny model that reads bytes, every layer exact."""
    source = inspect_source(tiny.save(tmp_path_factory.mktemp("tiny-bytes"), vocab_size=256))
    plan = make_plan(source, layers="none", seq=(1, 300, 300), input_ids="bytes")
    loaded = source.load(plan)
    assert isinstance(loaded, Patched)
    return loaded


def laboratory(patched: Patched, length: int = 211, tail: int = 37) -> Laboratory:
    ids = torch.randint(32, 127, (3000,), generator=torch.Generator().manual_seed(1))
    text = Corpus(ids, "text.txt", "text", "bytes", "sha256")
    return Laboratory(patched, reference_operator(), windows(text, length, 2), tail, torch.device("cpu"))


def test_the_error_of_an_op_is_that_of_dense_attention(patched: Patched) -> None:
    lab = laboratory(patched)
    call = lab.captured(lab.windows[0])[1]
    exact = Config(causal=1, scale=call.config.scale).exact()
    chosen = replace(exact, **SMALL, num_blocks=1, sample_size=8)
    q, k, v, o = some_heads(call)
    dense = exact_attention(q, k, v, True, scale=call.config.scale)[0]
    torch.testing.assert_close(o, dense, rtol=1e-4, atol=1e-5)
    ours = reference_operator()(q, k, v, chosen)[0]
    expected = float((ours.double() - dense.double()).square().sum() / dense.double().square().sum())
    found = layer_errors(lab.operator, call, [chosen, exact])
    assert found == [[pytest.approx(expected, rel=1e-3)], [0.0]] and found[0][0] > 1e-4


@pytest.mark.parametrize("kv, group", [(1, 1), (2, 2), (9, 1), (24, 3)], ids=str)
def test_heads_are_spread_and_keep_to_their_group(patched: Patched, kv: int, group: int) -> None:
    lab = laboratory(patched)
    call = lab.captured(lab.windows[0])[0]
    number = torch.arange(kv * group, dtype=torch.float32)
    q = number[None, :, None, None].expand(1, -1, 3, 2)
    k = torch.arange(kv, dtype=torch.float32)[None, :, None, None].expand(1, -1, 3, 2)
    heads, keys, values, outputs = some_heads(replace(call, q=q, k=k, v=k, o=q))
    chosen = keys[0, :, 0, 0].tolist()
    assert len(chosen) == len(set(chosen)) == min(kv, MOST_HEADS) and torch.equal(keys, values) and torch.equal(heads, outputs)
    assert [int(head) // group for head in heads[0, :, 0, 0]] == chosen
    assert {int(head) % group for head in heads[0, :, 0, 0]} == set(range(min(group, len(chosen))))


def test_a_model_whose_layers_are_all_exact_loses_nothing_at_all(patched: Patched) -> None:
    lab = laboratory(patched)
    found = lab.measure({}, REGIMES, lab.windows)
    assert set(found) == {*REGIMES, "needle", "needle_kl"} and found["needle"] is None and found["needle_kl"] is None
    everywhere = found[REGIMES[0]]
    assert (everywhere["kl"]["mean"], everywhere["delta_nats"]["mean"], everywhere["top1"]["mean"]) == (0, 0, 1)
    assert everywhere["tokens"] == 2 * 211 and found[REGIMES[1]]["tokens"] == 2 * 37
    assert found[REGIMES[1]]["kl"]["mean"] < 1e-9  # another order of the same sums


def test_a_trial_is_the_model_that_the_plan_would_export(patched: Patched, tmp_path: Path) -> None:
    lab = laboratory(patched)
    layers = patched.plan.planned
    assert layers[0].config is not None and layers[1].config is not None
    chosen = replace(layers[1].config, **SMALL, num_blocks=1, sample_size=8)
    found = lab.measure({1: chosen}, REGIMES, lab.windows)
    source = inspect_source(tiny.save(tmp_path / "model", vocab_size=256))
    plan = make_plan(source, layers="1", attributes={**SMALL, "num_blocks": 1, "sample_size": 8}, seq=(1, 300, 300))
    assert plan.layers[1].config == chosen
    exported = source.load(plan)
    assert isinstance(exported, Patched)
    kl = []
    for window in lab.windows:
        with exported.mode("plan", attention=reference_operator()):
            ours = exported.forward(window.inputs).logits[0].double().log_softmax(-1)
        with exported.mode("exact"):
            exact = exported.forward(window.inputs).logits[0].double().log_softmax(-1)
        kl.append((exact.exp() * (exact - ours)).sum(-1))
    assert found[REGIMES[0]]["kl"]["mean"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-6) and torch.cat(kl).mean() > 1e-6
    assert lab.measure({}, REGIMES[:1], lab.windows)[REGIMES[0]]["kl"]["mean"] == 0  # the model is as it was


def test_recall_and_its_kl_are_of_the_answers_digits(patched: Patched) -> None:
    lab = laboratory(patched)
    prompt = replace(lab.windows[0], answer=tuple(lab.windows[0].targets[-8:].tolist()))
    layer = patched.plan.planned[1].config
    assert layer is not None
    found = lab.measure({1: replace(layer, **SMALL, num_blocks=1, sample_size=8)}, REGIMES[:1], [], [prompt])
    with lab.patched.mode("exact"):
        exact = lab.patched.forward(prompt.inputs).logits[0, -8:].double().log_softmax(-1)
    with lab.patched.mode("plan", attention=reference_operator()):
        ours = lab.patched.forward(prompt.inputs).logits[0, -8:].double().log_softmax(-1)
    answer = torch.tensor(prompt.answer)
    share = [float((logits.argmax(-1) == answer).double().mean()) for logits in (exact, ours)]
    assert found["needle"] == {"exact": share[0], REGIMES[0]: share[1]}
    kl = float((exact.exp() * (exact - ours)).sum(-1).mean())
    assert found["needle_kl"] == {REGIMES[0]: pytest.approx(kl, rel=1e-6)} and kl > 1e-6


def test_windows_that_come_and_go_are_told_apart(patched: Patched) -> None:
    lab = laboratory(patched)
    for start in range(3):  # each window is gone before the next one is made
        found = lab.measure({}, REGIMES[:1], [replace(lab.windows[0], ids=lab.windows[0].ids.roll(start))])
        assert found[REGIMES[0]]["kl"]["mean"] == 0
