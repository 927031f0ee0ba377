"""Everything that is measured on active runners: the implementation first, then every length, then what only some models have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hyperattention.export.gate_options import LANGUAGE, kind_of
from hyperattention.export.plan import ExportPlan
from hyperattention.export.switched import Captured
from hyperattention.validate.approximation import measure_length
from hyperattention.validate.features import measure_features
from hyperattention.validate.feeds import Feed, Material, TextMaterial
from hyperattention.validate.implementation import broken_output, check_length, check_model, check_op, op_cases, seeds_spread
from hyperattention.validate.needle import choose_grid, measure_needle
from hyperattention.validate.runners import TorchRunner
from hyperattention.validate.signature import keys_follow, length_range
from hyperattention.validate.workbench import Measured, Workbench, is_exact, measure_time, nothing_approximates

EXTRA_SEEDS = 4


@dataclass(frozen=True)
class Extent:
    """How much is measured: feeds of each length, further lengths to time, the needle (None: where a GPU makes it cheap), the seed."""

    windows: Mapping[int, int]
    time_lengths: tuple[int, ...] = ()
    needle: bool | None = None
    seed: int = 0


def measure(bench: Workbench, definition: TorchRunner, material: Material, extent: Extent) -> dict:
    """The parts of report.json that are numbers. `definition` runs the plan by the reference; all runners are active.

    Raises UsageError where the model's own exact attention answers no numbers.
    """
    lengths = tuple(extent.windows)
    report: dict = {"implementation": _implementation(bench, definition, material, lengths, extent.seed)}
    report |= {"approximation": [], "time": [], "layers": [], "baseline": [], "hard_inputs": [], "look_ahead": None}
    for length, count in extent.windows.items():
        found = _at_length(bench, material, length, count, hard=length == max(lengths))
        row = found.approximation
        report["approximation"].append(row)
        report["time"].append(found.time)
        report["layers"] += found.layers
        report["baseline"] += found.baseline
        report["hard_inputs"] += found.hard_inputs
        report["look_ahead"] = found.look_ahead or report["look_ahead"]
        broken = [broken_output(name, number, f"{length:,} tokens") for name, number in row["not_finite"].items()]
        report["implementation"]["whole_model"] += broken
    report["time"] += [measure_time(bench, material.stretched(bench.plan, length), length) for length in extent.time_lengths]
    grid = choose_grid(bench.plan, material, lengths, extent.needle, bench.device.type == "cuda")
    report["needle"] = measure_needle(bench, grid, extent.seed)
    return report


def _at_length(bench: Workbench, material: Material, length: int, count: int, hard: bool) -> Measured:
    if kind_of(bench.plan.task) == LANGUAGE:
        assert isinstance(material, TextMaterial)
        return measure_length(bench, material.corpus, length, count, hard)
    return measure_features(bench, material, length, count, hard)


def _implementation(bench: Workbench, definition: TorchRunner, material: Material, lengths: tuple[int, ...], seed: int) -> dict:
    """Both halves, a little above exact_below (at the shortest length where nothing approximates)."""
    length, given, captured = _captured(bench, material, lengths)
    rows, spread = [], []
    if captured and bench.kernels is not None:
        wanted = {layer.index for layer in bench.plan.approximate} or {captured[0].layer}
        chosen = [c for c in captured if c.layer in wanted]
        for case in op_cases(chosen):
            bench.step(f"op against float64: {case}")
            rows.append(check_op(case, bench.kernels))
        bench.step("the layers under other seeds")
        spread = seeds_spread(chosen, bench.kernels, tuple(seed + 1 + i for i in range(EXTRA_SEEDS)))
        del chosen
    del captured
    return {
        "length": length,
        "per_op": rows,
        "seeds": spread,
        "whole_model": check_model(bench.backend, definition, given, length, seed, bench.step),
    }


def _captured(bench: Workbench, material: Material, lengths: tuple[int, ...]) -> tuple[int, Feed, list[Captured]]:
    """A length where something approximates, as short as can be, its feed and the attention calls of exact attention there."""
    found = []
    for length in implementation_lengths(bench.plan, lengths):
        given = material.feeds(bench.plan, length, 1)[0]
        bench.step(f"{length:,} tokens: Q, K, V of every layer")
        with bench.patched.capture() as captured:
            bench.exact.infer(given)
        found.append((length, given, captured))
        if not nothing_approximates(bench.plan, captured):
            return found[-1]
    return found[0]


def implementation_lengths(plan: ExportPlan, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths to try for the implementation, until something approximates: one where the length tells, else all, as a run must."""
    if not keys_follow(plan):
        return lengths
    low, high = length_range(plan)
    shortest = next((n for n in lengths if not is_exact(plan, n)), lengths[0])
    return (min(high, max(low, check_length(plan, shortest))),)
