"""What a comparison is shown as, on the console and on the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hyperattention.validate.report_format import exp_nats

LOSS = "delta nats"  # how the name of a loss begins


@dataclass(frozen=True)
class Table:
    """A titled table: column heads (right-aligned where they begin with ">"), rows of cells, and what it says when empty."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    otherwise: str


def under_loss(name: str, pair: Sequence[float | None]) -> list[list[str]]:
    """Under "delta nats" of two folders, in whichever regime, one line of [name, first, second]: our perplexity over exact attention's.

    None under any other number.
    """
    return [[f"exp(delta nats){name.removeprefix(LOSS)}", *map(exp_nats, pair)]] if name.startswith(LOSS) else []
