"""What each layer's error does to the model: the loss with this layer alone approximated, at a few candidates, over its squared error.

KL is quadratic in a small error, so one factor a layer carries over to the candidates that were not run through the whole model.
The noise of samples and what a setting leaves out weigh differently, so each of the two kinds has its own probes; of those the one
nearest in cost counts.
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


def probed(costs: Sequence[float], errors: Sequence[float], kinds: Sequence[bool], count: int) -> list[int]:
    """The candidates to probe: at most `count` of those on the layer's hull of cost and squared error, evenly spread, none exact.

    Where these are all of one of the `kinds`, the middle of the other kind's own hull too.
    """
    worth = _on_hull(costs, errors, range(len(costs)))
    count = min(count, len(worth))
    chosen = [worth[len(worth) // 2]] if count == 1 else [worth[round(i * (len(worth) - 1) / (count - 1))] for i in range(count)]
    found = {kinds[candidate] for candidate in chosen}
    missing = _on_hull(costs, errors, [i for i, kind in enumerate(kinds) if kind not in found]) if len(found) == 1 else []
    return [*chosen, *missing[len(missing) // 2 :][:1]]


def _on_hull(costs: Sequence[float], errors: Sequence[float], among: Sequence[int]) -> list[int]:
    """Those `among` the candidates on their hull of cost and squared error, by rising cost, without exact ones."""
    return [option.candidate for option in hull([Option(i, costs[i], errors[i]) for i in among]) if option.loss > 0]


def options(costs: Sequence[float], errors: Sequence[float], kinds: Sequence[bool], probes: Sequence[Probe]) -> list[Option]:
    """Every candidate of a layer with the loss predicted for it; a probe's own is the one measured. Without probes all must be exact."""
    measured = {probe.candidate: probe.loss for probe in probes}
    return [
        Option(i, cost, measured[i] if i in measured else error and error * _nearest(probes, cost, kinds, kinds[i]).factor)
        for i, (cost, error) in enumerate(zip(costs, errors, strict=True))
    ]


def _nearest(probes: Sequence[Probe], cost: float, kinds: Sequence[bool], kind: bool) -> Probe:
    alike = [probe for probe in probes if kinds[probe.candidate] == kind]
    return min(alike or probes, key=lambda probe: abs(math.log(probe.cost / cost)))
