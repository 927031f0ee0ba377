"""The look-ahead test: what changes before a place where the input changes. Exact causal attention: nothing.

Keys are chosen for a block of rows at once (docs/operator.md, rules 22 and 29), so a row can answer otherwise because of a later
one although it never sees it. Here one row of Q, K and V, or one token of the whole model, becomes another, and every earlier row
of the output is compared exactly (issue 7). Each selector is tried on the same inputs; exact attention is the control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperattention.config import PRESETS, RANGES, Config
from hyperattention.validate.distributions import approximates

_CHUNK = 1024  # rows converted to float64 at once
LISTED = 8  # earlier rows that a place names, those that moved most, and runs of neighbouring rows
EXACT, BLOCKS, STRICT, SORTLSH = "exact", "blocks", "blocks, strict", "sortlsh"
BLOCK_END = "end of a query block and of a local block"  # the place from which most earlier rows can move
VARIANTS = (EXACT, BLOCKS, STRICT, SORTLSH)
Outputs = Callable[[int | None], Tensor]  # the output [..., S, D] of the inputs, changed at a row or as they are (None)


@dataclass(frozen=True)
class Place:
    """A row of the input that is changed, and where it lies among the tiles of the layer's own config."""

    row: int
    name: str


def variants(config: Config, length: int) -> dict[str, Config]:
    """One causal layer's config under each of VARIANTS, for `length` keys. Its own selector keeps its attributes; the other one has its
    preset's, with smaller tiles where these would leave nothing to choose (`_fitted`)."""
    shared = {name: getattr(config, name) for name in ("scale", "seed", "exact_below")}
    chosen = {name: _fitted(replace(PRESETS[preset], **shared), length) for name, preset in (("blocks", "blocks"), ("sortlsh", "paper"))}
    chosen[config.selector] = config
    blocks = replace(chosen["blocks"], strict_causal=0)
    return {EXACT: config.exact(), BLOCKS: blocks, STRICT: replace(blocks, strict_causal=1), SORTLSH: chosen["sortlsh"]}


def _fitted(config: Config, length: int) -> Config:
    """The config with local blocks, query blocks and samples halved together until it has keys to choose among `length`; as it is where
    the smallest query blocks leave none either."""
    found = config
    while not approximates(found, length):
        if found.block_size // 2 < RANGES["block_size"][0]:
            return config
        found = replace(found, **{name: getattr(found, name) // 2 for name in ("local_size", "block_size", "sample_size")})
    return found


def name_of(config: Config) -> str:
    """Which of VARIANTS a causal config is."""
    return SORTLSH if config.selector == "sortlsh" else STRICT if config.strict_causal else BLOCKS


def places(config: Config, length: int) -> list[Place]:
    """Rows to change among `length`: start, inside and end of a query block and of a local block, in the last whole local block
    and in the one at half of the sequence, and the last row; descending, row 0 never."""
    size, local = config.block_size, config.local_size
    found = []
    for share in (1, 2):
        end = length // share // local * local
        found += [
            Place(end - 1, BLOCK_END),
            Place(end - size // 2, "inside a query block"),
            Place(end - size, "start of a query block"),
            Place(end - local // 2, "inside a local block"),
            Place(end - local, "start of a local block"),
        ]
    rows = {place.row: place for place in (Place(length - 1, "last row"), *reversed(found)) if 0 < place.row < length}
    return [rows[row] for row in sorted(rows, reverse=True)]


def moved(before: Tensor, after: Tensor, place: Place) -> dict:
    """The rows of [..., S, D] before `place` that are not the same number for number, and by how much: |after - before| / |before|, the
    largest over the leading axes. `farthest`: rows from the earliest of them to the place; `rows` has those that moved most, `runs` the
    first and last row of neighbours that moved, the earliest runs first; at most LISTED of either."""
    parts = zip(*(x[..., : place.row, :].split(_CHUNK, -2) for x in (before, after)), strict=True)
    change = torch.cat([_change(a, b) for a, b in parts])
    rows = change.nonzero().flatten()
    most = rows[change[rows].argsort(descending=True, stable=True)[:LISTED]].tolist()
    return {
        "row": place.row,
        "place": place.name,
        "moved": len(rows),
        "farthest": place.row - int(rows[0]) if len(rows) else 0,
        "largest_change": float(change.max()) if place.row else 0.0,
        "rows": [{"row": row, "change": float(change[row])} for row in most],
        "runs": _runs(rows)[:LISTED],
    }


def _runs(rows: Tensor) -> list[list[int]]:
    """First and last of each run of neighbours among ascending rows int64 [N]."""
    rows = rows.cpu()  # where a tensor is split must lie there
    ends = (rows.diff() > 1).nonzero().flatten() + 1
    return [[int(run[0]), int(run[-1])] for run in rows.tensor_split(ends) if len(run)]


def _change(before: Tensor, after: Tensor) -> Tensor:
    """|after - before| / |before| of each row of [..., S, D], the largest over the leading axes: float64 [S], 0 where no number differs."""
    size = before.double().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    change = (after.double() - before.double()).norm(dim=-1) / size
    return change.reshape(-1, before.shape[-2]).amax(0)


def summary(name: str, config: Config, length: int, output: Outputs, where: Sequence[Place]) -> dict:
    """One variant's row of report.json: every place, and the farthest and the largest of them. `approximates`: it has keys to choose."""
    before = output(None)
    found = [moved(before, output(place.row), place) for place in where]
    return {
        "selector": name,
        "attributes": config.attributes(),
        "approximates": name != EXACT and not config.is_exact(length, length) and approximates(config, length),
        "farthest": max(place["farthest"] for place in found),
        "largest_change": max(place["largest_change"] for place in found),
        "places": found,
    }
