"""The CUDA kernels on a GPU: stage by stage against the reference, guard bytes around everything, streams, graphs, lengths.

The tests whose names begin with test_sanitizer run little else on the device and are meant for compute-sanitizer:
`compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_cuda.py -k sanitizer`.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from cuda_checks import (
    CHUNK_PROBLEMS,
    DTYPES,
    HEAD_SIZE_PROBLEMS,
    NO_ROWS,
    PADDING,
    PLAN_PROBLEMS,
    PROBLEMS,
    Problem,
    check_attention,
    check_padding,
    check_plan,
    check_plan_of_no_rows,
    check_without_lse,
    random_failure,
)
from native import Inputs, Stages, assert_equal_bits, assert_within_twin
from operator_cases import Case, config, sorted_config

from hyperattention import op, reference
from hyperattention.config import PRESETS, Config
from hyperattention.errors import UsageError
from hyperattention.geometry import Geometry
from hyperattention.library import load_cuda
from hyperattention.native import Library
from hyperattention.selection import Plan, make_plan

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]
BLOCKS, PAPER = PRESETS["blocks"], PRESETS["paper"]


@pytest.fixture(scope="module")
def library() -> Library:
    return load_cuda()


# --- small problems: every rule at odd sizes -------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS + PLAN_PROBLEMS + CHUNK_PROBLEMS + HEAD_SIZE_PROBLEMS, ids=str)
def test_plan_equals_the_references(library: Library, problem: Problem) -> None:
    check_plan(library, problem, "cuda")


@pytest.mark.parametrize("problem", PROBLEMS + HEAD_SIZE_PROBLEMS, ids=str)
def test_attention_under_the_references_plan(library: Library, problem: Problem) -> None:
    check_attention(library, problem, "cuda")


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e4], ids=str)
@pytest.mark.parametrize("name", PADDING)
def test_padding_reaches_no_live_row(library: Library, name: str, poison: float) -> None:
    check_padding(library, PADDING[name], poison, "cuda")


@pytest.mark.parametrize("problem", HEAD_SIZE_PROBLEMS[::7], ids=str)
def test_o_without_lse(library: Library, problem: Problem) -> None:
    check_without_lse(library, problem, "cuda")


def test_2000_random_problems() -> None:
    """Any shapes and attributes against the dense oracle; a failure names its seed."""
    seeds = range(2000)
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")) as pool:
        failures = [(seed, text) for seed, text in zip(seeds, pool.map(random_failure, seeds, chunksize=25), strict=True) if text]
    assert not failures, f"{len(failures)} of {len(seeds)} failed, seeds {[seed for seed, _ in failures]}; the first:\n{failures[0][1]}"


# --- long problems, the reference on the GPU -------------------------------------------------------------------------


def random_inputs(
    c: Config, batch: int, heads: tuple[int, int], rows: tuple[int, int], dim: int, dtype: str, lengths=None, dim_v: int | None = None
) -> Inputs:
    """Keys in slowly turning directions, so that blocks differ in weight as they do in a model."""
    generator = torch.Generator(device="cuda").manual_seed(rows[0] + 7 * rows[1] + dim)
    q, k, v = (
        torch.randn(batch, h, n, d, generator=generator, device="cuda")
        for h, n, d in ((heads[0], rows[0], dim), (heads[1], rows[1], dim), (heads[1], rows[1], dim_v or dim))
    )
    drift = torch.randn(batch, heads[1], -(-rows[1] // 100), dim, generator=generator, device="cuda").repeat_interleave(100, 2)
    k = k + drift[:, :, : rows[1]]
    q, k, v = (x.to(DTYPES[dtype]) for x in (q, k, v))
    tensor = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return Inputs(q, k, v, tensor, Geometry.of(q, k, v, c, tensor))


LONG = {
    "preset-d64": (BLOCKS, 1, (4, 2), (6000, 6000), 64, "bf16"),
    "preset-d128": (BLOCKS, 1, (2, 1), (5003, 5003), 128, "bf16"),
    "preset-fp16": (BLOCKS, 1, (2, 2), (5003, 5003), 64, "fp16"),
    "two-levels-d64": (BLOCKS, 1, (2, 1), (16500, 16500), 64, "bf16"),
    "two-levels-d128-chunk": (BLOCKS, 1, (4, 1), (1500, 20011), 128, "fp16"),
    "two-levels-lengths": (BLOCKS, 3, (2, 1), (3000, 12000), 64, "bf16", (12000, 11111, 9500)),
    "two-levels-non-causal": (replace(BLOCKS, causal=0), 1, (2, 1), (2000, 12345), 64, "bf16"),
    "share-above-minimum": (BLOCKS, 1, (1, 1), (300, 140_000), 64, "bf16"),
    "no-overlap": (replace(BLOCKS, local_overlap=0), 1, (2, 1), (9001, 9001), 64, "bf16"),
    "strict": (replace(BLOCKS, strict_causal=1), 1, (2, 1), (9001, 9001), 64, "bf16"),
    "strict-chunk": (replace(BLOCKS, strict_causal=1), 2, (2, 1), (3011, 12013), 128, "fp16", (12013, 9500)),
    "no-samples": (replace(BLOCKS, sample_size=0), 1, (2, 1), (9001, 9001), 64, "bf16"),
    "no-blocks": (replace(BLOCKS, num_blocks=0), 1, (2, 1), (9001, 9001), 128, "bf16"),
    "most-of-all": (replace(BLOCKS, num_blocks=64, sample_size=4096, sinks=4096), 1, (1, 1), (700, 12000), 64, "bf16"),
    "block16": (replace(BLOCKS, block_size=16), 1, (1, 1), (2000, 9500), 64, "bf16"),
    "block48": (replace(BLOCKS, block_size=48, local_size=960), 1, (1, 1), (2000, 9500), 64, "bf16"),
    "block128": (replace(BLOCKS, block_size=128), 1, (2, 1), (9001, 9001), 64, "bf16"),
    "block256-pool1": (replace(BLOCKS, block_size=256, pool_size=1), 1, (1, 1), (5000, 12000), 128, "bf16"),
    "pool64": (replace(BLOCKS, pool_size=64), 1, (1, 1), (2000, 9500), 64, "bf16"),
    "exact-causal": (BLOCKS.exact(), 2, (2, 1), (3000, 4001), 128, "bf16", (4001, 2500)),
    "exact-non-causal": (replace(BLOCKS, causal=0).exact(), 1, (2, 1), (3001, 2999), 64, "fp16"),
    "preset-fp32": (BLOCKS, 1, (2, 1), (5003, 5003), 64, "fp32"),
    "preset-d96": (BLOCKS, 1, (2, 1), (9001, 9001), 96, "bf16"),
    "preset-value-size": (BLOCKS, 1, (2, 1), (5003, 5003), 192, "bf16", None, 128),
    "two-levels-d256": (BLOCKS, 1, (1, 1), (3000, 12000), 256, "bf16"),
    "paper-d64": (PAPER, 1, (4, 2), (9001, 9001), 64, "bf16"),
    "paper-d128": (PAPER, 1, (2, 2), (16384, 16384), 128, "bf16"),
    "paper-chunk": (PAPER, 1, (4, 1), (3000, 20011), 128, "fp16"),
    "paper-lengths": (PAPER, 3, (2, 1), (12000, 12000), 64, "bf16", (12000, 9111, 17)),
    "paper-overlap": (replace(PAPER, local_overlap=1, sinks=64), 1, (2, 1), (20000, 20000), 64, "bf16"),
    "paper-sinks-d64": (replace(PAPER, sinks=4096), 1, (2, 1), (9001, 9001), 64, "bf16"),
    "paper-sinks-d128": (replace(PAPER, local_size=1000, sinks=512), 1, (2, 1), (9001, 9001), 128, "fp16"),
    "paper-non-causal": (replace(PAPER, causal=0), 2, (2, 1), (12345, 12345), 64, "bf16", (12345, 7000)),
    "paper-centred": (replace(PAPER, hash_centre=1), 3, (2, 1), (12000, 12000), 64, "bf16", (12000, 9111, 17)),
    "paper-centred-non-causal": (replace(PAPER, causal=0, hash_centre=1, num_projections=12), 1, (4, 2), (12345, 12345), 128, "fp16"),
    "paper-large-node": (replace(PAPER, causal=0), 1, (2, 1), (500, 140_000), 64, "bf16"),
    "paper-large-node-two-digits": (replace(PAPER, causal=0, num_projections=12, num_blocks=3), 1, (1, 1), (500, 140_000), 64, "bf16"),
    "paper-fp32": (PAPER, 1, (2, 1), (9001, 9001), 64, "fp32"),
    "paper-value-size": (PAPER, 1, (2, 1), (9001, 9001), 72, "bf16", None, 200),
    "paper-small-local": (replace(PAPER, local_size=256, block_size=64, num_blocks=4), 1, (2, 1), (9001, 9001), 64, "bf16"),
    "paper-many-blocks": (replace(PAPER, num_blocks=64, sample_size=4096, stratified=1), 1, (1, 1), (9001, 9001), 64, "bf16"),
    "paper-no-samples": (replace(PAPER, sample_size=0), 1, (2, 1), (9001, 9001), 64, "bf16"),
    "paper-only-local": (replace(PAPER, sample_size=0, num_blocks=0), 1, (2, 1), (9001, 9001), 64, "bf16"),
    "exact-fp32": (BLOCKS.exact(), 1, (2, 1), (3000, 3000), 128, "fp32"),
    "exact-d256": (BLOCKS.exact(), 1, (2, 1), (3000, 3000), 256, "bf16"),
    "decode-exact": (BLOCKS, 2, (8, 2), (1, 30_000), 128, "bf16", (30_000, 17)),
}


def assert_matches(x: Inputs, c: Config, o: torch.Tensor, lse: torch.Tensor, plan: Plan) -> None:
    wanted = reference.attention(x.q.double(), x.k.double(), x.v.double(), c, x.lengths, plan)
    twin = reference.attention(x.q, x.k, x.v, c, x.lengths, plan, x.q.dtype)
    assert_within_twin(o, wanted.o, twin.o, "o")
    assert_within_twin(lse, wanted.lse, twin.lse, "lse")


@pytest.mark.parametrize("name", LONG)
def test_long(library: Library, name: str) -> None:
    c, *shape = LONG[name]
    x = random_inputs(c, *shape)
    plan = make_plan(x.q, x.k, x.geometry, x.lengths)
    stages = Stages(library, x, c)
    assert_equal_bits(stages.select(), plan.selection, "selection")
    index, weight = stages.samples()
    assert_equal_bits(index, plan.sample_index, "sample index")
    assert_equal_bits(weight, plan.sample_weight, "sample weight")
    o, lse = stages.forward()
    assert_matches(x, c, o, lse, plan)


# --- what may not matter ---------------------------------------------------------------------------------------------

REPEATED = {
    "two-levels": (BLOCKS, 2, (4, 2), (9001, 9001), 64, "bf16", (9001, 8700)),
    "exact": (BLOCKS, 1, (4, 2), (3000, 3000), 128, "fp16"),
    "paper": (PAPER, 2, (4, 2), (9001, 9001), 64, "bf16", (9001, 8700)),
    "paper-two-digits": (replace(PAPER, num_projections=11), 1, (4, 2), (9001, 9001), 128, "fp16"),
    "paper-fp32": (PAPER, 1, (2, 1), (9001, 9001), 64, "fp32"),
    "paper-d128": (PAPER, 2, (2, 1), (9001, 9001), 128, "bf16", (9001, 8700)),
}


@pytest.mark.parametrize("name", REPEATED)
def test_runs_and_streams_give_the_same_bits(library: Library, name: str) -> None:
    c, *shape = REPEATED[name]
    x = random_inputs(c, *shape)
    first = library.forward(x.q, x.k, x.v, c, x.lengths)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams * 3:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(library.forward(x.q, x.k, x.v, c, x.lengths))
    torch.cuda.synchronize()
    for result in results:
        for mine, wanted in zip(result, first, strict=True):
            assert_equal_bits(mine, wanted, "output")


@pytest.mark.parametrize("name", REPEATED)
def test_a_captured_graph_replays_on_new_inputs(library: Library, name: str) -> None:
    c, *shape = REPEATED[name]
    x = random_inputs(c, *shape)
    library.forward(x.q, x.k, x.v, c, x.lengths)  # first use outside the capture, as every CUDA library wants
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = library.forward(x.q, x.k, x.v, c, x.lengths)
    for q, k, v in ((x.q.clone(), x.k.clone(), x.v.clone()), (x.q.flip(2), x.k.flip(2), x.v.flip(2))):
        wanted = library.forward(q, k, v, c, x.lengths)
        for target, source in ((x.q, q), (x.k, k), (x.v, v)):
            target.copy_(source)
        for output in (o, lse):
            output.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_equal_bits(o, wanted[0], "o")
        assert_equal_bits(lse, wanted[1], "lse")


def test_lengths_are_read_on_the_device(library: Library) -> None:
    """A length that a kernel before ours writes is the one that counts."""
    c = BLOCKS
    x = random_inputs(c, 1, (2, 1), (5000, 5000), 64, "bf16", (5000,))
    assert x.lengths is not None
    wanted = library.forward(x.q, x.k, x.v, c, torch.tensor([4500], dtype=torch.int32, device="cuda"))
    torch.cuda._sleep(50_000_000)
    x.lengths.fill_(4500)
    found = library.forward(x.q, x.k, x.v, c, x.lengths)
    for mine, theirs in zip(found, wanted, strict=True):
        assert_equal_bits(mine, theirs, "output")


@pytest.mark.parametrize("c", [BLOCKS, PAPER], ids=["blocks", "paper"])
def test_batch_rows_do_not_meet(library: Library, c: Config) -> None:
    """A row's result does not depend on its place in the batch (rule 10)."""
    x = random_inputs(c, 3, (2, 1), (4500, 4500), 64, "bf16")
    together = library.forward(x.q, x.k, x.v, c)
    for b in range(3):
        alone = library.forward(x.q[b : b + 1], x.k[b : b + 1], x.v[b : b + 1], c)
        for mine, wanted in zip(alone, together, strict=True):
            assert_equal_bits(mine, wanted[b : b + 1], f"row {b}")


@pytest.mark.parametrize("dim, dtype", [(64, "bf16"), (40, "fp32"), (200, "fp16")])
def test_the_torch_op_runs_the_kernels(library: Library, dim: int, dtype: str) -> None:
    x = random_inputs(BLOCKS, 1, (4, 2), (4500, 4500), dim, dtype, (4400,))
    for mine, wanted in zip(op.attention(x.q, x.k, x.v, BLOCKS, x.lengths), library.forward(x.q, x.k, x.v, BLOCKS, x.lengths), strict=True):
        assert_equal_bits(mine, wanted, "output")


def test_the_torch_op_runs_the_reference_where_there_is_no_kernel() -> None:
    x = random_inputs(BLOCKS, 1, (2, 1), (4500, 4500), 20, "fp16")
    wanted = reference.attention(x.q, x.k, x.v, BLOCKS)
    for mine, theirs in zip(op.attention(x.q, x.k, x.v, BLOCKS), wanted[:2], strict=True):
        assert_equal_bits(mine, theirs, "output")


@pytest.fixture(scope="module")
def enormous() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V of more than 2^31 elements each."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    q, k, v = (torch.randn(8, 32, 70_000, 128, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert q.numel() > 2**31
    return q, k, v


@pytest.mark.parametrize("c", [BLOCKS.exact(), BLOCKS, PAPER], ids=["exact", "blocks", "paper"])
def test_offsets_past_32_bits(library: Library, enormous: tuple[torch.Tensor, torch.Tensor, torch.Tensor], c: Config) -> None:
    """The last row of the batch is the same as alone, where offsets are small."""
    q, k, v = enormous
    o, lse = library.forward(q, k, v, c)
    q, k, v = (x[-1:].clone() for x in enormous)
    alone = library.forward(q, k, v, c)
    assert_equal_bits(o[-1:], alone[0], "o")
    assert_equal_bits(lse[-1:], alone[1], "lse")
    if c == BLOCKS.exact():  # and the last head's last rows are right
        q, k, v = q[:, -1:, -50:], k[:, -1:], v[:, -1:]
        wanted, twin = reference.attention(q.double(), k.double(), v.double(), c), reference.attention(q, k, v, c, arithmetic=q.dtype)
        assert_within_twin(o[-1:, -1:, -50:], wanted.o, twin.o, "o")
        assert_within_twin(lse[-1:, -1:, -50:], wanted.lse, twin.lse, "lse")


@pytest.mark.parametrize("c", [config(), sorted_config()], ids=["blocks", "sortlsh"])
@pytest.mark.parametrize("shape", [(0, 2, 70, 80), (1, 2, 0, 80), (1, 2, 70, 0), (2, 2, 3, 0)], ids=str)
def test_empty_problems(library: Library, shape: tuple[int, int, int, int], c: Config) -> None:
    b, h, sq, sk = shape
    q, k = (torch.randn(b, h, rows, 64, device="cuda", dtype=torch.bfloat16) for rows in (sq, sk))
    o, lse = library.forward(q, k, k, c)
    assert o.shape == q.shape and lse.shape == q.shape[:3]
    if sk == 0:
        assert bool((o == 0).all()) and bool((lse == -torch.inf).all())


def test_workspace_too_small_is_refused(library: Library) -> None:
    from ctypes import byref

    from hyperattention.native import _Call

    x = random_inputs(BLOCKS, 1, (2, 1), (4500, 4500), 64, "bf16")
    call = _Call(library, x.q, x.k, x.v, BLOCKS, None)
    o = torch.empty_like(x.q)
    call.params.out = o.data_ptr()
    call.params.workspace, call.params.workspace_size = o.data_ptr(), call.workspace_size() - 1
    with pytest.raises(UsageError, match="ha_cuda_workspace_size asks for"):
        library.check(library._forward, byref(call.params))


# --- for compute-sanitizer -------------------------------------------------------------------------------------------

_SMALL = replace(BLOCKS, exact_below=0, local_size=128, sample_size=70, num_blocks=3, sinks=70)
_SORTED = replace(PAPER, exact_below=0, local_size=128, sample_size=70, block_size=48, num_blocks=2)
SANITIZED = [
    Problem(Case("approximate", 150, 600, _SMALL, (2, 1), (64, 64), (600, 431)), "bf16"),
    Problem(Case("approximate", 150, 600, _SMALL, (1, 1), (128, 128)), "fp16"),
    Problem(Case("approximate", 150, 600, _SMALL, (1, 1), (40, 72)), "fp32"),
    Problem(Case("block48", 97, 256, config(block_size=48, pool_size=3, local_size=48), (1, 1), (256, 256)), "fp16"),
    Problem(Case("sorted", 200, 600, _SORTED, (2, 1), (64, 64), (600, 431)), "bf16"),
    Problem(Case("sorted", 200, 600, replace(_SORTED, num_projections=12, local_overlap=1), (1, 1), (96, 32)), "fp16"),
    Problem(Case("sorted-non-causal", 200, 600, replace(_SORTED, causal=0), (1, 1), (128, 256)), "fp32"),
    Problem(Case("sorted-tall", 450, 600, replace(_SORTED, block_size=64), (2, 1), (64, 64), (600, 431)), "bf16"),
    Problem(Case("sorted-non-causal", 300, 600, replace(_SORTED, block_size=256, causal=0), (1, 1), (64, 64)), "fp16"),
    Problem(Case("sorted-gathered", 200, 600, replace(_SORTED, block_size=64, local_overlap=1), (2, 1), (128, 128), (600, 431)), "bf16"),
    Problem(Case("sorted-resampled", 280, 1300, replace(_SORTED, block_size=256, causal=0, sample_size=1100), (1, 1), (128, 128)), "bf16"),
    # More batches of steps than are held, so that descriptions are replaced: each kind of tile that the Hopper kernels plan.
    Problem(Case("sorted-resampled", 280, 1300, replace(_SORTED, block_size=256, causal=0, sample_size=1100), (1, 1), (64, 64)), "fp16"),
    Problem(Case("resampled", 400, 1600, replace(_SMALL, sample_size=1100, num_blocks=9), (2, 1), (64, 64), (1600, 1431)), "bf16"),
    Problem(Case("resampled", 400, 1600, replace(_SMALL, sample_size=1100, num_blocks=9), (1, 1), (128, 128)), "bf16"),
    Problem(Case("resampled-non-causal", 300, 1300, replace(_SMALL, causal=0, sample_size=1100), (1, 1), (64, 64)), "bf16"),
    Problem(Case("exact", 200, 390, Config().exact(), (2, 1), (64, 64), (390, 77)), "bf16"),
    Problem(Case("exact", 130, 190, Config().exact(), (2, 1), (128, 128), (190, 77)), "bf16"),
    Problem(Case("exact", 70, 131, Config().exact(), (1, 1), (8, 200)), "fp32"),
    Problem(Case("two-levels", 66, 9001, config(block_size=64, local_size=64), (1, 1), (64, 64), (8999, 500)), "bf16"),
    Problem(Case("approximate", 150, 600, _SMALL, (2, 1), (24, 32)), "fp16"),
    Problem(Case("sorted", 200, 600, _SORTED, (1, 1), (192, 136), (431,)), "bf16"),
]


@pytest.mark.parametrize("problem", SANITIZED, ids=str)
def test_sanitizer(library: Library, problem: Problem) -> None:
    check_plan(library, problem, "cuda")
    check_attention(library, problem, "cuda")


@pytest.mark.parametrize("problem", NO_ROWS, ids=str)
def test_sanitizer_of_plans_of_no_rows(library: Library, problem: Problem) -> None:
    check_plan_of_no_rows(library, problem, "cuda")
