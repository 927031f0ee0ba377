"""How far the output is from exact attention, on the same text, at each length, and what it costs; in both regimes of regimes.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import median

from torch import Tensor

from hyperattention.export.patch import Patched
from hyperattention.validate.baseline import Baseline, approximating
from hyperattention.validate.feeds import IDS, LENGTHS
from hyperattention.validate.hard_inputs import hard_rows
from hyperattention.validate.inputs import Corpus, windows
from hyperattention.validate.layers import layer_rows
from hyperattention.validate.look_ahead_runs import measure_look_ahead
from hyperattention.validate.metrics import (
    TokenMetrics,
    by_position,
    summarise,
    tensor_error,
    token_metrics,
)
from hyperattention.validate.regimes import ALL_BLOCK, TAIL_BLOCK, prefill_backend, prefill_exact_decode, token_feed
from hyperattention.validate.runners import Forward
from hyperattention.validate.strict_cost import StrictCost, has_twin
from hyperattention.validate.workbench import Measured, Workbench, check_finite, is_exact, not_finite, time_row, timed


def every_position(patched: Patched) -> Forward:
    """Logits [B, S, vocabulary] whatever the task answers, for a `TorchRunner`."""

    def forward(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids, lengths = given[IDS], given[LENGTHS]
        full = bool((lengths == ids.shape[1]).all())  # without padding no mask is built
        return {"logits": patched.forward(ids, None if full else lengths).logits}

    return forward


def measure_length(bench: Workbench, corpus: Corpus, length: int, count: int, hard: bool) -> Measured:
    """One length over `count` windows; with `hard` also what inputs that hurt do to its layers, and the
    look-ahead test. The baseline reads the first window.

    Raises UsageError where exact attention itself answers NaN or infinity.
    """
    everywhere: list[TokenMetrics] = []
    tails: list[TokenMetrics] = []
    seconds: list[float] = []
    torch_seconds: list[float] = []
    layers: list[dict] = []
    baseline: list[dict] = []
    hard_inputs: list[dict] = []
    look_ahead: dict | None = None
    approximated: list = []
    exact_twin: dict | None = None
    exact_seconds = None
    broken = 0
    chosen = windows(corpus, length, count)
    scorer = bench.backend if bench.plan.task == "logits" else bench.scorer
    strict = StrictCost(bench, length) if hard and has_twin(bench.plan, length) else None
    for number, window in enumerate(chosen):
        at, given = f"{length:,} tokens, window {number + 1} of {len(chosen)}", token_feed(bench, window.inputs)
        bench.step(f"{at}: exact attention ({bench.exact.backend})")
        with bench.patched.capture() as captured:
            answer = bench.exact.infer(given)
        check_finite(answer, at)
        exact = answer["logits"][0]
        torch_seconds += timed(bench.exact, given, bench.repeats)
        if number == 0:
            layers = layer_rows(bench.operator, bench.kernels, captured, length, bench.step)
            if hard:
                hard_inputs = hard_rows(bench.operator, captured, bench.step, corpus.kind)
                look_ahead = measure_look_ahead(bench, captured, window.inputs)
            approximated = approximating(captured)
        captured.clear()
        if number == 0 and approximated:
            rival = Baseline(bench, length)
            rival.add(window, exact)
            baseline = [rival.row(layers, approximated)]
        bench.step(f"{at}: ours ({bench.backend.backend})")
        ours = bench.backend.infer(given)["logits"][0]
        broken += not_finite({"logits": ours}).get("logits", 0)
        seconds += timed(bench.backend, given, bench.repeats)
        if scorer is not bench.backend:
            bench.step(f"{at}: all positions ({scorer.backend})")
            ours = scorer.infer(given)["logits"][0]
        everywhere.append(token_metrics(exact, ours, window.targets))
        del ours
        if number == 0 and bench.backend_exact is not None:
            bench.step(f"{at}: exact twin ({bench.backend_exact.backend})")
            other = bench.backend_exact.infer(given)["logits"][0]
            exact_seconds = median(timed(bench.backend_exact, given, bench.repeats))
            exact_twin = asdict(tensor_error(other, exact[-other.shape[0] :]))
        bench.step(f"{at}: prefill, exact decode ({prefill_backend(bench)})")
        tails.append(token_metrics(exact[-bench.tail :], prefill_exact_decode(bench, window), window.targets[-bench.tail :]))
        if strict is not None:
            strict.add(window, exact)
    if strict is not None and look_ahead is not None:
        look_ahead["strict"] = strict.row(everywhere, tails)
    row = {
        "length": length,
        "exact": is_exact(bench.plan, length),
        "tail": bench.tail,
        "windows": len(chosen),
        "starts": [w.start for w in chosen],
        "all_positions": summarise(everywhere, ALL_BLOCK),
        "all_positions_backend": scorer.backend,
        "by_position": {"all_positions": by_position(everywhere), "prefill_exact_decode": by_position(tails, length - bench.tail)},
        "prefill_exact_decode": summarise(tails, TAIL_BLOCK),
        "prefill_backend": prefill_backend(bench),
        "exact_twin": exact_twin,
        "not_finite": {"logits": broken} if broken else {},
    }
    return Measured(row, time_row(bench, length, seconds, exact_seconds, torch_seconds), layers, baseline, hard_inputs, look_ahead)
