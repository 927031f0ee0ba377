"""torch's ONNX exporter behind one function: a module and example inputs to a raw graph with the plan's names."""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import contextmanager
from typing import Any, Iterator, Sequence

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.export import ExportedProgram

from hyperattention.errors import ExportFailed, one_line
from hyperattention.export.onnx_body import OPSET
from hyperattention.export.onnx_schema import translation_table
from hyperattention.export.plan import ExportPlan


def trace(module: nn.Module, examples: Sequence[Tensor], plan: ExportPlan, name: str) -> ModelProto:
    """The graph of `module`, called with `examples` in the order of plan.inputs; `name` is the model's, for the error.

    A named dimension stays open where its example is 2 or more: torch.export fixes one of 0 or 1, and merges equal ones.
    Raises ExportFailed where torch cannot trace or translate it.
    """
    shapes = tuple({i: size for i, size in enumerate(entry.shape) if isinstance(size, str)} or None for entry in plan.inputs)
    return _to_onnx(plan, name, module.eval(), tuple(examples), dynamic_shapes=shapes)


def trace_program(program: ExportedProgram, plan: ExportPlan, name: str) -> ModelProto:
    """The same for a graph that torch.export made, whose dimensions get the plan's names here."""
    proto = _to_onnx(plan, name, program)
    if len(proto.graph.output) != len(plan.outputs) or len(proto.graph.input) != len(plan.inputs):
        found = f"{len(proto.graph.input)} inputs and {len(proto.graph.output)} outputs"
        raise ExportFailed(f"the graph of {name} has {found}, the plan {len(plan.inputs)} and {len(plan.outputs)}; please report the model")
    names = {}
    for value, entry in zip(proto.graph.input, plan.inputs, strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, entry.shape, strict=True):
            if dim.dim_param and isinstance(size, str):
                names[dim.dim_param] = size
    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # a symbol, or an expression of several
                dim.dim_param = re.sub(r"\b[a-z]\d+\b", lambda match: names.get(match[0], match[0]), dim.dim_param)
    return proto


def _to_onnx(plan: ExportPlan, name: str, *args: Any, **options: Any) -> ModelProto:
    try:
        with torch.no_grad(), silenced("torch.onnx", "onnxscript", "onnx_ir"):
            program = torch.onnx.export(
                *args,
                dynamo=True,
                input_names=[entry.name for entry in plan.inputs],
                output_names=list(plan.outputs),
                custom_translation_table=translation_table(),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
                **options,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportFailed(f"torch cannot export {name}: {_cause(error)}") from error
    assert program is not None
    return program.model_proto


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error, 400)


@contextmanager
def silenced(*names: str) -> Iterator[None]:
    """Inside, no warnings and nothing of the loggers `names`: what matters of torch's exporters is raised."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
