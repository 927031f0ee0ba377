"""The node in files that other tools have been over: same attributes, same output; tools that inline functions are found out.

`model.onnx` carries the node's exact body as a function. A tool that inlines functions leaves a right-looking, exact and slow
file: `check_graph`, which every validation begins with, refuses it. docs/onnx_tools.md says which tool does what.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from ort_models import has_cuda_kernels, options, session

from hyperattention.errors import EnvironmentFault
from hyperattention.export.load import inspect_source, load_model
from hyperattention.export.onnx_graph import MODEL, TWIN, export_onnx, hyper_nodes
from hyperattention.export.onnx_schema import attribute_values
from hyperattention.export.patch import install
from hyperattention.export.plan import ExportPlan, make_plan
from hyperattention.validate.provenance import check_graph

pytestmark = pytest.mark.ort
ort = pytest.importorskip("onnxruntime")
FEED = {"input_ids": tiny.token_ids(2, 150).numpy(), "lengths": np.array([150, 131], np.int32)}


@dataclass(frozen=True)
class Exported:
    """The exported files, the plan and what our library makes of model.onnx, logits float32 [2, 150, vocabulary]."""

    folder: Path
    plan: ExportPlan
    logits: np.ndarray


def run(model: onnx.ModelProto) -> np.ndarray:
    (logits,) = session(model.SerializeToString()).run(None, FEED)
    return logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    source = inspect_source(tiny.save(tmp_path_factory.mktemp("model")))
    plan = make_plan(source, layers="0", attributes={**tiny.SMALL}, dtype="fp32", seq=(1, 150, 512))
    export_onnx(install(load_model(source, torch.float32), plan), plan, folder, lambda text: None)
    return Exported(folder, plan, run(onnx.load(folder / MODEL)))


def attributes(model: onnx.ModelProto) -> list[dict]:
    return [attribute_values(node) for node in hyper_nodes(model)]


def assert_survived(exported: Exported, model: onnx.ModelProto, tmp_path: Path) -> None:
    """As many nodes with the same attributes; `tmp_path` takes the file that is checked against the plan."""
    assert attributes(model) == attributes(onnx.load(exported.folder / MODEL))
    onnx.save(model, tmp_path / "after.onnx")
    assert len(check_graph(tmp_path / "after.onnx", exported.plan)) == 2


# --- ONNX Runtime's own optimiser ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_graph_optimisation(level: str, exported: Exported, tmp_path: Path) -> None:
    wanted = options()
    wanted.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    wanted.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    first = ort.InferenceSession(str(exported.folder / MODEL), wanted, providers=["CPUExecutionProvider"]).run(None, FEED)[0]
    optimised = onnx.load(tmp_path / "optimised.onnx")
    assert_survived(exported, optimised, tmp_path)
    for logits in (first, run(optimised)):
        np.testing.assert_allclose(logits, exported.logits, rtol=0, atol=1e-5)


def test_optimised_without_our_library_is_found_out(exported: Exported, tmp_path: Path) -> None:
    plain = ort.SessionOptions()
    plain.log_severity_level, plain.optimized_model_filepath = 4, str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(exported.folder / MODEL), plain, providers=["CPUExecutionProvider"])
    with pytest.raises(EnvironmentFault, match="holds 0 HyperAttention nodes"):
        check_graph(tmp_path / "optimised.onnx", exported.plan)


# --- other tools -----------------------------------------------------------------------------------------------------


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def convert_version(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drops the function and keeps the node."""
    from onnx import version_converter

    return version_converter.convert_version(model, 21)


def onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxsim

    simplified, same = onnxsim.simplify(model)
    assert same
    return simplified


def onnxslim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    slimmed = onnxslim.slim(model)
    assert isinstance(slimmed, onnx.ModelProto)
    return slimmed


def onnxscript_without_inlining(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxscript import optimizer

    return optimizer.optimize(model, inline=False)


def transformers_fusion(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    return optimizer.optimize_by_fusion(model, "gpt2", num_heads=4, hidden_size=32, optimization_options=FusionOptions("gpt2")).model


KEEPING = [infer_shapes, convert_version, onnxsim, onnxslim, onnxscript_without_inlining, transformers_fusion]
Tool = Callable[[onnx.ModelProto], onnx.ModelProto]


@pytest.mark.parametrize("tool", KEEPING, ids=lambda tool: tool.__name__)
def test_tool_keeps_the_node(tool: Tool, exported: Exported, tmp_path: Path) -> None:
    after = tool(onnx.load(exported.folder / MODEL))
    assert_survived(exported, after, tmp_path)
    np.testing.assert_allclose(run(after), exported.logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:SelectableGroups:DeprecationWarning")
@pytest.mark.parametrize("name", [MODEL, TWIN])
def test_polygraphy_sanitize_keeps_the_node(name: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polygraphy.tools import main

    out = tmp_path / "sanitised.onnx"
    command = ["polygraphy", "surgeon", "sanitize", str(exported.folder / name), "--fold-constants", "-o", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    after = onnx.load(out)
    assert_survived(exported, after, tmp_path)
    np.testing.assert_array_equal(run(after), exported.logits)


def test_float16_conversion_keeps_the_node(exported: Exported, tmp_path: Path) -> None:
    """The node goes to float16 with the rest. Rounding moves a choice here and there, so that only most logits agree."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    after = convert_float_to_float16(onnx.load(exported.folder / MODEL), keep_io_types=True)
    assert_survived(exported, after, tmp_path)
    if not has_cuda_kernels():
        pytest.skip("the library was built without CUDA kernels: it takes float32 alone")
    assert np.median(np.abs(run(after) - exported.logits)) < 0.01 * np.median(np.abs(exported.logits))


def inliner(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnx import inliner

    return inliner.inline_local_functions(model)


def onnxscript_optimizer(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxscript import optimizer

    return optimizer.optimize(model)


@pytest.mark.parametrize("tool", [inliner, onnxscript_optimizer], ids=lambda tool: tool.__name__)
def test_inlined_body_is_found_out_and_the_twin_has_none(tool: Tool, exported: Exported, tmp_path: Path) -> None:
    onnx.save(tool(onnx.load(exported.folder / MODEL)), tmp_path / "inlined.onnx")
    with pytest.raises(EnvironmentFault, match="holds 0 HyperAttention nodes"):
        check_graph(tmp_path / "inlined.onnx", exported.plan)
    after = tool(onnx.load(exported.folder / TWIN))
    assert_survived(exported, after, tmp_path)
    np.testing.assert_allclose(run(after), exported.logits, rtol=0, atol=1e-5)
