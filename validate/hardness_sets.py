"""Which keys the exact part (local, sinks, heavy) holds for a few query rows, and from which keys their samples are drawn.

Both follow from a plan by the rules of docs/operator.md (6 to 9, 13, 19, 24 to 29), one batch row at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.geometry import Geometry, Node
from hyperattention.selection import Plan
from hyperattention.sortlsh import live_in, taken_keys


@dataclass(frozen=True)
class RowTile:
    """Some query rows of one local block (`block`; 0 where attention is not causal): they share their draws and their nodes.

    rows: int64 [R], ascending. stop: no row sees a key from here on.
    """

    block: int
    rows: Tensor
    stop: int


class ExactSets:
    """The exact part of the rows of one batch row under `plan`, whose valid keys are `length`."""

    def __init__(self, g: Geometry, plan: Plan, batch: int, length: int) -> None:
        self.g, self.length = g, length
        if g.sorts:
            rows, keys = plan.orders(g)
            self._keys = keys[batch].long()  # [Hkv, levels, Sk]
            self._place = _places(rows[batch])  # [Hq, levels, Sq]
            self._taken: dict[tuple[int, int], Tensor] = {}
        else:
            self._blocks = plan.selection[batch].long()  # [Hq, query blocks, num_blocks]

    def nodes(self, block: int) -> list[Node]:
        """The nodes of `sortlsh` that the rows of local block `block` lie in and that hold keys."""
        levels = range(self.g.config.local_overlap, block.bit_length()) if self.g.config.causal else range(1)
        met = [(level, block >> level >> 1) for level in levels if not self.g.config.causal or block >> level & 1]
        found = (self.g.node(level, m, self.length) for level, m in met)
        return [node for node in found if len(node.keys)]

    def far(self, tile: RowTile) -> int:
        """First key that is not far from the tile's rows (rule 9)."""
        return min(self.g.far(tile.block * self.g.config.local_size, self.length), self.length)

    def mask(self, tile: RowTile, heads: range) -> Tensor:
        """True where the exact part holds the key: bool [kv heads, G, R, tile.stop]; pairs that no row sees are arbitrary.

        `heads` are key heads. A key that is only sampled is not held.
        """
        g, c = self.g, self.g.config
        key = torch.arange(tile.stop, device=tile.rows.device)
        heavy = [part for part in self._heavy(tile, heads) if part.shape[-1]]
        mask = torch.zeros(len(heads), g.group, len(tile.rows), tile.stop + 1, dtype=torch.bool, device=key.device)
        for part in heavy:
            mask.scatter_(-1, part.clamp(max=tile.stop), True)
        mask = mask[..., : tile.stop]
        mask[..., : c.sinks] = True
        if c.causal:
            mask[..., self.far(tile) :] = True
        return mask

    def candidates(self, tile: RowTile, heads: range) -> list[Tensor | slice]:
        """The keys of each draw that the tile's rows share, in the order in which its slices cut them (rule 13).

        `blocks`: one slice of the keys. `sortlsh`: int64 [kv heads, N], for each node.
        """
        g, c = self.g, self.g.config
        if g.sorts:
            head = slice(heads.start, heads.stop)
            return [self._keys[head, node.level, node.keys.start : node.keys.stop] for node in self.nodes(tile.block)]
        return [slice(c.sinks, self.far(tile))] if self.far(tile) > c.sinks else []

    def _heavy(self, tile: RowTile, heads: range) -> list[Tensor]:
        """Keys of the chosen blocks, int64 [kv heads, G, R, N]; places without a key hold Sk."""
        g, size = self.g, self.g.config.block_size
        query_heads = slice(heads.start * g.group, heads.stop * g.group)
        inside = torch.arange(size, device=tile.rows.device)
        if not g.sorts:
            query_block = (tile.rows + g.first) // size - g.query_blocks.start
            chosen = self._blocks[query_heads, query_block].unflatten(0, (-1, g.group))
            key = (chosen[..., None] * size + inside).masked_fill(chosen[..., None] < 0, g.seq_k)
            return [key.flatten(-2).clamp(max=g.seq_k)]
        found = []
        for node in self.nodes(tile.block):
            place = self._place[query_heads, node.level][:, tile.rows] - node.rows.start  # in the node's sorted rows
            bounds = self._bounds(node)[place // size]  # [query heads, R, 2]
            at = bounds[..., :1] + torch.arange(self.g.config.num_blocks * size, device=tile.rows.device)
            order = self._keys[heads.start : heads.stop, node.level, node.keys.start : node.keys.stop].repeat_interleave(g.group, 0)
            key = order[:, None].expand(-1, at.shape[1], -1).gather(-1, at.clamp(max=len(node.keys) - 1))
            found.append(key.masked_fill(at >= bounds[..., 1:], g.seq_k).unflatten(0, (-1, g.group)))
        return found

    def _bounds(self, node: Node) -> Tensor:
        """First place and end of the sorted keys that each query block of the node takes: int64 [query blocks, 2]."""
        name = (node.level, node.rows.start)
        if name not in self._taken:
            live = live_in(node, self.g.live_rows(self.length))
            blocks = range(-(-len(node.rows) // self.g.config.block_size))
            taken = [taken_keys(self.g.config, block, live, len(node.keys)) for block in blocks]
            self._taken[name] = torch.tensor([(t.start, t.stop) for t in taken], device=self._place.device)
        return self._taken[name]


def _places(order: Tensor) -> Tensor:
    """Slot of each row in `order` [Hq, levels, Sq] (-1: an empty slot), the inverse along the last axis: int64, 0 for rows of no slot."""
    size = order.shape[-1]
    inverse = torch.zeros(*order.shape[:-1], size + 1, dtype=torch.long, device=order.device)
    slot = torch.arange(size, device=order.device).expand(order.shape)
    return inverse.scatter_(-1, order.long().masked_fill(order < 0, size), slot)[..., :size]
