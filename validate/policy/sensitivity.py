"""What each layer's error does to the model: the loss with this layer alone approximated, at a few candidates, over its squared error.

KL is quadratic in a small error, so one factor a layer carries over to the candidates that were not run through the whole model.
The factor is taken from the probe nearest in cost, because errors of another kind (a coarse window, a noisy sample) weigh differently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hyperattention.validate.policy.choose import Option, hull


@dataclass(frozen=True)
class Probe:
    """A candidate that one layer was run with, alone: its number, cost, squared error of the op, and the loss of the whole model."""

    candidate: int
    cost: float
    error: float
    loss: float

    @property
    def factor(self) -> float:
        """Loss per squared error."""
        return self.loss / self.error if self.error > 0 else 0.0


def probed(costs: Sequence[float], errors: Sequence[float], count: int) -> list[int]:
    """The candidates to probe: at most `count` of those on the layer's hull of cost and squared error, evenly spread, none exact."""
    on_hull = [option.candidate for option in hull([Option(i, *pair) for i, pair in enumerate(zip(costs, errors, strict=True))])]
    worth = [candidate for candidate in on_hull if errors[candidate] > 0]
    count = min(count, len(worth))
    if count == 1:
        return [worth[len(worth) // 2]]
    return [worth[round(i * (len(worth) - 1) / (count - 1))] for i in range(count)]


def options(costs: Sequence[float], errors: Sequence[float], probes: Sequence[Probe]) -> list[Option]:
    """Every candidate of a layer with the loss predicted for it; a probe's own is the one measured. Without probes all must be exact."""
    measured = {probe.candidate: probe.loss for probe in probes}
    return [
        Option(i, cost, measured[i] if i in measured else error and error * _nearest(probes, cost).factor)
        for i, (cost, error) in enumerate(zip(costs, errors, strict=True))
    ]


def _nearest(probes: Sequence[Probe], cost: float) -> Probe:
    return min(probes, key=lambda probe: abs(math.log(probe.cost / cost)))
