"""The part of a text that a policy is chosen on, and the rest, on which it may be judged: two pieces that share no token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hyperattention.errors import UsageError
from hyperattention.export.held_out import Extent, seen_tokens
from hyperattention.validate.inputs import Corpus

SHARE = 4  # one token in so many is for calibration, more where its windows need more, at most half


def calibration_part(corpus: Corpus, needed: int) -> Corpus:
    """The first quarter of a corpus, or its first `needed` tokens where that is more. Raises UsageError where that is over half."""
    total = len(corpus.ids)
    stop = max(total // SHARE, needed)
    if stop > total // 2:
        raise UsageError(
            f"{corpus.name} has {total:,} tokens; calibration needs {needed:,}, and may have half of them, so that the rest can judge: "
            f"give a longer text, a shorter --length or fewer --windows (--budget needle sets a least number)"
        )
    return replace(corpus, ids=corpus.ids[:stop])


def describe_part(part: Corpus) -> dict[str, Any]:
    """For policy.json; sha256 is the whole file's."""
    return {"name": part.name, "sha256": part.sha256, "tokens": part.tokens, "from": 0, "to": len(part.ids)}


def unseen_part(corpus: Corpus, policy: Mapping[str, Any] | None, needed: int) -> Corpus:
    """What of `corpus` a plan's policy was not chosen on: all of it, where that was another text or there is no policy.

    Raises UsageError where fewer than `needed` + 1 tokens are left, the longest window.
    """
    seen = seen_tokens(Extent(corpus.name, corpus.sha256, len(corpus.ids)), policy, needed)
    if not seen:
        return corpus
    note = (
        f"The policy was chosen on the first {seen:,} tokens of {corpus.name}; every window measured here lies behind them, and its "
        f"start is counted from there."
    )
    return replace(corpus, ids=corpus.ids[seen:], note=" ".join(filter(None, (corpus.note, note))))
