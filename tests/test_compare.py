"""Two output folders side by side: what differs, what makes that unfair, on the console, as JSON and as a page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples
from report_page import Page, numbers

from hyperattention.config import PRESETS
from hyperattention.errors import UsageError
from hyperattention.export.bundle import MANIFEST, SCHEMA, update_report
from hyperattention.export.gate_options import Limits
from hyperattention.export.plan import ExportPlan, LayerPlan
from hyperattention.export.source import Input
from hyperattention.validate import cli
from hyperattention.validate.compare_folders import compare
from hyperattention.validate.compare_text import tables
from hyperattention.validate.report import write

Make = Callable[..., Path]
NASTY = "<script>alert(1)</script>&\"'"


def plan(approximate: tuple[int, ...] = (1, 3), **changes: Any) -> ExportPlan:
    """Four layers, of which some approximate."""
    config = PRESETS["blocks"]
    layers = tuple(
        LayerPlan(i, f"layers.{i}", "approximate" if i in approximate else "exact", "a reason", replace(config, seed=i)) for i in range(4)
    )
    whole = ExportPlan(
        task="logits", dtype="fp32", layers=layers, inputs=(Input("input_ids", "int64", ("batch", "sequence")),), outputs=("logits",),
        dims={"batch": (1, 1, 1), "sequence": (1, 8192, 32768)}, seq=(1, 8192, 32768), batch=(1, 1, 1), input_ids="bytes", seed=0,
        preset="blocks", keep_exact="op",
    )  # fmt: skip
    return replace(whole, **changes)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a folder with a manifest, a file of some size, and a report or none."""

    def folder(name: str, report: dict | None, made: ExportPlan | None = None, size: int = 1000, model: dict | None = None) -> Path:
        out = tmp_path / name
        out.mkdir(parents=True)
        (out / "model.onnx").write_bytes(b"x" * size)
        described = model or {"name": "byte-lm-4m", "architecture": "LlamaForCausalLM", "parameters": 4558080}
        manifest = {"schema": SCHEMA, "model": described, "plan": (made or plan()).to_json(), "files": {}}
        (out / MANIFEST).write_text(json.dumps(manifest))
        if report is not None:
            write(report, out / "report")
            update_report(out)
        return out

    return folder


def run(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", *map(str, arguments)])
    return int(stop.value.code or 0), *capsys.readouterr()


def worse(kind: str = "language") -> dict:
    """A report with twice the time at every length and a KL that fails."""
    report = samples.report(kind)
    for row in report["time"]:
        row["ours_s"] *= 2
    if kind == "language":
        for row in report["approximation"]:
            row["prefill_exact_decode"]["kl"]["mean"] *= 100
    replaced: dict[str, Any] = {part: report[part] for part in ("time", "approximation")}
    return samples.report(kind, **replaced)


@pytest.mark.parametrize("kind", ["language", "features"])
def test_a_folder_is_like_itself(kind: str, make: Make) -> None:
    found = compare(make("a", samples.report(kind)), make("b", samples.report(kind)))
    assert found["unfair"] == [] and found["plan"] == [] and found["problems"] == [None, None]
    assert bool(found["needle"]) == (kind == "language")  # vectors cannot be asked
    asked = ["needle", "needle_grid", "strict"] if kind == "language" else []
    for part in ("gates", "errors", "time", "layers", "heads", "keys", "look_ahead", "hard_inputs", "sizes", *asked):
        assert found[part] and all(row["pair"][0] == row["pair"][1] for row in found[part]), part


def test_numbers_are_those_of_the_reports(make: Make) -> None:
    first, second = samples.report(), worse()
    found = compare(make("a", first), make("b", second))
    for i, report in enumerate((first, second)):
        kl = {row["length"]: row["pair"][i]["mean"] for row in found["errors"] if row["metric"] == "KL"}
        assert kl == {row["length"]: row["prefill_exact_decode"]["kl"]["mean"] for row in report["approximation"]}
        assert [row["pair"][i]["ours_s"] for row in found["time"]] == [row["ours_s"] for row in report["time"]]
        assert [row["pair"][i]["passed"] for row in found["gates"]] == [gate["passed"] for gate in report["gates"]]
        layers = {row["index"]: row["pair"][i]["relative_l2"] for row in found["layers"]}
        longest = {row["layer"]: row["relative_l2"] for row in report["layers"] if row["length"] == 32768}
        assert layers == {0: None, 1: longest[1], 2: None, 3: longest[3]}
    assert found["unfair"] == [] and found["verdicts"][0]["safe"] and not found["verdicts"][1]["safe"]


def harder() -> dict:
    """A report whose layer 3 has one head of five times the error, which recalls less, and none at the longest length but that layer."""
    report = samples.report()
    head = next(row for row in report["layers"] if (row["layer"], row["length"]) == (3, 32768))["heads"][2]
    head |= {"relative_l2": 5 * head["relative_l2"], "top16_recall": 0.5, "cv_measured": None}
    report["look_ahead"]["own"] = "blocks, strict"
    report["baseline"][0]["keys_per_query_ours"] = 955.5
    return report


def test_heads_look_ahead_and_keys_are_those_of_the_reports(make: Make) -> None:
    first, second = samples.report(), harder()
    found = compare(make("a", first), make("b", second))
    longest = [row for row in second["layers"] if row["length"] == 32768]
    heads = {(row["layer"], head["head"]): head for row in longest for head in row["heads"]}
    assert found["heads_length"] == 32768 and {(row["layer"], row["head"]) for row in found["heads"]} == set(heads)
    for row in found["heads"]:
        assert row["pair"][1].items() <= heads[row["layer"], row["head"]].items()
        assert (row["pair"][0] == row["pair"][1]) == ((row["layer"], row["head"]) != (3, 2))
    assert [row["pair"][1]["ours"] for row in found["keys"]] == [row["keys_per_query_ours"] for row in second["baseline"]]
    for row, op in zip(found["look_ahead"], second["look_ahead"]["op"], strict=True):
        assert (row["selector"], row["pair"][1]["farthest"]) == (op["selector"], op["farthest"])
        assert [value["this_export"] for value in row["pair"]] == [op["selector"] == "blocks", op["selector"] == "blocks, strict"]
    cells = {(row["kind"], row["length"], row["depth"], row["regime"]): row["pair"][0]["mean"] for row in found["needle_grid"]}
    row = first["needle"]["rows"][4]
    assert cells[row["kind"], row["length"], 0.85, "all positions"] == row["depths"][2]["all_positions"]["mean"]
    assert [row["pair"][0]["mean"] for row in found["strict"]] == [0.0021, 0.00011]


def test_the_console_tells_the_hardest_heads(make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run([make("a", samples.report()), make("b", harder())], capsys)
    told = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    errors = [head["relative_l2"] for row in harder()["layers"] if row["length"] == 32768 for head in row["heads"]]
    (row,) = [cells for cells in told if cells[0] == "largest error"]
    assert code == 0 and numbers(row[2]) == [pytest.approx(max(errors), rel=0.01), 3, 2] and numbers(row[1])[1:] == [3, 3]
    (row,) = [cells for cells in told if cells[0].startswith("lowest recall")]
    assert row[2] == "50.00 % (layer 3, head 2)" and "0 (this export)" in out and "61 (this export)" in out
    assert ["8,192", "0.1"] in [cells[1:3] for cells in told if cells[0] == "multi-key, all positions"]


def test_policies_stand_side_by_side(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = make("b", None, plan(policy=samples.policy()))
    found = compare(make("a", samples.report()), chosen)
    told = {row["what"]: row["pair"] for row in found["policy"]}
    assert told["keys a query"] == [None, 1700.75] and told["KL, all positions"] == [None, 0.00039]
    code, out, _ = run([make("c", None), chosen], capsys)
    assert code == 0 and "1,701" in out and "Policy" in out
    assert compare(make("d", None), make("e", None))["policy"] == []


def test_losses_stand_in_nats_and_as_ratios_of_perplexities(make: Make) -> None:
    first, second = samples.report(), samples.report()
    for row in second["approximation"]:
        row["prefill_exact_decode"]["delta_nats"]["mean"] = 0.25
    found = compare(make("a", first, plan(policy=samples.policy())), make("b", second))
    told = {table.title: table for table in tables(found)}
    errors = {(row[0], row[1]): row[2:] for row in told["Error against exact attention, by length"].rows}
    names = {"prefill_exact_decode": "", "all_positions": ", all positions"}
    for i, report in enumerate((first, second)):
        for row in report["approximation"]:
            for regime, where in names.items():
                nats, length = row[regime]["delta_nats"]["mean"], f"{row['length']:,}"
                assert float(errors[length, f"delta nats{where}"][i]) == pytest.approx(nats, rel=0.01)
                assert float(errors[length, f"exp(delta nats){where}"][i]) == pytest.approx(math.exp(nats), abs=6e-6)
                assert float(errors[length, f"top-1{where}"][i]) == pytest.approx(row[regime]["top1"]["mean"], abs=6e-5)
    policy = {row[0]: row[1:] for row in told["Policy"].rows}
    for regime, nats in (("all positions", 0.00078), ("prefill exact decode", 0.00039)):  # as the sample has them
        assert float(policy[f"delta nats, {regime}"][0]) == pytest.approx(nats)
        assert policy[f"exp(delta nats), {regime}"] == [f"{math.exp(nats):.5f}", "–"]
    assert [row[-2:] for row in told["Cost of the strict choice, nats"].rows] == [["1.00210"] * 2, ["1.00011"] * 2]


def test_a_speed_without_approximation_is_not_shown_as_one(make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, _ = run([make("a", samples.report()), make("b", samples.exact_report([])), "--html", page], capsys)
    html = page.read_text()
    assert code == 0 and html.count("<strong>Safe, 4.13×</strong>") == 1 and html.count("<strong>Safe</strong>") == 1
    assert "No layer approximates; the difference is the runtime" in html and "No layer approximates" in " ".join(out.split())


def test_plans_are_told_where_they_differ(make: Make) -> None:
    other = plan((0, 1, 2), preset="paper", seq=(1, 4096, 16384))
    layers = tuple(replace(n, config=replace(n.config, num_blocks=16)) if n.config else n for n in other.layers)
    found = compare(make("a", None), make("b", None, replace(other, layers=layers), size=2048))
    told = {row["what"]: row["pair"] for row in found["plan"]}
    assert told == {
        "preset": ["blocks", "paper"],
        "seq": [(1, 8192, 32768), (1, 4096, 16384)],
        "approximate layers": [[1, 3], [0, 1, 2]],
        "num_blocks": [8, 16],
    }
    assert found["sizes"] == [{"file": "model.onnx", "pair": [1000, 2048]}]
    assert [[v["mode"] for v in row["pair"]] for row in found["layers"]][0] == ["exact", "approximate"]


def changed(what: str, **changes: Any) -> dict:
    report = samples.report()
    replaced: dict[str, Any] = {what: {**report[what], **changes}}
    return samples.report(**replaced)


@pytest.mark.parametrize(
    ("report", "what", "affects"),
    [
        (changed("inputs", sha256="f" * 64), "input", ["error"]),
        (changed("inputs", sha256=None, kind="random"), "input", ["error"]),
        (changed("inputs", windows=[4, 2, 2]), "windows at the common lengths", ["error"]),
        (changed("inputs", lengths=[8192, 12345, 65536]), "lengths", []),
        (changed("inputs", tail=64), "positions that attend exactly", ["error"]),
        (changed("plan", dtype="bf16"), "number type as validated", ["error", "time"]),
        (samples.report(backend="TensorRT"), "backend", ["time"]),
        (changed("environment", machine={"processor": "other", "cores": 2, "memory_gb": 23.5, "gpu": None}), "processor", ["time"]),
        (changed("environment", machine={"processor": "processor", "cores": 8, "memory_gb": 23.5, "gpu": None}), "cores", ["time"]),
        (changed("environment", machine={"processor": "processor", "cores": 2, "memory_gb": 23.5, "gpu": "H200"}), "GPU", ["time"]),
        (changed("environment", versions={"torch": "2.11.0"}), "version of torch", ["time"]),
        (changed("environment", busy="The machine was busy."), "load on the machine", ["time"]),
    ],
    ids=["text", "random", "windows", "lengths", "tail", "dtype", "backend", "processor", "cores", "gpu", "torch", "load"],
)
def test_what_makes_it_unfair_is_named(report: dict, what: str, affects: list[str], make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make("a", samples.report()), make("b", report)
    assert [(row["what"], row["affects"]) for row in compare(first, second)["unfair"]] == [(what, affects)]
    code, _, err = run([first, second, "--quiet"], capsys)
    assert code == 0 and f"other {what} (" in err and "can be compared" in err.replace("cannot", "can")


def test_other_models_and_kinds_are_unfair(make: Make) -> None:
    model = {"name": "bert", "architecture": "BertModel", "parameters": 7}
    found = compare(make("a", samples.report()), make("b", samples.report("features"), plan(task="features"), model=model))
    assert {"model", "architecture", "parameters", "task", "kind of report"} <= {row["what"] for row in found["unfair"]}
    metrics = {row["metric"] for row in found["errors"]}
    assert {"KL", "features: cosine"} <= metrics and all(None in row["pair"] for row in found["errors"])


def test_lengths_that_differ_stand_side_by_side(make: Make) -> None:
    report = samples.report()
    shorter = samples.report(
        approximation=report["approximation"][:1],
        time=report["time"][:1],
        layers=[row for row in report["layers"] if row["length"] == 8192],
        inputs={**report["inputs"], "lengths": [8192], "windows": [4]},
    )
    found = compare(make("a", report), make("b", shorter))
    assert [row["what"] for row in found["unfair"]] == ["lengths"]
    assert [(row["length"], row["pair"][1] is None) for row in found["time"]] == [(8192, False), (12345, True), (32768, True)]
    assert {v["length"] for row in found["layers"] for v in row["pair"]} == {None, 8192}  # the longest that both measured


@pytest.mark.parametrize("broken", ["none", "schema", "cut", "edited"])
def test_a_folder_without_a_report_still_compares(broken: str, make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second = make("a", samples.report()), make("b", None, plan((0,)))
    if broken == "edited":
        write(samples.report(), second / "report")
    elif broken != "none":
        (second / "report").mkdir()
        (second / "report" / "report.json").write_text('{"schema": 1}' if broken == "schema" else "{")
    page = tmp_path / "page.html"
    code, out, err = run([first, second, "--html", page], capsys)
    assert code == 0 and "hyperattention validate" in " ".join(err.split()) and "approximate layers" in out and "no report" in out
    assert "No report" in Page(page.read_text()).text


def test_the_console_tells_both(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run([make("odd", samples.report()), make("all", worse(), plan((0, 1, 2, 3)), size=5000)], capsys)
    assert code == 0 and err == ""
    told = ("Verdict", "Safe at 8,192", "Not safe", "0.0510 FAIL", "Plan: what differs", "1, 3", "0 to 3", "1000 B", "4.9 KiB", "needle")
    assert [said for said in told if said not in out] == []
    (row,) = [line for line in out.splitlines() if re.match(r" *32,768 +5.2 ms", line)]
    assert numbers(row.replace(" ms", "")) == [32768, 5.2, 10.4, 0.5, 4.13, 2.06]


def test_json_is_one_object(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([make("a", samples.report()), make("b", changed("inputs", sha256="f" * 64)), "--json"], capsys)
    found = json.loads(out)
    assert code == 0 and found["names"] == ["a", "b"] and found["unfair"][0]["what"] == "input"
    assert set(found) >= {"plan", "gates", "errors", "time", "layers", "needle", "hard_inputs", "sizes", "verdicts", "problems"}
    assert set(found) >= {"heads", "keys", "policy", "look_ahead", "strict", "needle_grid"}


@pytest.mark.parametrize("kind", ["language", "features"])
def test_the_page_stands_alone_and_escapes(kind: str, make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = {"name": NASTY, "architecture": NASTY, "parameters": 3}
    first, second = make("one/out", samples.report(kind)), make(f"two/out{NASTY[:8]}", worse(kind), model=model)
    page = tmp_path / "page.html"
    code, _, _ = run([first, second, "--html", page, "--quiet"], capsys)
    html = page.read_text()
    found = Page(html)
    assert code == 0 and html.count("<script>") == 1 and NASTY in found.text and str(tmp_path) not in html
    assert not re.search(r"""\b(src|href|action)\s*=|url\(|@import|https?:""", html)
    assert len([svg for svg in found.svgs if svg.get("class") != "swatch"]) == (8 if kind == "language" else 5)
    row = next(row for row in [t for t in found.tables if t[0][0] == "tokens" and "over exact" in t[0][-1]][0] if row[0] == "32,768")
    assert numbers(row[1]) == [pytest.approx(0.0052)] and numbers(row[2]) == [pytest.approx(0.0104)]


def test_folders_of_one_name_are_told_apart(make: Make) -> None:
    found = compare(make("one/out", samples.report()), make("two/out", samples.report(limits=Limits(kl=0.0))))
    assert found["names"] == ["out (first)", "out (second)"]
    (gate,) = [row for row in found["gates"] if row["name"] == "KL"]
    assert [value["limit"] for value in gate["pair"]] == [0.005, 0.0]


def test_what_cannot_be_compared_is_refused(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = make("good", samples.report())
    code, _, err = run([good, tmp_path / "missing"], capsys)
    assert code == 2 and "there is no folder" in err
    code, _, err = run([good, good, "--html", tmp_path / "no" / "page.html"], capsys)
    assert code == 2 and "--html" in err and "cannot be written" in err
    hollow = make("hollow", None)
    (hollow / "report").mkdir()
    (hollow / "report" / "report.json").write_text(json.dumps({**samples.report(), "approximation": [{}]}))
    update_report(hollow)
    with pytest.raises(UsageError, match="incomplete"):
        compare(good, hollow)
