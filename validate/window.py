"""Window + sinks as an operator: the rival at equal keys per query that a sceptic asks for first."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.geometry import Geometry
from hyperattention.parts import part
from hyperattention.validate.cost import window_baseline
from hyperattention.validate.operators import Operator

NAME = "window + sinks"
_TILE = 2**24  # logits held at once


def window_config(config: Config, length: int) -> Config:
    """The rival of a node over `length` keys; a node that is exact there stays as it is."""
    if config.exact_below >= length:
        return config
    return replace(window_baseline(replace(config, seed=0), length), seed=config.seed)


def window_operator(operator: Operator, length: int | None = None) -> Operator:
    """`operator` with every config replaced by its `window_config`; non-causal windows are computed here.

    The window is that of `length` keys, so that a prefill of fewer keeps it; None: of the call's own keys.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        seq_q, seq_k = q.shape[2], k.shape[2]
        if config.is_exact(seq_q, seq_k):
            return operator(q, k, v, config, lengths)
        window = window_config(config, length or seq_k)
        return operator(q, k, v, window, lengths) if config.causal else window_attention(q, k, v, window, lengths)

    return Operator(f"{NAME}, {operator.name}", run)


def window_attention(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Non-causal: the rows of each tile of `local_size` attend to their own tile, its two neighbours and the sinks before those.

    q [B,Hq,Sq,D], k [B,Hkv,Sk,D], v [B,Hkv,Sk,Dv], row i at position i; lengths int [B]. Returns o [B,Hq,Sq,Dv] in Q's dtype
    and lse float32 [B,Hq,Sq]; a row that sees nothing gives 0 and -inf. Arithmetic is fp32.
    """
    g = Geometry.of(q, k, v, config, lengths)
    o = torch.zeros(g.batch, g.heads_q, g.seq_q, g.head_dim_v, dtype=torch.float32, device=q.device)
    lse = torch.full((g.batch, g.heads_q, g.seq_q), -torch.inf, dtype=torch.float32, device=q.device)
    size, scale = config.local_size, config.resolved_scale(g.head_dim)
    step = max(1, _TILE // (g.heads_q * (3 * size + config.sinks)))
    for b, length in enumerate(g.clamp(lengths)):
        qb = q[b].float().unflatten(0, (g.heads_kv, g.group))
        for start in range(0, g.seq_q, size):
            low, high = min(max(0, start - size), length), min(length, start + 2 * size)
            near = [slice(0, min(config.sinks, low)), slice(low, max(low, high))]
            keys, values = (torch.cat([x[b, :, s].float() for s in near], 1)[:, None] for x in (k, v))
            if keys.shape[2] == 0:
                continue
            stop = min(start + size, g.seq_q)
            for row in range(start, stop, step):
                rows = slice(row, min(row + step, stop))
                found = part(qb[:, :, rows], keys, values, torch.zeros((), device=q.device), scale, torch.float32)
                o[b, :, rows], lse[b, :, rows] = (x.flatten(0, 1) for x in found)
    return o.to(q.dtype), lse
