"""Hardness of several layers at once: their heads side by side, as if of one layer, so that a GPU is started once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hyperattention import reference
from hyperattention.config import Config
from hyperattention.export.switched import Captured
from hyperattention.geometry import Geometry
from hyperattention.native import Library
from hyperattention.selection import Plan, make_plan
from hyperattention.validate.hardness import Hardness, measure_hardness
from hyperattention.validate.hardness_columns import ExactLse

# Query heads times keys that are taken at once. The processor computes all the time: there every layer goes alone.
HEAD_KEYS = {"cpu": 0, "cuda": 2**20}


def exact_lse(kernels: Library | None) -> ExactLse:
    """Exact attention's LSE by the kernels, or by the reference where there are none; it does not depend on V, for which K stands."""

    def run(q: Tensor, k: Tensor, config: Config) -> Tensor:
        if kernels is None:
            return reference.attention(q, k, k, config.exact()).lse
        return kernels.forward(q, k, k, config.exact())[1]

    return run


def groups(calls: Sequence[Captured]) -> Iterator[list[int]]:
    """Places of neighbouring calls that are alike but for their seeds, as many as `HEAD_KEYS` of their device allows; at least one."""
    group: list[int] = []
    for at, call in enumerate(calls):
        size = (len(group) + 1) * call.q.shape[1] * call.k.shape[2]
        if group and (_kind(calls[group[0]]) != _kind(call) or size > HEAD_KEYS[call.q.device.type]):
            yield group
            group = []
        group.append(at)
    if group:
        yield group


def _kind(call: Captured) -> tuple:
    return tuple(call.q.shape), tuple(call.k.shape), tuple(call.v.shape), call.q.dtype, replace(call.config, seed=0)


def layers_hardness(calls: Sequence[Captured], kernels: Library | None, lses: Sequence[Tensor]) -> list[Hardness]:
    """Hardness of each captured call, which approximates, without padding; lses [B,Hq,Sq]: exact attention's (where NaN, so is alpha)."""
    found: list[Hardness] = []
    for group in groups(calls):
        some = [calls[at] for at in group]
        q, k = (torch.cat(x, 1) for x in zip(*((c.q, c.k) for c in some), strict=True))
        plan, lse = partial(_plan, some, q, k, kernels), torch.cat([lses[at] for at in group], 1)
        whole = measure_hardness(q, k, some[0].config, plan, lse, exact_lse(kernels))
        heads = some[0].q.shape[1]
        found += [whole.heads(slice(n * heads, (n + 1) * heads)) for n in range(len(some))]
    return found


def _plan(calls: Sequence[Captured], q: Tensor, k: Tensor, kernels: Library | None) -> Plan:
    """The plan of all heads of calls that are alike, as the kernels (or the reference) choose it; q, k: those of all calls.

    It does not depend on V, for which K stands, and has no samples: hardness knows them by rule.
    """
    g = Geometry.of(q, k, k, calls[0].config)
    shape = g.batch, g.heads_q, len(g.draws(0)), g.config.sample_size
    none = q.new_empty(1, dtype=torch.int32).expand(shape), q.new_empty(1, dtype=torch.float32).expand(shape)  # never read
    if not g.sorts:  # what `blocks` chooses does not depend on the seed, in which alone the calls differ
        return Plan(_selection(q, k, g, kernels), *none)
    orders = []
    for c, some_q, some_k in zip(calls, q.chunk(len(calls), 1), k.chunk(len(calls), 1), strict=True):
        own = Geometry.of(some_q, some_k, some_k, c.config)
        orders.append(Plan(_selection(some_q, some_k, own, kernels), *none).orders(own))
    return Plan(torch.cat([torch.cat(part, 1).flatten() for part in zip(*orders, strict=True)]), *none)


def _selection(q: Tensor, k: Tensor, g: Geometry, kernels: Library | None) -> Tensor:
    return make_plan(q, k, g).selection if kernels is None else kernels.select(q, k, k, g.config)
