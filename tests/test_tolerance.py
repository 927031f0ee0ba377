"""What holds the kernels' arithmetic (native.assert_within_twin), held itself: fp32 in any order passes, small mistakes do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from native import KERNEL_CASES, assert_attention, expected, inputs
from operator_cases import Case
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")
F32 = torch.float32
EXACT = [case for case in KERNEL_CASES if case.name in ("exact-rows", "exact-keys") and case.seq_k > 2]


def logits(case: Case) -> Tensor:
    """Base-2 logits in fp32, each a sum from the first product to the last without fused operations."""
    x = inputs(case, F32)
    sums = torch.zeros(*x.q.shape[:3], case.seq_k)
    for q, k in zip(x.q.unbind(-1), x.k.repeat_interleave(x.geometry.group, 1).unbind(-1), strict=True):
        sums += q[..., None] * k[:, :, None]
    if case.config.causal:
        sums.masked_fill_(torch.arange(case.seq_k) > torch.arange(case.seq_q)[:, None] + case.seq_k - case.seq_q, -torch.inf)
    return sums * (case.config.resolved_scale(case.dims[0]) / math.log(2))


def check(case: Case, power: Callable[[Tensor], Tensor]) -> None:
    """Attention in fp32 whose weights are `power` of the logits less the largest of each row."""
    s, wanted, x = logits(case), expected(case, F32), inputs(case, F32)
    largest = s.amax(-1, keepdim=True)
    p = power(s - largest)
    o = torch.zeros(*x.q.shape[:3], case.dims[1])
    for weight, v in zip(p.unbind(-1), x.v.repeat_interleave(x.geometry.group, 1).unbind(2), strict=True):
        o += weight[..., None] * v[:, :, None]
    found = o / p.sum(-1, keepdim=True), largest[..., 0] * math.log(2) + p.sum(-1).log()
    assert_attention(found, wanted)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_plain_fp32_passes(case: Case, seed: int) -> None:
    check(replace(case, seed=seed), torch.exp2)


def without_the_lightest(t: Tensor) -> Tensor:
    """Each row loses the key that it would miss least."""
    return torch.exp2(t).scatter(-1, torch.where(t.isfinite(), t, 0).argmin(-1, keepdim=True), 0)


def inaccurate_power(t: Tensor) -> Tensor:
    """Off by at most 1e-5 of itself, as a polynomial of too low a degree is: by how far the exponent lies from an integer."""
    return torch.exp2(t) * (1 + 2e-5 * torch.where(t.isfinite(), t - t.round(), 0))


@pytest.mark.parametrize("mistake", [without_the_lightest, inaccurate_power])
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_a_small_mistake_is_found(case: Case, mistake: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match="largest error"):
        check(case, mistake)
