"""The comparison of two output folders as a page of its own, in the dress of the report."""

from __future__ import annotations

from typing import Any

from hyperattention.validate.compare_charts import charts
from hyperattention.validate.compare_text import sentences, tables
from hyperattention.validate.report import templates


def page(found: dict[str, Any]) -> str:
    """What `compare_folders.compare` found, as HTML that needs no network."""
    parts = {"sentences": sentences(found), "tables": tables(found), "charts": charts(found)}
    return templates(html=True).get_template("compare.html.jinja").render(c=found, **parts)
