"""What each layer may take and what that is predicted to cost and to lose: errors of the op, and what single layers do to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hyperattention.config import Config
from hyperattention.export.budget import REGIMES
from hyperattention.export.switched import Captured
from hyperattention.validate.inputs import NEEDLE_DIGITS
from hyperattention.validate.policy.candidates import Candidate
from hyperattention.validate.policy.choose import Option
from hyperattention.validate.policy.errors import layer_errors
from hyperattention.validate.policy.interpolate import with_interpolation
from hyperattention.validate.policy.probe import in_fp32, probe
from hyperattention.validate.policy.sensitivity import Probe, options, probed
from hyperattention.validate.policy.store import Store
from hyperattention.validate.policy.times import op_times
from hyperattention.validate.policy.trial import Laboratory

QUESTION_ROWS = 5 * NEEDLE_DIGITS  # of a prompt's end: the question and its answer
TEXT, PLANTED = "text", "needle"
TAILS = {"cuda": 4, "cpu": 1}  # of the first window, that a probe judges after a prefill


@dataclass
class Measurements:
    """Every candidate in every layer of a laboratory's model. `layers` are index and exact config; `keys` cost of each candidate by layer,
    its share of the mean; `count` probes a layer; the losses are those of `regimes`.
    """

    lab: Laboratory
    regimes: Sequence[str]
    layers: Sequence[tuple[int, Config]]
    candidates: Sequence[Candidate]
    keys: Sequence[Sequence[float]]
    count: int
    store: Store
    step: Callable[[str], None]
    errors: dict[str, list[list[float]]] = field(default_factory=dict)  # squared, of the op: by what is read, layer, candidate
    times: list[list[float]] = field(default_factory=list)  # milliseconds of the op by layer and candidate
    # (what, number of a layer) -> candidate -> loss by regime
    probes: dict[tuple[str, int], dict[int, dict[str, float]]] = field(default_factory=dict)

    @cached_property
    def kinds(self) -> list[bool]:
        """Of each candidate, whether its error is sampling noise."""
        return [candidate.samples for candidate in self.candidates]

    def options(self, what: str, costs: Sequence[Sequence[float]]) -> dict[str, list[list[Option]]]:
        """By regime, the candidates of each layer at `costs` with the KL predicted for the text (TEXT) or for the digits of planted
        keys (PLANTED), of this layer alone. `read` comes first."""
        errors = self.errors[what]
        if not any(key[0] == what for key in self.probes):
            hulls = [probed(keys, row, self.kinds, self.count) for keys, row in zip(self.keys, errors, strict=True)]
            self.probe(what, ((number, candidate) for number, hull in enumerate(hulls) for candidate in hull))
        return {
            regime: [self._layer_options(what, number, costs[number], errors[number], regime) for number in range(len(self.layers))]
            for regime in self.regimes
        }

    def _layer_options(self, what: str, number: int, costs: Sequence[float], errors: Sequence[float], regime: str) -> list[Option]:
        found = self.probes.get((what, number), {})
        probes = [Probe(c, self.keys[number][c], errors[c], max(0.0, lost[regime])) for c, lost in sorted(found.items())]
        priced = options(self.keys[number], errors, self.kinds, probes)
        return [Option(o.candidate, cost, o.loss) for o, cost in zip(priced, costs, strict=True)]

    def probe(self, what: str, wanted: Iterable[tuple[int, int]]) -> int:
        """Runs the model with one layer approximated for each (number of a layer, candidate) that was not; how many those were.

        On text in fp32 (probe.py); planted keys, whose digits an approximation gets right or wrong, in the model's own type.
        """
        made = 0
        with in_fp32(self.lab.patched.model) if what == TEXT else nullcontext():
            for number, candidate in wanted:
                found = self.probes.setdefault((what, number), {})
                if candidate in found or not self.errors[what][number][candidate]:
                    continue
                index, layer = self.layers[number]
                self.step(f"layer {index} alone: {self.candidates[candidate]}")
                found[candidate] = self._probe(what, {index: self.candidates[candidate].config(layer)})
                made += 1
        return made

    def _probe(self, what: str, configs: Mapping[int, Config]) -> dict[str, float]:
        told: dict[str, Any] = {"configs": {str(index): config.attributes() for index, config in configs.items()}}
        if what == TEXT:
            tails, window = TAILS[self.lab.device.type], self.lab.windows[0]
            return self.store.get("probe", {**told, "tails": tails}, lambda: probe(self.lab, configs, REGIMES, window, tails))
        told["regimes"] = list(self.regimes)
        return self.store.get("planted", told, lambda: self.lab.measure(configs, self.regimes, (), self.lab.needles)["needle_kl"])

    # --- the op alone ------------------------------------------------------------------------------------------------

    def read(self, whats: Sequence[str], timed: bool) -> None:
        """The errors of the op on TEXT, PLANTED or both, and its times; Q, K and V of the layers are let go of afterwards."""
        measures = {TEXT: self._text_errors, PLANTED: self._planted_errors}
        self.errors |= {what: self._errors(what, measures[what]) for what in whats}
        if timed:
            self.times = self._times()
        for name in ("_captured", "_captured_planted"):
            self.__dict__.pop(name, None)

    def _errors(self, what: str, measure: Callable[[int, list[Config]], list[float]]) -> list[list[float]]:
        return [with_interpolation(self.candidates, self._of_layer(number, what, measure)) for number in range(len(self.layers))]

    def _of_layer(
        self, number: int, what: str, measure: Callable[[int, list[Config]], list[float]], kind: str = "op"
    ) -> Callable[[list[int]], list[float]]:
        index, layer = self.layers[number]

        def errors(numbers: list[int]) -> list[float]:
            wanted = [self.candidates[n].config(layer) for n in numbers]
            self.step(f"layer {index}, {what}: the op under {len(wanted)} settings")
            told = {"layer": index, "on": what, "configs": [config.attributes() for config in wanted]}
            return self.store.get(kind, told, lambda: measure(index, wanted))

        return errors

    def _text_errors(self, index: int, wanted: list[Config]) -> list[float]:
        return layer_errors(self.lab.operator, self._captured[index], wanted)

    def _planted_errors(self, index: int, wanted: list[Config]) -> list[float]:
        each = [layer_errors(self.lab.operator, call, wanted, QUESTION_ROWS) for call in self._captured_planted[index]]
        return [sum(row) / len(each) for row in zip(*each, strict=True)]

    def _times(self) -> list[list[float]]:
        """Layers of one shape are measured once."""
        shapes: dict[Any, list[float]] = {}
        found = []
        for number, (index, layer) in enumerate(self.layers):
            call = self._captured[index]
            shape = call.q.shape, call.k.shape, call.v.shape, layer.causal
            if shape not in shapes:
                measured = self._of_layer(number, "time", lambda i, wanted: op_times(self.lab.operator, self._captured[i], wanted), "time")
                shapes[shape] = with_interpolation(self.candidates, measured)
            found.append(shapes[shape])
        return found

    @cached_property
    def _captured(self) -> dict[int, Captured]:
        return {call.layer: call for call in self.lab.captured(self.lab.windows[0])}

    @cached_property
    def _captured_planted(self) -> dict[int, list[Captured]]:
        """Of the first prompt of the first and of a middle depth."""
        chosen = [self.lab.needles[0], self.lab.needles[len(self.lab.needles) // 2]]
        captured = [{call.layer: call for call in self.lab.captured(window)} for window in chosen]
        return {index: [calls[index] for calls in captured] for index, _ in self.layers}
