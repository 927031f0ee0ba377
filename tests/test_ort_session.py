"""Sessions fed by pointer: any dtype, shapes by the names of dimensions, refusals, and no quiet fall-back to the processor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import onnxruntime as ort
import pytest
import torch
from native import assert_equal_bits
from onnx import TensorProto, helper
from operator_cases import Case, config
from ort_models import CPU, CUDA, ONNX_TYPES, one_node, session

from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export.bundle import Bundle
from hyperattention.library import ort_library_path
from hyperattention.validate.backends import choose
from hyperattention.validate.ort_session import open_session, run_bound, session_options

pytestmark = pytest.mark.ort
PROCESSOR = torch.device("cpu")


def cast_model(source: int, target: int, out_shape: list) -> bytes:
    """x [rows, 3] to y by a Cast."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=target)],
        "cast",
        [helper.make_tensor_value_info("x", source, ["rows", 3])],
        [helper.make_tensor_value_info("y", target, out_shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def test_answers_are_those_of_a_plain_run() -> None:
    case = Case("bound", 203, 203, config(), lengths=(203, 150))
    q, k, v = (x.float() for x in case.inputs())
    lengths = case.lengths_tensor()
    assert lengths is not None
    made = session(one_node(case.config.attributes()))
    wanted = made.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "lengths": lengths.int().numpy()})
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    declared = session(one_node(case.config.attributes(), lse=False))
    outputs, seconds = run_bound(declared, {"q": q, "k": strided, "v": v, "lengths": lengths.long()}, PROCESSOR)
    assert list(outputs) == ["o"] and seconds > 0
    assert_equal_bits(outputs["o"], torch.from_numpy(wanted[0]), "o")


@pytest.mark.parametrize("dtype", ONNX_TYPES, ids=str)
def test_every_dtype_goes_in_and_comes_out(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3)
    out = session(cast_model(TensorProto.FLOAT, ONNX_TYPES[dtype], ["rows", 3]))
    assert_equal_bits(run_bound(out, {"x": x}, PROCESSOR)[0]["y"], x.to(dtype), "out")
    back = session(cast_model(ONNX_TYPES[dtype], TensorProto.FLOAT, ["rows", 3]))
    assert_equal_bits(run_bound(back, {"x": x.to(dtype)}, PROCESSOR)[0]["y"], x.to(dtype).float(), "in")


@pytest.mark.parametrize("dtype", ONNX_TYPES, ids=str)
def test_an_output_whose_sizes_only_a_run_tells(dtype: torch.dtype) -> None:
    made = session(cast_model(TensorProto.FLOAT, ONNX_TYPES[dtype], ["other", 3]))
    for rows in (5, 1, 0):
        x = torch.randn(rows, 3)
        assert_equal_bits(run_bound(made, {"x": x}, PROCESSOR)[0]["y"], x.to(dtype), str(rows))


def test_what_is_not_carried_is_refused() -> None:
    with pytest.raises(EnvironmentFault, match=r"y is a tensor\(double\), which this runner does not carry"):
        run_bound(session(cast_model(TensorProto.FLOAT, TensorProto.DOUBLE, ["rows", 3])), {"x": torch.ones(5, 3)}, PROCESSOR)


def test_no_library_no_model(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="none.so is not in the output folder"):
        session_options(tmp_path / "none.so", tmp_path)
    with pytest.raises(EnvironmentFault, match="cannot open bad.onnx"):
        open_session(b"no model", session_options(ort_library_path(), tmp_path), PROCESSOR, "bad.onnx")


@pytest.mark.parametrize("available", [[CPU], [CUDA, CPU]], ids=["not-built-in", "does-not-load"])
def test_no_cuda_provider_is_no_session(available: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ONNX Runtime would run on the processor and say so in its log."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    real = ort.InferenceSession
    monkeypatch.setattr(ort, "InferenceSession", lambda model, options, providers: real(model, options, providers=[CPU]))
    with pytest.raises(EnvironmentFault, match="has no CUDAExecutionProvider|could not load its CUDAExecutionProvider"):
        open_session(one_node({}), session_options(ort_library_path(), tmp_path), torch.device("cuda"), "model.onnx")


def test_devices_and_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    without, with_engine = (cast(Bundle, SimpleNamespace(engine=engine)) for engine in (None, Path("model.engine")))
    cuda = torch.device("cuda")
    assert choose(without, "auto", "auto") == (PROCESSOR, "ort") and choose(without, "cuda", "auto") == (cuda, "ort")
    assert choose(with_engine, "auto", "auto") == (cuda, "tensorrt") and choose(with_engine, "cuda", "ort") == (cuda, "ort")
    assert choose(with_engine, "cpu", "auto") == (PROCESSOR, "ort")
    with pytest.raises(UsageError, match="--device cpu with the backend tensorrt"):
        choose(with_engine, "cpu", "tensorrt")
