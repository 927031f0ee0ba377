"""report.json: its schema, what is refused, the verdict, and the commands that write and judge it."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import report_samples as samples
import validation_bench as vb
from report_page import Page

from hyperattention.errors import AccuracyFailed, UsageError
from hyperattention.export.bundle import MANIFEST, REPORT, update_report
from hyperattention.export.bundle import SCHEMA as MANIFEST_SCHEMA
from hyperattention.export.gate_options import Limits
from hyperattention.validate import cli
from hyperattention.validate.report import SCHEMA, read, render, write
from hyperattention.validate.verdict import fastest_exact, judge

KINDS = ("language", "features")
SCHEMA_FILE = vb.ROOT / "docs" / "report.schema.json"


# --- JSON --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    data = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(data)
    return jsonschema.Draft202012Validator(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_report_follows_the_schema(kind: str, schema: jsonschema.Draft202012Validator, tmp_path: Path) -> None:
    broken = samples.report(kind)
    broken["implementation"]["per_op"][0]["ratio"] = math.nan
    empty = samples.report(kind, time=[], layers=[], baseline=[], hard_inputs=[], look_ahead=None)
    chosen = [samples.with_policy()] if kind == "language" else []
    for report in (samples.report(kind), empty, judge(broken, Limits()), *chosen):
        written = write(report, tmp_path / "report")
        schema.validate(json.loads(written[0].read_text(encoding="utf-8")))


def test_a_measured_report_follows_the_schema(schema: jsonschema.Draft202012Validator) -> None:
    measured, sample = vb.measured(vb.ReferenceKernels()), samples.report()
    measured |= {"inputs": {**sample["inputs"], **measured["inputs"]}, "environment": sample["environment"]}
    report = judge({**sample, **measured, "plan": vb.model().plan.to_json()}, Limits())
    schema.validate(json.loads(json.dumps(report)))
    assert Page(render(report, "report.html.jinja")).table("Gate")


def parts(report: dict, path: tuple = ()) -> Iterator[tuple]:
    for name, value in report.items():
        yield (*path, name)
        if isinstance(value, dict) and name in ("model", "plan_summary", "verdict", "limits", "implementation"):
            yield from parts(value, (*path, name))


@pytest.mark.parametrize("path", list(parts(samples.report())), ids=".".join)
def test_the_schema_wants_every_part(path: tuple[str, ...], schema: jsonschema.Draft202012Validator) -> None:
    report = copy.deepcopy(samples.report())
    owner = report
    for name in path[:-1]:
        owner = owner[name]
    del owner[path[-1]]
    assert not schema.is_valid(report)


@pytest.mark.parametrize("name", sorted(set(samples.policy()) - {"architecture", "fingerprint"}))
def test_the_schema_wants_every_part_of_a_policy(name: str, schema: jsonschema.Draft202012Validator) -> None:
    report = samples.with_policy()
    del report["plan"]["policy"][name]
    assert not schema.is_valid(report)


def test_the_schema_knows_how_many_seeds_and_what_was_run(schema: jsonschema.Draft202012Validator) -> None:
    report = samples.with_policy()
    assert schema.is_valid(report)
    for spoil in (
        lambda r: r["layers"][0]["seeds"]["relative_l2"].pop(),
        lambda r: r["plan"]["policy"]["verified"]["all_positions"].pop("kl"),
        lambda r: r["plan"]["policy"]["fixed"][0]["verified"].pop("needle"),
        lambda r: r["baseline"][0].pop("keys_per_query_exact"),
    ):
        broken = copy.deepcopy(report)
        spoil(broken)
        assert not schema.is_valid(broken)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_the_other_kind_is_not_in_the_schema(kind: str, schema: jsonschema.Draft202012Validator) -> None:
    other = samples.report("features" if kind == "language" else "language")["approximation"]
    assert not schema.is_valid({**samples.report(kind), "approximation": other})


def test_round_trip_keeps_what_is_no_number(tmp_path: Path) -> None:
    broken = samples.report()
    broken["implementation"]["per_op"][0]["ratio"] = math.nan
    written = write(judge(broken, Limits()), tmp_path / "report")
    assert [p.name for p in written] == ["report.json", "report.md", "report.html"]
    again = read(written[0])
    assert math.isnan(again["implementation"]["per_op"][0]["ratio"]) and again["verdict"]["failed"] == ["op error"]
    assert read(write(samples.report(), tmp_path / "good")[0]) == samples.report()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a report"),
        ("{", "not a report"),
        ("[]", "schema None"),
        ('{"schema": 1}', "run `hyperattention validate` again"),
        ('{"schema": 99}', "version of hyperattention that wrote it"),
        (f'{{"schema": {SCHEMA}}}', "incomplete: it lacks plan"),
        (json.dumps({**samples.report(), "kind": "poem"}), "lacks kind"),
        (json.dumps({**samples.report(), "verdict": {}}), "lacks verdict.headline"),
    ],
    ids=["empty", "cut", "list", "older", "newer", "bare", "kind", "verdict"],
)
def test_foreign_report_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(says)):
        read(path)


# --- verdict -----------------------------------------------------------------------------------------------------------


def test_verdict_speaks_of_speed_and_length() -> None:
    def judged(times: list[tuple[int, float, float]]) -> dict:
        rows = [{"length": n, "backend": "b", "ours_s": ours, "exact_s": exact, "time_only": n > 2048} for n, ours, exact in times]
        return samples.report(time=rows)["verdict"]

    faster = judged([(512, 1.0, 0.5), (1024, 1.0, 1.5), (2048, 1.0, 3.0)])
    assert (faster["speedup"], faster["faster_from"], faster["not_faster_at"]) == (3.0, 1024, 512) and "3.00x" in faster["speed"]
    slower = judged([(512, 1.0, 2.0), (1024, 2.0, 1.0)])
    assert (slower["faster_from"], slower["not_faster_at"]) == (None, 1024)
    always = judged([(512, 1.0, 2.0), (1024, 1.0, 3.0)])
    assert (always["faster_from"], always["not_faster_at"]) == (512, None)
    assert judged([])["speedup"] is judged([])["not_faster_at"] is None
    beyond = judged([(2048, 1.0, 3.0), (4096, 1.0, 9.0)])  # where only time was measured there is no headline
    assert beyond["speedup"] == 3.0 and "9.00x at 4,096 tokens" in beyond["speed"]


@pytest.mark.parametrize("op_layers", [[], [0, 1, 2, 3]], ids=["model's own attention", "op's exact path"])
def test_where_no_layer_approximates_the_speed_is_not_ours(op_layers: list[int]) -> None:
    report = samples.exact_report(op_layers)
    verdict = report["verdict"]
    assert verdict["speedup"] == pytest.approx(4.13, abs=0.005) and verdict["faster_from"] is None and verdict["safe"] is True
    assert verdict["speed"].startswith(
        f"No layer approximates; the difference is the runtime's{' and our exact kernels' * bool(op_layers)}"
    )
    assert (
        "4.13x the speed" in verdict["speed"] and "0 of 4 layers approximate" in verdict["speed"] and "faster from" not in verdict["speed"]
    )


def test_lengths_below_exact_below_claim_no_speed() -> None:
    rows = [{**row, "exact": True} for row in samples.report()["approximation"]]
    verdict = samples.report(approximation=rows)["verdict"]
    assert verdict["speed"].startswith("No layer approximates at the lengths measured; ") and verdict["faster_from"] is None


def test_a_busy_machine_stands_beside_the_speed() -> None:
    environment = {**samples.report()["environment"], "busy": "The machine was busy."}
    assert samples.report(environment=environment)["verdict"]["small_print"] == ["The machine was busy."]
    assert samples.report(environment=environment, time=[])["verdict"]["small_print"] == []


def test_the_rival_is_the_fastest_exact_attention() -> None:
    assert fastest_exact({"exact_s": 3.0, "torch_exact_s": 2.0}) == 2.0
    assert fastest_exact({"exact_s": 3.0, "torch_exact_s": None}) == 3.0
    assert fastest_exact({"exact_s": None}) is None


# --- command line ------------------------------------------------------------------------------------------------------


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


@pytest.mark.parametrize("kind", KINDS)
def test_recheck_judges_again(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = {"language": "kl", "features": "cosine"}[kind]
    limit, name = ("0", "KL") if kind == "language" else ("1", "cosine")
    write(samples.report(kind), tmp_path / "report")
    code, out, _ = _run(["report", str(tmp_path), "--recheck"], capsys)
    assert code == 0 and "every gate holds" in out
    code, out, err = _run(["report", str(tmp_path), "--recheck", "--gate", f"{gate}={limit}"], capsys)
    assert code == AccuracyFailed.exit_code and f"FAIL  {name}" in out and f"gates not met: {name}" in err
    assert read(tmp_path / "report" / "report.json")["verdict"]["failed"] == [name]
    # The limits given stay until others are given; without --recheck the saved verdict is said.
    for more in ([], ["--recheck"]):
        code, out, _ = _run(["report", str(tmp_path), *more], capsys)
        assert code == AccuracyFailed.exit_code and "Not safe" in out
    wide = f"{gate}={'1' if kind == 'language' else '0'}"
    code, out, _ = _run(["report", str(tmp_path), "--recheck", "--gate", wide, "--json"], capsys)
    assert code == 0 and json.loads(out)["verdict"]["failed"] == []


@pytest.mark.parametrize(
    "chosen, limit, advice",
    [
        (False, "kl=0", "(--layers) or raise num_blocks"),
        (True, "kl=0", "a tighter --budget"),
        (True, "op-error=0", "hyperattention doctor"),
    ],
    ids=["layers by hand", "policy", "kernels"],
)
def test_a_gate_that_fails_says_what_to_change(
    chosen: bool, limit: str, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(samples.with_policy() if chosen else samples.report(), tmp_path / "report")
    code, _, err = _run(["report", str(tmp_path), "--recheck", "--gate", limit], capsys)
    assert code == AccuracyFailed.exit_code and advice in " ".join(err.split())


def test_report_writes_lost_pages_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(samples.report(), tmp_path / "report")
    texts = [file.read_text() for file in files]
    for file in files[1:]:
        file.unlink()
    assert _run(["report", str(files[0])], capsys)[0] == 0
    assert [file.read_text() for file in files] == texts


def _finished(out: Path) -> Path:
    """A folder whose manifest knows its report."""
    (out / MANIFEST).write_text(json.dumps({"schema": MANIFEST_SCHEMA, "files": {}}))
    write(samples.report(), out / "report")
    update_report(out)
    return out / REPORT


@pytest.mark.parametrize("more", [(), ("--recheck",)], ids=["render", "recheck"])
def test_an_edited_report_is_refused(more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or the manifest would vouch for numbers that nobody measured."""
    path, manifest = _finished(tmp_path), tmp_path / MANIFEST
    assert _run(["report", str(tmp_path), *more], capsys)[0] == 0
    measured = path.read_text()
    path.write_text(measured.replace('"kl_max": ', '"kl_max": 1'))
    before = manifest.read_text(), path.read_text()
    code, _, err = _run(["report", str(tmp_path), *more], capsys)
    said = " ".join(err.split())
    assert code == 2 and "is not the one that was measured" in said and "run `hyperattention validate` again" in said
    assert (manifest.read_text(), path.read_text()) == before
    manifest.unlink()  # a report on its own is what it says it is
    assert _run(["report", str(tmp_path), *more], capsys)[0] == 0


def test_a_report_that_the_manifest_does_not_know_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _finished(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["files"][REPORT]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    code, _, err = _run(["report", str(path)], capsys)
    assert code == 2 and "knows of no report" in " ".join(err.split())


def test_hard_inputs_fail_a_run_only_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "passed": row["distribution"] != "gaussian"} for row in samples.report()["hard_inputs"]]
    write(samples.report(hard_inputs=rows), tmp_path / "report")
    code, out, _ = _run(["report", str(tmp_path), "--recheck"], capsys)
    assert code == 0 and "note  hard" in out and "gaussian at 32,768 tokens" in out
    assert "Advice, not a gate" in (tmp_path / "report" / "report.html").read_text()
    assert _run(["report", str(tmp_path), "--recheck", "--gate", "hard=0.8"], capsys)[0] == 0
    code, out, err = _run(["report", str(tmp_path), "--recheck", "--gate", "hard=1"], capsys)
    assert code == AccuracyFailed.exit_code and "gates not met: hard" in err and "fewer of the hard inputs pass" in out


def test_random_inputs_leave_the_verdict_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        inputs = {**samples.report(kind)["inputs"], "kind": "random"}
        report = samples.report(kind, inputs=inputs)
        assert report["verdict"]["safe"] is None and all(gate["passed"] for gate in report["gates"])
        assert samples.report(kind, Limits(op_error=0.0), inputs=inputs)["verdict"]["safe"] is False  # what fails even there has failed
        write(report, tmp_path / kind / "report")
        code, out, _ = _run(["report", str(tmp_path / kind)], capsys)
        assert code == 0 and out.startswith("Not judged on")


def test_an_incomplete_report_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report" / "report.json"
    path.parent.mkdir()
    for text in (f'{{"schema": {SCHEMA}}}', json.dumps({**samples.report(), "implementation": {}})):
        path.write_text(text)
        for more in ([], ["--recheck"]):
            code, _, err = _run(["report", str(tmp_path), *more], capsys)
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
        (["report", "missing", "--gate", "kl=1"], 2, "add --recheck"),
        (["inspect", "missing"], 2, "missing"),
        (["validate", "out", "--model", "m", "--lengths", "8k"], 2, "--lengths"),
        (["validate", "out", "--model", "m", "--lengths", "1"], 2, "--lengths"),
        (["validate", "out", "--model", "m", "--windows", "1,2"], 2, "--windows"),
        (["validate", "out", "--model", "m", "--device", "tpu"], 2, "--device"),
        (["validate", "out", "--model", "m", "--gate", "kl=-1"], 2, "--gate kl"),
        (["validate", "out", "--model", "m", "--gate", "kl=nan"], 2, "--gate kl"),
        (["validate", "out", "--model", "m", "--threads", "-1"], 2, "--threads"),
        (["validate", "out", "--model", "m", "--seed", "-1"], 2, "--seed"),
        (["nonsense"], 2, "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_command_lines(arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, _, err = _run(arguments, capsys)
    assert found == code and says in err and "Traceback" not in err
