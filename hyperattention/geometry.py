"""Sizes of one problem and where its tiles and nodes lie. The rules are numbered in docs/operator.md."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hyperattention.config import Config
from hyperattention.errors import UsageError


@dataclass(frozen=True)
class Node:
    """One node of `sortlsh`'s dyadic tree (rules 24 and 25): unmasked attention of its rows over its keys.

    rows: query row indices, live and dead. keys: behind the sinks and inside the length. start: of its draws (rule 11).
    """

    level: int
    rows: range
    keys: range
    start: int


@dataclass(frozen=True)
class Geometry:
    """Sizes of one problem and where its tiles lie. Positions are aligned bottom-right when causal (rule 1)."""

    config: Config
    batch: int
    heads_q: int
    heads_kv: int
    seq_q: int
    seq_k: int
    head_dim: int
    head_dim_v: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> "Geometry":
        """Checks Q [B,Hq,Sq,D], K [B,Hkv,Sk,D], V [B,Hkv,Sk,Dv], lengths [B]; UsageError names what is wrong."""
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
            raise UsageError(f"Q, K, V have {q.dim()}, {k.dim()}, {v.dim()} dimensions; each takes 4: batch, heads, sequence, head size")
        (b, hq, sq, d), (bk, hkv, sk, dk), (bv, hv, sv, dv) = q.shape, k.shape, v.shape
        if not b == bk == bv:
            raise UsageError(f"batch sizes of Q, K, V are {b}, {bk}, {bv}; they must be equal")
        if d != dk:
            raise UsageError(f"head size of Q is {d}, of K {dk}; they must be equal")
        if hkv != hv or sk != sv:
            raise UsageError(f"K has {hkv} heads of {sk} keys, V {hv} heads of {sv}; they must be equal")
        if hkv == 0 or hq % hkv:
            raise UsageError(f"{hq} query heads over {hkv} key heads; the first must be a multiple of the second")
        if lengths is not None and tuple(lengths.shape) != (b,):
            raise UsageError(f"lengths has shape {tuple(lengths.shape)}; it takes one length a batch row: ({b},)")
        return cls(config, b, hq, hkv, sq, sk, d, dv)

    @property
    def group(self) -> int:
        return self.heads_q // self.heads_kv

    @property
    def exact(self) -> bool:
        return self.config.is_exact(self.seq_q, self.seq_k)

    @property
    def first(self) -> int:
        """Position of query row 0 (rule 1)."""
        return self.seq_k - self.seq_q if self.config.causal else 0

    def tiles(self, size: int) -> range:
        """Indices of the position tiles of `size` that hold a query row."""
        if self.seq_q == 0:
            return range(0)
        return range(self.first // size, (self.first + self.seq_q - 1) // size + 1)

    @property
    def query_blocks(self) -> range:
        return self.tiles(self.config.block_size)

    def query_pools(self, rows: int) -> range:
        """Query pools of `rows` rows of the selector `blocks`, counted from position 0.

        Strict: the one before the first query block is the call's row 0 alone (rule 22).
        """
        tiles = self.tiles(rows)
        if self.config.strict_causal and tiles:
            return range(self.query_blocks.start * self.config.block_size // rows - 1, tiles.stop)
        return tiles

    @property
    def local_blocks(self) -> range:
        return self.tiles(self.config.local_size) if self.config.causal else range(1)

    @property
    def sorts(self) -> bool:
        return self.config.selector == "sortlsh"

    @property
    def levels(self) -> int:
        """Levels of the dyadic tree of local blocks (rules 24 and 25)."""
        if not self.config.causal:
            return 1
        return (max(self.seq_k - 1, 0) // self.config.local_size).bit_length()

    @property
    def nodes(self) -> list[tuple[int, int]]:
        """(level, m) of each node that holds a query row, in the order of the draws; none on the exact path.

        Node m of a level has its rows in segment 2m + 1 of 2^level local blocks and its keys in segment 2m. With overlap
        the keys of level 0 are the rows' local part.
        """
        c, last = self.config, self.first + self.seq_q - 1
        if self.exact or self.seq_q == 0 or last < 0:
            return []
        if not c.causal:
            return [(0, 0)]
        found = []
        for level in range(c.local_overlap, self.levels):
            size = c.local_size << level
            found += [(level, m) for m in range(max(self.first, 0) // size // 2, (last // size + 1) // 2)]
        return found

    @property
    def order_shapes(self) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """Shapes of a `sortlsh` plan's sorted rows [B, Hq, levels, Sq] and keys [B, Hkv, levels, Sk]; no levels on the exact path."""
        levels = 0 if self.exact else self.levels
        return (self.batch, self.heads_q, levels, self.seq_q), (self.batch, self.heads_kv, levels, self.seq_k)

    def node(self, level: int, m: int, length: int) -> "Node":
        """Rows and keys of one node under `length` valid keys."""
        c, sinks = self.config, min(self.config.sinks, length)
        if not c.causal:
            return Node(level, range(self.seq_q), range(sinks, length), 0)
        size = c.local_size << level
        middle = (2 * m + 1) * size
        rows = range(max(middle - self.first, 0), min(middle + size - self.first, self.seq_q))
        return Node(level, rows, range(max(middle - size, sinks), min(middle, length)), middle)

    def draws(self, length: int) -> list[tuple[int, int]]:
        """(start, number of candidates) of each draw of samples (rules 11 and 13)."""
        if self.exact:
            return []
        if self.sorts:
            nodes = (self.node(level, m, length) for level, m in self.nodes)
            return [(node.start, len(node.keys)) for node in nodes]
        starts = [n * self.config.local_size * self.config.causal for n in self.local_blocks]
        return [(start, max(0, min(self.far(start, length), length) - self.config.sinks)) for start in starts]

    def far(self, position: int, length: int) -> int:
        """First key that is not local to `position` (rule 9)."""
        if not self.config.causal:
            return length
        c = position // self.config.local_size
        return max(0, c - self.config.local_overlap) * self.config.local_size

    def clamp(self, lengths: Tensor | None) -> list[int]:
        """Valid keys of each batch row (rule 2)."""
        if lengths is None:
            return [self.seq_k] * self.batch
        return [min(max(int(n), 0), self.seq_k) for n in lengths.tolist()]

    def live_rows(self, length: int) -> int:
        """Query rows from the start that are live; the rest are dead (rule 3)."""
        if self.config.causal or self.seq_q == self.seq_k:
            return min(max(length - self.first, 0), self.seq_q)
        return self.seq_q
