"""Q, K, V made to hurt an approximation of attention: what it must find, count right, or not be fooled by.

All logits are in units after the scale. Every problem is drawn from one generator: the same seed gives the same problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.config import DECODE_ROWS, Config

NEEDLES = 16
NEEDLE_ODDS = 4.0  # log of the needle's mass over all other keys' together: 98%
HEAVY = 4
HEAVY_ODDS = 1.4  # log odds of the heavy columns: 80% of the mass
RUN = 16  # neighbouring tokens of one cluster
CLUSTER_KEYS = 128  # keys of a cluster
CLUSTER_ODDS = 3.0


@dataclass(frozen=True)
class Sizes:
    """One batch row of a self-attention: heads, tokens and head sizes of the model, and how many query rows are compared."""

    heads_q: int
    heads_kv: int
    length: int
    head_dim: int
    head_dim_v: int
    rows: int

    @property
    def group(self) -> int:
        return self.heads_q // self.heads_kv


@dataclass(frozen=True)
class Problem:
    """q [1,Hq,S,D], k [1,Hkv,S,D], v [1,Hkv,S,Dv]; `rows` int64 [R] are compared; `planted` [Hq,R,Dv] is what each of them seeks."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor
    planted: Tensor | None = None


def far_of(config: Config, position: int, length: int) -> int:
    """First key that is not local to `position` (operator rule 9); non-causal, all of `length` are far."""
    return max(0, position // config.local_size - config.local_overlap) * config.local_size if config.causal else length


def approximates(config: Config, length: int) -> bool:
    """Whether any query row has keys that are neither local nor sinks."""
    return far_of(config, length - 1, length) > config.sinks


def exact_reach(config: Config) -> int:
    """The most keys of which every query row sees all that it may exactly, Sq = Sk: on the exact path, or by local keys and sinks."""
    local = config.local_size
    covered = (config.local_overlap + 1 + config.sinks // local) * local if config.causal else config.sinks
    return max(config.exact_below, DECODE_ROWS, covered)


def approximate_rows(config: Config, length: int, start: int = 0) -> Tensor:
    """The query rows from `start` on with keys that are neither local nor sinks, int64, ascending."""
    return torch.tensor([row for row in range(start, length) if far_of(config, row, length) > config.sinks])


def some_rows(config: Config, length: int, count: int, generator: torch.Generator, start: int = 0) -> Tensor:
    """At most `count` of the `approximate_rows`, drawn without replacement, ascending."""
    rows = approximate_rows(config, length, start).to(generator.device)
    return rows[torch.randperm(len(rows), generator=generator, device=generator.device)[:count]].sort().values


def _noise(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Independent normal q [Hq,S,D], k [Hkv,S,D], v [Hkv,S,Dv]."""
    s = sizes
    shapes = ((s.heads_q, s.length, s.head_dim), (s.heads_kv, s.length, s.head_dim), (s.heads_kv, s.length, s.head_dim_v))
    q, k, v = (torch.randn(shape, generator=generator, device=generator.device) for shape in shapes)
    return q, k, v


def _directions(heads: int, size: int, generator: torch.Generator) -> Tensor:
    """Unit vectors [heads, size]."""
    return torch.nn.functional.normalize(torch.randn(heads, size, generator=generator, device=generator.device), dim=-1)


def _point(x: Tensor, direction: Tensor, amount: float) -> Tensor:
    """x [H, N, D] with its component along `direction` [H, D] replaced by `amount`."""
    along = (x * direction[:, None]).sum(-1, keepdim=True)
    return x + (amount - along) * direction[:, None]


def _amount(head_dim: int, keys: float, odds: float) -> float:
    """Component of a query and a key along one direction that gives the pair e^odds times the mass of `keys` normal keys.

    With a component a the query's logits over normal keys have variance 1 + a^2/D, so those weigh keys * exp of half of it; the
    pair's own logit a^2/sqrt(D) has to beat that.
    """
    root = math.sqrt(head_dim)
    return math.sqrt(root * (math.log(keys) + 0.5 + odds) / (1 - 1 / (2 * root)))


def _problem(q: Tensor, k: Tensor, v: Tensor, config: Config, rows: Tensor, planted: Tensor | None = None) -> Problem:
    scale = config.resolved_scale(q.shape[-1])
    return Problem((q / (scale * math.sqrt(q.shape[-1])))[None], k[None], v[None], rows, planted)


def gaussian(config: Config, sizes: Sizes, generator: torch.Generator) -> Problem:
    """Independent normal entries: attention is nearly flat and its output nearly cancels."""
    return _problem(*_noise(sizes, generator), config, some_rows(config, sizes.length, sizes.rows, generator))


def needle(config: Config, sizes: Sizes, generator: torch.Generator) -> Problem:
    """One far key for each of some late query blocks, among normal distractors; its value is what exact attention answers.

    All rows of the query block seek the key, which holds 98% of their attention; it stands alone, between keys that have
    nothing to do with it.
    """
    size, device = config.block_size, generator.device
    q, k, v = _noise(sizes, generator)
    amount = _amount(sizes.head_dim, sizes.length, NEEDLE_ODDS)
    late = approximate_rows(config, sizes.length, sizes.length // 2)
    aligned = late[late % size == 0]
    starts = aligned if len(aligned) else late[:1]
    picks = torch.randperm(len(starts), generator=generator, device=device)[:NEEDLES].tolist()
    rows, planted = [], []
    for start in sorted(int(starts[i]) for i in picks):
        stop = min(start + size, sizes.length)
        far = far_of(config, start, sizes.length)
        at = int(torch.randint(config.sinks, far, (1,), generator=generator, device=device))
        direction = _directions(sizes.heads_kv, sizes.head_dim, generator)
        k[:, at] = _point(k[:, at, None], direction, amount)[:, 0]
        block = slice(start, stop)
        q[:, block] = _point(q[:, block], direction.repeat_interleave(sizes.group, 0), amount)
        kept = torch.arange(start, stop, max(1, size * len(picks) // sizes.rows), device=device)
        rows.append(kept)
        planted.append(v[:, at].repeat_interleave(sizes.group, 0)[:, None].expand(-1, len(kept), -1))
    return _problem(q, k, v, config, torch.cat(rows), torch.cat(planted, 1))


def clustered(config: Config, sizes: Sizes, generator: torch.Generator) -> Problem:
    """Topics: runs of RUN tokens around a common centre, far apart; a query attends to its topic's runs, wherever they are."""
    q, k, v = _noise(sizes, generator)
    device, clusters = generator.device, max(2, sizes.length // CLUSTER_KEYS)
    centres = _directions(sizes.heads_kv * clusters, sizes.head_dim, generator).unflatten(0, (sizes.heads_kv, clusters))
    meanings = torch.randn(sizes.heads_kv, clusters, sizes.head_dim_v, generator=generator, device=device)
    amount = math.sqrt(math.sqrt(sizes.head_dim) * (math.log(clusters) + CLUSTER_ODDS))
    of_keys, of_queries = (
        torch.randint(clusters, (-(-sizes.length // RUN),), generator=generator, device=device).repeat_interleave(RUN)[: sizes.length]
        for _ in range(2)
    )
    k = k + amount * centres[:, of_keys]
    q = q + amount * centres[:, of_queries].repeat_interleave(sizes.group, 0)
    v = meanings[:, of_keys] + 0.5 * v
    return _problem(q, k, v, config, some_rows(config, sizes.length, sizes.rows, generator))


def heavy_columns(config: Config, sizes: Sizes, generator: torch.Generator) -> Problem:
    """HEAVY far keys, none of them a sink, hold 80% of every late query's attention together."""
    q, k, v = _noise(sizes, generator)
    late = int(approximate_rows(config, sizes.length, sizes.length // 2)[0])
    stop = min(late, far_of(config, late, sizes.length))  # far from every compared row
    at = config.sinks + torch.randperm(stop - config.sinks, generator=generator, device=generator.device)[:HEAVY]
    direction = _directions(sizes.heads_kv, sizes.head_dim, generator)
    amount = _amount(sizes.head_dim, sizes.length / len(at), HEAVY_ODDS)
    q = _point(q, direction.repeat_interleave(sizes.group, 0), amount)
    k[:, at] = _point(k[:, at], direction, amount)
    return _problem(q, k, v, config, some_rows(config, sizes.length, sizes.rows, generator, late))


DISTRIBUTIONS: dict[str, Callable[[Config, Sizes, torch.Generator], Problem]] = {
    "needle": needle,
    "clustered": clustered,
    "heavy columns": heavy_columns,
    "gaussian": gaussian,
}
