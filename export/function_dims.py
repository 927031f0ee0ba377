"""Dynamic shapes of a user's function: which axes of the examples vary, under which names, and within which ranges.

The user writes them as torch.export takes them, with names in quotes beside: {axis: "name" | Dim | Dim.AUTO | Dim.DYNAMIC}
for each input, in a tuple or by input name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor
from torch.export import Dim

from hyperattention.errors import UsageError
from hyperattention.export.source import Range

# Rows and length have options of their own.
BATCH, SEQUENCE = "batch", "sequence"
_ALLOWED = 'an axis takes a name in quotes, torch.export.Dim("name", min=.., max=..), Dim.AUTO, Dim.DYNAMIC, or None for a fixed size'


@dataclass(frozen=True)
class Axis:
    """One axis that varies: its dimension's name, its bounds as the user gave them, and what torch.export takes for it."""

    name: str
    low: int
    high: int | None
    spec: Any


Axes = dict[str, dict[int, Axis]]  # by input and axis


def read_axes(name: str, shapes: Any, examples: Mapping[str, Tensor]) -> Axes:
    """The axes that vary of each of `examples`, from `shapes` as the function `name` returned them. Raises UsageError."""
    axes: Axes = {}
    dims: dict[str, Any] = {}
    for key, given in _by_input(name, shapes, examples).items():
        axes[key] = {}
        for axis, spec in _by_axis(f"{name}: the dynamic shape of {key!r}", given, examples[key].dim()).items():
            size = examples[key].shape[axis]
            found = _axis(f"{name}: axis {axis} of {key!r}", spec, size, f"{key}_dim{axis}", dims)
            if found is None or found.low == found.high:
                continue
            if not found.low <= size <= (found.high or size):
                raise UsageError(f"{name}: axis {axis} of {key!r} is {size} in the example, outside {_range(found)}; change one of them")
            axes[key][axis] = found
    _check_sizes(name, axes, examples)
    return axes


def fit(tensor: Tensor, shape: Sequence[int | str], sizes: Mapping[str, int]) -> Tensor:
    """`tensor` cut, or repeated, along each axis whose name in `shape` has a size in `sizes`."""
    for axis, name in enumerate(shape):
        if isinstance(name, str) and name in sizes and tensor.shape[axis] != sizes[name]:
            index = torch.arange(sizes[name], device=tensor.device) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
    return tensor


def traced_examples(examples: Mapping[str, Tensor], axes: Axes) -> dict[str, Tensor]:
    """The examples with every varying axis at least 2 long: torch.export takes a size of 1 for a fixed one."""
    sizes = {axis.name: 2 for key, named in axes.items() for number, axis in named.items() if examples[key].shape[number] == 1}
    return {key: fit(tensor, axis_names(tensor, axes[key]), sizes) for key, tensor in examples.items()}


def axis_names(tensor: Tensor, axes: Mapping[int, Axis]) -> tuple[int | str, ...]:
    """Size or dimension's name of every axis."""
    return tuple(axes[i].name if i in axes else size for i, size in enumerate(tensor.shape))


def ranges(
    name: str,
    bounds: Mapping[str, tuple[int, int | None]],
    sizes: Mapping[str, int],
    given: Mapping[str, Range],
    sequence: tuple[int | None, int | None, int | None],
    longest: int,
) -> dict[str, Range]:
    """(min, opt, max) of every dimension: as `given` by the options, else as the function's Dim(min, max) fixes it.

    `sizes` are the examples', which an engine is tuned for where nothing else is said; `sequence` holds --min-seq, --opt-seq and
    --max-seq, `longest` its default maximum. Raises UsageError for a dimension that is unknown, lacks a range, or leaves its bounds.
    """
    unknown = sorted(set(given) - set(bounds))
    if unknown:
        known = ", ".join(bounds) or "none, as every axis of the examples is fixed"
        raise UsageError(f"{name} has no dimension {unknown[0]!r}; its dynamic shapes name: {known}")
    if any(value is not None for value in sequence) and SEQUENCE not in bounds:
        dims = ", ".join(bounds) or "none"
        raise UsageError(f"{name} has no dimension {SEQUENCE!r} for --min-seq, --opt-seq and --max-seq (it names: {dims}); use --dim")
    found = {}
    for dim, (low, high) in bounds.items():
        if dim in given:
            chosen = given[dim]
        elif dim == SEQUENCE:
            chosen = _sequence(sequence, low, longest if high is None else high)
        elif high is not None:
            chosen = (low, min(max(sizes[dim], low), high), high)
        elif dim == BATCH:
            chosen = (max(low, 1),) * 3
        else:
            raise UsageError(f"dimension {dim!r} of {name} has no largest size; give --dim {dim}=min,opt,max, or Dim({dim!r}, max=..)")
        if not (1 <= chosen[0] <= chosen[1] <= chosen[2]):
            raise UsageError(f"dimension {dim!r} is min {chosen[0]}, opt {chosen[1]}, max {chosen[2]}; it takes 1 <= min <= opt <= max")
        if chosen[0] < low or (high is not None and chosen[2] > high):
            allowed = f"{low} to {high}" if high is not None else f"{low} and above"
            raise UsageError(f"dimension {dim!r} is asked from {chosen[0]} to {chosen[2]}; {name} takes {allowed} (its dynamic shapes)")
        found[dim] = chosen
    return found


def _sequence(given: tuple[int | None, int | None, int | None], low: int, high: int) -> Range:
    first, opt, last = given
    first, last = low if first is None else first, high if last is None else last
    return (first, max(first, last // 4) if opt is None else opt, last)


def _by_input(name: str, shapes: Any, examples: Mapping[str, Tensor]) -> dict[str, Any]:
    names = list(examples)
    if shapes is None:
        return dict.fromkeys(names)
    if isinstance(shapes, Mapping):
        unknown = sorted(str(key) for key in shapes if key not in examples)
        if unknown:
            raise UsageError(f"{name}: the dynamic shapes name {unknown[0]!r}; the inputs are {', '.join(names)}")
        return {key: shapes.get(key) for key in names}
    if isinstance(shapes, (tuple, list)):
        if len(shapes) != len(names):
            listed = f"{len(names)} inputs ({', '.join(names)})"
            raise UsageError(f"{name}: {len(shapes)} dynamic shapes for {listed}; give one an input, or a dict")
        return dict(zip(names, shapes, strict=True))
    raise UsageError(f"{name}: the dynamic shapes are a {type(shapes).__name__}; they take a tuple, one an input, or a dict by input name")


def _by_axis(what: str, given: Any, rank: int) -> dict[int, Any]:
    if given is None:
        return {}
    if isinstance(given, (tuple, list)):
        if len(given) != rank:
            raise UsageError(f"{what} has {len(given)} entries, the example {rank} axes; give one an axis, or a dict by axis")
        return dict(enumerate(given))
    if not isinstance(given, Mapping):
        raise UsageError(f"{what} is a {type(given).__name__}; it takes a dict by axis, such as {{0: 'batch'}}, or None for fixed sizes")
    for axis in given:
        if isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis < rank:
            raise UsageError(f"{what} names axis {axis!r}; the example has axes 0 to {rank - 1}")
    return dict(given)


def _axis(what: str, spec: Any, size: int, default: str, dims: dict[str, Any]) -> Axis | None:
    """The axis of one entry, `size` long in the example; None for a fixed one. `dims` collects the dimensions by name, which axes may
    share.
    """
    kind = getattr(getattr(spec, "type", None), "name", "")  # of Dim.AUTO, Dim.DYNAMIC and Dim.STATIC
    if spec is None or kind == "STATIC":
        return None
    if type(spec) is int:
        if spec != size:
            raise UsageError(f"{what} is fixed to {spec}, and {size} in the example; change one of them")
        return None
    if kind in ("AUTO", "DYNAMIC"):
        return Axis(default, max(spec.min or 1, 1), spec.max, spec)
    if hasattr(spec, "root"):
        raise UsageError(f"{what} is {spec.__name__}, derived from another dimension; fix the axis, or let it vary under a name of its own")
    if isinstance(spec, str):
        spec = dims.get(spec) or Dim(spec) if spec.isidentifier() else None
    if not isinstance(spec, Dim) or not spec.__name__.isidentifier():
        raise UsageError(f"{what} is given as {spec!r}; {_ALLOWED}")
    known = dims.setdefault(spec.__name__, spec)
    if (known.min, known.max) != (spec.min, spec.max):
        raise UsageError(f"{what}: dimension {spec.__name__!r} has another range here than before; use one Dim for all its axes")
    high = int(known.max) if isinstance(known.max, int) and known.max < 2**31 else None
    return Axis(known.__name__, max(int(known.min), 1), high, known)


def _check_sizes(name: str, axes: Axes, examples: Mapping[str, Tensor]) -> None:
    """One name, one size."""
    seen: dict[str, tuple[int, str]] = {}
    for key, named in axes.items():
        for number, axis in named.items():
            size, where = examples[key].shape[number], f"axis {number} of {key!r}"
            before = seen.setdefault(axis.name, (size, where))
            if before[0] != size:
                found = f"{before[0]} in {before[1]} and {size} in {where}"
                raise UsageError(f"{name}: dimension {axis.name!r} is {found}; one name is one size")


def _range(axis: Axis) -> str:
    return f"{axis.low} to {axis.high}" if axis.high is not None else f"{axis.low} and above"
