"""What each sampled row says of its head's hardness: every key of the row is looked at, a tile of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.validate.hardness_sets import ExactSets, RowTile

TOP = 16  # largest logits of a row that its exact part should hold


@dataclass(frozen=True)
class RowNumbers:
    """Numbers of single rows; every field [..., rows], floating.

    mass: share of the row's sum that the exact part holds. recall: share of the row's 16 largest logits (of all, where it sees
    fewer) that lie in it; a sampled key is no hit. log_residual: log of the row's sum without the exact part (the kappa of Han et
    al. 2023 is its largest over its smallest exponential); NaN where no key is left. stratified, uniform: variance of the
    sampled row sum over the row sum, squared, under either rule (docs/operator.md, "Estimator"); 0 without samples.
    """

    mass: Tensor
    recall: Tensor
    log_residual: Tensor
    stratified: Tensor
    uniform: Tensor

    @classmethod
    def empty(cls, *shape: int, device: torch.device) -> "RowNumbers":
        """Room for numbers of that shape."""
        return cls(*(torch.empty(shape, dtype=torch.float64, device=device) for _ in fields(cls)))

    def write(self, part: "RowNumbers", heads: slice, rows: slice) -> None:
        """Puts the numbers [kv heads, G, R] of `part` into these [Hkv, G, rows]."""
        for name, values in vars(part).items():
            getattr(self, name)[heads, :, rows] = values


def row_logits(q: Tensor, k: Tensor, tile: RowTile, position: Tensor, config: Config) -> Tensor:
    """Logits [kv heads, G, R, tile.stop] of rows q [kv heads, G, R, D] at `position` [R]; -inf where a row does not see the key."""
    logits = (q * config.resolved_scale(q.shape[-1])) @ k[:, : tile.stop].transpose(-1, -2)[:, None]
    if config.causal:
        start = tile.block * config.local_size  # every row of the tile sees all keys before
        hidden = torch.arange(start, tile.stop, device=q.device) > position[:, None]
        logits[..., start:].masked_fill_(hidden, -torch.inf)
    return logits


def row_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and LSE of logits [..., n], each row with one that is finite."""
    most = logits.amax(-1, keepdim=True)
    p = (logits - most).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), (most + total.log()).squeeze(-1)


def row_numbers(logits: Tensor, lse: Tensor, tile: RowTile, sets: ExactSets, heads: range) -> RowNumbers:
    """Numbers [kv heads, G, R] of the rows of `tile` from their logits [kv heads, G, R, tile.stop] and LSE [kv heads, G, R]."""
    exactly = sets.mask(tile, heads)
    value, key = largest(logits, TOP)
    real = value > -torch.inf
    recall = (exactly.gather(-1, key) & real).sum(-1) / real.sum(-1)
    far = min(sets.far(tile), tile.stop)  # every row sees all keys before; those from here on are exact
    residual, most = _scaled(logits[..., :far], exactly[..., :far])
    log_residual = most + residual.sum(-1).log()
    stratified, uniform = torch.zeros_like(lse), torch.zeros_like(lse)
    if sets.g.config.sample_size:
        for keys in sets.candidates(tile, heads):
            part = residual[..., keys] if isinstance(keys, slice) else _ordered(residual, keys)
            of_draw = draw_variances(part, sets.g.config.sample_size)
            stratified, uniform = stratified + of_draw[0], uniform + of_draw[1]
    share = torch.exp(2 * (most - lse))
    none_left = most == -torch.inf
    return RowNumbers(
        mass=1 - log_residual.sub(lse).exp(),
        recall=recall,
        log_residual=log_residual.masked_fill(none_left, torch.nan),
        stratified=stratified * share,
        uniform=uniform * share,
    )


def _scaled(logits: Tensor, exactly: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - most) [..., n], 0 where `exactly`, and most [...], the largest logit elsewhere (-inf: there is none)."""
    if logits.shape[-1] == 0:
        return logits, torch.full_like(logits[..., :0].sum(-1), -torch.inf)
    left = logits.masked_fill(exactly, -torch.inf)
    most = left.amax(-1, keepdim=True)
    return left.sub_(most.clamp(min=torch.finfo(most.dtype).min)).exp_(), most.squeeze(-1)


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The min(count, n) largest of x [..., n] and their places, in any order: as `topk`, by way of the largest of each 16."""
    size, n = 16, x.shape[-1]
    whole = n // size * size
    if whole // size <= count:
        every = x.topk(min(count, n))
        return every.values, every.indices
    # Whatever is among the `count` largest lies in one of the `count` groups with the largest maxima, or behind the last group.
    group = x[..., :whole].unflatten(-1, (-1, size)).amax(-1).topk(count).indices
    inside = (group[..., None] * size + torch.arange(size, device=x.device)).flatten(-2)
    tail = torch.arange(whole, n, device=x.device).expand(*x.shape[:-1], -1)
    key = torch.cat([inside, tail], -1)
    value, at = x.gather(-1, key).topk(count)
    return value, key.gather(-1, at)


def _ordered(residual: Tensor, keys: Tensor) -> Tensor:
    """Columns `keys` [kv heads, N] of residual [kv heads, G, R, S]; a key past the last column is in no row's residual."""
    inside = keys.clamp(max=residual.shape[-1] - 1)[:, None, None].expand(*residual.shape[:-1], -1)
    return residual.gather(-1, inside).masked_fill((keys >= residual.shape[-1])[:, None, None], 0.0)


def draw_variances(b: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Variance of the estimate of sum(b) from `samples` draws, stratified and uniform; b [..., N], not negative -> [...].

    Stratified: one draw from each of min(samples, N) slices (rule 14). Uniform: with replacement (rule 15).
    """
    n, m = b.shape[-1], min(samples, b.shape[-1])
    edge = torch.arange(m + 1, device=b.device) * n // m
    size = edge.diff()
    running = torch.nn.functional.pad(b.cumsum(-1, dtype=torch.float64), (1, 0))
    slices = running[..., edge].diff()
    squares = b * b
    weighted = squares @ size.repeat_interleave(size).to(b.dtype)
    stratified = weighted - slices.square().sum(-1)
    uniform = (n * squares.sum(-1) - running[..., -1].square()) / samples
    return stratified.clamp(min=0.0), uniform.clamp(min=0.0)
