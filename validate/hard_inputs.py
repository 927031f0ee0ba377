"""The operator on inputs that hurt: one approximate layer's config on made Q, K, V and on the text's own, under three seeds.

Ours and window + sinks at equal keys per query are held against exact attention on a few hundred query rows, each computed in
float64 from all keys, so that the longest lengths cost memory linear in them. Each distribution has one number to pass by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.export.patch import Captured
from hyperattention.validate.distributions import DISTRIBUTIONS, Problem, Sizes, approximates, some_rows
from hyperattention.validate.layers import seeds_of
from hyperattention.validate.metrics import spread, tensor_error
from hyperattention.validate.operators import Operator
from hyperattention.validate.window import window_operator

TEXT = "text"
RECALLED = 0.9  # cosine with the planted value from which a needle counts as found
OWN_LAYERS, ROWS, SEEDS = 8, 256, 3
_TILE = 2**25  # float64 logits held at once


@dataclass(frozen=True)
class Bounds:
    """What the processor is given at most: tokens (or twice exact_below), query heads, layers, and rows compared."""

    length: int = 8192
    heads: int = 4
    layers: int = 3
    rows: int = 128


CPU = Bounds()


@dataclass(frozen=True)
class Criterion:
    """What a distribution is judged by: `value(ours, window)` of the summaries over seeds, on the right side of `limit`."""

    value: Callable[[dict, dict], float]
    limit: float
    sense: str
    meaning: str

    def passed(self, value: float) -> bool:
        """NaN never passes."""
        return value <= self.limit if self.sense == "<=" else value >= self.limit


def _against_window(ours: dict, window: dict) -> float:
    """Relative L2 over the window's; 1 where both are exact."""
    a, b = ours["relative_l2"]["mean"], window["relative_l2"]["mean"]
    return 1.0 if a == b else a / b if b else float("inf")


CRITERIA: dict[str, Criterion] = {
    TEXT: Criterion(
        _against_window, 1.0, "<=", "relative L2 over that of window + sinks at equal keys, mean over layers, on their own Q, K, V"
    ),
    "needle": Criterion(
        lambda ours, window: ours["recall"],
        0.9,
        ">=",
        f"share of rows that answer the value of a far key which holds 98% of their attention (cosine at least {RECALLED})",
    ),
    "clustered": Criterion(
        _against_window, 1.0, "<=", "relative L2 over that of window + sinks at equal keys, where a topic's keys lie in scattered runs"
    ),
    "heavy columns": Criterion(
        lambda ours, window: ours["relative_l2"]["mean"],
        0.5,
        "<=",
        "relative L2 where a few far keys hold 80% of every row's attention; missing them gives about 1",
    ),
    "gaussian": Criterion(
        lambda ours, window: abs(ours["lse_bias"]),
        0.05,
        "<=",
        "mean error of the log-sum-exp, by its size. Attention is flat here and its output cancels to near zero, so the relative L2 of "
        "whatever reads few keys is large and says little; whether the mass of attention is right does",
    ),
}


def hard_rows(operator: Operator, captured: Sequence[Captured], step: Callable[[str], None], own: str = TEXT) -> list[dict]:
    """Rows of report.json's `hard_inputs`, at the length of the captured calls, from those that approximate there.

    The first row is `own`, the inputs that Q, K, V were captured from, as the mean over some layers, first to last; the made inputs
    have the heads, sizes, dtype and config of the first of these. On the processor fewer layers are taken, and the first heads
    and tokens stand for all (CPU). Where every row meets every key there is nothing to judge, and there are no rows.
    """
    on_cpu = bool(captured) and captured[0].q.device.type == "cpu"
    calls = [first_row(c, CPU if on_cpu else None) for c in captured if c.q.shape[2] == c.k.shape[2]]
    calls = [c for c in calls if not c.is_exact and approximates(c.config, c.k.shape[2])]
    if not calls:
        return []
    count = min(len(calls), CPU.layers if on_cpu else OWN_LAYERS)
    chosen = [calls[i * (len(calls) - 1) // max(1, count - 1)] for i in range(count)]
    first, size = chosen[0], CPU.rows if on_cpu else ROWS
    sizes = Sizes(first.q.shape[1], first.k.shape[1], first.k.shape[2], first.q.shape[3], first.v.shape[3], size)
    rows = []
    for name in (own, *DISTRIBUTIONS):
        step(f"{sizes.length:,} tokens, hard input: {name}")
        if name == own:
            layers = [_measure(operator, _own(c, size), seeds_of(c.config, SEEDS)) for c in chosen]
            found = [_mean_pair(pairs) for pairs in zip(*layers, strict=True)]
        else:
            found = [_measure(operator, _made(name, first, sizes, config), [config])[0] for config in seeds_of(first.config, SEEDS)]
        rows.append(_row(name, sizes.length, [config.seed for config in seeds_of(first.config, SEEDS)], found))
    return rows


def first_row(captured: Captured, bounds: Bounds | None) -> Captured:
    """The first batch row of one call without its padding; within `bounds` its first whole groups of heads and its first tokens."""
    c, group = captured, captured.q.shape[1] // captured.k.shape[1]
    heads, n = c.k.shape[1], c.k.shape[2] if c.lengths is None else int(c.lengths[0])
    if bounds is not None:
        heads, n = min(heads, max(1, bounds.heads // group)), min(n, max(bounds.length, 2 * c.config.exact_below))
    q, o = (x[:1, : heads * group, :n] for x in (c.q, c.o))
    return replace(c, q=q, k=c.k[:1, :heads, :n], v=c.v[:1, :heads, :n], o=o, lengths=None)


def _own(layer: Captured, count: int) -> Problem:
    """The layer's own Q, K, V and some of its rows."""
    generator = torch.Generator(device=layer.q.device).manual_seed(layer.config.seed)
    return Problem(layer.q, layer.k, layer.v, some_rows(layer.config, layer.k.shape[2], count, generator))


def _made(name: str, layer: Captured, sizes: Sizes, config: Config) -> Problem:
    """The distribution under the config's seed, in the layer's dtype."""
    generator = torch.Generator(device=layer.q.device).manual_seed(config.seed)
    problem = DISTRIBUTIONS[name](config, sizes, generator)
    q, k, v = (x.to(layer.q.dtype) for x in (problem.q, problem.k, problem.v))
    return replace(problem, q=q, k=k, v=v)


def _measure(operator: Operator, problem: Problem, configs: Sequence[Config]) -> list[tuple[dict, dict]]:
    """Numbers of ours under each config, which differ in their seeds alone, and of the window, which draws nothing."""
    exact = exact_rows(problem.q, problem.k, problem.v, problem.rows, configs[0])
    window = _numbers(window_operator(operator), problem, configs[0], exact)
    return [(_numbers(operator, problem, config, exact), window) for config in configs]


def _numbers(operator: Operator, p: Problem, config: Config, exact: tuple[Tensor, Tensor]) -> dict:
    o, lse = operator(p.q, p.k, p.v, config)
    o, lse = o[0, :, p.rows].double(), lse[0, :, p.rows].double()
    error, difference = tensor_error(o, exact[0]), lse - exact[1]
    numbers = {"relative_l2": error.relative_l2, "cosine": error.cosine, "norm_ratio": error.norm_ratio}
    numbers |= {"lse_bias": float(difference.mean()), "lse_spread": float(difference.std())}
    if p.planted is not None:
        same = torch.cosine_similarity(o, p.planted.double(), dim=-1)
        numbers["recall"] = float((same >= RECALLED).double().mean())
    return numbers


def exact_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Exact attention of some query rows of a self-attention, q [1,Hq,S,D], k [1,Hkv,S,D], v [1,Hkv,S,Dv], rows int64 [R].

    Returns o [Hq,R,Dv] and lse [Hq,R] in float64, computed head by head from a dense softmax over all keys.
    """
    keys, group, scale = k.shape[2], q.shape[1] // k.shape[1], config.resolved_scale(q.shape[3])
    position = torch.arange(keys, device=q.device)
    outputs, sums = [], []
    for head in range(q.shape[1]):
        key, value = k[0, head // group].double(), v[0, head // group].double()
        for part in rows.split(max(1, _TILE // keys)):
            logits = q[0, head, part].double() @ key.T * scale
            if config.causal:
                logits = logits.masked_fill(position > part[:, None], -torch.inf)
            largest = logits.amax(-1, keepdim=True)
            weights = logits.sub_(largest).exp_()
            total = weights.sum(-1, keepdim=True)
            sums.append((total.log() + largest)[:, 0])
            outputs.append(weights @ value / total)
    shape = (q.shape[1], len(rows))
    return torch.cat(outputs).unflatten(0, shape), torch.cat(sums).unflatten(0, shape)


def _mean_pair(pairs: Sequence[tuple[dict, dict]]) -> tuple[dict, dict]:
    ours, window = ({name: mean(pair[i][name] for pair in pairs) for name in pairs[0][i]} for i in (0, 1))
    return ours, window


def _row(name: str, length: int, seeds: list[int], found: list[tuple[dict, dict]]) -> dict:
    criterion = CRITERIA.get(name, CRITERIA[TEXT])
    ours, window = (_summary([pair[i] for pair in found]) for i in (0, 1))
    value = criterion.value(ours, window)
    return {
        "distribution": name,
        "length": length,
        "seeds": seeds,
        "ours": ours,
        "window": window,
        "value": value,
        "limit": criterion.limit,
        "sense": criterion.sense,
        "passed": criterion.passed(value),
        "meaning": criterion.meaning,
    }


def _summary(runs: list[dict]) -> dict:
    """Each number's mean over the seeds; relative L2 with its range."""
    means = {name: mean(run[name] for run in runs) for name in runs[0]}
    return {**means, "relative_l2": spread([run["relative_l2"] for run in runs])}


def hard_steps() -> int:
    """Steps that `hard_rows` reports."""
    return 1 + len(DISTRIBUTIONS)
