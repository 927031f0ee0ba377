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


def row_logits(q: Tensor, k: Tensor, tile: RowTile, config: Config) -> Tensor:
    """Logits [kv heads, G, R, tile.stop] of the rows q [kv heads, G, R, D] of `tile`; -inf where a row does not see the key."""
    scaled = q * config.resolved_scale(q.shape[-1])
    logits = (scaled.flatten(1, 2) @ k[:, : tile.stop].transpose(-1, -2)).unflatten(1, q.shape[1:3])
    if config.causal:
        start = tile.stop - (tile.rows[-1] - tile.rows[0]) - 1  # every row of the tile sees all keys before
        start = min(max(start, 0), tile.stop)
        hidden = torch.arange(start, tile.stop, device=q.device) > tile.position[:, None]
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
    residual, most = _scaled(logits[..., : tile.reach], exactly[..., : tile.reach])
    log_residual = most + residual.sum(-1).log()
    stratified, uniform = torch.zeros_like(lse), torch.zeros_like(lse)
    if sets.g.config.sample_size and tile.reach:
        order = sets.order(tile, heads)
        ordered = residual if order is None else residual.gather(-1, order[:, None].expand_as(residual))
        stratified, uniform = draw_variances(ordered, *sets.draws(tile, sets.nodes(tile)), sets.g.config.sample_size)
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


def draw_variances(b: Tensor, first: Tensor, count: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Variance of the estimate of a sum from `samples` draws, stratified and uniform; b [..., R, N], not negative -> [..., R].

    A row's draws are of b[first], ..., b[first + count - 1], int64 [R, draws]; the variances of its draws are added.
    Stratified: one draw from each of min(samples, count) slices (rule 14). Uniform: with replacement (rule 15).
    """
    slices = count.clamp(max=samples)[..., None]
    place = torch.minimum(torch.arange(samples + 1, device=b.device), slices)  # slices past the last have no key
    edge = first[..., None] + place * count[..., None] // slices.clamp(min=1)
    sums, squares = _before(b, edge), _before(b * b, edge)
    stratified = edge.diff() * squares.diff() - sums.diff().square()
    total, square = (x[..., -1] - x[..., 0] for x in (sums, squares))
    uniform = (count * square - total.square()) / samples
    return stratified.sum(-1).clamp(min=0.0).sum(-1), uniform.clamp(min=0.0).sum(-1)


def _before(b: Tensor, edge: Tensor) -> Tensor:
    """Sums of b [..., R, N] before each place of `edge` [R, draws, E]: [..., R, draws, E]."""
    running, at = b.cumsum(-1), edge.flatten(1)
    found = running.gather(-1, (at - 1).clamp(0, b.shape[-1] - 1).expand(*b.shape[:-1], -1)).masked_fill(at == 0, 0.0)
    return found.unflatten(-1, edge.shape[1:])
