"""Which keys the exact part (local, sinks, heavy) holds for a few query rows, and from which keys their samples are drawn.

Both follow from a plan by the rules of docs/operator.md (6 to 9, 13, 19, 24 to 29), one batch row at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.geometry import Geometry
from hyperattention.selection import Plan
from hyperattention.sortlsh import live_in, taken_keys


@dataclass(frozen=True)
class RowTile:
    """Some query rows of one batch row, ascending; a few launches serve all of them, whatever their local blocks.

    rows: their numbers. at, position, block: int64 [R], the same on the device, their positions, and their local blocks (0 where
    attention is not causal). stop: no row sees a key from here on. reach: of the keys before it some may be in no local part.
    """

    rows: tuple[int, ...]
    at: Tensor
    position: Tensor
    block: Tensor
    stop: int
    reach: int

    @classmethod
    def of(cls, g: Geometry, rows: Sequence[int], length: int, device: torch.device) -> "RowTile":
        """The tile of `rows`, of which there is at least one, under `length` valid keys."""
        at, size, last = torch.tensor(rows, device=device), g.config.local_size, rows[-1] + g.first
        if not g.config.causal:
            return cls(tuple(rows), at, at, torch.zeros_like(at), length, length)
        stop = min(length, last + 1)
        return cls(tuple(rows), at, at + g.first, (at + g.first) // size, stop, min(stop, last // size * size))


@dataclass(frozen=True)
class RowNodes:
    """Of each row of a tile its node of `sortlsh` at each level from `first` on, int64 [levels, R]: the node's number, its first row, its
    first key, its keys. A row that lies in no node of a level has 0 keys there.
    """

    first: int
    number: Tensor
    row: Tensor
    key: Tensor
    keys: Tensor


class ExactSets:
    """The exact part of the rows of one batch row under `plan`, whose valid keys are `length`."""

    def __init__(self, g: Geometry, plan: Plan, batch: int, length: int) -> None:
        self.g, self.length = g, length
        if g.sorts:
            rows, keys = plan.orders(g)
            self._keys = keys[batch].long()  # [Hkv, levels, Sk]
            self._place = _places(rows[batch])  # [Hq, levels, Sq]
            self._taken, self._base, self._blocks_of = self._taken_keys()
        else:
            self._blocks = plan.selection[batch].long()  # [Hq, query blocks, num_blocks]

    def mask(self, tile: RowTile, heads: range) -> Tensor:
        """True where the exact part holds the key: bool [kv heads, G, R, tile.stop]; pairs that no row sees are arbitrary.

        `heads` are key heads. A key that is only sampled is not held.
        """
        c = self.g.config
        mask = torch.zeros(len(heads), self.g.group, len(tile.rows), tile.stop + 1, dtype=torch.bool, device=tile.at.device)
        heavy = self.heavy(tile, heads)
        if heavy.shape[-1]:
            mask.scatter_(-1, heavy.clamp(max=tile.stop), True)
        mask = mask[..., : tile.stop]
        mask[..., : c.sinks] = True
        if c.causal:
            low = min(self.g.far(tile.rows[0] + self.g.first, self.length), tile.stop)
            mask[..., low:] |= torch.arange(low, tile.stop, device=mask.device) >= self.far(tile)[:, None]
        return mask

    def draws(self, tile: RowTile) -> tuple[Tensor, Tensor]:
        """First candidate and number of candidates of each row's draws, int64 [R, draws], in the order of `order` (rule 13)."""
        if self.g.sorts:
            nodes = row_nodes(self.g, tile, self.length)
            return nodes.key.T, nodes.keys.T
        sinks = torch.full_like(tile.at, self.g.config.sinks)[:, None]
        return sinks, (self.far(tile)[:, None] - sinks).clamp(min=0)

    def order(self, tile: RowTile, heads: range) -> Tensor | None:
        """The first tile.reach (not 0) keys as the slices of the draws cut them, int64 [kv heads, R, reach]; None: as they stand.

        Candidates of different levels do not overlap: a key's level is the highest bit in which its local block differs from the row's.
        """
        if not self.g.sorts:
            return None
        order = self._keys[heads.start : heads.stop]
        if self.g.config.causal:
            key = torch.arange(tile.reach, device=tile.at.device)
            differ = tile.block[:, None] ^ (key // self.g.config.local_size)
            level = (torch.frexp(differ.double()).exponent - 1).clamp(0, order.shape[1] - 1)
            found = order[:, level, key]
        else:
            found = order[:, :1, : tile.reach].expand(-1, len(tile.rows), -1)
        return found.clamp(0, tile.reach - 1)  # a place that is no candidate's may hold no key

    def sorted_keys(self) -> tuple[Tensor, int]:
        """Of `sortlsh` the sorted keys of each level, int32 [Hkv, levels, Sk], and the level of the first draw; of `blocks` nothing."""
        if not self.g.sorts:
            return self._blocks.new_zeros(self.g.heads_kv, 1, 1, dtype=torch.int32), 0
        return self._keys.int(), self.g.config.local_overlap if self.g.config.causal else 0

    def far(self, tile: RowTile) -> Tensor:
        """First key that is not far from each row, int64 [R] (rule 9)."""
        c = self.g.config
        if not c.causal:
            return torch.full_like(tile.at, self.length)
        return ((tile.block - c.local_overlap).clamp(min=0) * c.local_size).clamp(max=self.length)

    def heavy(self, tile: RowTile, heads: range) -> Tensor:
        """Keys of the chosen blocks, int64 [kv heads, G, R, N]; places without a key hold Sk."""
        g, size = self.g, self.g.config.block_size
        query_heads = slice(heads.start * g.group, heads.stop * g.group)
        if not g.sorts:
            inside = torch.arange(size, device=tile.at.device)
            chosen = self._blocks[query_heads, tile.position // size - g.query_blocks.start].unflatten(0, (-1, g.group))
            key = (chosen[..., None] * size + inside).masked_fill(chosen[..., None] < 0, g.seq_k)
            return key.flatten(-2).clamp(max=g.seq_k)
        nodes, inside = row_nodes(g, tile, self.length), torch.arange(g.config.num_blocks * size, device=tile.at.device)
        levels = slice(nodes.first, nodes.first + len(nodes.number))
        place = (self._place[query_heads, levels][..., tile.at] - nodes.row).clamp(min=0)  # [query heads, levels, R], in the node's rows
        entry = self._base[levels, None] + nodes.number * self._blocks_of[levels, None] + place // size
        bounds = self._taken[entry.clamp(max=len(self._taken) - 1)]  # [query heads, levels, R, 2]
        at = bounds[..., :1] + inside
        order = self._keys[heads.start : heads.stop, levels].repeat_interleave(g.group, 0)[:, :, None].expand(-1, -1, len(tile.rows), -1)
        key = order.gather(-1, (nodes.key[..., None] + at).clamp(max=g.seq_k - 1))
        none = (at >= bounds[..., 1:]) | (nodes.keys == 0)[..., None]
        return key.masked_fill(none, g.seq_k).transpose(1, 2).flatten(-2).unflatten(0, (-1, g.group))

    def _taken_keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """First place and end of the sorted keys that each query block of each node takes, int64 [entries, 2], and of each level the
        entry of its first node and the entries of a node, int64 [levels]."""
        g, live, found, base, each = self.g, self.g.live_rows(self.length), [], [], []
        for level in range(g.levels):
            rows = g.config.local_size << level if g.config.causal else g.seq_q
            base.append(len(found))
            each.append(-(-rows // g.config.block_size))
            numbers = [m for at, m in g.nodes if at == level]
            for m in range(max(numbers, default=-1) + 1):
                node = g.node(level, m, self.length)
                blocks = range(-(-len(node.rows) // g.config.block_size) if m in numbers else 0)
                taken = [taken_keys(g.config, block, live_in(node, live), len(node.keys)) for block in blocks]
                found += [(t.start, t.stop) for t in taken] + [(0, 0)] * (each[-1] - len(taken))
        device = self._place.device
        return torch.tensor(found or [(0, 0)], device=device), torch.tensor(base, device=device), torch.tensor(each, device=device)


def _places(order: Tensor) -> Tensor:
    """Slot of each row in `order` [Hq, levels, Sq] (-1: an empty slot), the inverse along the last axis: int64, 0 for rows of no slot."""
    size = order.shape[-1]
    inverse = torch.zeros(*order.shape[:-1], size + 1, dtype=torch.long, device=order.device)
    slot = torch.arange(size, device=order.device).expand(order.shape)
    return inverse.scatter_(-1, order.long().masked_fill(order < 0, size), slot)[..., :size]


def row_nodes(g: Geometry, tile: RowTile, length: int) -> RowNodes:
    """The nodes of the rows of a tile under `length` valid keys; at least one level."""
    c, sinks = g.config, min(g.config.sinks, length)
    if not c.causal:
        nothing = torch.zeros_like(tile.at)[None]
        return RowNodes(0, nothing, nothing, nothing + sinks, nothing + (length - sinks))
    last = (tile.rows[-1] + g.first) // c.local_size
    level = torch.arange(c.local_overlap, max(last.bit_length(), c.local_overlap + 1), device=tile.at.device)[:, None]
    number, size = tile.block >> level >> 1, c.local_size << level
    middle = (2 * number + 1) * size
    first = (middle - size).clamp(min=sinks)
    keys = (middle.clamp(max=length) - first).clamp(min=0) * (tile.block >> level & 1)
    return RowNodes(c.local_overlap, number, (middle - g.first).clamp(min=0), first, keys)
