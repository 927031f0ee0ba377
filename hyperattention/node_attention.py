"""The reference's attention over the nodes of selector `sortlsh` (rules 24 to 29 of docs/operator.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperattention.geometry import Geometry
from hyperattention.parts import merge, part
from hyperattention.sortlsh import live_in, taken_keys

QKV = tuple[Tensor, Tensor, Tensor]  # q [Hkv,G,Sq,D], k [Hkv,1,Sk,D], v [Hkv,1,Sk,Dv] of one batch row


class Nodes:
    """All nodes of one batch row: rows [Hq,levels,Sq] and keys [Hkv,levels,Sk] sorted, index and weight [Hq,nodes,samples]."""

    def __init__(self, g: Geometry, length: int, qkv: QKV, rows: Tensor, keys: Tensor, index: Tensor, weight: Tensor) -> None:
        self.g, self.length, self.qkv, self.rows, self.keys, self.index, self.weight = g, length, qkv, rows, keys, index, weight

    def add(self, o: Tensor, lse: Tensor) -> None:
        """Merges every node's part into o [Hq,Sq,Dv] and lse [Hq,Sq]."""
        for n, (level, m) in enumerate(self.g.nodes):
            node = self.g.node(level, m, self.length)
            if len(node.keys):
                order = self.rows[:, level, node.rows.start : node.rows.stop].long()
                key = self.keys[:, level, node.keys.start : node.keys.stop].long()
                live = live_in(node, self.g.live_rows(self.length))
                _Node(self.g, self.qkv, live, key, self.index[:, n], self.weight[:, n]).add(o, lse, order)


class _Node:
    """One node: `key` [Hkv, keys] in sorted order, samples [Hq, sample_size] by their place in it."""

    def __init__(self, g: Geometry, qkv: QKV, live: int, key: Tensor, index: Tensor, weight: Tensor) -> None:
        self.g, self.live, self.key = g, live, key
        self.q, self.k, self.v = qkv
        index, weight = (x.unflatten(0, (g.heads_kv, g.group)) for x in (index, weight))
        self.index, self.weight = index.long(), weight

    def add(self, o: Tensor, lse: Tensor, order: Tensor) -> None:
        """Merges the node's part into its rows; order [Hq, rows]."""
        size = self.g.config.block_size
        head = torch.arange(self.g.heads_q, device=o.device)[:, None]
        for block in range(-(-order.shape[1] // size)):
            row = order[:, block * size : (block + 1) * size]
            found = self._query_block(row.unflatten(0, (self.g.heads_kv, self.g.group)), block)
            if found is None:
                continue
            new_o, new_lse = (x.flatten(0, 1) for x in found)
            o[head, row], lse[head, row] = merge([(o[head, row], lse[head, row]), (new_o, new_lse)])

    def _query_block(self, row: Tensor, block: int) -> tuple[Tensor, Tensor] | None:
        """Heavy keys and samples of the rows [Hkv, G, R] of one query block; None where it meets neither."""
        g, c = self.g, self.g.config
        taken = taken_keys(c, block, self.live, self.key.shape[1])
        parts = []
        if len(taken):
            place = torch.arange(taken.start, taken.stop, device=row.device).expand(g.heads_kv, g.group, -1)
            parts.append(self._keys(row, place, torch.ones(place.shape, device=row.device)))
        if c.sample_size:
            inside = (self.index >= taken.start) & (self.index < taken.stop)
            parts.append(self._keys(row, self.index.clamp(min=0), self.weight.masked_fill(inside, 0.0)))
        return merge(parts) if parts else None

    def _keys(self, row: Tensor, place: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [Hkv, G, R] against the keys at `place` [Hkv, G, N] of the sorted list; a weight of 0 masks."""
        g, c = self.g, self.g.config
        wide = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        kv, group = torch.arange(g.heads_kv, device=row.device)[:, None, None], torch.arange(g.group, device=row.device)[:, None]
        key = self.key[kv, place]
        bias = weight.to(wide).log()[:, :, None].expand(*row.shape, -1)
        if c.causal and c.local_overlap:  # rows of a node may lie in several local blocks
            far = ((row + g.first) // c.local_size - 1).clamp(min=0) * c.local_size
            bias = bias.masked_fill(key[:, :, None] >= far[..., None], -torch.inf)
        return part(self.q[kv, group, row], self.k[kv, 0, key], self.v[kv, 0, key], bias, c.resolved_scale(g.head_dim), wide)
