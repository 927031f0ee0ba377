"""A budget's limits beside the numbers that they are held against: which number each limit reads, and how much of it that uses up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hyperattention.export.budget import LIMITS, REGIMES, Budget

NUMBERS = {"nats": "delta_nats", "kl": "kl", "top1": "top1"}  # what a limit reads in a regime's row, as `metrics.summarise` writes it
# A reading this far past its limit is kept: logits are fp32, whose relative spacing this is, so that two orders of the same sums differ by
# about as much in nats a token. No limit that says anything is so small, and of shares it is less than one token in eight million.
ROUNDING = 2.0**-23


@dataclass(frozen=True)
class Reading:
    """One of a budget's limits in one of REGIMES and what was measured: a mean, and its standard error where it has one."""

    name: str
    regime: str
    limit: float
    value: float
    se: float | None = None

    @property
    def sense(self) -> str:
        """On which side of the limit the value has to lie, "<=" or ">="."""
        return LIMITS[self.name]["sense"]

    @property
    def use(self) -> float:
        """Measured over allowed, at most 1 where the limit is kept, if only by ROUNDING; of a share, what is missing of 1 over what may be.

        0 for what is better than exact attention. Infinite for NaN, and for a loss where none is allowed.
        """
        lost, allowed = (self.value, self.limit) if self.sense == "<=" else (1 - self.value, 1 - self.limit)
        if math.isnan(lost):
            return math.inf
        kept = lost <= allowed + ROUNDING
        if allowed > 0:
            return max(0.0, min(lost / allowed, 1.0) if kept else lost / allowed)
        return 0.0 if kept else math.inf

    @property
    def kept(self) -> bool:
        """Whether the value is on that side, NaN on neither; the mean alone is asked."""
        return self.use <= 1


def of_text(budget: Budget, measured: Mapping[str, Any]) -> Iterator[Reading]:
    """The limits that hold of every token, regime by regime; `measured` has a row of estimates for each regime that is limited."""
    for regime in REGIMES:
        for name, number in NUMBERS.items():
            limit = budget.limit(name, regime)
            if limit is not None:
                told = measured[regime][number]
                yield Reading(name, regime, limit, told["mean"], told.get("se"))


def of_planted(budget: Budget, recall: Mapping[str, float]) -> Iterator[Reading]:
    """The limits that hold of planted keys; `recall` is the share of their digits that is recalled in each regime that is limited."""
    for regime in REGIMES:
        limit = budget.limit("needle", regime)
        if limit is not None:
            yield Reading("needle", regime, limit, recall[regime])
