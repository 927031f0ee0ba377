"""What the Hopper kernels take, how much shared memory they need and in what order they work on tiles: pure functions of shape and
attributes, asked of the emulated library.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from dataclasses import replace

import pytest
import torch
from cuda_checks import DTYPES, params
from operator_cases import sorted_config

from hyperattention.config import PRESETS
from hyperattention.errors import UsageError
from hyperattention.native import Library

LISTLESS = dict(num_blocks=0, sample_size=0)
TAKEN = {
    "bf16": (True, {}, (64, 64), "bf16", 90),
    "fp16-128": (True, {}, (8, 128), "fp16", 90),
    "fp32": (False, {}, (64, 64), "fp32", 90),
    "136": (False, {}, (64, 136), "bf16", 90),
    "ampere": (False, {}, (64, 64), "bf16", 80),
    "blackwell": (False, {}, (64, 64), "bf16", 100),
    "block63": (False, dict(block_size=63, pool_size=1, local_size=63), (64, 64), "bf16", 90),
    "block63-exact": (True, dict(block_size=63, pool_size=1, local_size=63, exact_below=999), (64, 64), "bf16", 90),
    "block16-samples": (False, dict(block_size=16, num_blocks=0), (64, 64), "bf16", 90),
    "block16-listless": (True, dict(block_size=16, **LISTLESS), (64, 64), "bf16", 90),
    "block16-listless-sorted": (False, dict(block_size=16, selector="sortlsh", **LISTLESS), (64, 64), "bf16", 90),
}


@pytest.mark.parametrize("taken, changes, dims, dtype, capability", TAKEN.values(), ids=TAKEN)
def test_what_hopper_kernels_take(
    hopper: Library, taken: bool, changes: dict[str, object], dims: tuple[int, int], dtype: str, capability: int
) -> None:
    call = params(hopper, replace(PRESETS["blocks"], **(dict(exact_below=0) | changes)), (1, 1, 1), (65, 300), dims, dtype)
    assert bool(ctypes.CDLL(str(hopper.path)).ha_emulated_uses_hopper(ctypes.byref(call.params), capability)) == taken


@pytest.mark.parametrize("exact_below", [0, 4096])
def test_more_heads_than_int_are_refused(hopper: Library, exact_below: int) -> None:
    """The copy engine's coordinates are int."""
    call = params(hopper, replace(PRESETS["blocks"], exact_below=exact_below, **LISTLESS), (1, 1, 1), (1, 1), (64, 64), "bf16")
    out = torch.empty(1, dtype=DTYPES["bf16"])
    call.params.out, call.params.batch, call.params.heads_q = out.data_ptr(), 2**16, 2**15
    assert ctypes.CDLL(str(hopper.path)).ha_emulated_uses_hopper(ctypes.byref(call.params), 90)
    with pytest.raises(UsageError, match="batch x heads is 2147483648; the CUDA kernels take up to 2147483647: split the batch"):
        hopper.check(hopper._attend, ctypes.byref(call.params))


SPLIT = {
    "blocks": (True, {}),
    "strict": (True, dict(strict_causal=1)),
    "one-block": (True, dict(num_blocks=1, sample_size=0, sinks=0, local_overlap=0)),
    "full": (False, dict(causal=0)),
    "exact": (False, dict(exact_below=999)),
    "samples-alone": (False, dict(num_blocks=0)),
    "block128": (False, dict(block_size=128)),
    "sortlsh": (False, dict(selector="sortlsh")),
}


@pytest.mark.parametrize("split, changes", SPLIT.values(), ids=SPLIT)
def test_which_problems_take_two_launches(hopper: Library, split: bool, changes: dict[str, object]) -> None:
    call = params(hopper, replace(PRESETS["blocks"], **(dict(exact_below=0) | changes)), (1, 1, 1), (65, 300), (64, 64), "bf16")
    assert bool(ctypes.CDLL(str(hopper.path)).ha_emulated_splits(ctypes.byref(call.params))) == split


@pytest.mark.parametrize("size", [64, 128])
def test_the_first_of_two_launches_has_the_rows_that_see_far_keys(hopper: Library, size: int) -> None:
    """All of them and, by tiles, no others: with any local part, sinks and queries that begin anywhere."""
    draw, check = random.Random(size), ctypes.CDLL(str(hopper.path)).ha_emulated_pair_tiles_mistake
    for _ in range(300):
        changes = dict(
            exact_below=0, local_size=64 * draw.randint(1, 5), local_overlap=draw.randint(0, 1), sinks=draw.choice((0, 1, 64, 700))
        )
        call = params(hopper, replace(PRESETS["blocks"], **changes), (2, 3, 1), (1, 1), (size, size), "bf16")
        call.params.seq_q, call.params.seq_k = draw.randint(65, 2000), draw.randint(1, 2000)
        assert check(ctypes.byref(call.params)) == 0, (changes, call.params.seq_q, call.params.seq_k)


def test_hopper_kernels_fit_shared_memory(hopper: Library) -> None:
    """With all attributes that decide how much they need, wherever they take the problem."""
    native, problems = ctypes.CDLL(str(hopper.path)), 0
    for block in range(16, 257):
        for selector, num_blocks, samples, size in itertools.product(("blocks", "sortlsh"), (0, 1, 64), (0, 1, 4096), (64, 128)):
            c = sorted_config(
                selector=selector, block_size=block, pool_size=1, local_size=block, num_blocks=num_blocks, sample_size=samples
            )
            call = params(hopper, c, (1, 1, 1), (65, 1000), (size, size), "bf16")
            if native.ha_emulated_uses_hopper(ctypes.byref(call.params), 90):
                assert native.ha_emulated_hopper_bytes(ctypes.byref(call.params)) <= 227 * 1024, c
                problems += 1
    assert problems > 193 * 36


@pytest.mark.parametrize("seed", range(3))
def test_every_tile_has_its_turn(hopper: Library, seed: int) -> None:
    """Each once, blocks of threads in alternating directions, heads of the same keys in one run."""
    draw, check = random.Random(seed), ctypes.CDLL(str(hopper.path)).ha_emulated_schedule_mistake
    check.argtypes = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int
    for _ in range(100):
        batch, heads_kv, group = (draw.randint(1, most) for most in (3, 9, 5))
        call = params(hopper, PRESETS["blocks"], (batch, heads_kv * group, heads_kv), (1, 1), (64, 64), "bf16")
        call.params.seq_k = draw.choice((1, 40_000, 60_000, 100_000, 2**30))  # several heads fit the cache, or not even one
        cut = draw.randint(1, 40), draw.choice((1, 2, 3, 131, 132, 10_000)), draw.choice((24, 32, 300)) << 20, draw.choice((0, 1))
        assert check(ctypes.addressof(call.params), *cut) == 0, (batch, heads_kv, group, call.params.seq_k, *cut)
