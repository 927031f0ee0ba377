"""How far the output is from exact attention, on the same text, at each length, and what it costs.

Two regimes. All positions: every position attends approximately, as in scoring. Prefill, exact decode: the prompt is read
approximately and the last positions attend exactly over the keys and values that this left behind, as a deployed model
runs. The second carries the gates; the first shows the selector looking ahead, which can make it better than exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor

from hyperattention.export.patch import Patched
from hyperattention.export.plan import ExportPlan
from hyperattention.native import Library
from hyperattention.validate.compare import (
    TokenMetrics,
    by_position,
    estimate,
    summarise,
    tensor_error,
    token_metrics,
)
from hyperattention.validate.configs import configs
from hyperattention.validate.inputs import DEPTHS, Corpus, Window, needle, recalled, windows
from hyperattention.validate.layers import layer_rows
from hyperattention.validate.operators import Operator
from hyperattention.validate.runners import ModelRunner, TorchRunner, feed

TAIL_BLOCK = 64  # neighbouring tokens of the exact tail that count as one observation
ALL_BLOCK = 256


@dataclass
class Bench:
    """The active runners of one validation and the model they share."""

    patched: Patched
    plan: ExportPlan
    exact: TorchRunner
    backend: ModelRunner
    backend_exact: ModelRunner | None
    scorer: TorchRunner  # the plan in PyTorch with the native op, for what a backend that answers the last position cannot say
    operator: Operator
    kernels: Library | None  # None: the plan has no layer for them
    tail: int
    repeats: int  # timed runs after a first one; 0 = every window's own run is the time
    step: Callable[[str], None]

    @property
    def device(self) -> torch.device:
        return next(self.patched.model.parameters()).device


def is_exact(plan: ExportPlan, length: int) -> bool:
    """Whether no layer of the plan approximates at `length`."""
    return all(config.is_exact(length, length) for config in configs(plan.approximate))


def prefill_exact_decode(bench: Bench, window: Window) -> Tensor:
    """Logits [tail, vocabulary] of the last positions, which attend exactly over the approximate prefill's keys and values."""
    ids = window.inputs.to(bench.device)
    split = ids.shape[1] - bench.tail
    with torch.inference_mode():
        if bench.plan.task == "prefill":
            cache = _cache(bench.backend.infer(feed(window.inputs[:, :split])), bench.device)
        else:
            with bench.patched.mode("plan", attention=bench.operator):
                cache = bench.patched.forward(ids[:, :split], use_cache=True).past_key_values
        with bench.patched.mode("exact"):
            return bench.patched.forward(ids[:, split:], past_key_values=cache, use_cache=True).logits[0]


def _cache(answer: dict, device: torch.device):
    """transformers' cache out of a backend's present.{i}.key and present.{i}.value."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i in range(sum(name.endswith(".key") for name in answer)):
        cache.update(answer[f"present.{i}.key"].to(device), answer[f"present.{i}.value"].to(device), i)
    return cache


def prefill_backend(bench: Bench) -> str:
    """Who reads the prompt in the regime prefill, exact decode."""
    return bench.backend.backend if bench.plan.task == "prefill" else f"PyTorch, op by {bench.operator.name}"


def timed(runner: ModelRunner, given: dict, repeats: int) -> list[float]:
    """Seconds of `repeats` further runs, or of the run just done where repeats is 0."""
    if repeats == 0:
        return [runner.seconds]
    seconds = []
    for _ in range(repeats):
        runner.infer(given)
        seconds.append(runner.seconds)
    return seconds


def measure_time(bench: Bench, corpus: Corpus, length: int) -> dict:
    """Time only, on the text repeated to `length`; for lengths past what the model was trained for."""
    ids = corpus.ids.repeat(-(-length // len(corpus.ids)))[None, :length]
    row: dict = {"length": length, "backend": bench.backend.backend, "exact_s": None, "torch_exact_s": None, "time_only": True}
    for key, runner in (("ours_s", bench.backend), ("exact_s", bench.backend_exact), ("torch_exact_s", bench.exact)):
        if runner is None:
            continue
        bench.step(f"{length:,} tokens, time only: {runner.name}")
        try:
            runner.infer(feed(ids))
            row[key] = median(timed(runner, feed(ids), bench.repeats))
        except torch.OutOfMemoryError as error:
            if key != "torch_exact_s":  # PyTorch is the rival here: one that does not fit is left out, and the report shows a dash
                raise
            bench.step(f"{length:,} tokens, time only: PyTorch's exact attention does not fit ({str(error).splitlines()[0]})")
    return {**row, "runs": max(1, bench.repeats)}


def measure_length(bench: Bench, corpus: Corpus, length: int, count: int) -> tuple[dict, dict, list]:
    """One length over `count` windows: its row of `approximation`, its row of `time`, and its rows of `layers`."""
    everywhere: list[TokenMetrics] = []
    tails: list[TokenMetrics] = []
    seconds: list[float] = []
    torch_seconds: list[float] = []
    layers: list[dict] = []
    exact_twin: dict | None = None
    exact_seconds = None
    chosen = windows(corpus, length, count)
    scorer = bench.backend if bench.plan.task == "logits" else bench.scorer
    for number, window in enumerate(chosen):
        at = f"{length:,} tokens, window {number + 1} of {len(chosen)}"
        bench.step(f"{at}: exact attention ({bench.exact.backend})")
        with bench.patched.capture() as captured:
            exact = bench.exact.infer(feed(window.inputs))["logits"][0]
        torch_seconds += timed(bench.exact, feed(window.inputs), bench.repeats)
        if number == 0:
            layers = layer_rows(bench.operator, bench.kernels, list(captured), length, bench.step)
        captured.clear()
        bench.step(f"{at}: ours ({bench.backend.backend})")
        ours = bench.backend.infer(feed(window.inputs))["logits"][0]
        seconds += timed(bench.backend, feed(window.inputs), bench.repeats)
        if scorer is not bench.backend:
            bench.step(f"{at}: all positions ({scorer.backend})")
            ours = scorer.infer(feed(window.inputs))["logits"][0]
        everywhere.append(token_metrics(exact, ours, window.targets))
        del ours
        if number == 0 and bench.backend_exact is not None:
            bench.step(f"{at}: exact twin ({bench.backend_exact.backend})")
            other = bench.backend_exact.infer(feed(window.inputs))["logits"][0]
            exact_seconds = median(timed(bench.backend_exact, feed(window.inputs), bench.repeats))
            exact_twin = asdict(tensor_error(other, exact[-other.shape[0] :]))
        bench.step(f"{at}: prefill, exact decode ({prefill_backend(bench)})")
        tails.append(token_metrics(exact[-bench.tail :], prefill_exact_decode(bench, window), window.targets[-bench.tail :]))
    row = {
        "length": length,
        "exact": is_exact(bench.plan, length),
        "tail": bench.tail,
        "starts": [w.start for w in chosen],
        "all_positions": summarise(everywhere, ALL_BLOCK),
        "all_positions_backend": scorer.backend,
        "by_position": by_position(everywhere),
        "prefill_exact_decode": summarise(tails, TAIL_BLOCK),
        "prefill_backend": prefill_backend(bench),
        "exact_twin": exact_twin,
    }
    time = {
        "length": length,
        "backend": bench.backend.backend,
        "ours_s": median(seconds),
        "exact_s": exact_seconds,
        "torch_exact_s": median(torch_seconds),
        "runs": len(seconds),
        "time_only": False,
    }
    return row, time, layers


def measure_needle(bench: Bench, corpus: Corpus, length: int, seed: int, prompts: int) -> dict:
    """Digits recalled at four depths, teacher forced, by exact attention and in both regimes; `prompts` prompts a depth."""
    rows = []
    for depth in DEPTHS:
        scores: dict[str, list[float]] = {"exact": [], "all_positions": [], "prefill_exact_decode": []}
        for number in range(prompts):
            window = needle(corpus, length, depth, seed + number)
            bench.step(f"needle at depth {depth}, prompt {number + 1} of {prompts}")
            given = feed(window.inputs)
            scores["exact"].append(recalled(bench.exact.infer(given)["logits"][0], window))
            scorer = bench.backend if bench.plan.task == "logits" else bench.scorer
            scores["all_positions"].append(recalled(scorer.infer(given)["logits"][0], window))
            scores["prefill_exact_decode"].append(recalled(prefill_exact_decode(bench, window), window))
        rows.append({"depth": depth, **{k: asdict(estimate([torch.tensor(v)], 1)) for k, v in scores.items()}})
    return {"length": length, "prompts": prompts, "depths": rows}


def needle_steps(prompts: int) -> int:
    """Steps that `measure_needle` reports."""
    return len(DEPTHS) * prompts
