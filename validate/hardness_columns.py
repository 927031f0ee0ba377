"""alpha of Han et al. 2023 (arXiv 2310.05869, section 2): n times the largest squared norm of a column of the attention matrix.

The norms are estimated, from all rows for the keys near them (a column of text often owes its norm to a few rows beside it) and from
the sampled rows for the others; the largest are computed again over all rows. n is the number of keys: then alpha bounds the
squared Frobenius norm of the matrix, as in the paper.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.geometry import Geometry
from hyperattention.validate.hardness_sets import RowTile

FIRST = 32  # columns that the paper leaves out of alpha (section 4.3)
COLUMNS = 256  # of a head that are computed again, beside the first 64
NODE_COLUMNS = 64  # of a block off the diagonal
NODE_ROWS = 32  # sampled rows that a block off the diagonal needs to be judged
BAND = 128  # rows whose own keys and neighbours are near
_TILE = 2**20  # logits held at once

# (q [1,Hq,Sq,D], k, config) -> LSE [1,Hq,Sq] of exact attention
ExactLse = Callable[[Tensor, Tensor, Config], Tensor]


@dataclass(frozen=True)
class Alphas:
    """Each [Hq]: of the whole matrix, without its first 32 columns, and the largest of its unmasked blocks; NaN where there is none."""

    whole: Tensor
    rest: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class Block:
    """One unmasked block of rows and keys, of which `sampled` rows are sampled, at a level of the dyadic tree."""

    level: int
    rows: range
    keys: range
    sampled: int


def block_tree(g: Geometry) -> Geometry:
    """The problem whose nodes are the blocks off the diagonal: those of the dyadic tree on local blocks (operator rule 24, no overlap)."""
    return replace(g, config=replace(g.config, selector="sortlsh", local_overlap=0, strict_causal=0))


def judged_blocks(g: Geometry, length: int, seen: range, rows: Sequence[int]) -> list[Block]:
    """The blocks off the diagonal, behind the sinks.

    rows: the sampled ones, ascending. Blocks with fewer than 32 of them are left out; there are none where attention is not causal.
    """
    tree, found = block_tree(g), []
    for level, m in tree.nodes if g.config.causal else ():
        node = tree.node(level, m, length)
        inside = range(max(node.rows.start, seen.start), min(node.rows.stop, seen.stop))
        sampled = bisect_left(rows, inside.stop) - bisect_left(rows, inside.start)
        if len(node.keys) and sampled >= NODE_ROWS:
            found.append(Block(level, inside, node.keys, sampled))
    return found


def _is_near(position: Tensor, key: Tensor) -> Tensor:
    """Whether a key lies in the band of the row at `position` or in one beside it: bool [rows, keys]."""
    apart = position[:, None] // BAND - key // BAND
    return apart.abs() <= 1


class ColumnSums:
    """Sums over the sampled rows of the squared probabilities of each column of one batch row.

    The rows of the blocks off the diagonal are normalised over the block's own keys.
    """

    def __init__(self, g: Geometry, length: int, seen: range, rows: Tensor) -> None:
        self.g, self.length, self.seen, self.share = g, length, seen, len(rows) / max(1, len(seen))
        heads = (g.heads_kv, g.group)
        self.sums = torch.zeros(*heads, length, dtype=torch.float64, device=rows.device)
        self.blocks = judged_blocks(g, length, seen, rows.tolist())
        self.block_sums = [torch.zeros(*heads, len(block.keys), dtype=torch.float64, device=rows.device) for block in self.blocks]

    def add(self, logits: Tensor, p: Tensor, tile: RowTile, heads: slice) -> None:
        """Adds the rows of one tile: logits and probabilities p [kv heads, G, R, tile.stop], which it spoils."""
        start = max(0, (tile.rows[0] + self.g.first) // BAND - 1) * BAND  # no key before is near
        key = torch.arange(start, tile.stop, device=p.device)
        p[..., start:].masked_fill_(_is_near(tile.position, key), 0.0)
        self.sums[heads, :, : tile.stop] += p.square_().sum(-2)
        for block, sums in zip(self.blocks, self.block_sums, strict=True):
            some = slice(bisect_left(tile.rows, block.rows.start), bisect_left(tile.rows, block.rows.stop))
            if some.start < some.stop:
                inside = logits[:, :, some, block.keys.start : block.keys.stop].softmax(-1)
                sums[heads] += inside.square_().sum(-2)

    def alphas(self, q: Tensor, k: Tensor, lse: Tensor, exact_lse: ExactLse) -> Alphas:
        """alpha of each query head; q [1,Hq,Sq,D], k [1,Hkv,Sk,D], lse [1,Hq,Sq] of exact attention.

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
        blocks = nothing.unflatten(0, (g.heads_kv, g.group)).clone()
        exact = replace(g.config, causal=0, strict_causal=0).exact()
        for at, heads in self._largest_blocks():
            block = self.blocks[at]
            rows, keys = slice(block.rows.start, block.rows.stop), slice(block.keys.start, block.keys.stop)
            some_q = q.unflatten(1, (g.heads_kv, g.group))[:, heads, :, rows].flatten(1, 2)
            some_k = k[:, heads, keys]
            own = exact_lse(some_q, some_k, exact)
            key = self._largest(self.block_sums[at][heads], NODE_COLUMNS)
            found = self._norms(some_q[0], some_k[0], key, own[0], None).amax(-1) * len(block.keys)
            blocks[heads] = torch.fmax(blocks[heads], found)
        return Alphas(norms.amax(-1).flatten() * self.length, rest, blocks.flatten())

    def _largest_blocks(self) -> list[tuple[int, list[int]]]:
        """Blocks off the diagonal whose alpha the sampled rows say is the largest for a query head: their places, with its key heads."""
        if not self.blocks:
            return []
        weights = [len(block.keys) * len(block.rows) / block.sampled for block in self.blocks]
        told = [sums.amax(-1) * weight for sums, weight in zip(self.block_sums, weights, strict=True)]
        best = torch.stack(told).argmax(0).tolist()  # [Hkv][G]
        chosen = {at: [head for head, group in enumerate(best) if at in group] for at in range(len(self.blocks))}
        return [(at, heads) for at, heads in chosen.items() if heads]

    def _near(self, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        """The part of each column's sum [Hkv, G, keys] that is near, over all rows: q [Hq,Sq,D], k [Hkv,Sk,D], lse [Hq,Sq].

        Bands of rows against their own keys and those beside: one product for as many bands as the tile holds.
        """
        g, wide, heads = self.g, torch.float64 if q.dtype == torch.float64 else torch.float32, (self.g.heads_kv, self.g.group)
        first, last = self.seen.start + g.first, self.seen.stop + g.first  # positions
        low, bands = first // BAND, -(-last // BAND) - first // BAND
        beside = 2 if g.config.causal else 3  # bands of keys that a band of rows meets, from the one before it on
        # Padded to whole bands: a row that is not there has an infinite LSE, and the sums of keys that are not there are cut off.
        rows = torch.zeros(g.heads_q, bands * BAND, g.head_dim, dtype=wide, device=q.device)
        sums_of = torch.full((g.heads_q, bands * BAND), torch.inf, dtype=wide, device=q.device)
        place, seen = slice(first - low * BAND, last - low * BAND), slice(self.seen.start, self.seen.stop)
        rows[:, place], sums_of[:, place] = q[:, seen].to(wide) * g.config.resolved_scale(g.head_dim), lse[:, seen].to(wide)
        keys = torch.zeros(g.heads_kv, (bands + beside - 1) * BAND, g.head_dim, dtype=wide, device=q.device)
        begin = (low - 1) * BAND  # the key that stands first in `keys`
        there = slice(max(0, begin), max(0, min(self.length, begin + keys.shape[1])))
        keys[:, there.start - begin : max(there.start, there.stop) - begin] = k[:, there]
        by_band = rows.unflatten(0, heads).unflatten(2, (bands, BAND)).transpose(1, 2)  # [Hkv, bands, G, BAND, D]
        lse_by_band = sums_of.unflatten(0, heads).unflatten(2, (bands, BAND)).transpose(1, 2)[..., None]
        windows = keys.unfold(1, beside * BAND, BAND)  # [Hkv, bands, D, beside * BAND]
        found = torch.zeros(*heads, bands + beside - 1, BAND, dtype=torch.float64, device=q.device)
        inside = torch.arange(BAND, device=q.device)
        hidden = torch.arange(beside * BAND, device=q.device) > inside[:, None] + BAND
        step = max(1, _TILE // (g.heads_q * BAND * beside * BAND))
        for start in range(0, bands, step):
            some = slice(start, min(start + step, bands))
            p = (by_band[:, some].flatten(2, 3) @ windows[:, some]).unflatten(2, (g.group, BAND)).sub_(lse_by_band[:, some]).exp_()
            if g.config.causal:
                p.masked_fill_(hidden, 0.0)
            columns = p.square_().sum(-2).transpose(1, 2).unflatten(-1, (beside, BAND))  # [Hkv, G, bands, beside, BAND]
            for at in range(beside):
                found[:, :, some.start + at : some.stop + at] += columns[..., at, :]
        total = torch.zeros_like(self.sums)
        total[..., there] = found.flatten(2)[..., there.start - begin : max(there.start, there.stop) - begin]
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
        head = torch.arange(len(k), device=q.device)[:, None, None]
        columns = k[head, key].to(wide).transpose(-1, -2) * g.config.resolved_scale(g.head_dim)
        total = torch.zeros(key.shape, dtype=torch.float64, device=q.device)
        step = max(1, _TILE // key.numel())
        for start in range(0, q.shape[1], step):
            rows = slice(start, start + step)
            p = q[:, rows].to(wide).unflatten(0, key.shape[:2]) @ columns
            p.sub_(lse[:, rows].to(wide).unflatten(0, key.shape[:2])[..., None]).exp_()
            if hidden is not None:
                p.masked_fill_(hidden(rows), 0.0)
            total += p.square_().sum(-2)
        return total
