"""How the kernel of selector `blocks` is cut for a GPU's shared memory (plugins/cuda/select_config.h): a pure function, asked of the
emulated library, and the plan under a choice that only problems of hundreds of blocks of threads meet.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from cuda_checks import Problem, params
from native import Stages, assert_equal_bits, expected_plan
from operator_cases import Case, config

from hyperattention.config import PRESETS, Config
from hyperattention.native import Library, _Call

pytestmark = pytest.mark.usefixtures("one_thread")
H200 = 227 * 1024  # bytes of shared memory that it grants a block of threads
RESERVED = 1024  # of each block of threads, by CUDA
MOST_BLOCKS = 32


class Choice(NamedTuple):
    """Query blocks and threads of a block of threads, parts of the first and the second level, bytes of shared memory."""

    blocks: int
    threads: int
    rounds: int
    passes: int
    bytes: int


def choice(library: Library, call: _Call, shared: int) -> Choice:
    found = (ctypes.c_int64 * 5)()
    ctypes.CDLL(str(library.path)).ha_emulated_select_config(ctypes.byref(call.params), ctypes.c_int64(shared), found)
    return Choice(*found)


def long_call(library: Library, c: Config, tokens: int, size: int, heads: int = 32) -> _Call:
    """A square problem whose tensors are not there."""
    call = params(library, c, (1, 1, 1), (65, 65), (size, size), "bf16")
    call.params.heads_q, call.params.seq_q, call.params.seq_k = heads, tokens, tokens
    return call


SHAPES = [(64, 8, 4), (64, 0, 16), (16, 3, 4), (128, 64, 128), (256, 1, 4), (48, 8, 3)]


@pytest.mark.parametrize("block, taken, pool", SHAPES, ids=lambda n: str(n))
@pytest.mark.parametrize("size, most", [(64, 512), (40, 512), (128, 384), (256, 384)])
def test_as_many_threads_as_shared_memory_lets_work(hopper: Library, size: int, most: int, block: int, taken: int, pool: int) -> None:
    """Fewer threads for each block only where several lie beside each other; two halves wherever they take no more passes."""
    c = replace(PRESETS["blocks"], block_size=block, num_blocks=taken, pool_size=pool, local_size=16 * block)
    for shared in (96 * 1024, 163 * 1024, H200):
        for tokens in (4097, 16_384, 50_001, 131_072, 200_001, 262_144, 400_000, 1_048_576):
            call = long_call(hopper, c, tokens, size)
            found = choice(hopper, call, shared)
            beside = shared // found.bytes
            assert beside >= 1 or found.blocks == 1, (tokens, shared, found)
            if found.threads < most:
                assert beside >= 2 and 4 * beside * found.threads >= 3 * most, (tokens, shared, found)
            elif found.blocks == MOST_BLOCKS:
                half = choice(hopper, call, (shared - RESERVED) // 2)
                assert half.blocks < MOST_BLOCKS or half.passes > found.passes, (tokens, shared, found)


def test_two_halves_take_their_first_level_in_rounds(hopper: Library) -> None:
    """Lengths where two blocks of half the threads fit only because each scores its superblocks in two rounds."""
    for tokens in (192_512, 200_001, 256_000):
        found = choice(hopper, long_call(hopper, PRESETS["blocks"], tokens, 64), H200)
        assert found[:4] == (MOST_BLOCKS, 256, 2, 1) and 2 * (found.bytes + RESERVED) <= H200 + RESERVED, (tokens, found)
    assert choice(hopper, long_call(hopper, PRESETS["blocks"], 262_144, 64), H200)[:4] == (MOST_BLOCKS, 512, 1, 1)


# Two query blocks in different rounds. 512 blocks of threads are what the choice takes; all but eight have no key.
_HALVES = config(block_size=256, local_size=256, pool_size=256, sinks=0, sample_size=0)
HALVES = Problem(Case("halves", 66, 12_321, _HALVES, (8, 1), (8, 8), (12_321, *[0] * 63)), "bf16")


def test_plan_of_two_halves(hopper: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, x = 91_000, HALVES.inputs("cpu")
    call = _Call(hopper, x.q, x.k, x.v, HALVES.case.config, x.lengths)
    assert choice(hopper, call, shared)[:4] == (MOST_BLOCKS, 256, 2, 1)
    monkeypatch.setenv("HA_EMULATED_SHARED", str(shared))
    wanted = expected_plan(HALVES.case, torch.bfloat16).selection
    assert bool((wanted[0] >= 0).all()) and bool((wanted[1:] < 0).all())
    assert_equal_bits(Stages(hopper, x, HALVES.case.config).select(), wanted, "selection")
