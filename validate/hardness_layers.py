"""Hardness of several layers at once: their heads side by side, as if of one layer, so that a GPU is started once for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

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
    for _, alike in groupby(range(len(calls)), lambda at: _kind(calls[at])):
        places = list(alike)
        q, k = calls[places[0]].q, calls[places[0]].k
        most = max(1, HEAD_KEYS[q.device.type] // (q.shape[1] * k.shape[2]))
        yield from (places[at : at + most] for at in range(0, len(places), most))


def _kind(call: Captured) -> tuple:
    return call.q.shape, call.k.shape, call.v.shape, call.q.dtype, {**vars(call.config), "seed": 0}


def layers_hardness(calls: Sequence[Captured], kernels: Library | None, lses: Sequence[Tensor]) -> list[Hardness]:
    """Hardness of each captured call, which approximates, without padding; lses [B,Hq,Sq]: exact attention's (where NaN, so is alpha)."""
    found: list[Hardness] = []
    for group in groups(calls):
        some = [calls[at] for at in group]
        q, k = (torch.cat(x, 1) for x in zip(*((c.q, c.k) for c in some), strict=True))
        plan, lse = partial(_plan, some, q, k, kernels), torch.cat([lses[at] for at in group], 1)
        found += measure_hardness(q, k, some[0].config, plan, lse, exact_lse(kernels)).split(some[0].q.shape[1])
    return found


def _plan(calls: Sequence[Captured], q: Tensor, k: Tensor, kernels: Library | None) -> Plan:
    """The plan of all heads of calls that are alike, as the kernels (or the reference) choose it; q, k: those of all calls.

    It does not depend on V, for which K stands, and has no samples: hardness knows them by rule.
    """
    g = Geometry.of(q, k, k, calls[0].config)
    shape = g.batch, g.heads_q, len(g.draws(0)), g.config.sample_size
    none = q.new_empty(1, dtype=torch.int32).expand(shape), q.new_empty(1, dtype=torch.float32).expand(shape)  # never read
    if not g.sorts:  # what `blocks` chooses does not depend on the seed, in which alone the calls differ
        return Plan(make_plan(q, k, g).selection if kernels is None else kernels.select(q, k, k, g.config), *none)
    own, seeds = replace(g, heads_q=g.heads_q // len(calls), heads_kv=g.heads_kv // len(calls)), [c.config.seed for c in calls]
    q, k = (x.unflatten(1, (len(calls), -1)).transpose(0, 1) for x in (q, k))
    lines = _sorted(q, k, own, seeds) if kernels is None else kernels.select_each(q, k, g.config, seeds)
    parts = zip(lines.split([math.prod(shape) for shape in own.order_shapes], 1), own.order_shapes, strict=True)
    return Plan(torch.cat([part.unflatten(1, shape).transpose(0, 1).flatten() for part, shape in parts]), *none)


def _sorted(q: Tensor, k: Tensor, g: Geometry, seeds: Sequence[int]) -> Tensor:
    """By the reference what the kernels select of each problem q [N,B,Hq,Sq,D], k [N,B,Hkv,Sk,D]: [N, elements]."""
    problems = zip(q, k, seeds, strict=True)
    return torch.stack([make_plan(q, k, replace(g, config=replace(g.config, seed=seed))).selection for q, k, seed in problems])
