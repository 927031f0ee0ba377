"""What each query meets: geometry, pools, block selection, sample draws. The plan, before any attention.

Everything here is integer or IEEE fp32 arithmetic in a fixed order, so that every backend computes the same plan bit
for bit. The rules are numbered in docs/operator.md; comments quote the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.errors import UsageError

# Rule 23: superblocks of this many rows, coarse pools, how many superblocks are always kept, and the kept share.
SUPERBLOCK, COARSE_POOL, KEPT_MIN, KEPT_SHARE = 256, 16, 32, 8
_MASK32 = 0xFFFFFFFF


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

    @property
    def local_blocks(self) -> range:
        return self.tiles(self.config.local_size) if self.config.causal else range(1)

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


@dataclass(frozen=True)
class Plan:
    """Who meets whom. Empty (no query blocks) on the exact path.

    blocks: int32 [B, Hq, query blocks, num_blocks], chosen key blocks in ascending order, -1 behind the last.
    sample_index: int32 [B, Hq, local blocks, sample_size], key of each sample, -1 behind the last.
    sample_weight: float32, same shape: the weight whose log is added to the sample's logit; 0 where there is none.
    """

    blocks: Tensor
    sample_index: Tensor
    sample_weight: Tensor

    def check(self, g: Geometry) -> None:
        """Raises UsageError if this is the plan of a problem of other sizes."""
        c, query_blocks, local_blocks = g.config, *((0, 0) if g.exact else (len(g.query_blocks), len(g.local_blocks)))
        samples = (g.batch, g.heads_q, local_blocks, c.sample_size)
        expected = {"blocks": (g.batch, g.heads_q, query_blocks, c.num_blocks), "sample_index": samples, "sample_weight": samples}
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise UsageError(
                    f"the plan's {name} has shape {found}; these inputs take {shape}; make the plan from the same shapes and config"
                )


def make_plan(q: Tensor, k: Tensor, g: Geometry, lengths: Tensor | None = None) -> Plan:
    """The plan of the whole problem; no gradient, O((Sq + Sk) D) memory apart from tiles."""
    with torch.no_grad():
        return Plan(select_blocks(q, k, g, lengths), *draw_samples(g, lengths, q.device))


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
    """Query pools [..., P, D] and their factor 1/sqrt(max(1, q8.q8)); NaN where the pool is skipped."""
    values, _, used = pool(q, rows, g.first, range(0, g.live_rows(length)))
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


def _rows(pools: Pools, rows: int, start: int, stop: int, first: int = 0) -> Pools:
    """The pools that cover positions [start, stop), where pool 0 starts at floor(first / rows)."""
    base = first // rows
    lo, hi = max(start // rows - base, 0), max(-(-stop // rows) - base, 0)
    return pools[0][..., lo:hi, :], pools[1][..., lo:hi]


def _pad(pools: Pools, count: int) -> Pools:
    """Skipped pools behind the last, so that there are `count`."""
    missing = count - pools[1].shape[-1]
    pad = torch.nn.functional.pad
    return pad(pools[0], (0, 0, 0, missing)), pad(pools[1], (0, missing), value=float("nan"))


def _select_flat(index: int, candidates: range, g: Geometry, pools: dict[int, tuple[Pools, Pools]]) -> Tensor:
    """Every candidate scored: [Hkv, G, min(num_blocks, candidates)]."""
    size, rows = g.config.block_size, g.config.pool_size
    queries, keys = pools[rows]
    queries = _rows(queries, rows, index * size, (index + 1) * size, g.first)
    keys = _pad(_rows(keys, rows, candidates.start * size, candidates.stop * size), len(candidates) * (size // rows))
    return candidates.start + _best(_scores(queries, keys, size // rows), min(g.config.num_blocks, len(candidates)))


def _select_two_levels(index: int, candidates: range, g: Geometry, pools: dict[int, tuple[Pools, Pools]]) -> Tensor:
    """Rule 23: superblocks first, then the candidates of the best; [Hkv, G, <= num_blocks], -1 behind the last."""
    size, rows = g.config.block_size, g.config.pool_size
    span = (index * size, (index + 1) * size)
    per_super, per_block = SUPERBLOCK // size, size // rows
    supers = range(candidates.start // per_super, -(-candidates.stop // per_super))
    queries, keys = pools[COARSE_POOL]
    queries = _rows(queries, COARSE_POOL, *span, g.first)
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
    score = _scores(_rows(queries, rows, *span, g.first), keys, per_block)
    # The first and the last superblock may hold blocks that are no candidates.
    candidate = (block >= candidates.start) & (block < candidates.stop)
    order = torch.sort(score.masked_fill(~candidate, -torch.inf), dim=-1, descending=True, stable=True).indices
    block, candidate = block.gather(-1, order), candidate.gather(-1, order)
    taken = candidate & (candidate.cumsum(-1) <= g.config.num_blocks)
    block = block.masked_fill(~taken, candidates.stop).sort(-1).values[..., : g.config.num_blocks]
    return block.masked_fill(block == candidates.stop, -1)


# --- sampled residual ------------------------------------------------------------------------------------------------


def _mul32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, in int64 that never overflows."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: int) -> Tensor:
    """Output word 0 of Philox4x32-10 (Salmon et al. 2011) with key (key, 0); int64 tensors holding 32-bit words."""
    k0, k1 = key, 0
    for _ in range(10):
        high0, low0 = _mul32(c0, 0xD2511F53)
        high1, low1 = _mul32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0


def draw_samples(g: Geometry, lengths: Tensor | None, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rules 10 to 15: key index and weight of every sample, [B, Hq, local blocks, sample_size]."""
    c = g.config
    tiles = range(0) if g.exact else g.local_blocks
    shape = (g.batch, g.heads_q, len(tiles), c.sample_size)
    index = torch.full(shape, -1, dtype=torch.int32, device=device)
    weight = torch.zeros(shape, dtype=torch.float32, device=device)
    if c.sample_size == 0:
        return index, weight
    head = torch.arange(g.heads_q, device=device)[:, None]
    for n, tile in enumerate(tiles):
        start = tile * c.local_size if c.causal else 0
        for b, length in enumerate(g.clamp(lengths)):
            total = min(g.far(start, length), length) - c.sinks
            if total <= 0:
                continue
            m = min(c.sample_size, total) if c.stratified else c.sample_size
            s = torch.arange(m, device=device)
            zero = torch.zeros_like(s)
            u = philox(s + 0 * head, head + 0 * s, zero + start, zero, c.seed)
            if c.stratified:
                low = s * total // m
                size = (s + 1) * total // m - low
                at, factor = low + ((u * size) >> 32), size.float()
            else:
                # u * total may pass 2^63 only past 2^31 keys, which no shape reaches.
                at = (u * total) >> 32
                factor = torch.full_like(u, total).float() / torch.tensor(float(m), device=device)
            index[b, :, n, :m] = (c.sinks + at).int()
            weight[b, :, n, :m] = factor
    return index, weight
