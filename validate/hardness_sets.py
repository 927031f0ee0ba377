"""Which keys the exact part (local, sinks, heavy) holds for a few query rows, and from which keys their samples are drawn.

Both follow from a plan by the rules of docs/operator.md (6 to 9, 13, 19, 24 to 29), one batch row at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True)
class TakenKeys:
    """Which sorted keys a row of a tile takes in its node of each level, but for its place among the node's rows, of which it takes those
    of its query block: int32. taken [entries, 2]: first place and end of the keys that a query block takes, of all nodes; row [R, levels]:
    the node's first row; entry [R, levels]: of its first query block. Of no node: a row behind all, whose query block takes nothing.
    """

    taken: Tensor
    row: Tensor
    entry: Tensor


class ExactSets:
    """The exact part of the rows of one batch row under the plan that `plan` makes, whose valid keys are `length`; what follows from
    shapes alone is told without the plan.
    """

    def __init__(self, g: Geometry, plan: Callable[[], Plan], batch: int, length: int) -> None:
        self.g, self.plan, self.batch, self.length = g, plan, batch, length

    @cached_property
    def _blocks(self) -> Tensor:
        """Of `blocks` the chosen ones [Hq, query blocks, num_blocks]."""
        return self.plan().selection[self.batch]

    @cached_property
    def _orders(self) -> tuple[Tensor, Tensor]:
        """Of `sortlsh` the place of each row among the sorted ones [Hq, levels, Sq] and the sorted keys [Hkv, levels, Sk], int32."""
        rows, keys = self.plan().orders(self.g)
        return _places(rows[self.batch]), keys[self.batch]

    def far(self, tile: RowTile) -> Tensor:
        """First key that is not far from each row, int64 [R] (rule 9)."""
        c = self.g.config
        if not c.causal:
            return torch.full_like(tile.at, self.length)
        return ((tile.block - c.local_overlap).clamp(min=0) * c.local_size).clamp(max=self.length)

    def nodes(self, tile: RowTile) -> RowNodes | None:
        """Of `sortlsh` the nodes of the rows, of `blocks` None: what `draws` and `taken_keys` ask for."""
        return row_nodes(self.g, tile, self.length) if self.g.sorts else None

    def draws(self, tile: RowTile, nodes: RowNodes | None) -> tuple[Tensor, Tensor]:
        """First candidate and number of candidates of each row's draws, int64 [R, draws], in the order of `order` (rule 13)."""
        if nodes is not None:
            return nodes.key.T, nodes.keys.T
        sinks = torch.full_like(tile.at, self.g.config.sinks)[:, None]
        return sinks, (self.far(tile)[:, None] - sinks).clamp(min=0)

    def taken_keys(self, nodes: RowNodes) -> TakenKeys:
        """Of the rows of a tile that these are the nodes of, on their device."""
        (taken, *levels), device = self._taken, nodes.row.device
        first, step = (x[nodes.first : nodes.first + len(nodes.number), None].to(device) for x in levels)
        none = nodes.keys == 0
        entry = (first + nodes.number * step).masked_fill(none, len(taken) - 1)
        return TakenKeys(taken.to(device), nodes.row.masked_fill(none, self.g.seq_q).T.int(), entry.T.int())

    @cached_property
    def _taken(self) -> tuple[Tensor, Tensor, Tensor]:
        """First place and end of the sorted keys that each query block of each node takes, int32 [entries, 2], the last of none; and of
        each level the entry of its first node and the entries of a node, int64 [levels]. On the processor."""
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
                found += [(node.keys.start + t.start, node.keys.start + t.stop) for t in taken] + [(0, 0)] * (each[-1] - len(taken))
        return torch.tensor([*found, (0, 0)], dtype=torch.int32), torch.tensor(base), torch.tensor(each)

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

    def order(self, tile: RowTile, heads: range) -> Tensor | None:
        """The first tile.reach (not 0) keys as the slices of the draws cut them, int64 [kv heads, R, reach]; None: as they stand.

        Candidates of different levels do not overlap: a key's level is the highest bit in which its local block differs from the row's.
        """
        if not self.g.sorts:
            return None
        order = self._orders[1][heads.start : heads.stop].long()
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
            return self._blocks.new_zeros(self.g.heads_kv, 1, 1), 0
        return self._orders[1], self.g.config.local_overlap if self.g.config.causal else 0

    def heavy_ranges(self, tile: RowTile, heads: range, taken: TakenKeys | None) -> Tensor:
        """First and stop of the keys of each chosen block, int32 [query heads, R, num_blocks, 2]; with the `taken` keys of `sortlsh` of
        the places, among the sorted keys, of those that each level takes: [query heads, R, levels, 2]."""
        g, some = self.g, slice(heads.start * self.g.group, heads.stop * self.g.group)
        if taken is None:
            block = tile.position // g.config.block_size - g.query_blocks.start
            first = self._blocks[some].index_select(1, block) * g.config.block_size
            return torch.stack([first.clamp(min=0), (first + g.config.block_size).clamp(max=g.seq_k)], -1)  # -1: up to 0
        begin = self.sorted_keys()[1]
        place = self._orders[0][some, begin : begin + taken.row.shape[1]].transpose(1, 2).index_select(1, tile.at)
        return taken.taken[taken.entry + (place - taken.row).clamp(min=0) // g.config.block_size]

    def heavy(self, tile: RowTile, heads: range) -> Tensor:
        """Keys of the chosen blocks, int64 [kv heads, G, R, N]; places without a key hold Sk."""
        g, most, nodes = self.g, self.g.config.block_size, self.nodes(tile)
        ranges = self.heavy_ranges(tile, heads, None if nodes is None else self.taken_keys(nodes)).long()
        if g.sorts:
            most *= g.config.num_blocks
        key = at = ranges[..., :1] + torch.arange(most, device=tile.at.device)
        if g.sorts:
            begin = self.sorted_keys()[1]
            order = self._orders[1][heads.start : heads.stop, begin : begin + at.shape[2]].long().repeat_interleave(g.group, 0)
            key = order[:, None].expand(-1, at.shape[1], -1, -1).gather(-1, at.clamp(max=g.seq_k - 1))
        return key.masked_fill(at >= ranges[..., 1:], g.seq_k).flatten(-2).unflatten(0, (-1, g.group))


def _places(order: Tensor) -> Tensor:
    """Slot of each row in `order` [Hq, levels, Sq] (-1: an empty slot), the inverse along the last axis: int32, 0 for rows of no slot."""
    size = order.shape[-1]
    inverse = torch.zeros(*order.shape[:-1], size + 1, dtype=torch.int32, device=order.device)
    slot = torch.arange(size, dtype=torch.int32, device=order.device).expand(order.shape)
    return inverse.scatter_(-1, order.masked_fill(order < 0, size).long(), slot)[..., :size]


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
