"""Attention over one set of keys, and the merge of disjoint parts (rules 4 and 6 of docs/operator.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention over one set of keys: output and log of the sum; `bias` is -inf for a masked pair (rule 4)."""
    logits = (q @ k.transpose(-1, -2)).to(wide) * scale + bias
    largest = logits.amax(-1, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    p = torch.exp(logits - largest)
    total = p.sum(-1)
    o = (p.to(q.dtype) @ v).to(wide) / torch.where(total == 0, 1.0, total)[..., None]
    return o, total.log() + largest.squeeze(-1)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins disjoint parts (o [..., D], lse [...]) by log-sum-exp; parts of -inf weigh nothing (rule 4)."""
    lses = torch.stack([lse for _, lse in parts])
    lse = torch.logsumexp(lses, 0)
    weight = torch.exp(lses - torch.where(lse == -torch.inf, 0.0, lse))
    o = torch.zeros_like(parts[0][0])
    for w, (part, _) in zip(weight, parts, strict=True):
        o = o + w[..., None] * part
    return o, lse
