"""Held-out text that a model is measured on, checked before anything is made of the model: there, not empty, of tokens that can be had and
that the model knows, and long enough; and the lengths that it is measured at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperattention.errors import UsageError, one_line

LENGTHS = (8192, 16384, 32768)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")


def default_lengths(low: int, top: int, several: bool = True) -> tuple[int, ...]:
    """The usual lengths within the range; else its end, with `several` also a quarter and a half of it."""
    found = tuple(n for n in LENGTHS if low <= n <= top)
    return found or tuple(sorted({max(low, top // part) for part in ((4, 2, 1) if several else (1,))}))


@dataclass(frozen=True)
class Extent:
    """What stays known of a text once it was read: the name and sha256 of its file, and how many tokens it is."""

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True)
class HeldOut:
    """The tokens of a text, and the sha256 of its file."""

    name: str
    ids: Sequence[int]
    sha256: str

    @property
    def extent(self) -> Extent:
        return Extent(self.name, self.sha256, len(self.ids))


def read_text(text: Path, input_ids: str, model: Path, vocabulary: int, longest: int) -> HeldOut:
    """The text's bytes (`input_ids` is "bytes"), or its tokens by the tokenizer in the directory `model`.

    Raises UsageError where it is no file or empty, cannot be made into tokens, has no window of `longest` and the token behind it, or
    has tokens past the model's `vocabulary`.
    """
    if not text.is_file():
        raise UsageError(f"text file {text} does not exist; give a plain text file with --text")
    data = text.read_bytes()
    if not data.strip():
        raise UsageError(f"text file {text} is empty; give held-out plain text with --text")
    ids = data if input_ids == "bytes" else _tokenize(data, model, text.name)
    if len(ids) < longest + 1:
        raise UsageError(
            f"{text.name} has {len(ids)} tokens; the longest window needs {longest + 1}: give a longer text or shorter --lengths"
        )
    if max(ids) >= vocabulary:
        raise UsageError(f"{text.name} gives token {max(ids)}, the model knows {vocabulary}; does --input-ids fit the model?")
    return HeldOut(text.name, ids, hashlib.sha256(data).hexdigest())


def seen_tokens(text: Extent, policy: Mapping[str, Any] | None, longest: int) -> int:
    """How many of a text's first tokens a policy was chosen on: none where that was another text or there is no policy.

    Raises UsageError where fewer than `longest` + 1 are left behind them.
    """
    seen = (policy or {}).get("calibration", {})
    if seen.get("sha256") != text.sha256:
        return 0
    left = max(0, text.tokens - seen["to"])
    if left < longest + 1:
        raise UsageError(
            f"{text.name}: the policy was chosen on its first {seen['to']:,} tokens, and the {left:,} behind them hold no window of "
            f"{longest:,}; give another text or shorter --lengths"
        )
    return seen["to"]


def _tokenize(data: bytes, model: Path, name: str) -> list[int]:
    """Token ids of a text by the tokenizer in `model`. Raises UsageError where there is none or it cannot be loaded."""
    if not any((model / file).is_file() for file in TOKENIZER_FILES):
        raise UsageError(
            f"{name} cannot be made into tokens: {model.name} holds no tokenizer files ({', '.join(TOKENIZER_FILES)}); copy them "
            f"there, export with --input-ids bytes if the model reads bytes, or leave --text out to measure without a verdict"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # each tokenizer family raises classes of its own for broken or missing files
        raise UsageError(f"the tokenizer of {model.name} cannot be loaded ({one_line(error)}); copy its files again") from error
    return tokenizer(data.decode("utf-8", errors="replace"))["input_ids"]
