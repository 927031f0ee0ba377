"""The settings that a layer may take: a grid over the attributes that trade accuracy for cost, some as in the paper, and exact.

The grid is of selector `blocks`, whose cost and error each attribute moves smoothly. On Q, K, V of the 30 M model at 32k the squared
error of the op halves with every doubling of the samples, far past the preset's 256; a local part above 256 keys buys less than
the same keys as samples; pools of 16 rows choose blocks nearly as well as pools of 4 for a fraction of the cost. Layers that look
nothing up do best without heavy blocks, which then cost no selection either; those that look far back do best without samples, whose
noise is then the larger error, and with many blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from hyperattention.config import PRESETS, Config
from hyperattention.errors import UsageError
from hyperattention.validate.cost import keys_per_query

GRID: dict[str, tuple[Any, ...]] = {
    "local_size": (128, 256, 512),
    "num_blocks": (0, 4, 8, 16, 32, 64),
    "sample_size": (0, 128, 256, 512, 1024, 2048),
    "pool_size": (4, 16),
}
# Of `paper` these move its cost; the released code has 4096 and 1.
PAPER_GRID: dict[str, tuple[Any, ...]] = {"local_size": (512, 2048), "num_blocks": (1, 2), "sinks": (64,), "stratified": (1,)}
# Of exact attention's keys. A key that is chosen costs about three times one of exact attention (H200, 32k: 3.3 ms for 6,982 keys,
# 2.5 ms for all 16,384), so that a layer which needs more is better left exact; at 8k those settings are most of the work of a search.
MOST_KEYS = 0.5


@dataclass(frozen=True)
class Candidate:
    """Attributes on top of a layer's own mask, scale and seed; None: the layer stays exact."""

    attributes: dict[str, Any] | None

    def config(self, layer: Config) -> Config:
        """The node of a layer whose exact node is `layer`."""
        return layer if self.attributes is None else replace(layer, **self.attributes)

    @property
    def samples(self) -> bool:
        """Whether its error is noise of sampling, and not what was left out."""
        return self.attributes is not None and self.attributes["sample_size"] > 0

    def keys(self, layer: Config, length: int) -> float:
        """Keys of a mean query row at `length` tokens (validate/cost.py)."""
        return _keys(replace(self.config(layer), seed=0, scale=0.0), length)

    def __str__(self) -> str:
        if self.attributes is None:
            return "exact"
        default = PRESETS["blocks"].attributes()
        shown = {name: value for name, value in self.attributes.items() if name in GRID or default[name] != value}
        return ", ".join(f"{name} {value}" for name, value in shown.items())


EXACT = Candidate(None)


@lru_cache(maxsize=4096)
def _keys(config: Config, length: int) -> float:
    """Counting visits every query block, and the layers of a model ask the same."""
    return keys_per_query(config, length)


def candidates(length: int, causal: bool, fixed: Mapping[str, Any]) -> list[Candidate]:
    """Every different setting that approximates at `length` keys, then `EXACT`; `fixed` attributes hold for all of them.

    Raises UsageError where no setting under `fixed` approximates at this length, or `fixed` holds a value out of range.
    """
    Config.from_attributes({**PRESETS["blocks"].attributes(), **fixed})
    found: dict[Config, Candidate] = {}
    for attributes in _settings(fixed):
        try:
            config = Config.from_attributes({**attributes, "causal": int(causal)})
        except UsageError:  # two of the grid's values that do not go together, such as a local block smaller than a block
            continue
        if _approximates(config, length):
            found.setdefault(_read(config), Candidate(attributes))
    if not found:
        said = ", ".join(f"{name} {value}" for name, value in fixed.items()) or "the preset"
        exact = fixed.get("exact_below", PRESETS["blocks"].exact_below)
        why = f"up to exact_below, {exact:,}, all are exact" if length <= exact else "none reads few enough of exact attention's keys"
        raise UsageError(
            f"no setting approximates at {length:,} tokens under {said}: {why}; measure at a longer --length, or fix other attributes "
            f"(exact_below, local_size)"
        )
    return [*found.values(), EXACT]


def _settings(fixed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for preset, grid in (("blocks", GRID), ("paper", PAPER_GRID)):
        base = PRESETS[preset].attributes()
        if fixed.get("selector", base["selector"]) != base["selector"]:
            continue
        for values in product(*grid.values()):
            yield _searched({**base, **dict(zip(grid, values, strict=True)), **fixed})


def _searched(attributes: dict[str, Any]) -> dict[str, Any]:
    """Without what the model or the plan decides."""
    return {name: value for name, value in attributes.items() if name not in ("causal", "scale", "seed")}


def _read(config: Config) -> Config:
    """The same with what it does not read at its default: without blocks nothing is pooled, without samples nothing drawn."""
    idle = {"pool_size": 4} if config.num_blocks == 0 and config.selector == "blocks" else {}
    return replace(config, **idle)


def _approximates(config: Config, length: int) -> bool:
    """Whether a setting is worth a look at `length` keys: with at most MOST_KEYS of exact attention's, and most of them not local."""
    if config.is_exact(length, length) or (config.causal and 4 * config.local_size > length):
        return False
    return _keys(config, length) <= MOST_KEYS * _keys(config.exact(), length)
