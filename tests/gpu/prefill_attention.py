"""What exact attention takes within a model: PyTorch runs the model of bench_prefill.py with each contender's attention in turn.

Alone a kernel runs on a cooler chip: between two calls in a model lie matrix products, which take an H200 to its power limit, where it
lowers its clock. What FA4 would take in the plugin's place is therefore its time here rather than its time alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hyperattention.config import Config
from hyperattention.errors import EnvironmentFault
from hyperattention.export.patch import install
from hyperattention.export.plan import ExportPlan
from hyperattention.export.task_module import TaskModule
from hyperattention.validate.bench_rivals import Rival

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
