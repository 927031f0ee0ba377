"""Random problems: any shapes and attributes that the operator takes, each a function of one seed.

`python tests/test_random.py --seed N` runs one again.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import oracle
import torch
from native import Inputs, Stages, assert_equal_bits
from operator_cases import Case
from torch import Tensor

from hyperattention.config import INT32_MAX, Config
from hyperattention.geometry import Geometry
from hyperattention.native import Library

FILLS = ("normal",) * 6 + ("padding", "padding", "large", "ties", "constant", "zero", "tiny", "scattered")
EPS32 = 2.0**-23


class _Draw(random.Random):
    """Numbers as tests want them: edges often, small ones more often than large ones."""

    def chance(self, share: float) -> bool:
        return self.random() < share

    def within(self, low: int, high: int) -> int:
        """An integer in [low, high]: an end, next to a power of two, or log-uniform."""
        kind = self.random()
        if kind < 0.15:
            return self.choice((low, high))
        value = round(2 ** self.uniform(math.log2(max(low, 1)), math.log2(max(high, 1))))
        if kind < 0.4:
            value = (1 << value.bit_length() >> 1) + self.choice((-1, 0, 1))
        return min(max(value, low), high)


def _shape(draw: _Draw) -> tuple[int, int]:
    """Sq and Sk."""
    rows = draw.randint(65, 270)
    kind = draw.random()
    if kind < 0.4:
        return rows, rows
    if kind < 0.65:
        return rows, rows + draw.within(1, 200)
    if kind < 0.85:
        return rows, draw.within(0, rows)
    if kind < 0.985:
        return draw.within(0, 64), draw.within(0, 200)
    return draw.randint(65, 80), draw.randint(8400, 9000)  # two levels of the selector `blocks`


def _head_sizes(draw: _Draw, cuda: bool) -> tuple[int, int]:
    """D and Dv."""
    first, second = (8 * draw.within(1, 32) if cuda else draw.within(1, 256 if draw.chance(0.1) else 40) for _ in range(2))
    return first, first if draw.chance(0.5) else second


def _config(draw: _Draw, selector: str, seq_k: int) -> Config:
    block = draw.choice((16, 17, 32, 48, 64, 128, draw.randint(16, 80), draw.within(16, 256)))
    causal = int(draw.chance(0.6))
    sorts = selector == "sortlsh"
    pool = draw.within(1, 256) if sorts else draw.choice([p for p in range(1, block + 1) if block % p == 0])
    local = draw.within(16, 65536) if draw.chance(0.05) else draw.within(16, 128)
    if causal and not sorts:
        local = block * max(1, local // block)
    return Config(
        causal=causal,
        scale=0.0 if draw.chance(0.7) else 2 ** draw.uniform(-6, 1),
        selector=selector,
        block_size=block,
        num_blocks=draw.choice((0, 1, 2, 3, 64, draw.within(0, 8))),
        pool_size=pool,
        sample_size=draw.within(0, 4096 if draw.chance(0.01) else 100),
        stratified=draw.randint(0, 1),
        local_size=local,
        local_overlap=draw.randint(0, 1),
        sinks=0 if draw.chance(0.3) else draw.within(0, 4096) if draw.chance(0.1) else draw.within(0, 60),
        exact_below=draw.choice((seq_k, max(0, seq_k - 1), 4096, INT32_MAX)) if draw.chance(0.1) else 0,
        num_projections=draw.randint(1, 16),
        seed=draw.choice((0, INT32_MAX)) if draw.chance(0.1) else draw.randint(0, INT32_MAX),
    )


def random_case(seed: int, head_sizes: str = "any") -> Case:
    """The problem of `seed`; head_sizes "cuda": multiples of 8 up to 256, else any, mostly small."""
    draw = _Draw(seed)
    seq_q, seq_k = _shape(draw)
    small = max(seq_q, seq_k) < 1000
    heads_kv = draw.randint(1, 3) if small else 1
    lengths = None
    if draw.chance(0.5):
        batch = draw.randint(1, 3) if small else 1
        kinds = ((0, seq_k), (seq_k // 2, seq_k), (seq_k, seq_k), (-1, 2))
        lengths = tuple(draw.randint(*draw.choice(kinds)) for _ in range(batch))
    c = _config(draw, draw.choice(("blocks", "sortlsh")), seq_k)
    if c.causal and c.selector == "blocks" and seed % 3 == 0:
        c = replace(c, strict_causal=1)
    if seed % 5 < 2:
        c = replace(c, hash_centre=1)
    return Case(
        f"random{seed}",
        seq_q,
        seq_k,
        c,
        (heads_kv * draw.choice((1, 1, 2, 3)), heads_kv),
        _head_sizes(draw, head_sizes == "cuda"),
        lengths,
        draw.choice(FILLS),
        seed,
    )


def random_dtype(seed: int) -> torch.dtype:
    """The type that a CUDA problem runs in."""
    return (torch.bfloat16, torch.float16, torch.float32)[seed % 3]


@dataclass(frozen=True)
class Tolerance:
    """What rounding may cost, from the size of the numbers: of O and of LSE, absolute."""

    o: float
    lse: float

    @classmethod
    def of(cls, case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, dtype: torch.dtype) -> "Tolerance":
        """fp32 logits and sums, probabilities and O in `dtype`; padding takes no part."""
        norms = [np.sqrt(np.square(np.where(np.isfinite(x), x, 0)).sum(-1)).max(initial=0) for x in (q, k)]
        largest = norms[0] * norms[1] * case.config.resolved_scale(case.dims[0])  # of a logit, and of the sum of its terms' sizes
        logit = 4 * EPS32 * (largest + 16)
        value = np.abs(v[np.isfinite(v)]).max(initial=0)
        return cls(value * (2 * logit + 2 * torch.finfo(dtype).eps), logit)


def _assert_close(found: Tensor, wanted: np.ndarray, tolerance: float, what: str) -> None:
    mine = found.double().cpu().numpy()
    assert mine.shape == wanted.shape, (what, mine.shape, wanted.shape)
    finite = np.isfinite(wanted)
    assert np.array_equal(mine[~finite], wanted[~finite]), f"{what}: infinities differ"
    error = np.zeros_like(wanted)
    error[finite] = np.nan_to_num(np.abs(mine[finite] - wanted[finite]), nan=np.inf)
    worst = np.unravel_index(error.argmax(), error.shape) if error.size else ()
    assert not (error > tolerance).any(), f"{what} is {mine[worst]} at {worst}, wanted {wanted[worst]} within {tolerance:.3g}"


def check_random_case(library: Library, seed: int, device: str = "cpu") -> None:
    """One random problem on a backend: plan and samples bit for bit, O and LSE within rounding of the dense oracle under that plan.

    `device` "cuda" takes head sizes and types that the CUDA kernels have; whatever fails says the seed and the problem.
    """
    cuda = device != "cpu" or library.path.name == "libhyperattention_trt.so"
    case, dtype = random_case(seed, "cuda" if cuda else "any"), random_dtype(seed) if cuda else torch.float32
    try:
        _check(library, case, dtype, device)
    except Exception as error:
        error.add_note(f"random problem, seed {seed}: {dtype}, {case!r}")
        raise


def _check(library: Library, case: Case, dtype: torch.dtype, device: str) -> None:
    q, k, v = (x.to(dtype) for x in case.inputs())
    lengths = case.lengths_tensor()
    there = None if lengths is None else lengths.to(device)
    x = Inputs(q.to(device), k.to(device), v.to(device), there, Geometry.of(q, k, v, case.config, lengths))
    q, k, v = (t.double().numpy() for t in (q, k, v))
    plan = oracle.make_plan(q, k, case.config, case.lengths)
    stages = Stages(library, x, case.config, threads=1 + case.seed % 2)
    selection = stages.select()
    assert_equal_bits(selection.cpu(), torch.from_numpy(plan.selection), "selection")
    for name, mine, wanted in zip(("index", "weight"), stages.samples(), (plan.sample_index, plan.sample_weight), strict=True):
        assert_equal_bits(mine.cpu(), torch.from_numpy(wanted), f"sample {name}")
    found, again = stages.attend(selection), stages.forward()
    for name, mine, other in zip(("o", "lse"), found, again, strict=True):
        assert_equal_bits(other, mine, f"{name} of forward")
    if case.fill != "scattered":  # rows that see NaN have no expected value
        tolerance = Tolerance.of(case, q, k, v, dtype)
        for name, mine, wanted in zip(("o", "lse"), found, oracle.attention(q, k, v, case.config, case.lengths, plan), strict=True):
            _assert_close(mine, wanted, getattr(tolerance, name), name)
