"""What a list of run times says: median, spread, and percentiles where there are enough runs for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# A percentile needs runs on both sides of it: the 10th and 90th ten of them, the 99th a hundred.
RUNS_FOR_DECILES, RUNS_FOR_P99 = 10, 100


@dataclass(frozen=True)
class Statistics:
    """Seconds of one contender at one length; a percentile is None where there are too few runs. Interpolated linearly."""

    runs: int
    median_s: float
    mean_s: float
    min_s: float
    max_s: float
    p10_s: float | None
    p90_s: float | None
    p99_s: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Statistics":
        """The statistics of at least one run. Raises ValueError for none, or for a time that is no positive number."""
        times = np.asarray(seconds, dtype=np.float64)
        if not len(times) or not np.isfinite(times).all() or (times <= 0).any():
            raise ValueError(f"run times are {list(seconds)[:5]}; they have to be positive numbers, at least one")
        deciles, high = len(times) >= RUNS_FOR_DECILES, len(times) >= RUNS_FOR_P99
        return cls(
            runs=len(times),
            median_s=float(np.median(times)),
            mean_s=float(times.mean()),
            min_s=float(times.min()),
            max_s=float(times.max()),
            p10_s=float(np.percentile(times, 10)) if deciles else None,
            p90_s=float(np.percentile(times, 90)) if deciles else None,
            p99_s=float(np.percentile(times, 99)) if high else None,
        )


def shared_medians(seconds: Mapping[str, Sequence[float]]) -> tuple[int, dict[str, float]]:
    """How many rounds all of them ran in, and each one's median over those. Who sits out does so for good: they are the first ones.

    What runs on while another sits out does so on a cooler chip, so that medians of all runs would favour it.
    """
    rounds = min(map(len, seconds.values()))
    return rounds, {name: float(np.median(times[:rounds])) for name, times in seconds.items()}


def add_ratios(rows: list[dict[str, Any]], rivals: Sequence[str], against: str | None) -> None:
    """Gives every row `against`: {"name", "ratio", "rounds"}, how many times as fast it was as the rival at the same length in the same
    run, by the medians over the rounds that both ran in.

    The rival is `against`, or without it the one of `rivals` that was fastest over the rounds that they share at that length; None
    where that one was not measured there.
    """
    seconds: dict[int, dict[str, Sequence[float]]] = {}
    for row in rows:
        seconds.setdefault(row["length"], {})[row["contender"]] = row["seconds"]
    for row in rows:
        found, own = seconds[row["length"]], row["contender"]
        there = {name: found[name] for name in (rivals if against is None else [against]) if name in found}
        row["against"] = None
        if there:
            _, medians = shared_medians(there)
            name = min(medians, key=lambda name: medians[name])
            rounds, medians = shared_medians({name: found[name], own: found[own]})
            row["against"] = {"name": name, "ratio": medians[name] / medians[own], "rounds": rounds}


GROWTH_STEP = 8


def growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How each contender's median grew from an eighth of its longest length to that length, where both were timed.

    8 is linear and 64 quadratic: {"contender", "from", "to", "ratio"} in the rows' order.
    """
    medians: dict[str, dict[int, float]] = {}
    for row in rows:
        medians.setdefault(row["contender"], {})[row["length"]] = row["median_s"]
    found = []
    for name, times in medians.items():
        longest = max(times)
        start = longest // GROWTH_STEP
        if start in times and start * GROWTH_STEP == longest:
            found.append({"contender": name, "from": start, "to": longest, "ratio": times[longest] / times[start]})
    return found
