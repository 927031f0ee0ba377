"""The paper's experiment: loss against the number of replaced layers (Han et al. 2023, figure 3), in nats, in both regimes.

The paper replaces layers from the last and reports 2 to the power of nats as perplexity; here layers are also replaced from the
first and by their own error, and every number is in nats. Each point is a whole model; none is interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from hyperattention.config import Config
from hyperattention.export.budget import REGIMES
from hyperattention.export.patch import install
from hyperattention.validate.cost import keys_per_query
from hyperattention.validate.inputs import windows
from hyperattention.validate.operators import torch_threads
from hyperattention.validate.policy.trial import Laboratory
from hyperattention.validate.sweep_layers import Method, cost, errors, layer_row
from hyperattention.validate.sweep_plan import Point, counts, points, urgent
from hyperattention.validate.sweep_record import Record
from hyperattention.validate.sweep_subject import Options, Subject

Step = Callable[[str], None]


def sweep(subject: Subject, options: Options, record: Record, counted: Callable[[int], Step], stopped: Callable[[], bool]) -> None:
    """Measures every point that `record` lacks and adds it there, until all are done or `stopped` says so.

    Times first, then the points that say most (`urgent`) at every length, then the others: what ends a run early costs the least.
    """
    numbers = counts(len(subject.configs), options.replaced)
    step = counted(len(options.lengths) * (1 + len(options.configs) * len(options.orders) * len(numbers)))
    lengths: list[_Length] = []
    with torch_threads(options.threads):
        for length in options.lengths:
            if stopped():
                return
            lengths.append(_Length(subject, options, record, length, step))
        first = urgent(numbers)
        for some in (first, [number for number in numbers if number not in first]):
            for one in lengths:
                one.measure(some, stopped)


class _Length:
    """One length of a sweep: its windows and the methods over so many keys."""

    def __init__(self, subject: Subject, options: Options, record: Record, length: int, step: Step) -> None:
        self.subject, self.options, self.record, self.length, self.step = subject, options, record, length, step
        # The first window ranks the layers; where the text holds others, it is not judged.
        self.ranking, *judged = windows(subject.corpus, length, options.windows + 1)
        self.windows = judged or [self.ranking]
        record.add_windows(length, self.ranking.start, [window.start for window in self.windows])
        self.methods = {name: Method.of(name, config, subject.operator, length) for name, config in options.configs.items()}
        patched = install(subject.model, subject.plan)
        self.laboratory = Laboratory(patched, subject.operator, self.windows, options.tail, subject.device)
        self.rows = record.layers(length, list(self.methods))
        self.step(f"{length:,} tokens: every layer alone{' (known)' * bool(self.rows)}")
        if not self.rows:
            self.rows = self._layer_rows()
            record.add_layers(self.rows)

    def measure(self, numbers: Sequence[int], stopped: Callable[[], bool]) -> None:
        """The points of these numbers of replaced layers, each number for every method and order before the next."""
        layers = list(self.subject.configs)
        for point in points(self.length, self.options.orders, layers, errors(self.rows, list(self.methods)), numbers):
            if stopped():
                return
            known = self.record.known(point)
            what = f"{self.length:,} tokens, {point.method}, {point.order}: {len(point.layers)} of {len(layers)} layers"
            self.step(what + " (known)" * known)
            if not known:
                self.record.add_numbers(point, self._numbers(point))
            self.record.add(point, self._cost(self.rows, point))

    def _layer_rows(self) -> list[dict]:
        captured, rows = self.laboratory.captured(self.ranking), []
        with torch.inference_mode():
            while captured:  # each call's tensors go as soon as it is measured
                call = captured.pop(0)
                configs = {name: self._config(method, call.layer) for name, method in self.methods.items()}
                rows.append(layer_row(call, self.length, self.methods, configs, self.subject.operator))
        return rows

    def _numbers(self, point: Point) -> dict:
        """Both regimes of one model over all windows."""
        method = self.methods[point.method]
        self.laboratory.operator = method.operator
        found = self.laboratory.measure({layer: self._config(method, layer) for layer in point.layers}, REGIMES, self.windows)
        return {regime: found[regime] for regime in REGIMES}

    def _config(self, method: Method, layer: int) -> Config:
        """The method's attributes with what the layer sets for itself."""
        own = self.subject.configs[layer]
        return replace(method.config, causal=own.causal, scale=own.scale, seed=own.seed)

    def _cost(self, rows: Sequence[dict], point: Point) -> dict:
        """Keys of a mean query row of a mean layer, and the attention's time."""
        layers, replaced = len(self.subject.configs), len(point.layers)
        ours, exact = self.methods[point.method].keys(self.length), keys_per_query(Config().exact(), self.length)
        return {"keys_per_query": (replaced * ours + (layers - replaced) * exact) / layers, **cost(rows, point.method, point.layers)}
