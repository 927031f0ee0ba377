"""Convolutions and pooling of a bfloat16 graph: float32 inside casts, the same values, and nothing else touched."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from hyperattention.export.onnx_body import OPSET
from hyperattention.export.onnx_widen import widen

_GENERATOR = torch.Generator().manual_seed(2)
WEIGHT, BIAS = (torch.randn(*shape, generator=_GENERATOR).bfloat16() for shape in ((3, 2, 3, 3), (3,)))


def model(kind: int) -> ModelProto:
    """Conv, Relu and MaxPool; Relu knows bfloat16, the others do not."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("MaxPool", ["r"], ["y"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
    ]
    weights = [helper.make_tensor(name, kind, tuple(t.shape), t.float().flatten().tolist()) for name, t in (("w", WEIGHT), ("b", BIAS))]
    inner = [helper.make_tensor_value_info("c", kind, [1, 3, 7, 5]), helper.make_tensor_value_info("r", kind, [1, 3, 7, 5])]
    ends = [helper.make_tensor_value_info("x", kind, [1, 2, 7, 5]), helper.make_tensor_value_info("y", kind, [1, 3, 3, 2])]
    graph = helper.make_graph(nodes, "pooled", ends[:1], ends[1:], weights, value_info=inner)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


def test_bfloat16_is_widened_where_onnx_has_none() -> None:
    made = model(TensorProto.BFLOAT16)
    with pytest.raises(onnx.shape_inference.InferenceError, match="bfloat16"):
        onnx.checker.check_model(made, full_check=True)
    widen(made)
    onnx.checker.check_model(made, full_check=True)
    kinds = [node.op_type for node in made.graph.node]
    assert kinds == ["Cast"] * 3 + ["Conv", "Cast", "Relu", "Cast", "MaxPool", "Cast"]
    x = torch.randn(1, 2, 7, 5, generator=_GENERATOR).bfloat16()
    bits = x.view(torch.int16).numpy().view(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    (found,) = ReferenceEvaluator(made).run(None, {"x": bits})
    wanted = torch.nn.functional.conv2d(x.float(), WEIGHT.float(), BIAS.float(), padding=1).bfloat16().relu()
    wanted = torch.nn.functional.max_pool2d(wanted.float(), 2, 2)
    np.testing.assert_allclose(np.asarray(found).astype(np.float32), wanted.numpy(), rtol=1e-2)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16], ids=["float32", "float16"])
def test_other_types_are_left_alone(kind: int) -> None:
    made = model(kind)
    before = made.SerializeToString()
    widen(made)
    assert made.SerializeToString() == before
