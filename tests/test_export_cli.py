"""The command export-model as people run it: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import pytest
import tiny

from hyperattention.export import pipeline
from hyperattention.export.bundle import DRAFT, MANIFEST, Bundle
from hyperattention.export.cli import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny-llama"), num_hidden_layers=2)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command in this process."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments: object) -> Result:
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as status:
            code = int(status.code or 0)
        return Result(code, *capfd.readouterr())

    return run


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- bad input -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """One mistake: `prepare` makes MODEL (given a whole copy of it), then the options, the exit code and words of the message."""

    name: str
    code: int
    words: str
    options: tuple[str, ...] = ()
    prepare: Callable[[Path, Path], Path] = lambda model, scratch: model
    out: Callable[[Path], Path] = lambda scratch: scratch / "out"

    def __str__(self) -> str:
        return self.name


def _copy(model: Path, scratch: Path) -> Path:
    copy = scratch / "model"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def _with(change: Callable[[Path], object]) -> Callable[[Path, Path], Path]:
    def prepare(model: Path, scratch: Path) -> Path:
        copy = _copy(model, scratch)
        change(copy)
        return copy

    return prepare


def _empty(model: Path, scratch: Path) -> Path:
    (scratch / "model").mkdir()
    return scratch / "model"


def _file(path: Path) -> Path:
    path.write_text("mine")
    return path


def _foreign(path: Path, name: str = "notes.txt") -> Path:
    path.mkdir()
    (path / name).write_text('{"name": "a web page", "icons": []}')
    return path


def _link(path: Path) -> Path:
    path.symlink_to(path.parent)
    return path


def _write_config(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)


def _truncate(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


BAD = [
    Bad("no-such-directory", 2, "there is no", prepare=lambda model, scratch: scratch / "nowhere"),
    Bad("model-is-a-file", 2, "is a file; MODEL is a directory", prepare=lambda model, scratch: model / "config.json"),
    Bad("empty-directory", 2, "holds no config.json", prepare=_empty),
    Bad("broken-config", 2, "is not valid JSON", prepare=_with(lambda copy: _write_config(copy, '{"model_type": "llama",'))),
    Bad("unknown-architecture", 2, "is unknown to transformers", prepare=_with(lambda copy: _write_config(copy, '{"model_type": "x9"}'))),
    Bad("truncated-weights", 2, "truncated or broken", prepare=_with(_truncate)),
    Bad("out-is-a-file", 2, "is a file; give a folder", out=lambda scratch: _file(scratch / "out")),
    Bad("out-holds-other-files", 2, "holds notes.txt, which export-model did not write", out=lambda s: _foreign(s / "out")),
    Bad("out-holds-another-manifest", 2, "holds manifest.json, which export-model did not", out=lambda s: _foreign(s / "out", MANIFEST)),
    Bad("out-is-the-root", 2, "the root of the file system", out=lambda scratch: Path("/")),
    Bad("out-is-a-link", 2, "is a link; give a folder", out=lambda scratch: _link(scratch / "out")),
    Bad("out-below-a-file", 2, "cannot be written", out=lambda scratch: _file(scratch / "file") / "out"),
    Bad("out-in-a-system-folder", 2, "cannot be written", out=lambda scratch: Path("/proc/out")),
    Bad("range-reversed", 2, "1 <= min <= opt <= max", ("--min-seq", "100", "--max-seq", "50")),
    Bad("opt-above-max", 2, "1 <= min <= opt <= max", ("--opt-seq", "100", "--max-seq", "50")),
    Bad("batch-reversed", 2, "--batch is min 3", ("--batch", "3,2,1")),
    Bad("batch-words", 2, "--batch is 'many'", ("--batch", "many")),
    Bad("block-size-out-of-range", 2, "block_size is 5; it takes an integer from 16 to 256", ("--block-size", "5")),
    Bad("block-size-wrong-type", 2, "Invalid value for '--block-size'", ("--block-size", "big")),
    Bad("local-not-a-multiple", 2, "local_size 100 is not a multiple", ("--local-size", "100")),
    Bad("stratified-two", 2, "stratified is 2", ("--stratified", "2")),
    Bad("seed-negative", 2, "--seed is -1", ("--seed", "-1")),
    Bad("layers-too-high", 2, "there is no layer 7", ("--layers", "0-7")),
    Bad("layers-far-too-high", 2, "there is no layer 99999999999", ("--layers", "0-99999999999")),
    Bad("batch-superscript", 2, "--batch is '²'", ("--batch", "²")),
    Bad("layers-words", 2, "--layers is 'most'", ("--layers", "most")),
    Bad("preset-unknown", 2, "--preset is 'fast'", ("--preset", "fast")),
    Bad("selector-unknown", 2, "selector is 'topk'", ("--selector", "topk")),
    Bad("dtype-unknown", 2, "--dtype is 'int8'", ("--dtype", "int8")),
    Bad("task-unknown", 2, "--task is 'embed'", ("--task", "embed")),
    Bad("option-unknown", 2, "No such option", ("--fast",)),
    Bad("bytes-without-text", 2, "needs held-out text", ("--input-ids", "bytes", "--validate")),
    Bad("lengths-words", 2, "--lengths is 'abc'", ("--lengths", "abc")),
    Bad("lengths-superscript", 2, "--lengths is '64²'", ("--lengths", "64²")),
    Bad("lengths-above-the-plan", 2, "--lengths names 513; the plan takes 2 to 512", ("--lengths", "64,513")),
    Bad("lengths-below-the-plan", 2, "--lengths names 64; the plan takes 65 to 512", ("--lengths", "64", "--min-seq", "65")),
    Bad("gate-not-finite", 2, "--gate kl is nan; it takes a finite number", ("--gate", "kl=nan")),
    Bad("gate-negative", 2, "--gate top1 is -1.0", ("--gate", "top1=-1")),
    Bad("device-unknown", 2, "--device is 'gpu'; it takes one of auto, cpu, cuda", ("--device", "gpu")),
    Bad("text-missing", 2, "there is no file", ("--text", "/nowhere.txt")),
]


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case: Bad, model: Path, tmp_path: Path, export: Callable[..., Result]) -> None:
    folder = case.prepare(model, tmp_path)
    out = case.out(tmp_path)
    before = left_behind(tmp_path)
    result = export(folder, out, "--no-validate", *case.options)
    assert result.code == case.code
    assert case.words in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err
    assert left_behind(tmp_path) == before, "something was left behind"


def test_require_engine_without_a_gpu(model: Path, tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperattention.export.engine.runtime_available", lambda: "no CUDA device")
    result = export(model, tmp_path / "out", "--no-validate", "--require-engine")
    assert result.code == 3 and "--require-engine: no CUDA device" in result.err and "run it on a GPU host" in result.err
    assert left_behind(tmp_path) == []


def test_require_engine_of_a_plan_the_plugin_cannot_take(
    tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "missing_parts", dict)
    result = export(tiny.save(tmp_path / "model", head_dim=12), tmp_path / "out", "--no-validate", "--require-engine", "--dtype", "bf16")
    assert result.code == 2 and "head_dim is 12" in result.err


def test_device_cuda_without_one_is_refused_before_any_work(
    model: Path, tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = export(model, tmp_path / "out", "--device", "cuda")
    assert result.code == 3 and "PyTorch sees no CUDA device" in result.err and left_behind(tmp_path) == []


@pytest.mark.parametrize("head_dim, provider, code, words", [
    (12, "CUDAExecutionProvider", 2, "--device cuda: layer 0 (model.layers.0.self_attn): head_dim is 12"),
    (16, "CPUExecutionProvider", 3, "none will be built (no engine here), or ONNX Runtime's CUDA provider, which is not installed"),
])  # fmt: skip
def test_device_cuda_for_a_plan_that_nothing_there_runs_is_refused(
    head_dim: int, provider: str, code: int, words: str, tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [provider])
    monkeypatch.setattr(pipeline, "missing_parts", lambda: {"engine": "no engine here"})
    folder = tiny.save(tmp_path / "model", head_dim=head_dim)
    result = export(folder, tmp_path / "out", "--device", "cuda", "--dtype", "bf16")
    assert result.code == code and words in " ".join(result.err.split()) and left_behind(tmp_path) == ["model"]


def test_an_unexpected_error_is_no_failed_gate(
    model: Path, tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "missing_parts", lambda: 1 // 0)
    result = export(model, tmp_path / "out", "--json")
    assert result.code == json.loads(result.out)["exit_code"] == 70
    assert "Traceback" in result.err and "ZeroDivisionError" in result.err and "internal error, a bug" in result.err


def test_validation_without_the_library_is_refused_before_any_work(
    model: Path, tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERATTENTION_LIBRARY_DIR", str(tmp_path))
    result = export(model, tmp_path / "out")
    assert result.code == 3 and "the result cannot be validated" in result.err and left_behind(tmp_path) == []


# --- dry run ---------------------------------------------------------------------------------------------------------


def test_dry_run_prints_every_decision_and_writes_nothing(model: Path, tmp_path: Path, export: Callable[..., Result]) -> None:
    result = export(model, tmp_path / "out", "--dry-run", "--layers", "1", "--task", "prefill", "--max-seq", "1000", "--batch", "1,2,3")
    assert result.code == 0 and left_behind(tmp_path) == []
    decisions = ("model.layers.0.self_attn", "approximate", "exact", "chosen by --layers 1")
    for words in (*decisions, "weights", "keys and values", "function body"):
        assert words in result.out
    assert "trained for 512" in result.err and "never approximate" in result.err


def test_dry_run_as_json(model: Path, tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERATTENTION_LIBRARY_DIR", str(tmp_path))
    result = export(model, tmp_path / "out", "--dry-run", "--json", "--sinks", "7", "--seed", "5")
    found = json.loads(result.out)
    assert [layer["mode"] for layer in found["plan"]["layers"]] == ["exact", "approximate"]
    config = found["plan"]["layers"][1]["config"]
    assert (config["sinks"], config["seed"]) == (7, 6)
    assert {item["name"] for item in found["memory"]} >= {"weights", "activations", "workspace"}
    assert {"ONNX Runtime library", "TensorRT library"} <= set(found["missing"])


def test_an_error_as_json(model: Path, tmp_path: Path, export: Callable[..., Result]) -> None:
    result = export(model, tmp_path / "out", "--json", "--layers", "9")
    found = json.loads(result.out)
    assert result.code == found["exit_code"] == 2 and "there is no layer 9" in found["error"]


def test_quiet_says_nothing_on_success(model: Path, tmp_path: Path, export: Callable[..., Result]) -> None:
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


def test_whole_run_leaves_a_complete_folder(
    model: Path, tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_endings_of_the_validation(
    ending: Ending, model: Path, tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    model: Path, tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_export", write_model_files)
    out = tmp_path / "out"
    assert export(model, out, "--no-validate", "--seed", "1").code == 0
    assert export(model, out, "--no-validate", "--seed", "2").code == 0
    assert Bundle.open(out).plan.seed == 2
    stand_in(monkeypatch, 3, False)
    assert export(model, out, "--seed", "3").code == 3
    assert Bundle.open(out).plan.seed == 2 and left_behind(tmp_path) == ["out"]


def test_validation_options_are_passed_on(
    model: Path, tmp_path: Path, export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[pipeline.Options] = []
    monkeypatch.setattr(pipeline, "run", lambda source, plan, options, reporter: seen.append(options) or {})
    text = tmp_path / "text"
    text.write_text("text")
    gates = ("--gate", "delta-nats=0.5", "--gate", "kl=0.25")
    assert export(model, tmp_path / "out", "--text", text, "--lengths", "64,128", "--device", "cpu", *gates).code == 0
    passed = seen[0].validation
    given = ["--text", str(text), "--lengths", "64,128", "--device", "cpu"]
    assert list(passed) == [*given, *gates]


@pytest.mark.ort
def test_the_example_runs_on_an_output(tmp_path: Path, export: Callable[..., Result]) -> None:
    model = tiny.save(tmp_path / "model", vocab_size=256)
    small = [part for name, value in tiny.SMALL.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert export(model, tmp_path / "out", "--no-validate", "--input-ids", "bytes", *small).code == 0
    command = [sys.executable, str(ROOT / "examples/onnxruntime_logits.py"), str(tmp_path / "out"), str(ROOT / "docs/operator.md"), "200"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "200 bytes in" in done.stdout and "nats a byte" in done.stdout
