"""`hyperattention bench OUT` on ONNX Runtime: a tiny language model and a function's module, and folders that are refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch
from jsonschema import Draft202012Validator
from onnx import TensorProto, helper

from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export.bundle import finish, write_draft
from hyperattention.export.onnx_graph import export_onnx
from hyperattention.export.plan import make_plan
from hyperattention.export.source import Trust, open_source
from hyperattention.library import ort_library_path
from hyperattention.validate import bench_timing, cli
from hyperattention.validate.bench_outcome import default_lengths, vocabulary

pytestmark = pytest.mark.ort
SCHEMA = Path(__file__).resolve().parent.parent / "docs/bench.schema.json"
LAYERS, VOCABULARY = 2, 67
MODULE = """
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(24, 3 * 24)

    def forward(self, states):
        q, k, v = self.project(states).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mixer():
    torch.manual_seed(5)
    return Mixer(), (torch.randn(1, 90, 24),), {"states": {1: torch.export.Dim("tokens", min=2, max=200)}}
"""


def export(model: str, folder: Path, dtype: str = "fp32") -> Path:
    """The output folder as the export makes it, up to the engine and the validation."""
    source = open_source(model).ranged({}, (None, None, None))
    plan = make_plan(source, layers="all", attributes={**tiny.SMALL}, seq=(1, 128, 300), dtype=dtype)
    export_onnx(source.load(plan), plan, folder, lambda text: None)
    shutil.copy(ort_library_path(), folder)
    about = {"name": source.name, "architecture": source.architecture, "parameters": source.num_parameters}
    write_draft(folder, plan, about, None, {})
    finish(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(str(model), tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("function")
    (folder / "mixer.py").write_text(MODULE)
    name = f"{folder / 'mixer.py'}:mixer"
    (folder / "out").mkdir()
    return name, export(name, folder / "out")


def bench(folder: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the object that --json prints."""
    code = 0
    try:
        cli.main(["bench", str(folder), "--device", "cpu", "--threads", "1", "--json", "--quiet", "--output", str(output), *more])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, json.loads(capsys.readouterr().out)


def test_a_language_model_beside_its_exact_twin_and_pytorch(
    exported: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_timing, "SECOND_WARM_UP_BELOW", math.inf)  # runs are counted, whatever the machine's speed
    options = ("--lengths", "129,41", "--repeats", "4", "--max-seconds", "86400", "--against", "torch")
    code, report = bench(exported, tmp_path, capsys, "--model", str(model), *options)
    assert code == 0, report
    assert {(r["contender"], r["length"], r["runs"]) for r in report["rows"]} == {
        (name, length, 4) for name in ("ours", "exact", "torch") for length in (41, 129)
    }
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(report)
    assert report["left_out"] == [] and report["kind"] == "model"
    assert all(r["against"]["name"] == "torch" for r in report["rows"])
    # Both sessions are proven: what ran was the library's op in every layer, at every warm-up and round.
    assert [(proof["planned"], len(proof["found"]), proof["runs"]) for proof in report["provenance"]] == [(LAYERS, LAYERS, 2 * (2 + 4))] * 2
    assert (tmp_path / "bench.png").is_file() and str(model) not in (tmp_path / "bench.json").read_text()


def test_a_module_of_a_function(function: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, folder = function
    code, report = bench(folder, tmp_path, capsys, "--repeats", "1", "--lengths", "200,2")
    assert code == 0, report
    assert {(r["contender"], r["length"]) for r in report["rows"]} == {(name, n) for name in ("ours", "exact") for n in (2, 200)}
    assert [(left["contender"], left["length"]) for left in report["left_out"]] == [("torch", None)]
    assert "--model" in report["left_out"][0]["reason"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lengths", "301"], "length 301 was not exported"),
        (["--backend", "library"], "--backend is 'library'"),
        (["--backend", "tensorrt"], "holds no model.engine"),
        (["--exact-engine", "x.engine"], "--exact-engine belongs to the backend tensorrt"),
        (["--against", "torch"], "--model MODEL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_the_folder_is_refused(
    more: list[str], message: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = bench(exported, tmp_path / "made", capsys, *more)
    assert code == UsageError.exit_code and message in found["error"]
    assert not (tmp_path / "made").exists()


def test_another_model_is_refused(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny.save(tmp_path / "other", intermediate_size=40)
    code, found = bench(exported, tmp_path / "made", capsys, "--model", str(other))
    assert code == UsageError.exit_code and "number of parameters" in found["error"]


def test_a_changed_file_is_refused(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(exported, tmp_path / "copy")
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    code, found = bench(folder, tmp_path / "made", capsys)
    assert code == UsageError.exit_code and "model.onnx" in found["error"]


def test_times_of_the_function_body_are_never_reported(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the library ONNX Runtime runs the exact body that the file carries: right, and not what is to be timed."""
    folder = shutil.copytree(exported, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / ort_library_path().name).unlink()
    del manifest["files"][ort_library_path().name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, found = bench(folder, tmp_path / "made", capsys, "--lengths", "40", "--repeats", "1")
    assert code == EnvironmentFault.exit_code and "rows" not in found
    assert not (tmp_path / "made").exists()


def test_bf16_is_not_timed_on_the_processor(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    folder = export(str(model), tmp_path / "out", dtype="bf16")
    code, found = bench(folder, tmp_path / "made", capsys)
    assert code == UsageError.exit_code and "--dtype fp32" in found["error"]


def test_random_ids_are_ids_of_the_model(exported: Path, tmp_path: Path) -> None:
    assert vocabulary(exported / "model.onnx", ["input_ids", "lengths"]) == VOCABULARY
    table = helper.make_tensor("table", TensorProto.FLOAT, [9, 2], [0.0] * 18)
    ids, answer = (helper.make_tensor_value_info(n, kind, [3]) for n, kind in (("ids", TensorProto.INT32), ("o", TensorProto.FLOAT)))
    nodes = [helper.make_node("Cast", ["ids"], ["wide"], to=TensorProto.INT64), helper.make_node("Gather", ["table", "wide"], ["o"])]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [ids], [answer], [table])), tmp_path / "cast.onnx")
    assert vocabulary(tmp_path / "cast.onnx", ["ids"]) == 9
    assert vocabulary(tmp_path / "cast.onnx", ["other"]) == 2


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ((1, 32768), (1024, 2048, 4096, 8192, 16384, 32768)),
        ((1, 5000), (1024, 2048, 4096, 5000)),
        ((1, 300), (64, 128, 256, 300)),
        ((3000, 5000), (4096, 5000)),
        ((77, 77), (77,)),
    ],
    ids=str,
)
def test_default_lengths_end_with_the_longest(span: tuple[int, int], expected: tuple[int, ...], exported: Path) -> None:
    from dataclasses import replace

    from hyperattention.export.bundle import Bundle

    plan, (low, high) = Bundle.open(exported).plan, span
    assert default_lengths(replace(plan, seq=(low, high, high), dims={**plan.dims, "sequence": (low, high, high)})) == expected


def test_what_is_timed_is_what_torch_computes(exported: Path, model: Path) -> None:
    """The feed of every contender is the same, and the exact ones answer alike."""
    import contextlib

    from hyperattention.validate.bench_outcome import contenders, open_subject

    with contextlib.ExitStack() as stack:
        found, missing = contenders(open_subject(exported, "cpu", "ort"), str(model), Trust(), None, 3, 1, stack, lambda text: None)
        outputs = {}
        for contender in found:
            run = contender.prepare(129)
            run.time()
            outputs[contender.name] = contender.runner.infer(contender.feeds.at(129))["logits"]
    assert missing == [] and list(outputs) == ["ours", "exact", "torch"]
    torch.testing.assert_close(outputs["exact"], outputs["torch"], atol=1e-3, rtol=1e-3)
    assert (outputs["ours"] - outputs["torch"]).abs().max() > 1e-3
