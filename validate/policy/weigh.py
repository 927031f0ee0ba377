"""Several regimes in one choice: how much the loss of each weighs, so that the worst of them, each by its own measure, is least.

A choice is judged by its worst regime, which is no sum over layers; but every choice that is best by the worst of its regimes is nearly
best by some weighted sum of them, so that a few weights are tried and the choices they lead to compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hyperattention.validate.policy.choose import Choice, Option, fill, frontier, within

STEPS = 10  # of a regime's weight from 0 to 1

Layers = Sequence[Sequence[Option]]


def scales(by_regime: Mapping[str, Layers], limits: Mapping[str, float | None], cap: float) -> dict[str, float]:
    """What 1 stands for in each regime: the loss allowed there; without a limit the least that regime alone could have under `cap`,
    and where that is not limited either, the loss in the middle of its own frontier. Never 0.
    """
    return {regime: _scale(layers, limits[regime], cap) for regime, layers in by_regime.items()}


def _scale(layers: Layers, limit: float | None, cap: float) -> float:
    if limit is None:
        points = frontier(layers)
        at = points[len(points) // 2] if math.isinf(cap) else within(points, cap)
        limit = (at or points[0]).loss
    return max(limit, 1e-12)


def weighed(by_regime: Mapping[str, Layers], scale: Mapping[str, float], cap: float) -> list[list[Option]]:
    """The options of the layers with one loss: the regimes' weighted sum that leads to the least of the worst regime under `cap`,
    or where that is infinite to the least cost at which no regime is over its scale. A loss of min(scale) is about what is allowed.
    """
    found = []
    for weights in _weights(list(by_regime)):
        least = min(scale.values())
        layers = _mixed(by_regime, {regime: weight * least / scale[regime] for regime, weight in weights.items()})
        found.append((_merit(layers, by_regime, scale, cap), layers))
    return min(found, key=lambda pair: pair[0])[1]


def _weights(regimes: Sequence[str]) -> Iterator[dict[str, float]]:
    """Of one regime 1; of two from all on the first to all on the second."""
    if len(regimes) == 1:
        yield {regimes[0]: 1.0}
        return
    for step in range(STEPS + 1):
        yield {regimes[0]: 1 - step / STEPS, regimes[1]: step / STEPS}


def _mixed(by_regime: Mapping[str, Layers], weights: Mapping[str, float]) -> list[list[Option]]:
    each = [by_regime[regime] for regime in weights]
    return [
        [
            replace(options[0], loss=sum(w * o.loss for w, o in zip(weights.values(), options, strict=True)))
            for options in zip(*row, strict=True)
        ]
        for row in zip(*each, strict=True)
    ]


def _merit(layers: Layers, by_regime: Mapping[str, Layers], scale: Mapping[str, float], cap: float) -> float:
    """Infinite where no point keeps to the scales, or to the cap: however cheap its points are, such a weighting leads nowhere."""
    points = frontier(layers)
    if math.isinf(cap):
        return next((point.cost for point in points if _worst(point, by_regime, scale) <= 1), math.inf)
    base = within(points, cap)
    return math.inf if base is None else _worst(fill(base, layers, cap), by_regime, scale)


def _worst(choice: Choice, by_regime: Mapping[str, Layers], scale: Mapping[str, float]) -> float:
    return max(choice.of(layers).loss / scale[regime] for regime, layers in by_regime.items())
