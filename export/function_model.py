"""A user's module whose attention follows a plan, and the same module untouched, to compare."""

from __future__ import annotations

import copy
from collections import Counter
from operator import getitem
from typing import Any, Mapping

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.nn.functional import scaled_dot_product_attention

from hyperattention.errors import UnsupportedModel, UsageError
from hyperattention.export.function_call import Definition, named
from hyperattention.export.function_dims import Axes
from hyperattention.export.function_export import Flat, export_program
from hyperattention.export.function_graph import OPERATOR, arguments, find_calls
from hyperattention.export.onnx_trace import trace_program
from hyperattention.export.plan import ExportPlan, LayerPlan
from hyperattention.export.source import torch_dtype
from hyperattention.export.switched import Captured, State, Switched


class GraphModel(Switched):
    """A module in the plan's dtype; made by `replace_attention`. "exact" runs the module itself, "plan" its rewritten graph."""

    def __init__(self, flat: Flat, program: ExportedProgram, plan: ExportPlan, device: torch.device) -> None:
        super().__init__(State())
        self.model, self.plan, self.device, self._flat, self._program = flat.module, plan, device, flat, program
        self._graph = program.module(check_guards=False)

    @torch.no_grad()
    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The plan's outputs by name, on the module's device; `feed` has one tensor for each of plan.inputs."""
        dtype = torch_dtype(self.plan.dtype)
        given = [feed[entry.name].to(self.device, dtype if entry.dtype == "float" else None) for entry in self.plan.inputs]
        # The module itself shows no attention call; its graph computes the same and does.
        untouched = self._state.mode == "exact" and self._state.captured is None
        answer = self._flat(*given) if untouched else _Run(self, self._graph).run(*given)
        return dict(zip(self.plan.outputs, answer, strict=True))

    def trace(self) -> ModelProto:
        """The raw graph with the operator's nodes. Raises ExportFailed where torch cannot translate it."""
        return trace_program(self._program, self.plan, type(self.model).__name__)

    def attend(self, layer: LayerPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One attention call of a planned layer in the mode of now: q [B,Hq,Sq,D], k [B,Hkv,Sk,D], v [B,Hkv,Sk,Dv] to [B,Hq,Sq,Dv]."""
        config = layer.config
        assert config is not None
        if self._state.mode == "exact":
            # Sq equals Sk where it is causal (function_graph.py), so both alignments of the mask are one.
            shared, scale = q.shape[1] != k.shape[1], config.resolved_scale(q.shape[-1])
            o = scaled_dot_product_attention(q, k, v, is_causal=bool(config.causal), scale=scale, enable_gqa=shared)
        else:
            o, _ = self._state.attention(q, k, v, config, None)
        self._state.keep(Captured(layer.index, q, k, v, None, config, o))
        return o


class _Run(Interpreter):
    """One run of the rewritten graph, whose operator's nodes are computed by `GraphModel.attend`."""

    def __init__(self, model: GraphModel, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph)
        nodes = [node for node in graph.graph.nodes if node.target is OPERATOR]
        self._owner, self._layers = model, dict(zip(nodes, model.plan.planned, strict=True))

    def run_node(self, n: Node) -> Any:
        if n not in self._layers:
            return super().run_node(n)
        with self._set_current_node(n):
            values, _ = self.fetch_args_kwargs_from_env(n)
        q, k, v = values[:3]
        return self._owner.attend(self._layers[n], q, k, v), None


def replace_attention(definition: Definition, axes: Axes, plan: ExportPlan, device: torch.device | str) -> GraphModel:
    """The user's module on `device` in the plan's dtype, with the plan's layers replaced in its graph; his own stays as it is.

    Raises UnsupportedModel where the graph in this dtype has other attention than the plan, and ExportFailed.
    """
    dtype, device = torch_dtype(plan.dtype), torch.device(device)
    module = converted(definition.module, dtype, device)
    flat = Flat(module, tuple(definition.examples), definition.by_name).eval()
    examples = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in definition.examples.items()}
    program = export_program(definition.name, flat, examples, axes)
    _rewrite(program, plan, type(module).__name__)
    return GraphModel(flat, program, plan, device)


def main_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of most floating-point tensors of the module; None for one without any."""
    kinds = Counter(tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
    return kinds.most_common(1)[0][0] if kinds else None


def converted(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module with its floating-point weights as `dtype` on `device`: a copy, unless it is so already."""
    # A module that keeps a few tensors in another type on purpose, and is else in this one, stays as it was written.
    same_dtype = main_dtype(module) in (None, dtype)
    if same_dtype and all(tensor.device.type == device.type for tensor in (*module.parameters(), *module.buffers())):
        return module
    try:
        module = copy.deepcopy(module).to(device)
    except Exception as error:  # the module's own code may decide how it is copied
        name = type(module).__name__
        raise UsageError(f"{name} cannot be copied ({named(error)}); return it in the dtype that --dtype names") from error
    return module if same_dtype else module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _rewrite(program: ExportedProgram, plan: ExportPlan, architecture: str) -> None:
    """Puts the operator in the place of each planned layer's call."""
    calls = find_calls(program, architecture)
    if [call.layer.name for call in calls] != [layer.name for layer in plan.layers]:
        raise UnsupportedModel(f"the attention calls of {architecture} are others than in the plan; export the model again")
    graph = program.graph
    for call, layer in zip(calls, plan.layers, strict=True):
        if layer.config is None:
            continue
        if call.layer.problem is not None:
            raise UnsupportedModel(f"layer {layer.index} ({layer.name}) in {plan.dtype}: {call.layer.problem}; leave it out of --layers")
        given, value = arguments(call.node), call.node.meta["val"]
        with graph.inserting_before(call.node):
            tensors = (given["query"], given["key"], given["value"])
            operator = graph.call_function(OPERATOR, (*tensors, None, *layer.config.attributes().values()))
            output = graph.call_function(getitem, (operator, 0))
        operator.meta = {**call.node.meta, "val": (value, value.new_empty(value.shape[:-1], dtype=torch.float32))}
        output.meta = dict(call.node.meta)
        call.node.replace_all_uses_with(output)
        graph.erase_node(call.node)
    graph.lint()
    program.graph_module.recompile()
