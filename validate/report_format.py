"""Numbers in the report's words: the filters of its templates."""

from __future__ import annotations

import math

from hyperattention.validate.perplexity import exp
from hyperattention.validate.plots import short

NOTHING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits; an exponent only below 0.0001 and from 100,000."""
    if value is None:
        return NOTHING
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.{digits - 1}e}"


def plus_minus(value: dict | None, digits: int = 4, sign: bool = False) -> str:
    """mean ± standard error of an estimate."""
    if value is None:
        return NOTHING
    text = f"{value['mean']:+.{digits}f}" if sign else f"{value['mean']:.{digits}f}"
    return text + (f" ± {value['se']:.{digits}f}" if value["se"] is not None else "")


def small(value: dict | None) -> str:
    """mean ± standard error with two significant digits each, for numbers of any size."""
    if value is None:
        return NOTHING
    return number(value["mean"], 2) + (f" ± {number(value['se'], 2)}" if value["se"] is not None else "")


def percent(value: dict | float | None) -> str:
    """A share, or an estimate of one ± standard error."""
    if value is None:
        return NOTHING
    if not isinstance(value, dict):
        return f"{100 * value:.2f} %"
    return f"{100 * value['mean']:.2f} %" + (f" ± {100 * value['se']:.2f}" if value["se"] is not None else "")


def ends(value: dict | None, digits: int = 3) -> str:
    """Lowest to highest."""
    return NOTHING if value is None else f"{number(value['min'], digits)} to {number(value['max'], digits)}"


def span(value: dict | None, digits: int = 3) -> str:
    """mean (lowest to highest)."""
    if value is None:
        return NOTHING
    return f"{number(value['mean'], digits)} ({ends(value, digits)})"


def estimate(value: dict | float | None, digits: int = 3) -> str:
    """The mean of an estimate, or a plain number."""
    return number(value["mean"] if isinstance(value, dict) else value, digits)


def exp_nats(value: dict | float | None) -> str:
    """e to the power of nats a token, an estimate's mean or a plain number: of delta nats, our perplexity over exact attention's."""
    if value is None:
        return NOTHING
    return number(exp(value["mean"] if isinstance(value, dict) else value), 6)


def seconds(value: float | None) -> str:
    """Three digits with a unit."""
    if value is None:
        return NOTHING
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value / size < 999.5 else f"{value / size:.0f} {unit}"
    return f"{value / 1e-9:.3g} ns"


def count(value: int, one: str, many: str | None = None) -> str:
    """1 window, 2 windows."""
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def layer_list(numbers: list[int]) -> str:
    """Layer numbers with runs drawn together: 0 to 3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs) or "none"


def row_runs(place: dict) -> str:
    """The rows that one change of the look-ahead test moved, as runs of neighbours; an ellipsis where these are not all."""
    runs = place.get("runs")
    if not runs:
        return NOTHING
    told = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in runs]
    return ", ".join([*told, "…"] if sum(last - first + 1 for first, last in runs) < place["moved"] else told)


def most_moved(place: dict, most: int = 4) -> str:
    """Of one change of the look-ahead test the rows that moved most, each with its relative change."""
    return ", ".join(f"{row['row']:,} ({number(row['change'], 2)})" for row in place["rows"][:most]) or NOTHING


FILTERS = {
    "pm": plus_minus,
    "small": small,
    "percent": percent,
    "num": number,
    "ends": ends,
    "span": span,
    "estimate": estimate,
    "exp": exp_nats,
    "seconds": seconds,
    "count": count,
    "layers": layer_list,
    "row_runs": row_runs,
    "most_moved": most_moved,
    "signed": lambda value: f"{value:+.4f}",
    "clamp": lambda value: f"{min(100.0, max(0.0, value)):.1f}",
    "thousands": lambda n: f"{n:,}",
    "thousands0": lambda value: f"{value:,.0f}",
    "short": short,
}
