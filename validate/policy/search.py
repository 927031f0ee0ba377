"""The search for a policy: errors of the op, what they do to the model, a joint choice, and its proof by whole forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hyperattention.config import Config
from hyperattention.errors import AccuracyFailed, UsageError
from hyperattention.export.budget import Budget
from hyperattention.export.switched import Captured
from hyperattention.validate.configs import configs
from hyperattention.validate.inputs import NEEDLE_DIGITS, Window
from hyperattention.validate.policy.candidates import Candidate
from hyperattention.validate.policy.choose import Choice, Option, fill, frontier, within
from hyperattention.validate.policy.errors import layer_errors
from hyperattention.validate.policy.interpolate import with_interpolation
from hyperattention.validate.policy.sensitivity import Probe, options, probed
from hyperattention.validate.policy.store import Store
from hyperattention.validate.policy.trial import Laboratory
from hyperattention.validate.policy.verify import MOST_TRIALS, Trial, cheapest_that_holds, excess, loss

FIXED_RIVALS = 2  # settings that all layers share, measured beside the choice
# With a budget for planted keys: what the KL of their digits weighs beside the text's, tried one after the other until enough are recalled.
NEEDLE_WEIGHTS = (0.0, 0.001, 0.01, 0.1, 1.0)
QUESTION_ROWS = 5 * NEEDLE_DIGITS  # of a prompt's end: the question and its answer


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
        numbers = range(len(self.layers))
        text = [self._text_options(number) for number in numbers]
        planted = [self._needle_options(number) for number in numbers] if self.budget.needle is not None else []
        for name in ("_captured", "_captured_needles"):
            self.__dict__.pop(name, None)  # Q, K and V of every layer
        points, cap = frontier(text), self.budget.cap(self.exact_keys)
        if points[0].cost > cap:
            raise UsageError(
                f"--budget {self.budget}: the cheapest setting has {points[0].cost:,.0f} keys a query at {self.length:,} tokens, over the "
                f"{cap:,.0f} allowed; allow more, or measure at a longer --length"
            )
        if math.isinf(cap):
            weighed = frontier(_weighed(text, planted, NEEDLE_WEIGHTS[2] if planted else 0.0))
            held = self._that_holds([point.of(text) for point in weighed])
            fixed = self._rivals(text, held.choice.cost)
            holding = [trial for _, trial in fixed if self._holds(trial)]
            return Found(min((held, *holding), key=lambda trial: trial.choice.cost), points, fixed)
        fixed = self._rivals(text, cap)
        trials = [*self._under(cap, text, planted), *(trial for _, trial in fixed)]
        holding = [trial for trial in trials if self._holds(trial)]
        if not holding:
            raise self._unreached(trials)
        return Found(min(holding, key=lambda trial: loss(trial.measured, self.budget.regimes)), points, fixed)

    def _under(self, cap: float, text: Sequence[Sequence[Option]], planted: Sequence[Sequence[Option]]) -> Iterator[Trial]:
        """The most accurate choice under the cap, then those that give planted keys more weight, until enough are recalled."""
        tried: set[tuple[int, ...]] = set()
        for weight in NEEDLE_WEIGHTS if planted else NEEDLE_WEIGHTS[:1]:
            layers = _weighed(text, planted, weight)
            base = within(frontier(layers), cap)
            assert base is not None, "the cheapest option of a layer is the same under every weight"
            chosen = fill(base, layers, cap)
            if chosen.candidates not in tried:
                tried.add(chosen.candidates)
                trial = self._trial_of(chosen.of(text))
                yield trial
                if self._holds(trial):
                    return

    def _holds(self, trial: Trial) -> bool:
        return excess(self.budget, trial.measured) <= 1

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

    def _text_options(self, number: int) -> list[Option]:
        """The candidates of one layer with their share of the mean cost, and the KL that is predicted for the text."""
        regime = self.budget.regimes[0]
        errors = self._errors(number, "text", lambda index, wanted: layer_errors(self.lab.operator, self._captured[index], wanted))
        return self._options(number, errors, lambda chosen: self._trial(chosen, [regime], self.lab.windows[:1], ())[regime]["kl"]["mean"])

    def _needle_options(self, number: int) -> list[Option]:
        """The same with the KL that is predicted for the digits of planted keys; errors are those of the rows that look them up."""
        regime = self.budget.regimes[0]

        def errors(index: int, wanted: list[Config]) -> list[float]:
            calls = self._captured_needles[index]
            each = [layer_errors(self.lab.operator, call, wanted, QUESTION_ROWS) for call in calls]
            return [sum(row) / len(each) for row in zip(*each, strict=True)]

        found = self._errors(number, "needle", errors)
        return self._options(number, found, lambda chosen: self._trial(chosen, [regime], (), self.lab.needles)["needle_kl"][regime])

    def _options(self, number: int, errors: list[float], lost: Callable[[Mapping[int, Config]], float]) -> list[Option]:
        index, layer = self.layers[number]
        keys = [candidate.keys(layer, self.length) for candidate in self.candidates]
        costs = [self.weights[number] * k for k in keys]
        probes = []
        kinds = [candidate.samples for candidate in self.candidates]
        for candidate in probed(keys, errors, kinds, self.probes):
            chosen = self.candidates[candidate]
            self.step(f"layer {index} alone: {chosen}")
            probes.append(Probe(candidate, costs[candidate], errors[candidate], max(0.0, lost({index: chosen.config(layer)}))))
        return options(costs, errors, kinds, probes)

    def _errors(self, number: int, what: str, measure: Callable[[int, list[Config]], list[float]]) -> list[float]:
        index, layer = self.layers[number]

        def errors(numbers: list[int]) -> list[float]:
            wanted = [self.candidates[n].config(layer) for n in numbers]
            self.step(f"layer {index}, {what}: error of the op under {len(wanted)} settings")
            told = {"layer": index, "on": what, "configs": [config.attributes() for config in wanted]}
            return self.store.get("op", told, lambda: measure(index, wanted))

        return with_interpolation(self.candidates, errors)

    @cached_property
    def _captured(self) -> dict[int, Captured]:
        return {call.layer: call for call in self.lab.captured(self.lab.windows[0])}

    @cached_property
    def _captured_needles(self) -> dict[int, list[Captured]]:
        """Of the first prompt of the first and of a middle depth."""
        chosen = [self.lab.needles[0], self.lab.needles[len(self.lab.needles) // 2]]
        captured = [{call.layer: call for call in self.lab.captured(window)} for window in chosen]
        return {index: [calls[index] for calls in captured] for index, _ in self.layers}

    def _trial_of(self, choice: Choice) -> Trial:
        return Trial(choice, self.measured(choice))

    def measured(self, choice: Choice) -> dict[str, Any]:
        """A joint choice, run through the whole model on every window."""
        self.step(f"the whole model at {choice.cost:,.0f} keys a query")
        chosen = zip(self.layers, choice.candidates, strict=True)
        configs = {index: self.candidates[c].config(layer) for (index, layer), c in chosen}
        needles = () if self.budget.needle is None else self.lab.needles
        return self._trial(configs, self.budget.regimes, self.lab.windows, needles)

    def _trial(
        self, chosen: Mapping[int, Config], regimes: Sequence[str], windows: Sequence[Window], needles: Sequence[Window]
    ) -> dict[str, Any]:
        what = {
            "configs": {str(index): config.attributes() for index, config in sorted(chosen.items())},
            "regimes": list(regimes),
            "windows": [str(window) for window in windows],
            "needles": len(needles),
        }
        return self.store.get("model", what, lambda: self.lab.measure(chosen, regimes, windows, needles))

    def _rivals(self, layers: Sequence[Sequence[Option]], cap: float) -> list[tuple[int, Trial]]:
        """The settings that all layers share, of at most `cap`, with the least predicted loss, run through the whole model."""
        shared = [(c, Choice(tuple(options[c] for options in layers))) for c in range(len(self.candidates) - 1)]
        affordable = sorted((pair for pair in shared if pair[1].cost <= cap), key=lambda pair: (pair[1].loss, pair[0]))
        return [(c, self._trial_of(choice)) for c, choice in affordable[:FIXED_RIVALS]]

    def count_steps(self) -> int:
        """About how many steps `run` reports."""
        sources = 1 if self.budget.needle is None else 2
        return sources * len(self.layers) * (2 + self.probes) + MOST_TRIALS + FIXED_RIVALS


def _weighed(text: Sequence[Sequence[Option]], planted: Sequence[Sequence[Option]], weight: float) -> list[list[Option]]:
    """The options of the text with `weight` times the loss of planted keys on top."""
    if not planted:
        return [list(options) for options in text]
    return [
        [replace(a, loss=a.loss + weight * b.loss) for a, b in zip(one, other, strict=True)]
        for one, other in zip(text, planted, strict=True)
    ]
