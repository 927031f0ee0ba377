"""The operator a third time: a few rows of a problem of any length, each over all keys at once, in torch on any device.

oracle.py spells out every pair of a small problem; this does the same for chosen rows of a large one, from docs/operator.md alone
(rules by number) and without the package's code. One batch row without lengths, as many queries as keys. Only `Config`'s attribute
values are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.config import Config


@dataclass(frozen=True)
class HeadPlan:
    """What one query head follows: chosen blocks [tiles, num_blocks] of `blocks`, sorted rows and keys [levels, S] of `sortlsh`, and
    samples [draws, sample_size]; all of it empty where attention is exact.
    """

    chosen: tuple[Tensor, ...]
    index: Tensor
    weight: Tensor


def weights(c: Config, plan: HeadPlan, rows: Tensor, n: int) -> Tensor:
    """Weight of each of the `n` keys for each of `rows` [R], fp64 [R, n]: 0 where they do not meet, the slice's length for a sample."""
    key, row = torch.arange(n, device=rows.device), rows[:, None]
    visible = key <= row if c.causal else torch.ones_like(key <= row)
    if n <= c.exact_below:  # (5)
        return visible.double()
    far = (row // c.local_size - c.local_overlap).clamp(min=0) * c.local_size if c.causal else torch.full_like(row, n)  # (7, 9)
    local = visible & (key >= far) if c.causal else torch.zeros_like(visible)
    w = (local | (key < far.clamp(max=c.sinks))).double()
    (_add_blocks if c.selector == "blocks" else _add_nodes)(w, c, plan, row, far)
    return w


def _add_blocks(w: Tensor, c: Config, plan: HeadPlan, row: Tensor, far: Tensor) -> None:
    """Chosen blocks and samples of a local block (13, 16, 19)."""
    key, b = torch.arange(w.shape[1], device=w.device), c.block_size
    chosen = plan.chosen[0][row[:, 0] // b].long()
    inside = torch.zeros(len(w), -(-len(key) // b) + 1, dtype=torch.bool, device=w.device)
    inside.scatter_(1, chosen.where(chosen >= 0, inside.shape[1] - 1), True)  # the last column: no block
    w += inside[:, :-1].repeat_interleave(b, 1)[:, : len(key)] & (key >= c.sinks) & (key < far)
    draw = row[:, 0] // c.local_size * c.causal
    index, weight = plan.index[draw].long(), plan.weight[draw]
    at = index.clamp(min=0)
    free = (index >= 0) & (w.gather(1, at) == 0)
    w.scatter_add_(1, at, weight.double() * free)


def _add_nodes(w: Tensor, c: Config, plan: HeadPlan, row: Tensor, far: Tensor) -> None:
    """Heavy keys and samples of every node that a row lies in, level by level (24, 25, 28, 29)."""
    n, b, seen = w.shape[1], c.block_size, 0
    for level, (row_order, key_order) in enumerate(zip(*plan.chosen, strict=True)):
        if level < c.local_overlap * c.causal:  # its keys are the rows' local part, it is not drawn for
            continue
        size = c.local_size << level if c.causal else n
        segment = row // size
        here = segment % 2 == 1 if c.causal else segment == 0
        node = (segment - 1).clamp(min=0) // 2 * c.causal
        middle = (2 * node + 1) * size * c.causal  # first row; the keys end there
        first_key = (2 * node * size).clamp(min=c.sinks)
        keys = ((middle if c.causal else torch.full_like(node, n)) - first_key).clamp(min=0)
        count = (middle + size).clamp(max=n) - middle  # rows
        slot = torch.zeros(n, dtype=torch.long, device=w.device)
        placed = (row_order >= 0).nonzero()[:, 0]
        slot[row_order[placed].long()] = placed
        block = (slot[row] - middle) // b
        row_blocks, key_blocks = (-(-count // b)).clamp(min=1), -(-keys // b)
        centre = torch.minimum((2 * block + 1) * key_blocks // (2 * row_blocks), key_blocks - 1)
        taken = key_blocks.clamp(max=c.num_blocks)
        start = torch.minimum(centre - taken // 2, key_blocks - taken).clamp(min=0)

        def add(place: Tensor, weight: Tensor, meets: Tensor) -> None:
            meets = meets & here & (place < keys)
            key = key_order[(first_key + place).where(meets, 0)].long()
            w.scatter_add_(1, key.where(meets, 0), weight.double() * (meets & (key < far)))

        place = start * b + torch.arange(c.num_blocks * b, device=w.device)
        add(place, torch.ones_like(place), place < (start + taken) * b)
        draw = (seen + node[:, 0]).where(here[:, 0], 0)
        place, weight = plan.index[draw].long(), plan.weight[draw]
        outside = (place // b < start) | (place // b >= start + taken)
        add(place, weight, (place >= 0) & outside)
        seen += -(-n // size) // 2


def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor, scale: float, narrow: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """O [R, Dv] and LSE [R] of rows q [R, D] over all keys under `w`: fp64, or a naive twin in fp32 that rounds probabilities and O to
    `narrow`. Its logits are not rounded, as they never leave a matrix unit in fewer bits: rounded, they would forgive far more.
    """
    wide = torch.float32 if narrow else torch.float64

    def rounded(x: Tensor) -> Tensor:
        return x.to(narrow).to(wide) if narrow else x

    q, k, v = (x.to(wide) for x in (q, k, v))
    logits = (q @ k.T) * scale + w.log().to(wide)
    largest = logits.amax(1, keepdim=True)
    largest = largest.where(largest > -math.inf, 0)
    p = rounded((logits - largest).exp())
    total = p.sum(1)
    return rounded((p @ v) / total.where(total > 0, 1)[:, None]), total.log() + largest[:, 0]
