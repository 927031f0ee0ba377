"""The CUDA kernels against the reference, stage by stage: the same checks on a GPU and on the emulated kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from native import (
    KERNEL_CASES,
    Inputs,
    Stages,
    assert_equal_bits,
    assert_within_twin,
    expected,
    expected_plan,
    expected_pools,
    inputs,
    pool_sizes,
)
from operator_cases import PLAN_ONLY, Case

from hyperattention.native import Library

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """An operator case in a head size and dtype that the CUDA kernels take."""

    case: Case
    dtype: str

    def __str__(self) -> str:
        return f"{self.case}-{self.dtype}"

    def inputs(self, device: str) -> Inputs:
        x = inputs(self.case, DTYPES[self.dtype])
        lengths = None if x.lengths is None else x.lengths.to(device)
        return replace(x, q=x.q.to(device), k=x.k.to(device), v=x.v.to(device), lengths=lengths)


def problems(cases: list[Case], head_dim: int, dtype: str) -> list[Problem]:
    """The cases at one head size, each once."""
    return [Problem(case, dtype) for case in dict.fromkeys(replace(case, dims=(head_dim, head_dim)) for case in cases)]


PROBLEMS = problems(KERNEL_CASES, 64, "bf16") + problems(KERNEL_CASES, 128, "fp16")
PLAN_PROBLEMS = problems(PLAN_ONLY, 64, "bf16") + problems(PLAN_ONLY, 128, "fp16")


def check_plan(library: Library, problem: Problem, device: str) -> None:
    """Pools, blocks and samples, bit for bit."""
    case, dtype = problem.case, DTYPES[problem.dtype]
    stages = Stages(library, problem.inputs(device), case.config)
    for side in ("queries", "keys"):
        for rows in pool_sizes(case):
            found = stages.pool(side, rows)
            for name, mine, wanted in zip(("values", "factors"), found, expected_pools(case, dtype, side, rows), strict=True):
                assert_equal_bits(mine.cpu(), wanted, f"{name} of {side} in pools of {rows}")
    plan = expected_plan(case, dtype)
    assert_equal_bits(stages.select().cpu(), plan.selection, "blocks")
    index, weight = stages.samples()
    assert_equal_bits(index.cpu(), plan.sample_index, "sample index")
    assert_equal_bits(weight.cpu(), plan.sample_weight, "sample weight")


def check_attention(library: Library, problem: Problem, device: str) -> None:
    """O and LSE under the reference's plan within twice the naive twin's error; forward gives the same bits."""
    case = problem.case
    wanted = expected(case, DTYPES[problem.dtype])
    stages = Stages(library, problem.inputs(device), case.config)
    found = stages.attend(wanted.plan.selection.to(device))
    for name, mine, exact, twin in zip(("o", "lse"), found, wanted.exact, wanted.twin, strict=True):
        assert_within_twin(mine.cpu(), exact, twin, name)
    for name, mine, again in zip(("o", "lse"), found, stages.forward(), strict=True):
        assert_equal_bits(again, mine, f"{name} of forward")


def check_padding(library: Library, case: Case, poison: float, device: str) -> None:
    """What lies past the lengths changes no bit of a live row."""
    clean = Problem(case, "bf16").inputs(device)
    q, k, v = clean.q.clone(), clean.k.clone(), clean.v.clone()
    assert case.lengths and case.seq_q == case.seq_k
    live = (torch.arange(case.seq_k) < torch.tensor(case.lengths)[:, None]).to(device)
    for x in (q, k, v):
        x.transpose(1, 2)[~live] = poison
    dirty = replace(clean, q=q, k=k, v=v)
    found, wanted = (Stages(library, x, case.config).forward() for x in (dirty, clean))
    for name, mine, theirs in zip(("o", "lse"), found, wanted, strict=True):
        assert_equal_bits(mine.transpose(1, 2)[live], theirs.transpose(1, 2)[live], name)
