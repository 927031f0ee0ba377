"""`--fix NAME=VALUE`: attributes of the op that a search leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hyperattention.config import PRESETS, RANGES, Config
from hyperattention.export.choices import named_values
from hyperattention.export.policy import DECIDED


def parse_fixed(given: Sequence[str]) -> dict[str, Any]:
    """`["sinks=128", ...]` as attributes by name.

    Raises UsageError for an unknown name, one given twice, one that the model decides, and a value out of range.
    """
    names = [name for name in Config().attributes() if name not in DECIDED]

    def convert(name: str, value: str) -> Any:
        return int(value) if name in RANGES else value

    found = named_values("--fix", given, names, convert, "sinks=128", kind="a whole number", allowed="it takes")
    Config.from_attributes({**PRESETS["blocks"].attributes(), **found})
    return found
