"""Hardness on a GPU: the numbers of hardness_rows.py and hardness_columns.py by a few kernels for all heads at once.

The sampled rows' logits are computed once and read by three kernels; columns and blocks off the diagonal are computed from Q and K
without being stored. Nothing waits for the GPU but the copy of the result. What takes the processor time comes late, while the GPU is
at work on all that does not need it: most tables behind the first products, the plan, many small launches, behind all else.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from hyperattention.validate import hardness_kernels
from hyperattention.validate.hardness_columns import BAND, COLUMNS, FIRST, NODE_COLUMNS, Alphas, Block, block_tree, judged_blocks
from hyperattention.validate.hardness_rows import TOP, RowNumbers
from hyperattention.validate.hardness_sets import ExactSets, RowTile, TakenKeys, row_nodes

kernels: Any = hardness_kernels  # their annotations say what a kernel sees, not what starts it
LOGITS = 2**28  # of the sampled rows that are held at once
SPLITS = 16  # of the rows of chosen columns


@dataclass(frozen=True)
class Tables:
    """What follows from shapes alone, tensors int32 on the device: of the sampled rows, and of the blocks off the diagonal.

    tile: the rows. local, levels: keys of a local block and levels of the tree of blocks. blocks: those that are judged, with `bounds`
    [blocks, 5] of rows, keys and level, and `weight`, fp32. taken: of `sortlsh`. far [rows]: first key of the local part. own_first
    [rows]: of the row's own local block. edge: rows before each local block, and all. block_first, block_keys [rows, levels]: of the
    row's block of each level. draw_first, draw_count [rows, draws].
    """

    tile: RowTile
    local: int
    levels: int
    blocks: list[Block]
    bounds: Tensor
    weight: Tensor
    taken: TakenKeys | None
    far: Tensor
    own_first: Tensor
    edge: Tensor
    block_first: Tensor
    block_keys: Tensor
    draw_first: Tensor
    draw_count: Tensor


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
        # What the first kernels ask for; `tables` has the rest.
        self.host_tile, causal = RowTile.of(self.g, rows, self.length, torch.device("cpu")), self.g.config.causal
        band = torch.arange(0, self.length, self.size) // BAND * BAND - self.g.first
        near = [x.clamp(seen.start, seen.stop)[None] for x in (band if causal else band - BAND, band + 2 * BAND)]
        whole = [torch.tensor([[x]]) for x in (seen.start, seen.stop)]
        self.at, near_first, near_stop, first, stop = self._copied([self.host_tile.at, *near, *whole])
        self.near, self.whole = (near_first, near_stop), (first, stop)
        self.column = torch.arange(self.length, dtype=torch.int32, device=self.device)[None]
        self.width = min(512, max(16, triton.next_power_of_2(-(-self.length // max(1, min(self.g.config.sample_size, self.length))))))

    @cached_property
    def tables(self) -> Tables:
        """Found on the processor and copied once, for all heads."""
        g, config, sets, tile = self.g, self.g.config, self.sets, self.host_tile
        tree, nodes, far = block_tree(g), sets.nodes(tile), sets.far(tile)
        of_rows = nodes if nodes is not None and tree == g else row_nodes(tree, tile, self.length)
        levels, local = (len(of_rows.number), config.local_size) if config.causal else (0, self.length)
        edge = [bisect_left(self.rows, n * local - g.first) for n in range(-(-tile.stop // local))] if config.causal else [0]
        draws = sets.draws(tile, nodes) if config.sample_size else (far[:, None][:, :0],) * 2
        taken = () if nodes is None else vars(sets.taken_keys(nodes)).values()
        blocks = judged_blocks(g, self.length, self.seen, self.rows)
        bounds = torch.tensor([[b.rows.start, b.rows.stop, b.keys.start, b.keys.stop, b.level] for b in blocks])
        weight = torch.tensor([len(b.keys) * len(b.rows) / b.sampled for b in blocks]).view(torch.int32)
        position, *found, weight, bounds = self._copied(
            [tile.position, far, tile.block * local, torch.tensor([*edge, len(self.rows)])]
            + [of_rows.key[:levels].T, of_rows.keys[:levels].T, *draws, *taken, weight, bounds]
        )
        tile, made = replace(tile, at=self.at, position=position), TakenKeys(*found[7:]) if g.sorts else None
        return Tables(tile, local, levels, blocks, bounds, weight.view(torch.float32), made, *found[:7])

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Of each column the squared probabilities of the sampled rows that are not near, [Hq, keys], and of those of its block of each
        level, normalised over the block's keys, [Hq, levels, keys]."""
        heads, levels = self.g.heads_q, self.tables.levels
        whole, blocks = torch.zeros(heads * (1 + levels), self.length, device=self.device).split([heads, heads * levels])
        return whole, blocks.view(heads, levels, self.length)

    def _copied(self, tables: list[Tensor]) -> list[Tensor]:
        """Tables of the processor on the device, int32, without waiting for it; each begins at a multiple of 16 bytes, as the others would
        have kernels compiled anew."""
        starts = list(accumulate((-(-table.numel() // 4) * 4 for table in tables), initial=0))
        line = torch.empty(starts.pop(), dtype=torch.int32)
        for at, table in zip(starts, tables, strict=True):
            line[at : at + table.numel()].view(table.shape).copy_(table)
        line = line.to(self.device, non_blocking=True)
        return [line[at : at + table.numel()].view(table.shape) for at, table in zip(starts, tables, strict=True)]

    def measure(self) -> tuple[RowNumbers, Alphas]:
        """Numbers [Hq, rows] of the sampled rows, and alpha of each query head; on the CPU."""
        each = max(1, LOGITS // (self.g.group * len(self.rows) * self.host_tile.stop))
        *parts, last = [range(at, min(at + each, self.g.heads_kv)) for at in range(0, self.g.heads_kv, each)]
        near = self._columns(self.column, self.lse, *self.near, self.g.config.causal, splits=1)
        found = [self._numbers(part, *self._rows(part)) for part in parts]
        # The columns' sums are whole with the last rows; the plan, where no other part has asked for it, waits for no GPU behind them.
        rows = self._rows(last)
        alphas = self._alphas(near)
        found.append(self._numbers(last, *rows))
        numbers = torch.cat(found, 1) if parts else found[0]
        return RowNumbers(*numbers.cpu()), Alphas(*alphas.cpu())

    def _rows(self, heads: range) -> tuple[Tensor, Tensor, Tensor]:
        """Of the query heads of some key heads, whose columns' sums are written: logits [query heads, rows, keys], LSE [query heads, rows],
        and the keys of the largest logits [query heads, rows, 16]."""
        g, count = self.g, len(self.rows)
        some = slice(heads.start * g.group, heads.stop * g.group)
        keys = min(g.seq_k, -(-self.host_tile.stop // 16) * 16)
        sampled = self.q[some].index_select(1, self.at).unflatten(0, (-1, g.group)).flatten(1, 2)
        logits = _product(sampled, self.k[heads.start : heads.stop, :keys]).view(some.stop - some.start, count, keys)
        shape, sinks, tables = logits.shape[:2], min(g.config.sinks, self.length), self.tables
        groups = torch.empty(*shape, -(-keys // 16), device=self.device)
        block_lse = torch.empty(shape[0], tables.levels, count, device=self.device)
        lse, top = torch.empty(shape, device=self.device), torch.empty(*shape, TOP, dtype=torch.int32, device=self.device)
        kernels.row_kernel[(count, shape[0])](
            logits, tables.tile.position, tables.own_first, tables.block_first, tables.block_keys, lse, groups, top, block_lse,
            self.scale, self.length, sinks, count, keys, tables.levels, CAUSAL=g.config.causal, TOP=TOP, SIZE=1024,
        )  # fmt: skip
        self._sample_columns(logits, lse, block_lse, some)
        return logits, lse, top

    def _numbers(self, heads: range, logits: Tensor, lse: Tensor, top: Tensor) -> Tensor:
        """Numbers [5, query heads, rows] from what `_rows` tells of the same heads; the logits are spoilt."""
        g, sets, tables, (shape, keys) = self.g, self.sets, self.tables, (logits.shape[:2], logits.shape[2])
        heavy, (order, first) = sets.heavy_ranges(tables.tile, heads, tables.taken), sets.sorted_keys()
        order, numbers = order[heads.start : heads.stop], torch.empty(5, *shape, device=self.device)
        kernels.left_kernel[(shape[1], shape[0])](
            logits, lse, top, heavy, tables.far, tables.draw_first, tables.draw_count, order, numbers,
            self.scale, min(g.config.sinks, self.length), g.config.sample_size, shape[0], shape[1], keys, heavy.shape[2],
            order.shape[-1], order.shape[1], first, tables.draw_first.shape[1], g.group,
            ORDERED=g.sorts, TOP=TOP, SIZE=1024, WIDTH=self.width,
        )  # fmt: skip
        return numbers

    def _sample_columns(self, logits: Tensor, lse: Tensor, block_lse: Tensor, heads: slice) -> None:
        """Adds up the squared probabilities of the columns of some query heads over the sampled rows."""
        tables, sums, block_sums = self.tables, *self.sums
        count, size, blocks = len(self.rows), tables.local, len(tables.edge) - 1
        grid = (blocks * -(-size // 128), lse.shape[0])
        kernels.sampled_kernel[grid](
            logits, lse, block_lse, tables.tile.position, tables.edge, sums[heads], block_sums[heads],
            self.scale, self.length, count, logits.shape[-1], self.length, size, blocks, tables.levels,
            BAND=BAND, CAUSAL=self.g.config.causal, ROWS=16, SIZE=128,
        )  # fmt: skip

    def _alphas(self, near: Tensor) -> Tensor:
        """alpha of each query head [3, Hq]: of the whole matrix, without its first 32 columns, of its blocks off the diagonal.

        near [Hq, keys]: squared norms of the columns over the rows in their own band and those beside it; they are overwritten.
        """
        n, causal = self.length, self.g.config.causal
        total = near.add_(self.sums[0], alpha=len(self.seen) / len(self.rows))  # with the other rows
        largest = total.topk(min(COLUMNS, n), sorted=False).indices.int()
        key = torch.cat([self.column[:, : 2 * FIRST].expand(self.g.heads_q, -1), largest], -1)
        norms = self._columns(key, self.lse, *self.whole, causal)
        late = norms.masked_fill(key < FIRST, 0.0 if n > FIRST else torch.nan)
        return torch.stack([norms.amax(-1) * n, late.amax(-1) * n, self._block_alpha()])

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
        return sums.sum(0) if splits > 1 else sums[0]

    def _block_alpha(self) -> Tensor:
        """alpha of blocks off the diagonal [Hq]: of those that the sampled rows say have the largest; NaN: there is none.

        Each query head looks at the choices of all query heads with the same keys.
        """
        g, tables, blocks, block_sums = self.g, self.tables, self.tables.blocks, self.sums[1]
        if not blocks:
            return torch.full((g.heads_q,), torch.nan, device=self.device)
        inside = [block_sums[:, b.level, b.keys.start : b.keys.stop].amax(-1) for b in blocks]
        best = (torch.stack(inside, -1) * tables.weight).argmax(-1).unflatten(0, (-1, g.group))
        # Each choice of a group in turn for all of its heads, [G, Hq]; one that stood before has no rows.
        choice = best.T[:, :, None].expand(-1, -1, g.group).flatten(1)
        first, stop, key_first, key_stop, level = tables.bounds[choice.flatten()].T.contiguous()
        again = (best[:, :, None] == best[:, None]).tril(-1).any(-1).T[:, :, None].expand(-1, -1, g.group).flatten()
        stop = torch.where(again, first, stop)
        lse, most = self.lse.new_empty(len(stop), g.seq_q), max(len(b.rows) for b in blocks)
        kernels.lse_kernel[(-(-most // self.lse_rows), len(stop))](
            self.q, self.k, first, stop, key_first, key_stop, lse, self.scale, g.heads_q, g.seq_q, g.seq_k, g.head_dim, g.group,
            DIM=self.dim, ROWS=self.lse_rows, SIZE=self.size,
        )  # fmt: skip
        key = torch.arange(self.length, device=self.device)
        outside = (key < key_first[:, None]) | (key >= key_stop[:, None])
        sums = block_sums[torch.arange(g.heads_q, device=self.device).repeat(g.group), level].masked_fill_(outside, -1.0)
        key = sums.topk(min(NODE_COLUMNS, self.length), sorted=False).indices
        norms = self._columns(key.int(), lse, first[:, None], stop[:, None], causal=0)
        alpha = norms.masked_fill_(outside.gather(-1, key), 0.0).amax(-1) * (key_stop - key_first)
        return alpha.view(g.group, -1).amax(0)


def _product(q: Tensor, k: Tensor) -> Tensor:
    """q @ k^T of each head, fp32: products of half precision are exact."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.transpose(-1, -2), out_dtype=torch.float32)
    return q.float() @ k.float().transpose(-1, -2)
