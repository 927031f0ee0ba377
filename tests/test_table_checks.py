"""What holds the kernels at full size (table_checks.py, oracle_rows.py), held itself: against the dense oracle, and by broken outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from native import Inputs
from operator_cases import CASES, SORTED_CASES, Case
from operator_checks import as_plan, oracle_plan
from oracle_rows import attend, weights
from oracle_rules import Rows
from table_checks import TableCase, assert_rows_within_twin, borders, chosen_rows, head_plan

from hyperattention.config import PRESETS
from hyperattention.geometry import Geometry
from hyperattention.library import load_cpu
from hyperattention.native import Library
from hyperattention.selection import Plan, make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
SQUARE = [case for case in CASES + SORTED_CASES if case.seq_q == case.seq_k > 0 and not case.lengths]
_SMALL = dict(exact_below=0, local_size=128, sample_size=40)
TINY = [
    TableCase(name, replace(PRESETS[name], **_SMALL, **changes, causal=causal), dim, n, heads)
    for causal, dim, n, heads in ((1, 64, 1500, (4, 2)), (0, 16, 900, (2, 2)))
    for name, changes in (("blocks", {"num_blocks": 3}), ("paper", {"block_size": 48}))
] + [TableCase("exact", PRESETS["exact"], 64, 300, (2, 1))]


@pytest.mark.parametrize("case", SQUARE, ids=str)
def test_rows_have_the_dense_oracles_weights(case: Case) -> None:
    q, k, v = case.inputs()
    made, x = oracle_plan(case), Inputs(q, k, v, None, Geometry.of(q, k, v, case.config))
    o, lse = oracle.attention(q.numpy(), k.numpy(), v.numpy(), case.config, None, made)
    for head in range(case.heads[0]):
        head_kv = head // x.geometry.group
        wanted = oracle.weights(Rows(case.config, case.seq_q, case.seq_k, case.seq_k), made, 0, head, head_kv)
        found = weights(case.config, head_plan(x, as_plan(made), head), torch.arange(case.seq_q), case.seq_k)
        np.testing.assert_array_equal(found.numpy(), wanted)
        mine = attend(q[0, head], k[0, head_kv], v[0, head_kv], found, case.config.resolved_scale(q.shape[-1]))
        for each, dense in zip(mine, (o, lse), strict=True):
            np.testing.assert_allclose(each.numpy(), dense[0, head], rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def library() -> Library:
    return load_cpu()


def solved(library: Library, case: TableCase) -> tuple[Inputs, Plan, torch.Tensor, torch.Tensor]:
    """Inputs, plan, and what the processor's kernels make of them in fp32, O rounded to bf16."""
    x = case.inputs("cpu")
    x = replace(x, q=x.q.float(), k=x.k.float(), v=x.v.float())
    o, lse = library.forward(x.q, x.k, x.v, case.config)
    return x, make_plan(x.q, x.k, x.geometry), o.bfloat16(), lse


@pytest.mark.native
@pytest.mark.parametrize("case", TINY, ids=str)
def test_the_processors_kernels_pass(library: Library, case: TableCase) -> None:
    assert 0.3 < assert_rows_within_twin(*solved(library, case)) <= 1, "O is rounded alike, the rest of the twin's rounding is missing"


@pytest.mark.native
@pytest.mark.parametrize("case", TINY, ids=str)
def test_a_wrong_row_is_found(library: Library, case: TableCase) -> None:
    x, plan, o, lse = solved(library, case)
    row = int(chosen_rows(x, plan)[1, -1])
    for wrong in (o[0, 1, row].roll(1), o[0, 1, row] * 1.05, torch.full_like(o[0, 1, row], float("nan"))):
        broken = o.clone()
        broken[0, 1, row] = wrong
        with pytest.raises(AssertionError, match="errors over the twin's"):
            assert_rows_within_twin(x, plan, broken, lse)


@pytest.mark.native
@pytest.mark.parametrize("case", [case for case in TINY if case.name != "exact"], ids=str)
@pytest.mark.parametrize("missing", ["chosen", "samples"])
def test_a_missing_part_is_found(library: Library, case: TableCase, missing: str) -> None:
    x, plan, *_ = solved(library, case)
    less = replace(case.config, **({"num_blocks": 0} if missing == "chosen" else {"sample_size": 0}))
    with pytest.raises(AssertionError, match="errors over the twin's"):
        assert_rows_within_twin(x, plan, *library.forward(x.q, x.k, x.v, less))


def test_rows_lie_at_both_ends_and_at_borders() -> None:
    found = borders(PRESETS["paper"], 131072)
    assert {0, 1, 255, 256, 4095, 4096, 65535, 65536, 65663, 65664, 131070, 131071} <= set(found)
    assert found == sorted(set(found)) and found[0] == 0 and found[-1] == 131071
