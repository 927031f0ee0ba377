"""The search for a policy: errors of the op, what they do to the model, a joint choice, and its proof by whole forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hyperattention.config import Config
from hyperattention.errors import AccuracyFailed, UsageError
from hyperattention.export.budget import Budget
from hyperattention.export.switched import Captured
from hyperattention.validate.configs import configs
from hyperattention.validate.policy.candidates import Candidate
from hyperattention.validate.policy.choose import Choice, Option, fill, frontier, within
from hyperattention.validate.policy.errors import layer_errors
from hyperattention.validate.policy.sensitivity import Probe, options, probed
from hyperattention.validate.policy.store import Store
from hyperattention.validate.policy.trial import Laboratory
from hyperattention.validate.policy.verify import MOST_TRIALS, Trial, cheapest_that_holds, excess, loss

FIXED_RIVALS = 2  # settings that all layers share, measured beside the choice
# Where planted keys are lost: the fewest heavy blocks and the coarsest pools that every layer may have, one after the other.
FLOORS = ((8, 16), (8, 4), (16, 4), (32, 4))


@dataclass(frozen=True)
class Found:
    """The chosen trial, the predicted frontier, the settings that all layers share as far as they were measured, options by layer."""

    trial: Trial
    points: list[Choice]
    fixed: list[tuple[int, Trial]]


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

    def run(self) -> Found:
        """The cheapest choice that holds the budget; where the budget caps the cost, the most accurate one under the cap that holds it.

        Raises AccuracyFailed, saying the best that was found, where no choice does, UsageError where every setting is over the cap.
        """
        layers = [self._options(number) for number in range(len(self.layers))]
        self.__dict__.pop("_captured", None)  # Q, K and V of every layer
        points = frontier(layers)
        cap = self.budget.cap(self.exact_keys)
        base = within(points, cap)
        if base is None:
            raise UsageError(
                f"--budget {self.budget}: the cheapest setting has {points[0].cost:,.0f} keys a query at {self.length:,} tokens, over the "
                f"{cap:,.0f} allowed; allow more, or measure at a longer --length"
            )
        if math.isinf(cap):
            held = self._that_holds(points)
            fixed = self._rivals(layers, held.choice.cost)
            holding = [trial for _, trial in fixed if self._holds(trial)]
            return Found(min((held, *holding), key=lambda trial: trial.choice.cost), points, fixed)
        fixed = self._rivals(layers, cap)
        trials = [self._trial_of(fill(base, layers, cap)), *(trial for _, trial in fixed), *self._floored(layers, cap)]
        holding = [trial for trial in trials if self._holds(trial)]
        if not holding:
            raise self._unreached(trials)
        return Found(min(holding, key=lambda trial: loss(trial.measured, self.budget.regimes)), points, fixed)

    def _holds(self, trial: Trial) -> bool:
        return excess(self.budget, trial.measured) <= 1

    def _floored(self, layers: Sequence[Sequence[Option]], cap: float) -> Iterator[Trial]:
        """Choices under the cap with more or finer heavy blocks than the loss alone asks for, until one keeps the planted keys."""
        if self.budget.needle is None:
            return
        for blocks, pool in FLOORS:
            allowed = [[option for option in options if self._has_floor(option, blocks, pool)] for options in layers]
            base = within(frontier(allowed), cap)
            if base is None:
                return
            trial = self._trial_of(fill(base, allowed, cap))
            yield trial
            if self._holds(trial):
                return

    def _has_floor(self, option: Option, blocks: int, pool: int) -> bool:
        attributes = self.candidates[option.candidate].attributes
        return attributes is None or (
            attributes["selector"] == "blocks" and attributes["num_blocks"] >= blocks and attributes["pool_size"] <= pool
        )

    def _that_holds(self, points: list[Choice]) -> Trial:
        limits = [limit for limit in (self.budget.nats, self.budget.kl) if limit is not None]
        wanted = min(limits, default=points[len(points) // 2].loss)
        first = next((i for i, point in enumerate(points) if point.loss <= wanted), len(points) - 1)
        held, trials = cheapest_that_holds(points, self.budget, first, self.measured)
        if held is None:
            raise self._unreached(trials)
        return held

    def _unreached(self, trials: Sequence[Trial]) -> AccuracyFailed:
        """Says what the trial that comes nearest to the budget gave."""
        best = min(trials, key=lambda trial: excess(self.budget, trial.measured))
        rows = []
        for regime in self.budget.regimes:
            nats, kl, top1 = (best.measured[regime][name]["mean"] for name in ("delta_nats", "kl", "top1"))
            rows.append(f"{regime.replace('_', ' ')}: {nats:+.5f} nats, KL {kl:.5f}, top-1 {top1:.4f}")
        needle = best.measured["needle"]
        rows += [f"needle {min(needle[r] for r in self.budget.regimes):.3f} (exact attention {needle['exact']:.3f})"] if needle else []
        message = (
            f"the budget {self.budget} is not reached: the best found has {best.choice.cost:,.0f} keys a query and gives "
            f"{'; '.join(rows)}. Allow more loss or more keys"
        )
        return AccuracyFailed(message, {"best": best.measured, "keys": best.choice.cost})

    # --- what is measured --------------------------------------------------------------------------------------------

    def _options(self, number: int) -> list[Option]:
        """The candidates of one layer with their share of the mean cost and the loss predicted for them."""
        index, layer = self.layers[number]
        keys = [candidate.keys(layer, self.length) for candidate in self.candidates]
        costs = [self.weights[number] * k for k in keys]
        errors = self._errors(index, layer)
        probes = []
        for candidate in probed(keys, errors, self.probes):
            chosen = self.candidates[candidate]
            self.step(f"layer {index} alone: {chosen}")
            found = self._trial({index: chosen.config(layer)}, alone=True)
            regime = self.budget.regimes[0]
            probes.append(Probe(candidate, costs[candidate], errors[candidate], max(0.0, found[regime]["kl"]["mean"])))
        return options(costs, errors, probes)

    def _errors(self, index: int, layer: Config) -> list[float]:
        wanted = [candidate.config(layer) for candidate in self.candidates]
        what = {"layer": index, "configs": [config.attributes() for config in wanted]}
        self.step(f"layer {index}: error of the op under {len(wanted)} settings")
        return self.store.get("op", what, lambda: layer_errors(self.lab.operator, self._captured[index], wanted))

    @cached_property
    def _captured(self) -> dict[int, Captured]:
        return {call.layer: call for call in self.lab.captured(self.lab.windows[0])}

    def _trial_of(self, choice: Choice) -> Trial:
        return Trial(choice, self.measured(choice))

    def measured(self, choice: Choice) -> dict[str, Any]:
        """A joint choice, run through the whole model on every window."""
        self.step(f"the whole model at {choice.cost:,.0f} keys a query")
        chosen = zip(self.layers, choice.candidates, strict=True)
        return self._trial({index: self.candidates[c].config(layer) for (index, layer), c in chosen}, alone=False)

    def _trial(self, chosen: Mapping[int, Config], alone: bool) -> dict[str, Any]:
        """`alone`: one layer, in one regime, on the first window."""
        lab = self.lab
        regimes, windows = (self.budget.regimes[:1], lab.windows[:1]) if alone else (self.budget.regimes, lab.windows)
        needles = () if alone or self.budget.needle is None else lab.needles
        what = {
            "configs": {str(index): config.attributes() for index, config in sorted(chosen.items())},
            "regimes": list(regimes),
            "windows": [str(window) for window in windows],
            "needles": len(needles),
        }
        return self.store.get("model", what, lambda: lab.measure(chosen, regimes, windows, needles))

    def _rivals(self, layers: Sequence[Sequence[Option]], cap: float) -> list[tuple[int, Trial]]:
        """The settings that all layers share, of at most `cap`, with the least predicted loss, run through the whole model."""
        shared = [(c, Choice(tuple(options[c] for options in layers))) for c in range(len(self.candidates) - 1)]
        affordable = sorted((pair for pair in shared if pair[1].cost <= cap), key=lambda pair: (pair[1].loss, pair[0]))
        return [(c, self._trial_of(choice)) for c, choice in affordable[:FIXED_RIVALS]]

    def count_steps(self) -> int:
        """About how many steps `run` reports."""
        return len(self.layers) * (1 + self.probes) + MOST_TRIALS + FIXED_RIVALS
