"""The choice of a policy against exhaustive search, and its walk along the frontier against models whose loss is known."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from hyperattention.export.budget import REGIMES, Budget
from hyperattention.validate.policy.candidates import Candidate, candidates
from hyperattention.validate.policy.choose import Choice, Option, fill, frontier, hull, within
from hyperattention.validate.policy.interpolate import with_interpolation
from hyperattention.validate.policy.sensitivity import Probe, options, probed
from hyperattention.validate.policy.verify import cheapest_that_holds, excess


def drawn(seed: int, layers: int, count: int) -> list[list[Option]]:
    """Random options on a grid that leaves ties of cost and of loss."""
    draw = random.Random(seed)
    return [[Option(i, float(draw.randint(1, 12)), draw.randint(0, 40) / 8) for i in range(count)] for _ in range(layers)]


def joint(layers: Sequence[Sequence[Option]]) -> list[Choice]:
    """Every choice of one option a layer."""
    return [Choice(chosen) for chosen in itertools.product(*layers)]


def below_the_line(a: tuple[float, float], b: tuple[float, float], point: tuple[float, float]) -> bool:
    """Whether `point` lies below the line through a and b by more than rounding."""
    (x0, y0), (x1, y1), (x, y) = a, b, point
    return y < y0 + (y1 - y0) * (x - x0) / (x1 - x0) - 1e-9


@pytest.mark.parametrize("count", [1, 2, 7, 30], ids=str)
@pytest.mark.parametrize("seed", range(5), ids=str)
def test_no_option_lies_below_the_hull(seed: int, count: int) -> None:
    given = drawn(seed, 1, count)[0]
    found = hull(given)
    assert set(found) <= set(given)
    assert found[0].cost == min(o.cost for o in given) and found[-1].loss == min(o.loss for o in given)
    assert [o.cost for o in found] == sorted({o.cost for o in found})
    for a, b in itertools.pairwise(found):
        assert not any(below_the_line((a.cost, a.loss), (b.cost, b.loss), (o.cost, o.loss)) for o in given if a.cost <= o.cost <= b.cost)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (3, 1), (3, 6), (4, 5)], ids=str)
@pytest.mark.parametrize("seed", range(4), ids=str)
def test_no_joint_choice_lies_below_the_frontier(seed: int, shape: tuple[int, int]) -> None:
    layers = drawn(seed, *shape)
    points, every = frontier(layers), joint(layers)
    assert points[0].cost == min(c.cost for c in every)
    assert points[-1].loss == pytest.approx(min(c.loss for c in every))
    for a, b in itertools.pairwise(points):
        assert a.cost < b.cost and a.loss > b.loss
        assert not any(below_the_line((a.cost, a.loss), (b.cost, b.loss), (c.cost, c.loss)) for c in every if a.cost <= c.cost <= b.cost)


@pytest.mark.parametrize("seed", range(6), ids=str)
def test_filling_stays_under_the_cap_and_leaves_nothing_to_gain(seed: int) -> None:
    layers = drawn(seed, 3, 6)
    points = frontier(layers)
    for cap in (points[0].cost, points[0].cost + 2.5, points[-1].cost, math.inf):
        base = within(points, cap)
        assert base is not None and base.cost <= cap
        filled = fill(base, layers, cap)
        assert filled.cost <= cap and filled.loss <= base.loss
        for layer, given in enumerate(layers):
            assert not any(o.loss < filled.options[layer].loss and filled.replaced(layer, o).cost <= cap for o in given)
    assert within(points, points[0].cost - 1) is None


def test_a_layer_without_options_is_refused() -> None:
    with pytest.raises(ValueError, match="no options"):
        frontier([[Option(0, 1, 1)], []])


# --- predictions -------------------------------------------------------------------------------------------------------


def test_a_layer_whose_loss_follows_its_error_is_predicted_exactly() -> None:
    costs, errors = [1.0, 2.0, 3.0, 4.0, 9.0], [0.8, 0.5, 0.1, 0.09, 0.0]
    factor = 0.3
    kinds = [True] * 5
    chosen = probed(costs, errors, kinds, 2)
    assert chosen == [0, 2]  # the ends of the hull without its exact end, to which the fourth lies above the line
    found = options(costs, errors, kinds, [Probe(c, costs[c], errors[c], factor * errors[c]) for c in chosen])
    assert [o.loss for o in found] == pytest.approx([factor * error for error in errors])
    assert [o.candidate for o in found] == [0, 1, 2, 3, 4]


def test_an_options_factor_is_that_of_the_probe_nearest_in_cost() -> None:
    probes = [Probe(0, 100.0, 0.2, 0.2), Probe(2, 1000.0, 0.1, 0.4)]
    costs, errors = [100.0, 120.0, 1000.0, 900.0], [0.2, 0.1, 0.1, 0.05]
    found = options(costs, errors, [True] * 4, probes)
    assert [o.loss for o in found] == pytest.approx([0.2, 0.1, 0.4, 0.2])
    other = options(costs, errors, [False, True, True, False], probes)  # a probe of its own kind, however far, comes first
    assert [o.loss for o in other] == pytest.approx([0.2, 0.4, 0.4, 0.05])


@pytest.mark.parametrize("count", [1, 2, 3, 9], ids=str)
def test_probes_are_different_settings_of_the_hull(count: int) -> None:
    costs, errors = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 0.5, 0.25, 0.9, 0.0]
    chosen = probed(costs, errors, [True] * 5, count)
    assert len(chosen) == len(set(chosen)) == min(count, 3) and set(chosen) <= {0, 1, 2}


def test_a_layer_of_exact_settings_has_no_probe() -> None:
    assert probed([5.0], [0.0], [False], 3) == []


def test_each_kind_of_error_has_a_probe() -> None:
    costs, errors = [1.0, 2.0, 3.0, 1.5, 2.5, 9.0], [1.0, 0.5, 0.25, 3.0, 2.0, 0.0]
    assert probed(costs, errors, [True, True, True, False, False, False], 2) == [0, 2, 4]
    assert probed(costs, errors, [True, False, True, False, False, False], 3) == [0, 1, 2]  # both are there already
    assert probed(costs, errors, [True] * 5 + [False], 2) == [0, 2]  # the only one of the other kind is exact


# --- the budget --------------------------------------------------------------------------------------------------------


def measured(nats: float = 0.0, kl: float = 0.0, top1: float = 1.0, needle: float | None = None) -> dict[str, Any]:
    """What a trial answers; the second regime is perfect."""
    rows = [dict(delta_nats=nats, kl=kl, top1=top1), dict(delta_nats=0.0, kl=0.0, top1=1.0)]
    found: dict[str, Any] = {
        regime: {name: {"mean": value} for name, value in row.items()} for regime, row in zip(REGIMES, rows, strict=True)
    }
    recall = None if needle is None else {"exact": 1.0, REGIMES[0]: needle, REGIMES[1]: 1.0}
    return {**found, "needle": recall}


@dataclass(frozen=True)
class Use:
    """A budget, a measurement and how much of the budget it uses."""

    name: str
    budget: Budget
    found: dict[str, Any]
    use: float

    def __str__(self) -> str:
        return self.name


USES = [
    Use("nats", Budget(nats=0.01), measured(nats=0.005), 0.5),
    Use("better-than-exact", Budget(nats=0.01), measured(nats=-0.005), 0.0),
    Use("worst-limit", Budget(nats=0.01, kl=0.001), measured(nats=0.005, kl=0.003), 3.0),
    Use("top1", Budget(top1=0.98), measured(top1=0.97), 1.5),
    Use("needle", Budget(needle=0.9), measured(needle=0.7), 3.0),
    Use("nothing-allowed-nothing-lost", Budget(kl=0.0), measured(), 0.0),
    Use("nothing-allowed", Budget(kl=0.0), measured(kl=1e-6), math.inf),
    Use("all-of-top1", Budget(top1=1.0), measured(top1=0.999), math.inf),
    Use("nan", Budget(nats=1.0), measured(nats=math.nan), math.inf),
    Use("other-regime", Budget(nats=0.01, regime=REGIMES[1]), measured(nats=1.0), 0.0),
    Use("cost-alone", Budget(keys=100), measured(nats=1.0, kl=1.0), 0.0),
]


@pytest.mark.parametrize("case", USES, ids=str)
def test_the_use_of_a_budget_is_its_worst_limits(case: Use) -> None:
    assert excess(case.budget, case.found) == pytest.approx(case.use)


@pytest.mark.parametrize("scale", [0.05, 0.7, 1.0, 1.6, 30.0], ids=lambda s: f"truth-is-{s}x-the-prediction")
@pytest.mark.parametrize("count", [1, 2, 3, 40, 400], ids=lambda n: f"{n}-points")
def test_the_cheapest_point_that_holds_is_found(count: int, scale: float) -> None:
    points = [Choice((Option(i, 100.0 * 1.02**i, 0.05 * 0.97**i if i < count - 1 else 0.0),)) for i in range(count)]
    budget = Budget(nats=0.01)
    first = next(i for i, point in enumerate(points) if point.loss <= 0.01)
    held, trials = cheapest_that_holds(points, budget, first, 8, lambda choice: measured(nats=scale * choice.loss))
    truth = next(point for point in points if scale * point.loss <= 0.01)
    assert held is not None and scale * held.choice.loss <= 0.01
    assert truth.cost <= held.choice.cost <= 1.25 * truth.cost
    assert len(trials) <= 8 and len({trial.choice.cost for trial in trials}) == len(trials)


def test_a_budget_that_nothing_holds_is_said_with_everything_tried() -> None:
    points = [Choice((Option(i, 1.0 + i, 1.0 / (1 + i)),)) for i in range(5)]
    held, trials = cheapest_that_holds(points, Budget(nats=0.001), 4, 2, lambda choice: measured(nats=choice.loss))
    assert held is None and trials[-1].choice == points[-1]


# --- errors between those that were measured ---------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [{}, {"sample_size": 300}, {"num_blocks": 0}, {"selector": "sortlsh"}, {"pool_size": 4}], ids=str)
@pytest.mark.parametrize("length", [4500, 32768], ids=str)
def test_an_error_that_is_a_power_of_samples_and_blocks_is_known_everywhere(length: int, fixed: dict[str, Any]) -> None:
    given = candidates(length, True, fixed)

    def truth(candidate: Candidate) -> float:
        a = candidate.attributes
        return 0.0 if a is None else 7.0 / (max(0.1, a["sample_size"]) ** 0.9 * max(1, a["num_blocks"]) ** 0.3 * a["local_size"])

    asked: list[int] = []

    def measure(numbers: list[int]) -> list[float]:
        asked.extend(numbers)
        return [truth(given[number]) for number in numbers]

    assert with_interpolation(given, measure) == pytest.approx([truth(candidate) for candidate in given])
    assert len(asked) == len(set(asked)) and (len(asked) < 0.6 * len(given) or fixed or length < 5000)
    assert len(given) - 1 in asked  # exact settings stand between no others


def test_a_neighbour_that_is_exact_leaves_no_error() -> None:
    base = next(c.attributes for c in candidates(32768, True, {"num_blocks": 8, "local_size": 128, "pool_size": 4}) if c.attributes)
    given = [Candidate({**base, "sample_size": size}) for size in (128, 256, 512)]
    assert with_interpolation(given, lambda numbers: [0.0 if n == 2 else 0.5 for n in numbers]) == [0.5, 0.0, 0.0]
