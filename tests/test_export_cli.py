"""The command export-model as people run it: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import report_samples as samples
import tiny
from commands import SMALL, Runner, run

from hyperattention.export import automatic, pipeline
from hyperattention.export.bundle import DRAFT, MANIFEST, Bundle
from hyperattention.export.policy import Policy

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny-llama"), num_hidden_layers=2)


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Runner:
    """Runs the command in this process."""
    return functools.partial(run, capfd, "export-model")


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_an_unexpected_error_is_no_failed_gate(model: Path, tmp_path: Path, export: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "missing_parts", lambda: 1 // 0)
    result = export(model, tmp_path / "out", "--json")
    assert result.code == json.loads(result.out)["exit_code"] == 70
    assert "Traceback" in result.err and "ZeroDivisionError" in result.err and "internal error, a bug" in result.err


# --- dry run ---------------------------------------------------------------------------------------------------------


def test_dry_run_prints_every_decision_and_writes_nothing(model: Path, tmp_path: Path, export: Runner) -> None:
    result = export(model, tmp_path / "out", "--dry-run", "--layers", "1", "--task", "prefill", "--max-seq", "1000", "--batch", "1,2,3")
    assert result.code == 0 and left_behind(tmp_path) == []
    decisions = ("model.layers.0.self_attn", "approximate", "exact", "chosen by --layers 1")
    for words in (*decisions, "weights", "keys and values", "function body"):
        assert words in result.out
    assert "trained for 512" in result.err and "never approximate" in result.err


@dataclass(frozen=True)
class Idle:
    """Options of which `without_effect` change nothing, and why."""

    name: str
    options: tuple[str, ...]
    without_effect: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return self.name


_CHECKS = ("--text", "text.txt", "--lengths", "64", "--device", "cpu", "--gate", "kl=1", "--gate", "top1=0.5")


@pytest.mark.parametrize(
    "case",
    [
        Idle("no-validation", ("--no-validate", *_CHECKS), ("--text", "--lengths", "--device", "--gate"), "--no-validate measures nothing"),
        Idle("no-validation-of-defaults", ("--no-validate",), (), ""),
        Idle("validation", ("--input-ids", "bytes", *_CHECKS), (), ""),
        Idle("preset-exact", ("--preset", "exact", "--sinks", "7", "--num-blocks", "2"), ("--num-blocks", "--sinks"), "approximates"),
        Idle("blocks", ("--num-projections", "3", "--pool-size", "8"), ("--num-projections",), "the selector blocks does not read it"),
        Idle("paper", ("--preset", "paper", "--num-projections", "3", "--pool-size", "8"), ("--pool-size",), "selector sortlsh does not"),
        Idle("selector", ("--selector", "sortlsh", "--pool-size", "8", "--num-blocks", "2"), ("--pool-size",), "blocks does"),
    ],
    ids=str,
)
def test_an_option_without_effect_is_said(case: Idle, model: Path, tmp_path: Path, export: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"!" * 65)
    result = export(model, tmp_path / "out", "--dry-run", "--json", *case.options)
    assert result.code == 0, result.err
    found = [warning for warning in json.loads(result.out)["warnings"] if "has no effect" in warning]
    assert tuple(warning.partition(" ")[0] for warning in found) == case.without_effect
    assert all(case.why in warning for warning in found)


def test_dry_run_as_json(model: Path, tmp_path: Path, export: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERATTENTION_LIBRARY_DIR", str(tmp_path))
    result = export(model, tmp_path / "out", "--dry-run", "--json", "--sinks", "7", "--seed", "5")
    found = json.loads(result.out)
    assert [layer["mode"] for layer in found["plan"]["layers"]] == ["exact", "approximate"]
    config = found["plan"]["layers"][1]["config"]
    assert (config["sinks"], config["seed"]) == (7, 6)
    assert {item["name"] for item in found["memory"]} >= {"weights", "activations", "workspace"}
    assert {"ONNX Runtime library", "TensorRT library"} <= set(found["missing"])


def test_an_error_as_json(model: Path, tmp_path: Path, export: Runner) -> None:
    result = export(model, tmp_path / "out", "--json", "--layers", "9")
    found = json.loads(result.out)
    assert result.code == found["exit_code"] == 2 and "there is no layer 9" in found["error"]


def test_quiet_says_nothing_on_success(model: Path, tmp_path: Path, export: Runner) -> None:
    result = export(model, tmp_path / "out", "--dry-run", "--quiet", "--local-size", "64", "--exact-below", "64")
    assert (result.code, result.out, result.err) == (0, "", "")


# --- a whole run -----------------------------------------------------------------------------------------------------

# Stands in for `hyperattention validate`: the folder is its first argument.
VALIDATOR = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
assert (folder / "manifest.partial.json").is_file() and not (folder / "manifest.json").is_file()
print("[  1/9    0.1 s] measuring", file=sys.stderr)
gate = dict(name="kl", value=0.1, limit=0.005, sense="<=", where="here", passed={code} == 0)
if {report}:
    (folder / "report").mkdir()
    report = dict(inputs=dict(lengths=[64]), limits=dict(kl=0.005), verdict=dict(headline="done"), plan=dict(dtype="fp32"))
    (folder / "report/report.json").write_text(json.dumps(report))
    print(json.dumps(dict(verdict=dict(headline="The verdict."), gates=[gate])))
print("error: {message}", file=sys.stderr)
sys.exit({code})
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, code: int, report: bool, message: str = "gates not met: kl") -> None:
    script = VALIDATOR.format(code=code, report=report, message=message)
    monkeypatch.setattr("hyperattention.export.validation.VALIDATE", (sys.executable, "-c", script))
    monkeypatch.setattr(pipeline, "check_environment", lambda *_: None)


def write_model_files(source: object, plan: object, folder: Path, reporter: object) -> None:
    """Stands in for load, patch and ONNX, which have tests of their own."""
    for name in ("model.onnx", "model.trt.onnx"):
        (folder / name).write_bytes(name.encode())


def test_whole_run_leaves_a_complete_folder(model: Path, tmp_path: Path, export: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, 0, True)
    (model / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "/srv/models/secret", "model_max_length": 5}))
    out = tmp_path / "deep" / "out"
    result = export(model, out, "--local-size", "64", "--exact-below", "64", "--seed", "3", "--batch", "2")
    assert result.code == 0, result.err
    assert "The verdict." in result.out and "measuring" in result.err
    bundle = Bundle.open(out)
    assert not (out / DRAFT).exists() and left_behind(out.parent) == ["out"]
    assert bundle.plan.batch == (2, 2, 2) and bundle.model_onnx.is_file() and bundle.trt_onnx.is_file() and bundle.engine is None
    assert bundle.manifest["seeds"] == {"model.layers.1.self_attn": 4}
    assert bundle.manifest["validation"]["lengths"] == [64] and bundle.manifest["validation"]["tolerances"] == {"kl": 0.005}
    files = set(bundle.manifest["files"])
    assert {"model.onnx", "model.trt.onnx", "config.json", "tokenizer_config.json", "report/report.json"} <= files
    assert bundle.changed_files() == []
    for file in out.rglob("*"):
        if file.is_file() and not file.name.endswith(".so"):
            data = file.read_bytes()
            assert str(tmp_path).encode() not in data and b"/srv/models" not in data, file.name
    (out / "config.json").write_text("{}")
    assert bundle.changed_files() == ["config.json"]


@dataclass(frozen=True)
class Ending:
    """How the validation ends, and what export-model makes of it."""

    name: str
    code: int
    report: bool
    expected: int
    kept: bool

    def __str__(self) -> str:
        return self.name


@pytest.mark.parametrize(
    "ending",
    [
        Ending("passed", 0, True, 0, True),
        Ending("gate-failed", 1, True, 1, True),
        Ending("traceback", 1, False, 70, False),
        Ending("usage", 2, False, 2, False),
        Ending("other-backend-ran", 3, True, 3, False),
        Ending("killed", -9, False, 70, False),
    ],
    ids=str,
)
def test_endings_of_the_validation(ending: Ending, model: Path, tmp_path: Path, export: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, ending.code if ending.code >= 0 else 137, ending.report)
    monkeypatch.setattr(pipeline, "_export", write_model_files)
    out = tmp_path / "out"
    result = export(model, out)
    assert result.code == ending.expected
    assert ("gates not met: kl" in result.err) == (ending.expected != 0)
    assert ("Traceback" in result.err and "RuntimeError: the validation crashed" in result.err) == (ending.expected == 70)
    assert left_behind(tmp_path) == (["out"] if ending.kept else [])
    if ending.kept:
        assert (out / MANIFEST).is_file() and (out / "report/report.json").is_file()


def test_a_finished_output_is_replaced_and_a_failed_run_keeps_it(
    model: Path, tmp_path: Path, export: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_export", write_model_files)
    out = tmp_path / "out"
    assert export(model, out, "--no-validate", "--seed", "1").code == 0
    assert export(model, out, "--no-validate", "--seed", "2").code == 0
    assert Bundle.open(out).plan.seed == 2
    stand_in(monkeypatch, 3, False)
    assert export(model, out, "--seed", "3").code == 3
    assert Bundle.open(out).plan.seed == 2 and left_behind(tmp_path) == ["out"]


def test_validation_options_are_passed_on(model: Path, tmp_path: Path, export: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[pipeline.Options] = []
    monkeypatch.setattr(pipeline, "run", lambda source, plan, options, reporter: seen.append(options) or {})
    text = tmp_path / "text"
    text.write_bytes(b"!" * 129)
    given = ("--text", str(text), "--lengths", "64,128", "--device", "cpu", "--gate", "delta-nats=0.5", "--gate", "kl=0.25")
    assert export(model, tmp_path / "out", "--input-ids", "bytes", *given).code == 0
    assert seen[0].validation.arguments() == given


@pytest.mark.parametrize(("seen", "code"), [(130, 0), (131, 2)], ids=["a-window-is-left", "none-is-left"])
def test_a_searched_export_reads_its_text_once(
    seen: int, code: int, tmp_path: Path, export: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny.save(tmp_path / "model", vocab_size=256, num_hidden_layers=4), tmp_path / "text"
    text.write_bytes(b"!" * 259)
    sha256 = hashlib.sha256(text.read_bytes()).hexdigest()
    sample = Policy.from_json(samples.policy())

    def choose(*_: object) -> Policy:
        text.unlink()  # what was read before the search has to do
        return replace(sample, calibration={**sample.calibration, "sha256": sha256, "to": seen})

    monkeypatch.setattr(automatic, "choose", choose)
    monkeypatch.setattr(pipeline, "check_environment", lambda *_: None)
    monkeypatch.setattr(pipeline, "run", lambda *_: {})
    result = export(model, tmp_path / "out", "--layers", "auto", "--input-ids", "bytes", "--text", text, "--lengths", "64,128")
    assert result.code == code and ("first 131 tokens, and the 128 behind them hold no window of 128" in result.said) == bool(code)


@pytest.mark.ort
def test_the_example_runs_on_an_output(tmp_path: Path, export: Runner) -> None:
    model = tiny.save(tmp_path / "model", vocab_size=256)
    assert export(model, tmp_path / "out", "--no-validate", "--input-ids", "bytes", *SMALL).code == 0
    command = [sys.executable, str(ROOT / "examples/onnxruntime_logits.py"), str(tmp_path / "out"), str(ROOT / "docs/operator.md"), "200"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "200 bytes in" in done.stdout and "nats a byte" in done.stdout
