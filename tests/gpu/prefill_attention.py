"""What exact attention takes within a model: PyTorch runs the model of bench_prefill.py with each contender's attention in turn.

    python tests/gpu/prefill_attention.py [--lengths 32768 131072] [--depth 32] [--out FILE.json]

Alone a kernel runs on a cooler chip: between two calls in a model lie matrix products, which take an H200 to its power limit, where it
lowers its clock. What FA4 would take in the plugin's place is therefore rather its time here than its time alone, which is told before
and after. Needs flash-attn-4 and the library in hyperattention/lib; under a minute on an H200.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_prefill import Shape, fa4_times, relative, token_ids
from prefill_model import Model
from torch import Tensor
from transformers import PreTrainedModel

from hyperattention.config import Config
from hyperattention.errors import EnvironmentFault
from hyperattention.export.patch import install
from hyperattention.export.plan import ExportPlan
from hyperattention.export.task_module import TaskModule
from hyperattention.library import load_cuda
from hyperattention.validate.bench_rivals import Rival, flash_attention_4

# (q, k, v, config) to the call to time, which gives o; copies into its own layout come before it. As bench_rivals.Rival.
Contender = Callable[[Tensor, Tensor, Tensor, Config], Callable[[], Tensor]]
TOKEN_LAYERS = 2**20  # tokens times layers of a run: 32 layers at 32,768 tokens, 8 at 131,072, where those take two seconds
LEAST_RUNS = 2


def contenders(rival: Rival, library: Any) -> dict[str, Contender]:
    """FA4, and the exact path of our kernels, which take dense heads as they do in the engine."""

    def ours(q: Tensor, k: Tensor, v: Tensor, config: Config) -> Callable[[], Tensor]:
        dense = [x.contiguous() for x in (q, k, v)]
        return lambda: library.forward(*dense, config)[0]

    return {"fa4": lambda q, k, v, config: rival(q, k, v, bool(config.causal)), "ours": ours}


class Loop:
    """The first `layers` layers of `model` under `plan`, whose layers are all exact and are given to a contender.

    `event` makes what stamps the stream. The stream is never waited for inside a run: it is always full, so that the time between two
    stamps is the kernels'.
    """

    def __init__(self, model: PreTrainedModel, plan: ExportPlan, layers: int, event: Callable[[], Any]) -> None:
        self.model, self.layers, self.event = model, layers, event
        self.patched = install(model, plan)
        self.task = TaskModule(self.patched)

    def run(self, contender: Contender, ids: Tensor) -> tuple[list[float], Tensor]:
        """Milliseconds of attention in each layer, and the last token's logits, fp32 [vocabulary]."""
        stamps: list[tuple[Any, Any]] = []

        def attention(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
            call, start, stop = contender(q, k, v, config), self.event(), self.event()
            start.record()
            o = call()
            stop.record()
            stamps.append((start, stop))
            return o, o.new_empty(0)  # no model reads the log-sum-exp

        config: Any = self.model.config
        before, config.num_hidden_layers = config.num_hidden_layers, self.layers
        try:
            with torch.no_grad(), self.patched.mode("plan", attention):
                logits = self.task(ids)[0].float().flatten()
        finally:
            config.num_hidden_layers = before
        if len(stamps) != self.layers:
            raise EnvironmentFault(f"the model called attention {len(stamps)} times, of {self.layers} layers")
        stamps[-1][1].synchronize()
        return [start.elapsed_time(stop) for start, stop in stamps], logits


def cuda_event() -> Any:
    """What stamps the stream, with the time."""
    return torch.cuda.Event(enable_timing=True)


def attention_times(
    model: PreTrainedModel,
    plan: ExportPlan,
    ids: Tensor,
    given: Mapping[str, Contender],
    budget_ms: float,
    event: Callable[[], Any] = cuda_event,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Median milliseconds of one layer's attention by contender, over all layers and runs, with what was run; and each one's logits.

    Contenders take turns, run by run. As with the engines one run each is the warm-up, and as many count as fit `budget_ms` a name.
    """
    loop = Loop(model, plan, max(1, min(len(plan.layers), TOKEN_LAYERS // ids.shape[1])), event)
    logits = {name: loop.run(contender, ids)[1] for name, contender in given.items()}
    times: dict[str, list[float]] = {name: [] for name in given}
    runs, start = 0, time.perf_counter()
    while runs < LEAST_RUNS or time.perf_counter() - start < budget_ms * len(given) / 1000:
        for name, contender in given.items():
            times[name] += loop.run(contender, ids)[0]
        runs += 1
    found: dict[str, Any] = {"tokens": ids.shape[1], "layers": loop.layers, "warm_ups": 1, "runs": runs}
    return found | {f"{name}_ms_in_model": statistics.median(each) for name, each in times.items()}, logits


def exact_plan(model: Model) -> ExportPlan:
    """All layers exact, as in the exact engine."""
    with tempfile.TemporaryDirectory() as folder:
        model.one_layer().save_pretrained(folder)
        model.shape.config(model.seq[2]).save_pretrained(folder)
        return model.plan(Path(folder), "exact")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--depth", type=int, default=Shape.layers, help="layers, of which the longer lengths run a part")
    parser.add_argument("--budget-ms", type=float, default=2500, help="time spent on each number")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    model = Model(replace(Shape(), layers=options.depth), (min(options.lengths), min(options.lengths), max(options.lengths)))
    given, plan = contenders(flash_attention_4(), load_cuda()), exact_plan(model)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    report["fa4_ms_alone"] = fa4_times(model.shape, options.lengths, 1000)
    loaded: Any = model.tied()  # transformers wraps `to` so that its first argument reads as the model
    loaded, report["in_model"] = loaded.to("cuda"), []
    for tokens in options.lengths:
        found, logits = attention_times(loaded, plan, token_ids(model.shape, tokens).to("cuda"), given, options.budget_ms)
        report["in_model"].append(found | {"difference": relative(logits["fa4"], logits["ours"])})
    report["fa4_ms_alone_afterwards"] = fa4_times(model.shape, options.lengths, 1000)
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
