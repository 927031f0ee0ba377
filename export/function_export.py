"""torch.export of a user's module: its inputs by position, its outputs as named tensors, and its failures in one paragraph."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from hyperattention.errors import ExportFailed, UnsupportedModel, UsageError
from hyperattention.export.function_call import code_place, kind, named
from hyperattention.export.function_dims import Axes, traced_examples
from hyperattention.export.onnx_trace import silenced

_SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_GUARD = re.compile(r"^\s*- (.*)$", re.MULTILINE)


class _Names:
    """torch.export puts attributes of a module back as they were; it does not look into this."""

    found: tuple[str, ...] = ()


class Flat(nn.Module):
    """The user's module as a function of tensors by position that returns a tuple of tensors."""

    def __init__(self, module: nn.Module, inputs: tuple[str, ...], by_name: bool) -> None:
        super().__init__()
        self.module, self.inputs, self.by_name = module, inputs, by_name
        self._names = _Names()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the last run's outputs."""
        return self._names.found

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        answer = self.module(**dict(zip(self.inputs, tensors, strict=True))) if self.by_name else self.module(*tensors)
        named = name_outputs(answer, self.inputs)
        self._names.found = tuple(named)
        return tuple(named.values())


def name_outputs(answer: Any, inputs: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a module's answer by name: keys of a dict or fields of a dataclass, output_0 and so on elsewhere.

    None is left out; a name that an input has gets `_out` behind it. Raises UsageError for anything but tensors.
    """
    found: dict[str, Tensor] = {}
    for path, value in _leaves(answer, ()):
        name = "_".join(map(str, path)) if path and isinstance(path[0], str) else "_".join(map(str, ("output", *(path or (0,)))))
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} of the module's outputs is {kind(value)}; return tensors alone")
        found[f"{name}_out" if name in inputs else name] = value
    if not found:
        raise UsageError("the module returns no tensor; return at least one")
    return found


def _leaves(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if value is None:
        return
    if isinstance(value, Mapping):
        parts = [(str(key), part) for key, part in value.items()]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple) and (fields := getattr(value, "_fields", None)):
        parts = list(zip(fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        parts = list(enumerate(value))
    else:
        yield path, value
        return
    for key, part in parts:
        yield from _leaves(part, (*path, key))


def export_program(name: str, flat: Flat, examples: dict[str, Tensor], axes: Axes) -> ExportedProgram:
    """The graph of `flat` by torch.export, its attention calls whole.

    Raises UsageError where the module fails on its own examples, by file and line, or answers them differently each time, ExportFailed
    where only torch.export fails, and UnsupportedModel for a module that writes to its buffers.
    """
    tensors = tuple(traced_examples(examples, axes).values())
    shapes = tuple({number: axis.spec for number, axis in axes[key].items()} for key in examples)
    try:
        with torch.no_grad(), _plain_attention(), silenced("torch"):
            program = torch.export.export(flat, tensors, dynamic_shapes=(shapes,), strict=False)
    except UsageError:
        raise
    except Exception as error:  # torch.export passes on whatever the module and the tracer raise
        _run(name, flat, tuple(examples.values()))
        raise ExportFailed(_words(name, error, tuple(examples))) from error
    _check_pure(name, program, examples)
    if _draws(program):
        _check_repeatable(name, flat, tuple(examples.values()))
    return program


def _check_pure(name: str, program: ExportedProgram, examples: dict[str, Tensor]) -> None:
    """Raises UnsupportedModel for a module that writes to its buffers or inputs: a graph would forget it, a second run would differ."""
    signature = program.graph_signature
    given = dict(zip(map(str, signature.user_inputs), examples, strict=True))
    for node in program.graph.nodes:
        for argument, value in zip(getattr(getattr(node.target, "_schema", None), "arguments", ()), node.args, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(value, Node):
                continue
            source = _viewed(value)
            if source.op == "placeholder":
                tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
                kept = tensors.get(source.name, source.name).removeprefix("module.")
                what = f"its input {given[source.name]!r}" if source.name in given else f"its tensor {kept!r}"
                raise UnsupportedModel(
                    f"the module of {name} writes to {what} while it runs ({node.target}), which no exported graph does; copy it first, or "
                    f"return what it computes"
                )


def _viewed(node: Node) -> Node:
    """The tensor whose memory a chain of views shows."""
    while node.op == "call_function":
        first = next(iter(getattr(getattr(node.target, "_schema", None), "arguments", ())), None)
        if first is None or first.alias_info is None or not node.args or not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    return node


def _draws(program: ExportedProgram) -> bool:
    """Whether the graph holds an operator that draws random numbers; only then is running the module worth its time."""
    graphs = (module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule))
    for node in (node for graph in graphs for node in graph.nodes):
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            names = [argument.name for argument in node.target._schema.arguments]
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            # Dropout that is switched off, by whichever of its arguments, draws nothing.
            switches = [name for name in ("train", "training", "dropout_p") if name in names]
            if not switches or all(given.get(name) for name in switches):
                return True
    return False


def _check_repeatable(name: str, flat: Flat, tensors: tuple[Tensor, ...]) -> None:
    """Raises UsageError for outputs that differ between two runs on the same inputs: no comparison with exact attention could hold."""
    first, second = (_run(name, flat, tensors) for _ in range(2))
    outputs = [output for output, one, other in zip(flat.outputs, first, second, strict=True) if not _same(one, other)]
    if outputs:
        more = f" and {len(outputs) - 3} more" if len(outputs) > 3 else ""
        raise UsageError(
            f"the module of {name} answers the same inputs differently twice (output {', '.join(outputs[:3])}{more}); make it "
            f"deterministic (no dropout, no torch.rand in forward)"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _run(name: str, flat: Flat, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The module's answer, each run on inputs of its own. Raises UsageError, by file and line, where the user's code fails."""
    try:
        with torch.no_grad():
            return flat(*(tensor.clone() for tensor in tensors))
    except UsageError:
        raise
    except Exception as error:  # the user's code may raise anything
        place = code_place(error)
        raise UsageError(f"the module of {name} fails on its example inputs at {place}: {named(error)}; mend either") from error


def _words(name: str, error: Exception, inputs: tuple[str, ...]) -> str:
    """torch.export's failure in one paragraph."""
    # torch knows the inputs by the place where `Flat` takes them.
    text = _SIZE.sub(lambda place: f"(axis {place[2]} of {inputs[int(place[1])]!r})", str(error))
    if "Constraints violated" not in text:
        text = text.split("The error above occurred")[0]
        words = " ".join(text.split())[:400]
        return f"torch.export cannot trace the module of {name} at {code_place(error)}: {type(error).__name__}: {words}"
    reasons = []
    for reason in _GUARD.findall(text):
        fixed = re.search(r"You marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)", reason)
        reasons.append(f"dimension {fixed[1]!r} is fixed to {fixed[2]} by the module's code" if fixed else reason.rstrip("."))
    suggested = " ".join(text.partition("Suggested fixes:")[2].split("The error above")[0].split())
    more = f" (and {len(reasons) - 2} more)" if len(reasons) > 2 else ""
    return (
        f"the module of {name} does not take the dynamic shapes given: {'; '.join(reasons[:2])}{more}. Narrow the dynamic "
        f"shapes, give the axis a fixed size, or change the code" + (f"; torch.export suggests: {suggested}" if suggested else "")
    )


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Inside, nn.MultiheadAttention and nn.TransformerEncoderLayer call scaled_dot_product_attention and no fused operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
