"""The operator in plain PyTorch: the ground truth every backend is held against.

Each query row attends to disjoint sets of keys (local, sinks, heavy blocks, sampled residual: rules 6 to 16 of
docs/operator.md); every part gives its output and the log of its sum, and the parts merge by log-sum-exp. Memory is
O((Sq + Sk) D) apart from tiles of a bounded size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.node_attention import Nodes
from hyperattention.parts import merge, part
from hyperattention.selection import Geometry, Plan, make_plan

_TILE = 2**22  # logits held at once


class Output(NamedTuple):
    """o [B,Hq,Sq,Dv] in Q's dtype, lse [B,Hq,Sq] float32 (float64 for float64 inputs), and the plan that was followed."""

    o: Tensor
    lse: Tensor
    plan: Plan


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: Config,
    lengths: Tensor | None = None,
    plan: Plan | None = None,
    arithmetic: torch.dtype | None = None,
) -> Output:
    """HyperAttention (arXiv 2310.05869, with the parts of docs/operator.md).

    q [B,Hq,Sq,D], k [B,Hkv,Sk,D], v [B,Hkv,Sk,Dv] of one floating dtype, Hq a multiple of Hkv; lengths int [B], the valid
    keys of each batch row. `plan` is followed when given, else made. Arithmetic is fp32, or fp64 for fp64 inputs;
    `arithmetic` = a lower dtype gives the naive twin: operands and probabilities rounded to it, sums as PyTorch does them.
    Raises UsageError for shapes, or a plan, that do not fit.
    """
    g = Geometry.of(q, k, v, config, lengths)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lens = g.clamp(lengths)
    if plan is None:
        plan = make_plan(q, k, g, lengths)
    plan.check(g)
    narrow = arithmetic or wide
    o = torch.zeros(g.batch, g.heads_q, g.seq_q, g.head_dim_v, dtype=wide, device=q.device)
    lse = torch.full((g.batch, g.heads_q, g.seq_q), -torch.inf, dtype=wide, device=q.device)
    for b, length in enumerate(lens):
        # [Hkv, G, S, D]; keys past the length are read as zero (rule 2: 0 x NaN is NaN).
        qb = q[b].to(narrow).unflatten(0, (g.heads_kv, g.group))
        kb, vb = (_zero_tail(x[b].to(narrow), length).unsqueeze(1) for x in (k, v))
        rows = _Rows(g, length, qb, kb, vb, wide)
        if g.exact:
            rows.exact(o[b], lse[b])
        elif g.sorts:
            sorted_rows, sorted_keys = plan.orders(g)
            rows.approximate(o[b], lse[b], None)
            nodes = Nodes(g, length, (qb, kb, vb), sorted_rows[b], sorted_keys[b], plan.sample_index[b], plan.sample_weight[b])
            nodes.add(o[b], lse[b])
        else:
            rows.approximate(o[b], lse[b], (plan.selection[b], plan.sample_index[b], plan.sample_weight[b]))
    return Output(o.to(q.dtype), lse, plan)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None = None, scale: float = 0.0) -> Output:
    """Exact attention with the operator's alignment and lengths, in tiles."""
    return attention(q, k, v, Config(causal=int(causal), scale=scale).exact(), lengths)


def _zero_tail(x: Tensor, length: int) -> Tensor:
    if length >= x.shape[-2]:
        return x
    x = x.clone()
    x[..., length:, :] = 0
    return x


class _Rows:
    """The rows of one batch entry: q [Hkv,G,Sq,D], k [Hkv,1,Sk,D], v [Hkv,1,Sk,Dv]."""

    def __init__(self, g: Geometry, length: int, q: Tensor, k: Tensor, v: Tensor, wide: torch.dtype) -> None:
        self.g, self.length, self.q, self.k, self.v, self.wide = g, length, q, k, v, wide
        self.scale = g.config.resolved_scale(g.head_dim)
        self.device = q.device

    def _bias(self, visible: Tensor) -> Tensor:
        return torch.zeros(visible.shape, dtype=self.wide, device=self.device).masked_fill(~visible, -torch.inf)

    def _contiguous(self, q: Tensor, position: Tensor, start: int, stop: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Rows at `position` against keys [start, stop), none of them past the length."""
        key = torch.arange(start, stop, device=self.device)
        visible = key <= position[:, None] if causal else torch.ones_like(key, dtype=torch.bool)
        return part(q, self.k[:, :, start:stop], self.v[:, :, start:stop], self._bias(visible), self.scale, self.wide)

    def exact(self, o: Tensor, lse: Tensor) -> None:
        g = self.g
        step = max(1, _TILE // max(1, g.heads_q * g.seq_k))
        for row in range(0, g.seq_q, step):
            stop_row = min(row + step, g.seq_q)
            position = torch.arange(row, stop_row, device=self.device) + g.first
            stop = min(self.length, g.first + stop_row) if g.config.causal else self.length
            if stop <= 0:
                continue
            found = self._contiguous(self.q[:, :, row:stop_row], position, 0, stop, bool(g.config.causal))
            o[:, row:stop_row], lse[:, row:stop_row] = (x.flatten(0, 1) for x in found)

    def approximate(self, o: Tensor, lse: Tensor, heavy: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """Local part and sinks and, of the selector `blocks`, `heavy`: chosen blocks, sample index and sample weight."""
        g, c = self.g, self.g.config
        far = [x.unflatten(0, (g.heads_kv, g.group)) for x in heavy or ()]
        keys = (1 + c.local_overlap) * c.local_size * c.causal + c.sinks + c.num_blocks * c.block_size + c.sample_size
        step = max(1, _TILE // max(1, g.heads_q * keys * c.block_size))  # query blocks a tile
        for draw, n in enumerate(g.local_blocks):
            lo, hi = g.first, g.first + g.seq_q
            if c.causal:
                lo, hi = max(lo, n * c.local_size), min(hi, (n + 1) * c.local_size)
            for block in range(lo // c.block_size, -(-hi // c.block_size), step):
                first, last = max(lo, block * c.block_size), min(hi, (block + step) * c.block_size)  # positions
                row = slice(first - g.first, last - g.first)
                of_draw = (far[0], far[1][:, :, draw], far[2][:, :, draw]) if far else None
                found = self._tile(first, last, self.q[:, :, row], of_draw)
                o[:, row], lse[:, row] = (x.flatten(0, 1) for x in found)

    def _tile(self, first: int, last: int, q: Tensor, heavy: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Rows at positions [first, last), all of one local block when causal."""
        g, c = self.g, self.g.config
        position = torch.arange(first, last, device=self.device)
        far = min(g.far(first, self.length), self.length)
        parts = []
        if c.causal and min(last, self.length) > far:
            parts.append(self._contiguous(q, position, far, min(last, self.length), True))
        if min(c.sinks, far) > 0:
            parts.append(self._contiguous(q, position, 0, min(c.sinks, far), False))
        if heavy and far > c.sinks and c.num_blocks:
            parts.append(self._heavy(position, q, heavy[0], far))
        if heavy and far > c.sinks and c.sample_size:
            parts.append(self._sampled(position, q, *heavy))
        if not parts:
            shape = (g.heads_kv, g.group, last - first)
            empty = torch.zeros(*shape, g.head_dim_v, dtype=self.wide, device=self.device)
            return empty, torch.full(shape, -torch.inf, dtype=self.wide, device=self.device)
        return merge(parts)

    def _heavy(self, position: Tensor, q: Tensor, blocks: Tensor, far: int) -> tuple[Tensor, Tensor]:
        """Each query block against its chosen key blocks; keys < sinks or past `far` are masked (rule 19)."""
        g, c = self.g, self.g.config
        size, head = c.block_size, torch.arange(g.heads_kv, device=self.device)[:, None, None]
        outputs = []
        for n in range(int(position[0]) // size, int(position[-1]) // size + 1):
            lo, hi = max(n * size, int(position[0])), min((n + 1) * size, int(position[-1]) + 1)
            chosen = blocks[:, :, n - g.query_blocks.start].long()  # [Hkv, G, num_blocks]
            key = (chosen[..., None] * size + torch.arange(size, device=self.device)).flatten(-2)
            visible = (chosen >= 0).repeat_interleave(size, -1) & (key >= c.sinks) & (key < far)
            at = key.clamp(0, g.seq_k - 1)
            rows = slice(lo - int(position[0]), hi - int(position[0]))
            k, v = self.k[head, 0, at], self.v[head, 0, at]
            outputs.append(part(q[:, :, rows], k, v, self._bias(visible)[:, :, None], self.scale, self.wide))
        return torch.cat([o for o, _ in outputs], 2), torch.cat([lse for _, lse in outputs], 2)

    def _sampled(self, position: Tensor, q: Tensor, blocks: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """All rows against the tile's samples; a sample inside a chosen block is masked for that query block (rule 16)."""
        g, c = self.g, self.g.config
        head = torch.arange(g.heads_kv, device=self.device)[:, None, None]
        at = index.long().clamp(min=0)
        log_weight = weight.to(self.wide).log()  # -inf where there is no sample
        query_block = position // c.block_size - g.query_blocks.start
        used = torch.unique_consecutive(query_block)
        taken = (blocks[:, :, used, :, None] == (at // c.block_size)[:, :, None, None, :]).any(-2)  # [Hkv, G, blocks, samples]
        bias = self._bias(~taken)[:, :, query_block - used[0]] + log_weight[:, :, None]
        return part(q, self.k[head, 0, at], self.v[head, 0, at], bias, self.scale, self.wide)
