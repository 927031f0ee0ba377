"""The budget of an automatic policy as a user names it: `--budget NAME=VALUE`, several with commas or by repeating the option.

Parsed here, so that export-model refuses a wrong one before any work; validate/policy chooses under it (issue 7, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from hyperattention.errors import UsageError
from hyperattention.export.choices import choice, named_values

# Where the accuracy limits have to hold: at all positions, in prefill with exact decode, or in the worse of the two.
BOTH, REGIMES = "both", ("all_positions", "prefill_exact_decode")
JUDGED = (BOTH, *REGIMES)


def _limit(meaning: str, sense: str, low: float, top: float = math.inf) -> Any:
    return field(default=None, metadata={"meaning": meaning, "sense": sense, "low": low, "top": top})


@dataclass(frozen=True)
class Budget:
    """What a policy may cost; None: not limited. `regime` is one of JUDGED and says where the first four have to hold.

    Raises UsageError for a value out of range.
    """

    nats: float | None = _limit("loss added, mean nats a token", "<=", 0.0)
    kl: float | None = _limit("KL(exact || ours), mean nats a token", "<=", 0.0)
    top1: float | None = _limit("share of equal first choices", ">=", 0.0, 1.0)
    needle: float | None = _limit("share of a planted key's digits recalled", ">=", 0.0, 1.0)
    speedup: float | None = _limit("exact attention's keys per query over ours, mean of the layers", ">=", 1.0)
    keys: float | None = _limit("keys per query, mean of the layers", "<=", 1.0)
    regime: str = BOTH

    def __post_init__(self) -> None:
        choice("--budget-regime", self.regime, JUDGED)
        for option in _limits():
            value, low, top = getattr(self, option.name), option.metadata["low"], option.metadata["top"]
            if value is not None and not (math.isfinite(value) and low <= value <= top):
                allowed = f"a finite number of at least {low:g}" if math.isinf(top) else f"a number from {low:g} to {top:g}"
                raise UsageError(f"--budget {option.name} is {value:g}; it takes {allowed}")

    @property
    def regimes(self) -> tuple[str, ...]:
        """The regimes that have to be measured."""
        return REGIMES if self.regime == BOTH else (self.regime,)

    @property
    def limits_accuracy(self) -> bool:
        """Whether anything but the cost is limited."""
        return any(value is not None for value in (self.nats, self.kl, self.top1, self.needle))

    def cap(self, exact_keys: float) -> float:
        """The most keys per query, given those of exact attention; infinite where the cost is not limited."""
        caps = [self.keys, None if self.speedup is None else exact_keys / self.speedup]
        return min((cap for cap in caps if cap is not None), default=math.inf)

    def to_json(self) -> dict[str, Any]:
        """The limits that are set, and the regime."""
        return {**{option.name: value for option in _limits() if (value := getattr(self, option.name)) is not None}, "regime": self.regime}

    def __str__(self) -> str:
        limits = [f"{option.name} {option.metadata['sense']} {value:g}" for option, value in self._given()]
        return (
            ", ".join(limits)
            + {BOTH: " in both regimes", REGIMES[0]: " at all positions", REGIMES[1]: " in prefill, exact decode"}[self.regime]
            * self.limits_accuracy
        )

    def _given(self) -> list[tuple[Any, float]]:
        return [(option, value) for option in _limits() if (value := getattr(self, option.name)) is not None]


DEFAULT = "nats=0.005"


def _limits() -> list[Any]:
    return [option for option in fields(Budget) if option.metadata]


def help_text() -> str:
    """What --help says of --budget."""
    said = "; ".join(f"{option.name} ({option.metadata['meaning']}, {option.metadata['sense']})" for option in _limits())
    return f"What the policy may cost, NAME=VALUE, several with commas or repeated: {said}."


def parse_budget(given: Sequence[str], regime: str = BOTH) -> Budget:
    """`["nats=0.005,speedup=4", ...]` as a Budget; `DEFAULT` where nothing is given.

    Raises UsageError for an unknown name, a name given twice, what is no number, and a value out of range.
    """
    parts = (part for option in given or (DEFAULT,) for part in option.split(","))
    names = [option.name for option in _limits()]
    found = named_values("--budget", parts, names, lambda _, value: float(value), DEFAULT, kind="a number", allowed="it takes")
    return Budget(**found, regime=regime)


def budget_from_json(data: Mapping[str, Any]) -> Budget:
    """The inverse of `Budget.to_json`. Raises UsageError or TypeError for anything else."""
    return Budget(**data)
