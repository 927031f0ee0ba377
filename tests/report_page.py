"""A rendered report taken apart: its tables, its text and its figures; an error where a tag is closed out of turn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

from hyperattention.validate.report import render


class Page(HTMLParser):
    """The page's tables as rows of cell texts, its visible text and its SVGs; a tag closed out of turn is an error."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text, self.tags = "", []
        self.feed(html)
        self.close()
        assert self.open == []
        self.svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.S)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> out of turn"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, *heads: str) -> list[list[str]]:
        """Rows of the one table whose head holds all of `heads`."""
        found = [t for t in self.tables if all(head in t[0] for head in heads)]
        assert len(found) == 1, f"{len(found)} tables with {heads}"
        return found[0][1:]


def numbers(text: str) -> list[float]:
    """Every number of a cell, in its own unit; milliseconds become seconds and percent shares."""
    scale = 0.01 if "%" in text else 0.001 if " ms" in text else 1.0
    return [scale * float(n) for n in re.findall(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?", text.replace("−", "-").replace(",", ""))]


def page(report: dict) -> Page:
    return Page(render(report, "report.html.jinja"))
