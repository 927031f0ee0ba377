"""What the reference's tests share: the oracle's plan of a case, and comparisons."""

from __future__ import annotations

from functools import lru_cache

import oracle
import torch
from operator_cases import Case
from torch import Tensor

from hyperattention.selection import Plan


@lru_cache(maxsize=None)
def oracle_plan(case: Case) -> oracle.Plan:
    q, k, _ = case.inputs()
    return oracle.make_plan(q.numpy(), k.numpy(), case.config, case.lengths)


def as_plan(plan: oracle.Plan) -> Plan:
    return Plan(*(torch.from_numpy(x) for x in (plan.selection, plan.sample_index, plan.sample_weight)))


def assert_same_plan(plan: Plan, expected: Plan) -> None:
    for name in ("selection", "sample_index", "sample_weight"):
        mine, theirs = getattr(plan, name), getattr(expected, name)
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, (name, mine.shape, theirs.shape)
        wrong = (mine != theirs).nonzero()
        assert len(wrong) == 0, f"{name} differs at {len(wrong)} places, first {wrong[0].tolist()}"


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest finite value, infinities and zeros alike."""
    finite = expected[expected.isfinite()]
    atol = tolerance * float(finite.abs().max()) if finite.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=atol)
