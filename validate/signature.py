"""What an exported graph takes: the names, types and sizes of a feed, checked before any runtime sees it.

The runtimes refuse a wrong feed each in their own way, or not at all: ONNX Runtime runs past the exported range, where nothing
was measured. Here every runner refuses the same things with the same words.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hyperattention.errors import UsageError
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import Input, torch_dtype

BATCH = "batch"


def input_dtype(plan: ExportPlan, entry: Input) -> torch.dtype:
    """torch's dtype of one of plan.inputs; "float" is the plan's own."""
    return torch_dtype(plan.dtype) if entry.dtype == "float" else getattr(torch, entry.dtype)


def length_dimension(plan: ExportPlan) -> str | None:
    """The dimension that makes an input longer: of those that vary the one with the attention's range, else the widest; None if all
    are fixed. The batch is none."""
    moving = {name: span for name, span in plan.dims.items() if span[0] < span[2] and name != BATCH}
    if not moving:
        return None
    same = [name for name, span in moving.items() if tuple(span) == tuple(plan.seq)]
    return same[0] if same else max(moving, key=lambda name: moving[name][2])


def length_range(plan: ExportPlan) -> tuple[int, int]:
    """Shortest and longest input: sizes of `length_dimension`, or twice the attention's keys where nothing varies."""
    name = length_dimension(plan)
    low, high = (plan.seq[2],) * 2 if name is None else (plan.dims[name][0], plan.dims[name][2])
    return low, high


def is_batch(plan: ExportPlan, axis: int, dim: int | str) -> bool:
    """Whether this dimension of an input counts rows: "batch", or a fixed first size that `batch_rows` takes for it."""
    if isinstance(dim, str):
        return dim == BATCH
    return axis == 0 and BATCH not in plan.dims and dim == batch_rows(plan)


def batch_rows(plan: ExportPlan) -> int:
    """Rows of one feed, the fewest that the export takes.

    Without a dimension "batch" it is the attention's fixed batch where an input begins with it, else a first size that all inputs
    share, else 1: then inputs have no rows.
    """
    if BATCH in plan.dims:
        return plan.dims[BATCH][0]
    first = {entry.shape[0] for entry in plan.inputs if entry.shape}
    if plan.batch[0] == plan.batch[2] and plan.batch[0] in first:
        return plan.batch[0]
    shared = first.pop() if len(first) == 1 else 1
    return shared if isinstance(shared, int) else 1


def sizes_at(plan: ExportPlan, length: int) -> dict[str, int]:
    """A size for every named dimension: `length` for the one that it means, the fewest rows, and the usual size of the others."""
    name = length_dimension(plan)
    return {dim: length if dim == name else span[0 if dim == BATCH else 1] for dim, span in plan.dims.items()}


def keys_follow(plan: ExportPlan) -> bool:
    """Whether an input of some length makes the attention have as many keys, as far as the ranges tell."""
    return length_range(plan) == (plan.seq[0], plan.seq[2])


def check_feed(plan: ExportPlan, given: Mapping[str, Tensor]) -> None:
    """Raises UsageError unless `given` has a tensor of the right dtype and shape, within the exported range, for each of plan.inputs."""
    wanted = {entry.name: entry for entry in plan.inputs}
    if set(given) != set(wanted):
        raise UsageError(f"the feed has the inputs {_names(given)}; the exported model takes {_names(wanted)}")
    sizes: dict[str, tuple[int, str]] = {}
    for name, entry in wanted.items():
        value, dtype = given[name], input_dtype(plan, entry)
        if value.dtype != dtype:
            raise UsageError(f"input {name} is {_short(value.dtype)}; the exported model takes {_short(dtype)}")
        if value.dim() != len(entry.shape):
            raise UsageError(f"input {name} has shape {list(value.shape)}; the exported model takes {describe(plan, entry)}")
        for size, dim in zip(value.shape, entry.shape, strict=True):
            low, _, high = plan.dims[dim] if isinstance(dim, str) else (dim,) * 3
            if not low <= size <= high:
                raise UsageError(
                    f"input {name} has shape {list(value.shape)}; the exported model takes {describe(plan, entry)}: {_what(dim)} "
                    f"{size} was not exported; export again with a wider range, or cut or pad the input"
                )
            before, where = sizes.setdefault(dim, (size, name)) if isinstance(dim, str) else (size, name)
            if before != size:
                raise UsageError(f"{dim} is {before} in input {where} and {size} in input {name}; one feed takes one size")


def describe(plan: ExportPlan, entry: Input) -> str:
    """The shape in words, such as `[batch 1, sequence 1 to 4096]`."""
    return f"[{', '.join(_span(plan, dim) for dim in entry.shape)}]"


def _span(plan: ExportPlan, dim: int | str) -> str:
    if isinstance(dim, int):
        return str(dim)
    low, _, high = plan.dims[dim]
    return f"{dim} {low}" if low == high else f"{dim} {low} to {high}"


def _what(dim: int | str) -> str:
    return f"{dim} of" if isinstance(dim, str) else "a size of"


def _names(mapping: Mapping[str, object]) -> str:
    return ", ".join(mapping) or "(none)"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
