"""Random numbers and the sampled residual's draw (rules 10 to 15 of docs/operator.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.geometry import Geometry

_MASK32 = 0xFFFFFFFF


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


def _draw(c: Config, total: int, head: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Indices into `total` candidates and weights, [heads, samples]."""
    m = min(c.sample_size, total) if c.stratified else c.sample_size
    s = torch.arange(m, device=head.device)
    zero = torch.zeros_like(s)
    u = philox(s + 0 * head, head + 0 * s, zero + start, zero, c.seed)
    if c.stratified:
        low = s * total // m
        size = (s + 1) * total // m - low
        return low + ((u * size) >> 32), size.float().expand_as(u)
    # u * total may pass 2^63 only past 2^31 keys, which no shape reaches.
    return (u * total) >> 32, torch.full_like(u, total).float() / torch.tensor(float(m), device=head.device)


def draw_samples(g: Geometry, lengths: Tensor | None, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Index (int32, -1 = none) and weight (float32) of every sample, [B, Hq, draws, sample_size].

    The index is a key for `blocks` and a place in the node's sorted keys for `sortlsh` (rule 13).
    """
    c = g.config
    shape = (g.batch, g.heads_q, len(g.draws(0)), c.sample_size)
    index = torch.full(shape, -1, dtype=torch.int32, device=device)
    weight = torch.zeros(shape, dtype=torch.float32, device=device)
    head = torch.arange(g.heads_q, device=device)[:, None]
    for b, length in enumerate(g.clamp(lengths)):
        for n, (start, total) in enumerate(g.draws(length)):
            if total == 0 or c.sample_size == 0:
                continue
            at, factor = _draw(c, total, head, start)
            m = at.shape[-1]
            index[b, :, n, :m] = (at if g.sorts else at + c.sinks).int()
            weight[b, :, n, :m] = factor
    return index, weight
