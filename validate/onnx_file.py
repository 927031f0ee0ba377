"""Reading an ONNX file that may be anything: what is in its graph, for `inspect`, and errors that say what is wrong with it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperattention.config import DOMAIN, OP_TYPE, shared
from hyperattention.errors import UsageError
from hyperattention.export.onnx_graph import hyper_nodes

if TYPE_CHECKING:
    from onnx import AttributeProto, ModelProto, ValueInfoProto


def read_onnx(path: Path) -> "ModelProto":
    """The file without its external weights. Raises UsageError where it is missing, unreadable, truncated or no ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise UsageError(f"the folder holds no {path.name}; run export-model again") from error
    except OSError as error:
        raise UsageError(f"{path.name} cannot be read: {error.strerror}; give an ONNX file") from error
    except DecodeError as error:
        raise UsageError(f"{path.name} is truncated or no ONNX file ({error}); run export-model again") from error
    if not proto.graph.node:
        raise UsageError(f"{path.name} holds no graph, so it is no ONNX file of use; run export-model again")
    return proto


def describe_onnx(path: Path) -> dict[str, Any]:
    """What is in the graph, as JSON values: inputs, outputs, opsets, parameters, operators, our nodes with their attributes.

    `weight_bytes` counts the initializers wherever they are stored. Raises UsageError as `read_onnx` does.
    """
    import onnx

    proto = read_onnx(path)
    graph = proto.graph
    sizes = [(math.prod(tensor.dims), tensor.data_type) for tensor in graph.initializer]
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "ir_version": proto.ir_version,
        "producer": " ".join(part for part in (proto.producer_name, proto.producer_version) if part),
        "inputs": [_value(entry) for entry in graph.input],
        "outputs": [_value(entry) for entry in graph.output],
        "parameters": sum(count for count, _ in sizes),
        "weight_bytes": sum(count * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize for count, kind in sizes),
        "external_data": sorted({e.value for t in graph.initializer for e in t.external_data if e.key == "location"}),
        "operators": dict(Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.node).most_common()),
        "function_body": any(function.name == OP_TYPE and function.domain == DOMAIN for function in proto.functions),
        "nodes": [
            {
                "name": node.name,
                "inputs": list(node.input),
                "outputs": [name for name in node.output if name],
                "attributes": {attribute.name: _attribute_value(attribute) for attribute in node.attribute},
            }
            for node in hyper_nodes(proto)
        ],
    }


def _attribute_value(attribute: "AttributeProto") -> Any:
    """An attribute's value, text as str."""
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def graph_lines(found: dict[str, Any]) -> list[str]:
    """What `describe_onnx` found, for people."""
    opset = ", ".join(f"{domain} {version}" for domain, version in found["opset"].items())
    produced = f", by {found['producer']}" if found["producer"] else ""
    body = "with" if found["function_body"] else "without"
    text = [
        f"{found['file']}: {found['bytes']:,} bytes, {found['parameters']:,} parameters ({found['weight_bytes']:,} bytes of weights"
        f"{', in ' + ', '.join(found['external_data']) if found['external_data'] else ''})",
        f"  opsets {opset}; IR version {found['ir_version']}{produced}",
        *(f"  input   {_dims(entry)}" for entry in found["inputs"]),
        *(f"  output  {_dims(entry)}" for entry in found["outputs"]),
        f"  {sum(found['operators'].values()):,} nodes, {len(found['nodes'])} of them {DOMAIN}::{OP_TYPE}, {body} the exact function body",
    ]
    alike = shared([node["attributes"] for node in found["nodes"]])
    if alike:
        text.append(f"  all of ours: {_pairs(alike)}")
    for node in found["nodes"]:
        own = {name: value for name, value in node["attributes"].items() if name not in alike}
        text.append(f"    {node['name']}" + (f": {_pairs(own)}" if own else ""))
    return text


def _pairs(attributes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in attributes.items())


def _dims(entry: dict[str, Any]) -> str:
    return f"{entry['name']}: {entry['dtype']} [{', '.join(map(str, entry['dims']))}]"


def _value(entry: "ValueInfoProto") -> dict[str, Any]:
    import onnx

    tensor = entry.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    return {"name": entry.name, "dtype": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), "dims": dims}
