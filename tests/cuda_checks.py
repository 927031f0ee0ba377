"""The CUDA kernels against the reference, stage by stage: the same checks on a GPU and on the emulated kernels."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace

import torch
from native import (
    KERNEL_CASES,
    SORTED_KERNEL_CASES,
    Inputs,
    Stages,
    assert_attention,
    assert_equal_bits,
    expected,
    expected_plan,
    expected_pools,
    inputs,
    pool_sizes,
)
from operator_cases import PLAN_ONLY, SORTED_PLAN_ONLY, Case, config, sorted_config
from random_cases import check_random_case

from hyperattention.config import PRESETS, Config
from hyperattention.library import load_cuda
from hyperattention.native import Library, _Call

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Problem:
    """An operator case in head sizes and a dtype that the CUDA kernels take."""

    case: Case
    dtype: str

    def __str__(self) -> str:
        return f"{self.case}-{self.dtype}"

    def inputs(self, device: str) -> Inputs:
        x = inputs(self.case, DTYPES[self.dtype])
        lengths = None if x.lengths is None else x.lengths.to(device)
        return replace(x, q=x.q.to(device), k=x.k.to(device), v=x.v.to(device), lengths=lengths)


def problems(cases: list[Case], dims: tuple[int, int], dtype: str) -> list[Problem]:
    """The cases in one pair of head sizes, each once."""
    return [Problem(case, dtype) for case in dict.fromkeys(replace(case, dims=dims) for case in cases)]


# Every rule in head sizes that fill their tiles and in one that does not.
_SIZES = (((64, 64), "bf16"), ((128, 128), "fp16"), ((40, 72), "fp32"))
PROBLEMS = [p for dims, dtype in _SIZES for p in problems(KERNEL_CASES + SORTED_KERNEL_CASES, dims, dtype)]
PLAN_PROBLEMS = [p for dims, dtype in _SIZES for p in problems(PLAN_ONLY + SORTED_PLAN_ONLY, dims, dtype)]

# Segments that are sorted by chunks (plugins/cuda/sort_config.h): of one chunk and of several, cut by lengths, sinks and the first row;
# lower levels that are not; both numbers of bins; overlap. Plans alone: attention meets no other shapes here.
_CHUNKS = [
    Case("chunks", 5001, 7003, sorted_config(local_size=2100), (2, 1), lengths=(7003, 4444)),
    Case("chunks-and-nodes", 4999, 4999, sorted_config(local_size=1000, local_overlap=1, sinks=300), (1, 1), lengths=(4990,)),
    Case("chunks-of-a-segment", 6000, 10001, sorted_config(local_size=4999, num_projections=8), (1, 1)),
    Case("chunks-overlap", 9001, 8301, sorted_config(local_size=4096, local_overlap=1, num_projections=5), (1, 1), lengths=(8300,)),
    Case("chunks-non-causal", 4100, 8200, sorted_config(causal=0, sinks=7, num_projections=8), (2, 1), lengths=(8200, 4090)),
    Case("chunks-square", 4200, 4200, sorted_config(causal=0), (1, 1), lengths=(4100,)),
    Case("chunks-ties", 5000, 5000, sorted_config(local_size=2500), (1, 1), fill="ties"),
]
CHUNK_PROBLEMS = [
    Problem(replace(case, dims=(8, 8)), dtype)
    for case, dtype in zip(_CHUNKS, ("bf16", "fp16", "fp32", "bf16", "fp16", "bf16", "fp16"), strict=True)
]

# Every kernel instance, and head sizes at, below and across their edges, in every dtype.
HEAD_SIZES = [(d, d) for d in (8, 32, 40, 64, 72, 96, 104, 128, 160, 192, 200, 256)] + [(192, 128), (64, 72), (8, 256), (256, 8)]
_BLOCKS = replace(PRESETS["blocks"], exact_below=0, local_size=128, sample_size=70, num_blocks=3, sinks=70)
_SORTED = replace(PRESETS["paper"], exact_below=0, local_size=128, sample_size=70, block_size=48, num_blocks=2, sinks=10)
HEAD_SIZE_CASES = [
    Case("head-size", 97, 300, _BLOCKS, lengths=(277,)),
    Case("head-size-sorted", 130, 300, _SORTED, lengths=(291,)),
    Case("head-size-exact", 70, 131, Config().exact(), lengths=(129,)),
]
HEAD_SIZE_PROBLEMS = [p for dims in HEAD_SIZES for dtype in DTYPES for p in problems(HEAD_SIZE_CASES, dims, dtype)]

# For plans that name no row of their nodes, on Hopper: nodes of several tiles, of one, and one that holds every row.
_SPARE = sorted_config(block_size=64, local_size=100, sample_size=70)
NO_ROWS = [
    Problem(Case("no-rows", 500, 500, _SPARE, (2, 1), (64, 64), (500, 211)), "bf16"),
    Problem(Case("no-rows-chunk", 150, 330, replace(_SPARE, local_size=256), (1, 1), (128, 128)), "fp16"),
    Problem(Case("no-rows-non-causal", 130, 300, replace(_SPARE, causal=0), (1, 1), (64, 64)), "bf16"),
]

PADDING = {
    "approximate": config(),
    "approximate-non-causal": config(causal=0),
    "sorted": sorted_config(),
    "sorted-overlap": sorted_config(local_overlap=1),
    "sorted-block64": sorted_config(block_size=64, local_size=64),
    "sorted-non-causal": sorted_config(causal=0),
    "exact": config(exact_below=4096),
    "exact-non-causal": config(exact_below=4096, causal=0),
}


def params(library: Library, c: Config, heads: tuple[int, int, int], rows: tuple[int, int], dims: tuple[int, int], dtype: str) -> _Call:
    """A call with B, Hq and Hkv, Sq and Sk, D and Dv, whose tensors are never read."""
    (batch, heads_q, heads_kv), (seq_q, seq_k), (size, size_v) = heads, rows, dims
    shapes = (heads_q, seq_q, size), (heads_kv, seq_k, size), (heads_kv, seq_k, size_v)
    return _Call(library, *(torch.empty(batch, *shape, dtype=DTYPES[dtype]) for shape in shapes), c, None)


def check_plan(library: Library, problem: Problem, device: str) -> None:
    """Pools (`blocks`), what the selector chose, and samples, bit for bit."""
    case, dtype = problem.case, DTYPES[problem.dtype]
    stages = Stages(library, problem.inputs(device), case.config)
    if case.config.selector == "blocks":
        for side in ("queries", "keys"):
            for rows in pool_sizes(case):
                found = stages.pool(side, rows)
                for name, mine, wanted in zip(("values", "factors"), found, expected_pools(case, dtype, side, rows), strict=True):
                    assert_equal_bits(mine.cpu(), wanted, f"{name} of {side} in pools of {rows}")
    plan = expected_plan(case, dtype)
    assert_equal_bits(stages.select().cpu(), plan.selection, "selection")
    index, weight = stages.samples()
    assert_equal_bits(index.cpu(), plan.sample_index, "sample index")
    assert_equal_bits(weight.cpu(), plan.sample_weight, "sample weight")


def check_attention(library: Library, problem: Problem, device: str) -> None:
    """O and LSE under the reference's plan within twice the naive twin's error; forward gives the same bits."""
    case = problem.case
    wanted = expected(case, DTYPES[problem.dtype])
    stages = Stages(library, problem.inputs(device), case.config)
    found = stages.attend(wanted.plan.selection.to(device))
    assert_attention(found, wanted)
    for name, mine, again in zip(("o", "lse"), found, stages.forward(), strict=True):
        assert_equal_bits(again, mine, f"{name} of forward")


def check_plan_of_no_rows(library: Library, problem: Problem, device: str) -> None:
    """A `sortlsh` plan whose entries are no row or key of their node is read as one of -1, which means none: all of it ends, inside its
    tensors, and rows that no node holds (without overlap those of the first local block) are what they are under their own plan."""
    case = problem.case
    stages = Stages(library, problem.inputs(device), case.config)
    plan = expected_plan(case, DTYPES[problem.dtype]).selection.to(device)
    foreign = torch.randint(max(case.seq_q, case.seq_k), 2**31 - 1, plan.shape, dtype=torch.int32).to(device)
    found, none, own = (stages.attend(p) for p in (foreign, torch.full_like(foreign, -1), plan))
    for name, mine, wanted in zip(("o", "lse"), found, none, strict=True):
        assert_equal_bits(mine, wanted, name)
    free = torch.arange(case.seq_q, device=device) + case.seq_k - case.seq_q < case.config.local_size * case.config.causal
    for name, mine, wanted in zip(("o", "lse"), found, own, strict=True):
        assert_equal_bits(mine[:, :, free], wanted[:, :, free], f"{name} of rows of no node")
        assert not torch.equal(mine, wanted), f"{name}: no node adds to it, whatever the plan names"


def check_padding(library: Library, c: Config, poison: float, device: str) -> None:
    """What lies past the lengths changes no bit of a live row."""
    case = Case("padding", 203, 203, c, (2, 1), (64, 64), (150, 203, 1))
    clean = Problem(case, "bf16").inputs(device)
    q, k, v = clean.q.clone(), clean.k.clone(), clean.v.clone()
    live = (torch.arange(case.seq_k) < torch.tensor(case.lengths)[:, None]).to(device)
    for x in (q, k, v):
        x.transpose(1, 2)[~live] = poison
    dirty = replace(clean, q=q, k=k, v=v)
    found, wanted = (Stages(library, x, case.config).forward() for x in (dirty, clean))
    for name, mine, theirs in zip(("o", "lse"), found, wanted, strict=True):
        assert_equal_bits(mine.transpose(1, 2)[live], theirs.transpose(1, 2)[live], name)


def check_without_lse(library: Library, problem: Problem, device: str) -> None:
    """A caller that wants no LSE gets the same O (with `sortlsh` rows' sums then lie in the workspace)."""
    case = problem.case
    stages = Stages(library, problem.inputs(device), case.config)
    assert_equal_bits(stages.forward_without_lse(), stages.forward()[0], "o")


def random_failure(seed: int) -> str:
    """What is wrong with one random problem on the GPU; empty when nothing. For worker processes."""
    torch.set_num_threads(1)
    try:
        check_random_case(load_cuda(), seed, "cuda")
    except Exception:
        return traceback.format_exc()
    return ""
