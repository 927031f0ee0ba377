"""A policy in two regimes: how they are weighed, what single layers do in each, and what rounding and time have to do with it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from torch import Tensor, nn

from hyperattention.config import Config
from hyperattention.export.budget import REGIMES
from hyperattention.export.load import inspect_source
from hyperattention.export.patch import Patched
from hyperattention.export.plan import make_plan
from hyperattention.validate.inputs import QUESTION_ROWS, Corpus, windows
from hyperattention.validate.operators import Operator, reference_operator
from hyperattention.validate.policy.choose import Choice, Option, fill, frontier, hull, neighbours, within
from hyperattention.validate.policy.probe import PLANTED, TEXT, in_fp32, probe, splits
from hyperattention.validate.policy.times import op_times
from hyperattention.validate.policy.trial import Laboratory
from hyperattention.validate.policy.weigh import scales, weighed
from hyperattention.validate.regimes import one_pass_serves

SMALL = dict(exact_below=32, block_size=16, local_size=32, sinks=4, num_blocks=1, sample_size=8)
ALL, PREFILL = REGIMES

# --- weighing ----------------------------------------------------------------------------------------------------------


def layers_of(*strengths: float) -> list[list[Option]]:
    """Layers whose loss is a strength over the cost: what is spent where it matters pays."""
    costs = [1.0, 1.5, 2.2, 3.3, 5.0, 7.5, 11.0]
    return [[Option(i, cost, strength / cost) for i, cost in enumerate(costs)] for strength in strengths]


BY_REGIME = {ALL: layers_of(8.0, 1.0, 3.0), PREFILL: layers_of(0.1, 0.9, 0.2)}


def worst(choice: Choice, scale: dict[str, float]) -> float:
    """Of a choice, the most that a regime uses of its scale."""
    return max(choice.of(BY_REGIME[regime]).loss / scale[regime] for regime in REGIMES)


@pytest.mark.parametrize("cap", [4.0, 9.0, 20.0], ids=str)
@pytest.mark.parametrize("limit", [None, 0.3], ids=["no-limit", "limited-prefill"])
def test_under_a_cap_no_joint_choice_has_a_much_better_worst_regime(cap: float, limit: float | None) -> None:
    scale = scales(BY_REGIME, {ALL: None, PREFILL: limit}, cap)
    given = weighed(BY_REGIME, scale, cap)
    base = within(frontier(given), cap)
    assert base is not None
    every = [Choice(chosen) for chosen in itertools.product(*BY_REGIME[ALL])]
    best = min(worst(choice, scale) for choice in every if choice.cost <= cap)
    assert worst(fill(base, given, cap), scale) <= 1.15 * best
    assert scale[PREFILL] == (limit or pytest.approx(min(c.of(BY_REGIME[PREFILL]).loss for c in every if c.cost <= cap), rel=0.1))


def test_without_a_cap_a_regime_that_asks_for_more_decides_what_is_spent() -> None:
    scale = scales(BY_REGIME, {ALL: 4.0, PREFILL: 0.15}, math.inf)
    points = frontier(weighed(BY_REGIME, scale, math.inf))
    found = next(point for point in points if worst(point, scale) <= 1)
    every = [Choice(chosen) for chosen in itertools.product(*BY_REGIME[ALL])]
    assert found.cost <= 1.2 * min(choice.cost for choice in every if worst(choice, scale) <= 1)
    alone = weighed({ALL: BY_REGIME[ALL]}, {ALL: 4.0}, math.inf)
    assert alone == BY_REGIME[ALL]  # one regime is itself


def test_a_weighting_that_never_keeps_to_a_regime_is_not_taken_for_being_cheap() -> None:
    """The second layer loses nothing in the second regime, whose weight alone would leave it at its cheapest."""
    paid, free = [Option(0, 1.0, 1.0), Option(1, 9.0, 0.0)], [Option(0, 1.0, 0.0), Option(1, 9.0, 0.0)]
    layers = weighed({ALL: [paid, paid], PREFILL: [paid, free]}, {ALL: 0.1, PREFILL: 0.1}, math.inf)
    assert frontier(layers)[-1].candidates == (1, 1)


@pytest.mark.parametrize("cap", [6.0, 11.0], ids=str)
def test_neighbours_are_the_best_choices_that_differ_in_at_most_two_layers(cap: float) -> None:
    layers = [*BY_REGIME[ALL], *BY_REGIME[PREFILL][:1]]
    base = within(frontier(layers), cap)
    assert base is not None
    found = neighbours(base, layers, cap, 9)
    every = (Choice(chosen) for chosen in itertools.product(*map(hull, layers)))
    near = [c for c in every if c.cost <= cap and 1 <= sum(a != b for a, b in zip(c.candidates, base.candidates, strict=True)) <= 2]
    assert [choice.loss for choice in found] == sorted(choice.loss for choice in near)[:9] and set(found) <= set(near)
    assert neighbours(base, layers, cap, 0) == []


# --- single layers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """A model of three layers and two windows of 211 tokens, the last 37 of which are the tail."""
    source = inspect_source(tiny.save(tmp_path_factory.mktemp("regimes") / "model", vocab_size=256, num_hidden_layers=3))
    patched = source.load(make_plan(source, layers="none", seq=(1, 300, 300), keep_exact="op"))
    assert isinstance(patched, Patched)
    ids = torch.randint(256, (600,), generator=torch.Generator().manual_seed(1))
    text = Corpus(ids, "text.txt", "text", "bytes", "sha256")
    return Laboratory(patched, reference_operator(), windows(text, 211, 2), 37, torch.device("cpu"))


@pytest.mark.parametrize("length, tail, count", [(8192, 512, 8), (8192, 512, 1), (211, 37, 8), (2, 1, 3), (10, 9, 2)], ids=str)
def test_tails_lie_apart_in_the_second_half_and_the_last_ends_the_window(length: int, tail: int, count: int) -> None:
    found = splits(length, tail, count)
    assert 1 <= len(found) <= count and found[-1] == length - tail
    assert all(b - a >= tail for a, b in itertools.pairwise(found)) and found[0] >= min(length // 2, length - tail)


@pytest.mark.parametrize("layer", [0, 1], ids=str)
def test_one_pass_says_what_a_layer_does_in_both_regimes(lab: Laboratory, layer: int) -> None:
    own = lab.patched.plan.planned[layer].config
    assert own is not None
    chosen, window = {layer: replace(own, **SMALL, strict_causal=1)}, lab.windows[1]
    whole = lab.measure(chosen, REGIMES, [window])
    found = probe(lab, chosen, REGIMES, [window], 1)
    assert list(found) == [TEXT] and found[TEXT][PREFILL] > 1e-7
    assert found[TEXT] == {regime: pytest.approx(whole[regime]["kl"]["mean"], rel=1e-4) for regime in REGIMES}
    each = []
    for split in splits(211, 37, 2):  # a shorter window has its tail where the longer one's first tail is
        part = replace(window, ids=window.ids[:, : split + 38], length=split + 37)
        each.append(lab.measure(chosen, [PREFILL], [part])[PREFILL]["kl"]["mean"])
    assert probe(lab, chosen, [PREFILL], [window], 2) == {TEXT: {PREFILL: pytest.approx(sum(each) / 2, rel=1e-3)}}


def test_the_last_layer_does_nothing_to_what_is_decoded(lab: Laboratory) -> None:
    own = lab.patched.plan.planned[2].config
    assert own is not None
    found = probe(lab, {2: replace(own, **SMALL)}, REGIMES, lab.windows[:1], 3)[TEXT]
    assert found[ALL] > 1e-6 and found[PREFILL] < 1e-9


def test_digits_and_text_of_a_prompt_are_told_apart(lab: Laboratory) -> None:
    own = lab.patched.plan.planned[0].config
    assert own is not None
    chosen = {0: replace(own, **SMALL, strict_causal=1)}
    prompts = [replace(window, answer=tuple(window.targets[-8:].tolist())) for window in lab.windows]
    whole, found = lab.measure(chosen, REGIMES, prompts), probe(lab, chosen, REGIMES, prompts, 1)
    kl: dict[str, list[Tensor]] = {regime: [] for regime in REGIMES}
    for window in prompts:
        with lab.patched.mode("exact"):
            exact = lab.patched.forward(window.inputs).logits[0].double().log_softmax(-1)
        lab.configure(chosen)
        with lab.patched.mode("plan", attention=reference_operator()):
            ours = lab.patched.forward(window.inputs).logits[0].double().log_softmax(-1)
            cache = lab.patched.forward(window.inputs[:, : 211 - 37], use_cache=True).past_key_values
        with lab.patched.mode("exact"):
            tail = lab.patched.forward(window.inputs[:, 211 - 37 :], past_key_values=cache, use_cache=True).logits[0].double()
        kl[ALL].append((exact.exp() * (exact - ours)).sum(-1))
        kl[PREFILL].append((exact[-37:].exp() * (exact[-37:] - tail.log_softmax(-1))).sum(-1))
    for regime, rows in kl.items():
        text, digits = (float(torch.cat(part).mean()) for part in zip(*((row[:-QUESTION_ROWS], row[-8:]) for row in rows), strict=True))
        assert whole[regime]["kl"]["mean"] == pytest.approx(text, rel=1e-4) == found[TEXT][regime] and text > 1e-7
        assert whole["needle_kl"][regime] == pytest.approx(digits, rel=1e-4) == found[PLANTED][regime] and digits > 1e-7


@dataclass(frozen=True)
class Split:
    """Where a prompt of 211 tokens ends, a node, and whether one pass is said to serve."""

    at: int
    node: dict[str, int | str]
    serves: bool

    def __str__(self) -> str:
        return f"{self.at}-{'-'.join(f'{name}={value}' for name, value in self.node.items()) or 'small'}"


@pytest.mark.parametrize(
    "case",
    [
        Split(176, {}, True),
        Split(80, {"local_size": 128}, True),
        Split(175, {}, False),
        Split(64, {}, False),
        Split(175, {"strict_causal": 1}, True),
        Split(176, {"sample_size": 0, "num_blocks": 3}, True),
        Split(176, {"exact_below": 190}, False),
        Split(175, {"exact_below": 300}, True),
        Split(176, {"selector": "sortlsh"}, False),
    ],
    ids=str,
)
def test_where_one_pass_serves_it_leaves_what_a_prefill_would(lab: Laboratory, case: Split) -> None:
    own = lab.patched.plan.planned[0].config
    assert own is not None
    config = replace(own, **{**SMALL, "strict_causal": 0, **case.node})
    assert one_pass_serves(config, case.at, 211) == case.serves
    lab.configure({layer.index: config for layer in lab.patched.plan.planned})
    ids = lab.windows[0].inputs
    whole, alone = (lab.approximate(part, True)[1] for part in (ids, ids[:, : case.at]))
    pairs = zip(whole.layers, alone.layers, strict=True)
    same = [torch.allclose(a.values[:, :, : case.at], b.values, rtol=1e-4, atol=1e-5) for a, b in pairs]
    assert same[0] and (all(same) or not case.serves)


def test_one_pass_serves_no_node_that_sees_both_ways() -> None:
    assert not one_pass_serves(Config(causal=0).exact(), 64, 128)


# --- rounding ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two names of one weight of a half type, a weight and a buffer of others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5).bfloat16(), nn.Linear(5, 5).bfloat16()
        self.b.weight = self.a.weight
        self.c = nn.Linear(3, 2)
        self.register_buffer("kept", torch.rand(7).half())


def test_weights_are_what_they_were_after_fp32() -> None:
    model = Tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError), in_fp32(model):
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
        assert model.a.weight is model.b.weight and torch.equal(model.a.weight, before["a.weight"].float())
        raise KeyError
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items())


def test_rounding_is_what_exact_attention_by_the_operator_differs_by(lab: Laboratory) -> None:
    calls: list[bool] = []

    def exact(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        calls.append(config.is_exact(q.shape[2], k.shape[2]))
        o, lse = reference_operator()(q, k, v, config, lengths)
        return o * (1 + 1e-3), lse

    own = replace(lab, operator=Operator("rounds", exact), kept={})
    found = own.rounding(REGIMES)
    assert calls == [True] * 6  # three layers, two windows, one pass for both regimes
    for regime in REGIMES:
        assert 1e-10 < found[regime]["kl"]["mean"] < 1e-4 and found[regime]["windows"] == 2
    assert lab.rounding([ALL])[ALL]["kl"]["mean"] < 1e-9


# --- time --------------------------------------------------------------------------------------------------------------


def test_times_are_multiples_of_exact_attentions_and_of_all_heads(lab: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperattention.validate.policy import times

    call = lab.captured(lab.windows[0])[0]
    clock, spent = [0.0], {1: 3.0, 2: 1.5}
    monkeypatch.setattr(times.time, "perf_counter", lambda: clock[0])

    def attention(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        assert k.shape[1] == 1 and q.shape[1] == call.q.shape[1] // call.k.shape[1]
        clock[0] += spent[config.seed]
        return q, q

    def exact(*_: object) -> Tensor:
        clock[0] += 6.0
        return call.q

    monkeypatch.setattr("hyperattention.validate.operators.exact_attention", exact)
    given = [replace(call.config, **SMALL, seed=1), replace(call.config, **SMALL, seed=2), call.config.exact()]
    heads = call.k.shape[1]
    assert op_times(Operator("clocked", attention), call, given) == [pytest.approx(1000 * heads * s) for s in (3.0, 1.5, 6.0)]
