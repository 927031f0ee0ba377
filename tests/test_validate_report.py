"""The report in its three forms, the verdict, and the command line."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import pytest
import validation_bench as vb

from hyperattention.errors import AccuracyFailed, UsageError
from hyperattention.validate import cli
from hyperattention.validate.gates import Limits, fastest_exact, judge
from hyperattention.validate.plots import Series, bar_chart, line_chart
from hyperattention.validate.report import SCHEMA, read, render, write


@pytest.fixture(scope="module")
def healthy() -> dict:
    """Numbers of an operator that is right: fp32 PyTorch in the place of the kernels."""
    return vb.measured(vb.ReferenceKernels())


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
    return judge({**healthy, **filled}, Limits())


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
    order = [report["verdict"]["headline"], "Gates", "Error against length", "Time against length", "Layer by layer", "What ran"]
    assert sorted(order, key=html.index) == order
    for said in ("fp32 twin of the bf16 target", "sha256", "Seeds", "held-out text", "± one standard error"):
        assert said in html


def test_markdown_says_the_same(report: dict) -> None:
    text = render(report, "report.md.jinja")
    assert text.startswith(f"# {report['verdict']['headline']}")
    for gate in report["gates"]:
        assert f"| {gate['name']} |" in text


def test_random_tokens_leave_the_verdict_open(report: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = judge({**report, "inputs": {**report["inputs"], "kind": "random"}}, Limits())
    assert judged["verdict"]["safe"] is None and all(gate["passed"] for gate in judged["gates"])
    html = render(judged, "report.html.jinja")
    assert 'class="verdict open"' in html and "Not judged on text" in html
    assert 'class="verdict good"' in render(report, "report.html.jinja")
    assert render(judged, "report.md.jinja").startswith("# Not judged on text")
    assert judge(judged, Limits(kl=0.0))["verdict"]["safe"] is False  # a gate that fails even on random tokens has failed
    write(judged, tmp_path / "report")
    code, out, _ = _run(["report", str(tmp_path)], capsys)
    assert code == 0 and out.startswith("Not judged on text")


def test_verdict_speaks_of_speed_and_length(report: dict) -> None:
    def judged(times: list[tuple[int, float, float]]) -> dict:
        rows = [{"length": n, "backend": "b", "ours_s": ours, "exact_s": exact, "time_only": n > 2048} for n, ours, exact in times]
        return judge({**report, "time": rows}, Limits())["verdict"]

    faster = judged([(512, 1.0, 0.5), (1024, 1.0, 1.5), (2048, 1.0, 3.0)])
    assert (faster["speedup"], faster["faster_from"]) == (3.0, 1024) and "3.00x" in faster["speed"]
    assert judged([(512, 1.0, 2.0), (1024, 2.0, 1.0)])["faster_from"] is None
    assert judged([])["speedup"] is None
    beyond = judged([(2048, 1.0, 3.0), (4096, 1.0, 9.0)])  # where only time was measured there is no headline
    assert beyond["speedup"] == 3.0 and "9.00x at 4,096 tokens" in beyond["speed"]


def test_the_rival_is_the_fastest_exact_attention() -> None:
    assert fastest_exact({"exact_s": 3.0, "torch_exact_s": 2.0}) == 2.0
    assert fastest_exact({"exact_s": 3.0, "torch_exact_s": None}) == 3.0
    assert fastest_exact({"exact_s": None}) is None


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99}', '{"schema": 2}', "{"], ids=["empty", "list", "other", "bare", "cut"])
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
    code, out, err = _run(["report", str(tmp_path), "--gate", "kl=0"], capsys)
    assert code == AccuracyFailed.exit_code and "FAIL  KL" in out and "gates not met: KL" in err
    assert read(tmp_path / "report" / "report.json")["verdict"]["failed"] == ["KL"]


def test_an_incomplete_report_is_exit_2(report: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report" / "report.json"
    path.parent.mkdir()
    for text in ('{"schema": 2}', json.dumps({**report, "implementation": {}}, default=str)):
        path.write_text(text)
        code, _, err = _run(["report", str(tmp_path)], capsys)
        assert code == 2 and "incomplete" in err and "Traceback" not in err


def test_a_bug_is_exit_70_with_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "app", broken)
    code, _, err = _run(["doctor"], capsys)
    assert code == 70 and "ZeroDivisionError: a bug" in err and "internal error" in err


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
        (["validate", "out", "--model", "m", "--gate", "kl=-1"], 2, "--gate kl"),
        (["validate", "out", "--model", "m", "--gate", "kl=nan"], 2, "--gate kl"),
        (["validate", "out", "--model", "m", "--threads", "-1"], 2, "--threads"),
        (["validate", "out", "--model", "m", "--seed", "-1"], 2, "--seed"),
        (["validate", "out"], 2, "--model"),
        (["nonsense"], 2, "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_command_lines(arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, _, err = _run(arguments, capsys)
    assert found == code and says in err and "Traceback" not in err
