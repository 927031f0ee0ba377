"""Writes one report three times: report.json holds every number, report.md and report.html say them in order of interest."""

from __future__ import annotations

import json
import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from hyperattention.errors import UsageError
from hyperattention.validate.plots import Series, bar_chart, line_chart, short

SCHEMA = 2
# What judging or rendering a report of the right schema raises where its inner parts are missing or of another type.
INCOMPLETE = (KeyError, TypeError, AttributeError, IndexError, ValueError, UndefinedError)
_PARTS = {
    **dict.fromkeys(("plan", "plan_summary", "inputs", "implementation", "limits", "verdict", "model", "environment"), dict),
    **dict.fromkeys(("approximation", "time", "layers", "baseline", "hard_inputs", "gates", "provenance", "notes"), list),
    "kind": str,
}
TEMPLATES = Path(__file__).parent / "templates"


def write(report: dict, folder: Path) -> list[Path]:
    """Writes report.json, report.md and report.html into `folder`; returns them."""
    texts = {
        "report.json": json.dumps(_jsonable(report), indent=1, allow_nan=False) + "\n",
        "report.md": render(report, "report.md.jinja"),
        "report.html": render(report, "report.html.jinja"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def read(path: Path) -> dict:
    """A saved report.json. Raises UsageError where it is not one, of another schema, or lacks a part."""
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give a folder with report/report.json, or the file") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a report: {error}") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        found = report.get("schema") if isinstance(report, dict) else None
        raise UsageError(f"{path} has report schema {found}; this version reads {SCHEMA}: run the validation again")
    lacking = [name for name, kind in _PARTS.items() if not isinstance(report.get(name), kind)]
    lacking += [f"verdict.{name}" for name in ("headline", "speed") if "verdict" not in lacking and name not in report["verdict"]]
    if lacking:
        raise UsageError(f"{path} is incomplete: it lacks {', '.join(lacking)}; run `hyperattention validate` again")
    return _unjson(report)


def render(report: dict, template: str) -> str:
    """The report through one of the templates."""
    html = template.endswith(".html.jinja")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=html, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(FILTERS)
    return environment.get_template(template).render(r=report, charts=charts(report) if html else {})


def charts(report: dict) -> dict[str, str]:
    """The SVG of each chart, by name; empty where there is nothing to draw."""
    rows, limits = report["approximation"], report["limits"]

    def series(key: str) -> list[Series]:
        lines = []
        for regime, name, colour in (("prefill_exact_decode", "prefill, exact decode", 1), ("all_positions", "all positions", 2)):
            found = [(row["length"], row[regime][key]) for row in rows if row[regime]]
            points = [(n, value["mean"]) for n, value in found]
            lines.append(Series(name, points, colour, [value["se"] or 0.0 for _, value in found], regime == "all_positions"))
        return [line for line in lines if line.points]

    times = []
    for key, name, colour in (("ours_s", "ours", 1), ("exact_s", "exact, same backend", 3), ("torch_exact_s", "PyTorch exact", 4)):
        points = [(row["length"], row[key]) for row in report["time"] if row.get(key)]
        times.append(Series(name, points, colour, [], key == "torch_exact_s"))
    longest = rows[-1]
    bars = [(short(b["from"]) if i == 0 else short(b["to"]), b["delta_nats"]) for i, b in enumerate(longest["by_position"])]
    return {
        "nats": line_chart(
            "Loss added against exact attention, by length", series("delta_nats"), "delta nats", limit=limits["delta_nats"]
        ),
        "kl": line_chart("KL divergence from exact attention, by length", series("kl"), "KL, nats", True, limits["kl"]),
        "time": line_chart("Time of one forward pass, by length", [t for t in times if t.points], "seconds", True),
        "position": bar_chart(f"Loss added by position, all positions, {longest['length']:,} tokens", bars, "delta nats"),
    }


def _pm(value: dict | None, digits: int = 4, sign: bool = False) -> str:
    """mean ± standard error of an estimate."""
    if value is None:
        return "–"
    text = f"{value['mean']:+.{digits}f}" if sign else f"{value['mean']:.{digits}f}"
    return text + (f" ± {value['se']:.{digits}f}" if value["se"] is not None else "")


def _small(value: dict | None) -> str:
    """mean ± standard error with two significant digits each, for numbers of any size."""
    if value is None:
        return "–"
    return _number(value["mean"], 2) + (f" ± {_number(value['se'], 2)}" if value["se"] is not None else "")


def _percent(value: dict | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value['mean']:.2f} %" + (f" ± {100 * value['se']:.2f}" if value["se"] is not None else "")


def _number(value: float | None, digits: int = 3) -> str:
    """Significant digits; an exponent only below 0.0001 and from 100,000."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.{digits - 1}e}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


FILTERS = {
    "pm": _pm,
    "small": _small,
    "percent": _percent,
    "num": _number,
    "seconds": _seconds,
    "signed": lambda value: f"{value:+.4f}",
    "clamp": lambda value: f"{min(100.0, max(0.0, value)):.1f}",
    "thousands": lambda n: f"{n:,}",
    "short": short,
    "layers": lambda numbers: ", ".join(str(n) for n in numbers) or "none",
}


def _jsonable(value: object) -> object:
    """NaN and infinities as strings: JSON has none, and a failed number must survive."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value


def _unjson(value: object):
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, dict):
        return {k: _unjson(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unjson(v) for v in value]
    return value
