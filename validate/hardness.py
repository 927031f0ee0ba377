"""How hard each head is for HyperAttention: a sample of its rows against all keys, in memory linear in the keys.

The quantities of the paper's bounds (Han et al. 2023, arXiv 2310.05869, section 2: alpha and kappa), and two that say more about
one plan: which of the largest logits its exact part holds, and how far sampling spreads the row sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.errors import EnvironmentFault
from hyperattention.geometry import Geometry
from hyperattention.selection import Plan
from hyperattention.validate.hardness_columns import Alphas, ColumnSums, ExactLse
from hyperattention.validate.hardness_rows import RowNumbers, row_logits, row_numbers, row_softmax
from hyperattention.validate.hardness_sets import ExactSets, RowTile

if TYPE_CHECKING:
    from hyperattention.validate.hardness_fused import FusedHardness

Found = TypeVar("Found", RowNumbers, Alphas)

ALL_ROWS, FEWEST, MOST = 512, 256, 512  # of a head that are looked at
_TILE = 2**18  # logits held at once on the processor
_TILES = 8  # that the rows make at least: each reads all keys up to its last row's


def sampled_rows(seen: range) -> Tensor:
    """Evenly strided rows of `seen`, int64: all of up to 512, of more one in 64, at least 256 and at most 512."""
    count = len(seen) if len(seen) <= ALL_ROWS else min(MOST, max(FEWEST, len(seen) // 64))
    return seen.start + (2 * torch.arange(count) + 1) * len(seen) // max(1, 2 * count)


@dataclass(frozen=True)
class Hardness:
    """What was found; `rows`: the sampled rows of each batch row, `numbers` [Hq, rows] and `alphas` of each batch row, on the CPU."""

    config: Config
    rows: tuple[Tensor, ...]
    numbers: tuple[RowNumbers, ...]
    alphas: tuple[Alphas, ...]

    def head(self, head: int) -> dict:
        """One head's numbers over all batch rows, for report.json; NaN where no row takes part, None where there is no such thing.

        cv_*: root mean square over the rows of the standard deviation of the sampled row sum over the row sum; cv_predicted is
        that of the node's own rule. Of alpha the largest over the batch rows.
        """
        left = self._of("log_residual", head)
        left = left[~left.isnan()]
        low, high = (_quantile(left, share) for share in (0.01, 0.99))
        drawn = self.config.sample_size > 0
        spread = {rule: _root_mean(self._of(rule, head)) if drawn else None for rule in ("stratified", "uniform")}
        return {
            "mass": _mean(self._of("mass", head)),
            "top16_recall": _mean(self._of("recall", head)),
            "alpha": self._alpha("whole", head),
            "alpha_without_first_32": self._alpha("rest", head),
            "alpha_blocks": self._alpha("blocks", head) if self.config.causal else None,
            "log_kappa": float(left.max() - left.min()) if left.numel() else math.nan,
            "log_kappa_p1_p99": high - low,
            "cv_stratified": spread["stratified"],
            "cv_uniform": spread["uniform"],
            "cv_predicted": spread["stratified" if self.config.stratified else "uniform"],
        }

    def split(self, heads: int) -> list["Hardness"]:
        """That of each `heads` query heads."""
        numbers, alphas = zip(*(_split(x, heads) for x in self.numbers)), zip(*(_split(x, heads) for x in self.alphas))
        return [replace(self, numbers=some, alphas=those) for some, those in zip(numbers, alphas, strict=True)]

    def at_rows(self, values: Tensor, head: int) -> Tensor:
        """Of values [B, Hq, Sq] those of one head at the sampled rows, float64 [rows of all batch rows], on the CPU."""
        return torch.cat([values[b, head, rows.to(values.device)].double().cpu() for b, rows in enumerate(self.rows)])

    def _of(self, name: str, head: int) -> Tensor:
        return torch.cat([getattr(numbers, name)[head] for numbers in self.numbers]).double()

    def _alpha(self, name: str, head: int) -> float:
        found = [float(getattr(alphas, name)[head]) for alphas in self.alphas]
        return max((value for value in found if not math.isnan(value)), default=math.nan)


def measured_cv(hardness: Hardness, lses: Sequence[Tensor], exact_lse: Tensor, head: int) -> float | None:
    """Root mean square of (sampled row sum / row sum - 1) of one head, over the sampled rows and `lses` [B,Hq,Sq], one a seed.

    It holds against `cv_predicted`. None where nothing is sampled.
    """
    if not hardness.config.sample_size:
        return None
    exact = hardness.at_rows(exact_lse, head)
    return _root_mean(torch.cat([torch.expm1(hardness.at_rows(lse, head) - exact).square() for lse in lses]))


def _split(found: Found, heads: int) -> list[Found]:
    return [type(found)(*part) for part in zip(*(x.split(heads) for x in vars(found).values()), strict=True)]


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _quantile(values: Tensor, share: float) -> float:
    return float(values.quantile(share, interpolation="nearest")) if values.numel() else math.nan


def _root_mean(squares: Tensor) -> float:
    return math.sqrt(_mean(squares)) if squares.numel() else math.nan


@torch.inference_mode()
def measure_hardness(
    q: Tensor,
    k: Tensor,
    config: Config,
    plan: Plan | Callable[[], Plan],
    lse: Tensor,
    exact_lse: ExactLse,
    lengths: Tensor | None = None,
) -> Hardness:
    """Hardness of one problem under `plan`, or what makes it, which a GPU does while it is busy; the plan must approximate.

    q [B,Hq,Sq,D], k [B,Hkv,Sk,D], lengths int [B]; lse [B,Hq,Sq]: of exact attention; `exact_lse` computes it for
    parts of the problem. Rows that are dead or see no key take no part. Arithmetic is fp32, fp64 for fp64 inputs; on a GPU Triton's
    kernels do it, fp64 apart. Raises UsageError for shapes, or a plan, that do not fit, EnvironmentFault on a GPU without Triton.
    """
    g = Geometry.of(q, k, k, config, lengths)

    @cache
    def checked() -> Plan:
        made = plan() if callable(plan) else plan
        made.check(g)
        return made

    rows, found = [], []
    for b, length in enumerate(g.clamp(lengths)):
        seen, sets = _seen(g, length), ExactSets(g, checked, b, length)
        rows.append(sampled_rows(seen))
        if seen and takes_kernels(q):
            found.append(_fused()(q[b], k[b], lse[b], sets, seen, rows[b].tolist()).measure())
            continue
        columns, of_row = ColumnSums(g, length, seen, rows[b].to(q.device)), slice(b, b + 1)
        numbers = _scan(q[b], k[b], sets, rows[b], columns)
        found.append((numbers, columns.alphas(q[of_row], k[of_row], lse[of_row], exact_lse)))
    numbers = tuple(RowNumbers(*(x.cpu() for x in vars(one).values())) for one, _ in found)
    return Hardness(config, tuple(rows), numbers, tuple(Alphas(*(x.cpu() for x in vars(one).values())) for _, one in found))


def takes_kernels(q: Tensor) -> bool:
    """Whether Triton's kernels measure inputs like these."""
    return q.is_cuda and q.dtype != torch.float64


def _fused() -> "type[FusedHardness]":
    try:
        from hyperattention.validate.hardness_fused import FusedHardness
    except ImportError as error:
        raise EnvironmentFault(
            f"the hardness of heads on a GPU needs Triton, which PyTorch for CUDA brings along on Linux: {error}; "
            f"install triton, or validate on the processor with --device cpu"
        ) from error
    return FusedHardness


def _seen(g: Geometry, length: int) -> range:
    """The live rows that see a key (operator rules 1 to 4)."""
    start = max(0, -g.first)
    return range(start, max(start, g.live_rows(length))) if length else range(0)


def _scan(q: Tensor, k: Tensor, sets: ExactSets, rows: Tensor, columns: ColumnSums) -> RowNumbers:
    """Numbers [Hq, rows] of the sampled rows of one batch row, q [Hq,Sq,D], k [Hkv,Sk,D]; their columns are added up."""
    g, wide = sets.g, torch.float64 if q.dtype == torch.float64 else torch.float32
    numbers = RowNumbers.empty(g.heads_kv, g.group, len(rows), device=q.device)
    for at, tile, heads in _tiles(sets, rows, q.device):
        head = slice(heads.start, heads.stop)
        some_q = q[head.start * g.group : head.stop * g.group][:, tile.at].to(wide).unflatten(0, (-1, g.group))
        logits = row_logits(some_q, k[head, : tile.stop].to(wide), tile, g.config)
        p, lse = row_softmax(logits)
        numbers.write(row_numbers(logits, lse, tile, sets, heads), head, at)
        columns.add(logits, p, tile, head)
    return RowNumbers(*(x.flatten(0, 1) for x in vars(numbers).values()))


def _tiles(sets: ExactSets, rows: Tensor, device: torch.device) -> Iterator[tuple[slice, RowTile, range]]:
    """The sampled rows in tiles of a bounded number of logits: their place in `rows`, the tile, key heads."""
    g, host, at = sets.g, rows.tolist(), 0
    most = -(-len(host) // _TILES)
    while at < len(host):
        longest = min(sets.length, host[min(at + most, len(host)) - 1] + g.first + 1) if g.config.causal else sets.length
        budget = max(1, _TILE // (g.group * longest))  # rows and key heads
        step = min(most, budget, len(host) - at)
        heads = min(g.heads_kv, budget // step)
        tile = RowTile.of(g, host[at : at + step], sets.length, device)
        for head in range(0, g.heads_kv, heads):
            yield slice(at, at + step), tile, range(head, min(head + heads, g.heads_kv))
        at += step
