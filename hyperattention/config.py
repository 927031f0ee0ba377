"""The operator's attributes: one frozen dataclass, validated once, the same everywhere.

`Config` mirrors `HaAttributes` in plugins/attention.h, the ONNX node's attributes and the
TensorRT plugin's fields, under the same names. docs/operator.md explains each of them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hyperattention.errors import UsageError

DOMAIN = "hyperattention"
OP_TYPE = "HyperAttention"
VERSION = 1
INT32_MAX = 2**31 - 1
# Sq at or below this attends exactly whatever the other attributes say (operator rule 5).
DECODE_ROWS = 64
MOST_HEAD_DIM = 256  # plugins/config.cpp
SELECTORS = ("blocks", "sortlsh")

# Smallest and largest `scale` but 0; both are ordinary fp32 numbers.
SCALES = (1e-20, 1e20)

# name: (smallest, largest) accepted integer.
RANGES: dict[str, tuple[int, int]] = {
    "causal": (0, 1),
    "block_size": (16, 256),
    "num_blocks": (0, 64),
    "pool_size": (1, 256),
    "sample_size": (0, 4096),
    "stratified": (0, 1),
    "local_size": (16, 65536),
    "local_overlap": (0, 1),
    "sinks": (0, 4096),
    "exact_below": (0, INT32_MAX),
    "num_projections": (1, 16),
    "seed": (0, INT32_MAX),
    "strict_causal": (0, 1),
    "hash_centre": (0, 1),
}


@dataclass(frozen=True)
class Config:
    """Attributes of one HyperAttention node; the defaults are the preset `blocks`.

    Raises UsageError, naming the field, the value and the range, for anything out of range.
    """

    causal: int = 1
    scale: float = 0.0  # 0 means 1/sqrt(D)
    selector: str = "blocks"
    block_size: int = 64
    num_blocks: int = 8
    pool_size: int = 4
    sample_size: int = 256
    stratified: int = 1
    local_size: int = 1024
    local_overlap: int = 1
    sinks: int = 64
    exact_below: int = 4096
    num_projections: int = 7
    seed: int = 0
    strict_causal: int = 0
    hash_centre: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool):
                object.__setattr__(self, name, int(value))
            elif not isinstance(value, int):
                raise UsageError(f"{name} is {value!r} ({type(value).__name__}); it takes an integer from {low} to {high}")
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} is {value}; it takes an integer from {low} to {high}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise UsageError(f"scale is {self.scale!r}; it takes a number, 0 for 1/sqrt(head size)")
        low, high = SCALES
        if not (self.scale == 0 or low <= self.scale <= high):
            raise UsageError(f"scale is {self.scale}; it takes 0 for 1/sqrt(head size), or a number from {low} to {high}")
        # Every backend holds it in fp32: the same number everywhere.
        object.__setattr__(self, "scale", struct.unpack("f", struct.pack("f", self.scale))[0])
        if self.selector not in SELECTORS:
            raise UsageError(f"selector is {self.selector!r}; it takes one of {', '.join(SELECTORS)}")
        if self.strict_causal:
            self._check_strict()
        if self.selector == "blocks":
            self._check_blocks()

    def _check_strict(self) -> None:
        if self.selector != "blocks":
            raise UsageError(
                f"strict_causal is 1 with selector {self.selector}, which looks ahead by whole nodes; "
                f"take selector blocks, or strict_causal 0"
            )
        if not self.causal:
            raise UsageError("strict_causal is 1 with causal 0, where every row sees all keys; take causal 1, or strict_causal 0")

    def _check_blocks(self) -> None:
        if self.block_size % self.pool_size:
            raise UsageError(
                f"block_size {self.block_size} is not a multiple of pool_size {self.pool_size}; choose a pool_size that divides it"
            )
        if self.causal and self.local_size % self.block_size:
            raise UsageError(
                f"local_size {self.local_size} is not a multiple of block_size {self.block_size}; the causal selector 'blocks' needs one"
            )

    def is_exact(self, seq_q: int, seq_k: int) -> bool:
        """Whether these lengths take the exact path: by shapes only (operator rule 5)."""
        return seq_k <= self.exact_below or seq_q <= DECODE_ROWS

    def resolved_scale(self, head_dim: int) -> float:
        """The factor on the logits for heads of `head_dim`."""
        return self.scale if self.scale > 0 else 1.0 / math.sqrt(head_dim)

    def exact(self) -> "Config":
        """The same node as plain exact attention at every length (preset `exact`)."""
        return replace(self, exact_below=INT32_MAX)

    def attributes(self) -> dict[str, int | float | str]:
        """Attribute name to value, in declaration order, as ONNX and TensorRT take them."""
        return asdict(self)

    @classmethod
    def from_attributes(cls, attributes: dict[str, int | float | str]) -> "Config":
        """The inverse of `attributes`; unknown names raise UsageError, missing ones take the default."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(attributes) - known)
        if unknown:
            raise UsageError(f"unknown attribute {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**attributes)  # type: ignore[arg-type]


# `paper`: the choices of the paper's released code (Han et al. 2023), with its defects mended (docs/operator.md, rules 24 to 29).
PRESETS: dict[str, Config] = {
    "blocks": Config(),
    "paper": Config(
        selector="sortlsh", block_size=256, num_blocks=1, sample_size=256, stratified=0, local_size=4096, local_overlap=0, sinks=0
    ),
    "exact": Config().exact(),
}


def layer_seed(base: int, layer: int) -> int:
    """The seed of one layer's node (operator rule 12)."""
    return (base + layer) % 2**31


def shared(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Attributes that every row has with the same value: a policy gives each layer its own."""
    first = rows[0] if rows else {}
    return {name: value for name, value in first.items() if all(name in row and row[name] == value for row in rows)}
