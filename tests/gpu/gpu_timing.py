"""Times of runs on a GPU, by the clock of `hyperattention bench`: CUDA events, L2 overwritten, the time to launch left out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hyperattention.validate.bench_timing import CudaClock

LONG_MS = 150


@dataclass(frozen=True)
class Turn:
    """`run` enqueues its work on `stream`, or where that is None on PyTorch's current one."""

    run: Callable[[], object]
    stream: torch.cuda.Stream | None = None


def medians_ms(turns: Mapping[str, Turn], budget_ms: float, warm_ups: int = 1) -> dict[str, float]:
    """Median milliseconds by name. All take turns, each waited for, so that a clock that changes meanwhile changes it for all alike.

    As many rounds count as fit `budget_ms` a name, from 3 (2 where one takes LONG_MS) to 30, after `warm_ups` that do not.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    clock, rounds, least, spent = CudaClock(), 0, 3, 0.0
    while rounds < warm_ups + least or (spent < budget_ms * len(turns) and rounds < warm_ups + 30):
        for name, turn in turns.items():
            times[name].append(clock(turn.run, turn.stream)[0] * 1000)
        rounds += 1
        if rounds > warm_ups:
            last = [found[-1] for found in times.values()]
            spent += sum(last)
            least = 2 if max(last) >= LONG_MS else least
    return {name: statistics.median(found[warm_ups:]) for name, found in times.items()}


def median_ms(run: Callable[[], object], budget_ms: float, warm_ups: int = 1) -> float:
    """`medians_ms` of one run on PyTorch's current stream."""
    return medians_ms({"": Turn(run)}, budget_ms, warm_ups)[""]
