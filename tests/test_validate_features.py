"""Models without a vocabulary, end to end on ONNX Runtime: text, image and a user's function; a broken op trips each gate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_samples as samples
import torch
import validation_bench as vb
from tiny import SMALL
from torch import Tensor
from transformers import AutoConfig, AutoModel

from hyperattention.export.bundle import write_draft
from hyperattention.export.gate_options import Limits
from hyperattention.export.onnx_graph import export_onnx
from hyperattention.export.plan import ExportPlan, make_plan
from hyperattention.export.source import Source, open_source
from hyperattention.library import ort_library_path
from hyperattention.reference import attention
from hyperattention.selection import Plan
from hyperattention.validate import cli
from hyperattention.validate.arrays import load_examples
from hyperattention.validate.describe import plan_summary
from hyperattention.validate.features import as_rows, row_metrics
from hyperattention.validate.gates import evaluate
from hyperattention.validate.measure import Extent, measure
from hyperattention.validate.operators import Operator, one_thread, reference_operator
from hyperattention.validate.report import read
from hyperattention.validate.runners import OrtRunner, TorchRunner
from hyperattention.validate.verdict import judge
from hyperattention.validate.workbench import Workbench

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 203
LOOSE = {"cosine": "0", "norm-ratio": "100"}  # a random model tells nothing about quality
_SIZES = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
_CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_SIZES, "vocab_size": 256, "max_position_embeddings": 300},
    "vit": {**_SIZES, "image_size": (28, 52), "patch_size": 4},
}
FUNCTION = '''
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        nn.init.normal_(self.qkv.weight, std=0.15)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tower(nn.Module):
    """Features, their mean, and the largest place: the last is an integer, which nothing can be judged by.

    A token of its own stands before the input, so that attention has one key more than the input is long.
    """

    def __init__(self):
        super().__init__()
        self.token, self.blocks = nn.Parameter(torch.linspace(-1, 1, 32)), nn.Sequential(Block(), Block())

    def forward(self, x, gain):
        x = self.blocks(torch.cat([self.token.expand(x.shape[0], 1, -1), x], 1)) * gain
        return {"hidden": x, "pooled": x.mean(1), "place": x.sum(-1).argmax(-1)}


def build():
    length = torch.export.Dim("length", min=2, max=400)
    return Tower(), (torch.randn(3, 150, 32) + torch.linspace(-2, 2, 32), torch.tensor(1.5)), ({1: length}, None)
'''


@dataclass(frozen=True)
class Case:
    """One model, what it is validated on, and what the report must say of it."""

    model: str
    arguments: tuple[str, ...] = ()
    kind: str = "random"
    lengths: tuple[int, ...] = (91,)
    outputs: tuple[str, ...] = ("features",)
    dtype: str = "fp32"
    text: bool = False
    arrays: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.model}-{self.kind}-{self.dtype}"


CASES = (
    Case("bert", ("--lengths", f"{LONGEST},30"), "text", (30, LONGEST), text=True),
    Case("vit", kind="random", lengths=(92,)),
    Case("vit", kind="arrays", lengths=(92,), arrays={"pixel_values": np.random.default_rng(0).normal(size=(3, 3, 28, 52))}, dtype="fp16"),
    Case("function", ("--lengths", "31,231"), "examples", (31, 231), ("hidden", "pooled")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


def saved(folder: Path, name: str) -> str:
    """MODEL as a user gives it, made once."""
    path = folder / name
    if name == "function":
        path.with_suffix(".py").write_text(FUNCTION)
        return f"{path}.py:build"
    if not path.exists():
        torch.manual_seed(3)
        model = AutoModel.from_config(AutoConfig.for_model(name, **_CONFIGS[name]))
        with torch.no_grad():
            for parameter in model.parameters():  # large enough that attention is not uniform
                parameter.mul_(6) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(path)
    return str(path)


def planned(model: str, dtype: str = "fp32", **attributes: int) -> tuple[Source, ExportPlan]:
    source = open_source(model, task=None if ":" in model else "features").ranged({}, (None, None, None))
    seq: dict[str, Any] = dict(seq=(1, 128, 256), input_ids="bytes") if source.kind == "encoder" else {}
    return source, make_plan(source, layers="all", attributes={**SMALL, **attributes}, dtype=dtype, **seq)


@pytest.fixture(scope="module")
def exported(folder: Path) -> Callable[[Case], tuple[Path, str]]:
    """OUT as the export leaves it before the validation, and its MODEL; each once."""
    made: dict[tuple[str, str], tuple[Path, str]] = {}

    def make(case: Case) -> tuple[Path, str]:
        key = (case.model, case.dtype)
        if key not in made:
            out, model = folder / f"out-{case.model}-{case.dtype}", saved(folder, case.model)
            out.mkdir()
            source, plan = planned(model, case.dtype)
            export_onnx(source.load(plan), plan, out, lambda text: None)
            shutil.copy(ort_library_path(), out)
            write_draft(out, plan, {"name": source.name}, None, {})
            made[key] = out, model
        return made[key]

    return make


def validated(out: Path, model: str, *more: str, gates: dict[str, str] = LOOSE) -> int:
    limits = [part for name, value in gates.items() for part in ("--gate", f"{name}={value}")]
    try:
        cli.main(["validate", str(out), "--model", model, "--windows", "2", *limits, *more])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.ort
@pytest.mark.parametrize("case", CASES, ids=str)
def test_command(case: Case, exported: Callable[[Case], tuple[Path, str]], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, model = exported(case)
    more = list(case.arguments)
    if case.text:
        text = folder / "text.txt"
        text.write_bytes(vb.TEXT.read_bytes()[:900])
        more += ["--text", str(text)]
    if case.arrays:
        np.savez(folder / "real.npz", **case.arrays)
        more += ["--inputs", str(folder / "real.npz")]
    code, said = validated(out, model, *more), capsys.readouterr()
    assert code == 0, said
    vb.check_steps(said.err)
    report = read(out / "report" / "report.json")
    assert report["kind"] == "features" and report["inputs"]["kind"] == case.kind
    assert report["verdict"]["safe"] is (None if case.kind == "random" else True) and report["verdict"]["failed"] == []
    assert judge(report, Limits(cosine=1.0, norm_ratio=100.0))["verdict"]["safe"] is False  # random inputs can condemn
    rows = report["approximation"]
    assert tuple(row["length"] for row in rows) == case.lengths
    assert [row["exact"] for row in rows] == [n <= SMALL["exact_below"] for n in case.lengths]
    assert all(tuple(o["name"] for o in row["outputs"]) == case.outputs for row in rows)
    last = rows[-1]["outputs"][0]
    assert 0 < last["relative_l2"]["mean"] < 2 and last["cosine_worst"] < last["cosine"]["mean"] < 1 and last["cosine"]["blocks"] > 1
    assert [p["found"] for p in report["provenance"]] and all(len(p["found"]) == 2 for p in report["provenance"])
    assert [row["ours_s"] > 0 and row["exact_s"] > 0 and row["torch_exact_s"] > 0 for row in report["time"]] == [True] * len(rows)
    assert {g["name"] for g in report["gates"]} == {"selection", "op error", "model error", "cosine", "norm ratio", "hard"}
    cases = {row["case"] for row in report["implementation"]["whole_model"]}
    assert any("padded" in name for name in cases) == (case.model == "bert")
    assert any("pooled" in name for name in cases) == (case.model == "function")
    assert report["implementation"]["length"] > SMALL["exact_below"]
    assert [row["length"] for row in report["baseline"]] == [n for n in case.lengths if n > SMALL["exact_below"]]
    assert report["hard_inputs"] and any("fp32 twin" in note for note in report["notes"]) == (case.dtype == "fp16")
    written = "".join((out / "report" / name).read_text() for name in ("report.json", "report.md", "report.html"))
    assert str(folder) not in written


@pytest.mark.ort
def test_an_output_that_is_no_number_is_named_and_condemned(
    exported: Callable[[Case], tuple[Path, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = exported(CASES[3])
    right = OrtRunner.infer_impl

    def broken(self: OrtRunner, feed: dict[str, Tensor]) -> dict[str, Tensor]:
        answer = right(self, feed)
        if feed["x"].shape[1] == 201:
            answer["pooled"][0, :3] = torch.nan
        return answer

    monkeypatch.setattr(OrtRunner, "infer_impl", broken)
    assert validated(out, model, "--json", "--lengths", "150,201") == 1
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["verdict"]["safe"] is False and set(answer["verdict"]["failed"]) == {"model error", "cosine", "norm ratio"}
    where = {gate["name"]: gate["where"] for gate in answer["gates"]}
    assert where["model error"] == "201 tokens: 3 NaN or infinite numbers in output pooled" and "pooled" in where["cosine"]
    assert any("Output pooled holds 3 NaN" in note for note in read(out / "report" / "report.json")["notes"])


@pytest.mark.ort
def test_a_model_that_answers_no_numbers_itself_is_refused(
    exported: Callable[[Case], tuple[Path, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = exported(CASES[1])
    right = TorchRunner.infer_impl

    def broken(self: TorchRunner, feed: dict[str, Tensor]) -> dict[str, Tensor]:
        answer = right(self, feed)
        return {name: value + (torch.inf if self.operator is None else 0) for name, value in answer.items()}

    monkeypatch.setattr(TorchRunner, "infer_impl", broken)
    assert validated(out, model) == 2
    assert "infinite numbers in output features at 92 tokens" in " ".join(capsys.readouterr().err.split())


@pytest.mark.ort
@pytest.mark.parametrize(
    ("number", "arguments", "says"),
    [
        (1, ["--text", str(vb.TEXT)], "vit reads pixel_values: give real ones with --inputs FILE.npz"),
        (1, ["--lengths", "93"], "length 93 was not exported; the folder takes 92 alone"),
        (1, ["--needle"], "--needle plants a prompt of bytes"),
        (1, ["--gate", "kl=1"], "--gate kl does not judge a report of kind features"),
        (1, ["--inputs", "nowhere.npz"], "does not exist; give an .npz file with the arrays pixel_values"),
        (0, ["--inputs", "nowhere.npz", "--text", str(vb.TEXT)], "--text and --inputs are given together"),
        (0, ["--time-lengths", "257", "--text", str(vb.TEXT)], "length 257 was not exported; the folder takes 1 to 256"),
    ],
    ids=["text", "length", "needle", "gate", "missing", "both", "time"],
)
def test_refused_before_any_work(
    number: int, arguments: list[str], says: str, exported: Callable[[Case], tuple[Path, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = exported(CASES[number])
    assert validated(out, model, *arguments, gates={}) == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.ort
def test_a_missing_model_says_why_and_how(exported: Callable[[Case], tuple[Path, str]], capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = exported(CASES[1])
    with pytest.raises(SystemExit) as stop:
        cli.main(["validate", str(out)])
    said = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and "--model is missing" in said and "--model path/to/vit`" in said


# --- broken operators --------------------------------------------------------------------------------------------------


class Scaled(vb.ReferenceKernels):
    """Outputs three times too large."""

    def attend(self, q, k, v, config, blocks, lengths=None):
        o, lse = super().attend(q, k, v, config, blocks, lengths)
        return 3 * o, lse


class Coarse(vb.ReferenceKernels):
    """Right by its own attributes, which leave a query nothing but one sampled key."""

    def forward(self, q, k, v, config, lengths=None):
        coarse = replace(config, num_blocks=0, sample_size=1, sinks=0)
        return o_and_lse(q, k, v, coarse, lengths) if not config.is_exact(q.shape[2], k.shape[2]) else super().forward(q, k, v, config)


def o_and_lse(q: Tensor, k: Tensor, v: Tensor, config: Any, lengths: Tensor | None, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    found = attention(q, k, v, config, lengths, plan)
    return found.o, found.lse


class Causal(vb.ReferenceKernels):
    """Masks what an encoder must see."""

    def attend(self, q, k, v, config, blocks, lengths=None):
        if not config.is_exact(q.shape[2], k.shape[2]):
            return super().attend(q, k, v, config, blocks, lengths)
        return o_and_lse(q, k, v, replace(config, causal=1), lengths)


@pytest.fixture(scope="module")
def tower(folder: Path) -> Iterator[tuple[Source, Any]]:
    source, plan = planned(saved(folder, "function"), num_blocks=4, sample_size=64, exact_below=64)
    yield source, source.load(plan)


def measured(tower: tuple[Source, Any], kernels: vb.ReferenceKernels) -> dict:
    """The numbers of a report with `kernels` wherever the native library would stand."""
    source, replaced = tower
    operator = Operator("kernels under test", lambda *problem: kernels.forward(*problem))
    material = load_examples(replaced.plan, source.examples(), "examples")
    with (
        one_thread(),
        TorchRunner(replaced, None, "exact") as exact,
        TorchRunner(replaced, operator, "under test") as backend,
        TorchRunner(replaced, reference_operator(), "reference") as definition,
    ):
        bench = Workbench(replaced, replaced.plan, exact, backend, None, backend, operator, kernels, 0, 0, lambda text: None)
        report = measure(bench, definition, material, Extent({150: 1}))
    beside = {"kind": "features", "environment": {"busy": None}, "plan_summary": plan_summary(replaced.plan)}
    return {**report, **beside, "inputs": material.describe()}


GATES = {"selection", "op error", "model error", "cosine", "norm ratio", "hard"}


def failing(report: dict, limits: Limits = Limits()) -> set[str]:
    return {gate.name for gate in evaluate(report, limits) if not gate.passed and not gate.advisory}


@pytest.fixture(scope="module")
def healthy(tower: tuple[Source, Any]) -> dict:
    return measured(tower, vb.ReferenceKernels())


def test_a_right_operator_passes_every_gate(healthy: dict) -> None:
    assert failing(healthy) == set() and {gate.name for gate in evaluate(healthy, Limits())} == GATES
    row = healthy["approximation"][0]
    assert not row["exact"] and [o["name"] for o in row["outputs"]] == ["hidden", "pooled"] and row["outputs"][0]["cosine_worst"] < 1
    assert all(check["polygraphy"] for check in healthy["implementation"]["whole_model"])
    assert failing(healthy, Limits(cosine=1.0)) == {"cosine"} and failing(healthy, Limits(norm_ratio=0.0)) == {"norm ratio"}


@pytest.mark.parametrize(
    "broken",
    [
        vb.Broken(vb.WeightsDoubled, frozenset({"op error", "model error"})),
        vb.Broken(vb.LengthsIgnored, frozenset({"op error"})),
        vb.Broken(vb.OtherDraw, frozenset({"selection", "op error", "model error"})),
        vb.Broken(Causal, frozenset({"op error"})),
        vb.Broken(Scaled, frozenset({"op error", "model error", "cosine", "norm ratio"})),
        vb.Broken(Coarse, frozenset({"model error", "cosine", "norm ratio"})),
    ],
    ids=str,
)
def test_a_broken_operator_trips_its_gates(broken: vb.Broken, tower: tuple[Source, Any]) -> None:
    report = measured(tower, broken.kernels())
    assert failing(report) == broken.trips
    assert judge({**samples.report("features"), **report}, Limits())["verdict"]["safe"] is False


# --- row metrics -------------------------------------------------------------------------------------------------------


def test_row_metrics_tell_size_from_direction() -> None:
    exact = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    ours = torch.tensor([[6.0, 8.0], [0.0, 1.0], [0.0, -2.0], [0.0, 0.0], [0.0, 1.0]])
    found = row_metrics(ours, exact)
    assert found.norm_ratio.tolist() == [2, 1, 1, 1, torch.inf]
    assert found.cosine.tolist() == [1, 0, -1, 1, 0]
    torch.testing.assert_close(found.relative_l2[:4], torch.tensor([1.0, 2**0.5, 2.0, 0.0], dtype=torch.float64))
    assert float(found.relative_l2[4]) == torch.inf


def test_one_number_that_is_none_spoils_its_row_alone() -> None:
    ours = torch.ones(2, 3, 4)
    ours[1, 2, 0] = torch.nan
    found = row_metrics(ours, torch.ones(2, 3, 4))
    assert [bool(x) for x in found.cosine.isnan()] == [False] * 5 + [True] and bool(found.norm_ratio[5].isnan())


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((2, 5, 7), (10, 7)), ((2, 3, 5, 7), (30, 7)), ((4, 7), (4, 7)), ((4, 5, 1), (4, 5)), ((7,), (1, 7)), ((), (1, 1)), ((4, 1), (4, 1))],
    ids=str,
)
def test_rows_of_an_output(shape: tuple[int, ...], rows: tuple[int, int]) -> None:
    assert tuple(as_rows(torch.zeros(shape)).shape) == rows
