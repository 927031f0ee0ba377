"""Does the backend compute the operator? Its error apart from the approximation's, judged against plain low precision.

Per op: native kernels on Q, K, V captured from the model, under the reference's plan, against float64; allowed is twice
the error of plain PyTorch in the same precision. Whole model: backend against the reference; allowed is twice what one
ulp on the embeddings does to the reference, because rounding in one layer moves the choices of the next.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from polygraphy.comparator import Comparator
from polygraphy.comparator.struct import IterationResult, RunResults
from torch import Tensor

from hyperattention import reference
from hyperattention.config import Config
from hyperattention.export.plan import ExportPlan
from hyperattention.native import Library
from hyperattention.selection import Geometry, Plan, make_plan
from hyperattention.validate.compare import compare_functions, tensor_error
from hyperattention.validate.configs import configs
from hyperattention.validate.operators import one_thread
from hyperattention.validate.runners import ModelRunner, feed

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


def op_cases(captured: list) -> list[OpCase]:
    """The first approximate layer whole, padded and on the exact path; the last rows of the others (or of the only one)."""
    approximate = [c for c in captured if not c.config.is_exact(c.q.shape[2], c.k.shape[2])]
    first, *others = approximate or captured[:1]
    length = first.k.shape[2]
    rows = min(ROWS, length)
    valid = length - length // 4 - 3
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


def _plan_differences(plan: Plan, kernels: Library, problem: tuple, case: OpCase) -> int:
    index, weight = kernels.samples(*problem, case.lengths)
    found = int((kernels.select(*problem, case.lengths) != plan.selection).sum())
    return found + int((index != plan.sample_index).sum()) + int((weight != plan.sample_weight).sum())


@contextlib.contextmanager
def one_ulp(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Moves every number that leaves the embedding to one of its two neighbours, at random from `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def hook(_module, _inputs, output: Tensor) -> Tensor:
        value = output.detach().cpu()
        up = torch.randint(0, 2, value.shape, generator=generator).bool()
        towards = torch.where(up, torch.full_like(value, torch.inf), torch.full_like(value, -torch.inf))
        return _next_after(value, towards).to(output.device)

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_model(
    backend: ModelRunner, definition: ModelRunner, model: torch.nn.Module, input_ids: Tensor, seed: int, step: Callable[[str], None]
) -> list[dict]:
    """The whole-model table: the window as it is, and padded behind three quarters. Runners must be active.

    Compares what the backend answers (all positions, or the last valid one) with the same rows of the reference.
    """
    length = input_ids.shape[1]
    rows, noise = [], 0.0
    for kind, valid in (("whole window", length), ("padded", length - length // 4 - 3)):
        given = feed(input_ids, torch.tensor([valid], dtype=torch.int32))
        step(f"whole model, {kind}: {backend.name}")
        ours = backend.infer(given)["logits"][0]
        step(f"whole model, {kind}: reference")
        other = definition.infer(given)["logits"][0, :valid]
        last = slice(-1, None) if ours.shape[0] == 1 else slice(None)
        if not rows:
            step("whole model: reference with embeddings one ulp off")
            with one_ulp(model, seed):
                shifted = definition.infer(given)["logits"][0, :valid]
            noise = tensor_error(shifted[last], other[last]).relative_l2
        ours, other = ours[: other[last].shape[0]], other[last]
        found = tensor_error(ours, other)
        rows.append({"case": kind, **asdict(found), "noise": noise, "ratio": _ratio(found.relative_l2, noise)})
        rows[-1]["polygraphy"] = _polygraphy(backend.name, ours, other, noise)
    return rows


def _ratio(found: float, noise: float) -> float:
    if noise > 0:
        return found / noise
    return 0.0 if found == 0 else math.inf


def _polygraphy(name: str, ours: Tensor, other: Tensor, noise: float) -> bool:
    """The same pair through Polygraphy's comparator with twice the noise as the limit of relative L2 and of the norm."""
    from polygraphy.logger import G_LOGGER

    def result(runner: str, value: Tensor) -> tuple:
        return runner, [IterationResult(OrderedDict(logits=value.float().cpu()), runner_name=runner)]

    results = RunResults()
    results.extend([result(name, ours), result("reference", other)])
    limit = 2 * noise
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        return bool(Comparator.compare_accuracy(results, compare_func=compare_functions(limit, limit, 1 - limit)))


def seeds_spread(captured: list, kernels: Library, seeds: tuple[int, ...]) -> list[dict]:
    """Relative L2 of each approximate layer against exact attention under other seeds: how much the draw matters."""
    rows = []
    for c in captured:
        if c.config.is_exact(c.q.shape[2], c.k.shape[2]):
            continue
        exact, _ = kernels.forward(c.q, c.k, c.v, c.config.exact(), None)
        errors = [tensor_error(kernels.forward(c.q, c.k, c.v, replace(c.config, seed=s), None)[0], exact).relative_l2 for s in seeds]
        rows.append({"layer": c.layer, "seeds": list(seeds), "relative_l2": errors})
    return rows
