"""Does the backend compute the operator? Its error apart from the approximation's, judged against plain low precision.

Per op: native kernels on Q, K, V captured from the model, under the reference's plan, against float64; allowed is twice
the error of plain PyTorch in the same precision. Whole model: backend against the reference, every output; allowed is twice what one
ulp on the embeddings and floating inputs does to the reference, because rounding in one layer moves the choices of the next.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from polygraphy.comparator import Comparator
from polygraphy.comparator.struct import IterationResult, RunResults
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hyperattention import reference
from hyperattention.config import Config
from hyperattention.export.plan import ExportPlan
from hyperattention.native import Library
from hyperattention.selection import Geometry, Plan, make_plan
from hyperattention.validate.configs import configs
from hyperattention.validate.feeds import Feed, is_padded, shortened
from hyperattention.validate.metrics import TensorError, tensor_error
from hyperattention.validate.operators import one_thread
from hyperattention.validate.polygraphy_metrics import compare_functions
from hyperattention.validate.runners import ModelRunner

ROWS = 2048  # queries compared in a layer that is not the first
POISON = float("nan")  # keys and values past the length: they must reach no row


@dataclass(frozen=True)
class OpCase:
    """One problem made of captured tensors; its text names it in the report."""

    layer: int
    kind: str
    q: Tensor
    k: Tensor
    v: Tensor
    config: Config
    lengths: Tensor | None = None

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.kind}"


def check_length(plan: ExportPlan, shortest: int) -> int:
    """Tokens of the implementation's windows: a little above exact_below, no multiple of a block, and not above `shortest`.

    The reference is slow on purpose, so this is as short as approximation with far blocks can be.
    """
    wanted = [max(c.exact_below * 5 // 4, (c.local_overlap + 2) * c.local_size) + 3 for c in configs(plan.approximate)]
    return max(min(shortest, max(wanted, default=shortest)), min(plan.seq[0], shortest))


def padded_length(length: int) -> int:
    """Valid tokens of the padded cases: about three quarters, no multiple of a block; not above 0 where `length` is too short for one."""
    return length - length // 4 - 3


def op_cases(captured: list) -> list[OpCase]:
    """The first approximate layer whole, padded and on the exact path; the last rows of the others (or of the only one)."""
    approximate = [c for c in captured if not c.is_exact]
    first, *others = approximate or captured[:1]
    length = first.k.shape[2]
    rows = min(ROWS, length)
    valid = padded_length(length)
    k, v = first.k.clone(), first.v.clone()
    k[:, :, valid:], v[:, :, valid:] = POISON, POISON
    lengths = torch.full((first.q.shape[0],), valid, dtype=torch.int32, device=first.q.device)
    short = max(2, min(length, first.config.exact_below, ROWS) - 3)
    q = first.q[:, :, short - short // 2 - 1 : short]
    return [
        OpCase(first.layer, "whole window", first.q, first.k, first.v, first.config),
        OpCase(first.layer, f"padded, last {rows} queries", first.q[:, :, -rows:], k, v, first.config, lengths),
        OpCase(first.layer, "exact path, half the queries", q, first.k[:, :, :short], first.v[:, :, :short], first.config),
        *(OpCase(c.layer, f"last {rows} queries", c.q[:, :, -rows:], c.k, c.v, c.config) for c in others or [first]),
    ]


def _spread(error: Tensor) -> tuple[float, float]:
    """Largest and root mean square of a difference; NaN where any entry is not finite."""
    if not bool(torch.isfinite(error).all()):
        return math.nan, math.nan
    return float(error.abs().max()), float(error.square().mean().sqrt())


def _difference(ours: Tensor, truth: Tensor) -> Tensor:
    """ours - truth in float64, where equal infinities (a row without keys) differ by nothing."""
    ours = ours.double()
    return torch.where(ours == truth, torch.zeros_like(truth), ours - truth)


def check_op(case: OpCase, kernels: Library) -> dict:
    """One row of the per-op table. `kernels` has select, samples and attend as hyperattention.library.load_cpu() does.

    ratio = (error of the kernels) / (error of the naive twin + half an ulp of the largest value), the worst of O and LSE,
    of maximum and root mean square; at most 2 means error <= 2 x naive + one ulp.
    """
    g = Geometry.of(case.q, case.k, case.v, case.config, case.lengths)
    with one_thread():
        plan = make_plan(case.q, case.k, g, case.lengths)
    problem = (case.q.contiguous(), case.k.contiguous(), case.v.contiguous(), case.config)
    differences = 0 if g.exact else _plan_differences(plan, kernels, problem, case)
    o, lse = kernels.attend(*problem, plan.selection, case.lengths)
    arithmetic = None if case.q.dtype == torch.float32 else case.q.dtype
    with one_thread():
        truth = reference.attention(case.q.double(), case.k.double(), case.v.double(), case.config, case.lengths, plan)
        naive = reference.attention(case.q, case.k, case.v, case.config, case.lengths, plan, arithmetic)
    row: dict = {"case": str(case), "layer": case.layer, "kind": case.kind, "plan_differences": differences}
    ratios = []
    pairs = (("o", o, naive.o, truth.o, case.q.dtype), ("lse", lse, naive.lse, truth.lse, torch.float32))
    for name, ours, plain, exact, dtype in pairs:
        floor = torch.finfo(dtype).eps * float(exact[torch.isfinite(exact)].abs().max())
        found, allowed = _spread(_difference(ours, exact)), _spread(_difference(plain, exact))
        row[f"{name}_max"], row[f"{name}_naive_max"] = found[0], allowed[0]
        ratios += [a / (b + floor / 2) for a, b in zip(found, allowed, strict=True)]
    row["ratio"] = math.nan if any(math.isnan(r) for r in ratios) else max(ratios)
    return row


def _next_after(value: Tensor, towards: Tensor) -> Tensor:
    """torch.nextafter, also for float16, which it lacks: there the neighbour is one step of the ordered bit pattern."""
    if value.dtype != torch.float16:
        return torch.nextafter(value, towards)
    bits = value.view(torch.int16).int()
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFF)) + torch.where(towards > value, 1, -1)
    return torch.where(ordered >= 0, ordered, -ordered | -0x8000).to(torch.int16).view(torch.float16)


def check_plan(captured, kernels: Library) -> int:
    """Choices that differ from the reference's in the last rows of one captured layer: cheap enough for the longest lengths,
    where the selector has its second level."""
    c = captured
    case = OpCase(c.layer, "", c.q[:, :, -ROWS:].contiguous(), c.k.contiguous(), c.v.contiguous(), c.config)
    g = Geometry.of(case.q, case.k, case.v, case.config)
    with one_thread():
        plan = make_plan(case.q, case.k, g)
    return _plan_differences(plan, kernels, (case.q, case.k, case.v, case.config), case)


def _plan_differences(plan: Plan, kernels: Library, problem: tuple[Tensor, Tensor, Tensor, Config], case: OpCase) -> int:
    index, weight = kernels.samples(*problem, case.lengths)
    found = int((kernels.select(*problem, case.lengths) != plan.selection).sum())
    return found + int((index != plan.sample_index).sum()) + int((weight != plan.sample_weight).sum())


class _Embeddings(TorchDispatchMode):
    """Inside, every row that is looked up in an embedding table is moved by `move`, in modules and in exported graphs alike."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.move = move

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return self.move(out) if func is torch.ops.aten.embedding.default else out


class Ulp:
    """Moves numbers to one of their two neighbours, at random from `seed`."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, value: Tensor) -> Tensor:
        plain = value.detach().cpu()
        up = torch.randint(0, 2, plain.shape, generator=self.generator).bool()
        towards = torch.where(up, torch.full_like(plain, torch.inf), torch.full_like(plain, -torch.inf))
        return _next_after(plain, towards).to(value.device)


def one_ulp_off(runner: ModelRunner, given: Feed, seed: int) -> Mapping[str, Tensor]:
    """The answer of a PyTorch runner whose floating inputs and whose embeddings are each one ulp off."""
    ulp = Ulp(seed)
    moved = OrderedDict((name, ulp(value) if value.is_floating_point() else value) for name, value in given.items())
    with _Embeddings(ulp):
        return runner.infer(moved)


def check_model(
    backend: ModelRunner, definition: ModelRunner, given: Feed, length: int, seed: int, step: Callable[[str], None]
) -> list[dict]:
    """The whole-model table: `given` as it is, and padded behind three quarters where the model takes lengths. Runners must be active.

    One row for each case and floating output: what the backend answers against the same rows of the reference. The keys and values of a
    prefill are left to the regime that decodes over them.
    """
    valid = padded_length(length)
    cases = [("whole window", length, given)]
    if is_padded(backend.plan) and valid > 0:
        cases.append(("padded", valid, shortened(given, valid)))
    rows: list[dict] = []
    noise: dict[str, float] = {}
    for kind, valid, problem in cases:
        step(f"whole model, {kind}: {backend.name}")
        ours = backend.infer(problem)
        step(f"whole model, {kind}: reference")
        other = definition.infer(problem)
        if not noise:
            step("whole model: reference with its inputs one ulp off")
            shifted = one_ulp_off(definition, problem, seed)
            names = [name for name, value in other.items() if value.is_floating_point() and not name.startswith("present.")]
            noise = {name: max(tensor_error(shifted[name], other[name]).relative_l2, rounding(other[name].dtype)) for name in names}
        for name in noise:
            pair = _valid(ours[name], length, valid), _valid(other[name], length, valid)
            found = tensor_error(*pair)
            case = kind if len(noise) == 1 else f"{kind}, {name}"
            row = {"case": case, "output": name, **asdict(found), "noise": noise[name], "ratio": _ratio(found.relative_l2, noise[name])}
            rows.append({**row, "polygraphy": _polygraphy(backend.name, *pair, noise[name])})
    return rows


def rounding(dtype: torch.dtype) -> float:
    """Relative L2 by which any two sound implementations may differ: sums in float32 in another order, and half an ulp of the output.

    A mean over many rows averages the noise of one ulp in the inputs away, but not these.
    """
    return max(2 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 2)


def broken_output(name: str, count: int, at: str) -> dict:
    """A row of the whole-model table for an output that is no number somewhere: it passes no gate, and names itself."""
    nan = math.nan
    said = f"{at}: {count} NaN or infinite numbers in output {name}"
    return {"case": said, "output": name, **asdict(TensorError(nan, nan, nan, nan)), "noise": nan, "ratio": nan, "polygraphy": False}


def _valid(value: Tensor, length: int, valid: int) -> Tensor:
    """The rows before the padding: of the first axis behind the batch that is as long as the input, if there is one."""
    axis = next((axis for axis in range(1, value.dim()) if value.shape[axis] == length), None)
    return value if axis is None or valid == length else value.narrow(axis, 0, valid)


def _ratio(found: float, noise: float) -> float:
    if noise > 0:
        return found / noise
    return 0.0 if found == 0 else math.inf


def _polygraphy(name: str, ours: Tensor, other: Tensor, noise: float) -> bool:
    """The same pair through Polygraphy's comparator with twice the noise as the limit of relative L2 and of the norm."""
    from polygraphy.logger import G_LOGGER

    def result(runner: str, value: Tensor) -> tuple:
        return runner, [IterationResult(OrderedDict(output=value.float().cpu()), runner_name=runner)]

    results = RunResults()
    results.extend([result(name, ours), result("reference", other)])
    limit = 2 * noise
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        return bool(Comparator.compare_accuracy(results, compare_func=compare_functions(limit, limit, 1 - limit)))


def seeds_spread(captured: list, kernels: Library, seeds: tuple[int, ...]) -> list[dict]:
    """Relative L2 of each approximate layer against exact attention under other seeds: how much the draw matters."""
    rows = []
    for c in captured:
        if c.is_exact:
            continue
        exact, _ = kernels.forward(c.q, c.k, c.v, c.config.exact(), None)
        errors = [tensor_error(kernels.forward(c.q, c.k, c.v, replace(c.config, seed=s), None)[0], exact).relative_l2 for s in seeds]
        rows.append({"layer": c.layer, "seeds": list(seeds), "relative_l2": errors})
    return rows
