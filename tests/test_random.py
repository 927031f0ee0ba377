"""Random problems on the processor's kernels, against the dense oracle; one seed makes one problem.

python tests/test_random.py --cases 10000 [--seed-from 0] [--jobs 2]: many; lists the seeds that fail.
python tests/test_random.py --seed N: one of them again.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import oracle
import pytest
import torch
from operator_checks import as_plan, assert_near, assert_same_plan
from random_cases import check_random_case, random_case

from hyperattention.library import load_cpu
from hyperattention.native import Library
from hyperattention.reference import attention

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def library() -> Library:
    return load_cpu()


@pytest.mark.native
@pytest.mark.parametrize("seed", range(300))
def test_kernels_equal_oracle(seed: int) -> None:
    check_random_case(library(), seed)


@pytest.mark.parametrize("seed", range(10_000, 10_060))
def test_reference_equals_oracle(seed: int) -> None:
    case = random_case(seed)
    q, k, v = case.inputs()
    expected = oracle.make_plan(q.numpy(), k.numpy(), case.config, case.lengths)
    found = attention(q, k, v, case.config, case.lengths_tensor())
    assert_same_plan(found.plan, as_plan(expected))
    if case.fill != "scattered":  # rows that see NaN have no expected value
        wanted = oracle.attention(q.numpy(), k.numpy(), v.numpy(), case.config, case.lengths, expected)
        for mine, theirs in zip(found[:2], wanted, strict=True):
            assert_near(mine, torch.from_numpy(theirs), 1e-11)


@pytest.mark.parametrize("head_sizes", ["any", "cuda"])
def test_seeds_reach_everything(head_sizes: str) -> None:
    """Ten thousand problems would prove little if they were alike."""
    cases = [random_case(seed, head_sizes) for seed in range(10_000)]
    assert cases[7] == random_case(7, head_sizes)
    for selector in ("blocks", "sortlsh"):
        mine = [c for c in cases if c.config.selector == selector and not c.config.is_exact(c.seq_q, c.seq_k)]
        reached = {
            "causal": [c.config.causal for c in mine],
            "non-causal": [not c.config.causal for c in mine],
            "square": [c.seq_q == c.seq_k for c in mine],
            "chunk": [c.seq_q < c.seq_k for c in mine],
            "more queries": [c.seq_q > c.seq_k for c in mine],
            "lengths": [c.lengths is not None and min(c.lengths) < c.seq_k for c in mine],
            "no valid key": [c.lengths is not None and min(c.lengths) <= 0 for c in mine],
            "groups": [c.heads[0] > c.heads[1] > 1 for c in mine],
            "value size": [c.dims[0] != c.dims[1] for c in mine],
            "overlap": [c.config.causal and c.config.local_overlap and c.seq_k > 4 * c.config.local_size for c in mine],
            "several local blocks": [c.config.causal and not c.config.local_overlap and c.seq_k > 4 * c.config.local_size for c in mine],
            "odd block": [c.config.block_size % 2 for c in mine],
            "many blocks": [c.config.num_blocks == 64 for c in mine],
            "uniform samples": [not c.config.stratified and c.config.sample_size for c in mine],
        }
        rare = {name: sum(map(bool, hits)) for name, hits in reached.items() if sum(map(bool, hits)) < 100}
        assert not rare, f"of {len(mine)} {selector}: {rare}"
    assert sum(c.config.is_exact(c.seq_q, c.seq_k) for c in cases) > 1000
    assert sum(c.seq_k > 8192 and c.config.selector == "blocks" and c.config.block_size in (16, 32, 64, 128, 256) for c in cases) > 20
    if head_sizes == "cuda":
        assert {c.dims[0] for c in cases} == set(range(8, 257, 8)) == {c.dims[1] for c in cases}


def failure(seed: int) -> str:
    """What is wrong with one problem; empty when nothing."""
    torch.set_num_threads(1)
    try:
        check_random_case(library(), seed)
    except Exception:
        return traceback.format_exc()
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Random problems on the processor's kernels, against the dense oracle.")
    parser.add_argument("--cases", type=int, default=1, help="how many seeds in a row")
    parser.add_argument("--seed-from", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="one problem alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    given = parser.parse_args()
    seeds = range(given.seed_from, given.seed_from + given.cases) if given.seed is None else range(given.seed, given.seed + 1)
    start, failed = time.perf_counter(), []
    with ProcessPoolExecutor(given.jobs) as pool:
        for seed, text in zip(seeds, pool.map(failure, seeds, chunksize=8)):
            if text:
                failed.append(seed)
                print(f"--- seed {seed}\n{text}", flush=True)
            if seed % 1000 == 999:
                print(f"{seed} after {time.perf_counter() - start:.0f} s", flush=True)
    elapsed = time.perf_counter() - start
    print(f"seeds {seeds.start} to {seeds.stop - 1}: {len(seeds)} problems, {len(failed)} failed {failed} in {elapsed:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
