"""Which candidate each layer takes: a knapsack with one choice a layer, along the convex hulls of cost and loss.

A layer's option is (cost, loss). Losses of layers add up to first order: KL is quadratic in the error, and errors of different
layers hardly point the same way. Then every joint choice on the convex hull of the total is made of options on the layers' own
hulls, taken in the order of loss saved per cost, which is what the Lagrangian of the problem says.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A candidate of one layer, by its number: its cost (any unit that adds up) and the loss predicted for it."""

    candidate: int
    cost: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """One option a layer, in the order of the layers."""

    options: tuple[Option, ...]

    @property
    def cost(self) -> float:
        """The sum over the layers."""
        return sum(option.cost for option in self.options)

    @property
    def loss(self) -> float:
        """The sum over the layers."""
        return sum(option.loss for option in self.options)

    @property
    def candidates(self) -> tuple[int, ...]:
        """The candidate of each layer."""
        return tuple(option.candidate for option in self.options)

    def of(self, layers: Sequence[Sequence[Option]]) -> "Choice":
        """The same candidates with the costs and losses of other `layers`, whose options stand in the order of the candidates."""
        return Choice(tuple(options[option.candidate] for options, option in zip(layers, self.options, strict=True)))

    def replaced(self, layer: int, option: Option) -> "Choice":
        """The same with another option for one layer."""
        return Choice((*self.options[:layer], option, *self.options[layer + 1 :]))


def hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull, by rising cost and falling loss; of equal options the one that was named first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss, o.candidate)):
        if kept and option.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-2], option):
            kept.pop()
        kept.append(option)
    return kept


def _slope(a: Option, b: Option) -> float:
    """Loss saved per cost on the way from a to b."""
    return (a.loss - b.loss) / (b.cost - a.cost) if b.cost > a.cost else float("inf")


def frontier(layers: Sequence[Sequence[Option]]) -> list[Choice]:
    """The joint choices on the hull of total cost and loss, from the cheapest to the most accurate; each option list may be any.

    Raises ValueError for a layer without options.
    """
    hulls = [hull(options) for options in layers]
    if not all(hulls):
        raise ValueError("a layer has no options")
    at = [0] * len(hulls)
    points = [Choice(tuple(options[0] for options in hulls))]
    steps = [(-_slope(*options[:2]), layer) for layer, options in enumerate(hulls) if len(options) > 1]
    heapq.heapify(steps)
    while steps:
        _, layer = heapq.heappop(steps)
        at[layer] += 1
        options = hulls[layer]
        points.append(points[-1].replaced(layer, options[at[layer]]))
        if at[layer] + 1 < len(options):
            heapq.heappush(steps, (-_slope(options[at[layer]], options[at[layer] + 1]), layer))
    return points


def fill(choice: Choice, layers: Sequence[Sequence[Option]], cap: float) -> Choice:
    """Spends what `choice` leaves under `cap` on whatever saves most loss, one layer at a time, options off the hull included."""
    while True:
        slack = cap - choice.cost
        better = [
            (now.loss - option.loss, -layer, option)
            for layer, now in enumerate(choice.options)
            for option in layers[layer]
            if option.loss < now.loss and option.cost - now.cost <= slack
        ]
        if not better:
            return choice
        _, layer, option = max(better, key=lambda found: (found[0], found[1], -found[2].cost, -found[2].candidate))
        choice = choice.replaced(-layer, option)


def neighbours(choice: Choice, layers: Sequence[Sequence[Option]], cap: float, count: int) -> list[Choice]:
    """The `count` choices of least loss under `cap` that differ from `choice` in one layer or in two; fewer where there are no more."""
    hulls = [hull(options) for options in layers] if count else []
    found: dict[tuple[int, ...], Choice] = {}
    for one, options in enumerate(hulls):
        for option in options:
            moved = choice.replaced(one, option)
            each = [moved, *(moved.replaced(two, other) for two in range(one + 1, len(hulls)) for other in hulls[two])]
            found |= {new.candidates: new for new in each if new.cost <= cap}
    found.pop(choice.candidates, None)
    return sorted(found.values(), key=lambda new: (new.loss, new.candidates))[:count]


def within(points: Sequence[Choice], cap: float) -> Choice | None:
    """The most accurate point of a `frontier` whose cost is at most `cap`; None where even the cheapest costs more."""
    return next((point for point in reversed(points) if point.cost <= cap), None)
