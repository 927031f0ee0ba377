"""What each query meets: geometry, pools, block selection, sample draws. The plan, before any attention.

Everything here is integer or IEEE fp32 arithmetic in a fixed order, so that every backend computes the same plan bit
for bit. The rules are numbered in docs/operator.md; comments quote the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.draws import draw_samples
from hyperattention.errors import UsageError
from hyperattention.geometry import Geometry
from hyperattention.sortlsh import sort_nodes

# Rule 23: superblocks of this many rows, coarse pools, how many superblocks are always kept, and the kept share.
SUPERBLOCK, COARSE_POOL, KEPT_MIN, KEPT_SHARE = 256, 16, 32, 8


@dataclass(frozen=True)
class Plan:
    """Who meets whom. Empty (no query blocks) on the exact path.

    selection: of `blocks`, int32 [B, Hq, query blocks, num_blocks]: chosen key blocks in ascending order, -1 behind the
    last. Of `sortlsh`, int32, one line as the kernels take it: rows [B, Hq, levels, Sq], then keys [B, Hkv, levels, Sk]; each
    node's sorted rows (keys) fill the slots of its own rows (keys), all others are -1.
    sample_index: int32 [B, Hq, draws, sample_size], -1 behind the last: keys for `blocks`, places in the node's sorted keys
    for `sortlsh`.
    sample_weight: float32, same shape: the weight whose log is added to the sample's logit; 0 where there is none.
    """

    selection: Tensor
    sample_index: Tensor
    sample_weight: Tensor

    def orders(self, g: Geometry) -> tuple[Tensor, Tensor]:
        """The sorted rows [B, Hq, levels, Sq] and keys [B, Hkv, levels, Sk] of a `sortlsh` plan, as views."""
        rows, keys = g.order_shapes
        flat_rows, flat_keys = self.selection.split([math.prod(rows), math.prod(keys)])
        return flat_rows.view(rows), flat_keys.view(keys)

    def check(self, g: Geometry) -> None:
        """Raises UsageError if this is the plan of a problem of other sizes."""
        samples = (g.batch, g.heads_q, len(g.draws(0)), g.config.sample_size)
        expected = {"selection": selection_shape(g), "sample_index": samples, "sample_weight": samples}
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise UsageError(
                    f"the plan's {name} has shape {found}; these inputs take {shape}; make the plan from the same shapes and config"
                )


def selection_shape(g: Geometry) -> tuple[int, ...]:
    """Shape of a plan's `selection`; empty on the exact path."""
    if g.sorts:
        return (sum(map(math.prod, g.order_shapes)),)
    return g.batch, g.heads_q, 0 if g.exact else len(g.query_blocks), g.config.num_blocks


def make_plan(q: Tensor, k: Tensor, g: Geometry, lengths: Tensor | None = None) -> Plan:
    """The plan of the whole problem; no gradient, O((Sq + Sk) D) memory apart from tiles."""
    with torch.no_grad():
        if g.sorts:
            selection = torch.cat([order.flatten() for order in sort_nodes(q, k, g, lengths)])
        else:
            selection = select_blocks(q, k, g, lengths)
        return Plan(selection, *draw_samples(g, lengths, q.device))


# --- pools -----------------------------------------------------------------------------------------------------------


def pool(x: Tensor, rows: int, first: int, eligible: range) -> tuple[Tensor, Tensor, Tensor]:
    """Quantised pools of `rows` consecutive positions (rules 18 and 20).

    x: [..., S, D], row i at position `first` + i; rows outside `eligible` (row indices) enter no pool.
    Returns values int8 [..., P, D], the absolute maximum over 127 [..., P], and whether the pool takes part [..., P]:
    a pool without eligible rows or with a mean that is not finite does not.
    """
    s = x.shape[-2]
    offset = first % rows
    padded = -(-(offset + s) // rows) * rows
    x = torch.nn.functional.pad(x.float(), (0, 0, offset, padded - offset - s))
    take = torch.zeros(padded, dtype=torch.bool, device=x.device)
    take[offset + eligible.start : offset + max(eligible.start, eligible.stop)] = True
    x = x.unflatten(-2, (-1, rows))
    take = take.unflatten(0, (-1, rows))
    total = torch.zeros_like(x[..., 0, :])
    for r in range(rows):  # ascending position: the order of the sum is part of the contract
        total = torch.where(take[:, r, None], total + x[..., r, :], total)
    count = take.sum(-1)
    mean = total / count.clamp(min=1)[:, None].float()
    largest = mean.abs().amax(-1)
    used = (count > 0) & torch.isfinite(mean).all(-1)
    a = largest / torch.full_like(largest, 127.0)  # a plain number would become a multiplication by 1/127 on CUDA
    a = torch.where(a == 0, torch.ones_like(a), a)
    values = torch.where(used[..., None], mean / a[..., None], 0.0).round().clamp(-127, 127)
    return values.to(torch.int8), a, used


def query_pools(q: Tensor, rows: int, g: Geometry, length: int) -> tuple[Tensor, Tensor]:
    """The pools of `Geometry.query_pools`: values [..., P, D] and factor 1/sqrt(max(1, q8.q8)), NaN where the pool is skipped."""
    values, _, used = pool(q, rows, g.first, range(0, g.live_rows(length)))
    if g.config.strict_causal and g.seq_q:
        own, _, own_used = pool(q[..., :1, :], rows, 0, range(0, min(g.live_rows(length), 1)))
        gap = len(g.query_pools(rows)) - 1 - values.shape[-2]  # of the first query block's rows that the call does not have
        values = torch.cat([own, torch.nn.functional.pad(values, (0, 0, gap, 0))], -2)
        used = torch.cat([own_used, torch.nn.functional.pad(used, (gap, 0))], -1)
    square = values.int().square().sum(-1).clamp(min=1)
    # On the processor PyTorch's fp32 root is not IEEE's (17% off by an ulp); the fp64 root, rounded, is for every such integer.
    root = square.double().sqrt().float()
    return values, torch.where(used, 1.0 / root, float("nan"))


def key_pools(k: Tensor, rows: int, g: Geometry, length: int) -> tuple[Tensor, Tensor]:
    """Key pools [..., P, D] and their factor max|x|/127; NaN where the pool is skipped."""
    values, a, used = pool(k, rows, 0, range(min(g.config.sinks, length), length))
    return values, torch.where(used, a, float("nan"))


# --- selector `blocks` -----------------------------------------------------------------------------------------------

Pools = tuple[Tensor, Tensor]  # int8 values [..., P, D] and factors [..., P], NaN where the pool is skipped


def _scores(queries: Pools, keys: Pools, per_block: int) -> Tensor:
    """Score of each group of `per_block` key pools for one query block (rule 20): [..., Pk / per_block]."""
    (q8, qf), (k8, kf) = queries, keys
    # Integers below 2^24 are exact in fp32 in any order of summation; 1040 squares of 127 stay below.
    exact = torch.float32 if q8.shape[-1] <= 1040 else torch.float64
    dot = (q8.to(exact) @ k8.to(exact).transpose(-1, -2)).float()
    best = _lowest_if_nan(dot * qf[..., None]).amax(-2)
    return _lowest_if_nan(best * kf).unflatten(-1, (-1, per_block)).amax(-1)


def _lowest_if_nan(score: Tensor) -> Tensor:
    return score.masked_fill(score.isnan(), -torch.inf)


def _best(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ties to the smaller index, in ascending order (rule 21)."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(-1).values


def uses_superblocks(config: Config, candidates: range) -> bool:
    """Whether rule 23's two levels apply to these candidate blocks."""
    if SUPERBLOCK % config.block_size or config.block_size % COARSE_POOL:
        return False
    per = SUPERBLOCK // config.block_size
    return len(range(candidates.start // per, -(-candidates.stop // per))) > KEPT_MIN


def select_blocks(q: Tensor, k: Tensor, g: Geometry, lengths: Tensor | None = None) -> Tensor:
    """Rules 17 to 23: int32 [B, Hq, query blocks, num_blocks], ascending, -1 behind the last."""
    c, blocks = g.config, range(0) if g.exact else g.query_blocks
    chosen = torch.full((g.batch, g.heads_q, len(blocks), c.num_blocks), -1, dtype=torch.int32, device=q.device)
    if chosen.numel() == 0:
        return chosen
    pool_sizes = {c.pool_size, COARSE_POOL} if uses_superblocks(c, range(-(-g.seq_k // c.block_size))) else {c.pool_size}
    for b, length in enumerate(g.clamp(lengths)):
        qb, kb = q[b].unflatten(0, (g.heads_kv, g.group)), k[b].unsqueeze(1)
        pools = {rows: (query_pools(qb, rows, g, length), key_pools(kb, rows, g, length)) for rows in pool_sizes}
        for n, index in enumerate(blocks):
            stop = min(g.far(index * c.block_size, length), length)
            candidates = range(c.sinks // c.block_size, -(-stop // c.block_size))
            if len(candidates) == 0:
                continue
            select = _select_two_levels if uses_superblocks(c, candidates) else _select_flat
            picked = select(index, candidates, g, pools)
            chosen[b, :, n, : picked.shape[-1]] = picked.flatten(0, 1)
    return chosen


def _rows(pools: Pools, rows: int, start: int, stop: int, base: int = 0) -> Pools:
    """The pools that cover positions [start, stop), of pools that are counted from `base`."""
    lo, hi = max(start // rows - base, 0), max(-(-stop // rows) - base, 0)
    return pools[0][..., lo:hi, :], pools[1][..., lo:hi]


def _queries(pools: Pools, rows: int, index: int, g: Geometry) -> Pools:
    """The query pools that query block `index` is scored with: its own, strict those of the block before (rule 22)."""
    start = (index - g.config.strict_causal) * g.config.block_size
    return _rows(pools, rows, start, start + g.config.block_size, g.query_pools(rows).start)


def _pad(pools: Pools, count: int) -> Pools:
    """Skipped pools behind the last, so that there are `count`."""
    missing = count - pools[1].shape[-1]
    pad = torch.nn.functional.pad
    return pad(pools[0], (0, 0, 0, missing)), pad(pools[1], (0, missing), value=float("nan"))


def _select_flat(index: int, candidates: range, g: Geometry, pools: dict[int, tuple[Pools, Pools]]) -> Tensor:
    """Every candidate scored: [Hkv, G, min(num_blocks, candidates)]."""
    size, rows = g.config.block_size, g.config.pool_size
    queries, keys = pools[rows]
    queries = _queries(queries, rows, index, g)
    keys = _pad(_rows(keys, rows, candidates.start * size, candidates.stop * size), len(candidates) * (size // rows))
    return candidates.start + _best(_scores(queries, keys, size // rows), min(g.config.num_blocks, len(candidates)))


def _select_two_levels(index: int, candidates: range, g: Geometry, pools: dict[int, tuple[Pools, Pools]]) -> Tensor:
    """Rule 23: superblocks first, then the candidates of the best; [Hkv, G, <= num_blocks], -1 behind the last."""
    size, rows = g.config.block_size, g.config.pool_size
    per_super, per_block = SUPERBLOCK // size, size // rows
    supers = range(candidates.start // per_super, -(-candidates.stop // per_super))
    queries, keys = pools[COARSE_POOL]
    queries = _queries(queries, COARSE_POOL, index, g)
    # Coarse pools at or past the end of the last candidate block take no part.
    keys = _rows(keys, COARSE_POOL, supers.start * SUPERBLOCK, candidates.stop * size)
    score = _scores(queries, _pad(keys, len(supers) * SUPERBLOCK // COARSE_POOL), SUPERBLOCK // COARSE_POOL)
    kept = supers.start + _best(score, max(KEPT_MIN, -(-len(supers) // KEPT_SHARE)))  # [Hkv, G, kept]

    block = (kept[..., None] * per_super + torch.arange(per_super, device=kept.device)).flatten(-2)
    at = (block[..., None] * per_block + torch.arange(per_block, device=kept.device)).flatten(-2)  # fine key pools
    queries, (k8, kf) = pools[rows]
    head = torch.arange(g.heads_kv, device=kept.device)[:, None, None]
    inside = at.clamp(max=kf.shape[-1] - 1)
    keys = k8[head, 0, inside], torch.where(at < kf.shape[-1], kf[head, 0, inside], float("nan"))
    score = _scores(_queries(queries, rows, index, g), keys, per_block)
    # The first and the last superblock may hold blocks that are no candidates.
    candidate = (block >= candidates.start) & (block < candidates.stop)
    order = torch.sort(score.masked_fill(~candidate, -torch.inf), dim=-1, descending=True, stable=True).indices
    block, candidate = block.gather(-1, order), candidate.gather(-1, order)
    taken = candidate & (candidate.cumsum(-1) <= g.config.num_blocks)
    block = block.masked_fill(~taken, candidates.stop).sort(-1).values[..., : g.config.num_blocks]
    return block.masked_fill(block == candidates.stop, -1)
