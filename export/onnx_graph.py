"""A patched model as ONNX: one HyperAttention node a layer, dynamic batch and sequence, checked, and without host paths.

`model.onnx` carries the op's function body and runs anywhere; `model.trt.onnx` is its twin without the body, whose nodes
name TensorRT's plugin. Above `external_threshold` bytes both share the weights in `model.onnx.data`.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any, Callable

import onnx
import torch
from onnx import ModelProto, helper, shape_inference
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyperattention.config import DOMAIN, OP_TYPE
from hyperattention.errors import ExportFailed
from hyperattention.export.onnx_body import OPSET, attention_function
from hyperattention.export.onnx_schema import register_schema, translation_table
from hyperattention.export.patch import Patched
from hyperattention.export.plan import ExportPlan

MODEL, DATA, TWIN = "model.onnx", "model.onnx.data", "model.trt.onnx"
# protobuf cannot hold 2 GB; the rest of the graph needs some of it.
EXTERNAL_THRESHOLD = 2**31 - 2**26
INPUT_NAMES = ("input_ids", "lengths")
Progress = Callable[[str], None]

# Distinct and above 1: torch.export fixes a dimension whose example is 0 or 1, and merges equal ones.
_EXAMPLE_BATCH, _EXAMPLE_SEQUENCE = 2, 130


class TaskModule(nn.Module):
    """What the ONNX file computes: (input_ids int64 [B, S], lengths int32 [B]) to the task's outputs, in `output_names` order."""

    def __init__(self, patched: Patched, task: str) -> None:
        super().__init__()
        self.patched, self.task, self.model = patched, task, patched.model

    @property
    def output_names(self) -> list[str]:
        """logits, and for the task prefill present.{i}.key and present.{i}.value of each cache layer."""
        if self.task != "prefill":
            return ["logits"]
        layers = len(self.patched.plan.layers)
        return ["logits", *(f"present.{i}.{part}" for i in range(layers) for part in ("key", "value"))]

    def forward(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """logits [B, S or 1, vocab]; present [B, heads_kv, S, head_dim]."""
        if self.task == "logits":
            return (self.patched.forward(input_ids, lengths).logits,)
        with _last_row_only(self.model, lengths):
            out = self.patched.forward(input_ids, lengths, use_cache=self.task == "prefill")
        if self.task == "last-logits":
            return (out.logits,)
        cache = [tensor for layer in out.past_key_values.layers if layer.keys is not None for tensor in (layer.keys, layer.values)]
        if len(cache) + 1 != len(self.output_names):
            layers = len(self.patched.plan.layers)
            raise ExportFailed(f"the cache has {len(cache) // 2} layers, the model {layers} attention layers; use --task last-logits")
        return (out.logits, *cache)


class _last_row_only:
    """Inside, the output embedding sees each row's last valid position alone: [B, S, H] becomes [B, 1, H]."""

    def __init__(self, model: PreTrainedModel, lengths: Tensor) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise ExportFailed(f"{type(model).__name__} has no output embedding; use --task logits")
        self.head, self.index = head, (lengths.long() - 1).clamp(min=0)

    def __enter__(self) -> None:
        def keep_last(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0]
            index = self.index[:, None, None].expand(-1, 1, hidden.shape[-1])
            return (hidden.gather(1, index), *args[1:])

        self.handle = self.head.register_forward_pre_hook(keep_last)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def export_onnx(
    patched: Patched, plan: ExportPlan, folder: Path, progress: Progress, external_threshold: int = EXTERNAL_THRESHOLD
) -> None:
    """Writes model.onnx (and model.onnx.data above the threshold) and model.trt.onnx into `folder`.

    Raises ExportFailed when torch cannot trace the model, a layer's node is not there, or a checker refuses the result.
    """
    progress("tracing the model")
    proto = _trace(TaskModule(patched, plan.task))
    progress("writing and checking model.onnx")
    _clean(proto)
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


def _trace(module: TaskModule) -> ModelProto:
    device = next(module.model.parameters()).device
    ids = torch.zeros(_EXAMPLE_BATCH, _EXAMPLE_SEQUENCE, dtype=torch.int64, device=device)
    lengths = torch.full((_EXAMPLE_BATCH,), _EXAMPLE_SEQUENCE, dtype=torch.int32, device=device)
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                (ids, lengths),
                dynamo=True,
                input_names=list(INPUT_NAMES),
                output_names=module.output_names,
                dynamic_shapes=({0: "batch", 1: "sequence"}, {0: "batch"}),
                custom_translation_table=translation_table(),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        name = type(module.model).__name__
        raise ExportFailed(f"torch cannot export {name}: {_cause(error)}") from error
    assert program is not None
    return program.model_proto


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:400]


class _quiet:
    """Loggers by name at ERROR."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)


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
