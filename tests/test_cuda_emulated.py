"""The CUDA kernels' own source, run thread by thread on the processor (tests/emulation), against the reference.

This holds index arithmetic, fragment layouts, barriers and asynchronous copies where there is no GPU; tests/gpu/test_cuda.py
runs the same checks, and more of them, on one.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_checks import (
    CHUNK_PROBLEMS,
    DTYPES,
    HEAD_SIZE_PROBLEMS,
    NO_ROWS,
    PADDING,
    Problem,
    check_attention,
    check_padding,
    check_plan,
    check_plan_of_no_rows,
    check_without_lse,
)
from native import Stages, assert_equal_bits
from operator_cases import PLAN_ONLY, SORTED_PLAN_ONLY, Case, config, sorted_config
from random_cases import check_random_case

from hyperattention.config import PRESETS, Config
from hyperattention.errors import UsageError
from hyperattention.native import Library, _Call

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def library(emulated: dict[int, Path]) -> Library:
    """On an emulated device of compute capability 8.0."""
    return Library(emulated[80], "ha_cuda_", "cpu")


def products(library: Library) -> int:
    """How many products of a warp group have run so far: only the Hopper kernels have any."""
    count = ctypes.CDLL(str(library.path)).ha_emulated_products
    count.restype = ctypes.c_int64
    return count()


# What tests/emulation/mistakes.cpp can do wrong, and what comes of it.
MISTAKES = {
    "nothing": "0 wrong",
    "barrier not published": "a barrier that was not published",
    "fewer bytes expected": "deadlock",
    "end before a load has landed": "the block ended before a load had landed",
    "end before its copies have landed": "a thread ended with a copy in flight that a barrier counts",
    "one arrival missing": "deadlock",
    "arrival before the read": "some wrong",
    "one arrival too many": "shared memory changed under a product",
    "copies not waited for": "shared memory changed under a product",
    "no fence": "no fence_products lies between",
    "no product_begin": "a product without product_begin",
    "another operand": "threads of a product disagree",
    "products not waited for": "a thread ended with a product in flight",
    "operand in registers changed": "operands in registers changed under a product",
    "accumulator changed": "accumulators were touched before product_wait",
    "accumulator read": "some wrong",
    "buffer filled again": "shared memory changed under a product",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulator_notices(emulated: dict[int, Path], mistake: str) -> None:
    code = "import ctypes, sys; print('some' if ctypes.CDLL(sys.argv[1]).ha_emulated_mistake(sys.argv[2].encode()) else '0', 'wrong')"
    done = subprocess.run([sys.executable, "-c", code, emulated[90], mistake], capture_output=True, text=True)
    assert MISTAKES[mistake] in done.stdout + done.stderr


PLAIN = Case("plain", 70, 203, dims=(64, 64))
SMALL = replace(PRESETS["blocks"], exact_below=0, local_size=128, sample_size=70, num_blocks=3, sinks=70)
CASES = [
    Problem(Case("preset-like", 150, 600, SMALL, heads=(2, 1), dims=(64, 64), lengths=(600, 431)), "bf16"),
    Problem(Case("preset-like", 150, 600, SMALL, heads=(1, 1), dims=(128, 128)), "fp16"),
    Problem(PLAIN, "fp16"),
    Problem(replace(PLAIN, dims=(128, 128), lengths=(1, 150)), "bf16"),
    Problem(Case("more-queries", 150, 65, heads=(1, 1), dims=(64, 64)), "bf16"),
    Problem(Case("non-causal", 130, 260, replace(SMALL, causal=0, sinks=3), heads=(1, 1), dims=(64, 64)), "bf16"),
    Problem(Case("block48", 97, 256, config(block_size=48, pool_size=3, local_size=48), heads=(1, 1), dims=(64, 64)), "bf16"),
    Problem(Case("block128", 200, 600, replace(SMALL, block_size=128), heads=(1, 1), dims=(64, 64)), "bf16"),
    Problem(Case("block256-uniform", 100, 900, replace(SMALL, block_size=256, local_size=256, stratified=0), (1, 1), (64, 64)), "fp16"),
    Problem(Case("exact", 130, 190, Config().exact(), heads=(2, 1), dims=(64, 64), lengths=(190, 77)), "bf16"),
    Problem(Case("exact-one-row", 1, 131, Config().exact(), heads=(1, 1), dims=(128, 128)), "bf16"),
    Problem(Case("strict", 150, 600, replace(SMALL, strict_causal=1), heads=(2, 1), dims=(64, 64), lengths=(600, 431)), "bf16"),
    Problem(Case("no-key", 66, 0, heads=(1, 1), dims=(64, 64)), "bf16"),
    Problem(Case("two-levels", 66, 9001, config(block_size=64, local_size=64), heads=(1, 1), dims=(64, 64), lengths=(8999, 500)), "bf16"),
]
# Selector `sortlsh`: nodes that lengths, chunks and sinks cut, ranks of one and two digits.
SORTED = sorted_config(block_size=48, local_size=64, sample_size=70)
CENTRED = replace(SORTED, hash_centre=1)
SORTED_CASES = [
    Problem(Case("sorted", 200, 330, SORTED, (2, 1), (64, 64), (330, 211)), "bf16"),
    Problem(Case("sorted-overlap", 150, 330, replace(SORTED, local_overlap=1, sinks=20), (1, 1), (64, 64)), "fp16"),
    Problem(Case("sorted-two-digits", 200, 200, replace(SORTED, num_projections=13), (1, 1), (40, 72), (200, 130)), "fp32"),
    Problem(Case("sorted-non-causal", 130, 300, replace(SORTED, causal=0, stratified=0), (2, 1), (32, 32), (300, 77)), "bf16"),
    Problem(Case("sorted-more-queries", 200, 150, replace(SORTED, block_size=256, num_blocks=1), (1, 1), (64, 64)), "bf16"),
    Problem(Case("centred", 200, 330, CENTRED, (4, 2), (40, 64), (330, 211), "shared-mean"), "bf16"),
    Problem(Case("centred-two-digits", 130, 330, replace(CENTRED, num_projections=11), (1, 1), (72, 64), (330, 1)), "fp16"),
    Problem(Case("centred-fp32", 70, 330, replace(CENTRED, causal=0), (2, 1), (8, 8), (330, 3, 0)), "fp32"),
]
# For the Hopper kernels: short tiles and several for each block of threads, lengths that end inside a tile load, one and many key blocks,
# lists whose blocks straddle tiles, head sizes whose loads reach past the tensor.
_FULL = dict(heads=(1, 1), dims=(64, 64))
_HOPPER_SORTED = sorted_config(block_size=64, local_size=100, sample_size=70, num_blocks=2)
_MANY_SINKS = replace(SMALL, num_blocks=0, sample_size=0, local_overlap=0)
HOPPER_CASES = [
    *(problem for problem in CASES if problem.case.name in ("preset-like", "non-causal", "block128", "block256-uniform", "two-levels")),
    *(problem for problem in CASES + SORTED_CASES if problem.case.name in ("exact", "exact-one-row", "sorted-more-queries")),
    Problem(Case("turns", 700, 700, replace(SMALL, num_blocks=5), heads=(3, 1), dims=(64, 64)), "bf16"),
    Problem(Case("turns-exact", 520, 777, Config().exact(), heads=(4, 2), dims=(128, 128), lengths=(777, 300)), "bf16"),
    Problem(Case("exact-non-causal", 129, 257, config(causal=0).exact(), heads=(2, 2), dims=(40, 72), lengths=(257, 1, 0)), "fp16"),
    Problem(Case("narrow", 131, 400, SMALL, heads=(2, 1), dims=(8, 128), lengths=(399,)), "bf16"),
    Problem(Case("one-block", 300, 450, replace(SMALL, num_blocks=1, sinks=0, local_overlap=0), **_FULL), "bf16"),
    # Keys that end one before a tile load does, where query blocks have no key block; short query blocks, which come without lists.
    Problem(
        Case("one-key-short", 203, 203, replace(SMALL, local_size=64, local_overlap=0, sinks=0), (1, 1), (64, 64), (63,), "padding"), "bf16"
    ),
    Problem(Case("no-lists", 150, 200, replace(SMALL, block_size=16, num_blocks=0, sample_size=0), dims=(128, 128)), "bf16"),
    Problem(Case("no-block", 300, 450, replace(SMALL, num_blocks=0), **_FULL), "fp16"),
    Problem(Case("no-sample", 150, 600, replace(SMALL, sample_size=0, sinks=200), **_FULL), "bf16"),
    Problem(Case("block192", 200, 900, replace(SMALL, block_size=192, local_size=192), **_FULL), "bf16"),
    Problem(Case("more-queries-than-keys", 420, 130, SMALL, **_FULL), "bf16"),
    Problem(Case("sorted-turns", 500, 500, _HOPPER_SORTED, (3, 1), (64, 64), (500, 211)), "bf16"),
    Problem(Case("sorted-overlap", 150, 330, replace(_HOPPER_SORTED, local_overlap=1, sinks=20), (1, 1), (128, 128)), "fp16"),
    Problem(Case("sorted-non-causal", 130, 300, replace(_HOPPER_SORTED, causal=0, block_size=100), (2, 1), (72, 64), (300, 77)), "bf16"),
    # Tiles of 256 rows: with rows for three pieces of 64, with several query blocks, with listed keys that are local to some rows.
    Problem(Case("sorted-tall", 450, 500, replace(_HOPPER_SORTED, causal=0, block_size=64), (2, 1), (64, 64), (500, 333)), "bf16"),
    Problem(Case("sorted-tall-overlap", 600, 650, replace(_HOPPER_SORTED, local_overlap=1, block_size=96), (1, 1), (40, 64)), "fp16"),
    # The same in steps of 64 keys: more samples than are kept from tile to tile, lists of an odd number of steps.
    Problem(Case("sorted-many", 500, 550, replace(_HOPPER_SORTED, causal=0, sample_size=300), (2, 1), (128, 128), (550, 333)), "bf16"),
    Problem(Case("sorted-odd", 600, 650, replace(_HOPPER_SORTED, local_size=300, block_size=192, num_blocks=1), (2, 1), (96, 72)), "bf16"),
    # A border of local blocks within a tile: its last rows alone have sinks, more than the ring holds.
    Problem(Case("many-sinks", 110, 1064, replace(_MANY_SINKS, local_size=1024, sinks=385), **_FULL), "bf16"),
    Problem(Case("many-sinks", 110, 1000, replace(_MANY_SINKS, local_size=960, sinks=257), (1, 1), (128, 128)), "fp16"),
    # Sinks beside what the plan names, in two launches: more than a local block holds, more than some rows or all have far keys.
    Problem(Case("split-sinks", 700, 900, replace(SMALL, local_size=64, local_overlap=0, sinks=200), (2, 1), (64, 64), (900, 190)), "bf16"),
    Problem(Case("split-sinks", 500, 500, replace(SMALL, local_overlap=1, sinks=385), (1, 1), (128, 128), (500, 391)), "fp16"),
    Problem(Case("split-sinks-chunk", 130, 700, replace(SMALL, local_size=192, sinks=64), (1, 1), (64, 64), (699,)), "bf16"),
    Problem(Case("sorted-blocks", 300, 300, replace(_HOPPER_SORTED, block_size=256, num_blocks=3, stratified=0), **_FULL), "bf16"),
]
# Exact attention whose largest logits come after steps of far smaller ones, or of none above minus infinity, whichever way keys are walked.
LATE_MAXIMA = [
    Problem(Case(fill, 130, 700, config(causal=causal).exact(), (1, 1), dims, fill=fill), dtype)
    for dims, causal in (((64, 64), 1), ((128, 128), 0))
    for fill, dtype in (("hill", "fp16"), ("high-hill", "bf16"), ("island", "fp16"), ("island", "bf16"))
]
# Of random problems, those that they take.
HOPPER_SEEDS = (138, 141, 144, 151, 160, 163, 177, 202, 262, 291, 297, 321, 331, 333, 345, 354, 370, 379, 381, 399)
# Each head size once, dtypes and selectors in turn.
SIZES = HEAD_SIZE_PROBLEMS[::5]


def _two_levels(name: str, block: int, rows: int, **changes: int) -> Problem:
    c = config(block_size=block, local_size=block, **changes)
    return Problem(Case(f"{name}{block}", rows, 9500, c, (1, 1), (64, 64)), "bf16")


_SORTED_DTYPES = ("fp32", "bf16", "fp32", "fp32", "bf16", "fp32", "fp32", "bf16", "fp16")
PLANS = (
    [Problem(replace(case, dims=(64, 64)), "bf16") for case in PLAN_ONLY if case.seq_k < 1000]
    + [Problem(replace(case, dims=(64, 64)), dtype) for case, dtype in zip(SORTED_PLAN_ONLY, _SORTED_DTYPES, strict=True)]
    # Sums whose signs the hash has to settle in the rule's order.
    + [
        Problem(Case(f"sorted-{fill}", config=SORTED, dims=(72, 8), fill=fill), dtype)
        for fill, dtype in (("ties", "fp16"), ("cancelling", "bf16"))
    ]
    + CHUNK_PROBLEMS
    + [_two_levels("two-levels-block", block, 66, num_blocks=64) for block in (16, 32, 128, 256)]
    # Rule 22: few and many query blocks a block of threads.
    + [_two_levels("two-levels-strict", block, rows, strict_causal=1) for block, rows in ((16, 163), (64, 2100), (256, 700))]
    # Negative scores, also where their halves would round otherwise.
    + [Problem(Case(f"opposed-tiny-seed{seed}", fill="opposed-tiny", dims=(64, 64), seed=seed), "fp32") for seed in range(4)]
)
# Selections that little shared memory (bytes) makes in parts: key blocks in passes, or fewer query blocks a block of threads.
_WIDE = config(block_size=256, local_size=256, pool_size=16)
LITTLE_SHARED = [
    (6100, Problem(Case("passes", 700, 9500, config(block_size=64, local_size=64), (2, 1), (64, 64), (9500, 9100)), "bf16")),
    (5200, Problem(Case("two-blocks", 1300, 9500, _WIDE, (2, 1), (64, 64)), "bf16")),
    (5200, Problem(Case("two-blocks-strict", 1300, 9500, replace(_WIDE, strict_causal=1), (1, 1), (64, 64)), "bf16")),
    (5500, Problem(Case("flat", 300, 2500, config(block_size=48, local_size=48, pool_size=3), (1, 1), (64, 64)), "bf16")),
    (1000, Problem(Case("one-block", 150, 9001, config(block_size=64, local_size=64), (1, 1), (64, 64)), "bf16")),
]


@pytest.mark.parametrize("problem", CASES + SORTED_CASES + SIZES + PLANS, ids=str)
def test_plan_equals_the_references(library: Library, problem: Problem) -> None:
    check_plan(library, problem, "cpu")


@pytest.mark.parametrize("limit, problem", LITTLE_SHARED, ids=str)
def test_plan_with_little_shared_memory(library: Library, limit: int, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HA_EMULATED_SHARED", str(limit))
    check_plan(library, problem, "cpu")


@pytest.mark.parametrize("problem", CASES + SORTED_CASES + SIZES, ids=str)
def test_attention_under_the_references_plan(library: Library, problem: Problem) -> None:
    check_attention(library, problem, "cpu")


@pytest.mark.parametrize("problem", HOPPER_CASES, ids=str)
def test_attention_on_hopper(hopper: Library, problem: Problem) -> None:
    before = products(hopper)
    check_attention(hopper, problem, "cpu")
    assert products(hopper) > before


@pytest.mark.parametrize("problem", LATE_MAXIMA, ids=str)
def test_maxima_that_come_late_on_hopper(hopper: Library, problem: Problem) -> None:
    """Powers refer to what a row met before: it has to rise where they would overflow, and where the row had met nothing."""
    before = products(hopper)
    check_attention(hopper, problem, "cpu")
    assert products(hopper) > before


def test_threads_that_fall_behind_change_nothing_on_hopper(hopper: Library) -> None:
    """Other threads stand still each time; a list is not overwritten while one of them has yet to look up its values."""
    for _ in range(4):
        check_attention(hopper, HOPPER_CASES[0], "cpu")


@pytest.mark.parametrize("problem", [HOPPER_CASES[0], HOPPER_CASES[-1]], ids=str)
def test_o_without_lse_on_hopper(hopper: Library, problem: Problem) -> None:
    check_without_lse(hopper, problem, "cpu")


@pytest.mark.parametrize("name", ["exact", "exact-non-causal", "sorted-block64"])
def test_padding_reaches_no_live_row_on_hopper(hopper: Library, name: str) -> None:
    check_padding(hopper, PADDING[name], float("nan"), "cpu")


@pytest.mark.parametrize(
    "problem",
    [
        Problem(replace(HOPPER_CASES[0].case, dims=(64, 136)), "bf16"),
        Problem(HOPPER_CASES[0].case, "fp32"),
        *(p for p in CASES if p.case.name in ("block48", "no-key")),
    ],
    ids=str,
)
def test_what_hopper_kernels_do_not_take_runs_the_portable_ones(hopper: Library, problem: Problem) -> None:
    before = products(hopper)
    check_attention(hopper, problem, "cpu")
    assert products(hopper) == before


def test_other_devices_run_the_portable_kernels(library: Library) -> None:
    check_attention(library, HOPPER_CASES[0], "cpu")
    assert products(library) == 0


@pytest.mark.parametrize("seed", HOPPER_SEEDS)
def test_random_problems_on_hopper(hopper: Library, seed: int) -> None:
    before = products(hopper)
    check_random_case(hopper, seed)
    assert products(hopper) > before


@pytest.mark.parametrize("problem", [CASES[0], *SORTED_CASES[:2]], ids=str)
def test_o_without_lse(library: Library, problem: Problem) -> None:
    check_without_lse(library, problem, "cpu")


@pytest.mark.parametrize("name", ["approximate", "sorted", "exact"])
def test_padding_reaches_no_live_row(library: Library, name: str) -> None:
    check_padding(library, PADDING[name], float("nan"), "cpu")


@pytest.mark.parametrize("seed", range(12))
def test_random_problems(library: Library, seed: int) -> None:
    check_random_case(library, seed)


def test_a_plan_that_names_no_block_is_cut_short(library: Library) -> None:
    """A foreign plan never leads outside the tensors: its first entry that is no key block ends it."""
    x = Problem(PLAIN, "bf16").inputs("cpu")
    stages = Stages(library, x, PLAIN.config)
    blocks = stages.select()
    foreign = blocks.clone()
    foreign[..., 1:] = 2**31 - 1
    blocks[..., 1:] = -1
    for mine, wanted in zip(stages.attend(foreign), stages.attend(blocks), strict=True):
        assert_equal_bits(mine, wanted, "output")


def test_a_sorted_plan_of_no_rows_is_passed_over(library: Library) -> None:
    check_plan_of_no_rows(library, SORTED_CASES[0], "cpu")


@pytest.mark.parametrize("problem", NO_ROWS, ids=str)
def test_a_sorted_plan_of_no_rows_is_passed_over_on_hopper(hopper: Library, problem: Problem) -> None:
    before = products(hopper)
    check_plan_of_no_rows(hopper, problem, "cpu")
    assert products(hopper) > before


@pytest.mark.parametrize(
    "dims, text",
    [((20, 64), "head_dim is 20; the CUDA kernels take multiples of 8 up to 256"), ((64, 4), "head_dim_v is 4; the CUDA kernels take")],
    ids=["head-size", "value-size"],
)
def test_refusals(library: Library, dims: tuple[int, int], text: str) -> None:
    q, k, v = (x.float() for x in replace(PLAIN, dims=dims).inputs())
    with pytest.raises(UsageError, match=text):
        library.forward(q, k, v, PLAIN.config)


def test_selection_names_its_limit(library: Library) -> None:
    """Scores lie in shared memory, so lengths have an end; it is said, not reached silently."""
    q, k = (torch.zeros(1, 1, rows, 8, dtype=DTYPES["bf16"]) for rows in (65, 13_500_000))
    with pytest.raises(UsageError, match="selection over 13500000 keys with block_size 64 needs .* bytes of shared memory"):
        library.select(q, k, k, PRESETS["blocks"])
    library.workspace_size(q, k, k, PRESETS["paper"])


def test_sequences_beyond_int_are_refused(library: Library) -> None:
    """Positions are int in the kernels, with room for the tiles behind the last one."""
    q = torch.zeros(1, 1, 65, 8, dtype=DTYPES["bf16"])
    call = _Call(library, q, q, q, PRESETS["paper"], None)
    call.params.seq_k = 2**30
    assert call.workspace_size() > 2**32
    call.params.seq_k = 2**30 + 1
    with pytest.raises(UsageError, match="the sequence has 1073741825 rows; the CUDA kernels take up to 1073741824: split it"):
        call.workspace_size()
