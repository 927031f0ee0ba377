"""Two tasks for a model that attends in both directions, each with a number that says whether attention found what it looked for.

copies: text in which some bytes are hidden, many of them in one of two far copies of a random string; the other copy stands whole, before
or behind. What neighbours look for lies together. recall: records of a key and a value in random order, every key twice, once with its
value hidden: each row looks for a place of its own, anywhere (associative recall of Arora et al. 2023, "Zoology", without a causal mask).
Batches are made by tensor operations where the text or the generator lies: on a GPU they cost less than a training step.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

MASK, VOCABULARY = 256, 257  # bytes, and what stands for a hidden one
COPY, SLOT, PAIR_EVERY = 48, 64, 512  # bytes of one copy, of the room for it, and of text with one pair at most
KEYS = 2**15  # that records may have
_ALPHABET = (string.ascii_letters + string.digits + "+/").encode()
_HIDDEN_IN_COPY, _HIDDEN_IN_TEXT = 0.4, 0.05


@dataclass(frozen=True)
class Batch:
    """`inputs` int64 [B, n], key * VOCABULARY + byte with hidden bytes as MASK and key 0 in text; `targets` int64 [B, n], the bytes.

    bool [B, n]: `hidden` all hidden bytes, `found` those of them that stand elsewhere too.
    """

    inputs: Tensor
    targets: Tensor
    found: Tensor
    hidden: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`."""
        return Batch(*(x.to(device) for x in (self.inputs, self.targets, self.found, self.hidden)))


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


def as_tensor(text: bytes) -> Tensor:
    """uint8 [len(text)]."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def pair_places(length: int, rows: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where the copies of pairs begin, int64 [rows, P, 2], and which pairs are far enough apart to be taken, bool [rows, P].

    No two overlap, distances are not regular; those taken are at least about a quarter of `length` apart and at most length / PAIR_EVERY.
    """
    slots = length // SLOT
    order = torch.rand(rows, slots, generator=rng, device=rng.device).argsort(-1)
    pairs = order[:, : slots // 2 * 2].unflatten(-1, (-1, 2))
    apart = (pairs[..., 0] - pairs[..., 1]).abs() >= max(1, slots // 4)
    taken = apart & (apart.cumsum(-1) <= max(1, length // PAIR_EVERY))
    return pairs * SLOT + torch.randint(SLOT - COPY + 1, pairs.shape, generator=rng, device=rng.device), taken


def copies(text: Tensor, length: int, rows: int, rng: torch.Generator) -> Batch:
    """`rows` windows of `length` bytes of `text` (uint8, where `rng` draws) with planted pairs and hidden bytes."""
    device = text.device
    start = torch.randint(len(text) - length + 1, (rows, 1), generator=rng, device=device)
    window = text[start + torch.arange(length, device=device)].long()
    places, taken = pair_places(length, rows, rng)
    inside = (*places.shape, COPY)
    secret = as_tensor(_ALPHABET).long().to(device)[torch.randint(64, (rows, places.shape[1], 1, COPY), generator=rng, device=device)]
    first = torch.rand(places.shape[:2], generator=rng, device=device) < 0.5
    spoilt = torch.stack([first, ~first], -1)  # one copy of each pair: the other stays whole
    spoilt = spoilt[..., None] & (torch.rand(inside, generator=rng, device=device) < _HIDDEN_IN_COPY)
    at = (places[..., None] + torch.arange(COPY, device=device)).where(taken[..., None, None], length).flatten(1)

    def plant(into: Tensor, what: Tensor) -> Tensor:
        return pad(into, (0, 1)).scatter(1, at, what.expand(inside).flatten(1))[:, :length]  # a place past the end for pairs not taken

    nowhere = torch.zeros_like(window, dtype=torch.bool)
    targets, found, planted = plant(window, secret), plant(nowhere, spoilt), plant(nowhere, torch.ones_like(spoilt))
    hidden = found | ~planted & (torch.rand(rows, length, generator=rng, device=device) < _HIDDEN_IN_TEXT)
    return Batch(targets.masked_fill(hidden, MASK), targets, found, hidden)


def recall(length: int, rows: int, rng: torch.Generator) -> Batch:
    """`rows` sets of `length` records in random order (of an odd length one has no partner). At most 2 * KEYS of them."""
    device, whole = rng.device, -(-length // 2)
    keys = torch.rand(rows, KEYS, generator=rng, device=device).argsort(-1)[:, :whole]
    values = as_tensor(_ALPHABET).long().to(device)[torch.randint(64, (rows, whole), generator=rng, device=device)]
    order = torch.rand(rows, length, generator=rng, device=device).argsort(-1)
    keys, targets = (torch.cat([x, x], 1)[:, :length].gather(1, order) for x in (keys, values))
    hidden = order >= whole
    return Batch(keys * VOCABULARY + targets.masked_fill(hidden, MASK), targets, hidden, hidden)
