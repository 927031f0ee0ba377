"""Held-out text that a model is measured on, checked before anything is made of the model: there, not empty, long enough, and of tokens
that can be had.
"""

from __future__ import annotations

from pathlib import Path

from hyperattention.errors import UsageError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")


def check_text(text: Path, input_ids: str, model: Path) -> None:
    """Raises UsageError where `text` is no file or empty, and where it has to be made into tokens (`input_ids` is not "bytes") and the
    directory `model` holds no tokenizer."""
    if not text.is_file():
        raise UsageError(f"text file {text} does not exist; give a plain text file with --text")
    if not text.read_bytes().strip():
        raise UsageError(f"text file {text} is empty; give held-out plain text with --text")
    if input_ids != "bytes" and not any((model / file).is_file() for file in TOKENIZER_FILES):
        raise UsageError(
            f"{text.name} cannot be made into tokens: {model.name} holds no tokenizer files ({', '.join(TOKENIZER_FILES)}); copy them "
            f"there, export with --input-ids bytes if the model reads bytes, or leave --text out to measure without a verdict"
        )


def check_length(name: str, tokens: int, longest: int) -> None:
    """Raises UsageError where a text of so many tokens has no window of `longest` and the token behind it."""
    if tokens < longest + 1:
        raise UsageError(f"{name} has {tokens} tokens; the longest window needs {longest + 1}: give a longer text or shorter --lengths")
