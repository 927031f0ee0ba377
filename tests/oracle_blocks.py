"""The oracle's selector `blocks`: quantised pools, block scores, samples of a local block (rules 13 and 17 to 23)."""

from __future__ import annotations

import math

import numpy as np
from oracle_rules import Rows, draws

Pools = dict[int, tuple[np.ndarray, np.float32]]  # pool index: int8 values (as int32) and factor; skipped pools are absent


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


def _scoring(q: np.ndarray, pools: Pools, rows: Rows, size: int, query_block: int) -> list:
    """The query pools of `size` rows that a query block is scored with (20, 22)."""
    b = rows.config.block_size
    if not rows.config.strict_causal:
        return _within(pools, size, query_block * b, (query_block + 1) * b)
    if query_block > rows.tiles(b)[0]:
        return _within(pools, size, (query_block - 1) * b, query_block * b)
    alone = quantised_pools(q[:1], 1, rows.first, lambda p: not rows.dead(p), keys=False)
    return list(alone.values())


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
            mine = _scoring(q, q_pools[16], rows, 16, block)
            coarse = {s: _score(mine, _within(k_pools[16], 16, s * 256, min((s + 1) * 256, end))) for s in supers}
            kept = _best(coarse, max(32, -(-len(supers) // 8)))
            blocks = [j for j in blocks if j * b // 256 in kept]
        mine = _scoring(q, q_pools[c.pool_size], rows, c.pool_size, block)
        scores = {j: _score(mine, _within(k_pools[c.pool_size], c.pool_size, j * b, (j + 1) * b)) for j in blocks}
        chosen[block] = _best(scores, count)
    return chosen


def draw(rows: Rows, head: int, tile: int) -> list[tuple[int, np.float32]]:
    """The residual's samples of one local block: key and weight (11, 13)."""
    c = rows.config
    start = tile * c.local_size if c.causal else 0
    total = min(rows.far(start), rows.length) - c.sinks
    return [(c.sinks + index, weight) for index, weight in draws(c, total, head, start)]


def fill_plan(q: np.ndarray, k: np.ndarray, rows: Rows, chosen: list[np.ndarray], index: np.ndarray, weight: np.ndarray) -> None:
    """One batch row's plan: q [Hq,Sq,D], k [Hkv,Sk,D] fp32; chosen [Hq,tiles,num_blocks], index and weight [Hq,locals,samples]."""
    (blocks,) = chosen
    for h in range(len(q)):
        best = select(q[h], k[h * len(k) // len(q)], rows)
        for at, tile in enumerate(rows.tiles(rows.config.block_size)):
            blocks[h, at, : len(best[tile])] = best[tile]
        for at, tile in enumerate(rows.local_blocks()):
            for s, (key, w) in enumerate(draw(rows, h, tile)):
                index[h, at, s], weight[h, at, s] = key, w


def weights(rows: Rows, blocks: np.ndarray, index: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weight of every (row, key) pair of one head under its plan: [Sq, Sk] float64 (6, 9, 16, 19)."""
    c, j = rows.config, np.arange(rows.seq_k)
    picked = {tile: np.isin(j // c.block_size, blocks[at]) for at, tile in enumerate(rows.tiles(c.block_size))}
    local_at = {t: at for at, t in enumerate(rows.local_blocks())}
    w = rows.near()
    for i in range(rows.seq_q):
        position = rows.first + i
        heavy = picked[position // c.block_size] & (j >= c.sinks) & (j < min(rows.far(position), rows.length))
        assert not w[i, heavy].any(), "parts overlap"
        w[i, heavy] = 1
        at = local_at[rows.local_block(position)]
        free = (index[at] >= 0) & (w[i, index[at]] == 0)
        np.add.at(w[i], index[at, free], weight[at, free])
    return w
