"""Comparisons of the CUDA kernels with the reference, stage by stage; run on a GPU and on the emulated kernels alike."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperattention import reference
from hyperattention.native import Library
from hyperattention.selection import COARSE_POOL, Geometry, draw_samples, key_pools, make_plan, query_pools, select_blocks
from tests.operator_cases import Case

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """A case in a low precision with a head size the kernels take, on `device`."""

    case: Case
    head_dim: int = 64
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"{replace(self.case, dims=(self.head_dim, self.head_dim))}-{self.dtype}"

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        case = replace(self.case, dims=(self.head_dim, self.head_dim))
        return tuple(x.to(DTYPES[self.dtype]).to(device) for x in case.inputs())  # type: ignore[return-value]

    def lengths(self, device: str) -> Tensor | None:
        lengths = self.case.lengths_tensor()
        return None if lengths is None else lengths.to(device)


def geometry(problem: Problem, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Geometry:
    return Geometry.of(q, k, v, problem.case.config, lengths)


def same(name: str, got: Tensor, want: Tensor) -> None:
    """Equal bit for bit, NaN equal to NaN."""
    assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.shape} {got.dtype}, expected {want.shape} {want.dtype}"
    wrong = (got != want) & ~((got != got) & (want != want))
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: {got[at]}, expected {want[at]}")


def check_pools(library: Library, problem: Problem, device: str) -> None:
    """Both sides and both levels, rules 18 and 20."""
    q, k, v = problem.tensors(device)
    lengths = problem.lengths(device)
    g, c = geometry(problem, q, k, v, lengths), problem.case.config
    for rows in {c.pool_size, COARSE_POOL}:
        for side, x, pools in (("queries", q, query_pools), ("keys", k, key_pools)):
            values, scales = library.pool(q, k, v, c, side, rows, lengths)
            want = [pools(x[b], rows, g, length) for b, length in enumerate(g.clamp(lengths))]
            same(f"{side} {rows} values", values, torch.stack([w[0] for w in want]))
            same(f"{side} {rows} scales", scales, torch.stack([w[1] for w in want]))


def check_blocks(library: Library, problem: Problem, device: str) -> None:
    """Rules 19 to 23."""
    q, k, v = problem.tensors(device)
    lengths = problem.lengths(device)
    blocks = library.select(q, k, v, problem.case.config, lengths)
    same("blocks", blocks, select_blocks(q, k, geometry(problem, q, k, v, lengths), lengths))


def check_samples(library: Library, problem: Problem, device: str) -> None:
    """Rules 10 to 15."""
    q, k, v = problem.tensors(device)
    lengths = problem.lengths(device)
    index, weight = library.samples(q, k, v, problem.case.config, lengths)
    want_index, want_weight = draw_samples(geometry(problem, q, k, v, lengths), lengths, device)
    same("sample index", index, want_index)
    same("sample weight", weight, want_weight)


def error(got: Tensor, want: Tensor) -> Tensor:
    """Relative L2 error of each row."""
    difference = (got.double() - want).norm(dim=-1)
    return difference / want.norm(dim=-1).clamp(min=1e-30)


def check_attention(library: Library, problem: Problem, device: str, forward: bool = False) -> None:
    """Within twice the naive low-precision twin's error against fp64 under the same plan, plus one rounding of the output."""
    q, k, v = problem.tensors(device)
    lengths, c, dtype = problem.lengths(device), problem.case.config, DTYPES[problem.dtype]
    plan = make_plan(q, k, geometry(problem, q, k, v, lengths), lengths)
    if forward:
        o, lse = library.forward(q, k, v, c, lengths)
    else:
        o, lse = library.attend(q, k, v, c, plan.blocks, lengths)
    want = reference.attention(q.double(), k.double(), v.double(), c, lengths, plan)
    naive = reference.attention(q, k, v, c, lengths, plan, arithmetic=dtype)
    assert o.shape == want.o.shape and o.dtype == dtype and lse.shape == want.lse.shape and lse.dtype == torch.float32
    empty = want.lse == -torch.inf
    assert bool((lse[empty] == -torch.inf).all()) and bool((o[empty] == 0).all()), "a row without a visible key is not 0 and -inf"
    seen = ~empty
    # A NaN of the inputs that a row sees is NaN here too; what else a row holds is compared.
    finite = seen & torch.isfinite(want.o).all(-1) & torch.isfinite(want.lse)
    if not finite.any():
        return
    ulp = torch.finfo(dtype).eps
    ours, twin = error(o, want.o)[finite], error(naive.o, want.o)[finite]
    bound = 2 * twin.square().mean().sqrt() + ulp / 4
    assert ours.square().mean().sqrt() <= bound, f"O: error {ours.square().mean().sqrt():.3e}, bound {bound:.3e}"
    worst = 2 * twin.max() + 2 * ulp
    assert ours.max() <= worst, f"O: worst row {ours.max():.3e}, bound {worst:.3e}"
    lse_ours, lse_twin = ((x.double() - want.lse)[finite].abs() for x in (lse, naive.lse))
    bound = 2 * lse_twin.max() + 1e-4 * (1 + want.lse[finite].abs().max())
    assert lse_ours.max() <= bound, f"LSE: worst row {lse_ours.max():.3e}, bound {bound:.3e}"
