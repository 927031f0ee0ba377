"""Operators that ONNX defines without bfloat16 (convolutions, pooling) compute in float32 inside a bfloat16 graph."""

from __future__ import annotations

from typing import MutableSequence

import onnx
from onnx import ModelProto, NodeProto, TensorProto, defs, helper

_BF16 = "tensor(bfloat16)"


def widen(proto: ModelProto) -> None:
    """Puts casts around each node whose operator, at the graph's opset, does not take or give bfloat16 where the graph does."""
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    graph = proto.graph
    narrow = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    values = (*graph.input, *graph.value_info, *graph.output)
    narrow |= {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    nodes: list[NodeProto] = []
    for node in graph.node:
        inputs, outputs = ([name for name in _refused(node, opset, given) if name in narrow] for given in (True, False))
        for name in dict.fromkeys(inputs):
            nodes.append(_cast(name, _wide(node, name), TensorProto.FLOAT))
        nodes.append(node)
        nodes += [_cast(_wide(node, name), name, TensorProto.BFLOAT16) for name in outputs]
        _rename(node.input, node, inputs)
        _rename(node.output, node, outputs)
    del graph.node[:]
    graph.node.extend(nodes)


def _refused(node: NodeProto, opset: int, given: bool) -> list[str]:
    """Names of the node's inputs (or outputs) whose place in the operator's schema takes no bfloat16."""
    if node.domain:
        return []
    try:
        schema = defs.get_schema(node.op_type, opset)
    except defs.SchemaError:
        return []
    places = schema.inputs if given else schema.outputs
    names = node.input if given else node.output
    # The last place of a variadic operator stands for all that follow.
    return [name for i, name in enumerate(names) if name and _BF16 not in places[min(i, len(places) - 1)].types]


def _wide(node: NodeProto, name: str) -> str:
    return f"{name}_of_{node.name}_float32"


def _rename(names: MutableSequence[str], node: NodeProto, wide: list[str]) -> None:
    for i, name in enumerate(names):
        if name in wide:
            names[i] = _wide(node, name)


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_to_{target}", to=to)
