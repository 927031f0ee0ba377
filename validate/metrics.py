"""Metrics between two computations of the same thing: logits token by token, attention outputs head by head.

Cosine alone misses an output of the wrong size and a mean alone misses one bad head, so every comparison carries the
norm ratio, the relative L2 error and the worst head and position as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean

import torch
from torch import Tensor

from hyperattention.validate.perplexity import perplexity

_CHUNK = 2**24  # logits converted to float64 at once
POSITION_BUCKETS = 16


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error over `blocks` blocks of neighbouring tokens (None for fewer than two)."""

    mean: float
    se: float | None
    blocks: int


@dataclass(frozen=True)
class TokenMetrics:
    """Per token, float64 [tokens]: nats of the target under exact and ours, KL(exact || ours), top-1 agreement 0/1."""

    nll_exact: Tensor
    nll_ours: Tensor
    kl: Tensor
    top1: Tensor

    @property
    def delta(self) -> Tensor:
        return self.nll_ours - self.nll_exact

    def tail(self, count: int) -> "TokenMetrics":
        """The last `count` tokens."""
        return TokenMetrics(*(x[-count:] for x in (self.nll_exact, self.nll_ours, self.kl, self.top1)))


def token_metrics(exact: Tensor, ours: Tensor, targets: Tensor) -> TokenMetrics:
    """Compares logits [S, vocabulary] of any float dtype for targets int [S]; arithmetic in float64, a chunk at a time."""
    if exact.shape != ours.shape or exact.shape[0] != targets.shape[0]:
        raise ValueError(f"logits {tuple(exact.shape)} and {tuple(ours.shape)} for {targets.shape[0]} targets")
    parts: list[tuple[Tensor, ...]] = []
    step = max(1, _CHUNK // exact.shape[1])
    for start in range(0, exact.shape[0], step):
        rows = slice(start, start + step)
        target = targets[rows].to(exact.device).long()[:, None]
        p = torch.log_softmax(exact[rows].double(), -1)
        r = torch.log_softmax(ours[rows].to(exact.device).double(), -1)
        kl = (p.exp() * (p - r)).sum(-1)
        same = (p.argmax(-1) == r.argmax(-1)).double()
        parts.append((-p.gather(-1, target)[:, 0], -r.gather(-1, target)[:, 0], kl, same))
    return TokenMetrics(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def estimate(windows: list[Tensor], block: int) -> Estimate:
    """Mean over all tokens of all windows [tokens each]; tokens within `block` of each other count as one observation."""
    everything = torch.cat(windows)
    means = torch.cat([torch.stack([part.mean() for part in w.split(block)]) for w in windows])
    se = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else None
    return Estimate(float(everything.mean()), se, len(means))


def quantile(values: Tensor, share: float) -> float:
    """As torch.quantile, between the two nearest in proportion, but of any number of values in every release; NaN where one is NaN."""
    place = share * (values.numel() - 1)
    ranked = values.flatten().sort().values  # NaN last; `kthvalue` takes quadratic time where values are in order already
    low, high, most = (float(ranked[at]) for at in (math.floor(place), math.ceil(place), -1))
    return most if math.isnan(most) else low + (place - math.floor(place)) * (high - low)


def spread(values: Sequence[float]) -> dict:
    """Mean, least and largest of some numbers, for report.json."""
    return {"mean": mean(values), "min": min(values), "max": max(values)}


def summarise(windows: list[TokenMetrics], block: int) -> dict:
    """Estimates of delta nats, KL, top-1 and exact nats over the windows, exp(nats), and the tail of the KL, for report.json."""
    kl = torch.cat([w.kl for w in windows])
    nats = {
        "exact_nats": asdict(estimate([w.nll_exact for w in windows], block)),
        "delta_nats": asdict(estimate([w.delta for w in windows], block)),
    }
    return {
        "tokens": int(kl.numel()),
        "windows": len(windows),
        **nats,
        "perplexity": perplexity(nats),
        "kl": asdict(estimate([w.kl for w in windows], block)),
        "top1": asdict(estimate([w.top1 for w in windows], block)),
        "kl_p99": quantile(kl, 0.99),
        "kl_max": float(kl.max()),
    }


def by_position(windows: list[TokenMetrics], first: int = 0) -> list[dict]:
    """Mean delta nats, KL and top-1 in up to 16 equal buckets of position; the first token of each window stands at `first`."""
    length = windows[0].kl.numel()
    size = -(-length // min(POSITION_BUCKETS, length))
    numbers = {"delta_nats": [w.delta for w in windows], "kl": [w.kl for w in windows], "top1": [w.top1 for w in windows]}
    rows = []
    for start in range(0, length, size):
        part = slice(start, min(start + size, length))
        means = {name: float(torch.stack([values[part].mean() for values in found]).mean()) for name, found in numbers.items()}
        rows.append({"from": first + start, "to": first + part.stop, **means})
    return rows


@dataclass(frozen=True)
class TensorError:
    """`ours` against `exact`, both [B, H, S, D] (or any shape for the first four numbers)."""

    relative_l2: float
    cosine: float
    norm_ratio: float
    max_abs: float


def tensor_error(ours: Tensor, exact: Tensor) -> TensorError:
    """Relative L2, cosine, ratio of norms and largest difference, in float64 (float32 on chunks too large to copy)."""
    wide = torch.float64 if ours.numel() <= 2**27 else torch.float32
    a, b = ours.detach().to(exact.device, wide).flatten(), exact.detach().to(wide).flatten()
    na, nb = float(a.norm()), float(b.norm())
    difference = float((a - b).norm())
    if nb == 0:
        return TensorError(0.0 if na == 0 else math.inf, 1.0 if na == 0 else 0.0, 1.0 if na == 0 else math.inf, float((a - b).abs().max()))
    cosine = float(a @ b) / (na * nb) if na else 0.0
    return TensorError(difference / nb, cosine, na / nb, float((a - b).abs().max()))


def row_errors(ours: Tensor, exact: Tensor) -> Tensor:
    """Relative L2 error of each row (last axis), float32, of any leading shape."""
    return (ours.float() - exact.float()).norm(dim=-1) / exact.float().norm(dim=-1).clamp(min=1e-12)


def head_errors(ours: Tensor, exact: Tensor) -> list[TensorError]:
    """The error of each head, [B, H, S, D]."""
    return [tensor_error(ours[:, h], exact[:, h]) for h in range(ours.shape[1])]


def attention_error(o: Tensor, lse: Tensor, exact_o: Tensor, exact_lse: Tensor, heads: Sequence[TensorError]) -> dict:
    """One layer's output [B, H, S, D] and LSE [B, H, S] against exact attention, for the per-layer table; `heads`: `head_errors`.

    A bias of the LSE means double or missed mass; its spread is the noise of sampling. Rows whose exact LSE is -inf (no
    visible key) are left out of the LSE numbers.
    """
    whole = tensor_error(o, exact_o)
    worst = max(range(len(heads)), key=lambda h: heads[h].relative_l2)
    row = row_errors(o, exact_o)
    per_position = row.mean(dim=(0, 1))
    bucket = -(-per_position.numel() // POSITION_BUCKETS)
    buckets = torch.stack([part.mean() for part in per_position.split(bucket)])
    seen = torch.isfinite(exact_lse)
    difference = (lse.double() - exact_lse.double())[seen]
    return {
        **asdict(whole),
        "worst_head": worst,
        "worst_head_relative_l2": heads[worst].relative_l2,
        "worst_position": int(buckets.argmax()) * bucket,
        "worst_position_relative_l2": float(buckets.max()),
        "row_p99": quantile(row.flatten()[:: max(1, row.numel() // 2**20)], 0.99),
        "lse_bias": float(difference.mean()),
        "lse_std": float(difference.std()) if difference.numel() > 1 else 0.0,
    }
