"""Real inputs from `--inputs FILE.npz`, and the example inputs that a user's function returns."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hyperattention.errors import UsageError, one_line
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import Input
from hyperattention.validate.feeds import IDS, LENGTHS, ArrayMaterial
from hyperattention.validate.signature import batch_rows, describe, input_dtype, is_batch, length_dimension

_HOW = "numpy.savez(FILE, {}) writes such a file"
EXAMPLE_NOTE = (
    "Judged on the example inputs that the function returns; where they are random, they are the easiest for any approximation: give "
    "real ones with --inputs FILE.npz."
)


def load_arrays(path: Path, plan: ExportPlan, vocabulary: int = 0) -> ArrayMaterial:
    """The arrays of an .npz file as inputs: one array for each of plan.inputs (`lengths` may be left out), any number of rows.

    Floating arrays go to the plan's dtype, integers to the input's. Raises UsageError for a file that is missing or none, for names,
    dtypes or shapes that are not the inputs', for NaN, infinities and ids outside the vocabulary (of `vocabulary` entries; 0: not known).
    """
    tensors = {name: _tensor(name, array) for name, array in _read(path, plan).items()}
    wanted = {entry.name: entry for entry in plan.inputs}
    if LENGTHS in wanted and LENGTHS not in tensors and IDS in tensors and tensors[IDS].dim() == 2:
        rows, keys = tensors[IDS].shape
        tensors[LENGTHS] = torch.full((rows,), keys, dtype=torch.int32)
    if set(tensors) != set(wanted):
        raise UsageError(
            f"--inputs {path.name} holds {', '.join(tensors) or 'no array'}; the exported model takes {', '.join(wanted)}: "
            + _HOW.format(", ".join(f"{name}=..." for name in wanted))
        )
    count = _check_sizes(path, plan, tensors)
    for name, entry in wanted.items():
        tensors[name] = _carried(path, plan, entry, tensors[name])
    if vocabulary and IDS in tensors:
        low, high = int(tensors[IDS].min()), int(tensors[IDS].max())
        if low < 0 or high >= vocabulary:
            raise UsageError(f"--inputs {path.name}: {IDS} holds {low} to {high}; the model knows the tokens 0 to {vocabulary - 1}")
    return ArrayMaterial(tensors, path.name, "arrays", _longest(plan, tensors), count)


def load_examples(plan: ExportPlan, examples: Mapping[str, Tensor], name: str) -> ArrayMaterial:
    """The example inputs of a function, by the names of plan.inputs. Raises UsageError where they do not fit the exported shapes."""
    tensors = {entry.name: examples[entry.name].detach().cpu() for entry in plan.inputs}
    for entry in plan.inputs:
        value = tensors[entry.name]
        if not bool(torch.isfinite(value).all()):
            raise UsageError(f"the example input {entry.name} holds NaN or infinity; return examples that are numbers")
        tensors[entry.name] = value.to(input_dtype(plan, entry))
    return ArrayMaterial(tensors, name, "examples", _longest(plan, tensors), _rows(plan, tensors), EXAMPLE_NOTE)


def _read(path: Path, plan: ExportPlan) -> dict[str, np.ndarray]:
    names = ", ".join(f"{entry.name} {describe(plan, entry)}" for entry in plan.inputs)
    if not path.is_file():
        raise UsageError(f"--inputs {path} does not exist; give an .npz file with the arrays {names}")
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("one array without a name")
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UsageError(f"--inputs {path} cannot be read as an .npz file ({one_line(error)}); give one with the arrays {names}") from error


def _tensor(name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8 or array.dtype in (np.uint16, np.uint32, np.uint64):
        raise UsageError(f"--inputs: array {name} is {array.dtype}; it takes float16, float32, float64, int8 to int64, uint8 or bool")
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).reshape(array.shape))


def _check_sizes(path: Path, plan: ExportPlan, tensors: dict[str, Tensor]) -> int:
    """The rows. Fixed sizes are the model's; rows come in whole feeds; one dimension has one size; nothing is empty."""
    sizes: dict[int | str, tuple[int, str]] = {}
    for entry in plan.inputs:
        shape = tuple(tensors[entry.name].shape)
        problem = len(shape) != len(entry.shape) or 0 in shape
        for axis, (size, dim) in enumerate(zip(shape, entry.shape, strict=False)):
            rows = is_batch(plan, axis, dim)
            before, where = sizes.setdefault("rows" if rows else dim, (size, entry.name)) if rows or isinstance(dim, str) else (size, "")
            if before != size:
                what = "rows" if rows else dim
                raise UsageError(f"--inputs {path.name}: {what} is {before} in {where} and {size} in {entry.name}; it takes one size")
            fixed = dim if isinstance(dim, int) else plan.dims[dim][0] if plan.dims[dim][0] == plan.dims[dim][2] else None
            problem |= not rows and fixed is not None and size != fixed
        if problem:
            raise UsageError(
                f"--inputs {path.name}: {entry.name} has shape {list(shape)}; the exported model takes {describe(plan, entry)}, with any "
                f"number of rows in the file"
            )
    rows = _rows(plan, tensors)
    if rows % batch_rows(plan) and rows > batch_rows(plan):
        raise UsageError(f"--inputs {path.name} has {rows} rows; the exported model reads {batch_rows(plan)} at a time: give a multiple")
    return rows


def _carried(path: Path, plan: ExportPlan, entry: Input, value: Tensor) -> Tensor:
    """The tensor in the input's dtype: floats among themselves, integers where no value changes."""
    wanted = input_dtype(plan, entry)
    found = str(value.dtype).removeprefix("torch.")
    if value.dtype.is_floating_point != wanted.is_floating_point or (value.dtype == torch.bool) != (wanted == torch.bool):
        raise UsageError(f"--inputs {path.name}: {entry.name} is {found}; the exported model takes {str(wanted).removeprefix('torch.')}")
    carried = value.to(wanted)
    bad = int((~torch.isfinite(carried)).sum())
    if bad:
        raise UsageError(
            f"--inputs {path.name}: {entry.name} holds {bad} numbers that are NaN, infinite or too large for {plan.dtype}; mend them"
        )
    if not wanted.is_floating_point and not torch.equal(carried.to(value.dtype), value):
        raise UsageError(f"--inputs {path.name}: {entry.name} holds numbers that {str(wanted).removeprefix('torch.')} cannot")
    return carried


def _rows(plan: ExportPlan, tensors: Mapping[str, Tensor]) -> int:
    """Rows of the inputs that have any; 1 where none has."""
    found = [len(tensors[entry.name]) for entry in plan.inputs if entry.shape and is_batch(plan, 0, entry.shape[0])]
    return min(found, default=1)


def _longest(plan: ExportPlan, tensors: Mapping[str, Tensor]) -> int | None:
    """Size of the dimension that makes inputs longer; None where all are fixed."""
    moving = length_dimension(plan)
    found = [tensors[e.name].shape[axis] for e in plan.inputs for axis, dim in enumerate(e.shape) if dim == moving and moving is not None]
    return min(found, default=None)
