"""The rules that both selectors of the oracle share: Philox, geometry, draws (docs/operator.md, by number)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hyperattention.config import Config

# --- randomness (10, 14, 15) -----------------------------------------------------------------------------------------


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 10) -> tuple[int, int, int, int]:
    """Philox of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@lru_cache(maxsize=None)
def word(counter: tuple[int, int, int, int], seed: int) -> int:
    return philox4x32(counter, (seed, 0))[0]


def draws(config: Config, total: int, head: int, start: int) -> list[tuple[int, np.float32]]:
    """The residual's samples among `total` candidates: index from 0 and weight (11, 14, 15)."""
    samples = []
    if total <= 0:
        return samples
    count = min(config.sample_size, total) if config.stratified else config.sample_size
    for s in range(count):
        u = word((s, head, start, 0), config.seed)
        if config.stratified:
            low = s * total // count
            size = (s + 1) * total // count - low
            samples.append((low + (u * size >> 32), np.float32(size)))
        else:
            samples.append((u * total >> 32, np.float32(total) / np.float32(config.sample_size)))
    return samples


# --- geometry (1 to 5, 8, 9) -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The query rows of one batch row: where they lie, what is far from them."""

    config: Config
    seq_q: int
    seq_k: int
    length: int  # n_b, clamped

    @property
    def first(self) -> int:
        return self.seq_k - self.seq_q if self.config.causal else 0

    def dead(self, position: int) -> bool:
        return position >= self.length and (bool(self.config.causal) or self.seq_q == self.seq_k)

    def far(self, position: int) -> int:
        c = self.config
        return max(0, position // c.local_size - c.local_overlap) * c.local_size if c.causal else self.length

    def positions(self) -> np.ndarray:
        return self.first + np.arange(self.seq_q)

    def visible(self) -> np.ndarray:
        """Which pairs exact attention holds: bool [Sq, Sk]."""
        key = np.arange(self.seq_k)[None]
        causal = key <= self.positions()[:, None] if self.config.causal else np.ones((self.seq_q, 1), bool)
        return (key < self.length) & causal

    def near(self) -> np.ndarray:
        """Weights of the local keys and the sinks alone: float64 [Sq, Sk] (6 to 9)."""
        key, position = np.arange(self.seq_k)[None], self.positions()
        far = np.array([self.far(p) for p in position])[:, None]
        local = self.visible() & (key >= far) if self.config.causal else np.zeros((self.seq_q, self.seq_k), bool)
        return (local | ((key < self.config.sinks) & (key < far) & (key < self.length))).astype(np.float64)

    def tiles(self, size: int) -> list[int]:
        return sorted({(self.first + i) // size for i in range(self.seq_q)})

    def local_block(self, position: int) -> int:
        """Rows of one local block share their samples (13)."""
        return position // self.config.local_size if self.config.causal else 0

    def local_blocks(self) -> list[int]:
        return sorted({self.local_block(self.first + i) for i in range(self.seq_q)})


def clamped(lengths, batch: int, seq_k: int) -> list[int]:
    return [min(max(int(n), 0), seq_k) for n in ([seq_k] * batch if lengths is None else lengths)]


def is_exact(config: Config, seq_q: int, seq_k: int) -> bool:
    return seq_k <= config.exact_below or seq_q <= 64
