"""Batches of the infilling task from other processes, made while the model computes."""

from __future__ import annotations

import multiprocessing
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType

import numpy as np
import torch
from infill_task import Batch, batch

_text = b""  # in a worker: the text it cuts windows from


def _begin(text: bytes) -> None:
    global _text
    _text = text
    torch.set_num_threads(1)


def _make(length: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A batch as numbers of one byte where that is enough: they travel between processes."""
    made = batch(_text, length, rows, seed)
    return made.targets.to(torch.uint8).numpy(), made.copied.numpy(), made.hidden.numpy()


class Feed:
    """Endless batches of about `tokens` bytes each, the same for the same seed whatever the number of `workers`."""

    def __init__(self, text: bytes, tokens: int, seed: int, workers: int) -> None:
        self.tokens, self.workers, self.length, self.taken = tokens, workers, 0, seed * 1_000_003
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (text,))
        self.waiting: deque[Future] = deque()

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pool.shutdown(cancel_futures=True)

    def take(self, length: int) -> Batch:
        """The next batch, of windows of `length` bytes."""
        if length != self.length:
            self.waiting.clear()
            self.length = length
        while len(self.waiting) < 2 * self.workers:
            number = self.taken + len(self.waiting)
            self.waiting.append(self.pool.submit(_make, length, max(1, self.tokens // length), number))
        self.taken += 1
        targets, copied, hidden = map(torch.from_numpy, self.waiting.popleft().result())
        return Batch.of(targets.long(), copied, hidden)
