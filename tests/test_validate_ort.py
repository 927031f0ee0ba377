"""Validation end to end on ONNX Runtime: a tiny exported model through the command, and runs that are not what was built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import tiny
import torch
import validation_bench as vb

from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export.bundle import Bundle, finish, write_draft
from hyperattention.export.load import inspect_source, load_model
from hyperattention.export.onnx_graph import export_onnx
from hyperattention.export.patch import install
from hyperattention.export.plan import make_plan
from hyperattention.library import ort_library_path
from hyperattention.validate import cli
from hyperattention.validate.feeds import feed
from hyperattention.validate.provenance import check_graph
from hyperattention.validate.report import read
from hyperattention.validate.runners import OrtRunner

pytestmark = pytest.mark.ort
LENGTH = 203
# A random model tells nothing about quality; these tests are about the machinery.
LOOSE = {"delta-nats": "100", "kl": "100", "top1": "0"}


@dataclass(frozen=True)
class Case:
    """One export of the tiny model."""

    task: str = "logits"
    dtype: str = "fp32"
    layers: str = "1"
    keep_exact: str = "op"
    selector: str = "blocks"

    def __str__(self) -> str:
        return f"{self.task}-{self.dtype}-layers {self.layers}-{self.keep_exact}-{self.selector}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), vocab_size=256)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(torch.randint(32, 127, (1500,), generator=torch.Generator().manual_seed(1)).tolist()))
    return path


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Makes an output folder as the export does, up to the engine and the validation; each case once."""
    made: dict[Case, Path] = {}

    def make(case: Case) -> Path:
        if case not in made:
            folder = tmp_path_factory.mktemp("out")
            source = inspect_source(model, case.task)
            options = dict(attributes={**tiny.SMALL, "selector": case.selector}, seq=(1, 128, 400), input_ids="bytes")
            plan = make_plan(source, layers=case.layers, dtype=case.dtype, keep_exact=case.keep_exact, **options)
            export_onnx(
                install(load_model(source, torch.float32 if case.dtype == "fp32" else torch.bfloat16), plan),
                plan,
                folder,
                lambda text: None,
            )
            shutil.copy(ort_library_path(), folder)
            write_draft(folder, plan, {"name": "tiny"}, None, {})
            made[case] = folder
        return made[case]

    return make


def _validate(folder: Path, model: Path, text: Path, *more: str, gates: dict[str, str] = LOOSE) -> int:
    limits = [part for name, value in gates.items() for part in ("--gate", f"{name}={value}")]
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(folder), "--model", str(model), "--text", str(text), "--windows", "1", *limits, *more])
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    "case",
    [Case(), Case("last-logits", layers="none"), Case("prefill", keep_exact="onnx"), Case(dtype="bf16"), Case(selector="sortlsh")],
    ids=str,
)
def test_command(case: Case, exported: Callable[[Case], Path], model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(case)
    code, said = _validate(folder, model, text, "--lengths", f"{LENGTH},40", "--tail", "19"), capsys.readouterr()
    assert code == 0, said
    vb.check_steps(said.err)
    report = read(folder / "report" / "report.json")
    ops = 1 if case.keep_exact == "onnx" else 2
    assert [len(p["found"]) for p in report["provenance"]] == [ops] * (1 if case.layers == "none" else 2)
    assert [row["length"] for row in report["approximation"]] == [40, LENGTH]
    assert [row["exact"] for row in report["approximation"]] == [True, case.layers == "none"]
    longest = report["approximation"][-1]
    assert longest["prefill_exact_decode"]["tokens"] == 19 and longest["all_positions"]["tokens"] == LENGTH
    assert ("ONNX Runtime" in longest["prefill_backend"]) == (case.task == "prefill")
    assert ("ONNX Runtime" in longest["all_positions_backend"]) == (case.task == "logits")
    assert any("fp32 twin" in note for note in report["notes"]) == (case.dtype == "bf16") and report["target_dtype"] == case.dtype
    assert (longest["all_positions"]["kl"]["mean"] > 1e-3) == (case.layers != "none")
    assert report["verdict"]["failed"] == []
    everything = "".join((folder / "report" / name).read_text() for name in ("report.json", "report.md", "report.html"))
    assert str(folder) not in everything and str(model) not in everything and str(text) not in everything


def test_a_gate_not_met_is_exit_1_and_leaves_the_report(
    exported: Callable[[Case], Path], model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(Case())
    assert _validate(folder, model, text, "--lengths", str(LENGTH), "--json", gates={**LOOSE, "kl": "0"}) == 1
    out = capsys.readouterr()
    assert json.loads(out.out.splitlines()[-1])["verdict"]["failed"] == ["KL"] and "Traceback" not in out.err
    assert "Not safe" in (folder / "report" / "report.html").read_text()


def test_function_body_in_place_of_the_library_is_seen(exported: Callable[[Case], Path]) -> None:
    bundle = Bundle.open(exported(Case()))
    nodes = check_graph(bundle.model_onnx, bundle.plan)
    assert len(nodes) == 2
    given = feed(torch.arange(70)[None])
    with (
        OrtRunner(bundle.plan, bundle.model_onnx, bundle.ort_library, nodes, "ours") as ours,
        OrtRunner(bundle.plan, bundle.model_onnx, None, nodes, "body") as body,
    ):
        a, b = ours.infer(given)["logits"], body.infer(given)["logits"]
        assert a.shape == b.shape == (1, 70, 256) and not torch.equal(a, b)  # 70 > exact_below: one approximates
        assert ours.prove().found == tuple(sorted(nodes))
        with pytest.raises(EnvironmentFault, match="function body"):
            body.prove()


def test_exact_twin_raises_exact_below_alone(exported: Callable[[Case], Path]) -> None:
    bundle = Bundle.open(exported(Case()))
    nodes = check_graph(bundle.model_onnx, bundle.plan)
    given = feed(torch.arange(150)[None])
    with OrtRunner(bundle.plan, bundle.model_onnx, bundle.ort_library, nodes, "exact", exact=True) as exact:
        twin = exact.infer(given)["logits"]
        exact.prove()
    with OrtRunner(bundle.plan, bundle.model_onnx, None, nodes, "body") as body:
        torch.testing.assert_close(twin, body.infer(given)["logits"], rtol=1e-3, atol=1e-3)


def test_missing_library_stops_validation_with_exit_3(
    exported: Callable[[Case], Path], model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported(Case()), folder)
    (folder / ort_library_path().name).unlink()
    assert _validate(folder, model, text, "--lengths", str(LENGTH)) == 3
    assert "function body" in capsys.readouterr().err


def test_graph_must_be_the_plans(exported: Callable[[Case], Path], tmp_path: Path) -> None:
    bundle = Bundle.open(exported(Case()))
    proto = onnx.load(bundle.model_onnx)
    node = next(n for n in proto.graph.node if n.op_type == "HyperAttention")
    seed = next(a for a in node.attribute if a.name == "seed")
    seed.i += 1
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(EnvironmentFault, match="seed"):
        check_graph(tmp_path / "model.onnx", bundle.plan)
    kept = [n for n in proto.graph.node if n.op_type != "HyperAttention"]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(EnvironmentFault, match="holds 0 HyperAttention nodes"):
        check_graph(tmp_path / "model.onnx", bundle.plan)


def test_lengths_outside_the_export_are_refused(exported: Callable[[Case], Path], model: Path, text: Path, capsys) -> None:
    assert _validate(exported(Case()), model, text, "--lengths", "401") == 2
    assert "1 to 400" in capsys.readouterr().err


def test_engine_needs_an_engine(exported: Callable[[Case], Path], model: Path, text: Path, capsys) -> None:
    assert _validate(exported(Case()), model, text, "--backend", "tensorrt") == UsageError.exit_code
    assert "no model.engine" in capsys.readouterr().err


def test_changed_files_stop_a_validation(
    exported: Callable[[Case], Path], model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported(Case()), folder)
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[: len(whole) // 2])
    assert _validate(folder, model, text, "--lengths", str(LENGTH)) == 2  # a draft has no hashes
    assert "truncated" in capsys.readouterr().err
    (folder / "model.onnx").write_bytes(whole)
    finish(folder)
    (folder / "model.onnx").unlink()
    assert _validate(folder, model, text, "--lengths", str(LENGTH)) == 2
    assert "model.onnx changed or missing" in capsys.readouterr().err


def test_another_model_is_refused(exported: Callable[[Case], Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, other in (("wide", {"intermediate_size": 50}), ("deep", {"num_hidden_layers": 3})):
        folder = tmp_path / name
        shutil.copytree(exported(Case()), folder)
        plan = Bundle.open(folder).plan
        source = inspect_source(tiny.save(tmp_path / "model", vocab_size=256))
        write_draft(folder, plan, {"architecture": source.architecture, "parameters": source.num_parameters}, None, {})
        assert _validate(folder, tiny.save(tmp_path / f"{name} model", vocab_size=256, **other), text, "--lengths", "70") == 2
        assert "number of parameters" in capsys.readouterr().err
    gpt2 = tiny.save(tmp_path / "gpt2", "gpt2", vocab_size=256)
    assert _validate(tmp_path / "wide", gpt2, text, "--lengths", "70") == 2
    assert "architecture GPT2LMHeadModel" in capsys.readouterr().err


def test_report_keeps_the_manifest_in_step(exported: Callable[[Case], Path], model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported(Case()), folder)
    finish(folder)
    assert _validate(folder, model, text, "--lengths", "70") == 0
    first = Bundle.open(folder)
    assert first.manifest["validation"]["verdict"]["safe"] is True and first.changed_files() == []
    with pytest.raises(SystemExit):
        cli.main(["report", str(folder), "--recheck", "--gate", "kl=0"])
    again = Bundle.open(folder)
    assert again.manifest["validation"]["verdict"]["safe"] is False and again.changed_files() == []
    assert "report/report.json" in again.manifest["files"] and not list(folder.glob("**/.*.partial"))


def test_inspect(exported: Callable[[Case], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported(Case()), folder)
    finish(folder)
    (folder / "model.trt.onnx").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", str(folder), "--json"])
    assert stop.value.code == EnvironmentFault.exit_code
    found = json.loads(capsys.readouterr().out)
    assert found["finished"] and found["changed"] == ["model.trt.onnx"]
    assert [layer["mode"] for layer in found["policy"]["layers"]] == ["exact", "approximate"]
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(folder)])
    assert "CHANGED" in capsys.readouterr().out


def test_times_past_the_trained_length_are_marked(
    exported: Callable[[Case], Path], model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(Case())
    assert _validate(folder, model, text, "--lengths", "70", "--time-lengths", "390") == 0
    vb.check_steps(capsys.readouterr().err)
    rows = read(folder / "report" / "report.json")["time"]
    assert [(row["length"], row["time_only"], row["exact_s"] > 0) for row in rows] == [(70, False, True), (390, True, True)]
    assert "time only" in (folder / "report" / "report.html").read_text()
