"""Writes one report three times: report.json holds every number, report.md and report.html say them in order of interest."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from hyperattention.errors import UsageError
from hyperattention.export.budget import budget_from_json
from hyperattention.export.console import jsonable
from hyperattention.export.gate_options import FEATURES, LANGUAGE
from hyperattention.validate.caveats import over_everywhere
from hyperattention.validate.charts import bin_text, charts, hardest_heads, row_histogram
from hyperattention.validate.cost_charts import judged_regime, policy_rows, rival_rows, setting_text, window_rows
from hyperattention.validate.perplexity import perplexity
from hyperattention.validate.report_format import FILTERS

SCHEMA = 4
# What judging or rendering a report of the right schema raises where its inner parts are missing or of another type.
INCOMPLETE = (KeyError, TypeError, AttributeError, IndexError, ValueError, UndefinedError)
_PARTS = {
    **dict.fromkeys(("plan", "plan_summary", "inputs", "implementation", "limits", "verdict", "model", "environment"), dict),
    **dict.fromkeys(("approximation", "time", "layers", "baseline", "hard_inputs", "gates", "provenance", "notes"), list),
}
TEMPLATES = Path(__file__).parent / "templates"


def write(report: dict, folder: Path) -> list[Path]:
    """Writes report.json, report.md and report.html into `folder`; returns them. Whatever fails, no file is half written."""
    texts = {
        "report.json": json.dumps(jsonable(report), indent=1, allow_nan=False) + "\n",
        "report.md": render(report, "report.md.jinja"),
        "report.html": render(report, "report.html.jinja"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / name: folder / f".{name}.partial" for name in texts}
    try:
        for partial, text in zip(files.values(), texts.values(), strict=True):
            partial.write_text(text, encoding="utf-8")
        for file, partial in files.items():
            partial.replace(file)
    finally:
        for partial in files.values():
            partial.unlink(missing_ok=True)
    return list(files)


def read(path: Path) -> dict:
    """A saved report.json. Raises UsageError where it is not one, of another schema, or lacks a part."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give a folder with report/report.json, or the file") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a report: {error}; run `hyperattention validate` again") from error
    found = report.get("schema") if isinstance(report, dict) else None
    if found != SCHEMA:
        newer = isinstance(found, int) and found > SCHEMA
        remedy = "read it with the version of hyperattention that wrote it" if newer else "run `hyperattention validate` again"
        raise UsageError(f"{path} has report schema {found}, this version reads {SCHEMA}: {remedy}")
    lacking = [name for name, kind in _PARTS.items() if not isinstance(report.get(name), kind)]
    lacking += [f"verdict.{name}" for name in ("headline", "speed", "failed") if "verdict" not in lacking and name not in report["verdict"]]
    if report.get("kind") not in (LANGUAGE, FEATURES):
        lacking.append("kind")
    if lacking:
        raise UsageError(f"{path} is incomplete: it lacks {', '.join(lacking)}; run `hyperattention validate` again")
    return _unjson(report)


def render(report: dict, template: str) -> str:
    """The report through one of the templates."""
    html = template.endswith(".html.jinja")
    parts = {"charts": charts(report) if html else {}, "heads": hardest_heads(report)}
    parts |= {"histogram": row_histogram(report), "bin_text": bin_text, "over": over_everywhere(report)}
    policy = report["plan"].get("policy")
    if policy:
        parts |= {
            "policy_rows": policy_rows(report),
            "rival_rows": rival_rows(report),
            "regime": judged_regime(policy),
            "budget": str(budget_from_json(policy["budget"])),
        }
    return templates(html).get_template(template).render(r=report, **parts)


@lru_cache(maxsize=None)
def templates(html: bool) -> Environment:
    """Templates that escape every text: as HTML, or so that it stays within its line of Markdown."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        undefined=StrictUndefined,
        finalize=None if html else _one_line,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update({**FILTERS, "setting": setting_text, "perplexity": perplexity, "window_rows": window_rows})
    return made


def _one_line(value: object) -> object:
    """Markdown: what comes from files stays within its line and its cell, and starts no tag."""
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;") if isinstance(value, str) else value


def _unjson(value: Any) -> Any:
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, dict):
        return {k: _unjson(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unjson(v) for v in value]
    return value
