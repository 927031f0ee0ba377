"""What each layer may take and what that is predicted to cost and to lose: errors of the op, and what single layers do to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from statistics import mean
from typing import Any

from hyperattention.config import Config
from hyperattention.export.budget import REGIMES
from hyperattention.export.switched import Captured
from hyperattention.validate.inputs import Window
from hyperattention.validate.policy.candidates import Candidate
from hyperattention.validate.policy.choose import Option
from hyperattention.validate.policy.errors import layer_errors
from hyperattention.validate.policy.interpolate import with_interpolation
from hyperattention.validate.policy.probe import PLANTED, TEXT, in_fp32, probe
from hyperattention.validate.policy.sensitivity import Probe, options, probed
from hyperattention.validate.policy.store import Store
from hyperattention.validate.policy.times import op_times
from hyperattention.validate.policy.trial import Laboratory

TAILS = {"cuda": 4, "cpu": 1}  # of a window, that a probe judges after a prefill
ASKED = {"cuda": 4, "cpu": 1}  # windows with planted keys that a layer is judged on; of text alone one says enough


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
    # number of a layer -> candidate -> loss by what is read and regime
    probes: dict[int, dict[int, dict[str, dict[str, float]]]] = field(default_factory=dict)

    @cached_property
    def kinds(self) -> list[bool]:
        """Of each candidate, whether its error is sampling noise."""
        return [candidate.samples for candidate in self.candidates]

    @cached_property
    def windows(self) -> Sequence[Window]:
        """Those that single layers are judged on."""
        return self.lab.windows[: ASKED[self.lab.device.type] if self.lab.windows[0].answer else 1]

    @property
    def whats(self) -> dict[str, int]:
        """What is read of a window, and how many of its last rows that are (0: all)."""
        asked = self.windows[0].asked
        return {TEXT: 0, PLANTED: asked} if asked else {TEXT: 0}

    def options(self, what: str, costs: Sequence[Sequence[float]]) -> dict[str, list[list[Option]]]:
        """By regime, the candidates of each layer at `costs` with the KL predicted for the text (TEXT) or for the digits of planted
        keys (PLANTED), of this layer alone. `read` comes first."""
        if not self.probes:
            hulls = [probed(keys, row, self.kinds, self.count) for keys, row in zip(self.keys, self.errors[TEXT], strict=True)]
            self.probe((number, candidate) for number, hull in enumerate(hulls) for candidate in hull)
        return {
            regime: [self._layer_options(what, number, costs[number], regime) for number in range(len(self.layers))]
            for regime in self.regimes
        }

    def _layer_options(self, what: str, number: int, costs: Sequence[float], regime: str) -> list[Option]:
        keys, errors = self.keys[number], self.errors[what][number]
        found = sorted(self.probes.get(number, {}).items())
        probes = [Probe(c, keys[c], errors[c], max(0.0, lost[what][regime])) for c, lost in found]
        priced = options(keys, errors, self.kinds, probes)
        return [Option(o.candidate, cost, o.loss) for o, cost in zip(priced, costs, strict=True)]

    def probe(self, wanted: Iterable[tuple[int, int]]) -> int:
        """Runs the model in fp32 (probe.py) with one layer approximated for each (number of a layer, candidate) that was not; how many
        those were."""
        made, tails = 0, TAILS[self.lab.device.type]
        with in_fp32(self.lab.patched.model):
            for number, candidate in wanted:
                found = self.probes.setdefault(number, {})
                if candidate in found or not self.errors[TEXT][number][candidate]:
                    continue
                index, layer = self.layers[number]
                self.step(f"layer {index} alone: {self.candidates[candidate]}")
                configs = {index: self.candidates[candidate].config(layer)}
                told = {"configs": {str(index): configs[index].attributes()}, "tails": tails, "windows": len(self.windows)}
                found[candidate] = self.store.get("probe", told, lambda c=configs: probe(self.lab, c, REGIMES, self.windows, tails))
                made += 1
        return made

    # --- the op alone ------------------------------------------------------------------------------------------------

    def read(self, timed: bool) -> None:
        """The errors of the op, means over the windows, and on the first one its times where they are asked for.

        Window by window: Q, K and V of all layers, which are let go of then, can be gigabytes.
        """
        found = []
        for place, window in enumerate(self.windows):
            calls = cache(lambda of=window: {call.layer: call for call in self.lab.captured(of)})
            found.append([self._errors(number, place, calls) for number in range(len(self.layers))])
            if timed and place == 0:
                self.times = self._times(calls)
        self.errors = {what: [_means([rows[n][what] for rows in found]) for n in range(len(self.layers))] for what in self.whats}

    def _errors(self, number: int, place: int, calls: Callable[[], dict[int, Captured]]) -> dict[str, list[float]]:
        """Of a layer's candidates in one window, by what is read; one run of the op says all."""
        index, rows = self.layers[number][0], list(self.whats.values())

        def measure(wanted: list[Config]) -> list[list[float]]:
            return layer_errors(self.lab.operator, calls()[index], wanted, rows)

        measured = cache(lambda *numbers: self._of_layer(number, place, "op", numbers, measure))
        return {
            what: with_interpolation(self.candidates, lambda numbers, i=i: [errors[i] for errors in measured(*numbers)])
            for i, what in enumerate(self.whats)
        }

    def _times(self, calls: Callable[[], dict[int, Captured]]) -> list[list[float]]:
        """Layers of one shape are measured once."""
        shapes: dict[Any, list[float]] = {}
        found = []
        for number, (index, layer) in enumerate(self.layers):
            call = calls()[index]
            shape = call.q.shape, call.k.shape, call.v.shape, layer.causal
            if shape not in shapes:
                measure = partial(op_times, self.lab.operator, call)
                shapes[shape] = with_interpolation(self.candidates, lambda some, n=number, m=measure: self._of_layer(n, 0, "time", some, m))
            found.append(shapes[shape])
        return found

    def _of_layer(
        self, number: int, place: int, kind: str, numbers: Sequence[int], measure: Callable[[list[Config]], list[Any]]
    ) -> list[Any]:
        """What `measure` says of some candidates in a layer, in the window at `place`, unless the store has it."""
        index, layer = self.layers[number]
        wanted = [self.candidates[n].config(layer) for n in numbers]
        self.step(f"layer {index}, {'time' if kind == 'time' else 'error'} of the op under {len(wanted)} settings")
        told = {"layer": index, "window": place, "configs": [config.attributes() for config in wanted]}
        return self.store.get(kind, told, lambda: measure(wanted))


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [mean(each) for each in zip(*rows, strict=True)]
