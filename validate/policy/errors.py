"""The error of each candidate in each layer alone, on the Q, K, V that the exact model gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.export.switched import Captured
from hyperattention.validate.operators import Operator

MOST_HEADS = 8  # key/value heads, each with one of its query heads


def some_heads(call: Captured) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and exact o [1, H, S, D] of at most MOST_HEADS key/value heads, evenly spread, each with one of its query heads.

    Which one of a group turns from head to head, so that no place in the group is left out everywhere.
    """
    kv, group = call.k.shape[1], call.q.shape[1] // call.k.shape[1]
    count = min(kv, MOST_HEADS)
    chosen = [(i * kv + kv // 2) // count for i in range(count)]
    queries = [head * group + number % group for number, head in enumerate(chosen)]
    return call.q[:1, queries], call.k[:1, chosen], call.v[:1, chosen], call.o[:1, queries]


def squared_errors(operator: Operator, heads: tuple[Tensor, Tensor, Tensor, Tensor], config: Config, rows: Sequence[int]) -> list[float]:
    """|ours - exact|^2 / |exact|^2 over the last rows, so many as each of `rows` says (0: all), of heads from `some_heads`, in float64."""
    q, k, v, exact = heads
    with torch.inference_mode():
        o, _ = operator(q, k, v, config)
        lost, whole = (x.square().sum((0, 1, 3)) for x in (o.double() - exact.double(), exact.double()))
        return [float(lost[-count:].sum() / whole[-count:].sum().clamp(min=1e-300)) for count in rows]


def layer_errors(operator: Operator, call: Captured, configs: Sequence[Config], rows: Sequence[int] = (0,)) -> list[list[float]]:
    """`squared_errors` of each config in one layer, by config; 0 for one that is exact there. Raises FloatingPointError for NaN."""
    heads, found = some_heads(call), []
    for config in configs:
        exact = config.is_exact(call.q.shape[2], call.k.shape[2])
        errors = [0.0] * len(rows) if exact else squared_errors(operator, heads, config, rows)
        if any(math.isnan(error) for error in errors):
            raise FloatingPointError(f"layer {call.layer} answers NaN under {config}")
        found.append(errors)
    return found
