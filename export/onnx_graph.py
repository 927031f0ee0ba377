"""A replaced model as ONNX: one HyperAttention node a layer, the plan's named dimensions, checked, and without host paths.

`model.onnx` carries the op's function body and runs anywhere; `model.trt.onnx` is its twin without the body, whose nodes
name TensorRT's plugin. Above `external_threshold` bytes both share the weights in `model.onnx.data`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Callable

import onnx
from onnx import ModelProto, helper, shape_inference

from hyperattention.config import DOMAIN, OP_TYPE
from hyperattention.errors import ExportFailed
from hyperattention.export.files import DATA, MODEL, TWIN
from hyperattention.export.onnx_body import attention_function
from hyperattention.export.onnx_schema import register_schema
from hyperattention.export.onnx_widen import widen
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import ReplacedModel

# protobuf cannot hold 2 GB; the rest of the graph needs some of it.
EXTERNAL_THRESHOLD = 2**31 - 2**26
Progress = Callable[[str], None]


def export_onnx(
    replaced: ReplacedModel, plan: ExportPlan, folder: Path, progress: Progress, external_threshold: int = EXTERNAL_THRESHOLD
) -> None:
    """Writes model.onnx (and model.onnx.data above the threshold) and model.trt.onnx into `folder`.

    Raises ExportFailed when torch cannot trace the model, a layer's node is not there, or a checker refuses the result.
    """
    progress("tracing the model")
    proto = replaced.trace()
    progress("writing and checking model.onnx")
    _clean(proto)
    widen(proto)
    _share_transposed(proto)
    nodes = hyper_nodes(proto)
    if len(nodes) != len(plan.planned):
        raise ExportFailed(f"the graph has {len(nodes)} HyperAttention nodes, the plan {len(plan.planned)}; please report the model")
    _save(proto, folder / MODEL, external_threshold)
    proto = onnx.load(folder / MODEL, load_external_data=False)
    twin = copy.deepcopy(proto)
    if nodes:
        proto.functions.append(attention_function())
        onnx.save(proto, folder / MODEL)
    progress("writing and checking model.trt.onnx")
    for node in hyper_nodes(twin):
        node.attribute.extend([helper.make_attribute("plugin_version", "1"), helper.make_attribute("plugin_namespace", DOMAIN)])
        while node.output and not node.output[-1]:
            node.output.pop()
    onnx.save(twin, folder / TWIN)
    for name in (MODEL, TWIN):
        check(folder / name)


def hyper_nodes(proto: ModelProto) -> list[onnx.NodeProto]:
    """The HyperAttention nodes of the main graph."""
    return [node for node in proto.graph.node if node.op_type == OP_TYPE and node.domain == DOMAIN]


def check(path: Path) -> None:
    """onnx.checker with full_check, then strict shape inference. Raises ExportFailed with the checker's words."""
    register_schema()
    inferred = path.with_suffix(".inferred")
    try:
        onnx.checker.check_model(str(path), full_check=True)
        shape_inference.infer_shapes_path(str(path), str(inferred), strict_mode=True, check_type=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError, RuntimeError) as error:
        raise ExportFailed(f"{path.name} does not pass onnx's checker: {error}") from error
    finally:
        inferred.unlink(missing_ok=True)


def _clean(proto: ModelProto) -> None:
    """Removes what the exporter noted for itself (stack traces with host paths), and unused outputs of our nodes."""
    graph = proto.graph
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for node in hyper_nodes(proto):
        if len(node.output) > 1 and node.output[1] not in used:
            unused = node.output[1]
            # The name stays as an empty string: onnx's inference wants as many outputs as the function has.
            node.output[1] = ""
            for info in [info for info in graph.value_info if info.name == unused]:
                graph.value_info.remove(info)
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)  # the exporter's order changes from run to run
        del node.attribute[:]
        node.attribute.extend(attributes)
    parts: list[Any] = [proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer, *proto.functions]
    for part in parts:
        del part.metadata_props[:]
        part.doc_string = ""


def _share_transposed(proto: ModelProto) -> None:
    """A weight that is stored as it is and transposed (tied embeddings, after the exporter's folding) is stored once."""
    graph = proto.graph
    by_shape: dict[tuple[int, ...], list[onnx.TensorProto]] = {}
    for tensor in [t for t in graph.initializer if len(t.dims) == 2 and min(t.dims) > 1]:
        array = onnx.numpy_helper.to_array(tensor).T
        for kept in by_shape.get(tuple(tensor.dims)[::-1], []):
            other = onnx.numpy_helper.to_array(kept)
            if (array[0] == other[0]).all() and (array == other).all():
                graph.initializer.remove(tensor)
                node = helper.make_node("Transpose", [kept.name], [tensor.name], name=f"transposed_{kept.name}", perm=[1, 0])
                graph.node.insert(0, node)
                break
        else:
            by_shape.setdefault(tuple(tensor.dims), []).append(tensor)


def _save(proto: ModelProto, path: Path, external_threshold: int) -> None:
    if sum(tensor.ByteSize() for tensor in proto.graph.initializer) > external_threshold:
        onnx.save_model(proto, path, save_as_external_data=True, all_tensors_to_one_file=True, location=DATA, size_threshold=1024)
    else:
        onnx.save_model(proto, path)
