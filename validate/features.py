"""How far the outputs of a model without a vocabulary are from exact attention, on the same inputs, at each length.

An output is taken apart into rows, vectors along its last axis: the hidden state of a token or of a patch, an embedding. Their
direction (cosine) and their size (norm ratio) are judged apart, because a mean of one hides an error of the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from hyperattention.errors import UsageError
from hyperattention.validate.baseline import Baseline
from hyperattention.validate.feeds import Feed, Material, without_padding
from hyperattention.validate.first_feed import Layers, look_at_layers, run_exact_twin
from hyperattention.validate.metrics import estimate, tensor_error
from hyperattention.validate.workbench import Measured, Workbench, check_finite, not_finite, nothing_approximates, time_row, timed

ROW_BLOCK = 64  # neighbouring rows that count as one observation


@dataclass(frozen=True)
class RowMetrics:
    """Per row, float64 [rows]: |ours - exact| / |exact|, cosine, |ours| / |exact|."""

    relative_l2: Tensor
    cosine: Tensor
    norm_ratio: Tensor


def as_rows(value: Tensor) -> Tensor:
    """[rows, size] float64 of an output: vectors along the last axis. One number a place, or no axis, makes one row a batch entry."""
    if value.dim() < 2 or value.shape[-1] == 1:
        value = value.reshape(value.shape[0] if value.dim() > 1 else 1, -1)
    return value.detach().reshape(-1, value.shape[-1]).double()


def row_metrics(ours: Tensor, exact: Tensor) -> RowMetrics:
    """Compares two outputs of one shape row by row, in float64.

    Where the exact row is zero, so must ours be: then it counts as equal, and as infinitely far where it is not.
    """
    if ours.shape != exact.shape:
        raise ValueError(f"outputs {tuple(ours.shape)} and {tuple(exact.shape)}")
    a, b = as_rows(ours.to(exact.device)), as_rows(exact)
    size, other, distance = b.norm(dim=-1), a.norm(dim=-1), (a - b).norm(dim=-1)
    equal, empty = distance == 0, size == 0
    infinite = torch.full_like(size, math.inf)
    cosine = torch.where(equal, 1.0, torch.where(empty | (other == 0), 0.0, (a * b).sum(-1) / (other * size)))
    relative = torch.where(equal, 0.0, torch.where(empty, infinite, distance / size))
    ratio = torch.where(equal, 1.0, torch.where(empty, infinite, other / size))
    broken = ~torch.isfinite(a).all(-1)
    return RowMetrics(*(x.masked_fill(broken, math.nan).cpu() for x in (relative, cosine, ratio)))


@dataclass
class _Found:
    """What accumulates over the feeds of one length."""

    outputs: dict[str, list[RowMetrics]] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    ours_s: list[float] = field(default_factory=list)
    torch_s: list[float] = field(default_factory=list)

    def add(self, ours: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
        for name, value in ours.items():
            self.outputs.setdefault(name, []).append(row_metrics(value, exact[name]))
        for name, count in not_finite(ours).items():
            self.broken[name] = self.broken.get(name, 0) + count


def judged(answer: Mapping[str, Tensor], given: Feed) -> dict[str, Tensor]:
    """The outputs that can be compared: floating ones, without the rows behind a row's valid length."""
    return {name: without_padding(value, given) for name, value in answer.items() if value.is_floating_point()}


def measure_features(bench: Workbench, material: Material, length: int, count: int, hard: bool) -> Measured:
    """One length over at most `count` feeds; with `hard` also what inputs that hurt do to its layers, and the look-ahead test.

    Raises UsageError where exact attention itself answers NaN or infinity, and where no output is floating.
    """
    found, layers, baseline, exact_twin, exact_s, takes_exact_path = _Found(), Layers(), [], None, None, True
    feeds = material.feeds(bench.plan, length, count)
    for number, given in enumerate(feeds):
        at = f"{length:,} tokens, input {number + 1} of {len(feeds)}"
        bench.step(f"{at}: exact attention ({bench.exact.backend})")
        with bench.patched.capture() as captured:
            exact = judged(bench.exact.infer(given), given)
        check_finite(exact, at)
        found.torch_s += timed(bench.exact, given, bench.repeats)
        takes_exact_path &= nothing_approximates(bench.plan, captured)
        if number == 0:
            layers = look_at_layers(bench, captured, length, hard, material.kind, None)
            if layers.approximated:
                baseline = [Baseline(bench, length).row(layers.rows, layers.approximated)]
        captured.clear()  # Q, K and V of every layer: room for what follows
        bench.step(f"{at}: ours ({bench.backend.backend})")
        found.add(judged(bench.backend.infer(given), given), exact)
        found.ours_s += timed(bench.backend, given, bench.repeats)
        if number == 0 and (twin := run_exact_twin(bench, given, at)) is not None:
            answer, exact_s = twin
            exact_twin = _worst(judged(answer, given), exact)
    if not found.outputs:
        raise UsageError(f"the outputs {', '.join(bench.plan.outputs)} are integers or booleans; return a floating output to be compared")
    row = {
        "length": length,
        "exact": takes_exact_path,
        "outputs": [_summary(name, metrics) for name, metrics in found.outputs.items()],
        "windows": len(feeds),
        "not_finite": found.broken,
        "exact_twin": exact_twin,
    }
    time = time_row(bench, length, found.ours_s, exact_s, found.torch_s)
    return Measured(row, time, layers.rows, baseline, layers.hard_inputs, layers.look_ahead)


def _summary(name: str, metrics: list[RowMetrics]) -> dict:
    """One output's estimates over all its rows, for report.json."""
    cosines = torch.cat([m.cosine for m in metrics])

    def of(key: str) -> dict:
        return asdict(estimate([getattr(m, key) for m in metrics], ROW_BLOCK))

    worst = math.nan if bool(cosines.isnan().any()) else float(cosines.min())
    return {"name": name, **{key: of(key) for key in ("relative_l2", "cosine", "norm_ratio")}, "cosine_worst": worst}


def _worst(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict:
    """The output that is farthest from exact attention's, as a tensor error."""
    errors = [asdict(tensor_error(value, exact[name])) for name, value in ours.items()]
    return max(errors, key=lambda error: math.inf if math.isnan(error["relative_l2"]) else error["relative_l2"])
