"""What a policy has to beat at equal cost, and the proof: settings that all layers share, run on text that no search has read (issue 7).

Rivals are every setting of the search's grid for all layers; every one of them for the layers that the policy approximates, while its
exact layers stay exact, so that a gain from these alone shows; window + sinks, both ways; and the preset `paper` at whatever it costs.
The settings of the grid are many: those within 5 % of the policy's keys are ranked by the loss predicted on the calibration text, and
the best of them are run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hyperattention.config import PRESETS, Config
from hyperattention.export.budget import REGIMES
from hyperattention.export.policy import DECIDED
from hyperattention.validate.cost import keys_per_query, window_within
from hyperattention.validate.inputs import Window
from hyperattention.validate.policy.candidates import Candidate
from hyperattention.validate.policy.search import Found, Search

NEAR = 0.05  # of the policy's keys: how far from them a cost is still equal
FAMILIES = ("all layers", "all but its exact layers")


@dataclass(frozen=True)
class Rival:
    """A setting for every layer but those in `exact` (by index), which stay exact.

    keys: of a mean query row, mean of the layers. predicted_kl: None where the search predicts none.
    """

    name: str
    attributes: dict[str, Any]
    exact: tuple[int, ...]
    keys: float
    predicted_kl: float | None


@dataclass(frozen=True)
class Ranked:
    """The rivals to run, and of how many settings of equal cost each family's best were taken."""

    rivals: list[Rival]
    settings: dict[str, int]


class Field:
    """The rivals of one finished search. `fixed` are the attributes that were not searched."""

    def __init__(self, search: Search, found: Found, fixed: Mapping[str, Any]) -> None:
        self.search, self.found, self.fixed = search, found, fixed
        self.chosen = found.trial.choice.candidates
        self.keys = self._keys(self.chosen)

    def ranked(self, count: int) -> Ranked:
        """At most `count` settings of the grid in each family, the least predicted loss first; the windows and `paper` behind them.

        Where no setting of a family has as many keys as the policy, those that come nearest run: `keys` says how many they have.
        """
        rivals, settings = [], {}
        exact = [number for number, c in enumerate(self.chosen) if self.search.candidates[c].attributes is None]
        for family, kept in zip(FAMILIES, ([], exact), strict=True):
            if kept == exact and family == FAMILIES[1] and not 0 < len(exact) < len(self.chosen):
                continue
            every = self._shared(family, kept)
            equal = [rival for rival in every if abs(rival.keys - self.keys) <= NEAR * self.keys]
            settings[family] = len(equal)
            best = sorted(equal, key=lambda rival: (rival.predicted_kl, rival.keys))
            nearest = sorted(every, key=lambda rival: abs(rival.keys - self.keys))
            rivals += [*(best or nearest)[:count], *self._window(family, kept)]
        return Ranked([*rivals, *self._paper()], settings)

    def configs(self, rival: Rival) -> dict[int, Config]:
        """Of every layer, by index."""
        setting = Candidate(rival.attributes)
        return {index: layer if index in rival.exact else setting.config(layer) for index, layer in self.search.layers}

    def policy(self) -> dict[int, Config]:
        """The same of the policy itself."""
        chosen = zip(self.search.layers, self.chosen, strict=True)
        return {index: self.search.candidates[c].config(layer) for (index, layer), c in chosen}

    def _shared(self, family: str, kept: Sequence[int]) -> list[Rival]:
        """Every setting of the grid for all layers but those at the places `kept`, but the policy itself."""
        found, last = [], len(self.search.candidates) - 1
        for number in range(last):
            choice = tuple(last if place in kept else number for place in range(len(self.chosen)))
            attributes = self.search.candidates[number].attributes
            if choice == self.chosen or attributes is None:
                continue
            loss = sum(options[c].loss for options, c in zip(self.found.options, choice, strict=True))
            found.append(Rival(family, attributes, self._indices(kept), self._keys(choice), loss))
        return found

    def _window(self, family: str, kept: Sequence[int]) -> list[Rival]:
        """The widest window with sinks under the policy's keys; none where the exact layers leave it nothing, or rows look ahead."""
        layer, weights = self.search.layers[0][1], self.search.weights
        left = 1 - sum(weights[number] for number in kept)
        each = (self.keys - (1 - left) * self.search.exact_keys) / left
        base = replace(layer, **{**_without(PRESETS["blocks"].attributes()), **self.fixed, "selector": "blocks"})
        window = window_within(base, each, self.search.length) if layer.causal else layer
        keys = keys_per_query(window, self.search.length)
        if keys > (1 + NEAR) * each:
            return []
        mean = left * keys + (1 - left) * self.search.exact_keys
        return [Rival(f"window + sinks, {family}", _without(window.attributes()), self._indices(kept), mean, None)]

    def _paper(self) -> list[Rival]:
        """The preset, unless it reads all keys at this length."""
        kept = {name: self.fixed[name] for name in ("exact_below",) if name in self.fixed}
        attributes = {**_without(PRESETS["paper"].attributes()), **kept}
        keys = Candidate(attributes).keys(self.search.layers[0][1], self.search.length)
        return [Rival("paper", attributes, (), keys, None)] if keys < self.search.exact_keys else []

    def _keys(self, choice: Sequence[int]) -> float:
        per_layer = zip(self.search.weights, self.search.layers, choice, strict=True)
        return sum(weight * self.search.candidates[c].keys(layer, self.search.length) for weight, (_, layer), c in per_layer)

    def _indices(self, numbers: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.search.layers[number][0] for number in numbers)


def judged(field: Field, count: int, windows: Sequence[Window], needles: Sequence[Window], text: Mapping[str, Any]) -> dict[str, Any]:
    """The policy and its rivals on `windows` and `needles` of a `text` that the search has not read, in both regimes, as JSON values.

    {"text", "windows", "needle_prompts", "settings": of equal cost by family, "policy": what `Laboratory.measure` gave, "rows":
    [{name, attributes, exact, keys, predicted_kl, verified}]}; the rows in the order of `Field.ranked`.
    """
    search, ranked = field.search, field.ranked(count)
    search.lab.kept.clear()  # the logits of the calibration text are not needed again

    def measured(name: str, keys: float, configs: Mapping[int, Config]) -> dict[str, Any]:
        search.step(f"text not seen, {name}: {keys:,.0f} keys a query")
        what = {"configs": {str(i): config.attributes() for i, config in sorted(configs.items())}, "needles": len(needles)}
        what |= {"text": dict(text), "windows": [str(window) for window in windows]}
        return search.store.get("unseen", what, lambda: search.lab.measure(configs, REGIMES, windows, needles))

    own = measured("this policy", field.keys, field.policy())
    rows = [{**asdict(rival), "verified": measured(rival.name, rival.keys, field.configs(rival))} for rival in ranked.rivals]
    for row in rows:
        row["exact"] = list(row["exact"])
    return {
        "text": dict(text),
        "windows": len(windows),
        "needle_prompts": len(needles),
        "settings": ranked.settings,
        "policy": own,
        "rows": rows,
    }


def _without(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the model and the export decide."""
    return {name: value for name, value in attributes.items() if name not in DECIDED}
