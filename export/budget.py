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
LONG = {"all": REGIMES[0], "prefill": REGIMES[1]}  # as a user names a regime in a limit
SHORT = {regime: short for short, regime in LONG.items()}
WORDS = {BOTH: " in both regimes", REGIMES[0]: " at all positions", REGIMES[1]: " in prefill, exact decode"}
ACCURACY = ("nats", "kl", "top1", "needle")
COSTS = ("auto", "keys", "time")


def _limit(meaning: str, sense: str, low: float, top: float = math.inf) -> Any:
    return field(default=None, metadata={"meaning": meaning, "sense": sense, "low": low, "top": top})


@dataclass(frozen=True)
class Budget:
    """What a policy may cost; None: not limited. `regime` is one of JUDGED and says where the first four have to hold.

    `named` limits one regime, by name as a user writes it ("prefill.kl"), in the place of what the first four say of it. `cost` is one
    of COSTS: what is saved, keys per query or the time of the op on the device that measures; "auto" is time under `speedup`.
    Raises UsageError for a value out of range, an unknown name, and limits of keys and of time at once.
    """

    nats: float | None = _limit("loss added, mean nats a token", "<=", 0.0)
    kl: float | None = _limit("KL(exact || ours), mean nats a token", "<=", 0.0)
    top1: float | None = _limit("share of equal first choices", ">=", 0.0, 1.0)
    needle: float | None = _limit("share of a planted key's digits recalled", ">=", 0.0, 1.0)
    speedup: float | None = _limit("time of exact attention over ours, measured, sum of the layers", ">=", 1.0)
    keys: float | None = _limit("keys per query, mean of the layers", "<=", 1.0)
    regime: str = BOTH
    named: Mapping[str, float] = field(default_factory=dict)
    cost: str = "auto"

    def __post_init__(self) -> None:
        choice("--budget-regime", self.regime, JUDGED)
        choice("--budget-cost", self.cost, COSTS)
        for name, value in self._given():
            option = _option(name)
            low, top = option["low"], option["top"]
            if not (math.isfinite(value) and low <= value <= top):
                allowed = f"a finite number of at least {low:g}" if math.isinf(top) else f"a number from {low:g} to {top:g}"
                raise UsageError(f"--budget {name} is {value:g}; it takes {allowed}")
        wrong = "keys" if self.unit == "time" else "speedup"
        if getattr(self, wrong) is not None:
            raise UsageError(
                f"--budget {wrong} and a cost in {self.unit} do not go together: give keys= or speedup=, and no other --budget-cost"
            )

    @property
    def unit(self) -> str:
        """What a choice's cost is counted in: "keys" or "time"."""
        return self.cost if self.cost != "auto" else "time" if self.speedup is not None else "keys"

    def limit(self, name: str, regime: str) -> float | None:
        """What `name` (one of ACCURACY) may come to in `regime` (one of REGIMES); None: not limited there."""
        general = getattr(self, name) if self.regime in (BOTH, regime) else None
        return self.named.get(f"{SHORT[regime]}.{name}", general)

    @property
    def regimes(self) -> tuple[str, ...]:
        """The regimes that are weighed: those with a limit; without any those of `regime`."""
        limited = tuple(regime for regime in REGIMES if any(self.limit(name, regime) is not None for name in ACCURACY))
        return limited or (REGIMES if self.regime == BOTH else (self.regime,))

    @property
    def plants(self) -> bool:
        """Whether the recall of planted keys is limited anywhere."""
        return any(self.limit("needle", regime) is not None for regime in REGIMES)

    def cap(self, exact: float) -> float:
        """The most that a choice may cost in `unit`, given what exact attention costs; infinite where that is not limited."""
        if self.speedup is not None:
            return exact / self.speedup
        return math.inf if self.keys is None else self.keys

    def to_json(self) -> dict[str, Any]:
        """The limits that are set, and the regime; the cost where it was named."""
        return {**dict(self._given()), "regime": self.regime, **({} if self.cost == "auto" else {"cost": self.cost})}

    def __str__(self) -> str:
        found, general = [], [name for name in ACCURACY if getattr(self, name) is not None]
        for name, value in self._given():
            regime, _, limit = name.rpartition(".")
            last = general and name == general[-1]
            where = WORDS[LONG[regime]] if regime else WORDS[self.regime] * bool(last)
            found.append(f"{limit} {_option(name)['sense']} {value:g}{where}")
        return ", ".join(found)

    def _given(self) -> list[tuple[str, float]]:
        """Every limit by the name that a user gives it."""
        return [(name, value) for name in LIMITS if (value := getattr(self, name)) is not None] + sorted(self.named.items())


DEFAULT = "nats=0.005"
LIMITS = {option.name: option.metadata for option in fields(Budget) if option.metadata}
NAMES = (*LIMITS, *(f"{short}.{name}" for short in LONG for name in ACCURACY))


def _option(name: str) -> Mapping[str, Any]:
    """Meaning, sense and range of a limit. Raises UsageError for a name that is none."""
    if name not in NAMES:
        raise UsageError(f"--budget names {name!r}; it takes {', '.join(NAMES)}")
    return LIMITS[name.rpartition(".")[2]]


def help_text() -> str:
    """What --help says of --budget."""
    said = "; ".join(f"{name} ({option['meaning']}, {option['sense']})" for name, option in LIMITS.items())
    of_one = f"{' and '.join(f'{short}.' for short in LONG)} before one of the first four limit it in one regime (prefill.kl=0.0004)"
    return f"What the policy may cost, NAME=VALUE, several with commas or repeated: {said}. {of_one}."


def parse_budget(given: Sequence[str], regime: str = BOTH, cost: str = "auto") -> Budget:
    """`["nats=0.005,keys=2400", "prefill.kl=0.0004", ...]` as a Budget; `DEFAULT` where nothing is given.

    Raises UsageError for an unknown name, a name given twice, what is no number, a value out of range, limits that do not go together.
    """
    parts = (part for option in given or (DEFAULT,) for part in option.split(","))
    found = named_values("--budget", parts, NAMES, lambda _, value: float(value), DEFAULT, kind="a number", allowed="it takes")
    return budget_from_json({**found, "regime": regime, "cost": cost})


def budget_from_json(data: Mapping[str, Any]) -> Budget:
    """The inverse of `Budget.to_json`. Raises UsageError or TypeError for anything else."""
    named = {name: value for name, value in data.items() if "." in name}
    return Budget(**{name: value for name, value in data.items() if name not in named}, named=named)
