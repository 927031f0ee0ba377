"""Each gate tripped by a broken operator, limits, and the proof of what ran."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import report_samples as samples
import torch
import validation_bench as vb

from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export import gate_options
from hyperattention.export.gate_options import Limits
from hyperattention.validate import approximation, first_feed
from hyperattention.validate.feeds import feed
from hyperattention.validate.gates import evaluate
from hyperattention.validate.implementation import check_length, one_ulp_off, op_cases
from hyperattention.validate.inputs import windows
from hyperattention.validate.provenance import engine_proof, ort_proof
from hyperattention.validate.verdict import judge


@pytest.fixture(scope="module")
def healthy() -> dict:
    """Numbers of an operator that is right: fp32 PyTorch in the place of the kernels."""
    return vb.measured(vb.ReferenceKernels())


# --- gates -------------------------------------------------------------------------------------------------------------


def test_a_right_operator_passes_every_gate(healthy: dict) -> None:
    assert vb.failing(healthy) == set()
    assert {g.name for g in vb.gates(healthy)} == {"selection", "op error", "model error", "delta nats", "KL", "top-1", "hard"}
    assert not healthy["approximation"][0]["exact"] and healthy["approximation"][0]["all_positions"]["kl"]["mean"] > 0
    assert all(row["polygraphy"] for row in healthy["implementation"]["whole_model"])


@pytest.mark.parametrize(
    "broken",
    [
        vb.Broken(vb.WeightsDoubled, frozenset({"op error", "model error"})),
        vb.Broken(vb.LengthsIgnored, frozenset({"op error"})),
        vb.Broken(vb.UpperLeft, frozenset({"op error"})),
        vb.Broken(vb.HeavyDropped, frozenset({"op error", "model error"})),
        vb.Broken(vb.OtherDraw, frozenset({"selection", "op error", "model error"})),
        vb.Broken(vb.WindowOnly, frozenset({"model error", "delta nats", "KL", "top-1"})),
    ],
    ids=str,
)
def test_a_broken_operator_trips_its_gates(broken: vb.Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_feed, "measure_look_ahead", lambda *_: None)  # half of the time, and no gate reads it
    monkeypatch.setattr(approximation, "has_twin", lambda *_: False)
    report = vb.measured(broken.kernels())
    assert vb.failing(report) == broken.trips
    assert judge({**samples.report(), **report}, Limits())["verdict"]["safe"] is False


@pytest.mark.parametrize(
    ("limits", "trips"),
    [
        (Limits(delta_nats=0.0, kl=1.0, top1=0.0), {"delta nats"}),
        (Limits(delta_nats=1.0, kl=0.0, top1=0.0), {"KL"}),
        (Limits(delta_nats=1.0, kl=1.0, top1=1.0), {"top-1"}),
        (Limits(op_error=0.1), {"op error"}),
        (Limits(model_error=0.1), {"model error"}),
    ],
    ids=["delta", "kl", "top1", "op", "model"],
)
def test_each_limit_moves_its_own_gate(healthy: dict, limits: Limits, trips: set[str]) -> None:
    report = copy.deepcopy(healthy)
    tail = report["approximation"][0]["prefill_exact_decode"]
    tail["delta_nats"]["mean"], tail["top1"]["mean"] = 0.001, 0.995
    assert vb.failing(report, limits) == trips


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["delta_nats", "kl", "top1"])
def test_no_gate_passes_on_a_number_that_is_none(healthy: dict, key: str, bad: float) -> None:
    report = copy.deepcopy(healthy)
    report["approximation"][0]["prefill_exact_decode"][key]["mean"] = -bad if key == "top1" else bad
    assert len(vb.failing(report)) == 1


@pytest.mark.parametrize("emptied", ["per_op", "approximation"])
def test_nothing_passes_unmeasured(healthy: dict, emptied: str) -> None:
    report = copy.deepcopy(healthy)
    (report if emptied == "approximation" else report["implementation"])[emptied] = []
    with pytest.raises(UsageError, match="run the validation again"):
        evaluate(report, Limits())


@pytest.mark.parametrize("name", gate_options.names())
@pytest.mark.parametrize("value", ["-0.1", "nan", "inf", "2000%", ""])
def test_no_gate_takes_a_limit_that_is_none(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"--gate.*{name}"):
        gate_options.parse_gates([f"{name}={value}"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["recall=1"], "the gates are delta-nats, kl"),
        (["kl"], "takes NAME=VALUE"),
        ([""], "the gates are"),
        (["=1"], "the gates are"),
        (["kl=1", "kl=2"], "given twice"),
        (["top1=98"], "from 0 to 1"),
        (["cosine=0.9"], "does not judge a report of kind language"),
    ],
    ids=["unknown", "no-value", "empty", "no-name", "twice", "percent", "other-kind"],
)
def test_wrong_gates_refused(given: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        gate_options.parse_gates(given, "language")


def test_given_gates_stand_on_those_saved() -> None:
    given = gate_options.parse_gates(["op-error=3", " top1 = 0.5"], "language")
    limits = gate_options.with_gates(given, {"kl": 0.25, "op_error": 9.0, "hard": None})
    assert (limits.op_error, limits.top1, limits.kl, limits.hard, limits.delta_nats) == (3.0, 0.5, 0.25, None, Limits().delta_nats)
    with pytest.raises(UsageError, match="recall"):
        gate_options.with_gates({}, {"recall": 1.0})


def fails(report: dict) -> set[str]:
    return {gate["name"] for gate in report["gates"] if not gate["passed"]}


@pytest.mark.parametrize(
    ("kind", "gate"),
    [(kind, name) for kind in ("language", "features") for name in gate_options.names(kind)],
)
def test_every_gate_of_a_kind_can_pass_and_fail(kind: str, gate: str) -> None:
    told = {"delta-nats": "delta nats", "kl": "KL", "top1": "top-1", "norm-ratio": "norm ratio"}.get(gate, gate.replace("-", " "))
    rows = samples.report(kind)["hard_inputs"]
    report = samples.report(kind, hard_inputs=[*rows[1:], {**rows[0], "passed": False}])
    assert told in {g["name"] for g in report["gates"]} and report["verdict"]["safe"] is True
    (value,) = (g["value"] for g in report["gates"] if g["name"] == told)
    sense = -1 if gate in ("top1", "cosine", "hard", "needle") else 1
    for slack, failed in ((1e-9, set()), (-1e-9, {told})):
        limits = gate_options.with_gates(gate_options.parse_gates([f"{gate}={value + sense * slack!r}"], kind), report["limits"])
        judged = judge(report, limits)
        assert fails(judged) - {"hard"} == failed - {"hard"} and set(judged["verdict"]["failed"]) == failed
        assert judged["verdict"]["safe"] is (not failed) and judged["limits"][gate.replace("-", "_")] == pytest.approx(value, abs=1e-8)


def test_the_worst_output_at_the_worst_length_counts() -> None:
    report = samples.report("features")
    report["approximation"][1]["outputs"][1]["cosine"]["mean"] = 0.98
    report["approximation"][2]["outputs"][0]["norm_ratio"]["mean"] = 0.97
    found = {gate["name"]: gate for gate in judge(report, Limits())["gates"]}
    assert (found["cosine"]["value"], found["cosine"]["where"], found["cosine"]["passed"]) == (0.98, "pooled at 12,345 tokens", False)
    assert found["norm ratio"]["value"] == pytest.approx(0.03) and found["norm ratio"]["where"] == "features at 32,768 tokens"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["cosine", "norm_ratio"])
def test_no_gate_of_features_passes_on_a_number_that_is_none(key: str, bad: float) -> None:
    report = samples.report("features")
    report["approximation"][0]["outputs"][0][key]["mean"] = bad if key == "norm_ratio" or math.isnan(bad) else -math.inf
    assert judge(report, Limits())["verdict"]["failed"] == [key.replace("_", " ")]


def test_hard_inputs_are_advice_until_asked_for() -> None:
    rows = [{**row, "passed": row["distribution"] not in ("needle", "gaussian")} for row in samples.report()["hard_inputs"]]
    report = samples.report(hard_inputs=rows)
    (gate,) = [gate for gate in report["gates"] if gate["name"] == "hard"]
    assert gate["advisory"] and not gate["passed"] and gate["value"] == pytest.approx(0.6)
    assert "needle" in gate["where"] and "gaussian" in gate["where"] and "clustered" not in gate["where"]
    assert report["verdict"]["safe"] is True and "needle" in report["verdict"]["small_print"][0]
    assert judge(report, Limits(hard=0.6))["verdict"]["safe"] is True
    judged = judge(report, Limits(hard=0.61))
    assert judged["verdict"]["failed"] == ["hard"] and judged["verdict"]["small_print"] == []
    assert "hard inputs" in judged["verdict"]["headline"]
    with pytest.raises(UsageError, match="--gate hard"):
        samples.report(limits=Limits(hard=1.0), hard_inputs=[])
    nothing = {**samples.report()["plan_summary"], "approximate_layers": []}
    assert samples.report(limits=Limits(hard=1.0), hard_inputs=[], plan_summary=nothing)["verdict"]["safe"] is True


def test_planted_keys_are_advice_until_asked_for() -> None:
    report = samples.report()
    (gate,) = [gate for gate in report["gates"] if gate["name"] == "needle"]
    worst = min(report["needle"]["rows"], key=lambda row: row["prefill_exact_decode"]["mean"])
    assert gate["advisory"] and gate["passed"] and gate["where"] == "multi-key at 32,768 tokens"
    assert gate["value"] == worst["prefill_exact_decode"]["mean"]  # exact attention recalls all of them
    half = copy.deepcopy(report["needle"])
    half["rows"][0] |= {"exact": samples.estimate(0.6), "prefill_exact_decode": samples.estimate(0.45)}
    half["rows"][1] |= {"exact": samples.estimate(0.4), "prefill_exact_decode": samples.estimate(0.1)}  # the model cannot do it itself
    lost = samples.report(needle=half)
    assert lost["verdict"]["safe"] is True and "25% are lost (single at 8,192 tokens)" in lost["verdict"]["small_print"][0]
    judged = judge(lost, Limits(needle=0.76))
    assert judged["verdict"]["failed"] == ["needle"] and "planted keys" in judged["verdict"]["headline"]
    assert judge(lost, Limits(needle=0.75))["verdict"]["safe"] is True


@pytest.mark.parametrize("rows", ["unmeasured", "beyond the model"])
def test_planted_keys_that_cannot_be_judged(rows: str) -> None:
    unable = [{**row, "exact": samples.estimate(0.3)} for row in samples.needle()["rows"]]
    needle = None if rows == "unmeasured" else {"prompts": 4, "rows": unable}
    assert "needle" not in {gate["name"] for gate in samples.report(needle=needle)["gates"]}
    with pytest.raises(UsageError, match="holds no planted keys" if needle is None else "less than half"):
        samples.report(limits=Limits(needle=0.5), needle=needle)
    nothing = {**samples.report()["plan_summary"], "approximate_layers": []}
    assert samples.report(limits=Limits(needle=0.5), needle=needle, plan_summary=nothing)["verdict"]["safe"] is True


def test_op_cases_cover_padding_chunks_and_the_exact_path() -> None:
    with vb.bench(vb.ReferenceKernels()) as (bench, _):
        length = check_length(bench.plan, vb.LENGTH)
        with bench.patched.capture() as captured:
            bench.exact.infer(feed(windows(vb.corpus(), length, 1)[0].inputs))
    approximate = {layer.index for layer in bench.plan.approximate}
    cases = op_cases([c for c in captured if c.layer in approximate])
    assert {c.layer for c in cases} == approximate
    assert any(c.lengths is not None and bool(torch.isnan(c.k).any()) for c in cases)
    assert any(c.config.is_exact(c.q.shape[2], c.k.shape[2]) and c.q.shape[2] < c.k.shape[2] for c in cases)
    assert 150 < length < vb.LENGTH and length % 16


class _Seen:
    """What a runner's model sees of a table looked up, and of a floating input."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.table = torch.randn(50, 33, dtype=dtype)

    def infer(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"rows": torch.nn.functional.embedding(given["ids"], self.table), "value": given["value"] * 1, "ids": given["ids"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("output", ["rows", "value"])
def test_one_ulp_moves_every_embedding_and_floating_input_to_a_neighbour(output: str, dtype: torch.dtype) -> None:
    runner = _Seen(dtype)
    given = {"ids": torch.arange(50), "value": torch.randn(7, 9, dtype=dtype)}
    plain = runner.infer(given)
    moved, again = one_ulp_off(runner, given, 3), one_ulp_off(runner, given, 4)
    assert torch.equal(moved["ids"], plain["ids"]) and torch.equal(runner.infer(given)[output], plain[output])
    before = plain[output].double()
    steps = (moved[output].double() - before) / (before.abs() * torch.finfo(dtype).eps)
    assert bool((moved[output] != plain[output]).all()) and float(steps.abs().max()) <= 1.001 and float(steps.abs().min()) >= 0.49
    assert not torch.equal(moved[output], again[output])  # another seed, another draw
    assert torch.equal(moved[output], one_ulp_off(runner, given, 3)[output])


# --- proof of what ran -------------------------------------------------------------------------------------------------


def _profile(path: Path, nodes: dict[str, int], others: dict[str, str], provider: str = "CPUExecutionProvider") -> Path:
    ran = [(name, "HyperAttention") for name, count in nodes.items() for _ in range(count)] + list(others.items())
    events = [{"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": op, "provider": provider}} for name, op in ran]
    path.write_text(json.dumps([*events, {"cat": "Session", "name": "model_run", "args": {}}]))
    return path


def test_ort_proof(tmp_path: Path) -> None:
    good = _profile(tmp_path / "good.json", {"a": 2, "b": 2}, {"c": "MatMul"})
    assert ort_proof("ort", good, ["a", "b"], 2).found == ("a", "b")
    for nodes, runs in (({"a": 2}, 2), ({}, 1), ({"a": 2, "b": 1}, 2), ({"a": 2, "b": 2, "d": 2}, 2)):
        bad = _profile(tmp_path / "bad.json", nodes, {"c": "MatMul", "s": "Softmax"})
        with pytest.raises(EnvironmentFault, match="MatMul, Softmax"):
            ort_proof("ort", bad, ["a", "b"], runs)
    on_cuda = _profile(tmp_path / "cuda.json", {"a": 1}, {}, "CUDAExecutionProvider")
    assert "CUDAExecutionProvider" in ort_proof("ort", on_cuda, ["a"], 1, "CUDAExecutionProvider").source
    for path, wanted in ((on_cuda, "CPUExecutionProvider"), (_profile(tmp_path / "cpu.json", {"a": 1}, {}), "CUDAExecutionProvider")):
        with pytest.raises(EnvironmentFault, match=f"planned was {wanted}"):
            ort_proof("ort", path, ["a"], 1, wanted)


def test_engine_proof() -> None:
    assert engine_proof("engine", ["a", "b"], 2, 1).planned == 2
    with pytest.raises(EnvironmentFault, match="1 HyperAttention plugin layers.*planned were 2"):
        engine_proof("engine", ["a"], 2, 1)
