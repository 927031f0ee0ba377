"""`--fix NAME=VALUE`: attributes of the op that a search leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hyperattention.config import PRESETS, RANGES, Config
from hyperattention.errors import UsageError

DECIDED = ("causal", "scale", "seed")  # by the model and the export


def parse_fixed(given: Sequence[str]) -> dict[str, Any]:
    """`["sinks=128", ...]` as attributes by name.

    Raises UsageError for an unknown name, one given twice, one that the model decides, and a value out of range.
    """
    names, found = [name for name in Config().attributes() if name not in DECIDED], {}
    for text in given:
        name, _, value = (part.strip() for part in text.partition("="))
        if name not in names:
            raise UsageError(f"--fix names {name or text!r}; it takes {', '.join(names)}, such as --fix sinks=128")
        if name in found:
            raise UsageError(f"--fix {name} is given twice; give it once")
        try:
            found[name] = int(value) if name in RANGES else value
        except ValueError:
            raise UsageError(f"--fix is {text!r}; it takes NAME=VALUE with a whole number, such as --fix sinks=128") from None
    Config.from_attributes({**PRESETS["blocks"].attributes(), **found})
    return found
