"""What only the first feed of a length is read for, whatever the model: its layers alone, inputs that hurt, look-ahead, the exact twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from torch import Tensor

from hyperattention.config import Config
from hyperattention.export.switched import Captured
from hyperattention.validate.baseline import approximating
from hyperattention.validate.hard_inputs import hard_rows
from hyperattention.validate.layers import layer_rows
from hyperattention.validate.look_ahead_runs import measure_look_ahead
from hyperattention.validate.workbench import Workbench, timed


@dataclass(frozen=True)
class Layers:
    """Rows of report.json's `layers` and `hard_inputs`, its `look_ahead`, and config and keys of the layers that approximate."""

    rows: list[dict] = field(default_factory=list)
    hard_inputs: list[dict] = field(default_factory=list)
    look_ahead: dict | None = None
    approximated: list[tuple[Config, int]] = field(default_factory=list)


def look_at_layers(bench: Workbench, captured: Sequence[Captured], length: int, hard: bool, kind: str, ids: Tensor | None) -> Layers:
    """Each captured layer alone; with `hard` also on inputs that hurt, beside inputs of `kind`, and in the look-ahead test, where a
    language model reads `ids` int [1, S].
    """
    return Layers(
        rows=layer_rows(bench.operator, bench.kernels, captured, length, bench.step),
        hard_inputs=hard_rows(bench.operator, captured, bench.step, kind) if hard else [],
        look_ahead=measure_look_ahead(bench, captured, ids) if hard else None,
        approximated=approximating(captured),
    )


def run_exact_twin(bench: Workbench, given: Mapping[str, Tensor], at: str) -> tuple[dict[str, Tensor], float] | None:
    """What the backend answers with every layer exact, and its seconds; None where there is no such backend."""
    if bench.backend_exact is None:
        return None
    bench.step(f"{at}: exact twin ({bench.backend_exact.backend})")
    return bench.backend_exact.infer(given), median(timed(bench.backend_exact, given, bench.repeats))
