"""The search for a policy: a joint choice under the budget, weighed in every regime that it limits, proved by whole forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from hyperattention.config import Config
from hyperattention.errors import AccuracyFailed, UsageError
from hyperattention.export.budget import REGIMES, Budget
from hyperattention.validate.configs import configs
from hyperattention.validate.policy.candidates import Candidate
from hyperattention.validate.policy.choose import Choice, Option, fill, frontier, neighbours, within
from hyperattention.validate.policy.options import Measurements
from hyperattention.validate.policy.probe import PLANTED, TEXT
from hyperattention.validate.policy.readings import of_planted
from hyperattention.validate.policy.store import Store
from hyperattention.validate.policy.trial import Laboratory
from hyperattention.validate.policy.verify import Trial, cheapest_that_holds, excess, most_accurate
from hyperattention.validate.policy.weigh import scales, weighed

FIXED_RIVALS = 2  # settings that all layers share, measured beside the choice
# With a budget for planted keys: what the KL of their digits weighs beside the text's, tried one after the other until enough are recalled.
NEEDLE_WEIGHTS = (0.0, 0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Effort:
    """`rounds`: how often the settings of a choice are probed and the choice made anew. `moves`: choices beside it that are run whole.
    `trials`: along the frontier, at most, where no cost is given."""

    rounds: int
    moves: int
    trials: int


EFFORT = {"cuda": Effort(3, 6, 8), "cpu": Effort(0, 0, 6)}


@dataclass(frozen=True)
class Found:
    """The chosen trial, the predicted frontier, the settings that all layers share as far as they were measured.

    `rounding` is what exact attention by our kernels loses in the model's half type (`Laboratory.rounding`), None in fp32. `times` are
    milliseconds of all layers' attention, exact and as chosen, None where the cost is in keys. `options`: of each layer, by candidate.
    """

    trial: Trial
    points: list[Choice]
    fixed: list[tuple[int, Trial]]
    rounding: dict[str, Any] | None
    times: dict[str, float] | None
    options: list[list[Option]]


@dataclass
class Search:
    """One search over a laboratory's model. `candidates` are the same for every layer, the last one exact; `weights` sum to 1."""

    lab: Laboratory
    budget: Budget
    candidates: Sequence[Candidate]
    probes: int
    weights: Sequence[float]
    store: Store
    step: Callable[[str], None]

    @cached_property
    def layers(self) -> list[tuple[int, Config]]:
        """Index and exact config of every layer that the operator can replace."""
        planned = self.lab.patched.plan.planned
        return [(layer.index, config.exact()) for layer, config in zip(planned, configs(planned), strict=True)]

    @property
    def length(self) -> int:
        """Tokens of a calibration window."""
        return self.lab.windows[0].length

    @cached_property
    def exact_keys(self) -> float:
        """Keys of a mean query row of exact attention."""
        return self.candidates[-1].keys(self.layers[0][1], self.length)

    @cached_property
    def layer_keys(self) -> list[list[float]]:
        """Keys of a mean query row of each layer under each candidate."""
        return [[candidate.keys(layer, self.length) for candidate in self.candidates] for _, layer in self.layers]

    @cached_property
    def _keys(self) -> list[list[float]]:
        """The same as shares of the model's mean."""
        return [[weight * k for k in row] for weight, row in zip(self.weights, self.layer_keys, strict=True)]

    def keys(self, choice: Choice) -> float:
        """Keys of a mean query row of the whole model."""
        return sum(row[candidate] for row, candidate in zip(self._keys, choice.candidates, strict=True))

    @cached_property
    def measurements(self) -> Measurements:
        """Of every layer, made as they are asked for."""
        return Measurements(
            self.lab, self.budget.regimes, self.layers, self.candidates, self._keys, self.probes, self.store, lambda text: self.step(text)
        )

    @cached_property
    def _costs(self) -> list[list[float]]:
        """Each layer's cost under each candidate in the budget's unit."""
        return self._keys if self.budget.unit == "keys" else self.measurements.times

    def run(self) -> Found:
        """The cheapest choice that holds the budget; where the budget caps the cost, the most accurate one under the cap that holds it.

        Raises AccuracyFailed, saying the best that was found, where no choice does, and before any is looked for where exact attention
        itself recalls fewer planted keys than the budget asks; UsageError where every setting is over the cap.
        """
        self._check_recall()
        self.measurements.read(self.budget.unit == "time")
        cap = self.budget.cap(sum(row[-1] for row in self._costs))
        least = sum(min(row) for row in self._costs)
        if least > cap:
            unit = "keys a query" if self.budget.unit == "keys" else "ms of attention"
            raise UsageError(
                f"--budget {self.budget}: the cheapest setting has {least:,.4g} {unit} at {self.length:,} tokens, over the "
                f"{cap:,.4g} allowed; allow more, or measure at a longer --length"
            )
        layers = self._weighed(cap)
        rounding = self._rounding()
        if math.isinf(cap):
            planted = self._with_planted(layers, NEEDLE_WEIGHTS[2]) if self.budget.plants else layers
            held = self._that_holds(self._up_to_exact(frontier(planted)), self._scale(cap))
            fixed = self._rivals(layers, held.choice.cost)
            trials = [held, *(trial for _, trial in fixed if self._holds(trial) and trial.choice.cost < held.choice.cost)]
            trial = min(trials, key=lambda trial: trial.choice.cost)
        else:
            fixed = self._rivals(layers, cap)
            trials = [*self._under(cap, layers), *(trial for _, trial in fixed)]
            holding = [trial for trial in trials if self._holds(trial)]
            if not holding:
                raise self._unreached(trials)
            trial = most_accurate(holding, self.budget.regimes)
        return self._found(trial, fixed, rounding)

    def _check_recall(self) -> None:
        """Raises AccuracyFailed where exact attention recalls too few planted keys: what holds the budget then would do so by chance."""
        if not self.budget.plants:
            return
        self.step("planted keys by exact attention")
        exact: float = self.store.get("recall", self._windows, self.lab.recall)
        failed = next((held for held in of_planted(self.budget, dict.fromkeys(REGIMES, exact)) if not held.kept), None)
        if failed is not None:
            raise AccuracyFailed(
                f"the budget {self.budget} is not reached: exact attention itself recalls {exact:.3f} of the digits planted in "
                f"{len(self.lab.windows)} windows of {self.length:,} tokens, and needle is to be {failed.limit:g}; ask for no more than "
                f"the model recalls, or measure at a shorter --length",
                {"best": {"needle": {"exact": exact}}, "keys": self.exact_keys, "rounding": None},
            )

    def _found(self, trial: Trial, fixed: list[tuple[int, Trial]], rounding: dict[str, Any] | None) -> Found:
        """In keys, and with the losses predicted for the first of the regimes, which a reader is told."""
        told = self.measurements.options(TEXT, self._keys)[self.budget.regimes[0]]
        times = None if self.budget.unit == "keys" else {"exact_ms": sum(row[-1] for row in self._costs), "ms": trial.choice.cost}
        said = [(c, replace(rival, choice=rival.choice.of(told))) for c, rival in fixed]
        return Found(replace(trial, choice=trial.choice.of(told)), frontier(told), said, rounding, times, told)

    # --- the choice --------------------------------------------------------------------------------------------------

    def _text(self) -> dict[str, list[list[Option]]]:
        return self.measurements.options(TEXT, self._costs)

    def _scale(self, cap: float) -> dict[str, float]:
        """Of each regime, the KL that is allowed there as far as it can be predicted; nats that are added are about as many."""
        limits = {}
        for regime in self.budget.regimes:
            given = [limit for name in ("nats", "kl") if (limit := self.budget.limit(name, regime)) is not None]
            limits[regime] = min(given, default=None)
        return scales(self._text(), limits, cap)

    def _weighed(self, cap: float) -> list[list[Option]]:
        """The options with one loss for all regimes, once what the best choice takes was probed."""
        layers = weighed(self._text(), self._scale(cap), cap)
        for _ in range(self._effort.rounds):
            chosen = self._best(layers, cap)
            if not self.measurements.probe(enumerate(chosen.candidates)):
                break
            layers = weighed(self._text(), self._scale(cap), cap)
        return layers

    def _best(self, layers: Sequence[Sequence[Option]], cap: float) -> Choice:
        points = frontier(layers)
        if math.isinf(cap):
            wanted = min(self._scale(cap).values())
            return next((point for point in points if point.loss <= wanted), points[-1])
        base = within(points, cap)
        assert base is not None, "the cheapest settings are under the cap"
        return fill(base, layers, cap)

    def _with_planted(self, layers: Sequence[Sequence[Option]], weight: float) -> list[list[Option]]:
        """The options with `weight` times the loss of planted keys, mean of the regimes, on top."""
        each = list(self.measurements.options(PLANTED, self._costs).values())
        planted = [[sum(o.loss for o in options) / len(each) for options in zip(*rows, strict=True)] for rows in zip(*each, strict=True)]
        return [
            [replace(option, loss=option.loss + weight * lost) for option, lost in zip(options, losses, strict=True)]
            for options, losses in zip(layers, planted, strict=True)
        ]

    def _under(self, cap: float, layers: Sequence[Sequence[Option]]) -> Iterator[Trial]:
        """The best choice under the cap and those beside it, then those that give planted keys more weight, until enough are recalled."""
        tried: set[tuple[int, ...]] = set()
        for weight in NEEDLE_WEIGHTS if self.budget.plants else NEEDLE_WEIGHTS[:1]:
            given = self._with_planted(layers, weight) if weight else layers
            best, held = self._best(given, cap), False
            for choice in (best, *neighbours(best, given, cap, self._effort.moves)):
                if choice.candidates not in tried:
                    tried.add(choice.candidates)
                    trial = self._trial_of(choice)
                    held |= self._holds(trial)
                    yield trial
            if held:
                return

    def _holds(self, trial: Trial) -> bool:
        return excess(self.budget, trial.measured) <= 1

    def _up_to_exact(self, points: list[Choice]) -> list[Choice]:
        """A frontier that ends with exact attention in every layer, which holds whatever loss is allowed.

        A regime in which some layer loses nothing under any setting leaves that layer at its cheapest; the other regime may need it exact.
        """
        exact = len(self.candidates) - 1
        last = Choice(tuple(Option(exact, row[exact], 0.0) for row in self._costs))
        return [*points, last] if last.cost > points[-1].cost else points

    def _that_holds(self, points: list[Choice], scale: Mapping[str, float]) -> Trial:
        wanted = min(scale.values())
        first = next((i for i, point in enumerate(points) if point.loss <= wanted), len(points) - 1)
        held, trials = cheapest_that_holds(points, self.budget, first, self._effort.trials, self.measured)
        if held is None:
            raise self._unreached(trials)
        return held

    def _unreached(self, trials: Sequence[Trial]) -> AccuracyFailed:
        """Says what the trial that comes nearest to the budget gave, and what of it rounding alone would."""
        best = min(trials, key=lambda trial: excess(self.budget, trial.measured))
        rows = [_said(regime, best.measured[regime]) for regime in self.budget.regimes]
        needle = best.measured["needle"]
        rows += [f"needle {min(needle[r] for r in self.budget.regimes):.3f} (exact attention {needle['exact']:.3f})"] if needle else []
        rounding = self._rounding()
        floor = [_said(regime, rounding[regime]) for regime in self.budget.regimes] if rounding else []
        message = (
            f"the budget {self.budget} is not reached: the best found has {self.keys(best.choice):,.0f} keys a query and gives "
            f"{'; '.join(rows)}. "
            + (
                f"Exact attention by another kernel gives {'; '.join(floor)}: less than that no policy has in this --dtype. "
                if floor
                else ""
            )
            + "Allow more loss or more keys"
        )
        return AccuracyFailed(message, {"best": best.measured, "keys": self.keys(best.choice), "rounding": rounding})

    # --- whole models ------------------------------------------------------------------------------------------------

    @property
    def _effort(self) -> Effort:
        return EFFORT[self.lab.device.type]

    def _rounding(self) -> dict[str, Any] | None:
        """What rounding alone loses; in fp32, where nothing of it shows, None."""
        if next(self.lab.patched.model.parameters()).dtype == torch.float32:
            return None
        return self.store.get("rounding", self._windows, lambda: self.lab.rounding(REGIMES))

    @property
    def _windows(self) -> dict[str, list[str]]:
        """What is read, as a store is told it; which keys are planted there is said by the base of the store."""
        return {"windows": [str(window) for window in self.lab.windows]}

    def _trial_of(self, choice: Choice) -> Trial:
        return Trial(choice, self.measured(choice))

    def measured(self, choice: Choice) -> dict[str, Any]:
        """A joint choice, run through the whole model on every window, in both regimes whichever the budget limits."""
        self.step(f"the whole model at {self.keys(choice):,.0f} keys a query")
        chosen = zip(self.layers, choice.candidates, strict=True)
        configs = {index: self.candidates[c].config(layer) for (index, layer), c in chosen}
        what = {"configs": {str(index): config.attributes() for index, config in sorted(configs.items())}, **self._windows}
        return self.store.get("model", what, lambda: self.lab.measure(configs, REGIMES, self.lab.windows))

    def _rivals(self, layers: Sequence[Sequence[Option]], cap: float) -> list[tuple[int, Trial]]:
        """The settings that all layers share, of at most `cap`, with the least predicted loss, run through the whole model."""
        shared = [(c, Choice(tuple(options[c] for options in layers))) for c in range(len(self.candidates) - 1)]
        affordable = sorted((pair for pair in shared if pair[1].cost <= cap), key=lambda pair: (pair[1].loss, pair[0]))
        return [(c, self._trial_of(choice)) for c, choice in affordable[:FIXED_RIVALS]]

    def count_steps(self) -> int:
        """About how many steps `run` reports."""
        each = len(self.measurements.windows) + self.probes + 1
        whole = int(self.budget.plants) + self._effort.trials + FIXED_RIVALS
        return len(self.layers) * each + self._effort.rounds * len(self.layers) // 2 + whole


def _said(regime: str, row: Mapping[str, Any]) -> str:
    nats, kl, top1 = (row[name]["mean"] for name in ("delta_nats", "kl", "top1"))
    return f"{regime.replace('_', ' ')}: {nats:+.5f} nats, KL {kl:.5f}, top-1 {top1:.4f}"
