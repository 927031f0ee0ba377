"""Operator problems for the tests: each Case names itself and makes its own inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperattention.config import INT32_MAX, PRESETS, Config

BASE = Config(block_size=16, num_blocks=3, pool_size=4, sample_size=13, local_size=32, sinks=10, exact_below=0, seed=7)
SORTED = replace(BASE, selector="sortlsh", num_blocks=2, local_size=20, sinks=3, local_overlap=0)


def config(**changes) -> Config:
    return replace(BASE, **changes)


def sorted_config(**changes) -> Config:
    return replace(SORTED, **changes)


@dataclass(frozen=True)
class Case:
    """One problem; its inputs follow from shape, `fill` (one of FILLS) and `seed` alone, in float64."""

    name: str
    seq_q: int = 203
    seq_k: int = 203
    config: Config = BASE
    heads: tuple[int, int] = (2, 1)  # queries, keys
    dims: tuple[int, int] = (8, 8)  # D, Dv
    lengths: tuple[int, ...] | None = None
    fill: str = "normal"
    seed: int = 0  # of the inputs

    def __str__(self) -> str:
        heads, dims = "x".join(map(str, self.heads)), "x".join(map(str, self.dims))
        return f"{self.name}-q{self.seq_q}-k{self.seq_k}-h{heads}-d{dims}"

    @property
    def batch(self) -> int:
        return len(self.lengths) if self.lengths else 1

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        rng = torch.Generator().manual_seed(self.seq_q * 1009 + self.seq_k + self.seed * 1_000_003)
        q = torch.randn(self.batch, self.heads[0], self.seq_q, self.dims[0], generator=rng, dtype=torch.float64)
        k = torch.randn(self.batch, self.heads[1], self.seq_k, self.dims[0], generator=rng, dtype=torch.float64)
        v = torch.randn(self.batch, self.heads[1], self.seq_k, self.dims[1], generator=rng, dtype=torch.float64)
        FILLS[self.fill](self, q, k, v, rng)
        return q, k, v

    def lengths_tensor(self) -> Tensor | None:
        return torch.tensor(self.lengths, dtype=torch.int32) if self.lengths else None


# What becomes of normal Q, K, V, in place: fill(case, q, k, v, generator of random numbers).
Fill = Callable[[Case, Tensor, Tensor, Tensor, torch.Generator], object]


def overflow(case: Case, q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> None:
    """Finite rows whose fp32 sum is not."""
    k[:, :, 40:90] = k[:, :, 40:90].sign() * 3e38


def cancelling(case: Case, q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> None:
    """The sum of a pool depends on its order."""
    for x in (q, k):
        x[:, :, 1::4] += 3e7
        x[:, :, 2::4] -= 3e7


def nonfinite(case: Case, q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> None:
    k[:, :, 16:35, 0] = float("nan")  # all of key block 1 and a pool of block 2
    k[:, :, 60, 1], k[:, :, 101, 2], k[:, :, 128:160] = float("inf"), -float("inf"), float("nan")
    q[:, :, 70, 3], q[:, :, 176:192] = float("nan"), float("inf")  # a pool, and all of query block 11


def scattered(case: Case, q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> None:
    """A few rows that are not finite, anywhere."""
    for x in (q, k):
        for value in (float("nan"), float("inf"), -float("inf")):
            x[torch.rand(x.shape, generator=rng) < 0.02 / max(1, case.dims[0])] = value


def hill(case: Case, q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> None:
    """In every other row, keys in the middle exceed those on both sides by 30: their powers relative to the others leave fp16."""
    q[..., 0] = 0
    q[:, :, ::2, 0] = 8
    k[:, :, _middle(case), 0] += 30 / (8 * case.config.resolved_scale(case.dims[0]))


def high_hill(case: Case, q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> None:
    """The same with values by which such powers leave bf16's and fp32's range, too."""
    hill(case, q, k, v, rng)
    v *= 1e30


def island(case: Case, q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> None:
    """Keys in the middle alone have any weight: logits on both sides are minus infinity."""
    q[..., 0] = q[..., 0].abs() + 1
    shore = torch.ones(case.seq_k, dtype=torch.bool)
    shore[_middle(case)] = False
    k[:, :, shore, 0] = -float("inf")


def _middle(case: Case) -> slice:
    return slice(case.seq_k * 2 // 5, case.seq_k * 3 // 5)


def padding(case: Case, q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> None:
    """Nothing may come from behind the lengths."""
    for b, length in enumerate(case.lengths or ()):
        k[b, :, max(0, length) :], v[b, :, max(0, length) :] = float("nan"), float("inf")


FILLS: dict[str, Fill] = {
    "normal": lambda case, q, k, v, rng: None,
    "constant": lambda case, q, k, v, rng: k.fill_(1.0),
    "zero": lambda case, q, k, v, rng: (q.zero_(), k.zero_()),
    "large": lambda case, q, k, v, rng: (q.mul_(30), k.mul_(30)),
    "ties": lambda case, q, k, v, rng: (q.sign_(), k.sign_()),
    "shared-mean": lambda case, q, k, v, rng: k.add_(3),  # angles between keys say little, those from their mean do
    "tiny": lambda case, q, k, v, rng: k.mul_(1e-43),  # pool means are fp32 subnormals
    "opposed": lambda case, q, k, v, rng: (q.abs_(), k.abs_().neg_()),  # every score is below zero
    "opposed-tiny": lambda case, q, k, v, rng: (q.abs_(), k.abs_().mul_(-1e-43)),  # a negative subnormal
    "first-row": lambda case, q, k, v, rng: q[:, :, 0, 0].fill_(float("nan")),
    "overflow": overflow,
    "cancelling": cancelling,
    "nonfinite": nonfinite,
    "scattered": scattered,
    "padding": padding,
    "hill": hill,
    "high-hill": high_hill,
    "island": island,
}


def grid() -> list[Case]:
    """Every rule at sizes that are odd, short or no multiple of anything."""
    cases = [
        Case("square"),
        Case("chunk", 65, 203),
        Case("chunk-whole-local", 97, 256, config(local_size=48, block_size=48)),
        Case("more-queries", 203, 65),
        Case("more-queries-one-key", 70, 1),
        Case("no-key", 66, 0),
        Case("no-query", 0, 70),
        Case("non-causal", 203, 203, config(causal=0)),
        Case("non-causal-more-keys", 65, 301, config(causal=0)),
        Case("non-causal-more-queries", 301, 65, config(causal=0)),
        Case("non-causal-local-ignored", 99, 203, config(causal=0, local_size=17)),
        Case("gqa-4-4", heads=(4, 4)),
        Case("gqa-4-2", heads=(4, 2)),
        Case("gqa-6-1-chunk", 77, 150, heads=(6, 1)),
        Case("value-size", dims=(8, 3)),
        Case("value-size-larger", dims=(5, 24)),
        Case("dim-1", dims=(1, 1)),
        Case("scale", config=config(scale=0.9)),
        Case("seed-largest", config=config(seed=INT32_MAX)),
        Case("large-logits", fill="large"),
        Case("exact-short", 5, 203),
        Case("exact-64-rows", 64, 203),
        Case("exact-one-row", 1, 77),
        Case("exact-below", config=config(exact_below=203)),
        Case("just-above-exact-below", config=config(exact_below=202)),
        Case("exact-more-queries", 130, 60, config(exact_below=100)),
        Case("exact-non-causal", 50, 90, config(causal=0), lengths=(0, 33, 90)),
        Case("presets-parts", 401, 401, replace(PRESETS["blocks"], exact_below=0, local_size=64, sample_size=17, num_blocks=2)),
    ]
    ragged = (0, 1, 37, 64, 150, 199, 203, 999)
    variants = {"causal": {}, "non-causal": {"causal": 0}, "no-overlap": {"local_overlap": 0}, "uniform": {"stratified": 0}}
    for name, changes in variants.items():
        cases.append(Case(f"lengths-{name}", config=config(**changes), lengths=ragged, heads=(1, 1)))
        cases.append(Case(f"lengths-{name}-chunk", 70, 203, config(**changes), lengths=ragged, heads=(1, 1)))
        cases.append(Case(f"lengths-{name}-more-queries", 203, 90, config(**changes), lengths=(0, 1, 20, 90, 91), heads=(1, 1)))
    for block, pool, local in ((16, 16, 16), (16, 1, 48), (48, 1, 48), (48, 16, 96), (48, 3, 96), (64, 4, 64), (64, 64, 128), (17, 17, 34)):
        for causal in (0, 1):
            changes = dict(causal=causal, block_size=block, pool_size=pool, local_size=local)
            cases.append(Case(f"block{block}-pool{pool}-local{local}-causal{causal}", 259, 259, config(**changes)))
    for blocks in (0, 1, 64):
        cases += [Case(f"blocks{blocks}-causal{causal}", config=config(num_blocks=blocks, causal=causal)) for causal in (0, 1)]
    for samples in (0, 1, 7, 500):
        for stratified in (0, 1):
            cases.append(Case(f"samples{samples}-stratified{stratified}", config=config(sample_size=samples, stratified=stratified)))
    for sinks in (0, 1, 16, 17, 50, 203, 4096):
        cases += [Case(f"sinks{sinks}-causal{causal}", config=config(sinks=sinks, causal=causal)) for causal in (0, 1)]
    for overlap in (0, 1):
        cases.append(Case(f"overlap{overlap}-sinks90", config=config(sinks=90, local_overlap=overlap)))
    strict = config(strict_causal=1)
    cases += [
        Case("strict", config=strict, heads=(4, 2)),
        Case("strict-chunk", 70, 203, strict, lengths=(203, 137, 133, 40)),
        Case("strict-chunk-one-row-of-a-block", 65, 208, strict),
        Case("strict-chunk-whole-block", 67, 195, strict),
        Case("strict-more-queries", 203, 90, strict, lengths=(0, 1, 20, 90)),
        Case("strict-exact", 64, 203, strict),
        Case("strict-no-query", 0, 70, strict),
        *(
            Case(f"strict-block{block}-pool{pool}", 130, 259, replace(strict, block_size=block, pool_size=pool, local_size=local))
            for block, pool, local in ((16, 16, 16), (17, 17, 34), (48, 1, 48), (48, 3, 96), (64, 64, 64), (128, 32, 128))
        ),
    ]
    cases.append(Case("only-sinks", config=config(causal=0, num_blocks=0, sample_size=0)))
    cases.append(Case("nothing", config=config(causal=0, num_blocks=0, sample_size=0, sinks=0)))
    cases += [Case(fill, fill=fill) for fill in ("constant", "zero", "ties", "tiny")]
    # Rule 23, two levels: more than 32 superblocks of 256.
    long = config(block_size=64, local_size=64, num_blocks=5)
    cases += [
        Case("two-levels", 80, 9001, long, lengths=(9001, 8999, 6000)),
        Case("two-levels-non-causal", 70, 8500, replace(long, causal=0, sinks=300), dims=(3, 2)),
        Case("two-levels-block16", 70, 8600, replace(long, block_size=16, pool_size=2), heads=(2, 2), dims=(4, 4)),
        Case("two-levels-block128", 70, 9000, replace(long, block_size=128, local_size=128, sinks=130, num_blocks=64), dims=(4, 4)),
        Case("two-levels-block256", 70, 9500, replace(long, block_size=256, local_size=256, num_blocks=64), dims=(4, 4)),
        Case("two-levels-strict", 100, 9031, replace(long, strict_causal=1), lengths=(9031, 8990, 500)),
        Case("two-levels-strict-block16", 90, 8600, replace(long, block_size=16, pool_size=2, strict_causal=1), dims=(4, 4)),
        Case("two-levels-strict-block256", 300, 9500, replace(long, block_size=256, local_size=256, strict_causal=1), dims=(4, 4)),
        Case("two-levels-ties", 70, 9001, long, dims=(2, 2), fill="ties"),
        Case("two-levels-share", 66, 70001, long, heads=(1, 1), dims=(4, 4)),
        Case("flat-above-32-superblocks", 70, 9001, replace(long, block_size=48, local_size=48), dims=(4, 4)),
    ]
    return cases


def sorted_grid() -> list[Case]:
    """Selector `sortlsh`: trees that end anywhere, nodes that lengths, sinks and chunks cut."""
    ragged = (0, 1, 19, 37, 64, 150, 203, 999)
    cases = [
        Case("sorted", config=SORTED, heads=(4, 2)),
        Case("sorted-halving", 256, 256, sorted_config(local_size=32, sinks=0)),
        Case("sorted-overlap", config=sorted_config(local_overlap=1), heads=(3, 1)),
        Case("sorted-chunk", 70, 203, SORTED, heads=(2, 2)),
        Case("sorted-chunk-overlap", 70, 203, sorted_config(local_overlap=1)),
        Case("sorted-more-queries", 203, 65, SORTED),
        Case("sorted-one-key", 70, 1, SORTED),
        Case("sorted-no-key", 66, 0, SORTED),
        Case("sorted-no-query", 0, 70, SORTED),
        Case("sorted-exact", 64, 203, SORTED),
        Case("sorted-one-local", 150, 150, sorted_config(local_size=150)),
        Case("sorted-one-key-node", 151, 151, sorted_config(local_size=150, sinks=149)),
        Case("sorted-non-causal", config=sorted_config(causal=0), heads=(4, 2)),
        Case("sorted-non-causal-more-keys", 65, 301, sorted_config(causal=0)),
        Case("sorted-non-causal-more-queries", 301, 65, sorted_config(causal=0)),
        Case("sorted-value-size", config=SORTED, dims=(5, 24)),
        Case("sorted-value-size-smaller", config=SORTED, dims=(20, 3)),
        Case("sorted-dim-1", config=SORTED, dims=(1, 1)),
        Case("sorted-seed-largest", config=sorted_config(seed=INT32_MAX)),
        Case("sorted-pool-size-ignored", config=sorted_config(pool_size=7)),
        Case("sorted-large-logits", config=SORTED, fill="large"),
        Case("sorted-paper", 401, 401, replace(PRESETS["paper"], exact_below=0, local_size=64, sample_size=17, block_size=16)),
        Case("sorted-paper-short-nodes", 401, 401, replace(PRESETS["paper"], exact_below=0, local_size=64, sample_size=9)),
        Case("sorted-few-samples", 300, 300, sorted_config(causal=0, num_blocks=0, sample_size=5)),
    ]
    variants = {"causal": {}, "non-causal": {"causal": 0}, "overlap": {"local_overlap": 1}, "uniform": {"stratified": 0}}
    for name, changes in variants.items():
        c = sorted_config(**changes)
        cases.append(Case(f"sorted-lengths-{name}", 203, 203, c, (1, 1), lengths=ragged))
        cases.append(Case(f"sorted-lengths-{name}-chunk", 70, 203, c, (2, 1), lengths=(0, 139, 150, 203)))
        cases.append(Case(f"sorted-lengths-{name}-more-queries", 203, 90, c, (1, 1), lengths=(0, 1, 20, 89)))
    for block, local in ((17, 16), (16, 65), (31, 31), (48, 20), (33, 100)):
        cases.append(Case(f"sorted-block{block}-local{local}", 259, 259, sorted_config(block_size=block, local_size=local)))
        cases.append(Case(f"sorted-block{block}-non-causal", 129, 259, sorted_config(block_size=block, causal=0)))
    for blocks in (0, 1, 5, 64):
        for causal in (0, 1):
            cases.append(Case(f"sorted-blocks{blocks}-causal{causal}", config=sorted_config(num_blocks=blocks, causal=causal)))
    for samples in (0, 1, 7, 500):
        for flag in (0, 1):
            cases.append(Case(f"sorted-samples{samples}-stratified{flag}", config=sorted_config(sample_size=samples, stratified=flag)))
    for sinks in (0, 33, 203):
        cases += [Case(f"sorted-sinks{sinks}-causal{causal}", config=sorted_config(sinks=sinks, causal=causal)) for causal in (0, 1)]
    centred = sorted_config(hash_centre=1)
    cases += [
        Case("centred", config=centred, heads=(4, 2), lengths=(203, 137, 133, 40, 2, 0)),
        Case("centred-chunk", 70, 203, centred, lengths=(203, 140, 133)),
        Case("centred-more-queries", 203, 65, replace(centred, causal=0)),
        Case("centred-parts", 66, 1057, replace(centred, causal=0), dims=(4, 4)),
        Case("centred-one-key", 70, 1, centred),
        Case("centred-shared-mean", config=replace(centred, num_projections=12), fill="shared-mean"),
    ]
    cases += [Case(f"sorted-projections{r}", config=sorted_config(num_projections=r)) for r in (1, 9, 16)]
    cases += [Case(f"sorted-{fill}", config=SORTED, fill=fill) for fill in ("constant", "zero", "ties", "tiny")]
    return cases


CASES = grid()
SORTED_CASES = sorted_grid()
# Keys that poison the rows that see them or swamp their logits: only the plan has an expected value.
PLAN_ONLY = [
    Case("nonfinite", fill="nonfinite"),
    Case("nonfinite-non-causal", config=config(causal=0), fill="nonfinite"),
    Case("overflow", fill="overflow"),
    Case("opposed", fill="opposed"),
    Case("strict-nonfinite", config=config(strict_causal=1), fill="nonfinite"),
    Case("strict-first-row", 133, 203, config(strict_causal=1), fill="first-row"),
    Case("opposed-tiny", fill="opposed-tiny"),
    Case("cancelling", fill="cancelling"),
    Case("cancelling-pool16", config=config(pool_size=16, causal=0), fill="cancelling"),
    Case("two-levels-square", 8700, 8700, config(block_size=64, local_size=64), heads=(1, 1), dims=(2, 2)),
]
SORTED_PLAN_ONLY = [
    Case("sorted-nonfinite", config=SORTED, fill="nonfinite"),
    Case("sorted-nonfinite-non-causal", config=sorted_config(causal=0), fill="nonfinite"),
    Case("sorted-overflow", config=SORTED, fill="overflow"),
    Case("centred-nonfinite", config=sorted_config(hash_centre=1), fill="nonfinite"),
    Case("centred-overflow", config=sorted_config(hash_centre=1), fill="overflow"),
    Case("centred-cancelling", config=sorted_config(hash_centre=1), fill="cancelling", dims=(33, 4)),
    Case("centred-constant", config=sorted_config(hash_centre=1, causal=0), fill="constant"),
    Case("centred-distances", 70, 4777, sorted_config(hash_centre=1, causal=0), heads=(2, 1), dims=(6, 4), lengths=(4777, 4133)),
    Case("sorted-cancelling", config=SORTED, fill="cancelling", dims=(33, 4)),
]
LOW = [(case, dtype) for case in (CASES[0], CASES[1], SORTED_CASES[0]) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
