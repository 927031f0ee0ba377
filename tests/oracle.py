"""The operator a second time: slow, dense, written from docs/operator.md alone and sharing no code with the package.

The plan is made tile by tile in numpy (IEEE fp32 where the rules ask for it, Python integers for Philox). Attention spells
out the weight of every (row, key) pair, 0, 1 or the length of a sample's slice, and is dense in float64 from there.
Only `Config`'s attribute values are read. Numbers in comments are the rules' numbers. oracle_rules.py has what both
selectors share, oracle_blocks.py and oracle_sortlsh.py the selectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import oracle_blocks
import oracle_sortlsh
from oracle_rules import Rows, clamped, is_exact

from hyperattention.config import Config


@dataclass(frozen=True)
class Plan:
    """Arrays laid out as the package's plan: int32 with -1 = none, but sample_weight: float32 with 0 = none.

    chosen: (blocks [B,Hq,tiles,num_blocks],) of `blocks`, (rows [B,Hq,levels,Sq], keys [B,Hkv,levels,Sk]) of `sortlsh`.
    """

    chosen: tuple[np.ndarray, ...]
    sample_index: np.ndarray
    sample_weight: np.ndarray

    @property
    def selection(self) -> np.ndarray:
        """What a backend's select writes."""
        return self.chosen[0] if len(self.chosen) == 1 else np.concatenate([x.ravel() for x in self.chosen])


def make_plan(q: np.ndarray, k: np.ndarray, config: Config, lengths=None) -> Plan:
    """q [B,Hq,Sq,D], k [B,Hkv,Sk,D], any floating dtype; pools, scores and hashes are fp32."""
    (batch, heads, seq_q, _), (_, heads_kv, seq_k, _) = q.shape, k.shape
    shape, exact = Rows(config, seq_q, seq_k, seq_k), is_exact(config, seq_q, seq_k)
    if config.selector == "blocks":
        fill, draws = oracle_blocks.fill_plan, 0 if exact else len(shape.local_blocks())
        sizes = [(heads, 0 if exact else len(shape.tiles(config.block_size)), config.num_blocks)]
    else:
        fill, draws = oracle_sortlsh.fill_plan, 0 if exact else len(oracle_sortlsh.nodes(shape))
        levels = 0 if exact else oracle_sortlsh.levels(shape)
        sizes = [(heads, levels, seq_q), (heads_kv, levels, seq_k)]
    chosen = tuple(np.full((batch, *size), -1, np.int32) for size in sizes)
    index = np.full((batch, heads, draws, config.sample_size), -1, np.int32)
    weight = np.zeros(index.shape, np.float32)
    with np.errstate(all="ignore"):
        for b, length in enumerate(clamped(lengths, batch, seq_k)):
            if not exact:
                rows = Rows(config, seq_q, seq_k, length)
                fill(q[b].astype(np.float32), k[b].astype(np.float32), rows, [x[b] for x in chosen], index[b], weight[b])
    return Plan(chosen, index, weight)


def weights(rows: Rows, plan: Plan, b: int, head: int, head_kv: int) -> np.ndarray:
    """Weight of every (row, key) pair of one head: [Sq, Sk] float64; 0 where they do not meet, the slice's length for a sample."""
    if is_exact(rows.config, rows.seq_q, rows.seq_k):
        return rows.visible().astype(np.float64)
    samples = plan.sample_index[b, head], plan.sample_weight[b, head]
    if rows.config.selector == "blocks":
        return oracle_blocks.weights(rows, plan.chosen[0][b, head], *samples)
    row_order, key_order = plan.chosen
    return oracle_sortlsh.weights(rows, row_order[b, head], key_order[b, head_kv], *samples)


def attention(q, k, v, config: Config, lengths, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """O [B,Hq,Sq,Dv] and LSE [B,Hq,Sq], float64, from the dense weights of `plan`."""
    (batch, heads, seq_q, dim), (_, heads_kv, seq_k, _) = q.shape, k.shape
    scale = config.scale if config.scale > 0 else 1 / math.sqrt(dim)
    o, lse = np.zeros((batch, heads, seq_q, v.shape[-1])), np.full((batch, heads, seq_q), -np.inf)
    for b, length in enumerate(clamped(lengths, batch, seq_k)):
        rows = Rows(config, seq_q, seq_k, length)
        for h in range(heads):
            head_kv = h * heads_kv // heads
            w = weights(rows, plan, b, h, head_kv)
            assert not w[:, length:].any()
            seen = w.any(1)  # the others keep O = 0, LSE = -inf (4)
            w = w[seen, :length]
            if not len(w):
                continue
            keys, values = (x[b, head_kv, :length].astype(np.float64) for x in (k, v))
            # einsum: the problems are small, and a BLAS library's threads would only wait for each other.
            logits = np.where(w > 0, scale * np.einsum("id,jd->ij", q[b, h, seen].astype(np.float64), keys), -np.inf)
            largest = logits.max(1, keepdims=True)
            e = w * np.exp(logits - largest)
            o[b, h, seen] = np.einsum("ij,jd->id", e, values) / e.sum(1, keepdims=True)
            lse[b, h, seen] = largest[:, 0] + np.log(e.sum(1))
    return o, lse
