"""The front end `FILE.py:FUNCTION`: a function of the user's own returns (module, example inputs[, dynamic shapes]).

The module is exported by torch.export, and its calls of scaled_dot_product_attention become the operator where that computes the
same thing (function_graph.py). Nothing is known of the module but what the graph shows.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Mapping

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from hyperattention.errors import ExportFailed, UsageError
from hyperattention.export.choices import MODULE
from hyperattention.export.function_call import Definition, define, split
from hyperattention.export.function_dims import Axes, Axis, axis_names, fit, ranges, read_axes
from hyperattention.export.function_export import Flat, export_program
from hyperattention.export.function_graph import Call, find_calls
from hyperattention.export.function_model import GraphModel, converted, main_dtype, replace_attention
from hyperattention.export.plan import ExportPlan
from hyperattention.export.shape_options import DEFAULT_LONGEST
from hyperattention.export.source import AttentionLayer, Input, Range, Source

Bounds = dict[str, tuple[int, int | None]]


@dataclass(frozen=True)
class FunctionSource(Source):
    """A user's module as its graph shows it. `ranged` gives its dimensions their ranges before a plan is made."""

    definition: Definition = field(repr=False)
    axes: Axes = field(repr=False)
    bounds: Bounds
    calls: tuple[Call, ...] = field(repr=False)
    symbols: dict[str, str] = field(repr=False)  # dimension by torch's symbol
    code: str = field(repr=False)  # of the graph

    @property
    def half(self) -> str:
        return "fp16" if main_dtype(self.definition.module) == torch.float16 else "bf16"

    def examples(self, sizes: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """The example inputs by name as the function returned them, cut or repeated to `sizes` of the named dimensions."""
        return {entry.name: fit(self.definition.examples[entry.name], entry.shape, sizes or {}) for entry in self.inputs}

    def content(self) -> dict[str, str]:
        tensors = {"weights": self.definition.module.state_dict(), "examples": self.definition.examples}
        return {"graph": hashlib.sha256(self.code.encode()).hexdigest(), **{part: _digest(found) for part, found in tensors.items()}}

    def ranged(self, dims: Mapping[str, Range], sequence: tuple[int | None, int | None, int | None]) -> "FunctionSource":
        """The same with a range for every dimension, from --dim and --batch (`dims`), the three of --*-seq, and the function's own."""
        sizes = {
            size: self.definition.examples[entry.name].shape[axis]
            for entry in self.inputs
            for axis, size in enumerate(entry.shape)
            if isinstance(size, str)
        }
        found = ranges(self.name, self.bounds, sizes, dims, sequence, DEFAULT_LONGEST)
        keys, rows = self._span(found, "keys"), self._span(found, "batch")
        return replace(self, dims=found, keys=keys, rows=rows)

    def load(self, plan: ExportPlan, device: torch.device | str = "cpu") -> GraphModel:
        return replace_attention(self.definition, self.axes, plan, device)

    def _span(self, dims: Mapping[str, Range], what: str) -> Range:
        """Smallest, usual and largest key length ("keys") or rows ("batch") of the attention over the ranges of the dimensions."""
        sizes = (getattr(call, what) for call in self.calls)
        low, opt, high = zip(*(self._at(size, dims) for size in sizes if size is not None), strict=True)
        return min(low), max(opt), max(high)

    def _at(self, size: int | torch.SymInt, dims: Mapping[str, Range]) -> Range:
        if isinstance(size, int):
            return size, size, size
        expression: Any = size.node.expr
        low, opt, high = (
            int(expression.subs({symbol: dims[self.symbols[str(symbol)]][i] for symbol in expression.free_symbols})) for i in range(3)
        )
        return min(low, opt, high), opt, max(low, opt, high)


def open_function(model: str, task: str | None = None, say: Callable[[str], None] = lambda text: None) -> FunctionSource:
    """Runs the user's function and searches the graph of its module. `say` gets one sentence before.

    Raises UsageError for code that fails or returns something else, UnsupportedModel for a module without attention, ExportFailed
    where torch.export cannot trace it.
    """
    if task not in (None, MODULE):
        raise UsageError(f"--task {task}: {model} decides itself what its module returns; leave --task out")
    split(model)
    say(f"{model} is code: it is run now, with all that you may do on this machine")
    definition = define(model)
    dtype = main_dtype(definition.module) or torch.float32
    if dtype == torch.float64:  # no plan has it
        dtype = torch.float32
        definition = replace(definition, module=converted(definition.module, dtype, torch.device("cpu")))
    axes = read_axes(definition.name, definition.dynamic_shapes, definition.examples)
    flat = Flat(definition.module, tuple(definition.examples), definition.by_name).eval()
    examples = {name: value.to(dtype) if value.is_floating_point() else value for name, value in definition.examples.items()}
    program = export_program(definition.name, flat, examples, axes)
    architecture = type(definition.module).__name__
    calls = find_calls(program, architecture)
    inputs, symbols, bounds = _inputs(program, examples, axes)
    layers = tuple(_named(call.layer, symbols) for call in calls)
    return FunctionSource(
        model=model,
        name=definition.name,
        kind="function",
        task=MODULE,
        architecture=architecture,
        layers=layers,
        num_parameters=sum(parameter.numel() for parameter in definition.module.parameters()),
        hidden_size=max(layer.heads_q * layer.head_dim for layer in layers),
        intermediate_size=max((m.out_features for m in definition.module.modules() if isinstance(m, nn.Linear)), default=0),
        vocab_size=0,
        max_positions=None,
        inputs=inputs,
        outputs=flat.outputs,
        dims={},
        keys=None,
        rows=None,
        definition=definition,
        axes=axes,
        bounds=bounds,
        calls=calls,
        symbols=symbols,
        code=program.graph_module.code,
    )


def _digest(tensors: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _inputs(program: ExportedProgram, examples: Mapping[str, Tensor], axes: Axes) -> tuple[tuple[Input, ...], dict[str, str], Bounds]:
    """The graph's inputs, the dimension that each of torch's symbols stands for, and the bounds of each dimension."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    inputs: list[Input] = []
    symbols: dict[str, str] = {}
    bounds: Bounds = {}
    for user_input, (name, example) in zip(program.graph_signature.user_inputs, examples.items(), strict=True):
        shape = list(axis_names(example, axes[name]))
        for number, size in enumerate(values[str(user_input)].shape):
            if not isinstance(size, torch.SymInt):
                shape[number] = size  # fixed from the start, or by Dim.AUTO
                continue
            expression: Any = size.node.expr
            symbol = str(expression)
            if not symbol.isidentifier():
                raise ExportFailed(f"axis {number} of {name!r} is {symbol}, derived from another one; give it a fixed size")
            axis = axes[name][number]
            shape[number] = symbols.setdefault(symbol, axis.name)
            bounds.setdefault(symbols[symbol], _bounds(axis, program.range_constraints.get(expression)))
        inputs.append(Input(name, "float" if example.is_floating_point() else str(example.dtype).removeprefix("torch."), tuple(shape)))
    return tuple(inputs), symbols, bounds


def _named(layer: AttentionLayer, symbols: Mapping[str, str]) -> AttentionLayer:
    """The layer with the dimensions of its problem by name."""
    if layer.problem is None:
        return layer
    return replace(layer, problem=re.sub(r"\bs\d+\b", lambda symbol: symbols.get(symbol[0], symbol[0]), layer.problem))


def _bounds(axis: Axis, found: Any) -> tuple[int, int | None]:
    """The user's bounds of a dimension, narrowed by what torch.export found out."""
    low, high = axis.low, axis.high
    if found is not None:
        # 2 is torch's own least size of a free dimension, which says nothing of the module.
        low = max(low, int(found.lower)) if int(found.lower) > 2 else low
        high = high if found.upper > 2**31 else int(found.upper)
    return low, high
