"""What a list of run times says: median, spread, and percentiles where there are enough runs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

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


def add_ratios(rows: list[dict[str, Any]], rivals: Sequence[str], against: str | None) -> None:
    """Gives every row `against`: {"name", "ratio"}, how many times as fast it was as the rival at the same length in the same run.

    The rival is `against`, or without it the fastest of `rivals` at that length; None where that one was not measured there.
    """
    medians: dict[int, dict[str, float]] = {}
    for row in rows:
        medians.setdefault(row["length"], {})[row["contender"]] = row["median_s"]
    for row in rows:
        found = medians[row["length"]]
        names = [against] if against is not None else sorted(rivals, key=lambda name: found.get(name, np.inf))
        name = names[0] if names and names[0] in found else None
        row["against"] = None if name is None else {"name": name, "ratio": found[name] / row["median_s"]}


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
