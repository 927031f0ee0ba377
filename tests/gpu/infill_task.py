"""Infilling with far copies: text in which some bytes are hidden, many of them with a second copy far away, before or behind.

A model that attends in both directions can restore a hidden byte of a copy only by finding the other one: what non-causal attention
is for, with a number that says whether it was found.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MASK, VOCABULARY = 256, 257  # bytes, and what stands for a hidden one
COPY, SLOT, PAIR_EVERY = 48, 64, 512  # bytes of one copy, of the room for it, and of text with one pair
_ALPHABET = (string.ascii_letters + string.digits + "+/").encode()
_HIDDEN_IN_COPY, _HIDDEN_IN_TEXT = 0.4, 0.05


@dataclass(frozen=True)
class Batch:
    """`inputs` int64 [B, n] with hidden bytes as MASK, `targets` int64 [B, n]; bool [B, n]: `copied` hidden in a copy, `hidden` all."""

    inputs: Tensor
    targets: Tensor
    copied: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, targets: Tensor, copied: Tensor, hidden: Tensor) -> "Batch":
        """With the hidden bytes of `targets` out of sight."""
        return cls(targets.masked_fill(hidden, MASK), targets, copied, hidden)

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`."""
        return Batch(*(x.to(device) for x in (self.inputs, self.targets, self.copied, self.hidden)))


def training_text(folders: list[Path], limit: int = 2**26, seed: int = 0) -> bytes:
    """Python sources below `folders` in random order, at most `limit` bytes. Raises ValueError where there are hardly any."""
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    random.Random(seed).shuffle(files)
    parts, size = [], 0
    for path in files:
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= limit:
            break
    if size < 2**16:
        raise ValueError(f"{size} bytes of Python sources below {', '.join(map(str, folders))}; give folders with more")
    return b"".join(parts)[:limit]


def pair_places(length: int, draw: random.Random) -> list[tuple[int, int]]:
    """Where the copies of each pair begin: without overlap, at no regular distance, the two at least about a quarter of `length` apart."""
    slots, places = list(range(length // SLOT)), []
    far = max(1, len(slots) // 4)
    draw.shuffle(slots)
    while slots and len(places) < max(1, length // PAIR_EVERY):
        first = slots.pop()
        second = next((slot for slot in slots if abs(slot - first) >= far), None)
        if second is not None:
            slots.remove(second)
            places.append((first * SLOT + draw.randrange(SLOT - COPY + 1), second * SLOT + draw.randrange(SLOT - COPY + 1)))
    return places


def batch(text: bytes, length: int, rows: int, seed: int) -> Batch:
    """`rows` windows of `length` bytes of `text` with planted pairs and hidden bytes; the same for the same seed."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    targets, copied, planted = (torch.zeros(rows, length, dtype=kind) for kind in (torch.int64, torch.bool, torch.bool))
    alphabet = torch.tensor(list(_ALPHABET))
    for row in range(rows):
        start = draw.randrange(len(text) - length + 1)
        targets[row] = torch.frombuffer(bytearray(text[start : start + length]), dtype=torch.uint8)
        for pair in pair_places(length, draw):
            secret = alphabet[torch.randint(len(alphabet), (COPY,), generator=generator)]
            for at in pair:
                targets[row, at : at + COPY] = secret
                planted[row, at : at + COPY] = True
            at = draw.choice(pair)  # the other copy stays whole
            copied[row, at : at + COPY] = torch.rand(COPY, generator=generator) < _HIDDEN_IN_COPY
    hidden = copied | ~planted & (torch.rand(rows, length, generator=generator) < _HIDDEN_IN_TEXT)
    return Batch.of(targets, copied, hidden)
