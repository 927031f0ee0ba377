"""The operator a second time: slow, dense, written from docs/operator.md alone and sharing no code with the package.

The plan is made tile by tile in numpy (IEEE fp32 where the rules ask for it, Python integers for Philox). Attention spells
out the weight of every (row, key) pair, 0, 1 or the length of a sample's slice, and is dense in float64 from there.
Only `Config`'s attribute values are read. Numbers in comments are the rules' numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hyperattention.config import Config

Pools = dict[int, tuple[np.ndarray, np.float32]]  # pool index: int8 values (as int32) and factor; skipped pools are absent


# --- randomness (10) -------------------------------------------------------------------------------------------------


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 10) -> tuple[int, int, int, int]:
    """Philox of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@lru_cache(maxsize=None)
def _draw(sample: int, head: int, start: int, seed: int) -> int:
    return philox4x32((sample, head, start, 0), (seed, 0))[0]


# --- geometry (1 to 5, 8, 9) -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The query rows of one batch row: where they lie, what is far from them."""

    config: Config
    seq_q: int
    seq_k: int
    length: int  # n_b, clamped

    @property
    def first(self) -> int:
        return self.seq_k - self.seq_q if self.config.causal else 0

    def dead(self, position: int) -> bool:
        return position >= self.length and (bool(self.config.causal) or self.seq_q == self.seq_k)

    def local_start(self, position: int) -> int:
        c = position // self.config.local_size
        return max(0, c - self.config.local_overlap) * self.config.local_size

    def far(self, position: int) -> int:
        return self.local_start(position) if self.config.causal else self.length

    def tiles(self, size: int) -> list[int]:
        return sorted({(self.first + i) // size for i in range(self.seq_q)})

    def local_block(self, position: int) -> int:
        """Rows of one local block share their samples (13)."""
        return position // self.config.local_size if self.config.causal else 0

    def local_blocks(self) -> list[int]:
        return sorted({self.local_block(self.first + i) for i in range(self.seq_q)})


def _lengths(lengths, batch: int, seq_k: int) -> list[int]:
    return [min(max(int(n), 0), seq_k) for n in ([seq_k] * batch if lengths is None else lengths)]


def is_exact(config: Config, seq_q: int, seq_k: int) -> bool:
    return seq_k <= config.exact_below or seq_q <= 64


# --- the plan --------------------------------------------------------------------------------------------------------


def quantised_pools(x: np.ndarray, rows: int, first: int, eligible, keys: bool) -> Pools:
    """x [S, D] fp32, its row i at position first + i; `eligible(position)` says whether a row enters its pool (18, 20)."""
    sums: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}
    for i, row in enumerate(x):
        tile = (first + i) // rows
        if eligible(first + i):
            sums[tile] = sums[tile] + row if tile in sums else row
            counts[tile] = counts.get(tile, 0) + 1
    pools: Pools = {}
    for tile, total in sums.items():
        mean = total / np.float32(counts[tile])
        if not np.isfinite(mean).all():
            continue
        a = np.abs(mean).max() / np.float32(127)
        if a == 0:
            a = np.float32(1)
        x8 = np.clip(np.rint(mean / a), -127, 127).astype(np.int32)
        norm = np.float32(max(1, int(x8 @ x8)))
        pools[tile] = (x8, a if keys else np.float32(1) / np.sqrt(norm))
    return pools


def _score(q_pools: list, k_pools: list) -> float:
    """Score of one query block with one key block from their pools (20); -inf where either has none (21)."""
    if not q_pools or not k_pools:
        return -math.inf
    q8, r = np.stack([p[0] for p in q_pools]), np.array([p[1] for p in q_pools], np.float32)
    k8, a = np.stack([p[0] for p in k_pools]), np.array([p[1] for p in k_pools], np.float32)
    dots = (k8 @ q8.T).astype(np.float32)
    return float(((dots * r).max(axis=1) * a).max())


def _best(scores: dict[int, float], count: int) -> list[int]:
    """Ascending indices of the `count` largest scores, ties to the smaller index (21)."""
    return sorted(sorted(scores, key=lambda j: (-scores[j], j))[:count])


def _within(pools: Pools, rows: int, start: int, stop: int) -> list:
    """The pools of `rows` rows that begin in positions [start, stop)."""
    return [pools[t] for t in range(-(-start // rows), -(-stop // rows)) if t in pools]


def candidates(rows: Rows, query_block: int) -> range:
    """Key blocks that a query block may choose from (19)."""
    b = rows.config.block_size
    position = max(query_block * b, rows.first)
    return range(rows.config.sinks // b, -(-min(rows.far(position), rows.length) // b))


def select(q: np.ndarray, k: np.ndarray, rows: Rows) -> dict[int, list[int]]:
    """Chosen key blocks of every query block of one head; q [Sq, D], k [Sk, D] fp32."""
    c, b = rows.config, rows.config.block_size
    two_levels = 256 % b == 0 and b % 16 == 0
    q_pools, k_pools = {}, {}
    for size in {c.pool_size, 16} if two_levels else {c.pool_size}:
        q_pools[size] = quantised_pools(q, size, rows.first, lambda p: not rows.dead(p), keys=False)
        k_pools[size] = quantised_pools(k, size, 0, lambda p: c.sinks <= p < rows.length, keys=True)
    chosen = {}
    for block in rows.tiles(b):
        blocks = list(candidates(rows, block))
        count = min(c.num_blocks, len(blocks))
        supers = sorted({j * b // 256 for j in blocks})
        if two_levels and len(supers) > 32:  # (23)
            end = (blocks[-1] + 1) * b
            mine = _within(q_pools[16], 16, block * b, (block + 1) * b)
            coarse = {s: _score(mine, _within(k_pools[16], 16, s * 256, min((s + 1) * 256, end))) for s in supers}
            kept = _best(coarse, max(32, -(-len(supers) // 8)))
            blocks = [j for j in blocks if j * b // 256 in kept]
        mine = _within(q_pools[c.pool_size], c.pool_size, block * b, (block + 1) * b)
        scores = {j: _score(mine, _within(k_pools[c.pool_size], c.pool_size, j * b, (j + 1) * b)) for j in blocks}
        chosen[block] = _best(scores, count)
    return chosen


def draw(rows: Rows, head: int, tile: int) -> list[tuple[int, np.float32]]:
    """The residual's samples of one local block: key and weight (11, 13 to 15)."""
    c = rows.config
    start = tile * c.local_size if c.causal else 0
    total = min(rows.far(start), rows.length) - c.sinks
    samples = []
    if total <= 0:
        return samples
    count = min(c.sample_size, total) if c.stratified else c.sample_size
    for s in range(count):
        u = _draw(s, head, start, c.seed)
        if c.stratified:
            low = s * total // count
            size = (s + 1) * total // count - low
            samples.append((c.sinks + low + (u * size >> 32), np.float32(size)))
        else:
            samples.append((c.sinks + (u * total >> 32), np.float32(total) / np.float32(c.sample_size)))
    return samples


@dataclass(frozen=True)
class Plan:
    """Arrays laid out as the package's plan: blocks, sample_index int32 (-1 = none), sample_weight float32 (0 = none)."""

    blocks: np.ndarray
    sample_index: np.ndarray
    sample_weight: np.ndarray


def make_plan(q: np.ndarray, k: np.ndarray, config: Config, lengths=None) -> Plan:
    """q [B,Hq,Sq,D], k [B,Hkv,Sk,D], any floating dtype; pools and scores are fp32."""
    (batch, heads, seq_q, _), (_, heads_kv, seq_k, _) = q.shape, k.shape
    any_rows = Rows(config, seq_q, seq_k, seq_k)
    exact = is_exact(config, seq_q, seq_k)
    tiles = [] if exact else any_rows.tiles(config.block_size)
    locals_ = [] if exact else any_rows.local_blocks()
    blocks = np.full((batch, heads, len(tiles), config.num_blocks), -1, np.int32)
    index = np.full((batch, heads, len(locals_), config.sample_size), -1, np.int32)
    weight = np.zeros(index.shape, np.float32)
    with np.errstate(all="ignore"):
        for b, length in enumerate(_lengths(lengths, batch, seq_k)):
            rows = Rows(config, seq_q, seq_k, length)
            for h in range(heads):
                chosen = {} if exact else select(q[b, h].astype(np.float32), k[b, h * heads_kv // heads].astype(np.float32), rows)
                for at, tile in enumerate(tiles):
                    blocks[b, h, at, : len(chosen[tile])] = chosen[tile]
                for at, tile in enumerate(locals_):
                    for s, (key, w) in enumerate(draw(rows, h, tile)):
                        index[b, h, at, s], weight[b, h, at, s] = key, w
    return Plan(blocks, index, weight)


# --- attention under a plan ------------------------------------------------------------------------------------------


def weights(rows: Rows, position: int, blocks, samples) -> np.ndarray:
    """Weight of every key for the row at `position`: [Sk] float64 (6 to 9, 16, 19). `samples` are (key, weight) pairs."""
    c, j = rows.config, np.arange(rows.seq_k)
    valid = j < rows.length
    if is_exact(c, rows.seq_q, rows.seq_k):
        return (valid & (j <= position) if c.causal else valid).astype(np.float64)
    far = rows.far(position)
    local = valid & (j >= rows.local_start(position)) & (j <= position) if c.causal else np.zeros_like(valid)
    sinks = j < min(c.sinks, far, rows.length)
    heavy = valid & (j < far) & (j >= c.sinks) & np.isin(j // c.block_size, blocks)
    taken = local | sinks | heavy
    w = taken.astype(np.float64)
    for key, slice_length in samples:
        if not taken[key]:
            w[key] += slice_length
    return w


def attention(q, k, v, config: Config, lengths, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """O [B,Hq,Sq,Dv] and LSE [B,Hq,Sq], float64, from the dense weights of `plan`."""
    (batch, heads, seq_q, dim), (_, heads_kv, seq_k, _) = q.shape, k.shape
    scale = config.scale if config.scale > 0 else 1 / math.sqrt(dim)
    o, lse = np.zeros((batch, heads, seq_q, v.shape[-1])), np.full((batch, heads, seq_q), -np.inf)
    for b, length in enumerate(_lengths(lengths, batch, seq_k)):
        rows = Rows(config, seq_q, seq_k, length)
        tile_at = {t: at for at, t in enumerate(rows.tiles(config.block_size))}
        local_at = {t: at for at, t in enumerate(rows.local_blocks())}
        exact = is_exact(config, seq_q, seq_k)
        for h in range(heads):
            keys, values = (x[b, h * heads_kv // heads].astype(np.float64) for x in (k, v))
            queries = q[b, h].astype(np.float64)
            for i in range(seq_q):
                position, blocks, samples = rows.first + i, [], []
                if not exact:
                    at = local_at[rows.local_block(position)]
                    blocks = [x for x in plan.blocks[b, h, tile_at[position // config.block_size]] if x >= 0]
                    pairs = zip(plan.sample_index[b, h, at], plan.sample_weight[b, h, at])
                    samples = [(key, w) for key, w in pairs if key >= 0]
                w = weights(rows, position, blocks, samples)
                seen = np.flatnonzero(w)
                if len(seen) == 0:
                    continue  # (4)
                s = scale * (keys[seen] @ queries[i])
                e = w[seen] * np.exp(s - s.max())
                o[b, h, i] = e @ values[seen] / e.sum()
                lse[b, h, i] = s.max() + math.log(e.sum())
    return o, lse
