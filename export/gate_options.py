"""The gates as a user names them: `--gate NAME=VALUE`, their defaults, their ranges and the reports they belong to.

They are judged in hyperattention.validate.gates; they are named here so that export-model refuses a wrong one before any work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from hyperattention.errors import UsageError
from hyperattention.export.choices import LANGUAGE_TASKS, named_values

LANGUAGE, FEATURES = "language", "features"


def _gate(default: float | None, meaning: str, sense: str, *kinds: str, top: float = math.inf) -> Any:
    return field(default=default, metadata={"meaning": meaning, "sense": sense, "kinds": kinds or (LANGUAGE, FEATURES), "top": top})


@dataclass(frozen=True)
class Limits:
    """What is allowed, by gate. `hard` and `needle` are advisory, and None, until a user asks for them."""

    delta_nats: float = _gate(0.01, "loss added, nats a token", "<=", LANGUAGE)
    kl: float = _gate(0.005, "KL(exact || ours), nats a token", "<=", LANGUAGE)
    top1: float = _gate(0.98, "share of equal first choices", ">=", LANGUAGE, top=1.0)
    cosine: float = _gate(0.99, "mean cosine of output rows with exact attention's", ">=", FEATURES, top=1.0)
    norm_ratio: float = _gate(0.02, "distance of the outputs' norm ratio from 1", "<=", FEATURES)
    op_error: float = _gate(2.0, "the op's error over plain low precision's", "<=")
    model_error: float = _gate(2.0, "the backend's error over one ulp of noise", "<=")
    hard: float | None = _gate(None, "share of the hard inputs that pass", ">=", top=1.0)
    needle: float | None = _gate(None, "share kept of the planted keys that exact attention recalls", ">=", LANGUAGE, top=1.0)

    def __post_init__(self) -> None:
        for option in fields(self):
            value, top = getattr(self, option.name), option.metadata["top"]
            if value is None and option.default is None:
                continue
            if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= top:
                allowed = "a finite number of at least 0" if math.isinf(top) else f"a number from 0 to {top:g}"
                raise UsageError(f"--gate {_name(option.name)} is {value}; it takes {allowed}")


def _name(attribute: str) -> str:
    return attribute.replace("_", "-")


def kind_of(task: str) -> str:
    """The kind of report that a plan's task gets: "language" has a vocabulary to judge by, "features" has vectors."""
    return LANGUAGE if task in LANGUAGE_TASKS else FEATURES


def names(kind: str | None = None) -> tuple[str, ...]:
    """The gates' names on the command line, of one kind of report or of all."""
    return tuple(_name(f.name) for f in fields(Limits) if kind is None or kind in f.metadata["kinds"])


def help_text() -> str:
    """What --help says of --gate."""
    shown = [_name(f.name) + (f"={f.default:g}" if f.default is not None else " (advisory)") for f in fields(Limits)]
    return f"A limit, NAME=VALUE, repeatable. Defaults: {', '.join(shown)}."


def parse_gates(given: Sequence[str], kind: str | None = None) -> dict[str, float]:
    """`["kl=0.01", ...]` as fields of Limits, without the defaults.

    Raises UsageError for an unknown name, a name given twice, a value out of range, and a gate that a report of `kind` lacks.
    """
    values = named_values("--gate", given, names(), lambda _, value: float(value), "kl=0.01", kind="a number", allowed="the gates are")
    found = {name.replace("-", "_"): value for name, value in values.items()}
    Limits(**found)
    if kind is not None:
        check_kind(found, kind)
    return found


def check_kind(given: dict[str, float], kind: str) -> None:
    """Raises UsageError where a parsed gate has nothing to judge in a report of `kind`."""
    for name in map(_name, given):
        if name not in names(kind):
            raise UsageError(f"--gate {name} does not judge a report of kind {kind}; its gates are {', '.join(names(kind))}")


def with_gates(given: dict[str, float], base: dict[str, Any] | None = None) -> Limits:
    """The limits of a run, or of a saved report's `base`, with those a user gave on top. Raises UsageError for what is no limit."""
    known = {f.name for f in fields(Limits)}
    unknown = set(base or {}) - known
    if unknown:
        raise UsageError(f"the report has limits that this version does not know: {', '.join(sorted(unknown))}; run the validation again")
    return Limits(**{**(base or {}), **given})
