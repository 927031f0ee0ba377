"""Every problem of the speed tables at its full size: plan, rounding, and the same bits from run to run and on two streams at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from native import assert_equal_bits
from table_checks import TABLE, TableCase, assert_rows_within_twin

from hyperattention.library import load_cuda
from hyperattention.native import Library
from hyperattention.selection import make_plan

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def library() -> Library:
    return load_cuda()


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_rows_are_within_the_twin(library: Library, case: TableCase, record_property: Callable[[str, object], None]) -> None:
    x = case.inputs("cuda")
    plan = make_plan(x.q, x.k, x.geometry)
    if not x.geometry.exact:
        assert_equal_bits(library.select(x.q, x.k, x.v, case.config), plan.selection, "selection")
    record_property("error over the twin's", assert_rows_within_twin(x, plan, *library.forward(x.q, x.k, x.v, case.config)))


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_two_streams_at_once_give_the_same_bits(library: Library, case: TableCase) -> None:
    x = case.inputs("cuda")
    first = library.forward(x.q, x.k, x.v, case.config)
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream(), torch.cuda.Stream()] * 2:
        with torch.cuda.stream(stream):
            results.append(library.forward(x.q, x.k, x.v, case.config))
    torch.cuda.synchronize()
    for result in results:
        for name, mine, wanted in zip(("o", "lse"), result, first, strict=True):
            assert_equal_bits(mine, wanted, name)
