"""HyperAttention's schema for onnx, with type and shape inference, and its translation from the torch op."""

from __future__ import annotations

from typing import Any, cast

import onnx
import torch
from onnx import TensorProto, TypeProto, defs, helper

from hyperattention import op as _op  # registers torch.ops.hyperattention.attention
from hyperattention.config import DOMAIN, OP_TYPE, VERSION, Config


def register_schema() -> None:
    """Makes onnx's checker and shape inference know the op. Safe to call again: onnx refuses a second registration itself."""
    if defs.has(OP_TYPE, domain=DOMAIN):
        return
    parameter = defs.OpSchema.FormalParameter
    single, optional = defs.OpSchema.FormalParameterOption.Single, defs.OpSchema.FormalParameterOption.Optional
    schema = defs.OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        doc="HyperAttention (arXiv 2310.05869) as fixed by docs/operator.md: causal attention aligned bottom-right.",
        inputs=[
            parameter("Q", "T", description="[batch, heads_q, rows, head_dim]"),
            parameter("K", "T", description="[batch, heads_kv, keys, head_dim]"),
            parameter("V", "T", description="[batch, heads_kv, keys, head_dim_v]"),
            parameter("lengths", "L", description="[batch] valid keys of each row; all when absent", param_option=optional),
        ],
        outputs=[
            parameter("O", "T", description="[batch, heads_q, rows, head_dim_v]", param_option=single),
            parameter("LSE", "F", description="[batch, heads_q, rows] natural log of the sum", param_option=optional),
        ],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Queries, keys, values and output."),
            ("L", ["tensor(int32)"], "Lengths."),
            ("F", ["tensor(float)"], "Log of the sum."),
        ],
        attributes=[
            *(
                defs.OpSchema.Attribute(name, helper.make_attribute(name, value), description="see docs/operator.md")
                for name, value in Config().attributes().items()
            ),
            *(
                defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.STRING, description="TensorRT's plugin lookup", required=False)
                for name in ("plugin_version", "plugin_namespace")
            ),
        ],
    )
    schema.set_type_and_shape_inference_function(_infer)
    defs.register_schema(schema)


def _infer(context: Any) -> None:
    q, v = context.get_input_type(0), context.get_input_type(2)
    o, lse = TypeProto(), TypeProto()
    o.tensor_type.elem_type = q.tensor_type.elem_type
    lse.tensor_type.elem_type = TensorProto.FLOAT
    if q.tensor_type.HasField("shape") and len(q.tensor_type.shape.dim) == 4:
        rows = list(q.tensor_type.shape.dim)[:3]
        lse.tensor_type.shape.dim.extend(rows)
        o.tensor_type.shape.dim.extend(rows)
        last = o.tensor_type.shape.dim.add()
        if v.tensor_type.HasField("shape") and len(v.tensor_type.shape.dim) == 4:
            last.CopyFrom(v.tensor_type.shape.dim[3])
    context.set_output_type(0, o)
    if context.get_num_outputs() > 1:
        context.set_output_type(1, lse)


def translation_table() -> dict[Any, Any]:
    """For torch.onnx.export: the torch op becomes one node, whose lengths are always there: the body of the function needs them."""
    from onnxscript import opset18, values

    register_schema()
    onnx18 = cast(Any, opset18)  # its annotations tell apart types that a traced value has only when it runs
    opset = values.Opset(DOMAIN, VERSION)
    names = tuple(Config().attributes())

    def translate(q: Any, k: Any, v: Any, lengths: Any = None, *values_: Any, **named: Any) -> Any:
        given = {**dict(zip(names, values_, strict=False)), **named}
        if lengths is None:
            keys = onnx18.Cast(onnx18.Shape(k, start=2, end=3), to=TensorProto.INT32)
            lengths = onnx18.Expand(keys, onnx18.Shape(k, start=0, end=1))
        return opset.HyperAttention(q, k, v, lengths, **given)

    assert _op is not None
    return {torch.ops.hyperattention.attention.default: translate}


def attribute_values(node: onnx.NodeProto) -> dict[str, int | float | str]:
    """Attributes of a HyperAttention node as Config takes them; plugin_* are left out."""
    names = Config().attributes()
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in names}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
