"""Walks along the predicted frontier by whole forward passes until the cheapest joint choice that holds the budget is found.

Predictions order the choices; whether one holds is only ever said by measuring it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hyperattention.export.budget import Budget
from hyperattention.validate.policy.choose import Choice
from hyperattention.validate.policy.readings import of_planted, of_text

CLOSE = 0.02  # costs nearer than this are not told apart


@dataclass(frozen=True)
class Trial:
    """A joint choice and what was measured of it (`Laboratory.measure`)."""

    choice: Choice
    measured: dict[str, Any]


def excess(budget: Budget, measured: dict[str, Any]) -> float:
    """The worst limit's use (`Reading.use`), at most 1 where the budget holds: 0 without limits, infinite where NaN is held against one.

    `measured` is what `Laboratory.measure` answers.
    """
    held = (*of_text(budget, measured), *of_planted(budget, measured["needle"] or {}))
    return max((reading.use for reading in held), default=0.0)


def most_accurate(trials: Sequence[Trial], regimes: Sequence[str]) -> Trial:
    """Of some trials that may cost the same, the one whose worst regime is nearest, by the ratio of KL, to the best any has there."""
    least = {regime: max(min(trial.measured[regime]["kl"]["mean"] for trial in trials), 1e-12) for regime in regimes}
    return min(trials, key=lambda trial: max(trial.measured[regime]["kl"]["mean"] / least[regime] for regime in regimes))


def cheapest_that_holds(
    points: Sequence[Choice], budget: Budget, first: int, most: int, measure: Callable[[Choice], dict[str, Any]]
) -> tuple[Trial | None, list[Trial]]:
    """The cheapest of `points` (by rising cost) found to hold `budget`, None where not even the last does, and every trial made.

    Begins at `points[first]`, goes on where the use of the budget says the limit lies, then by halving the range of costs, in at most
    `most` trials; they end early only once something holds.
    """
    low, high, at = -1, len(points), first  # points[low] fails, points[high] holds
    held: Trial | None = None
    trials: list[Trial] = []
    while low + 1 < high and (len(trials) < most or held is None):
        trial = Trial(points[at], measure(points[at]))
        trials.append(trial)
        use = excess(budget, trial.measured)
        if use <= 1:
            high, held = at, trial
            if low >= 0 and points[high].cost - points[low].cost <= CLOSE * points[high].cost:
                break
        else:
            low = at
        at = _next(points, low, high, trial, use, by_use=len(trials) < 3)
    return held, trials


def _next(points: Sequence[Choice], low: int, high: int, trial: Trial, use: float, by_use: bool) -> int:
    """The next point to try, strictly between `low` and `high` (as far as there is one)."""
    wanted = trial.choice.loss / use if by_use and 0 < use < math.inf else None
    if wanted is not None:  # the predicted loss at which the budget would just be used up
        at = next((i for i, point in enumerate(points) if point.loss <= wanted), len(points) - 1)
    else:
        left, right = points[max(low, 0)].cost, points[min(high, len(points) - 1)].cost
        middle = math.sqrt(left * right)
        at = min(range(len(points)), key=lambda i: abs(points[i].cost - middle))
    return min(max(at, low + 1), high - 1)
