"""The inputs of a validation, at a given length: windows of text, arrays of real data, the user's own examples, or random ones.

Everything that knows the name of an input is in here: a feed maps each of plan.inputs to a tensor, and the runners and the
measuring take it as it is.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hyperattention.export.plan import ExportPlan
from hyperattention.validate.inputs import Corpus, windows
from hyperattention.validate.signature import batch_rows, input_dtype, is_batch, length_dimension, sizes_at

IDS, LENGTHS = "input_ids", "lengths"
RANDOM_NOTE = (
    "Random inputs, because none were given (--inputs FILE.npz). They are the easiest for any approximation: they can condemn, and never "
    "clear. Judge on real inputs before deploying."
)
Feed = OrderedDict[str, Tensor]


class Material(Protocol):
    """Where feeds come from. `kind` is "text", "arrays", "examples" or "random"; `longest` is the length of what was given, if any."""

    @property
    def kind(self) -> str: ...

    @property
    def note(self) -> str: ...

    @property
    def longest(self) -> int | None: ...

    def describe(self) -> dict:
        """For report.json: name, kind, tokens, sha256, size, note; without a folder."""
        ...

    def feeds(self, plan: ExportPlan, length: int, count: int) -> list[Feed]:
        """At most `count` different feeds of `length`, each within the exported range."""
        ...

    def stretched(self, plan: ExportPlan, length: int) -> Feed:
        """One feed of any `length`, repeated where there is less: for time alone."""
        ...


def feed(input_ids: Tensor, lengths: Tensor | None = None, rows: int = 1) -> Feed:
    """The feed of `input_ids` int [B, S]; `lengths` int [B] defaults to S. A single row is repeated to `rows`."""
    if input_ids.shape[0] == 1:
        input_ids = input_ids.expand(rows, -1)
    full = torch.full((input_ids.shape[0],), input_ids.shape[1], dtype=torch.int32)
    return OrderedDict([(IDS, input_ids.long().contiguous()), (LENGTHS, full if lengths is None else lengths.to(torch.int32))])


def is_padded(plan: ExportPlan) -> bool:
    """Whether the model takes the valid length of each row."""
    return LENGTHS in (entry.name for entry in plan.inputs)


def shortened(given: Feed, valid: int) -> Feed:
    """The same feed with `valid` as the length of every row."""
    return OrderedDict(given) | {LENGTHS: torch.full_like(given[LENGTHS], valid)}


def without_padding(value: Tensor, given: Feed) -> Tensor:
    """`value` [B, S, ...] as [tokens, ...] of the valid tokens, where some row is padded; any other shape as it is."""
    lengths, ids = given.get(LENGTHS), given.get(IDS)
    if lengths is None or ids is None or value.dim() < 2 or value.shape[:2] != ids.shape or bool((lengths == ids.shape[1]).all()):
        return value
    return torch.cat([row[:valid] for row, valid in zip(value, lengths.tolist(), strict=True)])


@dataclass(frozen=True)
class TextMaterial:
    """Windows of a corpus of token ids, for models that read text."""

    corpus: Corpus

    @property
    def kind(self) -> str:
        return self.corpus.kind

    @property
    def note(self) -> str:
        return self.corpus.note

    @property
    def longest(self) -> int | None:
        return None

    def describe(self) -> dict:
        return self.corpus.describe()

    def feeds(self, plan: ExportPlan, length: int, count: int) -> list[Feed]:
        return [feed(window.inputs, rows=batch_rows(plan)) for window in windows(self.corpus, length, count)]

    def stretched(self, plan: ExportPlan, length: int) -> Feed:
        ids = self.corpus.ids
        return feed(ids.repeat(-(-length // len(ids)))[None, :length], rows=batch_rows(plan))


@dataclass(frozen=True)
class ArrayMaterial:
    """Tensors named like the inputs, with any number of rows: cut or tiled along the dimensions that vary."""

    tensors: Mapping[str, Tensor]
    name: str
    kind: str  # "arrays" or "examples"
    longest: int | None
    rows: int
    note: str = ""

    def describe(self) -> dict:
        digest = hashlib.sha256()
        for tensor in self.tensors.values():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {"name": self.name, "kind": self.kind, "tokens": None, "sha256": digest.hexdigest(), "size": self.rows, "note": self.note}

    def feeds(self, plan: ExportPlan, length: int, count: int) -> list[Feed]:
        """Neighbouring rows make a feed; where there are no more rows, other parts of a longer input do."""
        rows, sizes = batch_rows(plan), sizes_at(plan, length)
        groups = max(1, self.rows // rows)
        shifts = max(1, (self.longest or length) // length)
        places = [(group, shift) for shift in range(shifts) for group in range(groups)][:count]
        return [self._feed(plan, sizes, group * rows, shift * length) for group, shift in places]

    def stretched(self, plan: ExportPlan, length: int) -> Feed:
        return self._feed(plan, sizes_at(plan, length), 0, 0)

    def _feed(self, plan: ExportPlan, sizes: dict[str, int], first: int, shift: int) -> Feed:
        made, moving = Feed(), length_dimension(plan)
        for entry in plan.inputs:
            value = self.tensors[entry.name]
            for axis, dim in enumerate(entry.shape):
                wanted = sizes[dim] if isinstance(dim, str) else dim
                start = shift if dim == moving else first if is_batch(plan, axis, dim) else 0
                if value.shape[axis] != wanted or start:
                    value = value.index_select(axis, (torch.arange(wanted) + start) % value.shape[axis])
            if entry.name == LENGTHS and IDS in self.tensors:
                valid, given = value.clamp(max=made[IDS].shape[1]), self.tensors[IDS].shape[1]
                value = torch.where(value == given, made[IDS].shape[1], valid).to(value.dtype)
            made[entry.name] = value.to(input_dtype(plan, entry)).contiguous()
        return made


@dataclass(frozen=True)
class RandomMaterial:
    """Normal numbers for floating inputs, ids below `vocabulary` for integers, from a seed: easy to approximate, so never a proof."""

    seed: int
    vocabulary: int
    kind: str = "random"
    note: str = RANDOM_NOTE
    longest: int | None = None

    def describe(self) -> dict:
        named = {"name": "random inputs", "kind": self.kind, "tokens": None}
        return {**named, "sha256": hashlib.sha256(f"seed {self.seed}".encode()).hexdigest(), "size": 0, "note": self.note}

    def feeds(self, plan: ExportPlan, length: int, count: int) -> list[Feed]:
        sizes = sizes_at(plan, length)
        return [self._feed(plan, sizes, number) for number in range(count)]

    def stretched(self, plan: ExportPlan, length: int) -> Feed:
        return self.feeds(plan, length, 1)[0]

    def _feed(self, plan: ExportPlan, sizes: dict[str, int], number: int) -> Feed:
        generator, made = torch.Generator().manual_seed(self.seed + number), Feed()
        for entry in plan.inputs:
            shape, dtype = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in entry.shape), input_dtype(plan, entry)
            if dtype.is_floating_point:
                made[entry.name] = torch.randn(shape, generator=generator).to(dtype)
            elif dtype == torch.bool:
                made[entry.name] = torch.ones(shape, dtype=dtype)
            elif entry.name == LENGTHS:
                made[entry.name] = torch.full(shape, made[IDS].shape[1], dtype=dtype)
            else:
                made[entry.name] = torch.randint(0, max(2, self.vocabulary), shape, generator=generator).to(dtype)
        return made
