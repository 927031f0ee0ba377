"""The oracle's selector `sortlsh`: nodes met row by row, Gray ranks by definition, stable sorts (rules 24 to 29)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from oracle_rules import Rows, draws, word

from hyperattention.config import Config

# --- the tree (24, 25) -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """One pair of segments: `rows` are row indices, `keys` positions, both ascending; `start` goes into the draw (11)."""

    level: int
    rows: tuple[int, ...]
    keys: range
    start: int


def levels(rows: Rows) -> int:
    """Levels that the plan has room for: bits of the last key's local block."""
    c = rows.config
    return ((rows.seq_k - 1) // c.local_size).bit_length() if c.causal else 1


def nodes(rows: Rows) -> list[Node]:
    """Every node that a query row lies in, level by level, ascending."""
    c = rows.config
    if not c.causal:
        return [Node(0, tuple(range(rows.seq_q)), range(min(c.sinks, rows.length), rows.length), 0)]
    met: dict[tuple[int, int], list[int]] = {}
    for i in range(rows.seq_q):
        block = (rows.first + i) // c.local_size
        for level in range(c.local_overlap, max(0, block).bit_length()):
            if block >> level & 1:
                met.setdefault((level, block >> level), []).append(i)
    found = []
    for (level, segment), members in sorted(met.items()):
        size = c.local_size << level
        keys = range(max((segment - 1) * size, c.sinks), min(segment * size, rows.length))
        found.append(Node(level, tuple(members), keys, segment * size))
    return found


# --- hash and sort (26, 27) ------------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def gray_ranks(bits: int) -> dict[int, int]:
    """Place of each code in the reflected Gray sequence of `bits` bits."""
    sequence = [0, 1]
    for bit in range(1, bits):
        sequence += [code | 1 << bit for code in reversed(sequence)]
    return {code: rank for rank, code in enumerate(sequence)}


def projections(x: np.ndarray, c: Config) -> np.ndarray:
    """[S, r] fp32 of x [S, D] fp32."""
    sums = np.zeros((len(x), c.num_projections), np.float32)
    for d in range(x.shape[1]):
        u = word((d, 0, 0, 1), c.seed)
        for t in range(c.num_projections):
            sums[:, t] = sums[:, t] + (-x[:, d] if u >> t & 1 else x[:, d])
    return sums


def mean(tokens: np.ndarray) -> np.ndarray:
    """Mean [1, D] of at most 4,096 of the tokens [N, D], N > 0, each sum of 128 and then of 32 parts in order (26)."""
    count = min(len(tokens), 4096)
    total = np.zeros_like(tokens[0])
    for first in range(0, count, 128):
        part = np.zeros_like(total)
        for s in range(first, min(first + 128, count)):
            part = part + tokens[s * len(tokens) // count]
        total = total + part
    return (total / np.float32(count))[None]


def ranks(x: np.ndarray, rows: Rows, centred: range) -> list[int]:
    """Rank of each token of x [S, D] fp32; with hash_centre less the mean of the tokens `centred`."""
    c = rows.config
    least = np.zeros((1, c.num_projections), np.float32)
    if c.hash_centre and len(centred):
        least = projections(mean(x[centred.start : centred.stop]), c)
    table = gray_ranks(c.num_projections)
    return [table[sum(1 << t for t in range(c.num_projections) if row[t])] for row in projections(x, c) > least]


def fill_plan(q: np.ndarray, k: np.ndarray, rows: Rows, chosen: list[np.ndarray], index: np.ndarray, weight: np.ndarray) -> None:
    """One batch row's plan: q [Hq,Sq,D], k [Hkv,Sk,D] fp32; chosen: rows [Hq,levels,Sq] and keys [Hkv,levels,Sk] in sorted
    order; index and weight [Hq,nodes,samples]; all preset to "none"."""
    row_order, key_order = chosen
    busy = [(at, node) for at, node in enumerate(nodes(rows)) if len(node.keys)]
    live = sum(not rows.dead(rows.first + i) for i in range(rows.seq_q))
    for h, x in enumerate(q):
        rank = ranks(x, rows, range(live))
        for at, node in busy:
            order = sorted(node.rows, key=lambda i: (rows.dead(rows.first + i), 0 if rows.dead(rows.first + i) else rank[i], i))
            row_order[h, node.level, list(node.rows)] = order
            for s, (sample, w) in enumerate(draws(rows.config, len(node.keys), h, node.start)):
                index[h, at, s], weight[h, at, s] = sample, w
    for h, x in enumerate(k):
        rank = ranks(x, rows, range(rows.config.sinks, rows.length))
        for _, node in busy:
            key_order[h, node.level, list(node.keys)] = sorted(node.keys, key=lambda j: (rank[j], j))


# --- attention under a plan (6, 9, 16, 28, 29) -----------------------------------------------------------------------


def weights(rows: Rows, row_order: np.ndarray, key_order: np.ndarray, index: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weight of every (row, key) pair of one head under its plan: [Sq, Sk] float64."""
    c, w = rows.config, rows.near()
    b = c.block_size
    for at, node in enumerate(nodes(rows)):
        if not len(node.keys):
            continue
        own_rows, own_keys = row_order[node.level, list(node.rows)], key_order[node.level, list(node.keys)]
        live = sum(not rows.dead(rows.first + i) for i in node.rows)
        row_blocks, key_blocks = max(1, -(-live // b)), -(-len(node.keys) // b)
        taken = min(c.num_blocks, key_blocks)
        drawn = index[at] >= 0
        places, slices = index[at, drawn], weight[at, drawn]
        for place, i in enumerate(own_rows):
            centre = min((2 * (place // b) + 1) * key_blocks // (2 * row_blocks), key_blocks - 1)
            first = min(max(centre - taken // 2, 0), key_blocks - taken)
            far = rows.far(rows.first + int(i))
            heavy = own_keys[first * b : (first + taken) * b]
            heavy = heavy[heavy < far]
            assert not w[i, heavy].any(), "parts overlap"
            w[i, heavy] = 1
            free = ((places // b < first) | (places // b >= first + taken)) & (own_keys[places] < far)
            np.add.at(w[i], own_keys[places[free]], slices[free])
    return w
