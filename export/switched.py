"""What both kinds of replaced models share: the mode they run in, and the attention calls they hand out."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Iterator, Self

from torch import Tensor

from hyperattention import op
from hyperattention.config import Config
from hyperattention.errors import UsageError

MODES = ("plan", "exact")


@dataclass(frozen=True)
class Captured:
    """One attention call: q [B,Hq,Sq,D], k [B,Hkv,Sk,D], v [B,Hkv,Sk,Dv], lengths int32 [B] or None, and the output o [B,Hq,Sq,Dv]."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor | None
    config: Config
    o: Tensor

    @property
    def is_exact(self) -> bool:
        """Whether the operator takes its exact path for this many rows and keys."""
        return self.config.is_exact(self.q.shape[2], self.k.shape[2])


# (q, k, v, config, lengths) -> (o, lse), as hyperattention.op.attention
AttentionCall = Callable[[Tensor, Tensor, Tensor, Config, Tensor | None], tuple[Tensor, Tensor]]


@dataclass
class State:
    """How the attention of one model is computed now, and where its calls are kept."""

    mode: str = "plan"
    attention: AttentionCall = op.attention
    captured: list[Captured] | None = None
    capture_layers: frozenset[int] | None = None

    def keep(self, call: Captured) -> None:
        """Keeps a call where one is asked for."""
        if self.captured is not None and (self.capture_layers is None or call.layer in self.capture_layers):
            self.captured.append(call)


class Switched:
    """Base of a model whose attention follows a plan (`source.ReplacedModel`)."""

    def __init__(self, state: State) -> None:
        self._state = state

    @contextmanager
    def mode(self, name: str, attention: AttentionCall | None = None) -> Iterator[Self]:
        """Inside: "plan" runs the plan's layers by the operator, "exact" every layer by exact attention.

        `attention` computes the operator in place of `hyperattention.op.attention`, for comparing implementations.
        """
        if name not in MODES:
            raise UsageError(f"mode is {name!r}; it takes one of {', '.join(MODES)}")
        before = self._state.mode, self._state.attention
        self._state.mode, self._state.attention = name, attention or op.attention
        try:
            yield self
        finally:
            self._state.mode, self._state.attention = before

    @contextmanager
    def capture(self, layers: frozenset[int] | None = None) -> Iterator[list[Captured]]:
        """Inside: a list that fills with the attention calls of the layers that have a node (or of `layers`, by index)."""
        before = self._state.captured, self._state.capture_layers
        captured: list[Captured] = []
        self._state.captured, self._state.capture_layers = captured, layers
        try:
            yield captured
        finally:
            self._state.captured, self._state.capture_layers = before
