"""Hardness on a GPU: the numbers of hardness_rows.py and hardness_columns.py by a few kernels for all heads at once.

The sampled rows' logits are computed once and read by two kernels; columns and blocks off the diagonal are computed from Q and K
without being stored. Nothing waits for the GPU but the copy of the result.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from hyperattention.validate import hardness_kernels
from hyperattention.validate.hardness_columns import BAND, COLUMNS, FIRST, NODE_COLUMNS, Alphas, block_tree, judged_blocks
from hyperattention.validate.hardness_rows import TOP, RowNumbers
from hyperattention.validate.hardness_sets import ExactSets, RowTile, row_nodes

kernels: Any = hardness_kernels  # their annotations say what a kernel sees, not what starts it
LOGITS = 2**28  # of the sampled rows that are held at once
SPLITS = 16  # of the rows of chosen columns


class FusedHardness:
    """One batch row: q [Hq,Sq,D], k [Hkv,Sk,D] of one dtype, fp16, bf16 or fp32; lse [Hq,Sq]: of exact attention.

    rows: the sampled ones, ascending, at least one; seen: the live rows that see a key; sets: what the plan takes exactly.
    """

    def __init__(self, q: Tensor, k: Tensor, lse: Tensor, sets: ExactSets, seen: range, rows: list[int]) -> None:
        self.q, self.k, self.lse = q.contiguous(), k.contiguous(), lse.float().contiguous()
        self.sets, self.seen, self.rows, self.g, self.length = sets, seen, rows, sets.g, sets.length
        self.scale, self.device = self.g.config.resolved_scale(self.g.head_dim), q.device
        self.dim = max(16, triton.next_power_of_2(self.g.head_dim))
        # Rows and keys of a product: what shared memory holds.
        self.size, self.lse_rows = (64, 128) if self.dim * q.element_size() <= 256 else (32, 32)
        self._describe_rows()
        self.sums = torch.zeros(self.g.heads_q, self.length, device=self.device)
        self.block_sums = torch.zeros(self.g.heads_q, self.levels, self.length, device=self.device)

    def _describe_rows(self) -> None:
        """What the sampled rows are, int32 on the device: found on the processor and copied once, for all heads."""
        g, config, sets = self.g, self.g.config, self.sets
        tile = RowTile.of(g, self.rows, self.length, torch.device("cpu"))
        blocks, far = row_nodes(block_tree(g), tile, self.length), sets.far(tile)
        self.levels = len(blocks.number) if config.causal else 0
        self.local = config.local_size if config.causal else self.length
        last = tile.position if config.causal else torch.full_like(far, self.length - 1)
        edge = [bisect_left(self.rows, n * self.local - g.first) for n in range(-(-tile.stop // self.local))] if config.causal else [0]
        draws = sets.draws(tile) if config.sample_size else (far[:, None][:, :0],) * 2
        own = [tile.at, tile.position, tile.block, far, last, tile.block * self.local, torch.tensor([*edge, len(self.rows)])]
        tables = self._copied([*own, blocks.key[: self.levels].T, blocks.keys[: self.levels].T, *draws])
        at, self.position, block, self.far, self.last, self.own_first, self.edge, *rest = tables
        self.block_first, self.block_keys, self.draw_first, self.draw_count = rest
        self.tile = replace(tile, at=at.long(), position=self.position.long(), block=block.long())
        self.order, self.order_first = sets.sorted_keys()
        self.width = min(512, max(16, triton.next_power_of_2(-(-self.length // max(1, min(config.sample_size, self.length))))))

    def _copied(self, tables: list[Tensor]) -> tuple[Tensor, ...]:
        """Tables of the processor on the device, int32, without waiting for it."""
        line = torch.cat([table.int().flatten() for table in tables]).to(self.device, non_blocking=True)
        parts = line.split([table.numel() for table in tables])
        return tuple(part.view(table.shape) for part, table in zip(parts, tables, strict=True))

    def measure(self) -> tuple[RowNumbers, Alphas]:
        """Numbers [Hq, rows] of the sampled rows, and alpha of each query head; float64, on the CPU."""
        heads = max(1, LOGITS // (self.g.group * len(self.rows) * self.tile.stop))
        parts = [self._rows(range(at, min(at + heads, self.g.heads_kv))) for at in range(0, self.g.heads_kv, heads)]
        numbers, alphas = torch.cat(parts, 1), self._alphas()  # nothing is copied before all is under way
        return RowNumbers(*numbers.cpu().double()), Alphas(*alphas.cpu().double())

    def _rows(self, heads: range) -> Tensor:
        """Numbers [5, query heads, rows] of the query heads of some key heads, whose columns' sums are written."""
        g, tile, sets, count = self.g, self.tile, self.sets, len(self.rows)
        some = slice(heads.start * g.group, heads.stop * g.group)
        keys = min(g.seq_k, -(-tile.stop // 16) * 16)
        logits = _product(self.q[some][:, tile.at].unflatten(0, (-1, g.group)).flatten(1, 2), self.k[heads.start : heads.stop, :keys])
        logits = logits.view(some.stop - some.start, count, keys)
        shape, sinks = logits.shape[:2], min(g.config.sinks, self.length)
        groups = torch.empty(*shape, -(-keys // 16), device=self.device)
        block_lse = torch.empty(shape[0], self.levels, count, device=self.device)
        lse, left, stratified, uniform = torch.empty(4, *shape, device=self.device)
        kernels.row_kernel[(count, shape[0])](
            logits, self.position, self.own_first, self.block_first, self.block_keys, lse, groups, block_lse,
            self.scale, self.length, sinks, count, keys, self.levels, CAUSAL=g.config.causal, SIZE=1024,
        )  # fmt: skip
        self._sample_columns(logits, lse, block_lse, some)
        value, key = self._largest(logits, groups)
        heavy = sets.heavy(tile, heads).flatten(0, 1).int()
        order = self.order[heads.start : heads.stop]
        kernels.left_kernel[(count, shape[0])](
            logits, lse, heavy, self.far, self.draw_first, self.draw_count, order, left, stratified, uniform,
            self.scale, sinks, g.config.sample_size, count, keys, heavy.shape[-1], order.shape[-1], order.shape[1], self.order_first,
            self.draw_first.shape[1], g.group, ORDERED=g.sorts, SIZE=1024, WIDTH=self.width,
        )  # fmt: skip
        held = (logits.gather(-1, key) == -torch.inf) | (key < sinks) | (key >= self.far[:, None])
        real = value > -torch.inf
        recall = (held & real).sum(-1) / real.sum(-1)
        return torch.stack([1 - (left - lse).exp(), recall, left.masked_fill(left == -torch.inf, torch.nan), stratified, uniform])

    def _sample_columns(self, logits: Tensor, lse: Tensor, block_lse: Tensor, heads: slice) -> None:
        """Adds up the squared probabilities of the columns of some query heads over the sampled rows."""
        count, size, blocks = len(self.rows), self.local, len(self.edge) - 1
        grid = (blocks * -(-size // 128), lse.shape[0])
        kernels.sampled_kernel[grid](
            logits, lse, block_lse, self.position, self.edge, self.sums[heads], self.block_sums[heads],
            self.scale, self.length, count, logits.shape[-1], self.length, size, blocks, self.levels,
            BAND=BAND, CAUSAL=self.g.config.causal, ROWS=16, SIZE=128,
        )  # fmt: skip

    def _largest(self, logits: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logits of each row and their keys [query heads, rows, 16]: they are in the groups with the largest maxima."""
        group = groups.topk(min(TOP, groups.shape[-1]), sorted=False).indices
        key = (group[..., None] * 16 + torch.arange(16, device=self.device)).flatten(-2)
        hidden, key = key > self.last[:, None], key.clamp(max=self.tile.stop - 1)
        value, at = logits.gather(-1, key).masked_fill_(hidden, -torch.inf).topk(min(TOP, key.shape[-1]), sorted=False)
        return value, key.gather(-1, at)

    def _alphas(self) -> Tensor:
        """alpha of each query head [3, Hq]: of the whole matrix, without its first 32 columns, of its blocks off the diagonal."""
        share, n, seen = len(self.rows) / len(self.seen), self.length, self.seen
        total = self._near() + self.sums[:, :n] / share
        always = torch.arange(min(2 * FIRST, n), device=self.device).expand(self.g.heads_q, -1)
        key = torch.cat([always, total.topk(min(COLUMNS, n), sorted=False).indices], -1).int()
        first, stop = (torch.full((1, 1), at, dtype=torch.int32, device=self.device) for at in (seen.start, seen.stop))
        norms = self._columns(key, self.lse, first, stop, self.g.config.causal)
        late = norms.masked_fill(key < FIRST, -torch.inf).amax(-1)
        return torch.stack([norms.amax(-1) * n, torch.where(late > -torch.inf, late * n, torch.nan), self._block_alpha()])

    def _near(self) -> Tensor:
        """The part of each column's sum [Hq, length] over the rows of its own band and those beside it."""
        g, causal = self.g, self.g.config.causal
        column = torch.arange(self.length, dtype=torch.int32, device=self.device)[None]
        band = column[:, :: self.size] // BAND * BAND - g.first
        first, stop = (x.clamp(self.seen.start, self.seen.stop) for x in (band if causal else band - BAND, band + 2 * BAND))
        return self._columns(column, self.lse, first, stop, causal, splits=1)

    def _columns(self, key: Tensor, lse: Tensor, first: Tensor, stop: Tensor, causal: int, splits: int = 0) -> Tensor:
        """Squared norms [N, C] of the columns key int32 [N or 1, C] under lse [N, Sq], N a multiple of Hq, over the rows from first to
        stop, int32 [N or 1, tiles or 1]."""
        g, count, splits = self.g, key.shape[-1], splits or SPLITS
        sums, tiles = torch.empty(splits, len(lse), count, device=self.device), -(-count // self.size)
        kernels.column_kernel[(tiles, splits, len(lse))](
            self.q, self.k, lse, key, first, stop, sums, self.scale, g.heads_q, g.first, g.seq_q, g.seq_k, g.head_dim, g.group, count,
            count * (len(key) > 1), first.shape[1] * (len(first) > 1), int(first.shape[1] > 1),
            CAUSAL=causal, DIM=self.dim, ROWS=self.size, SIZE=self.size,
        )  # fmt: skip
        return sums.sum(0)

    def _block_alpha(self) -> Tensor:
        """alpha of blocks off the diagonal [Hq]: of those that the sampled rows say have the largest; NaN: there is none.

        Each query head looks at the choices of all query heads with the same keys.
        """
        g, blocks = self.g, judged_blocks(self.g, self.length, self.seen, self.rows)
        if not blocks:
            return torch.full((g.heads_q,), torch.nan, device=self.device)
        inside = [self.block_sums[:, b.level, b.keys.start : b.keys.stop].amax(-1) for b in blocks]
        table = [[b.rows.start, b.rows.stop, b.keys.start, b.keys.stop, b.level] for b in blocks]
        weight = torch.tensor([len(b.keys) * len(b.rows) / b.sampled for b in blocks]).to(self.device, non_blocking=True)
        (bounds,) = self._copied([torch.tensor(table)])
        best = (torch.stack(inside, -1) * weight).argmax(-1).unflatten(0, (-1, g.group))
        # Each choice of a group in turn for all of its heads, [G, Hq]; one that stood before has no rows.
        choice = best.T[:, :, None].expand(-1, -1, g.group).flatten(1)
        first, stop, key_first, key_stop, level = bounds[choice.flatten()].T.contiguous()
        again = (best[:, :, None] == best[:, None]).tril(-1).any(-1).T[:, :, None].expand(-1, -1, g.group).flatten()
        stop = torch.where(again, first, stop)
        lse, most = self.lse.new_empty(len(stop), g.seq_q), max(len(b.rows) for b in blocks)
        kernels.lse_kernel[(-(-most // self.lse_rows), len(stop))](
            self.q, self.k, first, stop, key_first, key_stop, lse, self.scale, g.heads_q, g.seq_q, g.seq_k, g.head_dim, g.group,
            DIM=self.dim, ROWS=self.lse_rows, SIZE=self.size,
        )  # fmt: skip
        key = torch.arange(self.length, device=self.device)
        outside = (key < key_first[:, None]) | (key >= key_stop[:, None])
        sums = self.block_sums[torch.arange(g.heads_q, device=self.device).repeat(g.group), level].masked_fill_(outside, -1.0)
        key = sums.topk(min(NODE_COLUMNS, self.length), sorted=False).indices
        norms = self._columns(key.int(), lse, first[:, None], stop[:, None], causal=0)
        alpha = norms.masked_fill_(outside.gather(-1, key), 0.0).amax(-1) * (key_stop - key_first)
        return alpha.view(g.group, -1).amax(0)


def _product(q: Tensor, k: Tensor) -> Tensor:
    """q @ k^T of each head, fp32: products of half precision are exact."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.transpose(-1, -2), out_dtype=torch.float32)
    return q.float() @ k.float().transpose(-1, -2)
