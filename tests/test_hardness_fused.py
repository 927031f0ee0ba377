"""Hardness by Triton's kernels, on a GPU or in Triton's interpreter, against the same numbers by PyTorch (which test_hardness.py holds
against dense matrices)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from operator_cases import Case, config, sorted_config
from test_hardness import assert_same

from hyperattention.errors import EnvironmentFault
from hyperattention.geometry import Geometry
from hyperattention.reference import exact_attention
from hyperattention.selection import Plan, make_plan
from hyperattention.validate import hardness, hardness_columns, hardness_fused
from hyperattention.validate.hardness import measure_hardness
from hyperattention.validate.hardness_layers import exact_lse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's numpy warns of log(0) and of pairs that are masked afterwards.
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
HALVES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # the interpreter cannot multiply bf16
SMALL = config(local_size=16, sinks=3, sample_size=7, num_blocks=2)
CASES = [
    Case("blocks", 97, 97, SMALL, heads=(4, 2)),
    Case("chunk-lengths", 97, 131, SMALL, lengths=(0, 33, 131), heads=(1, 1)),
    Case("more-queries", 131, 90, SMALL, heads=(1, 1), dims=(24, 8)),
    Case("non-causal", 90, 131, replace(SMALL, causal=0, stratified=0), lengths=(77,), heads=(1, 1)),
    Case("strict", 97, 97, replace(SMALL, strict_causal=1), heads=(1, 1)),
    Case("no-samples", 97, 97, replace(SMALL, sample_size=0, num_blocks=0), heads=(1, 1)),
    Case("all-taken", 97, 97, replace(SMALL, num_blocks=64), heads=(1, 1)),
    Case("one-key", 70, 1, SMALL, heads=(1, 1)),
    Case("large-logits", 97, 97, SMALL, fill="large", heads=(1, 1)),
    Case("sorted", 97, 97, sorted_config(sample_size=7), heads=(1, 1)),
    Case("sorted-overlap-lengths", 97, 131, sorted_config(sample_size=7, local_overlap=1), lengths=(60, 131), heads=(1, 1)),
    Case("sorted-non-causal", 97, 70, sorted_config(sample_size=7, causal=0), heads=(1, 1)),
]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow: every eighth row, or so, and blocks with a few of them."""
    monkeypatch.setattr(hardness, "ALL_ROWS", 10)
    monkeypatch.setattr(hardness, "FEWEST", 13)
    monkeypatch.setattr(hardness_fused, "SPLITS", 2)
    monkeypatch.setattr(hardness_columns, "NODE_ROWS", 2)
    monkeypatch.setattr(hardness_columns, "BAND", 16)
    monkeypatch.setattr(hardness_fused, "BAND", 16)


def heads_of(case: Case, dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Inputs are rounded to `dtype`; PyTorch computes with them in fp32."""
    q, k, v = (x.to(dtype) for x in case.inputs())
    lengths = case.lengths_tensor()
    plan = make_plan(q, k, Geometry.of(q, k, v, case.config, lengths), lengths)
    plan = Plan(*(x.to(DEVICE) for x in vars(plan).values()))
    lse = exact_attention(q.float(), k.float(), v.float(), bool(case.config.causal), lengths).lse.to(DEVICE)
    q, k, v = (x.to(DEVICE, dtype if fused else torch.float32) for x in (q, k, v))
    monkeypatch.setattr(hardness, "takes_kernels", lambda q: fused)
    found = measure_hardness(q, k, case.config, plan, lse, exact_lse(None), lengths)
    return [found.head(head) for head in range(case.heads[0])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_find_what_pytorch_finds(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = heads_of(case, torch.float32, False, monkeypatch)
    for found, head in zip(heads_of(case, torch.float32, True, monkeypatch), wanted, strict=True):
        assert_same(found, head, rel=5e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_multiplied_exactly(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("half", 97, 97, SMALL, heads=(1, 1))
    wanted = heads_of(case, dtype, False, monkeypatch)
    assert all(value > 0 for value in wanted[0].values())
    assert_same(heads_of(case, dtype, True, monkeypatch)[0], wanted[0], rel=5e-4, abs=1e-4)


def test_heads_in_parts_are_the_heads_together(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("parts", 97, 97, SMALL, heads=(2, 2))
    together = heads_of(case, torch.float32, True, monkeypatch)
    monkeypatch.setattr(hardness_fused, "LOGITS", 1)
    for found, head in zip(heads_of(case, torch.float32, True, monkeypatch), together, strict=True):
        assert_same(found, head)


def test_a_gpu_without_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hyperattention.validate.hardness_fused", None)
    with pytest.raises(EnvironmentFault, match=r"needs Triton.*install triton"):
        heads_of(Case("none", 70, 70, SMALL, heads=(1, 1)), torch.float32, True, monkeypatch)
