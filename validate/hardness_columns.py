"""alpha of Han et al. 2023 (arXiv 2310.05869, section 2): n times the largest squared norm of a column of the attention matrix.

The norms are estimated, from all rows for the keys near them (a column of text often owes its norm to a few rows beside it) and from
the sampled rows for the others; the largest are computed again over all rows. n is the number of keys: then alpha bounds the
squared Frobenius norm of the matrix, as in the paper.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.geometry import Geometry
from hyperattention.validate.hardness_sets import RowTile

FIRST = 32  # columns that the paper leaves out of alpha (section 4.3)
COLUMNS = 256  # of a head that are computed again, beside the first 64
NODE_COLUMNS = 64  # of each block off the diagonal
NODE_ROWS = 32  # sampled rows that a block off the diagonal needs to be judged
BAND = 128  # rows whose own keys and neighbours are near
_TILE = {"cpu": 2**20, "cuda": 2**24}  # logits held at once
_BANDS = {"cpu": 1, "cuda": 8}  # taken at once: more logits that are not near, but fewer launches

# (q [1,Hq,Sq,D], k, v, config) -> LSE [1,Hq,Sq] of exact attention
ExactLse = Callable[[Tensor, Tensor, Tensor, Config], Tensor]


@dataclass(frozen=True)
class Alphas:
    """Each [Hq]: of the whole matrix, without its first 32 columns, and the largest of its unmasked blocks; NaN where there is none."""

    whole: Tensor
    rest: Tensor
    blocks: Tensor


class _Node:
    """One unmasked block of rows and keys, and its estimated column sums [Hkv, G, keys]."""

    def __init__(self, rows: range, keys: range, sums: Tensor) -> None:
        self.rows, self.keys, self.sums = rows, keys, sums


def _is_near(position: Tensor, key: Tensor) -> Tensor:
    """Whether a key lies in the band of the row at `position` or in one beside it: bool [rows, keys]."""
    apart = position[:, None] // BAND - key // BAND
    return apart.abs() <= 1


class ColumnSums:
    """Sums over the sampled rows of the squared probabilities of each column of one batch row.

    The blocks off the diagonal are those of the dyadic tree on local blocks (operator rule 24, no overlap), behind the sinks;
    their rows are normalised over the block's own keys. Blocks with fewer than 32 sampled rows are left out.
    """

    def __init__(self, g: Geometry, length: int, seen: range, rows: Tensor) -> None:
        self.g, self.length, self.seen, self.share = g, length, seen, len(rows) / max(1, len(seen))
        heads = (g.heads_kv, g.group)
        self.sums = torch.zeros(*heads, length, dtype=torch.float64, device=rows.device)
        self.nodes: dict[tuple[int, int], _Node] = {}
        at = rows.tolist()
        tree = replace(g, config=replace(g.config, selector="sortlsh", local_overlap=0))
        for level, m in tree.nodes if g.config.causal else ():
            node = tree.node(level, m, length)
            inside = range(max(node.rows.start, seen.start), min(node.rows.stop, seen.stop))
            if len(node.keys) and bisect_left(at, inside.stop) - bisect_left(at, inside.start) >= NODE_ROWS:
                room = torch.zeros(*heads, len(node.keys), dtype=torch.float64, device=rows.device)
                self.nodes[level, m] = _Node(inside, node.keys, room)

    def add(self, logits: Tensor, p: Tensor, tile: RowTile, heads: slice) -> None:
        """Adds the rows of one tile: logits and probabilities p [kv heads, G, R, tile.stop], which it spoils."""
        start = max(0, tile.block * self.g.config.local_size // BAND - 1) * BAND  # no key before is near
        key = torch.arange(start, tile.stop, device=p.device)
        p[..., start:].masked_fill_(_is_near(tile.rows + self.g.first, key), 0.0)
        self.sums[heads, :, : tile.stop] += (p * p).sum(-2)
        for level in range(tile.block.bit_length() if self.g.config.causal else 0):
            node = self.nodes.get((level, tile.block >> level >> 1)) if tile.block >> level & 1 else None
            if node:
                inside = logits[..., node.keys.start : node.keys.stop].softmax(-1)
                node.sums[heads] += (inside * inside).sum(-2)

    def alphas(self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, exact_lse: ExactLse) -> Alphas:
        """alpha of each query head; q [1,Hq,Sq,D], k [1,Hkv,Sk,D], v [1,Hkv,Sk,Dv], lse [1,Hq,Sq] of exact attention.

        A lower bound: the largest column is missed where 256 others look larger.
        """
        g, seen = self.g, slice(self.seen.start, self.seen.stop)
        nothing = torch.full((g.heads_q,), torch.nan, dtype=torch.float64, device=q.device)
        if not self.seen:
            return Alphas(nothing, nothing, nothing)
        key = self._largest(self._near(q[0], k[0], lse[0]) + self.sums / self.share, COLUMNS, always=2 * FIRST)
        position = torch.arange(self.seen.start, self.seen.stop, device=q.device)[:, None] + g.first
        hidden = (lambda rows: key[:, :, None] > position[rows]) if g.config.causal else None
        norms = self._norms(q[0, :, seen], k[0], key, lse[0, :, seen], hidden)
        late = norms.masked_fill(key < FIRST, -torch.inf).amax(-1).flatten()
        rest = torch.where(late > -torch.inf, late * self.length, torch.nan)
        blocks = nothing
        exact = replace(g.config, causal=0).exact()
        for node in self.nodes.values():
            rows, keys = slice(node.rows.start, node.rows.stop), slice(node.keys.start, node.keys.stop)
            inside = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            own = exact_lse(*inside, exact)
            key = self._largest(node.sums, NODE_COLUMNS)
            found = self._norms(inside[0][0], inside[1][0], key, own[0], None).amax(-1).flatten() * len(node.keys)
            blocks = torch.fmax(blocks, found)
        return Alphas(norms.amax(-1).flatten() * self.length, rest, blocks)

    def _near(self, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        """The part of each column's sum [Hkv, G, keys] that is near, over all rows: q [Hq,Sq,D], k [Hkv,Sk,D], lse [Hq,Sq]."""
        g, first, last = self.g, self.seen.start + self.g.first, self.seen.stop + self.g.first  # positions
        total, size = torch.zeros_like(self.sums), BAND * _BANDS[q.device.type]
        for start in range(first // size * size, last, size):
            low, high = max(first, start), min(last, start + size)
            rows, position = slice(low - g.first, high - g.first), torch.arange(low, high, device=q.device)
            stop = start + size + (0 if g.config.causal else BAND)
            key = torch.arange(max(0, start - BAND), min(stop, self.length), device=q.device)
            if len(key):
                hidden = ~_is_near(position, key)
                if g.config.causal:
                    hidden |= key > position[:, None]
                each = key.expand(g.heads_kv, g.group, -1)
                total[..., key] += self._norms(q[:, rows], k, each, lse[:, rows], hidden.__getitem__)
        return total

    @staticmethod
    def _largest(sums: Tensor, count: int, always: int = 0) -> Tensor:
        """Columns with the `count` largest sums [Hkv, G, n], and the first `always`: int64 [Hkv, G, columns], some perhaps twice."""
        n = sums.shape[-1]
        first = torch.arange(min(always, n), device=sums.device).expand(*sums.shape[:-1], -1)
        return torch.cat([first, sums.topk(min(count, n)).indices], -1)

    def _norms(self, q: Tensor, k: Tensor, key: Tensor, lse: Tensor, hidden: Callable[[slice], Tensor] | None) -> Tensor:
        """Squared norms [Hkv, G, C] of the columns `key` over the rows of q [Hq,S,D]; k [Hkv,n,D], key [Hkv,G,C], lse [Hq,S].

        `hidden`: of some of the rows the pairs that do not count, bool [..., rows, C]; None: all do.
        """
        g, wide = self.g, torch.float64 if q.dtype == torch.float64 else torch.float32
        head = torch.arange(g.heads_kv, device=q.device)[:, None, None]
        columns = k[head, key].to(wide).transpose(-1, -2) * g.config.resolved_scale(g.head_dim)
        total = torch.zeros(key.shape, dtype=torch.float64, device=q.device)
        step = max(1, _TILE[q.device.type] // key.numel())
        for start in range(0, q.shape[1], step):
            rows = slice(start, start + step)
            logits = q[:, rows].to(wide).unflatten(0, key.shape[:2]) @ columns
            p = torch.exp(logits - lse[:, rows].to(wide).unflatten(0, key.shape[:2])[..., None])
            if hidden is not None:
                p.masked_fill_(hidden(rows), 0.0)
            total += (p * p).sum(-2)
        return total
