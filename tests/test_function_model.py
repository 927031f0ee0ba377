"""A user's module with its attention replaced: the untouched module, the operator's definition, ONNX Runtime, and the whole command."""

from __future__ import annotations

import copy
import functools
import json
import signal
from pathlib import Path
from typing import Any, Sequence

import function_models
import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from torch import Tensor

from hyperattention import reference
from hyperattention.config import Config
from hyperattention.errors import UnsupportedModel, UsageError
from hyperattention.export.bundle import Bundle
from hyperattention.export.cli import main
from hyperattention.export.function import FunctionSource
from hyperattention.export.function_model import GraphModel
from hyperattention.export.onnx_graph import export_onnx, hyper_nodes
from hyperattention.export.onnx_schema import attribute_values
from hyperattention.export.plan import ExportPlan, make_plan
from hyperattention.export.source import open_source
from hyperattention.library import ort_library_path

ROOT = Path(__file__).resolve().parents[1]
FILE = Path(function_models.__file__)
# Sizes at which the operator approximates (exact_below is 32), odd and distinct.
SIZES: dict[str, dict[str, int]] = {
    "encoder": {"batch": 3, "sequence": 143},
    "decoder": {"batch": 2, "sequence": 131, "keys": 77},
    "vit": {"batch": 3},
    "fixed": {},
    "layers": {"x_dim1": 89},
}
RANGES = {"decoder": {}, "vit": {}, "fixed": {}, "encoder": {}, "layers": {"x_dim1": (1, 64, 128)}}


@functools.cache
def opened(name: str) -> FunctionSource:
    source = open_source(f"{FILE}:{name}")
    assert isinstance(source, FunctionSource)
    return source.ranged(RANGES[name], (None, None, 300 if name == "encoder" else None))


@functools.cache
def loaded(name: str, layers: str = "all", keep_exact: str = "op") -> tuple[FunctionSource, ExportPlan, GraphModel]:
    source = opened(name)
    plan = make_plan(source, layers=layers, attributes={**tiny.SMALL}, keep_exact=keep_exact, seed=5)
    return source, plan, source.load(plan)


def feed(name: str, **sizes: int) -> dict[str, Tensor]:
    """The examples at SIZES; what is repeated from a shorter example is told apart."""
    found = opened(name).examples({**SIZES[name], **sizes})
    return {key: value + torch.randn_like(value) if value.is_floating_point() else value for key, value in found.items()}


def untouched(source: FunctionSource, given: dict[str, Tensor]) -> list[Tensor]:
    """The tensors that the user's module returns, without anything of ours."""
    module, values = source.definition.module, given
    with torch.no_grad():
        answer = module(**values) if source.definition.by_name else module(*values.values())
    if isinstance(answer, function_models.Decoded) or hasattr(answer, "parts"):
        return [answer.hidden, *answer.parts]
    return list(answer.values()) if isinstance(answer, dict) else [answer] if isinstance(answer, Tensor) else list(answer)


def defined(source: FunctionSource, plan: ExportPlan, given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The user's module run as it is, but for its planned attention calls, in calling order, by the operator's definition."""
    exact = torch.nn.functional.scaled_dot_product_attention
    layers = iter(plan.layers)

    def attend(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        config = next(layers).config
        return exact(q, k, v, *args, **options) if config is None else reference.attention(q, k, v, config).o

    # PyTorch's own layers would call their fused operator.
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    for module in (torch.nn.functional, function_models.F):
        monkeypatch.setattr(module, "scaled_dot_product_attention", attend)
    answer = untouched(source, given)
    monkeypatch.undo()
    assert next(layers, None) is None
    return answer


def close(found: Sequence[Any], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())
        np.testing.assert_allclose(np.asarray(one), other.numpy(), atol=tolerance * scale, rtol=0)


def differ(found: list[Tensor], expected: list[Tensor]) -> bool:
    return any(float((one - other).abs().max()) > 1e-2 * float(other.abs().max()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", SIZES)
def test_exact_is_the_users_module_and_plan_is_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, plan, model = loaded(name)
    given = feed(name)
    expected = untouched(source, given)
    with model.mode("exact"):
        exact = model.run(given)
        with model.capture() as calls:
            seen = model.run(given)
    approximate = model.run(given)
    assert tuple(exact) == tuple(seen) == tuple(approximate) == plan.outputs
    close(list(exact.values()), expected, 0)
    close(list(seen.values()), expected)
    assert [call.layer for call in calls] == [layer.index for layer in plan.planned]
    close(list(approximate.values()), defined(source, plan, given, monkeypatch))
    assert differ(list(approximate.values()), expected), "nothing was approximated, so nothing was tested"


def test_captured_calls_hold_what_the_attention_saw() -> None:
    _, plan, model = loaded("decoder")
    given = feed("decoder")
    with model.capture(frozenset({1})) as calls:
        model.run(given)
    (call,) = calls
    assert (call.layer, call.lengths) == (1, None) and call.config == plan.layers[1].config and not call.config.causal
    assert [tuple(t.shape) for t in (call.q, call.k, call.v, call.o)] == [(2, 4, 131, 6), (2, 1, 77, 6), (2, 1, 77, 6), (2, 4, 131, 6)]
    torch.testing.assert_close(call.o, reference.attention(call.q, call.k, call.v, call.config).o)
    used: list[Config] = []

    def watch(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        used.append(config)
        out = reference.attention(q, k, v, config, lengths)
        return out.o, out.lse

    with model.mode("plan", attention=watch):
        model.run(given)
    assert used == [layer.config for layer in plan.planned]


@pytest.mark.ort
@pytest.mark.parametrize(("name", "layers", "keep_exact"), [*((name, "all", "op") for name in SIZES), ("encoder", "odd", "onnx")])
def test_onnx_runtime_computes_the_plan_with_the_library_and_exact_attention_without(
    name: str, layers: str, keep_exact: str, tmp_path: Path
) -> None:
    _, plan, model = loaded(name, layers, keep_exact)
    export_onnx(model, plan, tmp_path, lambda text: None)
    import onnx

    proto = onnx.load(tmp_path / "model.onnx")
    nodes = [Config.from_attributes(attribute_values(node)) for node in hyper_nodes(proto)]
    assert nodes == [layer.config for layer in plan.planned]
    shapes = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in proto.graph.input}
    assert shapes == {entry.name: entry.shape for entry in plan.inputs}
    assert [value.name for value in proto.graph.output] == list(plan.outputs)
    free = {d.dim_param for v in proto.graph.output for d in v.type.tensor_type.shape.dim if d.dim_param}
    assert free <= set(plan.dims), "an output's dimension has a name that the plan does not know"
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(ort_library_path()))
    for given in (feed(name), feed(name, **{dim: 2 for dim in plan.dims}) | {}):
        for mode, session_options in (("plan", options), ("exact", None)):
            session = onnxruntime.InferenceSession(tmp_path / "model.onnx", session_options, providers=["CPUExecutionProvider"])
            answer = session.run(None, {key: value.numpy() for key, value in given.items()})
            with model.mode(mode):
                close(answer, list(model.run(given).values()), 1e-4)


def test_content_tells_of_weights_and_code_that_the_file_reads_from_elsewhere(tmp_path: Path) -> None:
    file, weight, scale = tmp_path / "own.py", tmp_path / "weight.pt", tmp_path / "scale.txt"
    file.write_text(
        "import torch\nfrom torch import nn\nfrom pathlib import Path\nHERE = Path(__file__).parent\n"
        "class Own(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.w = nn.Parameter(torch.load(HERE / 'weight.pt'))\n"
        "        self.scale = float((HERE / 'scale.txt').read_text())\n"
        "    def forward(self, q):\n        return nn.functional.scaled_dot_product_attention(q, q * self.w, q, scale=self.scale)\n"
        "def build():\n    return Own(), (torch.randn(2, 3, 5, 4),)\n"
    )
    seen = []
    for value, text in ((1.0, "0.5"), (1.0, "0.5"), (2.0, "0.5"), (2.0, "0.25")):
        torch.save(torch.full((4,), value), weight)
        scale.write_text(text)
        seen.append(open_source(f"{file}:build").content())
    assert seen[0] == seen[1] and set(seen[0]) == {"graph", "weights", "examples"}
    assert {part for part in seen[0] if seen[1][part] != seen[2][part]} == {"weights"}
    assert {part for part in seen[0] if seen[2][part] != seen[3][part]} == {"graph"}


def test_half_types_leave_integers_and_the_users_module_alone() -> None:
    source = opened("encoder")
    plan = make_plan(source, layers="all", attributes={**tiny.SMALL}, dtype="bf16")
    model = source.load(plan)
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in source.definition.module.parameters()} == {torch.float32}
    given = feed("encoder")
    with model.mode("exact"):
        (out,) = model.run(given).values()
    twin = copy.deepcopy(source.definition.module).bfloat16()
    with torch.no_grad():
        assert torch.equal(out, twin(given["ids"])) and out.dtype == torch.bfloat16
    (approximate,) = model.run(given).values()
    assert approximate.dtype == torch.bfloat16 and not torch.equal(approximate, out)


def test_a_module_that_changed_since_the_plan_is_refused() -> None:
    source = opened("decoder")
    plan = make_plan(opened("encoder"), layers="all", attributes={**tiny.SMALL})
    with pytest.raises(UnsupportedModel, match="are others than in the plan"):
        source.load(plan)


@pytest.mark.parametrize(
    ("line", "words"),
    [("self.calls.add_(1)", "its tensor 'calls'"), ("self.calls[0:1] = q.mean()", "its tensor 'calls'"), ("q.mul_(2)", "its input 'q'")],
)
def test_a_module_that_writes_to_its_tensors_is_refused(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "counts.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "class Counts(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.register_buffer('calls', torch.zeros(3))\n"
        f"    def forward(self, q):\n        {line}\n"
        "        k = q.clone().mul_(2)\n"
        "        return nn.functional.scaled_dot_product_attention(q, k, q) * self.calls.sum()\n"
        "def build():\n    return Counts(), (torch.randn(2, 3, 5, 4),)\n"
    )
    with pytest.raises(UnsupportedModel, match=f"writes to {words} while it runs"):
        open_source(f"{file}:build")
    file.write_text(file.read_text().replace(line, "pass"))
    assert open_source(f"{file}:build").layers[0].problem is None


_RANDOM = "nn.functional.dropout({}, 0.5, training=True)"


@pytest.mark.parametrize(
    ("answer", "outputs"),
    [
        (f"x, {_RANDOM.format('x')}", "output_1"),
        ("{'a': x, 'b': x + torch.rand(7), 'c': torch.rand_like(x)}", "b, c"),
        ("nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)", "output_0"),
        ("torch.where(torch.rand_like(x) < 0.5, x, torch.nan)", "output_0"),
    ],
    ids=["dropout", "rand", "attention-dropout", "nan-here-and-there"],
)
def test_a_module_that_answers_differently_each_time_is_refused(answer: str, outputs: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"answers the same inputs differently twice \(output {outputs}\); make it deterministic"):
        open_source(attending(tmp_path, answer))


@pytest.mark.parametrize(
    "answer",
    [
        "nn.functional.dropout(x, 0.5, training=self.training)",
        "torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.0)",
        f"{_RANDOM.format('x')} * 0, x / 0 * 0 + {_RANDOM.format('x')}",  # 0 and NaN, whatever was dropped
        f"x.argmax(-1), x > 0, {_RANDOM.format('x')}.shape[0] * x",
    ],
    ids=["dropout-off", "attention-without-dropout", "zero-and-nan", "drawn-for-its-shape"],
)
def test_a_module_that_answers_the_same_each_time_is_taken(answer: str, tmp_path: Path) -> None:
    assert open_source(attending(tmp_path, answer)).layers[0].problem is None


def attending(folder: Path, answer: str) -> str:
    """FILE.py:build of a module that returns `answer`, an expression of x, which is attention of its input."""
    file = folder / "attends.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "class Attends(nn.Module):\n"
        "    def forward(self, q):\n        x = nn.functional.scaled_dot_product_attention(q, q, q)\n"
        f"        return {answer}\n"
        "def build():\n    return Attends(), (torch.randn(2, 3, 5, 7),)\n"
    )
    return f"{file}:build"


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs export-model in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as status:
            code = int(status.code or 0)
        said, errors = capfd.readouterr()
        return code, said, errors

    return run


@pytest.mark.ort
def test_the_example_becomes_an_output_folder(command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ["--exact-below", 64, "--block-size", 16, "--num-blocks", 4, "--sample-size", 64]
    example = ROOT / "examples/vision_tower.py"
    code, said, errors = command(f"{example}:small", out, "--layers", "all", "--batch", "1,2,4", *small)
    assert code == 0, errors
    report = json.loads((out / "report/report.json").read_text())
    assert report["inputs"]["kind"] == "examples" and report["verdict"]["safe"]
    # A mean over all rows averages the noise of one ulp away, and not the rounding of its own sums.
    assert {row["output"] for row in report["implementation"]["whole_model"]} == {"patches", "pooled"}
    assert said.count("is code: it is run now") == 1
    bundle = Bundle.open(out)
    assert (bundle.plan.dims, bundle.plan.seq, bundle.plan.outputs) == ({"batch": (1, 2, 4)}, (144, 144, 144), ("patches", "pooled"))
    assert str(tmp_path) not in (out / "manifest.json").read_text() and str(ROOT) not in (out / "manifest.json").read_text()
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(out / "libhyperattention_ort.so"))
    session = onnxruntime.InferenceSession(out / "model.onnx", options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(3, 3, 132, 132)).astype(np.float32)
    patches, pooled = map(np.asarray, session.run(None, {"images": images}))
    assert patches.shape == (3, 144, 48) and pooled.shape == (3, 48)
    np.testing.assert_allclose(patches.mean(1), pooled, atol=1e-5)


def test_failing_code_ends_in_exit_code_2_by_its_own_line_and_without_a_traceback(command, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("print('a word of the user')\n\ndef build():\n    return open('no/such/weights.pt')\n")
    code, said, errors = command(f"{file}:build", tmp_path / "out", "--json")
    assert code == 2 and "Traceback" not in errors
    assert "broken.py, line 4, in build: FileNotFoundError" in errors
    assert json.loads(said)["exit_code"] == 2
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["broken.py"]
