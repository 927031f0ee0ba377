"""How far the output is from exact attention, on the same text, at each length, and what it costs; in both regimes of regimes.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

from hyperattention.export.patch import Patched
from hyperattention.validate.baseline import Baseline
from hyperattention.validate.feeds import IDS, LENGTHS, Feed
from hyperattention.validate.first_feed import Layers, look_at_layers, run_exact_twin
from hyperattention.validate.inputs import Corpus, Window, windows
from hyperattention.validate.metrics import TokenMetrics, by_position, summarise, tensor_error, token_metrics
from hyperattention.validate.regimes import ALL_BLOCK, TAIL_BLOCK, prefill_backend, prefill_exact_decode, token_feed
from hyperattention.validate.runners import Forward, ModelRunner
from hyperattention.validate.strict_cost import StrictCost, has_twin
from hyperattention.validate.workbench import Measured, Workbench, check_finite, is_exact, not_finite, time_row, timed


def every_position(patched: Patched) -> Forward:
    """Logits [B, S, vocabulary] whatever the task answers, for a `TorchRunner`."""

    def forward(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids, lengths = given[IDS], given[LENGTHS]
        full = bool((lengths == ids.shape[1]).all())  # without padding no mask is built
        return {"logits": patched.forward(ids, None if full else lengths).logits}

    return forward


@dataclass
class _Found:
    """What accumulates over the windows of one length. `scorer` answers every position: the backend, or PyTorch in its place."""

    bench: Workbench
    scorer: ModelRunner
    everywhere: list[TokenMetrics] = field(default_factory=list)
    tails: list[TokenMetrics] = field(default_factory=list)
    ours_s: list[float] = field(default_factory=list)
    torch_s: list[float] = field(default_factory=list)
    broken: int = 0

    def add(self, window: Window, given: Feed, exact: Tensor, at: str) -> None:
        """Ours on one window in both regimes, against exact logits [S, vocabulary]; `given` is its feed."""
        bench = self.bench
        bench.step(f"{at}: ours ({bench.backend.backend})")
        ours = bench.backend.infer(given)["logits"][0]
        self.broken += not_finite({"logits": ours}).get("logits", 0)
        self.ours_s += timed(bench.backend, given, bench.repeats)
        if self.scorer is not bench.backend:
            bench.step(f"{at}: all positions ({self.scorer.backend})")
            ours = self.scorer.infer(given)["logits"][0]
        self.everywhere.append(token_metrics(exact, ours, window.targets))
        del ours
        bench.step(f"{at}: prefill, exact decode ({prefill_backend(bench)})")
        tail = slice(-bench.tail, None)
        self.tails.append(token_metrics(exact[tail], prefill_exact_decode(bench, window), window.targets[tail]))

    def row(self, length: int, starts: list[int], exact_twin: dict | None) -> dict:
        """A row of report.json's `approximation`."""
        bench = self.bench
        return {
            "length": length,
            "exact": is_exact(bench.plan, length),
            "tail": bench.tail,
            "windows": len(starts),
            "starts": starts,
            "all_positions": summarise(self.everywhere, ALL_BLOCK),
            "all_positions_backend": self.scorer.backend,
            "by_position": {
                "all_positions": by_position(self.everywhere),
                "prefill_exact_decode": by_position(self.tails, length - bench.tail),
            },
            "prefill_exact_decode": summarise(self.tails, TAIL_BLOCK),
            "prefill_backend": prefill_backend(bench),
            "exact_twin": exact_twin,
            "not_finite": {"logits": self.broken} if self.broken else {},
        }


def measure_length(bench: Workbench, corpus: Corpus, length: int, count: int, hard: bool) -> Measured:
    """One length over `count` windows; with `hard` also what inputs that hurt do to its layers, and the
    look-ahead test. The baseline reads the first window.

    Raises UsageError where exact attention itself answers NaN or infinity.
    """
    chosen = windows(corpus, length, count)
    found = _Found(bench, bench.backend if bench.plan.task == "logits" else bench.scorer)
    strict = StrictCost(bench, length) if hard and has_twin(bench.plan, length) else None
    layers, baseline, exact_twin, exact_s = Layers(), [], None, None
    for number, window in enumerate(chosen):
        at, given = f"{length:,} tokens, window {number + 1} of {len(chosen)}", token_feed(bench, window.inputs)
        bench.step(f"{at}: exact attention ({bench.exact.backend})")
        with bench.patched.capture(None if number == 0 else frozenset()) as captured:
            answer = bench.exact.infer(given)
        check_finite(answer, at)
        exact = answer["logits"][0]
        found.torch_s += timed(bench.exact, given, bench.repeats)
        if number == 0:
            layers = look_at_layers(bench, captured, length, hard, corpus.kind, window.inputs)
            captured.clear()  # Q, K and V of every layer: room for what follows
            baseline = _baseline_rows(bench, length, window, exact, layers)
            if (twin := run_exact_twin(bench, given, at)) is not None:
                logits, exact_s = twin[0]["logits"][0], twin[1]
                exact_twin = asdict(tensor_error(logits, exact[-logits.shape[0] :]))
        found.add(window, given, exact, at)
        if strict is not None:
            strict.add(window, exact)
    if strict is not None and layers.look_ahead is not None:
        layers.look_ahead["strict"] = strict.row(found.everywhere, found.tails)
    row = found.row(length, [window.start for window in chosen], exact_twin)
    time = time_row(bench, length, found.ours_s, exact_s, found.torch_s)
    return Measured(row, time, layers.rows, baseline, layers.hard_inputs, layers.look_ahead)


def _baseline_rows(bench: Workbench, length: int, window: Window, exact: Tensor, layers: Layers) -> list[dict]:
    """Window + sinks on one window, against exact logits [S, vocabulary]: one row where some layer approximates."""
    if not layers.approximated:
        return []
    rival = Baseline(bench, length)
    rival.add(window, exact)
    return [rival.row(layers.rows, layers.approximated)]
