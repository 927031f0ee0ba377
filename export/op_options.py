"""The operator's attributes as options of a command: declared once, for every command that takes each by its own name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Optional

import typer

from hyperattention.config import PRESETS, RANGES, SELECTORS
from hyperattention.export.entry import one_of

_PANEL = "Attributes of the op"
_ATTRIBUTES = ("selector", *(name for name in RANGES if name not in ("causal", "seed")))


def _integer(name: str, text: str) -> Any:
    low, high = RANGES[name]
    defaults = ", ".join(f"{preset}: {getattr(PRESETS[preset], name)}" for preset in ("blocks", "paper"))
    help_text = f"{text} {low} to {high}. ({defaults})"
    return typer.Option(f"--{name.replace('_', '-')}", help=help_text, rich_help_panel=_PANEL)


def _switch(name: str, text: str) -> Any:
    return typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel=_PANEL)


Selector = Annotated[
    Optional[str],
    typer.Option(
        autocompletion=one_of(*SELECTORS),
        help="How heavy keys are found: blocks or sortlsh. (default: the preset's)",
        rich_help_panel=_PANEL,
    ),
]
BlockSize = Annotated[Optional[int], _integer("block_size", "Keys of a block.")]
NumBlocks = Annotated[Optional[int], _integer("num_blocks", "Heavy blocks of each query block.")]
PoolSize = Annotated[Optional[int], _integer("pool_size", "Rows averaged for the selection.")]
SampleSize = Annotated[Optional[int], _integer("sample_size", "Sampled keys of the residual.")]
Stratified = Annotated[Optional[int], _integer("stratified", "One sample a slice.")]
LocalSize = Annotated[Optional[int], _integer("local_size", "Keys of a local block.")]
LocalOverlap = Annotated[Optional[int], _integer("local_overlap", "The local block before too.")]
Sinks = Annotated[Optional[int], _integer("sinks", "First keys, always exact.")]
ExactBelow = Annotated[Optional[int], _integer("exact_below", "At most this many keys: exact attention.")]
NumProjections = Annotated[Optional[int], _integer("num_projections", "Hash bits of sortlsh.")]
StrictCausal = Annotated[bool, _switch("strict_causal", "Choose a query block's keys without a look at its rows behind the first.")]
HashCentre = Annotated[bool, _switch("hash_centre", "sortlsh: hash queries and keys less their means.")]


def given(parameters: Mapping[str, Any]) -> dict[str, int | str]:
    """The attributes that the user named among a command's parameters (`typer.Context.params`): numbers and the selector's name."""
    found = {name: parameters[name] for name in _ATTRIBUTES}
    # An absent switch is False; 0 is a value like any other.
    return {name: int(value) if value is True else value for name, value in found.items() if value is not None and value is not False}
