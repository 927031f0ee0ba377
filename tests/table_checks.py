"""The problems that the speed tables speak of, at full size, and what is checked of them: a spread of rows against oracle_rows.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import oracle_rows
import torch
from native import Inputs
from oracle_rows import HeadPlan
from torch import Tensor

from hyperattention.config import PRESETS, Config
from hyperattention.geometry import Geometry
from hyperattention.selection import Plan

NOISE = 2.0  # times the naive twin's error
_DRIFT = 100  # consecutive keys of one direction
_PULL = 7.5  # what that adds to the logits of the rows that look for it
_SPREAD = 64  # rows anywhere


@dataclass(frozen=True)
class TableCase:
    """One problem: a preset or a config of one's own, `n` tokens, query and key heads."""

    name: str
    config: Config
    dim: int
    n: int
    heads: tuple[int, int] = (32, 32)

    def __str__(self) -> str:
        mask = "causal" if self.config.causal else "full"
        return f"{self.name}-{mask}-d{self.dim}-n{self.n}-h{self.heads[0]}x{self.heads[1]}"

    def inputs(self, device: str) -> Inputs:
        """bf16. Keys turn slowly; a row looks for its neighbours and for the keys half as far in: each part of a row then holds a share of
        its sum, so that an error in any of them shows.
        """
        generator = torch.Generator(device).manual_seed(self.n + self.dim)
        q, k, v = (torch.randn(1, h, self.n, self.dim, generator=generator, device=device) for h in (self.heads[0], *2 * self.heads[1:]))
        directions = torch.randn(1, self.heads[1], -(-self.n // _DRIFT), self.dim, generator=generator, device=device)
        row = torch.arange(self.n, device=device)
        wanted = directions[:, :, row // _DRIFT] + directions[:, :, row // 2 // _DRIFT]
        q += _PULL / math.sqrt(self.dim) * wanted.repeat_interleave(self.heads[0] // self.heads[1], 1)
        k += directions[:, :, row // _DRIFT]
        q, k, v = (x.bfloat16() for x in (q, k, v))
        return Inputs(q, k, v, None, Geometry.of(q, k, v, self.config))


def _preset(name: str, dim: int, n: int, causal: int = 1, heads: tuple[int, int] = (32, 32)) -> TableCase:
    return TableCase(name, replace(PRESETS[name], causal=causal), dim, n, heads)


TABLE = [_preset(name, dim, n, causal) for n in (32768, 131072) for dim in (64, 128) for causal in (1, 0) for name in ("paper", "blocks")]
TABLE += [_preset(name, 128, 131072, heads=(32, 8)) for name in ("paper", "blocks")]
TABLE += [_preset("exact", dim, 4096, causal) for dim in (64, 128) for causal in (1, 0)]


def borders(c: Config, n: int) -> list[int]:
    """Both ends, and the last and first row or place beside borders of tiles, blocks, local blocks and the tree's halves."""
    edges = {0, n, n // 2, n - c.local_size, *(m * size for size in (64, 128, 256, c.block_size, c.local_size) for m in (1, 2, 3))}
    edges |= {n // 2 + size for size in (64, 128, 256)}
    return sorted({edge + side for edge in edges for side in (-2, -1, 0, 1) if 0 <= edge + side < n})


def chosen_rows(x: Inputs, plan: Plan) -> Tensor:
    """Rows to look at, int64 [Hq, R]: at borders of positions, anywhere, and at borders of each level's sorted order."""
    c, n, device = x.geometry.config, x.geometry.seq_q, x.q.device
    edges = torch.tensor(borders(c, n), device=device)
    anywhere = torch.randint(n, (_SPREAD,), generator=torch.Generator().manual_seed(n)).to(device)
    rows = torch.cat([edges, anywhere]).expand(x.geometry.heads_q, -1)
    if not x.geometry.sorts or x.geometry.exact:
        return rows
    sorted_rows = plan.orders(x.geometry)[0][0][:, :, edges].long()
    return torch.cat([rows, sorted_rows.where(sorted_rows >= 0, edges).flatten(1)], 1)


def head_plan(x: Inputs, plan: Plan, head: int) -> HeadPlan:
    """What `oracle_rows` takes of a plan of one batch row."""
    g = x.geometry
    if g.sorts:
        rows, keys = plan.orders(g)
        chosen = rows[0, head], keys[0, head // g.group]
    else:
        chosen = (plan.selection[0, head],)
    return HeadPlan(chosen, plan.sample_index[0, head], plan.sample_weight[0, head])


@dataclass(frozen=True)
class Errors:
    """Distances from fp64: of O relative, by row, of LSE absolute; the worst row and the root mean square of all."""

    o: float
    o_mean: float
    lse: float
    lse_mean: float

    @classmethod
    def of(cls, found: Sequence[tuple[Tensor, Tensor]], exact: Sequence[tuple[Tensor, Tensor]]) -> "Errors":
        """Of (o [R, Dv], lse [R]) by head."""
        pairs = list(zip(found, exact, strict=True))
        o = torch.cat([(mine[0] - wanted[0]).norm(dim=1) / wanted[0].norm(dim=1) for mine, wanted in pairs])
        lse = torch.cat([(mine[1] - wanted[1]).abs() for mine, wanted in pairs])
        return cls(*(float(value) for each in (o, lse) for value in (each.max(), each.square().mean().sqrt())))


def row_errors(x: Inputs, plan: Plan, o: Tensor, lse: Tensor) -> tuple[Errors, Errors]:
    """Errors of O and LSE under `plan` on `chosen_rows`, and the naive twin's."""
    g, rows = x.geometry, chosen_rows(x, plan)
    scale, mine, exact, twin = g.config.resolved_scale(g.head_dim), [], [], []
    for head, row in enumerate(rows):
        w = oracle_rows.weights(g.config, head_plan(x, plan, head), row, g.seq_k)
        qkv = x.q[0, head, row], x.k[0, head // g.group], x.v[0, head // g.group]
        exact.append(oracle_rows.attend(*qkv, w, scale))
        twin.append(oracle_rows.attend(*qkv, w, scale, torch.bfloat16))
        mine.append((o[0, head, row].double(), lse[0, head, row].double()))
    return Errors.of(mine, exact), Errors.of(twin, exact)


def assert_rows_within_twin(x: Inputs, plan: Plan, o: Tensor, lse: Tensor) -> float:
    """O and LSE on `chosen_rows` within NOISE times the naive twin's error, row by row and on average. Returns the largest share of it."""
    found, twin = row_errors(x, plan, o, lse)
    shares = {name: getattr(found, name) / getattr(twin, name) for name in vars(twin)}
    assert all(share <= NOISE for share in shares.values()), f"errors over the twin's: {shares}; {found}; the twin's: {twin}"
    return max(shares.values())
