"""The record of the GPU verification: what verify.sh leaves is read, contradictions are found, a stale record is said to be stale."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_record
import profile_table
import pytest
from bench_table import TARGETS, check_targets, markdown
from collect import collect
from prefill_table import DEPTH, results
from prefill_table import TARGETS as PREFILL
from prefill_table import check_targets as prefill_targets

from hyperattention.doctor import sources_id

ROOT = Path(__file__).resolve().parent.parent
SUITE = """<testsuites><testsuite tests="{}" failures="{}" errors="0" skipped="0"><testcase name="test_2000_random_problems"/>
</testsuite></testsuites>"""


def benchmark() -> dict[str, Any]:
    """Rows that meet both targets at one head size."""
    rows = [
        {"preset": t.preset, "causal": t.causal, "head_dim": 64, "heads": 32, "n": t.tokens, "workspace": 2**20, "errors": {}}
        | {"ms": {"plugin": 1.0, "ort": 1.1, "fa4": 1.2 * t.factor, "released": 9.0}, "peak": {"forward": 3 * 2**20}}
        for t in TARGETS
    ]
    return {"rows": rows, "targets": check_targets(rows), "missing": {"cudnn": "no such kernel"}, "failed": {}}


def prefill() -> dict[str, Any]:
    """Engines of two depths that meet every target: the time beside attention is a tenth of the exact attention's."""
    report: dict[str, Any] = {"fa4_ms_alone": {str(target.tokens): 9.0 for target in PREFILL}, "failed": {}, "engines": []}
    report["in_model"] = [{"tokens": int(tokens), "fa4_ms_in_model": 10.0} for tokens in report["fa4_ms_alone"]]
    for depth in (DEPTH // 8, DEPTH // 4):
        for variant, approximate in (("exact", 0), ("half", depth // 2), ("all", depth)):
            attention = (depth - approximate) * 11.0 + approximate * 0.5
            rows = [{"tokens": int(tokens), "ms": depth + attention, "plugin_ms": attention} for tokens in report["fa4_ms_alone"]]
            report["engines"].append({"depth": depth, "variant": variant, "approximate": approximate, "rows": rows})
    return report | {"targets": prefill_targets(results(report))}


def profile() -> dict[str, Any]:
    """A time split of one call of each selector; the second says something of its differences."""
    rates = dict.fromkeys(("flop_per_s", "int8_op_per_s", "bytes_per_s", "roofline"))
    blocks = [
        {**rates, "stage": "pool", "seconds": 0.002, "bytes_per_s": 2e12, "roofline": 0.5},
        {**rates, "stage": "select", "seconds": 0.001, "int8_op_per_s": 3e14, "bytes_per_s": 1e11, "roofline": 0.25},
        {**rates, "stage": "local", "seconds": 0.004, "flop_per_s": 4e14, "bytes_per_s": 1e12, "roofline": 0.6},
        {**rates, "stage": "total", "seconds": 0.007, "flop_per_s": 2e14, "roofline": 0.51},
    ]
    paper = [{**blocks[0], "stage": "hash"}, {**rates, "stage": "merge", "seconds": 0.0005}, blocks[-1]]
    cases = [
        {"preset": preset, "head_dim": 64, "length": 131072, "runs": 3, "stages": stages, "launches": [1], "notes": notes}
        for preset, stages, notes in (("blocks", blocks, []), ("paper", paper, ["two kernels"]))
    ]
    return {"kind": "profile", "rows": [], "profile": {"ceilings": {"text": "4 TB/s"}, "method": ["by hand"], "cases": cases}}


def model_report() -> dict[str, Any]:
    estimate = {"mean": 0.001, "se": 0.0001, "blocks": 4}
    regime = dict.fromkeys(("delta_nats", "kl", "top1", "exact_nats"), estimate)
    return {
        "model": {"name": "m"},
        "plan": {"preset": "paper"},
        "backend": "TensorRT",
        "provenance": [{"found": ["a", "b"]}],
        "implementation": {"per_op": [{"plan_differences": 0, "ratio": 0.5}], "whole_model": [{"ratio": 0.123456789}]},
        "approximation": [{"length": 8192, "all_positions": regime, "prefill_exact_decode": None}],
        "time": [],
        "needle": None,
        "gates": [{"name": "KL", "value": 0.001, "limit": 0.005, "passed": True, "advisory": False}],
        "hard_inputs": [{"distribution": "needle", "passed": True}],
        "verdict": {"headline": "Safe."},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What verify.sh leaves when every step passes."""
    out = tmp_path / "out"
    out.mkdir()
    build = sources_id(ROOT)
    machine = {"build_id": build, "date": "2026-01-02T03:04:05+00:00", "device": "GPU", "driver": "580.1"}
    (out / "machine.json").write_text(json.dumps(machine | {"libraries": {"l.so": {"build_id": build}}}))
    (out / "steps.tsv").write_text("".join(f"{name}\tPASS\t3\n" for name in gpu_record.STEPS))
    for name in ("cuda", "ort", *(f"sanitizer-{tool}" for tool in ("memcheck", "racecheck", "initcheck", "synccheck"))):
        (out / f"{name}.xml").write_text(SUITE.format(7, 0))
        (out / f"{name}.log").write_text("========= ERROR SUMMARY: 0 errors\n")
    (out / "sanitizer-racecheck.log").write_text("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
    (out / "engines").mkdir()
    checks = {"bf16": {"passed": True, "seconds": 1.0, "4097": {"o_error": 0.1}}}
    (out / "engines/engine_run.json").write_text(json.dumps({"tensorrt": "10.6", "checks": checks}))
    (out / "attention.json").write_text(json.dumps(benchmark()))
    (out / "prefill").mkdir()
    (out / "prefill/prefill.json").write_text(json.dumps(prefill()))
    (out / "kinds").mkdir()
    (out / "kinds/kinds.json").write_text(json.dumps({"image": {"passed": True, "seconds": 1.0}}))
    row = {"length": 4096, "contender": "ours", "median_s": 0.001, "against": {"name": "fa4", "ratio": 2.0, "rounds": 30}}
    times = {"kind": "attention", "problem": {"text": "alone"}, "rows": [row]}
    times_of = {name: {"growth": []} for name in ("bench-attention", "bench-grouped", "bench-growth", "bench-model")}
    for name, more in (*times_of.items(), ("bench-profile", profile())):
        (out / name).mkdir()
        (out / name / "bench.json").write_text(json.dumps({**times, **more}))
    for name in gpu_record.MODELS:
        (out / name / "report").mkdir(parents=True)
        (out / name / "report/report.json").write_text(json.dumps(model_report()))
    return out


def test_a_passed_verification_is_recorded(folder: Path) -> None:
    record = collect([folder])
    assert gpu_record.contradictions(record) == [] and record["passed"] and record["steps_missing"] == []
    assert record["steps"]["cuda"]["tests"] == {
        "passed": 7, "failures": 0, "errors": 0, "skipped": 0, "not_passed": [], "random_problems": 2000,
    }  # fmt: skip
    assert record["steps"]["sanitizer"]["tools"]["racecheck"]["errors"] == 0
    assert record["steps"]["validate-paper"]["model"]["implementation"]["model_ratio"] == 0.12346
    assert record["steps"]["bench-growth"]["bench"]["against"]["4096"]["ours"] == {"name": "fa4", "ratio": 2.0, "rounds": 30}
    assert record["build_id"] == sources_id(ROOT)


def test_failed_unread_and_missing_steps_do_not_pass(folder: Path) -> None:
    (folder / "steps.tsv").write_text("cuda\tFAIL\t3\nort\tPASS\t1\n")
    (folder / "ort.xml").unlink()
    record = collect([folder])
    assert gpu_record.contradictions(record) == [] and not record["passed"]
    assert not record["steps"]["ort"]["passed"] and "ort.xml" in record["steps"]["ort"]["unread"]
    assert "sanitizer" in record["steps_missing"]


def test_steps_may_be_spread_over_folders_of_one_build(folder: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(folder, second)
    (folder / "steps.tsv").write_text("cuda\tFAIL\t3\n")
    assert collect([folder, second])["passed"]
    machine = json.loads((second / "machine.json").read_text())
    (second / "machine.json").write_text(json.dumps(machine | {"build_id": "another"}))
    with pytest.raises(ValueError, match="of build another"):
        collect([folder, second])


def _set(*path: str | int, to: Any) -> Callable[[dict], None]:
    def change(record: dict) -> None:
        place: Any = record
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


WRONG = {
    "schema": _set("schema", to=0),
    "no device": _set("device", to=""),
    "library of another build": _set("libraries", "l.so", "build_id", to="another"),
    "a step gone": lambda r: r["steps"].pop("ort"),
    "failure hidden": _set("steps", "engines", "passed", to=False),
    "failing tests": _set("steps", "cuda", "tests", "failures", to=1),
    "skipped tests": _set("steps", "ort", "tests", "skipped", to=1),
    "no tests": _set("steps", "ort", "tests", "passed", to=0),
    "sanitizer errors": _set("steps", "sanitizer", "tools", "initcheck", "errors", to=2),
    "sanitizer without summary": _set("steps", "sanitizer", "tools", "memcheck", "errors", to=None),
    "engine check": _set("steps", "engines", "engines", "failures", to=1),
    "missed target": _set("steps", "attention", "benchmark", "rows", 0, "ms", "plugin", to=1000.0),
    "runtime failed": _set("steps", "attention", "benchmark", "failed", to={"ort": "no"}),
    "slow engine": _set("steps", "prefill", "prefill", "engines", 5, "rows", 1, "ms", to=1000.0),
    "FA4 faster within the model": _set("steps", "prefill", "prefill", "in_model", 1, "fa4_ms_in_model", to=1.0),
    "FA4's time alone in its place": _set("steps", "prefill", "prefill", "in_model", to=[]),
    "engine failed": _set("steps", "prefill", "prefill", "failed", to={"exact, 4 layers": "no"}),
    "kind failed": _set("steps", "kinds", "kinds", "image", "passed", to=False),
    "gate": _set("steps", "validate-odd", "model", "gates", "KL", "passed", to=False),
    "malformed": _set("steps", "cuda", "tests", to=3),
}


@pytest.mark.parametrize("name", WRONG)
def test_contradictions_are_found(folder: Path, name: str) -> None:
    record = copy.deepcopy(collect([folder]))
    WRONG[name](record)
    assert gpu_record.contradictions(record)


def test_status_says_current_stale_none_and_broken(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert gpu_record.status(path) == (True, gpu_record.status(path)[1]) and "NONE" in gpu_record.status(path)[1]
    path.write_text(json.dumps(collect([folder])))
    sound, words = gpu_record.status(path)
    assert sound and "current" in words and "passed" in words
    shutil.copytree(ROOT / "plugins", tmp_path / "plugins")
    (tmp_path / "plugins/attention.h").write_text("other")
    sound, words = gpu_record.status(path, tmp_path)
    assert sound and "STALE" in words and sources_id(ROOT) in words
    path.write_text("{}")
    assert not gpu_record.status(path)[0]


def test_the_committed_record_does_not_contradict_itself() -> None:
    sound, words = gpu_record.status()
    assert sound, words


def test_verify_runs_the_steps_that_the_record_wants(tmp_path: Path) -> None:
    """With a Python that does nothing, verify.sh still goes through all of them."""
    subprocess.run(["bash", ROOT / "tests/gpu/verify.sh", tmp_path], env={**os.environ, "PYTHON": "true", "STEPS": ""}, capture_output=True)
    lines = [line.split("\t") for line in (tmp_path / "steps.tsv").read_text().splitlines()]
    assert sorted(name for name, *_ in lines) == sorted(gpu_record.STEPS)
    assert all(seconds.isdigit() for *_, seconds in lines)


def test_the_time_split_is_recorded_and_written_as_tables(folder: Path) -> None:
    recorded = collect([folder])["steps"]["bench-profile"]["bench"]["profile"]
    assert "launches" not in recorded["cases"][0]
    text = profile_table.markdown(recorded)
    assert "| preset | D | tokens | pool, hash | select, sort | local | merge | total |" in text
    assert "| `blocks` | 64 | 131,072 | 2.00 | 1.00 | 4.00 | – | 7.00 |" in text
    assert "| `paper` | 64 | 131,072 | 2.00 | – | – | 0.50 | 7.00 |" in text
    assert "| `blocks` | 64 | 131,072 | 2.00 TB/s, 50% | 300 TOP/s, 25% | 400 TFLOP/s, 60% | 51% |" in text
    assert "Ceilings: 4 TB/s.\n- by hand" in text and "paper, D=64, 131,072 tokens: two kernels." in text


def test_targets_and_tables() -> None:
    report = benchmark()
    assert [result["met"] for result in report["targets"]] == [True, True]
    text = markdown(report)
    assert "| `paper` | 64 | 131,072 | 1.00 | 1.10 | 3.60 | 9.00 | 3.60x | 3.27x | 9.00x |" in text
    assert "| `paper` | 64 | 131,072 | 1 | 3 |" in text and "Left out: cudnn" in text
    report["rows"][1]["ms"]["ort"] = 30.0
    assert [result["met"] for result in check_targets(report["rows"])] == [True, False]
    del report["rows"][0]["ms"]["fa4"]
    assert check_targets(report["rows"])[0]["least"] is None
