"""Hardness of several layers at once: their heads side by side, as if of one layer, so that a GPU is started once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

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
    """Exact attention's LSE by the kernels, or by the reference where there are none."""

    def run(q: Tensor, k: Tensor, v: Tensor, config: Config) -> Tensor:
        if kernels is None:
            return reference.attention(q, k, v, config.exact()).lse
        return kernels.forward(q, k, v, config.exact())[1]

    return run


def plan_of(call: Captured, kernels: Library | None) -> Plan:
    """The plan of one captured call, as the kernels (or the reference) choose it."""
    if kernels is None:
        return make_plan(call.q, call.k, Geometry.of(call.q, call.k, call.v, call.config))
    problem = call.q, call.k, call.v, call.config
    return Plan(kernels.select(*problem), *kernels.samples(*problem))


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
        q, k, v = (torch.cat(x, 1) for x in zip(*((c.q, c.k, c.v) for c in some), strict=True))
        plan = _joined([plan_of(c, kernels) for c in some], some)
        whole = measure_hardness(q, k, v, some[0].config, plan, torch.cat([lses[at] for at in group], 1), exact_lse(kernels))
        heads = some[0].q.shape[1]
        found += [whole.heads(slice(n * heads, (n + 1) * heads)) for n in range(len(some))]
    return found


def _joined(plans: Sequence[Plan], calls: Sequence[Captured]) -> Plan:
    """The plan of all heads of calls that are alike."""
    samples = (torch.cat([getattr(plan, name) for plan in plans], 1) for name in ("sample_index", "sample_weight"))
    if calls[0].config.selector != "sortlsh":
        return Plan(torch.cat([plan.selection for plan in plans], 1), *samples)
    orders = [plan.orders(Geometry.of(c.q, c.k, c.v, c.config)) for plan, c in zip(plans, calls, strict=True)]
    return Plan(torch.cat([torch.cat(part, 1).flatten() for part in zip(*orders, strict=True)]), *samples)
