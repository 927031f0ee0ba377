"""What a comparison is shown as, on the console and on the page alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A titled table: column heads (right-aligned where they begin with ">"), rows of cells, and what it says when empty."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    otherwise: str
