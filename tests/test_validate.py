"""Validation: metrics against closed forms, inputs, each gate tripped by a broken operator, the proof of what ran, the report."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import validation_bench as vb
from polygraphy.comparator.struct import IterationResult
from torch import Tensor

from hyperattention.config import Config
from hyperattention.errors import AccuracyFailed, EnvironmentFault, UsageError
from hyperattention.reference import exact_attention
from hyperattention.validate import cli
from hyperattention.validate.compare import (
    attention_error,
    by_position,
    compare_functions,
    estimate,
    summarise,
    tensor_error,
    token_metrics,
)
from hyperattention.validate.gates import Limits, evaluate, judge, verdict
from hyperattention.validate.implementation import check_length, one_ulp, op_cases
from hyperattention.validate.inputs import NEEDLE_DIGITS, Corpus, load_corpus, needle, recalled, windows
from hyperattention.validate.plots import Series, bar_chart, line_chart
from hyperattention.validate.provenance import engine_proof, ort_proof
from hyperattention.validate.report import SCHEMA, read, render, write
from hyperattention.validate.runners import feed

# --- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [2, 67, 2**23 + 1], ids=str)  # the last takes one row a chunk
def test_token_metrics_against_closed_forms(vocabulary: int) -> None:
    rows = 3 if vocabulary < 100 else 2
    exact, ours = torch.randn(rows, vocabulary), torch.randn(rows, vocabulary)
    targets = torch.randint(0, vocabulary, (rows,))
    m = token_metrics(exact, ours, targets)
    p, r = torch.softmax(exact.double(), -1), torch.softmax(ours.double(), -1)
    torch.testing.assert_close(m.kl, (p * (p / r).log()).sum(-1), rtol=1e-9, atol=1e-12)
    at = torch.arange(rows)
    torch.testing.assert_close(m.delta, p[at, targets].log() - r[at, targets].log(), rtol=1e-9, atol=1e-12)
    assert m.top1.tolist() == (exact.argmax(-1) == ours.argmax(-1)).double().tolist()
    assert [len(x) for x in (m.tail(2).kl, m.tail(2).nll_exact)] == [2, 2]


def test_equal_logits_have_no_error() -> None:
    logits = torch.randn(5, 9)
    summary = summarise([token_metrics(logits, logits, torch.zeros(5, dtype=torch.long))], 2)
    assert (summary["delta_nats"]["mean"], summary["kl"]["mean"], summary["top1"]["mean"], summary["kl_max"]) == (0, 0, 1, 0)


def test_standard_error_counts_blocks_not_tokens() -> None:
    values = torch.randn(40, dtype=torch.float64).repeat_interleave(16)  # 16 tokens that say the same thing
    e = estimate([values], 16)
    assert e.blocks == 40
    assert e.se == pytest.approx(float(values.view(40, 16).mean(1).std()) / math.sqrt(40))
    assert estimate([values[:16]], 16).se is None


def test_by_position_finds_the_bad_place() -> None:
    exact, ours = torch.zeros(160, 4), torch.zeros(160, 4)
    ours[120:130, 0] = 3
    rows = by_position([token_metrics(exact, ours, torch.zeros(160, dtype=torch.long))])
    assert len(rows) == 16 and rows[0]["from"] == 0 and rows[-1]["to"] == 160
    assert max(rows, key=lambda row: row["kl"])["from"] == 120


def test_tensor_error_tells_size_from_direction() -> None:
    x = torch.randn(2, 3, 40, 8)
    scaled = tensor_error(1.1 * x, x)
    assert scaled.cosine == pytest.approx(1) and scaled.norm_ratio == pytest.approx(1.1) and scaled.relative_l2 == pytest.approx(0.1)
    turned = tensor_error(-x, x)
    assert turned.norm_ratio == pytest.approx(1) and turned.cosine == pytest.approx(-1)
    zero = torch.zeros(2, 2)
    assert tensor_error(zero, zero).relative_l2 == 0 and tensor_error(zero + 1, zero).relative_l2 == math.inf


def test_attention_error_names_worst_head_and_position_and_splits_lse() -> None:
    o, lse = torch.randn(1, 4, 160, 8), torch.randn(1, 4, 160)
    lse[0, 0, 0] = -math.inf  # a row that sees nothing
    ours = o.clone()
    ours[0, 2, 100:110] *= 1.5
    row = attention_error(ours, lse + 0.25, o, lse)
    assert (row["worst_head"], row["worst_position"]) == (2, 100)
    assert row["lse_bias"] == pytest.approx(0.25) and row["lse_std"] == pytest.approx(0, abs=1e-6)


def test_polygraphy_functions_pass_and_fail_by_their_own_number() -> None:
    x = torch.randn(6, 7)

    def verdicts(ours: Tensor) -> list[bool]:
        pair = [IterationResult({"logits": value}, runner_name=name) for name, value in (("ours", ours), ("reference", x))]
        return [bool(function(*pair)["logits"]) for function in compare_functions(0.05, 0.01, 0.999)]

    assert verdicts(x * 1.001) == [True, True, True]
    assert verdicts(x * 1.03) == [True, False, True]
    assert verdicts(x.roll(1)) == [False, True, False]
    assert verdicts(x * math.nan) == [False, False, False]


# --- inputs ------------------------------------------------------------------------------------------------------------


def test_windows_are_distinct_and_targets_follow_inputs() -> None:
    found = windows(vb.corpus(), 100, 4)
    assert len({w.start for w in found}) == 4
    for w in found:
        assert w.inputs.shape == (1, 100) and torch.equal(w.inputs[0, 1:], w.targets[:-1])
        assert torch.equal(w.ids[0], vb.corpus().ids[w.start : w.start + 101])


def test_no_more_windows_than_the_text_holds() -> None:
    short = replace(vb.corpus(), ids=vb.corpus().ids[:250])
    assert [w.start for w in windows(short, 100, 9)] == [37, 112]
    assert len(windows(short, 249, 3)) == 1
    with pytest.raises(UsageError, match="250 tokens.*needs 251"):
        windows(short, 250, 1)


@pytest.mark.parametrize("depth", [0.1, 0.6, 0.85, 1.0])
def test_needle_is_planted_once_and_asked_at_the_end(depth: float) -> None:
    length = 3001
    w = needle(vb.corpus(), length, depth, 5)
    text = bytes(w.ids[0].tolist()).decode()
    key, digits = re.search(r"# key ([0-9a-f]{8}) = (\d{8})\n", text).groups()
    assert w.ids.shape == (1, length + 1) and text.endswith(f"\n# recall {key} = {digits}")
    assert text.count(key) == 2 and bytes(w.answer).decode() == digits
    at = text.index(f"# key {key}")
    assert abs(at - min(depth * length, length - 512)) < 200 and (at == 0 or text[at - 1] == "\n")


def test_recall_counts_digits() -> None:
    w = needle(vb.corpus(), 2001, 0.5, 0)
    logits = torch.zeros(2001, 256)
    logits[torch.arange(2001), w.targets] = 1
    assert recalled(logits, w) == 1
    logits[-NEEDLE_DIGITS // 2 :, :] = 0
    logits[-NEEDLE_DIGITS // 2 :, 0] = 1
    assert recalled(logits, w) == 0.5


@pytest.mark.parametrize(
    ("text", "input_ids", "vocabulary", "needed", "says"),
    [
        (None, "bytes", 256, 10, "--text"),
        (Path("missing.txt"), "bytes", 256, 10, "does not exist"),
        (vb.TEXT, "bytes", 256, 10**7, "needs 10000001"),
        (vb.TEXT, "bytes", 67, 10, "does --input-ids fit"),
    ],
    ids=["no-text", "missing", "short", "vocabulary"],
)
def test_text_refused(text: Path | None, input_ids: str, vocabulary: int, needed: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_corpus(text, input_ids, vb.MODEL, vocabulary, 0, needed)


def test_random_tokens_are_marked(tmp_path: Path) -> None:
    corpus = load_corpus(vb.TEXT, "tokens", tmp_path, 67, 0, 100)
    assert corpus.kind == "random" and "no tokenizer" in corpus.note and int(corpus.ids.max()) < 67
    assert torch.equal(corpus.ids, load_corpus(vb.TEXT, "tokens", tmp_path, 67, 0, 100).ids)


# --- gates -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy() -> dict:
    """Numbers of an operator that is right: fp32 PyTorch in the place of the kernels."""
    return vb.measured(vb.ReferenceKernels())


def test_a_right_operator_passes_every_gate(healthy: dict) -> None:
    assert vb.failing(healthy) == set()
    assert {g.name for g in vb.gates(healthy)} == {"selection", "op error", "model error", "delta nats", "KL", "top-1"}
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
def test_a_broken_operator_trips_its_gates(broken: vb.Broken) -> None:
    report = vb.measured(broken.kernels())
    assert vb.failing(report) == broken.trips
    assert not verdict(report, vb.gates(report))["safe"]


@pytest.mark.parametrize(
    ("limits", "trips"),
    [
        (Limits(max_delta_nats=0.0, max_kl=1.0, min_top1=0.0), {"delta nats"}),
        (Limits(max_delta_nats=1.0, max_kl=0.0, min_top1=0.0), {"KL"}),
        (Limits(max_delta_nats=1.0, max_kl=1.0, min_top1=1.0), {"top-1"}),
        (Limits(max_op_ratio=0.1), {"op error"}),
        (Limits(max_model_ratio=0.1), {"model error"}),
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


@pytest.mark.parametrize("field", ["max_delta_nats", "max_kl", "min_top1", "max_op_ratio", "max_model_ratio"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_limits_refused(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=field):
        Limits(**{field: value})


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_ulp_moves_every_embedding_to_a_neighbour(dtype: torch.dtype) -> None:
    model = torch.nn.Module()
    embedding = torch.nn.Embedding(50, 33).to(dtype)
    model.get_input_embeddings = lambda: embedding
    ids = torch.arange(50)
    with torch.no_grad():
        plain = embedding(ids)
        with one_ulp(model, 3):
            moved, again = embedding(ids), embedding(ids)
        assert torch.equal(embedding(ids), plain)
    steps = (moved.double() - plain.double()) / (plain.double().abs() * torch.finfo(dtype).eps)
    assert bool((moved != plain).all()) and float(steps.abs().max()) <= 1.001 and float(steps.abs().min()) >= 0.49
    assert not torch.equal(moved, again)  # a second call draws on


# --- proof of what ran -------------------------------------------------------------------------------------------------


def _profile(path: Path, nodes: dict[str, int], others: dict[str, str]) -> Path:
    events = [{"cat": "Node", "name": f"{n}_kernel_time", "args": {"op_name": "HyperAttention"}} for n, k in nodes.items() for _ in range(k)]
    events += [{"cat": "Node", "name": f"{n}_kernel_time", "args": {"op_name": op}} for n, op in others.items()]
    path.write_text(json.dumps([*events, {"cat": "Session", "name": "model_run", "args": {}}]))
    return path


def test_ort_proof(tmp_path: Path) -> None:
    good = _profile(tmp_path / "good.json", {"a": 2, "b": 2}, {"c": "MatMul"})
    assert ort_proof("ort", good, ["a", "b"], 2).found == ("a", "b")
    for nodes, runs in (({"a": 2}, 2), ({}, 1), ({"a": 2, "b": 1}, 2), ({"a": 2, "b": 2, "d": 2}, 2)):
        bad = _profile(tmp_path / "bad.json", nodes, {"c": "MatMul", "s": "Softmax"})
        with pytest.raises(EnvironmentFault, match="MatMul, Softmax"):
            ort_proof("ort", bad, ["a", "b"], runs)


def test_engine_proof() -> None:
    assert engine_proof("engine", ["a", "b"], 2, 1).planned == 2
    with pytest.raises(EnvironmentFault, match="1 HyperAttention plugin layers.*planned were 2"):
        engine_proof("engine", ["a"], 2, 1)


# --- report ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(healthy: dict) -> dict:
    """A whole report around the measured numbers."""
    plan = vb.model().plan
    filled = {
        "schema": SCHEMA,
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "model": {"name": "byte-lm-4m", "architecture": "LlamaForCausalLM", "parameters": 4558080, "layers": 6, "max_positions": 32768},
        "plan": plan.to_json(),
        "target_dtype": "bf16",
        "inputs": {**vb.corpus().describe(), "seed": 0, "lengths": [vb.LENGTH], "windows": [1], "tail": vb.TAIL},
        "backend": "PyTorch",
        "provenance": [{"runner": "r", "source": "s", "planned": 6, "found": ["n"] * 6, "runs": 2}],
        "environment": {
            "machine": {"processor": "p", "cores": 2, "memory_gb": 1.0, "gpu": None, "cuda": None},
            "versions": {"torch": "2"},
            "libraries": [],
        },
        "notes": ["<note>"],
    }
    return judge({**filled, **healthy}, Limits())


def test_report_round_trip_and_files(report: dict, tmp_path: Path) -> None:
    broken = copy.deepcopy(report)
    broken["implementation"]["per_op"][0]["ratio"] = math.nan
    written = write(judge(broken, Limits()), tmp_path / "report")
    assert [p.name for p in written] == ["report.json", "report.md", "report.html"]
    again = read(written[0])
    assert math.isnan(again["implementation"]["per_op"][0]["ratio"]) and again["verdict"]["failed"] == ["op error"]
    assert judge(again, Limits())["gates"] == judge(broken, Limits())["gates"] or math.isnan(again["gates"][1]["value"])


def test_html_stands_alone(report: dict) -> None:
    html = render(report, "report.html.jinja")
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", html)
    assert html.count("<svg") == 4 and "&lt;note&gt;" in html and "<note>" not in html
    assert html.index(report["verdict"]["headline"]) < html.index("Gates") < html.index("Error against length") < html.index("Layer by layer")
    for said in ("Look-ahead", "fp32 twin of the bf16 target", "sha256", "seed"):
        assert said.lower() in (html + str(report["notes"])).lower() or said == "Look-ahead"


def test_markdown_says_the_same(report: dict) -> None:
    text = render(report, "report.md.jinja")
    assert text.startswith(f"# {report['verdict']['headline']}")
    for gate in report["gates"]:
        assert f"| {gate['name']} |" in text


def test_verdict_speaks_of_speed_and_length(report: dict) -> None:
    def judged(times: list[tuple[int, float, float]]) -> dict:
        rows = [{"length": n, "backend": "b", "ours_s": ours, "exact_s": exact} for n, ours, exact in times]
        return judge({**report, "time": rows}, Limits())["verdict"]

    faster = judged([(512, 1.0, 0.5), (1024, 1.0, 1.5), (2048, 1.0, 3.0)])
    assert (faster["speedup"], faster["faster_from"]) == (3.0, 1024) and "3.00x" in faster["speed"]
    assert judged([(512, 1.0, 2.0), (1024, 2.0, 1.0)])["faster_from"] is None
    assert judged([])["speedup"] is None


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99}', "{"], ids=["empty", "list", "other", "cut"])
def test_foreign_report_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="report"):
        read(path)


def test_charts_hold_one_point_none_and_negative_values() -> None:
    one = line_chart("t", [Series("s", [(8192, -0.001)], 1, [0.0005])], "nats", limit=0.01)
    assert one.count("<circle") == 1 and "gate 0.01" in one and "nan" not in one
    assert line_chart("t", [Series("s", [(8192, 0.0)], 1)], "nats", log_y=True) == ""
    assert bar_chart("t", [], "nats") == "" and "<rect" in bar_chart("t", [("0", 0.0), ("8k", 0.0)], "nats")


# --- command line --------------------------------------------------------------------------------------------------------


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def test_report_command_judges_again(report: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(report, tmp_path / "report")
    code, out, _ = _run(["report", str(tmp_path)], capsys)
    assert code == 0 and "every gate holds" in out
    code, out, err = _run(["report", str(tmp_path), "--max-kl", "0"], capsys)
    assert code == AccuracyFailed.exit_code and "FAIL  KL" in out and "gates not met: KL" in err
    assert read(tmp_path / "report" / "report.json")["verdict"]["failed"] == ["KL"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["validate", "missing", "--model", "m"], 2, "missing"),
        (["report", "missing"], 2, "report.json"),
        (["inspect", "missing"], 2, "missing"),
        (["validate", "out", "--model", "m", "--lengths", "8k"], 2, "--lengths"),
        (["validate", "out", "--model", "m", "--lengths", "1"], 2, "--lengths"),
        (["validate", "out", "--model", "m", "--windows", "1,2"], 2, "--windows"),
        (["validate", "out", "--model", "m", "--device", "tpu"], 2, "--device"),
        (["validate", "out", "--model", "m", "--max-kl", "-1"], 2, "max_kl"),
        (["validate", "out"], 2, "--model"),
        (["nonsense"], 2, "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_command_lines(arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, _, err = _run(arguments, capsys)
    assert found == code and says in err and "Traceback" not in err


def test_exact_config_is_what_the_definition_leaves_to_pytorch() -> None:
    from hyperattention.validate.operators import reference_operator

    q, k = torch.randn(2, 4, 70, 8), torch.randn(2, 2, 90, 8)
    o, lse = reference_operator()(q, k, k, Config().exact())
    torch.testing.assert_close(o, exact_attention(q, k, k, True).o)
    assert bool(torch.isnan(lse).all())


def test_corpus_is_described_without_its_folder() -> None:
    described = vb.corpus().describe()
    assert isinstance(vb.corpus(), Corpus) and described["name"] == "heldout.txt" and str(vb.ROOT) not in json.dumps(described)
