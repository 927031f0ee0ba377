"""What the kernel tests of every backend share: problems, expected values, the tolerance, and calls between guard bytes."""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import byref
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from operator_cases import CASES, SORTED_CASES, Case, config, sorted_config
from torch import Tensor

from hyperattention.config import PRESETS, Config
from hyperattention.geometry import Geometry
from hyperattention.native import Library, _Call
from hyperattention.reference import attention
from hyperattention.selection import COARSE_POOL, Plan, key_pools, make_plan, query_pools, selection_shape

_GUARD, _PATTERN = 256, 0xA5

# The kernels' own edges: head sizes around register blocks, rows around a tile of query rows, keys around a tile of keys.
_WIDE = config(block_size=64, pool_size=4, local_size=128, num_blocks=3, sample_size=50)
KERNEL_CASES = CASES + [
    *(Case("head-size", 130, 300, _WIDE, dims=dims) for dims in ((20, 33), (33, 20), (64, 64), (80, 80), (96, 7), (128, 128), (256, 256))),
    *(Case("exact-rows", rows, 250, Config().exact(), heads=(2, 2), dims=(16, 12)) for rows in (1, 15, 17, 48, 63, 65, 128, 129)),
    *(Case("exact-keys", 70, keys, config(causal=0).exact(), dims=(6, 5)) for keys in (2, 95, 96, 97, 193)),
    *(Case(f"exact-group-causal{causal}", 5, 99, config(causal=causal).exact(), heads=(30, 2), lengths=(60, 99)) for causal in (0, 1)),
    Case("block256", 513, 513, config(block_size=256, local_size=256, num_blocks=1), dims=(16, 16)),
    Case("preset", 700, 4300, replace(PRESETS["blocks"], local_size=256), heads=(2, 1), dims=(64, 64), lengths=(4300, 4011)),
]
# The same for `sortlsh`: projections around the lanes of a vector and the digits of the sort, query blocks of several tiles.
_SORTED_WIDE = sorted_config(block_size=100, local_size=150, num_blocks=3, sample_size=110)
SORTED_KERNEL_CASES = SORTED_CASES + [
    *(Case(f"sorted-projections{r}", 130, 137, sorted_config(num_projections=r), dims=(9, 4)) for r in (4, 5, 8, 12, 13)),
    *(Case("sorted-head-size", 130, 300, _SORTED_WIDE, dims=dims) for dims in ((20, 33), (64, 64), (96, 7), (256, 256))),
    Case("sorted-tiles", 700, 700, _SORTED_WIDE, heads=(3, 1), dims=(16, 12), lengths=(700, 333)),
    Case("sorted-tiles-overlap", 700, 700, replace(_SORTED_WIDE, local_overlap=1, sinks=40), dims=(16, 12), lengths=(601, 700)),
    Case("sorted-tiles-non-causal", 600, 700, replace(_SORTED_WIDE, causal=0, num_projections=10), dims=(16, 12), lengths=(700, 101)),
    Case("sorted-preset", 700, 4300, replace(PRESETS["paper"], local_size=512), heads=(2, 1), dims=(64, 64), lengths=(4300, 4011)),
]


@dataclass(frozen=True)
class Inputs:
    """q, k, v of one dtype and what follows from them."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor | None
    geometry: Geometry


@dataclass(frozen=True)
class Expected:
    """The reference's plan, and under it the exact result in fp64 and the naive twin's in the kernel's own arithmetic."""

    plan: Plan
    exact: tuple[Tensor, Tensor]  # o, lse
    twin: tuple[Tensor, Tensor]
    noise: tuple[float, float]  # what fp32 may be off by, however near the twin happens to come


@lru_cache(maxsize=None)
def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """The case's tensors in `dtype`, on the processor."""
    q, k, v = (x.to(dtype) for x in case.inputs())
    lengths = case.lengths_tensor()
    return Inputs(q, k, v, lengths, Geometry.of(q, k, v, case.config, lengths))


@lru_cache(maxsize=None)
def expected_plan(case: Case, dtype: torch.dtype) -> Plan:
    """The reference's plan."""
    x = inputs(case, dtype)
    return make_plan(x.q, x.k, x.geometry, x.lengths)


@lru_cache(maxsize=None)
def expected(case: Case, dtype: torch.dtype) -> Expected:
    """What a kernel is held against."""
    x, plan = inputs(case, dtype), expected_plan(case, dtype)
    exact = attention(x.q.double(), x.k.double(), x.v.double(), case.config, x.lengths, plan)
    twin = attention(x.q, x.k, x.v, case.config, x.lengths, plan, None if dtype == torch.float32 else dtype)
    return Expected(plan, exact[:2], twin[:2], _noise(x, case.config, plan, exact[1]))


def _noise(x: Inputs, config: Config, plan: Plan, lse: Tensor) -> tuple[float, float]:
    """Rounding errors of O and LSE in fp32. Each probability is a power within 2 units in the last place, of a logit that is off by half
    of one; a sum of values of both signs is off by that share of the sum of their magnitudes, which may be far above the sum itself."""
    finite = lse.isfinite()
    if not finite.any():
        return 0.0, 0.0
    share = torch.finfo(torch.float32).eps * (2 + lse[finite].abs().max().item() / 2)
    magnitude = attention(x.q.double(), x.k.double(), x.v.double().abs(), config, x.lengths, plan).o
    return share * magnitude[finite].max().item(), share


def expected_pools(case: Case, dtype: torch.dtype, side: str, rows: int) -> tuple[Tensor, Tensor]:
    """The reference's pools in the layout of ha_*_pool."""
    x = inputs(case, dtype)
    make, tensor = (query_pools, x.q) if side == "queries" else (key_pools, x.k)
    pools = [make(tensor[b], rows, x.geometry, length) for b, length in enumerate(x.geometry.clamp(x.lengths))]
    values, factors = (torch.stack(parts) for parts in zip(*pools, strict=True))
    count = len(x.geometry.query_pools(rows)) if side == "queries" else -(-x.geometry.seq_k // rows)
    return values[:, :, :count], factors[:, :, :count]  # the reference pads an empty tensor to one skipped pool


def pool_sizes(case: Case) -> list[int]:
    """The pool sizes that the selector uses."""
    return sorted({case.config.pool_size, COARSE_POOL})


def assert_equal_bits(found: Tensor, wanted: Tensor, what: str) -> None:
    """Same type, shape and values; NaN equals NaN."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), (what, found.dtype, found.shape, wanted.dtype, wanted.shape)
    wrong = ((found != wanted) & ~((found != found) & (wanted != wanted))).nonzero()
    assert len(wrong) == 0, f"{what} differs at {len(wrong)} of {found.numel()} places, first {wrong[0].tolist()}"


def assert_within_twin(found: Tensor, exact: Tensor, twin: Tensor, what: str, noise: float = 0.0) -> None:
    """At most twice the naive twin's largest error, and two units in the last place of the largest value or `noise`, if that is more: of
    a few values the twin's error is a matter of luck, and PyTorch's order of summation differs between processors."""
    assert found.shape == exact.shape, (what, found.shape, exact.shape)
    finite = exact.isfinite()
    assert torch.equal(found.double()[~finite], exact[~finite]), f"{what}: infinities differ"
    if not finite.any():
        return
    error, allowed = ((x.double() - exact)[finite].abs().max().item() for x in (found, twin))
    floor = max(2 * torch.finfo(found.dtype).eps * exact[finite].abs().max().item(), noise)
    assert error <= 2 * allowed + floor, f"{what}: largest error {error:.3g}; the twin's is {allowed:.3g}, the floor {floor:.3g}"


def assert_attention(found: Iterable[Tensor], wanted: Expected, what: str = "") -> None:
    """O and LSE of a kernel for a case, on any device, as assert_within_twin holds them."""
    for name, mine, exact, twin, noise in zip(("o", "lse"), found, wanted.exact, wanted.twin, wanted.noise, strict=True):
        assert_within_twin(mine.cpu(), exact, twin, f"{name} {what}".rstrip(), noise)


class Guarded:
    """A dense tensor between guard bytes, aligned to 256 bytes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
        size = torch.Size(shape).numel() * dtype.itemsize
        self._bytes = torch.full((size + 3 * _GUARD,), _PATTERN, dtype=torch.uint8, device=device)
        self._start = _GUARD + -self._bytes.data_ptr() % _GUARD
        self._stop = self._start + size
        self.tensor = self._bytes[self._start : self._stop].view(dtype).view(shape)
        self.pointer = self._bytes.data_ptr() + self._start

    def check(self, what: str) -> None:
        for side, part in (("before", self._bytes[: self._start]), ("behind", self._bytes[self._stop :])):
            written = int((part != _PATTERN).sum())
            assert written == 0, f"{written} bytes {side} {what} were written"


class Stages:
    """Runs a backend's stages on one problem; every output and the workspace lie between guard bytes."""

    def __init__(self, library: Library, x: Inputs, config: Config, threads: int = 0) -> None:
        self.library, self.x, self.config, self.threads = library, x, config, threads
        self.device = x.q.device.type

    def pool(self, side: str, rows: int) -> tuple[Tensor, Tensor]:
        g = self.x.geometry
        pools = len(g.query_pools(rows)) if side == "queries" else -(-g.seq_k // rows)
        shape = (g.batch, g.heads_q if side == "queries" else g.heads_kv, pools)
        values, factors = self._run(
            self.library._pool, None, {"values": ((*shape, g.head_dim), torch.int8), "factors": (shape, torch.float32)},
            ("queries", "keys").index(side), rows,
        )  # fmt: skip
        return values, factors

    def select(self) -> Tensor:
        return self._run(self.library._select, None, {"plan": (selection_shape(self.x.geometry), torch.int32)})[0]

    def samples(self) -> tuple[Tensor, Tensor]:
        g = self.x.geometry
        shape = (g.batch, g.heads_q, len(g.draws(0)), g.config.sample_size)
        index, weight = self._run(self.library._samples, None, {"index": (shape, torch.int32), "weight": (shape, torch.float32)})
        return index, weight

    def attend(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        return self._attention(self.library._attend, plan)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self._attention(self.library._forward, None)

    def forward_without_lse(self) -> Tensor:
        g = self.x.geometry
        return self._run(self.library._forward, None, {"out": ((g.batch, g.heads_q, g.seq_q, g.head_dim_v), self.x.q.dtype)})[0]

    def _attention(self, function, plan: Tensor | None) -> tuple[Tensor, Tensor]:
        g = self.x.geometry
        rows = (g.batch, g.heads_q, g.seq_q)
        o, lse = self._run(function, plan, {"out": ((*rows, g.head_dim_v), self.x.q.dtype), "lse": (rows, torch.float32)})
        return o, lse

    def _run(self, function, plan: Tensor | None, outputs: dict[str, tuple[tuple[int, ...], torch.dtype]], *numbers: int) -> list[Tensor]:
        x = self.x
        call = _Call(self.library, x.q, x.k, x.v, self.config, x.lengths, plan, self.threads)
        size = call.workspace_size()
        buffers = {name: Guarded(shape, dtype, self.device) for name, (shape, dtype) in outputs.items()}
        buffers["workspace"] = Guarded((size,), torch.uint8, self.device)
        call.params.workspace, call.params.workspace_size = buffers["workspace"].pointer, size
        pointers = [buffers[name].pointer for name in outputs]
        if "out" in outputs:
            call.params.out, call.params.lse = (*pointers, None)[:2]
            pointers = []
        self.library.check(function, byref(call.params), *numbers, *pointers)
        for name, buffer in buffers.items():
            buffer.check(name)
        return [buffers[name].tensor for name in outputs]
