"""Shapes as options name them: --min-seq, --opt-seq and --max-seq, --batch, --dim; each becomes (min, opt, max)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hyperattention.errors import UsageError
from hyperattention.export.source import Range, Source

MAX_SEQUENCE = 2**24  # the kernels' tests stop here; positions fit in 32 bits
MAX_BATCH = 4096
DEFAULT_LONGEST = 32768
SEQUENCE = "the sequence range (--min-seq, --opt-seq, --max-seq)"


def check_range(option: str, values: Sequence[int], highest: int) -> Range:
    """(min, opt, max), checked. Raises UsageError."""
    low, opt, high = values
    if not 1 <= low <= opt <= high <= highest:
        raise UsageError(f"{option} is min {low}, opt {opt}, max {high}; it takes 1 <= min <= opt <= max <= {highest}")
    return (low, opt, high)


def sequence_range(source: Source, low: int | None, opt: int | None, high: int | None) -> Range:
    """Key lengths from --min-seq, --opt-seq and --max-seq, each None where not given: 1, a quarter of the longest, and what the model
    was trained for (at most 131,072). Raises UsageError where the model's input is of a fixed size and one was given.
    """
    if source.keys is not None:
        if (low, opt, high) != (None, None, None) and "sequence" not in source.dims:
            raise UsageError(f"--min-seq, --opt-seq and --max-seq: the input of {source.name} is of fixed size; leave them out")
        return source.keys
    low = 1 if low is None else low
    longest = min(source.max_positions or DEFAULT_LONGEST, 4 * DEFAULT_LONGEST) if high is None else high
    usual = max(low, longest // 4) if opt is None else opt
    return check_range(SEQUENCE, (low, usual, longest), MAX_SEQUENCE)


def parse_batch(text: str) -> Range:
    """Rows as N or min,opt,max. Raises UsageError."""
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(re.fullmatch("[0-9]{1,9}", part.strip()) for part in parts):
        raise UsageError(f"--batch is {text!r}; it takes one number, or min,opt,max such as 1,4,8")
    numbers = [int(part) for part in parts]
    low, opt, high = numbers if len(numbers) == 3 else numbers * 3
    return (low, opt, high)


def named_ranges(dims: Sequence[str], batch: str | None) -> dict[str, Range]:
    """Ranges by dimension from `--dim NAME=N` or `--dim NAME=min,opt,max`, repeated, and from --batch. Raises UsageError."""
    found: dict[str, Range] = {} if batch is None else {"batch": parse_batch(batch)}
    for option in dims:
        match = re.fullmatch(r"([^\W\d]\w*)=([0-9]{1,9})(?:,([0-9]{1,9}),([0-9]{1,9}))?", "".join(option.split()))
        if match is None:
            raise UsageError(f"--dim is {option!r}; it takes NAME=N, or NAME=min,opt,max such as frames=1,512,3000")
        if match[1] in found:
            raise UsageError(f"--dim names {match[1]!r}, which has a range already; give each dimension once")
        low, opt, high = (int(part or match[2]) for part in match.group(2, 3, 4))
        found[match[1]] = check_range(f"--dim {match[1]}", (low, opt, high), MAX_SEQUENCE)
    return found
