"""`hyperattention bench --attention`: contenders and their outputs, what is listed as left out, the record, the chart, Ctrl-C."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.validate import bench_attention, bench_rivals, bench_run, bench_timing, cli
from hyperattention.validate.bench_attention import OURS_EXACT, Inputs, OutputCheck, Problem
from hyperattention.validate.bench_plot import figure, rivals_line
from hyperattention.validate.bench_record import RECORD, summary

PNG = b"\x89PNG\r\n\x1a\n"
SCHEMA = Path(__file__).resolve().parent.parent / "docs/bench.schema.json"
TUNED = ["--exact-below", "32", "--block-size", "16", "--num-blocks", "1", "--sample-size", "8", "--local-size", "32", "--sinks", "3"]


def problem(**changes: Any) -> Problem:
    return Problem(**{**dict(batch=1, heads=4, kv_heads=2, head_dim=16, dtype="fp32", causal=True, device="cpu", seed=3), **changes})


def test_inputs_are_the_same_for_every_contender_and_follow_the_seed() -> None:
    first, again, other = (Inputs(problem(seed=seed)).at(37) for seed in (3, 3, 4))
    assert [tuple(x.shape) for x in first] == [(1, 4, 37, 16), (1, 2, 37, 16), (1, 2, 37, 16)]
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])


@pytest.mark.native
@pytest.mark.ort
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids="kv heads {}".format)
def test_exact_contenders_give_exact_attention(causal: bool, kv_heads: int) -> None:
    """Each contender's own output against softmax written out here, so that no kernel is timed on another problem."""
    given, length = problem(causal=causal, kv_heads=kv_heads), 53
    q, k, v = (x.double() for x in Inputs(given).at(length))
    k, v = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
    logits = q @ k.transpose(2, 3) / 4.0
    if causal:
        logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    wanted = (logits.softmax(-1) @ v).float()
    for backend in ("library", "ort"):
        names = bench_attention.rival_names()
        contenders, missing = bench_attention.contenders(given, {}, backend, names, length, threads=1)
        tried, refused = [], {left.contender for left in missing}
        for contender in contenders:
            try:
                run = contender.prepare(length)
            except ValueError:
                refused.add(contender.name)
                continue
            assert run.time() > 0
            torch.testing.assert_close(run.take(), wanted, atol=2e-5, rtol=1e-4, msg=contender.name)
            tried.append(contender.name)
        expected = {OURS_EXACT, "sdpa-flash", "sdpa-math", "ort-attention"}
        expected |= {"ort-gqa"} if causal else set()
        expected |= {"ort-mha"} if kv_heads == 4 else set()
        assert set(tried) == expected and refused == {OURS_EXACT, *names} - expected


def test_wrong_outputs_are_found() -> None:
    good = torch.randn(1, 2, 9, 4)
    outputs = {"ours-blocks": 2 * good, OURS_EXACT: -good, "sdpa-flash": good, "sdpa-math": good + 1e-6, "ort-gqa": good * float("nan")}
    check = OutputCheck(problem())
    found = check.wrong({name: check.keep(o) for name, o in outputs.items()})
    assert set(found) == {OURS_EXACT, "ort-gqa"}
    assert "differs from sdpa-flash's by 2" in found[OURS_EXACT] and found["ort-gqa"] == "its output is not finite"


def test_of_a_long_output_rows_are_compared_and_all_of_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "_MOST_KEPT", 1 * 2 * 10 * 4)
    check, good = OutputCheck(problem()), torch.randn(1, 2, 99, 4)
    bad = good.clone()
    bad[0, 1, 57, 2] = float("inf")
    assert check.keep(good).rows.shape == (1, 2, 10, 4) and check.keep(good[:, :, :10]).rows.equal(good[:, :, :10])
    assert check.wrong({name: check.keep(o) for name, o in (("sdpa-flash", good), ("sdpa-math", bad))}) == {
        "sdpa-math": "its output is not finite"
    }


def bench(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit code and the object that --json prints."""
    code = 0
    try:
        cli.main(["bench", *arguments, "--json", "--quiet"])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    common = ["--attention", "--device", "cpu", "--heads", "2", "--head-dim", "8", "--threads", "1", "--output", str(tmp_path / "made")]
    common += ["--max-seconds", "86400"]  # however slow the machine, nobody sits out
    return lambda *arguments: bench([*common, *arguments], capsys)


@pytest.mark.native
@pytest.mark.ort
def test_the_record_is_whole_and_the_chart_is_a_png(attention, tmp_path: Path) -> None:
    code, report = attention("--lengths", "150,40", "--repeats", "11", "--preset", "blocks,paper", "--backend", "ort", *TUNED)
    assert code == 0
    saved = json.loads((tmp_path / "made" / RECORD).read_text())
    assert {**saved, "files": [RECORD, "bench.png"]} == report
    assert (tmp_path / "made" / "bench.png").read_bytes().startswith(PNG)
    assert report["schema"] == 1 and report["kind"] == "attention" and report["interrupted"] is False
    assert str(tmp_path) not in json.dumps(saved)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(saved)
    keys = "length contender ours exact runs median_s mean_s min_s max_s p10_s p90_s p99_s memory seconds against".split()
    assert all(set(r) == set(keys) for r in report["rows"])
    names = {"ours-blocks", "ours-paper", OURS_EXACT, "sdpa-flash", "sdpa-math", "ort-gqa", "ort-mha", "ort-attention"}
    assert {(r["contender"], r["length"]) for r in report["rows"]} == {(name, n) for name in names for n in (40, 150)}
    assert {c["name"] for c in report["contenders"]} == names
    assert {left["contender"] for left in report["left_out"]} == set(bench_attention.rival_names()) - names
    assert all(left["length"] is None and "cuda" in left["reason"] for left in report["left_out"])
    for r in report["rows"]:
        assert r["runs"] == len(r["seconds"]) == 11 and r["p10_s"] <= r["median_s"] <= r["p90_s"] and r["p99_s"] is None
        rivals = {x["contender"]: x["median_s"] for x in report["rows"] if x["length"] == r["length"] and x["exact"] and not x["ours"]}
        fastest = min(rivals, key=lambda name: rivals[name])
        assert r["against"] == {"name": fastest, "ratio": rivals[fastest] / r["median_s"], "rounds": 11}
    assert report["growth"] == []
    assert report["presets"]["paper"]["sinks"] == 3 and report["presets"]["blocks"]["exact_below"] == 32


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["library", "ort"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_on_a_gpu(backend: str, causal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every contender that PyTorch itself brings is timed by events, with its memory, and gives what the others give."""
    shape = ["--heads", "4", "--kv-heads", "2", "--head-dim", "64", "--dtype", "bf16", "--causal" if causal else "--full"]
    common = [
        "--attention",
        "--device",
        "cuda",
        "--backend",
        backend,
        "--lengths",
        "300,5001",
        "--repeats",
        "11",
        "--preset",
        "blocks,paper",
    ]
    code, report = bench([*common, *shape, "--output", str(tmp_path)], capsys)
    assert code == 0, report
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(report)
    assert report["clock"].startswith("CUDA events") and report["environment"]["machine"]["gpu"]
    measured = {(r["contender"], r["length"]) for r in report["rows"]}
    names = {"ours-blocks", "ours-paper", OURS_EXACT, "sdpa-flash", "sdpa-math"}
    assert measured >= {(name, n) for name in names for n in (300, 5001)}, report["left_out"]
    assert all(r["memory"]["bytes"] >= 0 for r in report["rows"])
    assert not any("differs from" in left["reason"] or "not finite" in left["reason"] for left in report["left_out"]), report["left_out"]


@pytest.mark.native
@pytest.mark.ort
def test_axes_are_logarithmic_and_hold_every_contender(attention) -> None:
    _, report = attention("--lengths", "32,64", "--repeats", "2", "--rivals", "sdpa-math,ort-gqa", "--against", "ort-gqa")
    assert {r["against"]["name"] for r in report["rows"]} == {"ort-gqa"}
    (axes,) = figure(report).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert set(drawn) == {c["title"] for c in report["contenders"]}
    medians = {(r["contender"], r["length"]): r["median_s"] for r in report["rows"]}
    for c in report["contenders"]:
        assert drawn[c["title"]].tolist() == [[n, pytest.approx(1000 * medians[c["name"], n])] for n in (32, 64)]
    for c, dots in zip(report["contenders"], (x for x in axes.collections if x.get_sizes().size), strict=True):
        runs = [[r["length"], pytest.approx(1000 * t)] for r in report["rows"] if r["contender"] == c["name"] for t in r["seconds"]]
        assert dots.get_offsets().tolist() == runs
    assert figure(report).get_supxlabel().endswith("\nExact rivals: PyTorch SDPA, math; ONNX Runtime GroupQueryAttention.")
    left = [
        {"contender": "sdpa-math", "length": 2**20, "reason": "slow"},
        {"contender": "flash-attn-4", "length": None, "reason": "absent"},
    ]
    assert rivals_line({**report, "left_out": left}).endswith(
        "Left out (reasons in bench.json): PyTorch SDPA, math at 1024k; flash-attn-4."
    )
    assert any(c["title"] in line for line in summary(report) for c in report["contenders"])


@pytest.mark.native
@pytest.mark.ort
def test_an_op_that_holds_all_logits_is_left_out_where_memory_is_short(attention, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rivals, "free_bytes", lambda device: 2 * 2 * 4 * 2 * 60**2 - 1)
    code, report = attention("--lengths", "60,59", "--repeats", "1", "--rivals", "sdpa-math,sdpa-flash,ort-mha")
    assert code == 0
    assert {(left["contender"], left["length"]) for left in report["left_out"]} == {("sdpa-math", 60), ("ort-mha", 60)}
    assert "all logits at once" in report["left_out"][0]["reason"]
    assert {r["contender"] for r in report["rows"] if r["length"] == 59} == {
        "ours-blocks",
        OURS_EXACT,
        "sdpa-math",
        "sdpa-flash",
        "ort-mha",
    }


@pytest.mark.native
def test_ctrl_c_writes_the_record_and_exits_130(attention, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_timing, "SECOND_WARM_UP_BELOW", math.inf)
    original, calls = bench_rivals.sdpa, []

    def prepare(q, k, v, causal):
        run = original(torch.nn.attention.SDPBackend.MATH)(q, k, v, causal)

        def counted():
            calls.append(q.shape[2])
            if len(calls) == 5:  # two warm-ups, then the third round
                signal.raise_signal(signal.SIGINT)
            return run()

        return counted

    monkeypatch.setitem(bench_rivals.RIVALS, "sdpa-math", ("math", lambda: prepare, ("cpu",)))
    code, report = attention("--lengths", "16,32", "--repeats", "6", "--rivals", "sdpa-math")
    assert code == 130 and report["interrupted"] is True
    assert json.loads((tmp_path / "made" / RECORD).read_text())["interrupted"] is True
    assert set(calls) == {16} and [r["runs"] for r in report["rows"] if r["contender"] == "sdpa-math"] == [3]


@pytest.mark.native
def test_ours_that_cannot_run_is_an_environment_fault(attention, tmp_path: Path) -> None:
    code, report = attention("--lengths", "16", "--repeats", "1", "--rivals", "sdpa-flash", "--dtype", "bf16")
    assert code == EnvironmentFault.exit_code
    assert "HyperAttention itself could not be timed" in report["error"] and "hyperattention doctor" in report["error"]
    assert [r["contender"] for r in report["rows"]] == ["sdpa-flash"]
    assert (tmp_path / "made" / RECORD).is_file()


REFUSED = {
    "nothing": [],
    "both": ["OUT", "--attention"],
    "an option of the other": ["--attention", "--model", "m"],
    "an option of the op": ["OUT", "--heads", "8"],
    "an attribute": ["OUT", "--sinks", "8"],
    "length 0": ["--attention", "--lengths", "0"],
    "length no number": ["--attention", "--lengths", "4k"],
    "preset": ["--attention", "--preset", "fast"],
    "rival": ["--attention", "--rivals", "fa9"],
    "against": ["--attention", "--lengths", "8", "--against", "fa9"],
    "against one that cannot run": ["--attention", "--device", "cpu", "--lengths", "8", "--against", "sdpa-cudnn"],
    "heads": ["--attention", "--heads", "6", "--kv-heads", "4"],
    "no heads": ["--attention", "--heads", "-1"],
    "attribute out of range": ["--attention", "--block-size", "15"],
    "dtype": ["--attention", "--dtype", "fp8"],
    "device": ["--attention", "--device", "tpu"],
    "backend": ["--attention", "--backend", "jax"],
    "tensorrt on the processor": ["--attention", "--device", "cpu", "--backend", "tensorrt"],
    "repeats": ["--attention", "--repeats", "0"],
    "threads": ["--attention", "--threads", "-1"],
    "no folder": ["nowhere"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_are_refused_before_anything_is_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = bench([*REFUSED[name], "--output", str(tmp_path / "made")], capsys)
    assert code == UsageError.exit_code and len(found["error"]) > 20
    assert not (tmp_path / "made").exists()


def test_an_output_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    from hyperattention.validate.bench_record import write

    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="--output"):
        write({"kind": "attention", "rows": []}, tmp_path / "file" / "folder")


def test_lengths_of_an_outcome_are_within_its_range() -> None:
    assert bench_run.check_lengths((9, 3, 9), 1, 9) == (3, 9)
    with pytest.raises(UsageError, match="10; it takes 1 to 9"):
        bench_run.check_lengths((10,), 1, 9)
