"""exp(nats): the perplexity of exact attention and of ours, from means of nats a token."""

from __future__ import annotations

import math


def exp(nats: float) -> float:
    """e to the power of a mean of nats a token; infinity where no float holds it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def perplexity(tokens: dict) -> dict[str, float]:
    """{"exact", "ours"} of what `metrics.summarise` gives of one regime, where estimates have a `mean`."""
    exact = tokens["exact_nats"]["mean"]
    return {"exact": exp(exact), "ours": exp(exact + tokens["delta_nats"]["mean"])}
