"""The mask function that goes with the attention function: transformers builds no n x n mask, and padding is not lost.

An attention function whose name has no mask function gets mask = None, and padding vanishes. Ours turns the 2-D padding
mask into lengths; for anything but plain causal attention it returns PyTorch's own 4-D mask.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Iterator

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from hyperattention.errors import UsageError

_DIRECTION = "_hyperattention_causal"  # attribute of the lengths that the mask function hands out
_given: ContextVar[Tensor | None] = ContextVar("given_lengths", default=None)


@contextmanager
def given_lengths(lengths: Tensor) -> Iterator[None]:
    """Inside, the mask function hands out these lengths and does not read the mask again (no synchronisation, a smaller graph)."""
    token = _given.set(lengths.to(torch.int32))
    try:
        yield
    finally:
        _given.reset(token)


def attention_mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Lengths int32 [batch] (None without padding) where the mask is plain causal or full, else a boolean [batch, 1, q, kv].

    `mask_direction` tells the two apart. Raises UsageError for left-padded masks, masks with holes, and caches that hold unused
    keys or have dropped some.
    """
    causal = mask_function is causal_mask_function
    if not causal and mask_function is not bidirectional_mask_function:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
    if causal:
        _check_cache(q_length, kv_length, q_offset, kv_offset)
    if attention_mask is None:
        return None
    if attention_mask.shape[-1] != kv_length:
        raise UsageError(f"attention_mask covers {attention_mask.shape[-1]} keys, the attention has {kv_length}; give one entry a key")
    given = _given.get()
    # An object of its own for each mask: one model may ask for both kinds.
    lengths = lengths_of(attention_mask) if given is None else torch.ops.aten.alias(given)
    setattr(lengths, _DIRECTION, causal)
    return lengths


def mask_direction(mask: Any) -> bool | None:
    """Whether lengths from `attention_mask_function` stand for a causal mask; None for anything else."""
    return getattr(mask, _DIRECTION, None)


def is_lengths(mask: Any) -> bool:
    """Whether this is what `attention_mask_function` gives for a plain mask with padding."""
    return isinstance(mask, Tensor) and mask.dim() == 1 and mask.dtype == torch.int32


def _check_cache(q_length: int, kv_length: int, q_offset: int, kv_offset: int) -> None:
    if isinstance(q_offset, Tensor) or kv_offset + kv_length != q_offset + q_length:
        raise UsageError("the cache is of fixed size (StaticCache), so keys lie behind the last query; use a DynamicCache")
    if isinstance(kv_offset, int) and kv_offset:
        raise UsageError(f"the cache has dropped its first {kv_offset} keys (config.sliding_window), but the layer attends to all of them")


def lengths_of(mask: Tensor) -> Tensor:
    """Valid keys of each row of a right-padded mask [batch, keys]; int32 [batch]. Raises UsageError for any other mask."""
    mask = mask.bool()
    if not torch.compiler.is_compiling() and mask.device.type != "meta":
        bad = (~mask[:, :-1] & mask[:, 1:]).any(-1)
        if bad.any():
            row = int(bad.nonzero()[0])
            kind = "left-padded" if not mask[row, 0] and not (mask[row, :-1] & ~mask[row, 1:]).any() else "not one run of ones"
            raise UsageError(f"row {row} of attention_mask is {kind}; the operator takes right-padded rows: ones, then zeros")
    return mask.sum(-1, dtype=torch.int32)
