"""Errors of half of the grid, measured, and of the rest, between them.

The squared error of the op falls as a power of the samples and of the heavy blocks: on Q, K, V of the 30 M model at 32k the geometric
mean of its neighbours is within 2 % of a setting's own (256 keys between 128 and 512 samples, 8 between 4 and 16 blocks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hyperattention.validate.policy.candidates import Candidate

BETWEEN = ("num_blocks", "sample_size")  # interpolated in the logarithm of their values, the first between those of the second


def with_interpolation(candidates: Sequence[Candidate], measure: Callable[[list[int]], list[float]]) -> list[float]:
    """The error of every candidate; `measure` answers those of the candidates whose numbers it is given.

    Of the positive values of an attribute that the candidates have, every second but the last is left to its two neighbours, where both are
    candidates with all else equal.
    """
    places = {_key(candidate): number for number, candidate in enumerate(candidates)}
    ranks = {name: _values(candidates, name) for name in BETWEEN}
    neighbours = [_neighbours(candidate, places, ranks) for candidate in candidates]
    wanted = [number for number, pair in enumerate(neighbours) if pair is None]
    found = dict(zip(wanted, measure(wanted), strict=True))

    def error(number: int) -> float:
        pair = neighbours[number]
        if pair is not None and number not in found:
            low, high, share = pair
            found[number] = _between(error(low), error(high), share)
        return found[number]

    return [error(number) for number in range(len(candidates))]


def _key(candidate: Candidate) -> tuple:
    return tuple(sorted((candidate.attributes or {}).items()))


def _values(candidates: Sequence[Candidate], name: str) -> list[int]:
    """The positive values of an attribute of selector `blocks`, ascending."""
    return sorted(
        {c.attributes[name] for c in candidates if c.attributes and c.attributes["selector"] == "blocks" and c.attributes[name] > 0}
    )


def _neighbours(candidate: Candidate, places: dict[tuple, int], ranks: dict[str, list[int]]) -> tuple[int, int, float] | None:
    """Numbers of the candidates below and above, and how far from the first to the second it stands; None: to be measured."""
    attributes = candidate.attributes
    if attributes is None or attributes["selector"] != "blocks":
        return None
    for name, values in ranks.items():
        value = attributes[name]
        rank = values.index(value) if value in values else 0
        if rank % 2 == 0 or rank == len(values) - 1:
            continue
        ends = [places.get(_key(Candidate({**attributes, name: values[rank + side]}))) for side in (-1, 1)]
        if ends[0] is not None and ends[1] is not None:
            low, high = values[rank - 1], values[rank + 1]
            return ends[0], ends[1], math.log(value / low) / math.log(high / low)
    return None


def _between(low: float, high: float, share: float) -> float:
    """Between two errors in their logarithms; 0 where one of them is."""
    return math.exp((1 - share) * math.log(low) + share * math.log(high)) if low > 0 and high > 0 else 0.0
