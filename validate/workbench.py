"""What the measuring works with: the active runners of one validation, the model they share, and how a run is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from hyperattention.errors import UsageError
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import ReplacedModel
from hyperattention.export.switched import Captured
from hyperattention.native import Library
from hyperattention.validate.configs import configs
from hyperattention.validate.operators import Operator
from hyperattention.validate.runners import ModelRunner, TorchRunner


@dataclass
class Workbench:
    """The active runners of one validation and the model they share."""

    patched: ReplacedModel
    plan: ExportPlan
    exact: TorchRunner
    backend: ModelRunner
    backend_exact: ModelRunner | None
    scorer: TorchRunner  # the plan in PyTorch with the native op, for what a backend that answers the last position cannot say
    operator: Operator
    kernels: Library | None  # None: the plan has no layer for them
    tail: int
    repeats: int  # timed runs after a first one; 0 = every window's own run is the time
    step: Callable[[str], None]

    @property
    def device(self) -> torch.device:
        return self.exact.device


@dataclass(frozen=True)
class Measured:
    """What one length gives to report.json: a row of `approximation` and of `time`, rows of `layers`, `baseline` and `hard_inputs`,
    and `look_ahead`, None but at the longest length."""

    approximation: dict
    time: dict
    layers: list[dict]
    baseline: list[dict]
    hard_inputs: list[dict]
    look_ahead: dict | None


def is_exact(plan: ExportPlan, length: int) -> bool:
    """Whether no layer of the plan approximates where its attention has `length` keys."""
    return all(config.is_exact(length, length) for config in configs(plan.approximate))


def nothing_approximates(plan: ExportPlan, captured: Sequence[Captured]) -> bool:
    """Whether every approximate layer of the plan took its exact path in the calls that were captured."""
    wanted = {layer.index for layer in plan.approximate}
    return all(c.is_exact for c in captured if c.layer in wanted)


def timed(runner: ModelRunner, given: Mapping[str, Tensor], repeats: int) -> list[float]:
    """Seconds of `repeats` further runs, or of the run just done where repeats is 0."""
    if repeats == 0:
        return [runner.seconds]
    seconds = []
    for _ in range(repeats):
        runner.infer(given)
        seconds.append(runner.seconds)
    return seconds


def measure_time(bench: Workbench, given: Mapping[str, Tensor], length: int) -> dict:
    """Time only, for lengths past what the model was trained for: a row of report.json's `time`."""
    row: dict = {"length": length, "backend": bench.backend.backend, "exact_s": None, "torch_exact_s": None, "time_only": True}
    for key, runner in (("ours_s", bench.backend), ("exact_s", bench.backend_exact), ("torch_exact_s", bench.exact)):
        if runner is None:
            continue
        bench.step(f"{length:,} tokens, time only: {runner.name}")
        try:
            runner.infer(given)
            row[key] = median(timed(runner, given, bench.repeats))
        except torch.OutOfMemoryError as error:
            if key != "torch_exact_s":  # PyTorch is the rival here: one that does not fit is left out, and the report shows a dash
                raise
            bench.step(f"{length:,} tokens, time only: PyTorch's exact attention does not fit ({str(error).splitlines()[0]})")
    return {**row, "runs": max(1, bench.repeats)}


def time_row(bench: Workbench, length: int, ours: list[float], exact: float | None, torch_exact: list[float]) -> dict:
    """A row of report.json's `time` at a length whose accuracy was measured; medians, in seconds."""
    return {
        "length": length,
        "backend": bench.backend.backend,
        "ours_s": median(ours),
        "exact_s": exact,
        "torch_exact_s": median(torch_exact),
        "runs": len(ours),
        "time_only": False,
    }


def check_finite(answer: Mapping[str, Tensor], at: str) -> None:
    """Raises UsageError where exact attention itself answers NaN or infinity: there is nothing to compare with then."""
    for name, count in not_finite(answer).items():
        raise UsageError(
            f"the model itself, with exact attention, answers {count} NaN or infinite numbers in output {name} at {at}; its weights or its "
            f"inputs are broken, or its type overflows: mend them, or export with another --dtype"
        )


def not_finite(answer: Mapping[str, Tensor]) -> dict[str, int]:
    """How many numbers of each output are NaN or infinite, where any are."""
    counts = {name: int((~torch.isfinite(value)).sum()) for name, value in answer.items()}
    return {name: count for name, count in counts.items() if count}
