"""The time split of one call of the op on a GPU: the stages that make the plan, and the parts of attention.

Launches that make the plan (pool, select; hash, sort) are timed as the device reports them. The parts of attention (local, sinks,
heavy, sampled) share launches, so a part's time is a difference: attention under the same plan with this part and those before it,
less attention with those before it. All runs are interleaved, and times are medians. `merge`, what a row costs that goes from one
launch to the next, is estimated: bytes of O and LSE at the measured copy rate, taken off the part that is in those launches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Protocol

from torch import Tensor

from hyperattention.config import Config
from hyperattention.errors import EnvironmentFault
from hyperattention.geometry import Geometry
from hyperattention.validate.bench_profile_work import (
    EXACT,
    PARTS,
    SELECTION,
    Work,
    attention_work,
    merge_bytes,
    part_launches,
    selection_work,
)
from hyperattention.validate.bench_timing import LEAST_RUNS, Settings

MERGE, REST, TOTAL = "merge", "rest", "total"
KERNELS, DIFFERENCE, ESTIMATE = "kernels", "difference", "estimate"


@dataclass(frozen=True)
class Launch:
    """One activity of the device: a kernel, or a copy or fill. Seconds since an arbitrary moment."""

    name: str
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        return self.stop - self.start

    @property
    def ours(self) -> bool:
        """Whether it is a kernel of this library."""
        return "ha::" in self.name

    @property
    def moves(self) -> bool:
        """Whether it is a copy or fill, which anybody may have asked for."""
        return self.name.startswith(("Memset", "Memcpy"))


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run: a large copy (bytes read plus bytes written), and large matrix products.

    matrix_ops: in the problem's dtype, a second. int8_ops: 8-bit products, None where PyTorch has none here; `text` says how.
    """

    copy_bytes: float
    matrix_ops: float
    int8_ops: float | None
    text: str


class Recorder(Protocol):
    def record(self, calls: Sequence[Callable[[], object]]) -> list[list[Launch]]:
        """Runs the calls in order and returns the launches of each, in order of their start."""
        ...


class Operation(Protocol):
    """The op on inputs that are in place: the plan's stages, attention under a plan, both."""

    geometry: Geometry

    def select(self) -> Tensor: ...
    def attend(self, config: Config, plan: Tensor) -> object: ...
    def forward(self) -> object: ...


def split(op: Operation, recorder: Recorder, ceilings: Ceilings, element: int, settings: Settings) -> dict[str, Any]:
    """The stages of `op` as JSON values: each with its time, its work, the rates reached and the share of the roofline.

    `element` = bytes of one element of Q. Raises EnvironmentFault where the profiler saw no launch of ours.
    """
    g = op.geometry
    choosing, attending = selection_work(g, element), attention_work(g, element)
    plan, chosen = op.select(), set()
    if choosing:
        chosen = {launch.name for launch in recorder.record([op.select])[0]}
    rungs = ladder(g.config, list(attending))
    calls = [op.forward, *(_attend(op, config, plan) for config in rungs.values())]
    runs = _interleaved(recorder, calls, settings)
    whole, partial = runs[0], dict(zip(rungs, runs[1:], strict=True))
    if not all(all(run) for run in runs):
        raise EnvironmentFault("the profiler saw no kernel of HyperAttention; CUPTI has to be usable (no other profiler may be attached)")

    times = {name: 0.0 for name in choosing}
    for launch, spent in _medians(whole):
        if launch in chosen:
            stage = stage_of(launch, g.config)
            times[stage] = times.get(stage, 0.0) + spent
    hows = dict.fromkeys(times, KERNELS)
    before = 0.0
    for name, found in partial.items():
        after = median(sum(launch.seconds for launch in run) for run in found)
        times[name], hows[name], before = after - before, DIFFERENCE if before else KERNELS, after
    works = {**choosing, **attending}
    notes = _other_kernels(partial) + _take_merge(g, element, times, hows, works, ceilings, partial)

    total = median(run[-1].stop - run[0].start for run in whole)
    times[REST], hows[REST] = total - sum(times.values()), DIFFERENCE
    needed = sum((work for name, work in works.items() if name != MERGE), Work())
    rows = [_row(name, spent, total, hows[name], works.get(name, Work()), ceilings) for name, spent in times.items()]
    launches = [{"name": short_name(name), "seconds": spent} for name, spent in _medians(whole)]
    return {
        "runs": len(whole),
        "stages": [*rows, _row(TOTAL, total, total, KERNELS, needed, ceilings)],
        "launches": launches,
        "notes": notes,
    }


def ladder(config: Config, parts: list[str]) -> dict[str, Config]:
    """For each part of attention, in order, the configuration that has this part and those before it; the last has all."""
    if parts == [EXACT] or not parts:
        return dict.fromkeys(parts, config)
    absent = {"sinks": "sinks", "heavy": "num_blocks", "sampled": "sample_size"}
    rungs = {}
    for place, part in enumerate(parts):
        later = [absent[name] for name in parts[place + 1 :]]
        rungs[part] = replace(config, **dict.fromkeys(later, 0))
    return rungs


def stage_of(kernel: str, config: Config) -> str:
    """Which of the selector's two stages a kernel that makes the plan belongs to: by its name the first, or else the second."""
    first, second = SELECTION[config.selector]
    return first if first in _base(kernel) else second


def short_name(kernel: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    return re.sub(r"\(anonymous namespace\)::|\bha::|^void ", "", kernel).split("(")[0].strip()


def _base(kernel: str) -> str:
    return short_name(kernel).split("<")[0]


def _attend(op: Operation, config: Config, plan: Tensor) -> Callable[[], object]:
    # Without blocks to take, `blocks` has a plan of no width; a `sortlsh` plan has the same shape whatever is left out.
    given = plan[..., : config.num_blocks] if config.selector == "blocks" else plan
    return lambda: op.attend(config, given)


def _interleaved(recorder: Recorder, calls: list[Callable[[], object]], settings: Settings) -> list[list[list[Launch]]]:
    """The launches of every call in every round; as many rounds as `settings` allow, but at least three."""
    first = recorder.record(calls)  # warm-up, and how long a round takes
    spent = sum(run[-1].stop - run[0].start for run in first if run)
    rounds = max(LEAST_RUNS, min(settings.repeats, int(settings.max_seconds / spent) if spent else settings.repeats))
    found = recorder.record(calls * rounds)
    return [found[place :: len(calls)] for place in range(len(calls))]


def _medians(runs: list[list[Launch]]) -> list[tuple[str, float]]:
    """Name and median seconds of each launch of a run. Raises EnvironmentFault where the runs did not launch the same."""
    names = [[launch.name for launch in run] for run in runs]
    if any(found != names[0] for found in names):
        raise EnvironmentFault("two runs of the same problem launched different kernels, or the profiler lost some; run it again")
    return [(name, median(run[place].seconds for run in runs)) for place, name in enumerate(names[0])]


def _take_merge(
    g: Geometry,
    element: int,
    times: dict[str, float],
    hows: dict[str, str],
    works: dict[str, Work],
    ceilings: Ceilings,
    partial: dict[str, list[list[Launch]]],
) -> list[str]:
    """Adds the row `merge` and takes its time off the first part that has launches of its own; a note where it is not known."""
    part, moved = next((name for name in ("heavy", "sampled") if name in partial), None), merge_bytes(g, element)
    launches = len(list(partial.values())[-1][0]) if partial else 0
    if not part or not moved or launches == 1:  # one launch keeps what a row has seen in registers
        return []
    if launches < part_launches(g):
        return [f"merge is not estimated: attention took {launches} launches, not one for each of the tree's {part_launches(g)} steps"]
    works[MERGE] = Work(bytes=moved)
    times[MERGE], hows[MERGE] = moved / ceilings.copy_bytes, ESTIMATE
    times[part] -= times[MERGE]
    return []


def _row(name: str, spent: float, total: float, how: str, work: Work, ceilings: Ceilings) -> dict[str, Any]:
    matrix, memory = floors(work, ceilings)
    least = None if matrix is None else max(matrix, memory)
    measured = how != ESTIMATE and spent > 0
    return {
        "stage": name,
        "seconds": spent,
        "share": spent / total,
        "how": how,
        **asdict(work),
        "flop_per_s": work.flops / spent if measured and work.flops else None,
        "int8_op_per_s": work.int8_ops / spent if measured and work.int8_ops else None,
        "bytes_per_s": work.bytes / spent if measured and work.bytes else None,
        "floor_s": least,
        "bound": None if matrix is None or not least else "matrix" if matrix >= memory else "memory",
        "roofline": least / spent if measured and least else None,
    }


def floors(work: Work, ceilings: Ceilings) -> tuple[float | None, float]:
    """Seconds that the matrix units and the memory take at least; None where a ceiling that is needed was not measured."""
    memory = work.bytes / ceilings.copy_bytes
    if work.int8_ops and ceilings.int8_ops is None:
        return None, memory
    return work.flops / ceilings.matrix_ops + (work.int8_ops / ceilings.int8_ops if ceilings.int8_ops else 0.0), memory


def _other_kernels(partial: dict[str, list[list[Launch]]]) -> list[str]:
    """A note for each part that was measured with kernels that the whole of attention does not launch."""
    runs = {name: {short_name(launch.name) for launch in found[0]} for name, found in partial.items()}
    whole = list(runs.values())[-1] if runs else set()
    return [
        f"{name}: measured with {', '.join(sorted(names - whole))}, which the whole op does not launch; the differences compare two kernels"
        for name, names in runs.items()
        if names - whole
    ]


ORDER = (*SELECTION["blocks"], *SELECTION["sortlsh"], EXACT, *PARTS, MERGE, REST)
